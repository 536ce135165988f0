// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {DevUSD} from "../src/DevUSD.sol";
import {JobEscrow} from "../src/JobEscrow.sol";
import {Penalty} from "../src/Penalty.sol";
import {ProvenanceLog} from "../src/ProvenanceLog.sol";
import {Permit} from "../src/TokenPull.sol";
import {Ledgers} from "./Ledgers.sol";

/// @title A token that refuses one account, as dollar tokens do.
contract Blocklist is DevUSD {
    address public refused;

    error Refused(address account);

    function refuse(address account) external {
        refused = account;
    }

    function _update(address from, address to, uint256 value) internal override {
        if (to == refused && to != address(0)) revert Refused(to);
        super._update(from, to, value);
    }
}

contract JobEscrowTest is Ledgers {
    uint64 private constant WINDOW = 100;

    bytes32[] private none;

    function setUp() public {
        deployAll(0);
    }

    function testOpenHoldsTheMoneyUnderTheSponsorsId() public {
        bytes32 jobId = openJob(100);
        eq(jobId, keccak256(abi.encode(sponsor, DIGEST)), "id");
        JobEscrow.Job memory job = escrow.jobOf(jobId);
        require(job.sponsor == sponsor && job.coordinator == COORDINATOR, "parties");
        eq(job.funded, 100, "funded");
        eq(token.balanceOf(address(escrow)), 100, "balance");
    }

    function testAStrangerCannotTakeAnothersId() public {
        token.mint(ALICE, 1);
        vm.prank(ALICE);
        token.approve(address(escrow), 1);
        vm.prank(ALICE);
        bytes32 theirs = escrow.open(DIGEST, ALICE, 1, uint64(block.timestamp) + 1);
        require(openJob(100) != theirs, "same id");
    }

    function testOpenWithPermit() public {
        vm.prank(sponsor);
        token.approve(address(escrow), 0);
        Permit memory signed = permit(SPONSOR_KEY, address(escrow), 100);
        vm.prank(sponsor);
        bytes32 jobId = escrow.openWithPermit(DIGEST, COORDINATOR, 100, uint64(block.timestamp) + 1, signed);
        eq(escrow.jobOf(jobId).funded, 100, "funded");
    }

    function testAPermitSpentByAStrangerDoesNotStopTheOpening() public {
        vm.prank(sponsor);
        token.approve(address(escrow), 0);
        Permit memory p = permit(SPONSOR_KEY, address(escrow), 100);
        token.permit(sponsor, address(escrow), 100, p.deadline, p.v, p.r, p.s);
        vm.prank(sponsor);
        escrow.openWithPermit(DIGEST, COORDINATOR, 100, uint64(block.timestamp) + 1, p);
        eq(token.balanceOf(address(escrow)), 100, "balance");
    }

    function testAPermitForLessIsRefused() public {
        vm.prank(sponsor);
        token.approve(address(escrow), 0);
        Permit memory p = permit(SPONSOR_KEY, address(escrow), 99);
        vm.expectRevert();
        vm.prank(sponsor);
        escrow.openWithPermit(DIGEST, COORDINATOR, 100, uint64(block.timestamp) + 1, p);
    }

    function testOpenErrors() public {
        uint64 later = uint64(block.timestamp) + 1;
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.ZeroAmount.selector));
        vm.prank(sponsor);
        escrow.open(DIGEST, COORDINATOR, 0, later);
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.ZeroCoordinator.selector));
        vm.prank(sponsor);
        escrow.open(DIGEST, address(0), 1, later);
        uint64 current = uint64(block.timestamp);
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.DeadlinePassed.selector, current, current));
        vm.prank(sponsor);
        escrow.open(DIGEST, COORDINATOR, 1, current);
        bytes32 jobId = openJob(1);
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.JobExists.selector, jobId));
        openJob(1);
    }

    function testTopUp() public {
        bytes32 jobId = openJob(100);
        vm.prank(sponsor);
        escrow.topUp(jobId, 11);
        eq(escrow.jobOf(jobId).funded, 111, "funded");
        eq(token.balanceOf(address(escrow)), 111, "balance");
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.ZeroAmount.selector));
        escrow.topUp(jobId, 0);
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.NoSuchJob.selector, bytes32("x")));
        escrow.topUp("x", 1);
        vm.prank(COORDINATOR);
        escrow.close(jobId);
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.JobClosed.selector, jobId));
        escrow.topUp(jobId, 1);
    }

    function testPostAnchorsInTheSameTransaction() public {
        bytes32 jobId = openJob(100);
        post(jobId, 1, bytes32("root"), 60);
        eq(escrow.jobOf(jobId).committed, 60, "committed");
        bytes32 root = epoch(1, 0, 0).provRoot;
        eq(log.head(address(escrow), jobId), keccak256(abi.encode(bytes32(0), root, uint64(4))), "head");
        eq(log.seq(address(escrow), jobId), 1, "seq");
    }

    function testPostErrors() public {
        bytes32 jobId = openJob(100);
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.NoSuchJob.selector, bytes32("x")));
        escrow.post("x", epoch(1, 0, 0));
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.NotCoordinator.selector, address(this), COORDINATOR));
        escrow.post(jobId, epoch(1, 0, 0));
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.WrongEpoch.selector, 2, 1));
        post(jobId, 2, 0, 0);
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.TotalAboveFunds.selector, 101, 100));
        post(jobId, 1, 0, 101);
        eq(escrow.jobOf(jobId).committed, 0, "a root above the funds commits nothing");
        eq(token.balanceOf(address(escrow)), 100, "and moves nothing");
        post(jobId, 1, 0, 60);
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.WrongEpoch.selector, 1, 2));
        post(jobId, 1, 0, 60);
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.TotalDecreased.selector, 59, 60));
        post(jobId, 2, 0, 59);
        vm.prank(COORDINATOR);
        escrow.close(jobId);
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.JobClosed.selector, jobId));
        post(jobId, 2, 0, 60);
    }

    function testClaimPaysTheDifferenceOnce() public {
        bytes32 jobId = openJob(100);
        bytes32 a = leaf(jobId, ALICE, 40);
        bytes32 b = leaf(jobId, BOB, 20);
        post(jobId, 1, pair(a, b), 60);
        eq(escrow.claim(jobId, ALICE, 40, path(b)), 40, "first");
        eq(escrow.claim(jobId, ALICE, 40, path(b)), 0, "again");
        a = leaf(jobId, ALICE, 70);
        post(jobId, 2, pair(a, b), 90);
        eq(escrow.claim(jobId, ALICE, 70, path(b)), 30, "rise");
        eq(escrow.claim(jobId, BOB, 20, path(a)), 20, "other");
        eq(token.balanceOf(ALICE), 70, "alice");
        eq(token.balanceOf(BOB), 20, "bob");
        eq(escrow.jobOf(jobId).claimed, 90, "claimed");
    }

    function testClaimRefusesWhatTheRootDoesNotSay() public {
        bytes32 jobId = openJob(100);
        bytes32 b = leaf(jobId, BOB, 20);
        post(jobId, 1, pair(leaf(jobId, ALICE, 40), b), 60);
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.BadProof.selector, jobId, ALICE, 41));
        escrow.claim(jobId, ALICE, 41, path(b));
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.BadProof.selector, jobId, COORDINATOR, 40));
        escrow.claim(jobId, COORDINATOR, 40, path(b));
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.BadProof.selector, jobId, ALICE, 40));
        escrow.claim(jobId, ALICE, 40, none);
    }

    function testALyingRootIsCappedByItsTotal() public {
        bytes32 jobId = openJob(100);
        post(jobId, 1, leaf(jobId, ALICE, 90), 60);
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.ClaimAboveTotal.selector, 90, 60));
        escrow.claim(jobId, ALICE, 90, none);
    }

    function testARootOfOneJobCannotTouchAnother() public {
        bytes32 jobA = openJob(100);
        vm.prank(sponsor);
        bytes32 jobB = escrow.open("other", COORDINATOR, 100, uint64(block.timestamp) + 1);
        bytes32 root = leaf(jobA, ALICE, 50);
        post(jobA, 1, root, 50);
        vm.prank(COORDINATOR);
        escrow.post(jobB, epoch(1, root, 50));
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.BadProof.selector, jobB, ALICE, 50));
        escrow.claim(jobB, ALICE, 50, none);
        eq(token.balanceOf(ALICE) + escrow.jobOf(jobB).claimed, 0, "nothing moved");
        eq(escrow.claim(jobA, ALICE, 50, none), 50, "own job");
    }

    function testClaimManySkipsAndReports() public {
        Blocklist harsh = new Blocklist();
        harsh.refuse(BOB);
        token = harsh;
        deployPair(COURT, 0, 0);
        token.mint(sponsor, PURSE);
        vm.prank(sponsor);
        token.approve(address(escrow), PURSE);
        bytes32 jobId = openJob(100);
        bytes32 a = leaf(jobId, ALICE, 40);
        bytes32 b = leaf(jobId, BOB, 20);
        post(jobId, 1, pair(a, b), 60);
        (address[] memory who, uint128[] memory cumulative, bytes32[][] memory proofs) = _three(a, b);
        vm.expectEmit();
        emit JobEscrow.ClaimSkipped(jobId, BOB, abi.encodeWithSelector(Blocklist.Refused.selector, BOB));
        vm.expectEmit();
        emit JobEscrow.ClaimSkipped(
            jobId, sponsor, abi.encodeWithSelector(JobEscrow.BadProof.selector, jobId, sponsor, 5)
        );
        vm.expectEmit();
        emit JobEscrow.Claimed(jobId, ALICE, 40, 40);
        eq(escrow.claimMany(jobId, who, cumulative, proofs), 40, "paid");
        eq(escrow.claimed(jobId, BOB), 0, "a skipped payee is owed still");
        harsh.refuse(address(0));
        eq(escrow.claim(jobId, BOB, 20, path(a)), 20, "paid later");
    }

    function _three(bytes32 a, bytes32 b)
        private
        view
        returns (address[] memory who, uint128[] memory cumulative, bytes32[][] memory proofs)
    {
        who = new address[](3);
        cumulative = new uint128[](3);
        proofs = new bytes32[][](3);
        (who[0], cumulative[0], proofs[0]) = (BOB, 20, path(a));
        (who[1], cumulative[1], proofs[1]) = (sponsor, 5, path(a));
        (who[2], cumulative[2], proofs[2]) = (ALICE, 40, path(b));
    }

    function testClaimManyRefusesUnequalLists() public {
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.LengthMismatch.selector, 1, 0, 0));
        escrow.claimMany("x", new address[](1), new uint128[](0), new bytes32[][](0));
    }

    function testCloseAndRefund() public {
        bytes32 jobId = openJob(100);
        post(jobId, 1, leaf(jobId, ALICE, 60), 60);
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.NotCoordinator.selector, address(this), COORDINATOR));
        escrow.close(jobId);
        uint64 deadline = escrow.jobOf(jobId).deadline;
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.RefundTooEarly.selector, deadline, uint64(block.timestamp)));
        escrow.refund(jobId);
        vm.prank(COORDINATOR);
        escrow.close(jobId);
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.JobClosed.selector, jobId));
        vm.prank(COORDINATOR);
        escrow.close(jobId);
        eq(escrow.refund(jobId), 40, "refund");
        eq(token.balanceOf(sponsor), PURSE - 60, "sponsor");
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.NothingToRefund.selector, jobId));
        escrow.refund(jobId);
        eq(escrow.claim(jobId, ALICE, 60, none), 60, "still owed");
        eq(token.balanceOf(address(escrow)), 0, "all gone");
    }

    function testRefundAfterTheDeadlineEndsTheJob() public {
        bytes32 jobId = openJob(100);
        vm.warp(block.timestamp + 1 days);
        post(jobId, 1, leaf(jobId, ALICE, 60), 60);
        eq(escrow.refund(jobId), 40, "late work is paid, the rest comes back");
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.JobClosed.selector, jobId));
        post(jobId, 2, 0, 100);
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.NoSuchJob.selector, bytes32("x")));
        escrow.refund("x");
    }

    function testChallengeWindow() public {
        deployPair(COURT, 100, 0);
        vm.prank(sponsor);
        token.approve(address(escrow), PURSE);
        bytes32 jobId = openJob(100);
        uint64 start = uint64(block.timestamp);
        post(jobId, 1, leaf(jobId, ALICE, 10), 10);
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.BadProof.selector, jobId, ALICE, 10));
        escrow.claim(jobId, ALICE, 10, none);
        vm.warp(start + 99);
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.InsideChallengeWindow.selector, start + 100, start + 99));
        post(jobId, 2, leaf(jobId, ALICE, 30), 30);
        vm.warp(start + 100);
        post(jobId, 2, leaf(jobId, ALICE, 30), 30);
        eq(escrow.claim(jobId, ALICE, 10, none), 10, "the accepted root pays during the next window");
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.BadProof.selector, jobId, ALICE, 30));
        escrow.claim(jobId, ALICE, 30, none);
        vm.warp(start + 200);
        eq(escrow.claim(jobId, ALICE, 30, none), 20, "matured");
    }

    function testAnAcceptedRootIsCappedByItsOwnTotalDuringTheNextWindow() public {
        deployPair(COURT, 100, 0);
        vm.prank(sponsor);
        token.approve(address(escrow), PURSE);
        bytes32 jobId = openJob(100);
        post(jobId, 1, leaf(jobId, ALICE, 50), 10);
        vm.warp(block.timestamp + 100);
        post(jobId, 2, leaf(jobId, BOB, 90), 90);
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.ClaimAboveTotal.selector, 50, 10));
        escrow.claim(jobId, ALICE, 50, none);
    }

    function testTheFirstRootIsUnclaimableInItsWindow() public {
        bytes32 jobId = _openWithWindow(0);
        post(jobId, 1, leaf(jobId, ALICE, 10), 10);
        (bytes32 root, uint128 total) = escrow.claimable(jobId);
        eq(root, 0, "no root");
        eq(total, 0, "no total");
        eq(escrow.jobOf(jobId).acceptedRoot, 0, "nothing is accepted");
        vm.warp(block.timestamp + WINDOW);
        (root, total) = escrow.claimable(jobId);
        eq(root, leaf(jobId, ALICE, 10), "the root");
        eq(total, 10, "the total");
    }

    function testABondIsPutUpAndComesBackAfterAWindow() public {
        bytes32 jobId = _openWithWindow(0);
        _fundCoordinator(30);
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.NotCoordinator.selector, address(this), COORDINATOR));
        escrow.putUpBond(jobId, 10);
        _putUp(jobId, 10);
        _putUp(jobId, 20);
        eq(escrow.jobOf(jobId).bond, 30, "bond");
        eq(escrow.jobOf(jobId).funded, 100, "a bond is not the job's money");
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.ZeroAmount.selector));
        _putUp(jobId, 0);
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.JobStillOpen.selector, jobId));
        escrow.returnBond(jobId);
        post(jobId, 1, leaf(jobId, ALICE, 60), 60);
        vm.warp(block.timestamp + 10);
        vm.prank(COORDINATOR);
        escrow.close(jobId);
        eq(escrow.refund(jobId), 40, "the sponsor's part");
        uint64 until = uint64(block.timestamp) + WINDOW;
        vm.warp(until - 1);
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.BondHeld.selector, until, until - 1));
        escrow.returnBond(jobId);
        vm.warp(until);
        eq(escrow.returnBond(jobId), 30, "back");
        eq(token.balanceOf(COORDINATOR), 30, "to the coordinator");
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.NoBond.selector, jobId));
        escrow.returnBond(jobId);
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.JobClosed.selector, jobId));
        _putUp(jobId, 1);
        eq(escrow.claim(jobId, ALICE, 60, none), 60, "what is owed is still there");
    }

    function testABondOutlastsARootPostedAfterTheDeadline() public {
        bytes32 jobId = _openWithWindow(0);
        _fundCoordinator(30);
        _putUp(jobId, 30);
        vm.warp(block.timestamp + 3 days);
        post(jobId, 1, leaf(jobId, ALICE, 60), 60);
        escrow.refund(jobId);
        uint64 readyAt = uint64(block.timestamp) + WINDOW;
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.BondHeld.selector, readyAt, uint64(block.timestamp)));
        escrow.returnBond(jobId);
        vm.warp(readyAt);
        eq(escrow.returnBond(jobId), 30, "back");
    }

    function testNobodyPostsBelowTheMinimumBond() public {
        bytes32 jobId = _openWithWindow(30);
        _fundCoordinator(30);
        _putUp(jobId, 29);
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.BondTooSmall.selector, 29, 30));
        post(jobId, 1, 0, 0);
        _putUp(jobId, 1);
        post(jobId, 1, 0, 0);
    }

    function testAFrozenRootNeverBecomesClaimable() public {
        bytes32 jobId = _openWithWindow(0);
        _fundCoordinator(30);
        _putUp(jobId, 30);
        post(jobId, 1, leaf(jobId, ALICE, 10), 10);
        vm.warp(block.timestamp + WINDOW);
        post(jobId, 2, leaf(jobId, ALICE, 90), 90);
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.NotCourt.selector, address(this)));
        escrow.freeze(jobId, "case", BOB);
        eq(_freeze(jobId), 30, "forfeited");
        JobEscrow.Job memory job = escrow.jobOf(jobId);
        require(job.frozen && job.closed, "over");
        eq(job.committed, 10, "what was accepted");
        eq(job.funded, 100 + 18, "the injured job");
        (uint128 active,,) = vault.stakeOf(BOB);
        eq(active, 9, "the challenger");
        eq(token.balanceOf(Penalty.BURN), 3, "burnt");
        vm.warp(block.timestamp + 100 * WINDOW);
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.BadProof.selector, jobId, ALICE, 90));
        escrow.claim(jobId, ALICE, 90, none);
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.JobFrozen.selector, jobId));
        post(jobId, 3, leaf(jobId, COORDINATOR, 118), 118);
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.JobFrozen.selector, jobId));
        escrow.topUp(jobId, 1);
        eq(escrow.refund(jobId), 108, "the sponsor's");
        eq(escrow.claim(jobId, ALICE, 10, none), 10, "accepted work is paid");
        eq(token.balanceOf(address(escrow)), 0, "nothing is stranded");
    }

    function testAFreezeLeavesAnAcceptedRoot() public {
        bytes32 jobId = _openWithWindow(0);
        post(jobId, 1, leaf(jobId, ALICE, 10), 10);
        vm.warp(block.timestamp + WINDOW);
        eq(_freeze(jobId), 0, "no bond");
        eq(_freeze(jobId), 0, "again");
        eq(escrow.jobOf(jobId).committed, 10, "committed");
        eq(escrow.claim(jobId, ALICE, 10, none), 10, "paid");
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.NoSuchJob.selector, bytes32("x")));
        _freeze("x");
    }

    function testAFreezeReachesAJobThatIsClosedAndRefunded() public {
        bytes32 jobId = _openWithWindow(0);
        post(jobId, 1, leaf(jobId, ALICE, 60), 60);
        vm.prank(COORDINATOR);
        escrow.close(jobId);
        eq(escrow.refund(jobId), 40, "first");
        _freeze(jobId);
        eq(escrow.refund(jobId), 60, "what the frozen root had committed");
        eq(token.balanceOf(address(escrow)), 0, "all back");
    }

    function testCompensationOfAFinishedJobIsItsSponsors() public {
        bytes32 jobId = openJob(100);
        vm.prank(COORDINATOR);
        escrow.close(jobId);
        eq(escrow.refund(jobId), 100, "refund");
        vm.prank(sponsor);
        escrow.compensate(jobId, 7);
        eq(escrow.refund(jobId), 7, "again");
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.ZeroAmount.selector));
        escrow.compensate(jobId, 0);
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.NoSuchJob.selector, bytes32("x")));
        escrow.compensate("x", 1);
    }

    /// Whatever the totals, the bond and the moment of the freeze, nobody is paid above what was
    /// accepted and every unit ends with somebody.
    function testFuzzAFreezeConservesMoney(uint128 first, uint128 second, uint128 bond, uint64 after_) public {
        first = uint128(bound(first, 0, 100));
        second = uint128(bound(second, first, 100));
        bond = uint128(bound(bond, 1, 1000));
        bytes32 jobId = _openWithWindow(0);
        _fundCoordinator(bond);
        _putUp(jobId, bond);
        post(jobId, 1, leaf(jobId, ALICE, first), first);
        vm.warp(block.timestamp + WINDOW);
        post(jobId, 2, leaf(jobId, ALICE, second), second);
        vm.warp(block.timestamp + bound(after_, 0, 2 * WINDOW));
        bool accepted = block.timestamp >= escrow.jobOf(jobId).readyAt;
        _freeze(jobId);
        uint128 owed = accepted ? second : first;
        eq(escrow.claim(jobId, ALICE, owed, none), owed, "owed");
        escrow.refund(jobId);
        (uint128 reward,,) = vault.stakeOf(BOB);
        eq(token.balanceOf(sponsor) + owed + reward + token.balanceOf(Penalty.BURN), PURSE + bond, "conserved");
        eq(token.balanceOf(address(escrow)), 0, "nothing is stranded");
    }

    function _openWithWindow(uint128 minBond) private returns (bytes32) {
        deployPair(COURT, WINDOW, minBond);
        vm.prank(sponsor);
        token.approve(address(escrow), PURSE);
        return openJob(100);
    }

    function _fundCoordinator(uint128 amount) private {
        token.mint(COORDINATOR, amount);
        vm.prank(COORDINATOR);
        token.approve(address(escrow), amount);
    }

    function _putUp(bytes32 jobId, uint128 amount) private {
        vm.prank(COORDINATOR);
        escrow.putUpBond(jobId, amount);
    }

    function _freeze(bytes32 jobId) private returns (uint128) {
        vm.prank(COURT);
        return escrow.freeze(jobId, "case", BOB);
    }

    function testFuzzPaymentsStayInsideTheTotal(uint128 owedA, uint128 owedB, uint128 total, uint128 funds) public {
        funds = uint128(bound(funds, 1, PURSE));
        total = uint128(bound(total, 0, funds));
        owedA = uint128(bound(owedA, 1, PURSE));
        owedB = uint128(bound(owedB, 1, PURSE));
        bytes32 jobId = openJob(funds);
        bytes32 a = leaf(jobId, ALICE, owedA);
        bytes32 b = leaf(jobId, BOB, owedB);
        post(jobId, 1, pair(a, b), total);
        try escrow.claim(jobId, ALICE, owedA, path(b)) {} catch {}
        try escrow.claim(jobId, BOB, owedB, path(a)) {} catch {}
        require(token.balanceOf(ALICE) + token.balanceOf(BOB) <= total, "paid above the total");
        if (uint256(owedA) + owedB <= total) {
            eq(token.balanceOf(ALICE) + token.balanceOf(BOB), uint256(owedA) + owedB, "an honest root pays all");
        }
    }
}
