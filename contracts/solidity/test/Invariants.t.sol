// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {JobEscrow} from "../src/JobEscrow.sol";
import {StakeVault} from "../src/StakeVault.sol";
import {Ledgers} from "./Ledgers.sol";

/// @title Random but sensible use of the contracts by everyone at once, lies included.
contract Handler is Ledgers {
    bytes32[] public jobs;
    mapping(bytes32 => uint128[2]) public owed;
    mapping(bytes32 => uint128) public highestCommitted;
    /// What was seen to break; a revert in here would only undo the call.
    bool public committedFell;
    bool public slashedTooMuch;

    constructor(uint64 window) {
        deployAll(window);
        token.mint(ALICE, PURSE);
        vm.prank(ALICE);
        token.approve(address(vault), PURSE);
    }

    function contracts() external view returns (JobEscrow, StakeVault, address) {
        return (escrow, vault, address(token));
    }

    function numJobs() external view returns (uint256) {
        return jobs.length;
    }

    function passTime(uint256 seconds_) external {
        vm.warp(block.timestamp + bound(seconds_, 1, 12 hours));
    }

    function open(uint128 amount, uint64 life) external {
        vm.prank(sponsor);
        bytes32 digest = keccak256(abi.encode(jobs.length));
        uint64 deadline = uint64(block.timestamp + bound(life, 1, 10 days));
        jobs.push(escrow.open(digest, COORDINATOR, uint128(bound(amount, 1, PURSE / 100)), deadline));
    }

    function topUp(uint256 which, uint128 amount) external {
        vm.prank(sponsor);
        escrow.topUp(_job(which), uint128(bound(amount, 1, PURSE / 100)));
    }

    /// Half of the roots promise more than their total.
    function postEpoch(uint256 which, uint128 a, uint128 b, uint128 understated) external {
        bytes32 jobId = _job(which);
        JobEscrow.Job memory job = escrow.jobOf(jobId);
        uint128[2] memory next = owed[jobId];
        next[0] += uint128(bound(a, 0, job.funded / 3));
        next[1] += uint128(bound(b, 0, job.funded / 3));
        uint128 total = next[0] + next[1];
        if (understated % 2 == 0) total -= uint128(bound(understated, 0, total));
        bytes32 root = pair(leaf(jobId, ALICE, next[0]), leaf(jobId, BOB, next[1]));
        vm.prank(COORDINATOR);
        escrow.post(jobId, epoch(job.epoch + 1, root, total));
        owed[jobId] = next;
        if (total < highestCommitted[jobId]) committedFell = true;
        highestCommitted[jobId] = total;
    }

    function claim(uint256 which, bool alice) external {
        bytes32 jobId = _job(which);
        uint128[2] memory own = owed[jobId];
        bytes32 a = leaf(jobId, ALICE, own[0]);
        bytes32 b = leaf(jobId, BOB, own[1]);
        if (alice) escrow.claim(jobId, ALICE, own[0], path(b));
        else escrow.claim(jobId, BOB, own[1], path(a));
    }

    function close(uint256 which) external {
        if (which % 8 != 0) return;
        vm.prank(COORDINATOR);
        escrow.close(_job(which / 8));
    }

    function refund(uint256 which) external {
        escrow.refund(_job(which));
    }

    function stake(uint128 amount) external {
        vm.prank(ALICE);
        vault.stake(uint128(bound(amount, 1, PURSE / 50)));
    }

    function unbond(uint128 amount) external {
        (uint128 active,,) = vault.stakeOf(ALICE);
        vm.prank(ALICE);
        vault.requestUnbond(uint128(bound(amount, 1, active)));
    }

    function withdraw() external {
        vm.prank(ALICE);
        vault.withdraw();
    }

    function slash(uint128 amount) external {
        (uint128 active, uint128 unbonding,) = vault.stakeOf(ALICE);
        uint128 before = active + unbonding;
        vm.prank(COURT);
        uint128 taken = vault.slash(ALICE, uint128(bound(amount, 1, PURSE / 200)), "case", BOB);
        if (taken > before) slashedTooMuch = true;
    }

    function _job(uint256 which) private view returns (bytes32) {
        return jobs[which % jobs.length];
    }
}

abstract contract InvariantChecks is Ledgers {
    Handler internal handler;

    function targetContracts() public view returns (address[] memory targets) {
        targets = new address[](1);
        targets[0] = address(handler);
    }

    function invariant_everyJobIsSolventAndTheBalanceIsTheirSum() public view {
        require(!handler.committedFell(), "committed fell");
        (JobEscrow e,, address t) = handler.contracts();
        uint256 held;
        for (uint256 i = 0; i < handler.numJobs(); ++i) {
            JobEscrow.Job memory job = e.jobOf(handler.jobs(i));
            require(job.claimed <= job.committed, "claimed above committed");
            require(uint256(job.committed) + job.refunded <= job.funded, "committed above funded");
            require(job.acceptedTotal <= job.committed, "accepted above committed");
            held += job.funded - job.claimed - job.refunded;
        }
        (bool ok, bytes memory answer) = t.staticcall(abi.encodeWithSignature("balanceOf(address)", address(e)));
        require(ok && abi.decode(answer, (uint256)) == held, "balance is not the sum of the jobs");
    }

    function invariant_theVaultHoldsExactlyTheStakes() public view {
        require(!handler.slashedTooMuch(), "slashed above the stake");
        (, StakeVault v, address t) = handler.contracts();
        (uint128 active, uint128 unbonding,) = v.stakeOf(ALICE);
        (bool ok, bytes memory answer) = t.staticcall(abi.encodeWithSignature("balanceOf(address)", address(v)));
        require(ok && abi.decode(answer, (uint256)) == uint256(active) + unbonding, "stake is not the balance");
    }
}

contract InvariantsWithoutWindowTest is InvariantChecks {
    function setUp() public {
        handler = new Handler(0);
    }
}

contract InvariantsWithWindowTest is InvariantChecks {
    function setUp() public {
        handler = new Handler(2 hours);
    }
}
