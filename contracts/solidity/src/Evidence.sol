// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {MerkleProof} from "@openzeppelin/contracts/utils/cryptography/MerkleProof.sol";
import {IProvenanceLog} from "./interfaces/IProvenanceLog.sol";
import {Bid, BidReceipt, ClearingCertificate, Rung} from "./MarketRecords.sol";

/// @notice A commitment in a sealed book: leaf `index` of `count`, and its path to the root.
struct Neighbour {
    uint256 index;
    uint256 count;
    bytes32 commitment;
    bytes32[] proof;
}

/// @notice A provenance root, and how the log's head followed from it: the head before, the root with
/// its number of leaves, and every later root with its number.
struct Anchor {
    bytes32 headBefore;
    bytes32 root;
    uint64 leaves;
    bytes32[] laterRoots;
    uint64[] laterLeaves;
}

/// @notice A logged verdict: its leaf, the bytes the leaf stands for, and where in them the task's id
/// and the pay begin, that is, the places of the quotes before `task_id` and `pay_micros`.
struct LoggedVerdict {
    uint64 epoch;
    uint64 seq;
    bytes payload;
    uint256 taskAt;
    uint256 payAt;
    bytes32[] proof;
    Anchor anchor;
}

/// @notice A certificate, one rung of its ladder, and the bid that the rung names.
struct PricedBid {
    ClearingCertificate certificate;
    bytes certificateSignature;
    Rung rung;
    bytes32[] proof;
    Bid bid;
}

/// @notice A receipted bid, and a certificate of an epoch whose book does not hold it. `neighbours`
/// are the leaves around its place: none, one or two; see `Evidence.requireExcluded`.
struct DroppedBid {
    ClearingCertificate certificate;
    bytes certificateSignature;
    BidReceipt receipt;
    bytes receiptSignature;
    Bid bid;
    bytes32 salt;
    Neighbour[] neighbours;
}

/// @title Checks of Merkle trees and logged statements, for the court.
/// @dev Every tree is the one of `shoal.protocol.merkle`: sorted pairs, leaves hashed twice.
library Evidence {
    error NotInTree(bytes32 leaf, bytes32 root);
    error NotExcluded(bytes32 commitment, bytes32 root);
    error NotAnchored(bytes32 head, bytes32 replayed);
    error LengthMismatch(uint256 roots, uint256 leaves);
    error TextNotFound(string text, uint256 place);
    error NothingPaid(uint256 place);

    /// @notice Passes only if `rung` is a leaf of the tree of `root`.
    function requireRung(Rung calldata rung, bytes32[] calldata proof, bytes32 root) internal pure {
        _requireLeaf(keccak256(abi.encode(rung)), proof, root);
    }

    /// @notice Passes only if no leaf of the tree of `root` is `commitment`: the tree is empty, or it is
    /// below the first, above the last, or between two that follow each other.
    /// @dev With index and count in each leaf this finds every commitment that is left out, whatever
    /// order the tree is in: from a first leaf below to a last leaf above there is a step across.
    function requireExcluded(bytes32 commitment, Neighbour[] calldata neighbours, bytes32 root) internal pure {
        if (neighbours.length == 0) {
            if (root != 0) revert NotExcluded(commitment, root);
            return;
        }
        Neighbour calldata first = neighbours[0];
        _requireCommitted(first, root);
        bool outside;
        if (neighbours.length == 1) {
            bool below = first.index == 0 && commitment < first.commitment;
            bool above = first.index + 1 == first.count && first.commitment < commitment;
            outside = below || above;
        } else {
            Neighbour calldata second = neighbours[1];
            _requireCommitted(second, root);
            bool adjacent = first.index + 1 == second.index;
            outside = adjacent && first.commitment < commitment && commitment < second.commitment;
        }
        if (!outside) revert NotExcluded(commitment, root);
    }

    /// @notice Passes only if `verdict` is in the log of `publisher` under `jobId`, made by `coordinator`,
    /// and says that it pays something for a task.
    /// @return task Hash of the task's id.
    /// @dev A leaf names its statement by SHA-256, so the statement is given whole and the two facts
    /// are read from it. Statements are canonical JSON (RFC 8785), in which a quote inside a string
    /// has a backslash before it; so `"task_id":"` and `"pay_micros":` can only be keys, and a
    /// verification statement has each once.
    function requirePaid(
        IProvenanceLog log,
        address publisher,
        address coordinator,
        bytes32 jobId,
        LoggedVerdict calldata verdict
    ) internal view returns (bytes32 task) {
        bytes32 leaf = keccak256(
            abi.encode("verification", sha256(verdict.payload), coordinator, jobId, verdict.epoch, verdict.seq)
        );
        _requireLeaf(leaf, verdict.proof, verdict.anchor.root);
        _requireAnchored(log.head(publisher, jobId), verdict.anchor);
        uint256 payAt = _after(verdict.payload, verdict.payAt, '"pay_micros":');
        // JSON writes no leading zero, so the first digit says whether the number is zero.
        if (payAt >= verdict.payload.length || verdict.payload[payAt] < "1" || verdict.payload[payAt] > "9") {
            revert NothingPaid(payAt);
        }
        uint256 start = _after(verdict.payload, verdict.taskAt, '"task_id":"');
        uint256 end = start;
        while (end < verdict.payload.length && verdict.payload[end] != '"') ++end;
        return keccak256(verdict.payload[start:end]);
    }

    function _requireCommitted(Neighbour calldata neighbour, bytes32 root) private pure {
        bytes32 leaf = keccak256(abi.encode(neighbour.index, neighbour.count, neighbour.commitment));
        _requireLeaf(leaf, neighbour.proof, root);
    }

    /// @dev `leaf` is hashed once already.
    function _requireLeaf(bytes32 leaf, bytes32[] calldata proof, bytes32 root) private pure {
        bytes32 hashedTwice = keccak256(bytes.concat(leaf));
        if (!MerkleProof.verifyCalldata(proof, root, hashedTwice)) revert NotInTree(hashedTwice, root);
    }

    function _requireAnchored(bytes32 head, Anchor calldata anchor) private pure {
        uint256 later = anchor.laterRoots.length;
        if (later != anchor.laterLeaves.length) revert LengthMismatch(later, anchor.laterLeaves.length);
        bytes32 replayed = keccak256(abi.encode(anchor.headBefore, anchor.root, anchor.leaves));
        for (uint256 i = 0; i < later; ++i) {
            replayed = keccak256(abi.encode(replayed, anchor.laterRoots[i], anchor.laterLeaves[i]));
        }
        if (replayed != head) revert NotAnchored(head, replayed);
    }

    /// @dev The place after `text`, which must stand in `payload` at `place`.
    function _after(bytes calldata payload, uint256 place, string memory text) private pure returns (uint256 end) {
        uint256 length = bytes(text).length;
        if (place > payload.length || payload.length - place < length) revert TextNotFound(text, place);
        end = place + length;
        if (keccak256(payload[place:end]) != keccak256(bytes(text))) revert TextNotFound(text, place);
    }
}
