// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {DevUSD} from "../src/DevUSD.sol";
import {JobEscrow} from "../src/JobEscrow.sol";
import {ModelShares} from "../src/ModelShares.sol";
import {ProvenanceLog} from "../src/ProvenanceLog.sol";
import {TokenPull} from "../src/TokenPull.sol";
import {
    BlacklistToken,
    FalseReturnToken,
    FeeToken,
    NoReturnToken,
    RebasingToken,
    ReentrantToken
} from "./HostileTokens.sol";
import {Ledgers} from "./Ledgers.sol";

/// @title Six tokens that do not behave, against every contract that holds money.
/// @notice What is promised holds, or the action reverts whole; and nobody's trouble is another's.
contract HostileTokensTest is Ledgers {
    uint128 private constant AMOUNT = 1000;
    uint128 private constant BOND = 500;

    ModelShares private shares;
    bytes32 private jobId;
    bytes32 private leafAlice;
    bytes32 private leafBob;
    bytes32 private shareAlice;
    bytes32 private shareBob;

    // ---- no-return

    function testATokenThatReturnsNothingServes() public {
        _deploy(address(new NoReturnToken()));
        _prepare();
        _everyoneIsPaid();
    }

    // ---- false-return

    function testATokenThatReturnsFalseRevertsEverythingWhole() public {
        FalseReturnToken hostile = new FalseReturnToken();
        _deploy(address(hostile));
        _prepare();
        hostile.refuse(true);
        bytes32 books = _books();
        _refusedWhole(abi.encodeWithSelector(SafeERC20.SafeERC20FailedOperation.selector, token));
        require(books == _books(), "books moved");
        hostile.refuse(false);
        _everyoneIsPaid();
    }

    // ---- fee on transfer

    function testATokenWithAFeeIsNotTakenIn() public {
        FeeToken hostile = new FeeToken();
        _deploy(address(hostile));
        _prepare();
        hostile.charge(1);
        bytes32 books = _books();
        bytes memory less = abi.encodeWithSelector(TokenPull.ReceivedLess.selector, 990, AMOUNT);
        vm.expectRevert(less);
        _open("second");
        vm.expectRevert(less);
        vm.prank(sponsor);
        escrow.topUp(jobId, AMOUNT);
        vm.expectRevert(less);
        vm.prank(COORDINATOR);
        escrow.putUpBond(jobId, AMOUNT);
        vm.expectRevert(less);
        vm.prank(ALICE);
        vault.stake(AMOUNT);
        vm.expectRevert(less);
        vm.prank(sponsor);
        shares.depositRevenue(uint256(jobId), AMOUNT);
        require(books == _books(), "books moved");
    }

    /// A fee that begins later is the payee's loss with the token: what leaves is what was owed.
    function testAFeeThatBeginsLaterIsNotPaidByOthers() public {
        FeeToken hostile = new FeeToken();
        _deploy(address(hostile));
        _prepare();
        hostile.charge(1);
        uint256 held = token.balanceOf(address(escrow));
        eq(escrow.claim(jobId, ALICE, 400, path(leafBob)), 400, "claimed");
        eq(held - token.balanceOf(address(escrow)), 400, "no more leaves than was owed");
        hostile.charge(0);
        eq(escrow.claim(jobId, BOB, 200, path(leafAlice)), 200, "the other is whole");
        eq(token.balanceOf(BOB), 200, "paid");
    }

    // ---- re-entrant

    function testATokenThatCallsBackIsPaidOnce() public {
        ReentrantToken hostile = new ReentrantToken();
        _deploy(address(hostile));
        _prepare();
        hostile.arm(address(escrow), abi.encodeCall(escrow.claim, (jobId, ALICE, 400, path(leafBob))));
        eq(escrow.claim(jobId, ALICE, 400, path(leafBob)), 400, "claimed");
        eq(hostile.successes(), 1, "the second claim went through");
        eq(token.balanceOf(ALICE), 9 * AMOUNT + 400, "and paid nothing");
        hostile.arm(address(shares), abi.encodeCall(shares.claimRevenue, (uint256(jobId), ALICE)));
        uint128 owed = shares.revenueOwedDown(uint256(jobId), ALICE);
        eq(shares.claimRevenue(uint256(jobId), ALICE), owed, "revenue");
        eq(token.balanceOf(ALICE), 9 * AMOUNT + 400 + owed, "once");
        vm.warp(block.timestamp + 2 days);
        hostile.arm(address(escrow), abi.encodeCall(escrow.refund, (jobId)));
        eq(escrow.refund(jobId), 400, "refund");
        eq(hostile.successes(), 2, "the second refund was refused");
        eq(escrow.jobOf(jobId).refunded, 400, "once");
    }

    /// Revenue counts before its money is there; who claims it in between would be paid with another
    /// model's, so the deposit is refused whole.
    function testRevenueCannotBeClaimedBeforeItsMoneyIsThere() public {
        ReentrantToken hostile = new ReentrantToken();
        _deploy(address(hostile));
        _prepare();
        bytes32 books = _books();
        hostile.arm(address(shares), abi.encodeCall(shares.claimRevenue, (uint256(jobId), ALICE)));
        vm.expectRevert(abi.encodeWithSelector(TokenPull.ReceivedLess.selector, 0, 300));
        vm.prank(sponsor);
        shares.depositRevenue(uint256(jobId), 300);
        require(books == _books(), "books moved");
    }

    // ---- blacklisting

    function testARefusedPayeeStopsNobodyElse() public {
        BlacklistToken hostile = new BlacklistToken();
        _deploy(address(hostile));
        _prepare();
        hostile.refuse(BOB);
        bytes memory refused = abi.encodeWithSelector(BlacklistToken.Refused.selector, BOB);
        vm.expectRevert(refused);
        escrow.claim(jobId, BOB, 200, path(leafAlice));
        eq(_claimBoth(), 400, "the other's claim in the same call");
        vm.expectRevert(refused);
        shares.claimRevenue(uint256(jobId), BOB);
        require(shares.claimRevenue(uint256(jobId), ALICE) > 0, "the other's revenue");
        _slash(ALICE, BOB);
        (uint128 active,,) = vault.stakeOf(BOB);
        eq(active, 30, "a refused challenger has its part as stake");
        hostile.refuse(address(0));
        eq(_claimBoth(), 200, "owed still");
        require(shares.claimRevenue(uint256(jobId), BOB) > 0, "revenue owed still");
    }

    function testARefusedSponsorStopsNoPayee() public {
        BlacklistToken hostile = new BlacklistToken();
        _deploy(address(hostile));
        _prepare();
        hostile.refuse(sponsor);
        vm.warp(block.timestamp + 2 days);
        vm.expectRevert(abi.encodeWithSelector(BlacklistToken.Refused.selector, sponsor));
        escrow.refund(jobId);
        eq(_claimBoth(), 600, "claims");
        hostile.refuse(address(0));
        eq(escrow.refund(jobId), 400, "refund");
    }

    function testARefusedStakerIsSlashedStill() public {
        BlacklistToken hostile = new BlacklistToken();
        _deploy(address(hostile));
        _prepare();
        hostile.refuse(ALICE);
        _slash(ALICE, BOB);
        (uint128 active,,) = vault.stakeOf(ALICE);
        eq(active, AMOUNT - 100, "slashed");
    }

    // ---- rebasing

    /// When the money shrinks, claims are paid whole while it lasts; the first that cannot be is
    /// refused whole and owed still. Nothing is ever paid in part.
    function testAShrinkingTokenPaysWholeOrNotAtAll() public {
        RebasingToken hostile = new RebasingToken();
        _deploy(address(hostile));
        _prepare();
        hostile.rebase(30);
        eq(escrow.claim(jobId, ALICE, 400, path(leafBob)), 400, "whole");
        vm.expectRevert();
        escrow.claim(jobId, BOB, 200, path(leafAlice));
        eq(escrow.claimed(jobId, BOB), 0, "owed still");
        eq(escrow.jobOf(jobId).claimed, 400, "books");
        vm.prank(sponsor);
        IERC20(address(token)).transfer(address(escrow), 200);
        eq(escrow.claim(jobId, BOB, 200, path(leafAlice)), 200, "once there is money again");
    }

    function testAGrowingTokenPaysWhatWasOwed() public {
        RebasingToken hostile = new RebasingToken();
        _deploy(address(hostile));
        _prepare();
        hostile.rebase(200);
        eq(_claimBoth(), 600, "claims");
        vm.warp(block.timestamp + 2 days);
        eq(escrow.refund(jobId), 400, "refund");
        eq(token.balanceOf(address(escrow)), BOND + AMOUNT + BOND, "what grew stays, and belongs to nobody");
    }

    function _deploy(address hostile) private {
        vm.warp(1_000_000);
        sponsor = vm.addr(SPONSOR_KEY);
        token = DevUSD(hostile);
        log = new ProvenanceLog();
        deployPair(COURT, 0, 0);
        shares = new ModelShares(token, escrow);
        address[3] memory parties = [sponsor, COORDINATOR, ALICE];
        for (uint256 i = 0; i < parties.length; ++i) {
            token.mint(parties[i], 10 * AMOUNT);
            _approve(parties[i], address(escrow));
            _approve(parties[i], address(vault));
            _approve(parties[i], address(shares));
        }
    }
    /// A job with an epoch posted and a bond, a stake, and a model with revenue.
    function _prepare() private {
        jobId = _open(DIGEST);
        vm.prank(COORDINATOR);
        escrow.putUpBond(jobId, BOND);
        (leafAlice, leafBob) = (leaf(jobId, ALICE, 400), leaf(jobId, BOB, 200));
        post(jobId, 1, pair(leafAlice, leafBob), 600);
        vm.prank(ALICE);
        vault.stake(AMOUNT);
        uint256 id = uint256(jobId);
        (shareAlice, shareBob) = (shares.leafOf(id, ALICE, 40), shares.leafOf(id, BOB, 20));
        vm.prank(COORDINATOR);
        shares.release(jobId, ModelShares.Release(pair(shareAlice, shareBob), 60, false, address(0), 0));
        shares.mintByProof(id, ALICE, 40, path(shareBob));
        shares.mintByProof(id, BOB, 20, path(shareAlice));
        vm.prank(sponsor);
        shares.depositRevenue(id, AMOUNT);
    }

    function _open(bytes32 digest) private returns (bytes32) {
        vm.prank(sponsor);
        return escrow.open(digest, COORDINATOR, AMOUNT, uint64(block.timestamp) + 1 days);
    }

    function _slash(address accused, address challenger) private {
        vm.prank(COURT);
        eq(vault.slash(accused, 100, "case", jobId, challenger), 100, "taken");
    }

    function _claimBoth() private returns (uint128) {
        address[] memory who = new address[](2);
        uint128[] memory cumulative = new uint128[](2);
        bytes32[][] memory proofs = new bytes32[][](2);
        (who[0], cumulative[0], proofs[0]) = (BOB, 200, path(leafAlice));
        (who[1], cumulative[1], proofs[1]) = (ALICE, 400, path(leafBob));
        return escrow.claimMany(jobId, who, cumulative, proofs);
    }

    /// Every way in and out, each refused with `reason`.
    function _refusedWhole(bytes memory reason) private {
        uint256 id = uint256(jobId);
        vm.prank(ALICE);
        vault.requestUnbond(1);
        uint256 start = block.timestamp;
        vm.expectRevert(reason);
        _open("second");
        vm.expectRevert(reason);
        vm.prank(sponsor);
        escrow.topUp(jobId, 1);
        vm.expectRevert(reason);
        vm.prank(COORDINATOR);
        escrow.putUpBond(jobId, 1);
        vm.expectRevert(reason);
        escrow.claim(jobId, ALICE, 400, path(leafBob));
        vm.expectRevert(reason);
        vm.prank(ALICE);
        vault.stake(1);
        vm.expectRevert(reason);
        vm.prank(COURT);
        vault.slash(ALICE, 100, "case", jobId, BOB);
        vm.expectRevert(reason);
        vm.prank(COURT);
        escrow.freeze(jobId, "case", BOB);
        vm.expectRevert(reason);
        vm.prank(sponsor);
        shares.depositRevenue(id, 1);
        vm.expectRevert(reason);
        shares.claimRevenue(id, ALICE);
        vm.warp(start + 2 days);
        vm.expectRevert(reason);
        escrow.refund(jobId);
        vm.expectRevert(reason);
        vm.prank(ALICE);
        vault.withdraw();
        vm.warp(start);
    }

    function _everyoneIsPaid() private {
        uint256 id = uint256(jobId);
        eq(_claimBoth(), 600, "claims");
        eq(shares.claimRevenue(id, ALICE), 666, "two thirds of the revenue");
        eq(shares.claimRevenue(id, BOB), 333, "one third");
        (uint128 active,,) = vault.stakeOf(ALICE);
        vm.prank(ALICE);
        vault.requestUnbond(active);
        vm.warp(block.timestamp + 2 days);
        vm.prank(ALICE);
        vault.withdraw();
        eq(escrow.refund(jobId), 400, "refund");
        eq(escrow.returnBond(jobId), BOND, "bond");
        eq(token.balanceOf(address(escrow)), 0, "nothing stays in the escrow");
        eq(token.balanceOf(address(vault)), 0, "nor in the vault");
        eq(token.balanceOf(address(shares)), 1, "rounding stays with the shares");
        eq(token.balanceOf(ALICE), 10 * AMOUNT + 400 + 666, "alice");
    }

    /// All that the contracts say about who has what.
    function _books() private view returns (bytes32) {
        (uint128 active, uint128 unbonding,) = vault.stakeOf(ALICE);
        (uint128 others,,) = vault.stakeOf(BOB);
        uint256 id = uint256(jobId);
        return keccak256(
            abi.encode(
                escrow.jobOf(jobId),
                escrow.claimed(jobId, ALICE),
                uint256(active) + unbonding,
                others,
                shares.modelOf(id),
                shares.revenueOwedDown(id, ALICE),
                token.balanceOf(address(escrow)),
                token.balanceOf(address(vault)),
                token.balanceOf(address(shares))
            )
        );
    }

    /// Asked in a way that needs no answer: one of the tokens gives none.
    function _approve(address owner, address spender) private {
        vm.prank(owner);
        (bool ok,) = address(token).call(abi.encodeCall(token.approve, (spender, type(uint256).max)));
        require(ok, "approve");
    }
}
