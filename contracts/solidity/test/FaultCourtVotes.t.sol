// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {FaultCourt} from "../src/FaultCourt.sol";
import {Penalty} from "../src/Penalty.sol";
import {StakeVault} from "../src/StakeVault.sol";
import {CourtEvidence} from "./CourtEvidence.sol";

/// @title Cases that people decide.
contract FaultCourtVotesTest is CourtEvidence {
    bytes32 private constant WHAT = keccak256("evidence");
    uint256[3] private keys;

    function setUp() public {
        FaultCourt.Terms memory terms;
        terms.penalty = PENALTY;
        terms.challengeBond = CHALLENGE_BOND;
        terms.votingPeriod = VOTING;
        terms.quorum = 2;
        terms.verifiers = new address[](3);
        keys = [uint256(11), 12, 13];
        for (uint256 i = 0; i < 3; ++i) {
            for (uint256 k = i + 1; k < 3; ++k) {
                if (vm.addr(keys[k]) < vm.addr(keys[i])) (keys[i], keys[k]) = (keys[k], keys[i]);
            }
            terms.verifiers[i] = vm.addr(keys[i]);
        }
        deployCourt(terms);
    }

    function testGuilty() public {
        bytes32 caseId = _challenge();
        eq(token.balanceOf(address(court)), CHALLENGE_BOND, "held");
        court.resolve(caseId, true, _votes(caseId, true, 0, 2));
        eq(stakeOf(alice), 4 * PENALTY, "the accused");
        eq(stakeOf(BOB), CHALLENGE_BOND + 300, "the challenger");
        eq(token.balanceOf(address(court)), 0, "never the court");
        require(!escrow.jobOf(job).frozen, "the job goes on");
        _closed(caseId, FaultCourt.Status.Upheld);
    }

    function testNotGuilty() public {
        bytes32 caseId = _challenge();
        court.resolve(caseId, false, _votes(caseId, false, 1, 2));
        eq(stakeOf(alice), 5 * PENALTY + CHALLENGE_BOND, "the accused has the bond");
        eq(stakeOf(BOB), 0, "the challenger");
        _closed(caseId, FaultCourt.Status.Dismissed);
    }

    function testUndecided() public {
        bytes32 caseId = _challenge();
        uint64 voteBy = uint64(block.timestamp) + VOTING;
        vm.warp(voteBy);
        vm.expectRevert(abi.encodeWithSelector(FaultCourt.VotingNotOver.selector, voteBy, voteBy));
        court.lapse(caseId);
        vm.warp(voteBy + 1);
        bytes[] memory votes = _votes(caseId, true, 0, 1);
        vm.expectRevert(abi.encodeWithSelector(FaultCourt.VotingOver.selector, voteBy, voteBy + 1));
        court.resolve(caseId, true, votes);
        court.lapse(caseId);
        eq(stakeOf(BOB), CHALLENGE_BOND, "the bond comes back");
        eq(stakeOf(alice), 5 * PENALTY, "the accused");
        _closed(caseId, FaultCourt.Status.Lapsed);
    }

    function testAVerdictThatFindsNoStakeIsNoVerdict() public {
        vm.prank(alice);
        vault.requestUnbond(5 * PENALTY);
        vm.warp(block.timestamp + UNBONDING);
        vm.prank(alice);
        vault.withdraw();
        bytes32 caseId = _challenge();
        bytes[] memory votes = _votes(caseId, true, 0, 2);
        vm.expectRevert(abi.encodeWithSelector(StakeVault.NothingToSlash.selector, alice));
        court.resolve(caseId, true, votes);
        eq(token.balanceOf(address(court)), CHALLENGE_BOND, "balances unchanged");
        vm.warp(block.timestamp + VOTING + 1);
        court.lapse(caseId);
    }

    function testVotesThatDoNotCount() public {
        bytes32 caseId = _challenge();
        bytes[] memory votes = new bytes[](1);
        votes[0] = _vote(caseId, true, 0);
        vm.expectRevert(abi.encodeWithSelector(FaultCourt.TooFewVotes.selector, 1, 2));
        court.resolve(caseId, true, votes);
        votes = _votes(caseId, true, 0, 0);
        address first = vm.addr(keys[0]);
        vm.expectRevert(abi.encodeWithSelector(FaultCourt.VotesOutOfOrder.selector, first, first));
        court.resolve(caseId, true, votes);
        votes = _votes(caseId, true, 2, 0);
        vm.expectRevert(abi.encodeWithSelector(FaultCourt.VotesOutOfOrder.selector, vm.addr(keys[2]), first));
        court.resolve(caseId, true, votes);
        keys[1] = ALICE_KEY;
        votes = _votes(caseId, true, 0, 1);
        vm.expectRevert(abi.encodeWithSelector(FaultCourt.NotAVerifier.selector, alice));
        court.resolve(caseId, true, votes);
        votes = _votes(caseId, true, 0, 2);
        vm.expectRevert();
        court.resolve(caseId, false, votes);
        bytes32 unknown = "unknown";
        votes = _votes(unknown, true, 0, 2);
        vm.expectRevert(
            abi.encodeWithSelector(FaultCourt.CaseNotOpen.selector, unknown, FaultCourt.Status.None)
        );
        court.resolve(unknown, true, votes);
        eq(stakeOf(alice), 5 * PENALTY, "stake");
    }

    function testChallengesThatAreNotHeard() public {
        bytes32 caseId = _challenge();
        vm.expectRevert(abi.encodeWithSelector(FaultCourt.CaseExists.selector, caseId, FaultCourt.Status.Open));
        court.challenge(job, alice, WHAT);
        vm.expectRevert(abi.encodeWithSelector(FaultCourt.NoSuchJob.selector, bytes32("x")));
        court.challenge("x", alice, WHAT);
        vm.expectRevert(abi.encodeWithSelector(FaultCourt.SelfAccusation.selector, address(this)));
        court.challenge(job, address(this), WHAT);
        FaultCourt.Terms memory terms;
        terms.penalty = PENALTY;
        deployCourt(terms);
        vm.expectRevert(abi.encodeWithSelector(FaultCourt.NoVerifiers.selector));
        court.challenge(job, alice, WHAT);
    }

    function testTermsThatMakeNoSense() public {
        FaultCourt.Terms memory terms;
        _refused(terms, abi.encodeWithSelector(FaultCourt.ZeroPenalty.selector));
        terms.penalty = 1;
        terms.votingPeriod = UNBONDING + 1;
        _refused(terms, abi.encodeWithSelector(FaultCourt.UnbondingTooShort.selector, UNBONDING, UNBONDING + 1));
        terms.votingPeriod = UNBONDING;
        terms.verifiers = new address[](4);
        for (uint256 i = 0; i < 4; ++i) {
            terms.verifiers[i] = address(uint160(i + 1));
        }
        uint256[4] memory quorums = [uint256(0), 1, 2, 5];
        for (uint256 i = 0; i < 4; ++i) {
            terms.quorum = quorums[i];
            _refused(terms, abi.encodeWithSelector(FaultCourt.BadQuorum.selector, quorums[i], 4));
        }
        terms.quorum = 3;
        terms.verifiers[3] = address(1);
        _refused(terms, abi.encodeWithSelector(FaultCourt.BadVerifier.selector, address(1)));
        terms.verifiers[3] = address(0);
        _refused(terms, abi.encodeWithSelector(FaultCourt.BadVerifier.selector, address(0)));
        terms.verifiers[3] = address(4);
        deployCourt(terms);
        eq(court.QUORUM(), 3, "quorum");
    }

    function testFuzzMoneyIsConserved(uint8 choice, uint8 first, uint8 second) public {
        uint256 before = token.totalSupply();
        bytes32 caseId = _challenge();
        bytes[] memory votes = _votes(caseId, choice % 2 == 0, first % 3, second % 3);
        try court.resolve(caseId, choice % 2 == 0, votes) {} catch {}
        uint256 held = token.balanceOf(address(vault)) + token.balanceOf(address(court));
        held += token.balanceOf(address(escrow)) + token.balanceOf(Penalty.BURN);
        held += token.balanceOf(sponsor) + token.balanceOf(BOB);
        eq(held, before, "conserved");
        eq(token.balanceOf(address(vault)), stakeOf(alice) + stakeOf(BOB) + stakeOf(coordinator), "vault");
    }

    function _refused(FaultCourt.Terms memory terms, bytes memory reason) private {
        address courtAt = vm.computeCreateAddress(address(this), vm.getNonce(address(this)) + 2);
        deployPair(courtAt, WINDOW, 0);
        vm.expectRevert(reason);
        new FaultCourt(vault, escrow, terms);
    }

    function _challenge() private returns (bytes32) {
        vm.prank(BOB);
        return court.challenge(job, alice, WHAT);
    }

    function _vote(bytes32 caseId, bool guilty, uint256 who) private view returns (bytes memory) {
        bytes32 kind = keccak256("Vote(bytes32 caseId,bytes32 evidence,bool guilty)");
        return signed(keys[who], keccak256(abi.encode(kind, caseId, WHAT, guilty)));
    }

    function _votes(bytes32 caseId, bool guilty, uint256 a, uint256 b) private view returns (bytes[] memory votes) {
        votes = new bytes[](2);
        votes[0] = _vote(caseId, guilty, a);
        votes[1] = _vote(caseId, guilty, b);
    }

    function _closed(bytes32 caseId, FaultCourt.Status status) private {
        (,, FaultCourt.Status found,,,, bytes32 evidence) = court.caseOf(caseId);
        require(found == status, "status");
        eq(evidence, WHAT, "evidence");
        bytes[] memory votes = _votes(caseId, true, 0, 2);
        vm.expectRevert(abi.encodeWithSelector(FaultCourt.CaseNotOpen.selector, caseId, status));
        court.resolve(caseId, true, votes);
        vm.expectRevert(abi.encodeWithSelector(FaultCourt.CaseNotOpen.selector, caseId, status));
        court.lapse(caseId);
        vm.expectRevert(abi.encodeWithSelector(FaultCourt.CaseExists.selector, caseId, status));
        vm.prank(BOB);
        court.challenge(job, alice, WHAT);
    }
}
