// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {DevUSD} from "../src/DevUSD.sol";
import {JobEscrow} from "../src/JobEscrow.sol";
import {ModelShares} from "../src/ModelShares.sol";
import {ProvenanceLog} from "../src/ProvenanceLog.sol";
import {Ledgers} from "./Ledgers.sol";
import {UncappedEscrow} from "./Mutants.sol";

/// @title What halmos proves: for every amount and every total, not for some.
/// @dev The arguments of `check_` functions are symbolic; forge does not run them. A call that reverts
/// ends its path, so what may be refused is tried by `_claimed`.
abstract contract Payouts is Ledgers {
    bytes32[] internal none;

    function prepare() internal {
        vm.warp(1_000_000);
        sponsor = address(0xA0);
        token = new DevUSD();
        log = new ProvenanceLog();
        escrow = new JobEscrow(token, log, address(0xA3), COURT, 0, 0);
    }

    function posted(JobEscrow into, uint128 funded, uint128 total, bytes32 root) internal returns (bytes32 jobId) {
        token.mint(sponsor, funded);
        vm.prank(sponsor);
        token.approve(address(into), funded);
        vm.prank(sponsor);
        jobId = into.open(DIGEST, COORDINATOR, funded, uint64(block.timestamp) + 1 days);
        vm.prank(COORDINATOR);
        into.post(jobId, epoch(1, root, total));
    }

    function leafIn(JobEscrow held, bytes32 jobId, address who, uint128 cumulative) internal view returns (bytes32) {
        return keccak256(bytes.concat(keccak256(abi.encode(block.chainid, address(held), jobId, who, cumulative))));
    }

    /// Whatever two leaves promise, both payees together get no more than the total posted.
    function payoutIsCapped(JobEscrow held, bytes32 jobId, uint128 funded, uint128 total, uint128 a, uint128 b)
        internal
    {
        bytes32 leafA = leafIn(held, jobId, ALICE, a);
        bytes32 leafB = leafIn(held, jobId, BOB, b);
        posted(held, funded, total, pair(leafA, leafB));
        _claimed(held, jobId, ALICE, a, leafB);
        _claimed(held, jobId, BOB, b, leafA);
        uint256 paid = token.balanceOf(ALICE) + token.balanceOf(BOB);
        assert(paid <= total);
        assert(token.balanceOf(address(held)) == funded - paid);
    }

    function _claimed(JobEscrow held, bytes32 jobId, address who, uint128 cumulative, bytes32 sibling) private {
        try held.claim(jobId, who, cumulative, path(sibling)) {} catch {}
    }
}

contract Proofs is Payouts {
    function setUp() public {
        prepare();
    }

    /// The same leaf is paid once, to the last unit.
    function check_payOnce(uint128 funded, uint128 total, uint128 cumulative) public {
        bytes32 jobId = escrow.jobIdOf(sponsor, DIGEST);
        posted(escrow, funded, total, leafIn(escrow, jobId, ALICE, cumulative));
        escrow.claim(jobId, ALICE, cumulative, none);
        assert(escrow.claim(jobId, ALICE, cumulative, none) == 0);
        assert(token.balanceOf(ALICE) == cumulative);
        assert(escrow.claimed(jobId, ALICE) == cumulative);
    }

    function check_payoutIsWithinCommitted(uint128 funded, uint128 total, uint128 a, uint128 b) public {
        bytes32 jobId = escrow.jobIdOf(sponsor, DIGEST);
        payoutIsCapped(escrow, jobId, funded, total, a, b);
        JobEscrow.Job memory job = escrow.jobOf(jobId);
        assert(job.claimed <= job.committed && job.committed <= job.funded);
    }

    /// A later root pays the difference, and both together stay within the later total.
    function check_twoEpochsPayTheDifference(uint128 funded, uint128 first, uint128 second, uint128 a, uint128 b)
        public
    {
        bytes32 jobId = escrow.jobIdOf(sponsor, DIGEST);
        posted(escrow, funded, first, leafIn(escrow, jobId, ALICE, a));
        escrow.claim(jobId, ALICE, a, none);
        vm.prank(COORDINATOR);
        escrow.post(jobId, epoch(2, leafIn(escrow, jobId, ALICE, b), second));
        escrow.claim(jobId, ALICE, b, none);
        assert(token.balanceOf(ALICE) == (a < b ? b : a));
        assert(token.balanceOf(ALICE) <= second && second <= funded);
    }

    /// Shares are minted once and never beyond the total released.
    function check_sharesAreWithinTheRelease(uint96 total, uint96 a, uint96 b) public {
        ModelShares shares = new ModelShares(token, escrow);
        bytes32 jobId = posted(escrow, 1, 0, 0);
        uint256 id = uint256(jobId);
        bytes32 leafA = shares.leafOf(id, ALICE, a);
        bytes32 leafB = shares.leafOf(id, BOB, b);
        vm.prank(COORDINATOR);
        shares.release(jobId, ModelShares.Release(pair(leafA, leafB), total, false, address(0), 0));
        shares.mintByProof(id, ALICE, a, path(leafB));
        assert(shares.mintByProof(id, ALICE, a, path(leafB)) == 0);
        try shares.mintByProof(id, BOB, b, path(leafA)) {} catch {}
        uint256 held = shares.balanceOf(ALICE, id) + shares.balanceOf(BOB, id);
        assert(held == shares.totalSupply(id) && held <= total);
    }
}

/// @title The negative control: the same property of an escrow without the cap, which halmos must refute.
contract ProofsControl is Payouts {
    function setUp() public {
        prepare();
        escrow = JobEscrow(address(new UncappedEscrow(token)));
    }

    function check_payoutIsWithinCommitted(uint128 funded, uint128 total, uint128 a, uint128 b) public {
        payoutIsCapped(escrow, DIGEST, funded, total, a, b);
    }
}
