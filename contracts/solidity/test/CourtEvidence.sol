// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {MessageHashUtils} from "@openzeppelin/contracts/utils/cryptography/MessageHashUtils.sol";
import {Anchor, DroppedBid, Evidence, LoggedVerdict, Neighbour, PricedBid} from "../src/Evidence.sol";
import {FaultCourt} from "../src/FaultCourt.sol";
import {IProvenanceLog} from "../src/interfaces/IProvenanceLog.sol";
import {JobEscrow} from "../src/JobEscrow.sol";
import {
    Bid,
    BidReceipt,
    BookSeal,
    ClearingCertificate,
    MarketRecords,
    Receipt,
    Rung,
    Vote
} from "../src/MarketRecords.sol";
import {StakeVault} from "../src/StakeVault.sol";
import {Ledgers} from "./Ledgers.sol";

/// @title The libraries' internals, callable.
contract Digests {
    function domain(address escrow) external view returns (bytes32) {
        return MarketRecords.domainSeparator(escrow);
    }

    function receipt(Receipt calldata record) external pure returns (bytes32) {
        return MarketRecords.structHash(record);
    }

    function bid(Bid calldata record) external pure returns (bytes32) {
        return MarketRecords.structHash(record);
    }

    function bidReceipt(BidReceipt calldata record) external pure returns (bytes32) {
        return MarketRecords.structHash(record);
    }

    function seal(BookSeal calldata record) external pure returns (bytes32) {
        return MarketRecords.structHash(record);
    }

    function certificate(ClearingCertificate calldata record) external pure returns (bytes32) {
        return MarketRecords.structHash(record);
    }

    function requireRung(Rung calldata rung, bytes32[] calldata proof, bytes32 root) external pure {
        Evidence.requireRung(rung, proof, root);
    }

    function requireExcluded(bytes32 commitment, Neighbour[] calldata neighbours, bytes32 root) external pure {
        Evidence.requireExcluded(commitment, neighbours, root);
    }

    function requirePaid(
        IProvenanceLog log,
        address publisher,
        address coordinator,
        bytes32 jobId,
        LoggedVerdict calldata verdict
    ) external view returns (bytes32) {
        return Evidence.requirePaid(log, publisher, coordinator, jobId, verdict);
    }
}

