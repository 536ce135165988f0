// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {DevUSD} from "../src/DevUSD.sol";
import {JobEscrow} from "../src/JobEscrow.sol";
import {ProvenanceLog} from "../src/ProvenanceLog.sol";
import {StakeVault} from "../src/StakeVault.sol";
import {Permit} from "../src/TokenPull.sol";
import {Base} from "./Vm.sol";

/// @title A deployed set of contracts with funded parties.
abstract contract Ledgers is Base {
    uint64 internal constant UNBONDING = 6 hours;
    uint128 internal constant PURSE = 1e12;
    address internal constant COURT = address(0xC0);
    address internal constant COORDINATOR = address(0xC1);
    address internal constant ALICE = address(0xA1);
    address internal constant BOB = address(0xA2);
    uint256 internal constant SPONSOR_KEY = 0x5F;
    bytes32 internal constant DIGEST = keccak256("job");

    address internal sponsor;
    DevUSD internal token;
    StakeVault internal vault;
    ProvenanceLog internal log;
    JobEscrow internal escrow;

    function deployAll(uint64 window) internal {
        vm.warp(1_000_000);
        sponsor = vm.addr(SPONSOR_KEY);
        token = new DevUSD();
        log = new ProvenanceLog();
        deployPair(COURT, window, 0);
        token.mint(sponsor, PURSE);
        vm.prank(sponsor);
        token.approve(address(escrow), type(uint256).max);
    }

    /// A vault and an escrow of the present token that know each other and `court`.
    function deployPair(address court, uint64 window, uint128 minBond) internal {
        address escrowAt = vm.computeCreateAddress(address(this), vm.getNonce(address(this)) + 1);
        vault = new StakeVault(token, escrowAt, court, UNBONDING);
        escrow = new JobEscrow(token, log, address(vault), court, window, minBond);
    }

    function openJob(uint128 amount) internal returns (bytes32) {
        vm.prank(sponsor);
        return escrow.open(DIGEST, COORDINATOR, amount, uint64(block.timestamp) + 1 days);
    }

    function post(bytes32 jobId, uint32 number, bytes32 root, uint128 total) internal {
        vm.prank(COORDINATOR);
        escrow.post(jobId, epoch(number, root, total));
    }

    function epoch(uint32 number, bytes32 root, uint128 total) internal pure returns (JobEscrow.Epoch memory) {
        return JobEscrow.Epoch(number, root, keccak256(abi.encode("prov", number)), total, 3, 4);
    }

    function leaf(bytes32 jobId, address who, uint128 cumulative) internal view returns (bytes32) {
        return keccak256(bytes.concat(keccak256(abi.encode(block.chainid, address(escrow), jobId, who, cumulative))));
    }

    function pair(bytes32 a, bytes32 b) internal pure returns (bytes32) {
        return a < b ? keccak256(abi.encode(a, b)) : keccak256(abi.encode(b, a));
    }

    function path(bytes32 sibling) internal pure returns (bytes32[] memory proof) {
        proof = new bytes32[](1);
        proof[0] = sibling;
    }

    function permit(uint256 key, address spender, uint256 amount) internal view returns (Permit memory) {
        address owner = vm.addr(key);
        bytes32 kind = keccak256("Permit(address owner,address spender,uint256 value,uint256 nonce,uint256 deadline)");
        uint256 deadline = block.timestamp + 60;
        bytes32 message = keccak256(abi.encode(kind, owner, spender, amount, token.nonces(owner), deadline));
        (uint8 v, bytes32 r, bytes32 s) =
            vm.sign(key, keccak256(abi.encodePacked("\x19\x01", token.DOMAIN_SEPARATOR(), message)));
        return Permit(deadline, v, r, s);
    }
}
