// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC1155} from "@openzeppelin/contracts/token/ERC1155/IERC1155.sol";
import {IERC1155Errors} from "@openzeppelin/contracts/interfaces/draft-IERC6093.sol";
import {IERC1155Receiver} from "@openzeppelin/contracts/token/ERC1155/IERC1155Receiver.sol";
import {IERC2981} from "@openzeppelin/contracts/interfaces/IERC2981.sol";
import {ERC165} from "@openzeppelin/contracts/utils/introspection/ERC165.sol";
import {ModelShares} from "../src/ModelShares.sol";
import {Ledgers} from "./Ledgers.sol";

/// @title A holder that mints again and claims from inside the hook that hands it its shares.
contract GreedyHolder is ERC165, IERC1155Receiver {
    uint256 public again;

    function onERC1155Received(address, address, uint256 id, uint256 value, bytes calldata) external returns (bytes4) {
        ModelShares shares = ModelShares(msg.sender);
        again += shares.mintByProof(id, address(this), uint96(value), new bytes32[](0));
        shares.claimRevenue(id, address(this));
        again += shares.claimRevenue(id, address(this));
        return this.onERC1155Received.selector;
    }

    function onERC1155BatchReceived(address, address, uint256[] calldata, uint256[] calldata, bytes calldata)
        external
        pure
        returns (bytes4)
    {
        return 0;
    }
}