/// @title A court over a vault and an escrow, and hands that sign evidence for it.
abstract contract CourtEvidence is Ledgers {
    uint256 internal constant COORDINATOR_KEY = 0xC00;
    uint256 internal constant ALICE_KEY = 0xA11;
    uint128 internal constant PENALTY = 1000;
    uint128 internal constant CHALLENGE_BOND = 50;
    uint128 internal constant JOB_BOND = 200;
    uint128 internal constant FUNDS = 10_000;
    uint64 internal constant WINDOW = 600;
    uint64 internal constant VOTING = 3 hours;
    uint32 internal constant EPOCH = 7;

    Digests internal digests;
    FaultCourt internal court;
    address internal coordinator;
    address internal alice;
    bytes32 internal job;

    function deployCourt(FaultCourt.Terms memory terms) internal {
        deployAll(0);
        digests = new Digests();
        coordinator = vm.addr(COORDINATOR_KEY);
        alice = vm.addr(ALICE_KEY);
        address courtAt = vm.computeCreateAddress(address(this), vm.getNonce(address(this)) + 2);
        deployPair(courtAt, WINDOW, 0);
        court = new FaultCourt(vault, escrow, terms);
        fund(sponsor, address(escrow), PURSE);
        fund(coordinator, address(escrow), JOB_BOND);
        fund(coordinator, address(vault), 5 * PENALTY);
        fund(alice, address(vault), 5 * PENALTY);
        fund(BOB, address(court), PURSE);
        vm.prank(sponsor);
        job = escrow.open(DIGEST, coordinator, FUNDS, uint64(block.timestamp) + 1 days);
        vm.prank(coordinator);
        escrow.putUpBond(job, JOB_BOND);
        vm.prank(coordinator);
        vault.stake(5 * PENALTY);
        vm.prank(alice);
        vault.stake(5 * PENALTY);
    }

    function fund(address owner, address spender, uint128 amount) internal {
        token.mint(owner, amount);
        vm.prank(owner);
        token.approve(spender, amount);
    }

    function stakeOf(address account) internal view returns (uint256) {
        (uint128 active, uint128 unbonding,) = vault.stakeOf(account);
        return uint256(active) + unbonding;
    }

    function signed(uint256 key, bytes32 structHash) internal view returns (bytes memory) {
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(key, digestOf(structHash));
        return abi.encodePacked(r, s, v);
    }

    function digestOf(bytes32 structHash) internal view returns (bytes32) {
        return MessageHashUtils.toTypedDataHash(digests.domain(address(escrow)), structHash);
    }

    function receiptOf(bytes32 result) internal view returns (Receipt memory) {
        return Receipt("lease", 1, job, result, alice, "node");
    }

    function bidAt(uint96 price) internal view returns (Bid memory) {
        return Bid(job, "rollout", 1, 9, price, 4, alice, "node", 99, 5);
    }

    function commitmentOf(Bid memory bid, bytes32 salt) internal view returns (bytes32) {
        return MarketRecords.commitment(digestOf(digests.bid(bid)), salt);
    }

    function certificateOf(bytes32 commitRoot, bytes32 allocationRoot) internal view returns (ClearingCertificate memory) {
        return ClearingCertificate(
            "certificate", "lot", job, EPOCH, commitRoot, "reveals", "handicaps", allocationRoot, 8, 100, 90, 1
        );
    }

    /// The bid at `price` is dropped from a book of `others`.
    function droppedFrom(uint96 price, bytes32[] memory others) internal view returns (DroppedBid memory evidence) {
        evidence.bid = bidAt(price);
        evidence.salt = "salt";
        bytes32 commitment = commitmentOf(evidence.bid, evidence.salt);
        evidence.receipt = BidReceipt(commitment, 1, 9, 1, 1);
        evidence.receiptSignature = signed(COORDINATOR_KEY, digests.bidReceipt(evidence.receipt));
        evidence.certificate = certificateOf(rootOf(commitLeaves(others)), 0);
        evidence.neighbours = around(commitment, others);
        resign(evidence);
    }

    function resign(DroppedBid memory evidence) internal view {
        evidence.certificateSignature = signed(COORDINATOR_KEY, digests.certificate(evidence.certificate));
    }

    /// The bid at `price` is paid `pay` under `rule`.
    function priced(uint96 price, uint96 pay, uint8 rule) internal view returns (PricedBid memory evidence) {
        evidence.bid = bidAt(price);
        evidence.rung = Rung(0, 2, digestOf(digests.bid(evidence.bid)), alice, price, 3, pay, 4);
        bytes32 other = twice(abi.encode("another rung"));
        evidence.proof = path(other);
        evidence.certificate = certificateOf("book", pair(twice(abi.encode(evidence.rung)), other));
        evidence.certificate.rule = rule;
        evidence.certificateSignature = signed(COORDINATOR_KEY, digests.certificate(evidence.certificate));
    }

    /// The leaves that show that `commitment` is not among the sorted `others`.
    function around(bytes32 commitment, bytes32[] memory others) internal pure returns (Neighbour[] memory found) {
        uint256 count = others.length;
        uint256 above = 0;
        while (above < count && others[above] < commitment) ++above;
        if (count == 0) return new Neighbour[](0);
        if (above == 0 || above == count) {
            found = new Neighbour[](1);
            found[0] = neighbour(above == 0 ? 0 : count - 1, others);
        } else {
            found = new Neighbour[](2);
            found[0] = neighbour(above - 1, others);
            found[1] = neighbour(above, others);
        }
    }

    function neighbour(uint256 index, bytes32[] memory others) internal pure returns (Neighbour memory) {
        return Neighbour(index, others.length, others[index], proofOf(commitLeaves(others), index));
    }

    function commitLeaves(bytes32[] memory commitments) internal pure returns (bytes32[] memory leaves) {
        leaves = new bytes32[](commitments.length);
        for (uint256 i = 0; i < leaves.length; ++i) {
            leaves[i] = twice(abi.encode(i, leaves.length, commitments[i]));
        }
    }

    function twice(bytes memory encoded) internal pure returns (bytes32) {
        return keccak256(bytes.concat(keccak256(encoded)));
    }

    function rootOf(bytes32[] memory level) internal pure returns (bytes32) {
        if (level.length == 0) return 0;
        while (level.length > 1) level = above_(level);
        return level[0];
    }

    function proofOf(bytes32[] memory level, uint256 index) internal pure returns (bytes32[] memory proof) {
        bytes32[] memory long = new bytes32[](64);
        uint256 length = 0;
        for (; level.length > 1; level = above_(level)) {
            if ((index ^ 1) < level.length) long[length++] = level[index ^ 1];
            index /= 2;
        }
        proof = new bytes32[](length);
        for (uint256 i = 0; i < length; ++i) {
            proof[i] = long[i];
        }
    }

    function above_(bytes32[] memory level) private pure returns (bytes32[] memory next) {
        next = new bytes32[]((level.length + 1) / 2);
        for (uint256 i = 0; i < next.length; ++i) {
            next[i] = 2 * i + 1 < level.length ? pair(level[2 * i], level[2 * i + 1]) : level[2 * i];
        }
    }
}
