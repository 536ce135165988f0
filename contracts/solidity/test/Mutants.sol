// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {JobEscrow} from "../src/JobEscrow.sol";

/// @title An escrow that believes its roots: as much as a claim proves, whatever total was posted.
/// @dev What the proofs must find wrong; a proof that passes here proves nothing.
contract UncappedEscrow {
    IERC20 private immutable _token;
    mapping(bytes32 => bytes32) private _roots;
    mapping(bytes32 => mapping(address => uint128)) public claimed;

    constructor(IERC20 token) {
        _token = token;
    }

    function open(bytes32 jobDigest, address, uint128 amount, uint64) external returns (bytes32) {
        require(_token.transferFrom(msg.sender, address(this), amount), "not taken");
        return jobDigest;
    }

    function post(bytes32 jobId, JobEscrow.Epoch calldata epoch) external {
        _roots[jobId] = epoch.payRoot;
    }

    function claim(bytes32 jobId, address who, uint128 cumulative, bytes32[] calldata proof)
        external
        returns (uint128 amount)
    {
        bytes32 node =
            keccak256(bytes.concat(keccak256(abi.encode(block.chainid, address(this), jobId, who, cumulative))));
        for (uint256 i = 0; i < proof.length; ++i) {
            node = node < proof[i] ? keccak256(abi.encode(node, proof[i])) : keccak256(abi.encode(proof[i], node));
        }
        require(node == _roots[jobId], "proof");
        amount = cumulative - claimed[jobId][who];
        claimed[jobId][who] = cumulative;
        require(_token.transfer(who, amount), "not paid");
    }
}

/// @title A vault whose slash steps over an unbond that has matured and was not withdrawn.
/// @dev The defect of Prime Intellect's `StakeManager.slash`, which leaves that money to nobody.
contract ForgetfulVault {
    struct Stake {
        uint128 active;
        uint128 unbonding;
        uint64 unbondAt;
    }

    IERC20 private immutable _token;
    uint64 private immutable _period;
    mapping(address => Stake) public stakeOf;

    constructor(IERC20 token, uint64 period) {
        _token = token;
        _period = period;
    }

    function stake(uint128 amount) external {
        stakeOf[msg.sender].active += amount;
        require(_token.transferFrom(msg.sender, address(this), amount), "not taken");
    }

    function requestUnbond(uint128 amount) external {
        Stake storage own = stakeOf[msg.sender];
        own.active -= amount;
        own.unbonding += amount;
        own.unbondAt = uint64(block.timestamp) + _period;
    }

    function withdraw() external {
        Stake storage own = stakeOf[msg.sender];
        require(block.timestamp >= own.unbondAt, "early");
        uint128 amount = own.unbonding;
        own.unbonding = 0;
        require(_token.transfer(msg.sender, amount), "not paid");
    }

    function slash(address account, uint128 amount, bytes32, bytes32, address challenger)
        external
        returns (uint128)
    {
        Stake storage accused = stakeOf[account];
        if (block.timestamp >= accused.unbondAt) accused.unbonding = 0;
        accused.active -= amount;
        require(_token.transfer(challenger, amount), "not paid");
        return amount;
    }
}

/// @title A court that never notes a new case in its list of votes, and so can decide none.
/// @dev The defect of Prime Intellect's `ValidatorQuorum.newCall`, whose `callVotes` never grows.
contract DeafCourt {
    uint256[] private _votes;
    mapping(bytes32 => uint256) private _places;
    uint256 private _numCases;

    function challenge(bytes32 jobId, address accused, bytes32 evidence) external returns (bytes32 caseId) {
        caseId = keccak256(abi.encode(jobId, accused, evidence));
        _places[caseId] = _numCases++;
    }

    function resolve(bytes32 caseId, bool guilty, bytes[] calldata votes) external {
        _votes[_places[caseId]] += guilty ? votes.length : 0;
    }

    function domainSeparator() external pure returns (bytes32) {
        return 0;
    }
}