contract ModelSharesTest is Ledgers {
    ModelShares private shares;
    uint256 private id;
    bytes32[] private none;

    function setUp() public {
        deployAll(0);
        shares = new ModelShares(token, escrow);
        id = uint256(openJob(100));
        token.mint(address(this), PURSE);
        token.approve(address(shares), PURSE);
    }

    function testOnlyTheJobsCoordinatorReleasesOnce() public {
        ModelShares.Release memory terms = _terms(bytes32("root"), 100, false);
        vm.expectRevert(abi.encodeWithSelector(ModelShares.NotCoordinator.selector, address(this), COORDINATOR));
        shares.release(bytes32(id), terms);
        vm.expectRevert(abi.encodeWithSelector(ModelShares.NotCoordinator.selector, COORDINATOR, address(0)));
        vm.prank(COORDINATOR);
        shares.release("no such job", terms);
        vm.expectRevert(abi.encodeWithSelector(ModelShares.ZeroPoints.selector));
        _release(_terms(bytes32("root"), 0, false));
        vm.expectEmit();
        emit ModelShares.Released(id, COORDINATOR, "root", 100, false);
        _release(terms);
        vm.expectRevert(abi.encodeWithSelector(ModelShares.AlreadyReleased.selector, id));
        _release(_terms(bytes32("another"), 200, true));
        eq(shares.modelOf(id).totalPoints, 100, "total");
    }

    function testNothingHappensToAModelBeforeItsRelease() public {
        vm.expectRevert(abi.encodeWithSelector(ModelShares.NotReleased.selector, id));
        shares.mintByProof(id, ALICE, 1, none);
        vm.expectRevert(abi.encodeWithSelector(ModelShares.NotReleased.selector, id));
        shares.depositRevenue(id, 1);
        eq(shares.claimRevenue(id, ALICE), 0, "nothing owed");
    }

    function testMintGivesTheDifferenceOnce() public {
        bytes32 b = _releasePair(40, 20, false);
        eq(shares.mintByProof(id, ALICE, 40, path(b)), 40, "first");
        eq(shares.mintByProof(id, ALICE, 40, path(b)), 0, "again");
        eq(shares.balanceOf(ALICE, id), 40, "balance");
        eq(shares.mintedOf(id, ALICE), 40, "minted");
        eq(shares.totalSupply(id), 40, "supply");
    }

    function testMintRefusesWhatTheRootDoesNotSay() public {
        bytes32 b = _releasePair(40, 20, false);
        vm.expectRevert(abi.encodeWithSelector(ModelShares.BadProof.selector, id, ALICE, 41));
        shares.mintByProof(id, ALICE, 41, path(b));
        vm.expectRevert(abi.encodeWithSelector(ModelShares.BadProof.selector, id, COORDINATOR, 40));
        shares.mintByProof(id, COORDINATOR, 40, path(b));
        vm.expectRevert(abi.encodeWithSelector(ModelShares.BadProof.selector, id, ALICE, 40));
        shares.mintByProof(id, ALICE, 40, none);
    }

    function testARootOfOneModelMintsNothingOfAnother() public {
        vm.prank(sponsor);
        uint256 other = uint256(escrow.open("other", COORDINATOR, 1, uint64(block.timestamp) + 1));
        bytes32 root = shares.leafOf(id, ALICE, 40);
        vm.prank(COORDINATOR);
        shares.release(bytes32(other), _terms(root, 40, false));
        vm.expectRevert(abi.encodeWithSelector(ModelShares.BadProof.selector, other, ALICE, 40));
        shares.mintByProof(other, ALICE, 40, none);
    }

    function testALyingRootIsCappedByItsTotal() public {
        bytes32 a = shares.leafOf(id, ALICE, 40);
        bytes32 b = shares.leafOf(id, BOB, 20);
        _release(_terms(pair(a, b), 59, false));
        shares.mintByProof(id, ALICE, 40, path(b));
        vm.expectRevert(abi.encodeWithSelector(ModelShares.PointsAboveTotal.selector, 60, 59));
        shares.mintByProof(id, BOB, 20, path(a));
    }

    function testRevenueGoesByPointsWheneverTheyAreMinted() public {
        bytes32 b = _releasePair(40, 20, false);
        bytes32 a = shares.leafOf(id, ALICE, 40);
        shares.mintByProof(id, ALICE, 40, path(b));
        shares.depositRevenue(id, 90);
        shares.mintByProof(id, BOB, 20, path(a));
        eq(shares.claimRevenue(id, ALICE), 60, "early");
        eq(shares.claimRevenue(id, BOB), 30, "late");
        eq(shares.claimRevenue(id, BOB), 0, "again");
        shares.depositRevenue(id, 15);
        eq(shares.revenueOwedDown(id, ALICE), 10, "owed");
        eq(shares.claimRevenue(id, ALICE), 10, "next");
        eq(token.balanceOf(ALICE), 70, "alice");
        eq(token.balanceOf(address(shares)), 5, "bob's rest");
    }

    /// A sixtieth of nine has no end in binary, so what is owed is a little under six.
    function testRoundingIsAgainstTheHolder() public {
        bytes32 b = _releasePair(40, 20, false);
        shares.mintByProof(id, ALICE, 40, path(b));
        shares.depositRevenue(id, 9);
        eq(shares.claimRevenue(id, ALICE), 5, "down");
    }

    function testDepositErrors() public {
        _releasePair(40, 20, false);
        vm.expectRevert(abi.encodeWithSelector(ModelShares.ZeroAmount.selector));
        shares.depositRevenue(id, 0);
    }

    function testTransfersAreLockedUnlessReleasedOtherwise() public {
        bytes32 b = _releasePair(40, 20, false);
        shares.mintByProof(id, ALICE, 40, path(b));
        vm.expectRevert(abi.encodeWithSelector(ModelShares.TransfersLocked.selector, id));
        vm.prank(ALICE);
        shares.safeTransferFrom(ALICE, BOB, id, 1, "");
        uint256[] memory ids = new uint256[](1);
        uint256[] memory values = new uint256[](1);
        (ids[0], values[0]) = (id, 1);
        vm.expectRevert(abi.encodeWithSelector(ModelShares.TransfersLocked.selector, id));
        vm.prank(ALICE);
        shares.safeBatchTransferFrom(ALICE, BOB, ids, values, "");
    }

    function testATransferMovesFutureRevenueOnly() public {
        bytes32 b = _releasePair(40, 20, true);
        shares.mintByProof(id, ALICE, 40, path(b));
        shares.depositRevenue(id, 60);
        vm.prank(ALICE);
        shares.safeTransferFrom(ALICE, BOB, id, 30, "");
        eq(shares.revenueOwedDown(id, ALICE), 40, "past stays");
        eq(shares.revenueOwedDown(id, BOB), 0, "past does not come along");
        shares.depositRevenue(id, 60);
        eq(shares.claimRevenue(id, ALICE), 50, "seller");
        eq(shares.claimRevenue(id, BOB), 30, "buyer");
        eq(shares.mintByProof(id, ALICE, 40, path(b)), 0, "what was sold is not minted again");
    }

    function testNobodyMovesAnothersShares() public {
        bytes32 b = _releasePair(40, 20, true);
        shares.mintByProof(id, ALICE, 40, path(b));
        vm.expectRevert(
            abi.encodeWithSelector(IERC1155Errors.ERC1155MissingApprovalForAll.selector, address(this), ALICE)
        );
        shares.safeTransferFrom(ALICE, BOB, id, 1, "");
    }

    function testRoyaltiesAreWhatTheReleaseSays() public {
        ModelShares.Release memory terms = _terms(bytes32("root"), 1, true);
        (terms.royaltyReceiver, terms.royaltyBps) = (BOB, 250);
        _release(terms);
        (address receiver, uint256 royalty) = shares.royaltyInfo(id, 10_000);
        require(receiver == BOB, "receiver");
        eq(royalty, 250, "royalty");
        require(shares.supportsInterface(type(IERC2981).interfaceId), "ERC-2981");
        require(shares.supportsInterface(type(IERC1155).interfaceId), "ERC-1155");
    }

    function testAHolderThatCallsBackGainsNothing() public {
        GreedyHolder greedy = new GreedyHolder();
        _release(_terms(shares.leafOf(id, address(greedy), 40), 60, false));
        shares.depositRevenue(id, 60);
        eq(shares.mintByProof(id, address(greedy), 40, none), 40, "minted");
        eq(greedy.again(), 0, "nothing twice");
        eq(shares.balanceOf(address(greedy), id), 40, "balance");
        eq(token.balanceOf(address(greedy)), 40, "revenue");
    }

    /// Whatever is deposited, moved and claimed in whatever order: nobody is owed more than their
    /// points' part, all together no more than is there, and less than one unit per step is lost.
    function testFuzzRevenueIsConserved(uint96 a, uint96 b, uint64 first, uint64 second, uint96 moved) public {
        a = uint96(bound(a, 1, 1e27));
        b = uint96(bound(b, 1, 1e27));
        bytes32 sibling = _releasePair(a, b, true);
        shares.mintByProof(id, ALICE, a, path(sibling));
        shares.mintByProof(id, BOB, b, path(shares.leafOf(id, ALICE, a)));
        uint128 one = uint128(bound(first, 1, PURSE / 2));
        uint128 two = uint128(bound(second, 1, PURSE / 2));
        shares.depositRevenue(id, one);
        moved = uint96(bound(moved, 0, a));
        vm.prank(ALICE);
        shares.safeTransferFrom(ALICE, BOB, id, moved, "");
        shares.depositRevenue(id, two);
        uint256 total = uint256(a) + b;
        uint256 exactA = (uint256(a) * one + (uint256(a) - moved) * two) / total;
        uint256 paidA = shares.claimRevenue(id, ALICE);
        require(paidA <= exactA && exactA <= paidA + 2, "part");
        uint256 paid = paidA + shares.claimRevenue(id, BOB);
        require(paid <= uint256(one) + two && uint256(one) + two <= paid + 3, "conserved");
        eq(token.balanceOf(address(shares)), uint256(one) + two - paid, "rest");
    }

    function _releasePair(uint96 a, uint96 b, bool transferable) private returns (bytes32 leafB) {
        leafB = shares.leafOf(id, BOB, b);
        _release(_terms(pair(shares.leafOf(id, ALICE, a), leafB), a + b, transferable));
    }

    function _release(ModelShares.Release memory terms) private {
        vm.prank(COORDINATOR);
        shares.release(bytes32(id), terms);
    }

    function _terms(bytes32 root, uint96 total, bool transferable) private pure returns (ModelShares.Release memory) {
        return ModelShares.Release(root, total, transferable, address(0), 0);
    }
}
