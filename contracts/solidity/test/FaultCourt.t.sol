// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {Anchor, DroppedBid, Evidence, LoggedVerdict, Neighbour, PricedBid} from "../src/Evidence.sol";
import {FaultCourt} from "../src/FaultCourt.sol";
import {JobEscrow} from "../src/JobEscrow.sol";
import {BookSeal, ClearingCertificate, Receipt} from "../src/MarketRecords.sol";
import {Penalty} from "../src/Penalty.sol";
import {StakeVault} from "../src/StakeVault.sol";
import {CourtEvidence} from "./CourtEvidence.sol";

/// @title What the court takes for proof, and what it refuses.
contract FaultCourtTest is CourtEvidence {
    uint256 private constant HALF_ORDER = 0x7FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF5D576E7357A4501DDFE92F46681B20A0;
    uint256 private constant ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141;

    bytes32[] private none;

    function setUp() public {
        FaultCourt.Terms memory terms;
        terms.penalty = PENALTY;
        deployCourt(terms);
    }

    function testTwoResultsForOneLeaseCostTheProvider() public {
        (Receipt memory a, bytes memory forA) = _receipt("one");
        (Receipt memory b, bytes memory forB) = _receipt("two");
        vm.prank(BOB);
        bytes32 caseId = court.equivocation(a, forA, b, forB);
        eq(stakeOf(alice), 4 * PENALTY, "the accused");
        eq(escrow.jobOf(job).funded, FUNDS + 600, "the injured job");
        eq(stakeOf(BOB), 300, "the challenger");
        eq(token.balanceOf(Penalty.BURN), 100, "burnt");
        eq(token.balanceOf(address(court)), 0, "never the court");
        require(!escrow.jobOf(job).closed, "a provider's fault does not end the job");
        (address accused, FaultCourt.Fault fault, FaultCourt.Status status,, address challenger,, bytes32 evidence) =
            court.caseOf(caseId);
        require(accused == alice && challenger == BOB, "parties");
        require(fault == FaultCourt.Fault.Equivocation && status == FaultCourt.Status.Upheld, "decided");
        eq(evidence, keccak256(abi.encodeCall(court.equivocation, (a, forA, b, forB))), "evidence");
        vm.expectRevert(abi.encodeWithSelector(FaultCourt.CaseExists.selector, caseId, FaultCourt.Status.Upheld));
        court.equivocation(b, forB, a, forA);
        eq(stakeOf(alice), 4 * PENALTY, "once");
    }

    function testWhatIsNoEquivocation() public {
        (Receipt memory a, bytes memory forA) = _receipt("one");
        vm.expectRevert(abi.encodeWithSelector(FaultCourt.SameStatement.selector, a.resultDigest));
        court.equivocation(a, forA, a, forA);
        Receipt memory b = receiptOf("two");
        b.leaseEpoch = 2;
        _differs(a, forA, b, "leaseEpoch");
        b.leaseId = "another";
        _differs(a, forA, b, "leaseId");
        b.jobId = "another";
        _differs(a, forA, b, "jobId");
        b.account = BOB;
        _differs(a, forA, b, "account");
        (b,) = _receipt("two");
        bytes memory byAnother = signed(COORDINATOR_KEY, digests.receipt(b));
        vm.expectRevert(abi.encodeWithSelector(FaultCourt.WrongSigner.selector, coordinator, alice));
        court.equivocation(a, forA, b, byAnother);
        eq(stakeOf(alice), 5 * PENALTY, "stake");
    }

    function testSignaturesMustBeCanonical() public {
        (Receipt memory a, bytes memory forA) = _receipt("one");
        (Receipt memory b, bytes memory forB) = _receipt("two");
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(ALICE_KEY, digestOf(digests.receipt(b)));
        bytes32 high = bytes32(ORDER - uint256(s));
        require(uint256(high) > HALF_ORDER, "high");
        vm.expectRevert(abi.encodeWithSelector(ECDSA.ECDSAInvalidSignatureS.selector, high));
        court.equivocation(a, forA, b, abi.encodePacked(r, high, v == 27 ? 28 : 27));
        vm.expectRevert(abi.encodeWithSelector(ECDSA.ECDSAInvalidSignatureLength.selector, 64));
        court.equivocation(a, forA, b, abi.encodePacked(r, s));
        deployPair(address(court), 0, 0);
        bytes memory elsewhere = signed(ALICE_KEY, digests.receipt(b));
        require(keccak256(elsewhere) != keccak256(forB), "another domain");
        vm.expectRevert();
        court.equivocation(a, forA, b, elsewhere);
    }

    function testASlashAfterUnbondingIsNotASlash() public {
        (Receipt memory a, bytes memory forA) = _receipt("one");
        (Receipt memory b, bytes memory forB) = _receipt("two");
        vm.prank(alice);
        vault.requestUnbond(5 * PENALTY);
        vm.warp(block.timestamp + UNBONDING);
        vm.prank(alice);
        vault.withdraw();
        vm.expectRevert(abi.encodeWithSelector(StakeVault.NothingToSlash.selector, alice));
        vm.prank(BOB);
        court.equivocation(a, forA, b, forB);
        eq(token.balanceOf(alice), 5 * PENALTY, "alice");
        eq(token.balanceOf(address(vault)), 5 * PENALTY, "the coordinator's stake alone");
        eq(escrow.jobOf(job).funded, FUNDS, "job");
    }

    function testMaturedButUnwithdrawnStakeIsStillTaken() public {
        (Receipt memory a, bytes memory forA) = _receipt("one");
        (Receipt memory b, bytes memory forB) = _receipt("two");
        vm.prank(alice);
        vault.requestUnbond(5 * PENALTY);
        vm.warp(block.timestamp + UNBONDING);
        vm.prank(BOB);
        court.equivocation(a, forA, b, forB);
        vm.prank(alice);
        vault.withdraw();
        eq(token.balanceOf(alice), 4 * PENALTY, "the rest comes back");
    }

    function testNobodyAccusesItself() public {
        (Receipt memory a, bytes memory forA) = _receipt("one");
        (Receipt memory b, bytes memory forB) = _receipt("two");
        vm.expectRevert(abi.encodeWithSelector(FaultCourt.SelfAccusation.selector, alice));
        vm.prank(alice);
        court.equivocation(a, forA, b, forB);
    }

    function testADroppedBidEndsTheJobForItsCoordinator() public {
        _commit(100);
        DroppedBid memory evidence = droppedFrom(80, _book(3));
        vm.prank(BOB);
        bytes32 caseId = court.droppedBid(evidence);
        _checkPunished(alice, 5 * PENALTY, 1);
        eq(stakeOf(BOB), 0, "whoever sends the proof has no gain from it");
        vm.expectRevert(abi.encodeWithSelector(FaultCourt.CaseExists.selector, caseId, FaultCourt.Status.Upheld));
        court.droppedBid(evidence);
    }

    function testAnyJobsBidCountsForTheJob() public {
        DroppedBid memory evidence = droppedFrom(80, _book(3));
        evidence.bid.jobId = 0;
        evidence.receipt.commitment = commitmentOf(evidence.bid, evidence.salt);
        evidence.receiptSignature = signed(COORDINATOR_KEY, digests.bidReceipt(evidence.receipt));
        evidence.neighbours = around(evidence.receipt.commitment, _book(3));
        court.droppedBid(evidence);
        require(escrow.jobOf(job).frozen, "frozen");
    }

    function testWhatIsNoDroppedBid() public {
        DroppedBid memory evidence = droppedFrom(101, _book(3));
        vm.expectRevert(abi.encodeWithSelector(FaultCourt.AboveReserve.selector, 101, 100));
        court.droppedBid(evidence);
        evidence = droppedFrom(80, _book(3));
        evidence.salt = "another";
        bytes32 other = commitmentOf(evidence.bid, "another");
        vm.expectRevert(abi.encodeWithSelector(FaultCourt.WrongBid.selector, other, evidence.receipt.commitment));
        court.droppedBid(evidence);
        evidence = droppedFrom(80, _book(3));
        evidence.receiptSignature = signed(ALICE_KEY, digests.bidReceipt(evidence.receipt));
        vm.expectRevert(abi.encodeWithSelector(FaultCourt.WrongSigner.selector, alice, coordinator));
        court.droppedBid(evidence);
        evidence.certificateSignature = signed(ALICE_KEY, digests.certificate(evidence.certificate));
        vm.expectRevert(abi.encodeWithSelector(FaultCourt.WrongSigner.selector, alice, coordinator));
        court.droppedBid(evidence);
        evidence.certificate.jobId = "x";
        vm.expectRevert(abi.encodeWithSelector(FaultCourt.NoSuchJob.selector, bytes32("x")));
        court.droppedBid(evidence);
        eq(stakeOf(coordinator), 5 * PENALTY, "stake");
    }

    function testAnEpochThatReceiptOrBidDoesNotCover() public {
        DroppedBid memory evidence = droppedFrom(80, _book(3));
        (evidence.receipt.epochFrom, evidence.receipt.epochTo) = (EPOCH + 1, 9);
        evidence.receiptSignature = signed(COORDINATOR_KEY, digests.bidReceipt(evidence.receipt));
        vm.expectRevert(abi.encodeWithSelector(FaultCourt.EpochNotCovered.selector, EPOCH, EPOCH + 1, 9));
        court.droppedBid(evidence);
        evidence = droppedFrom(80, _book(3));
        evidence.bid.epochTo = EPOCH - 1;
        evidence.receipt.commitment = commitmentOf(evidence.bid, evidence.salt);
        evidence.receiptSignature = signed(COORDINATOR_KEY, digests.bidReceipt(evidence.receipt));
        vm.expectRevert(abi.encodeWithSelector(FaultCourt.EpochNotCovered.selector, EPOCH, 1, EPOCH - 1));
        court.droppedBid(evidence);
    }

    function testABidInTheBookWasNotDropped() public {
        bytes32[] memory book = _book(3);
        DroppedBid memory evidence = droppedFrom(80, book);
        book[1] = evidence.receipt.commitment;
        for (uint256 i = 0; i < 2; ++i) {
            if (book[i + 1] < book[i]) (book[i], book[i + 1]) = (book[i + 1], book[i]);
        }
        if (book[1] < book[0]) (book[0], book[1]) = (book[1], book[0]);
        evidence.certificate.commitRoot = rootOf(commitLeaves(book));
        resign(evidence);
        evidence.neighbours = around(evidence.receipt.commitment, book);
        vm.expectRevert(
            abi.encodeWithSelector(
                Evidence.NotExcluded.selector, evidence.receipt.commitment, evidence.certificate.commitRoot
            )
        );
        court.droppedBid(evidence);
    }

    function testABidOfAnotherJobWasNotDroppedFromThisOne() public {
        vm.prank(sponsor);
        bytes32 elsewhere = escrow.open("other", coordinator, FUNDS, uint64(block.timestamp) + 1 days);
        DroppedBid memory evidence = droppedFrom(80, _book(3));
        evidence.certificate.jobId = elsewhere;
        resign(evidence);
        vm.expectRevert(abi.encodeWithSelector(FaultCourt.BidForAnotherJob.selector, job, elsewhere));
        court.droppedBid(evidence);
    }

    /// Over every size of book and every place in it: who is in cannot be shown to be out, and who is
    /// out always can.
    /// forge-config: default.fuzz.runs = 50
    function testFuzzExclusion(uint8 size, bytes32 outside, uint8 place) public {
        uint256 count = uint256(size) % 8;
        bytes32[] memory book = _book(count);
        bytes32 root = rootOf(commitLeaves(book));
        digests.requireExcluded(outside, around(outside, book), root);
        if (count == 0) return;
        bytes32 inside = book[place % count];
        _expectNotExcluded(inside, around(inside, book), root);
        _expectNotExcluded(inside, new Neighbour[](0), root);
        Neighbour[] memory one = new Neighbour[](1);
        Neighbour[] memory two = new Neighbour[](2);
        for (uint256 i = 0; i < count; ++i) {
            one[0] = neighbour(i, book);
            _expectNotExcluded(inside, one, root);
            for (uint256 k = 0; k < count; ++k) {
                (two[0], two[1]) = (one[0], neighbour(k, book));
                _expectNotExcluded(inside, two, root);
            }
        }
    }

    function testAForgedNeighbourIsNotInTheBook() public {
        bytes32[] memory book = _book(4);
        Neighbour[] memory one = new Neighbour[](1);
        one[0] = neighbour(3, book);
        one[0].count = 5;
        bytes32 forged = twice(abi.encode(uint256(3), uint256(5), book[3]));
        vm.expectRevert(abi.encodeWithSelector(Evidence.NotInTree.selector, forged, rootOf(commitLeaves(book))));
        digests.requireExcluded(bytes32(type(uint256).max), one, rootOf(commitLeaves(book)));
        one[0].count = 4;
        digests.requireExcluded(bytes32(type(uint256).max), one, rootOf(commitLeaves(book)));
    }

    function testAPriceAboveTheBid() public {
        _commit(100);
        PricedBid memory evidence = priced(80, 81, 1);
        vm.prank(BOB);
        court.priceAboveBid(evidence);
        _checkPunished(BOB, 0, 1);
        vm.expectRevert(abi.encodeWithSelector(FaultCourt.PriceKept.selector, 81, 80));
        court.priceBelowBid(evidence);
    }

    function testAPriceBelowTheBid() public {
        PricedBid memory evidence = priced(80, 79, 2);
        vm.prank(BOB);
        court.priceBelowBid(evidence);
        _checkPunished(BOB, 0, 0);
    }

    function testWhatIsNoWrongPrice() public {
        PricedBid memory evidence = priced(80, 80, 1);
        vm.expectRevert(abi.encodeWithSelector(FaultCourt.PriceKept.selector, 80, 80));
        court.priceAboveBid(evidence);
        vm.expectRevert(abi.encodeWithSelector(FaultCourt.PriceKept.selector, 80, 80));
        court.priceBelowBid(evidence);
        evidence = priced(80, 90, 2);
        vm.expectRevert(abi.encodeWithSelector(FaultCourt.WrongRule.selector, 2));
        court.priceAboveBid(evidence);
        evidence = priced(80, 90, 0);
        vm.expectRevert(abi.encodeWithSelector(FaultCourt.WrongRule.selector, 0));
        court.priceAboveBid(evidence);
        evidence = priced(80, 90, 1);
        evidence.rung.payMicros = 91;
        vm.expectRevert(
            abi.encodeWithSelector(
                Evidence.NotInTree.selector, twice(abi.encode(evidence.rung)), evidence.certificate.allocationRoot
            )
        );
        court.priceAboveBid(evidence);
        evidence = priced(80, 90, 1);
        evidence.bid.priceMicros = 70;
        bytes32 digest = digestOf(digests.bid(evidence.bid));
        vm.expectRevert(abi.encodeWithSelector(FaultCourt.WrongBid.selector, digest, evidence.rung.bidDigest));
        court.priceAboveBid(evidence);
        eq(stakeOf(coordinator), 5 * PENALTY, "stake");
    }

    function testTwoBooksForOneEpoch() public {
        ClearingCertificate memory certificate = certificateOf("cleared", 0);
        bytes memory forIt = signed(COORDINATOR_KEY, digests.certificate(certificate));
        BookSeal memory seal = BookSeal(EPOCH, "sealed", 3, 1);
        bytes memory forSeal = signed(COORDINATOR_KEY, digests.seal(seal));
        vm.prank(BOB);
        court.twoBooks(certificate, forIt, seal, forSeal);
        _checkPunished(BOB, 0, 0);
        seal.commitRoot = "cleared";
        forSeal = signed(COORDINATOR_KEY, digests.seal(seal));
        vm.expectRevert(abi.encodeWithSelector(FaultCourt.SameStatement.selector, bytes32("cleared")));
        court.twoBooks(certificate, forIt, seal, forSeal);
        seal = BookSeal(EPOCH + 1, "sealed", 3, 1);
        forSeal = signed(COORDINATOR_KEY, digests.seal(seal));
        vm.expectRevert(abi.encodeWithSelector(FaultCourt.DifferentRecords.selector, "epoch"));
        court.twoBooks(certificate, forIt, seal, forSeal);
    }

    function testASecondFaultOfAFrozenJobStillCostsStake() public {
        PricedBid memory first = priced(80, 81, 1);
        PricedBid memory second = priced(70, 69, 1);
        court.priceAboveBid(first);
        court.priceBelowBid(second);
        eq(stakeOf(coordinator), 3 * PENALTY, "twice");
    }

    function testACoordinatorWithNothingLosesItsJobAllTheSame() public {
        vm.prank(coordinator);
        vault.requestUnbond(5 * PENALTY);
        vm.warp(block.timestamp + UNBONDING);
        vm.prank(coordinator);
        vault.withdraw();
        PricedBid memory evidence = priced(80, 81, 1);
        vm.expectEmit();
        emit FaultCourt.Penalised(
            keccak256(abi.encode(FaultCourt.Fault.PriceAboveBid, bytes32("certificate"), evidence.rung.bidDigest)),
            coordinator,
            0,
            JOB_BOND
        );
        court.priceAboveBid(evidence);
        require(escrow.jobOf(job).frozen, "frozen");
    }

    function testDoublePayInOneEpoch() public {
        LoggedVerdict[] memory paid = _logged("t-1", "9", "t-1", "1", true);
        vm.prank(BOB);
        court.doublePay(job, paid[0], paid[1]);
        _checkPunished(BOB, 0, 1);
    }

    function testDoublePayInTwoEpochs() public {
        LoggedVerdict[] memory paid = _logged("t-1", "9", "t-1", "1", false);
        vm.prank(BOB);
        court.doublePay(job, paid[0], paid[1]);
        eq(stakeOf(coordinator), 4 * PENALTY, "stake");
        eq(escrow.jobOf(job).committed, 10, "the first epoch was accepted, the second is taken back");
    }

    function testWhatIsNoDoublePay() public {
        LoggedVerdict[] memory paid = _logged("t-1", "9", "t-2", "1", true);
        vm.expectRevert(abi.encodeWithSelector(FaultCourt.DifferentRecords.selector, "task_id"));
        court.doublePay(job, paid[0], paid[1]);
        vm.expectRevert(abi.encodeWithSelector(FaultCourt.SameStatement.selector, sha256(paid[0].payload)));
        court.doublePay(job, paid[0], paid[0]);
        uint256 place = paid[0].taskAt;
        paid[0].taskAt = place + 1;
        vm.expectRevert(abi.encodeWithSelector(Evidence.TextNotFound.selector, '"task_id":"', place + 1));
        court.doublePay(job, paid[0], paid[1]);
        paid[0].taskAt = type(uint256).max;
        vm.expectRevert(abi.encodeWithSelector(Evidence.TextNotFound.selector, '"task_id":"', type(uint256).max));
        court.doublePay(job, paid[0], paid[1]);
        paid[0].taskAt = place;
        paid[0].payload[paid[0].payAt + 13] = "2";
        vm.expectRevert();
        court.doublePay(job, paid[0], paid[1]);
        paid[1].anchor.leaves += 1;
        vm.expectRevert();
        court.doublePay(job, paid[0], paid[1]);
        eq(stakeOf(coordinator), 5 * PENALTY, "stake");
    }

    function testARejectedSecondVerdictIsNoDoublePay() public {
        LoggedVerdict[] memory paid = _logged("t-1", "9", "t-1", "0", true);
        uint256 place = paid[1].payAt + bytes('"pay_micros":').length;
        vm.expectRevert(abi.encodeWithSelector(Evidence.NothingPaid.selector, place));
        court.doublePay(job, paid[0], paid[1]);
    }

    function testALogOfAnotherHeadIsRefused() public {
        LoggedVerdict[] memory paid = _logged("t-1", "9", "t-1", "1", true);
        paid[0].anchor.headBefore = "elsewhere";
        bytes32 replayed =
            keccak256(abi.encode(paid[0].anchor.headBefore, paid[0].anchor.root, paid[0].anchor.leaves));
        vm.expectRevert(
            abi.encodeWithSelector(Evidence.NotAnchored.selector, log.head(address(escrow), job), replayed)
        );
        court.doublePay(job, paid[0], paid[1]);
        paid[0].anchor.laterLeaves = new uint64[](1);
        vm.expectRevert(abi.encodeWithSelector(Evidence.LengthMismatch.selector, 0, 1));
        court.doublePay(job, paid[0], paid[1]);
    }

    function testThePartsMustFit() public {
        FaultCourt.Terms memory terms;
        terms.penalty = 1;
        address next = vm.computeCreateAddress(address(this), vm.getNonce(address(this)));
        vm.expectRevert(abi.encodeWithSelector(FaultCourt.NotWired.selector, address(vault)));
        new FaultCourt(vault, escrow, terms);
        require(next != address(court), "another court");
        JobEscrow stranger = new JobEscrow(token, log, address(1), address(court), 0, 0);
        vm.expectRevert(abi.encodeWithSelector(FaultCourt.NotWired.selector, address(vault)));
        new FaultCourt(vault, stranger, terms);
    }

    /// One epoch is accepted, the next is pending: `total` each.
    function _commit(uint128 total) private {
        vm.prank(coordinator);
        escrow.post(job, epoch(1, leaf(job, BOB, total), total));
        vm.warp(block.timestamp + WINDOW);
        vm.prank(coordinator);
        escrow.post(job, epoch(2, leaf(job, BOB, 2 * total), 2 * total));
    }

    /// The bond and one penalty are shared out, the pending epoch is gone for good and, if there was
    /// one, the accepted epoch stays.
    function _checkPunished(address challenger, uint256 hadBefore, uint256 posts) private {
        JobEscrow.Job memory found = escrow.jobOf(job);
        require(found.frozen && found.closed, "frozen");
        eq(found.bond, 0, "bond");
        eq(stakeOf(coordinator), 4 * PENALTY, "the coordinator's stake");
        eq(found.funded, FUNDS + 120 + 600, "the job");
        eq(stakeOf(challenger), hadBefore + 60 + 300, "the challenger");
        eq(token.balanceOf(Penalty.BURN), 20 + 100, "burnt");
        vm.warp(block.timestamp + 10 * WINDOW);
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.JobFrozen.selector, job));
        vm.prank(coordinator);
        escrow.post(job, epoch(found.epoch + 1, 0, found.funded));
        if (posts != 0 && found.epoch == 2) {
            vm.expectRevert(abi.encodeWithSelector(JobEscrow.BadProof.selector, job, BOB, 200));
            escrow.claim(job, BOB, 200, none);
            eq(escrow.claim(job, BOB, 100, none), 100, "the accepted epoch");
        }
        eq(escrow.refund(job), found.funded - found.committed, "the rest is the sponsor's");
        uint256 left = found.committed - escrow.jobOf(job).claimed;
        eq(token.balanceOf(address(escrow)), left, "nothing is stranded in the escrow");
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.NoBond.selector, job));
        escrow.returnBond(job);
    }

    function _expectNotExcluded(bytes32 inside, Neighbour[] memory neighbours, bytes32 root) private {
        vm.expectRevert(abi.encodeWithSelector(Evidence.NotExcluded.selector, inside, root));
        digests.requireExcluded(inside, neighbours, root);
    }

    function _receipt(bytes32 result) private view returns (Receipt memory receipt, bytes memory signature) {
        receipt = receiptOf(result);
        signature = signed(ALICE_KEY, digests.receipt(receipt));
    }

    function _differs(Receipt memory a, bytes memory forA, Receipt memory b, string memory field) private {
        bytes memory forB = signed(ALICE_KEY, digests.receipt(b));
        vm.expectRevert(abi.encodeWithSelector(FaultCourt.DifferentRecords.selector, field));
        court.equivocation(a, forA, b, forB);
    }

    /// `count` ascending commitments spread over all there could be.
    function _book(uint256 count) private pure returns (bytes32[] memory book) {
        book = new bytes32[](count);
        for (uint256 i = 0; i < count; ++i) {
            book[i] = bytes32((type(uint256).max / (count + 1)) * (i + 1));
        }
    }

    /// Two verdicts, posted in one epoch or in two.
    function _logged(string memory task, string memory pay, string memory task2, string memory pay2, bool together)
        private
        returns (LoggedVerdict[] memory paid)
    {
        paid = new LoggedVerdict[](2);
        paid[0] = _verdict(1, 0, task, pay);
        paid[1] = _verdict(together ? 1 : 2, together ? 1 : 0, task2, pay2);
        bytes32 a = _verdictLeaf(paid[0]);
        bytes32 b = _verdictLeaf(paid[1]);
        bytes32 first = together ? pair(a, b) : a;
        uint64 leaves = together ? 2 : 1;
        paid[0].anchor = Anchor(0, first, leaves, new bytes32[](0), new uint64[](0));
        vm.prank(coordinator);
        escrow.post(job, JobEscrow.Epoch(1, "pay", first, 10, 2, leaves));
        if (together) {
            (paid[0].proof, paid[1].proof) = (path(b), path(a));
            paid[1].anchor = paid[0].anchor;
            return paid;
        }
        vm.warp(block.timestamp + WINDOW);
        paid[1].anchor = Anchor(log.head(address(escrow), job), b, 1, new bytes32[](0), new uint64[](0));
        vm.prank(coordinator);
        escrow.post(job, JobEscrow.Epoch(2, "pay more", b, 20, 1, 1));
        (paid[0].anchor.laterRoots, paid[0].anchor.laterLeaves) = (path(b), new uint64[](1));
        paid[0].anchor.laterLeaves[0] = 1;
    }

    function _verdict(uint64 number, uint64 seq, string memory task, string memory pay)
        private
        pure
        returns (LoggedVerdict memory verdict)
    {
        verdict.epoch = number;
        verdict.seq = seq;
        bytes memory head = '{"a":{"task_id":"';
        verdict.taskAt = 6;
        bytes memory start = bytes.concat(head, bytes(task), '","verdict":{');
        verdict.payAt = start.length;
        verdict.payload = bytes.concat(start, '"pay_micros":', bytes(pay), "}}}");
    }

    function _verdictLeaf(LoggedVerdict memory verdict) private view returns (bytes32) {
        return twice(
            abi.encode("verification", sha256(verdict.payload), coordinator, job, verdict.epoch, verdict.seq)
        );
    }
}
