// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {MessageHashUtils} from "@openzeppelin/contracts/utils/cryptography/MessageHashUtils.sol";
import {LoggedVerdict, Neighbour} from "../src/Evidence.sol";
import {
    Bid,
    BidReceipt,
    BookSeal,
    ClearingCertificate,
    MarketRecords,
    Receipt,
    Rung
} from "../src/MarketRecords.sol";
import {ProvenanceLog} from "../src/ProvenanceLog.sol";
import {Digests} from "./CourtEvidence.sol";
import {Vectors} from "./Vectors.sol";
import {Base} from "./Vm.sol";

/// @title Python's records, trees and statements, as the contracts read them.
contract CourtVectorsTest is Base {
    Digests private digests;

    function setUp() public {
        digests = new Digests();
        require(block.chainid == Vectors.CHAIN_ID, "chain");
    }

    function testReceipt() public view {
        (Receipt memory record, bytes32 digest, bytes memory signature) = Vectors.receipt();
        _check(digests.receipt(record), digest, signature);
    }

    function testBidAndItsCommitment() public view {
        (Bid memory record, bytes32 digest, bytes memory signature) = Vectors.bid();
        _check(digests.bid(record), digest, signature);
        (bytes32 salt, bytes32 commitment) = Vectors.sealedBid();
        eq(MarketRecords.commitment(digest, salt), commitment, "commitment");
    }

    function testBidReceipt() public view {
        (BidReceipt memory record, bytes32 digest, bytes memory signature) = Vectors.bidReceipt();
        _check(digests.bidReceipt(record), digest, signature);
    }

    function testSeal() public view {
        (BookSeal memory record, bytes32 digest, bytes memory signature) = Vectors.seal();
        _check(digests.seal(record), digest, signature);
    }

    function testCertificate() public view {
        (ClearingCertificate memory record, bytes32 digest, bytes memory signature) = Vectors.certificate();
        _check(digests.certificate(record), digest, signature);
    }

    function testGapInABook() public view {
        (, bytes32 commitment) = Vectors.sealedBid();
        (Neighbour[] memory neighbours, bytes32 root) = Vectors.gap();
        digests.requireExcluded(commitment, neighbours, root);
    }

    function testRungOfALadder() public view {
        (Rung memory rung, bytes32[] memory proof, bytes32 root) = Vectors.rungOnLadder();
        digests.requireRung(rung, proof, root);
    }

    function testLoggedVerdict() public {
        (LoggedVerdict memory verdict, bytes32 task, bytes32 head) = Vectors.loggedVerdict();
        ProvenanceLog log = new ProvenanceLog();
        log.anchor(Vectors.JOB_ID, verdict.anchor.root, verdict.anchor.leaves);
        log.anchor(Vectors.JOB_ID, verdict.anchor.laterRoots[0], verdict.anchor.laterLeaves[0]);
        eq(log.head(address(this), Vectors.JOB_ID), head, "head");
        bytes32 found = digests.requirePaid(log, address(this), Vectors.SIGNER, Vectors.JOB_ID, verdict);
        eq(found, task, "task");
        eq(_count(verdict.payload, '"task_id":"'), 1, "one task");
        eq(_count(verdict.payload, '"pay_micros":'), 1, "one pay");
    }

    function _check(bytes32 structHash, bytes32 digest, bytes memory signature) private view {
        bytes32 found = MessageHashUtils.toTypedDataHash(digests.domain(Vectors.ESCROW), structHash);
        eq(found, digest, "digest");
        require(ECDSA.recover(found, signature) == Vectors.SIGNER, "signer");
    }

    /// How often `text` stands in `data`.
    function _count(bytes memory data, bytes memory text) private pure returns (uint256 count) {
        for (uint256 i = 0; i + text.length <= data.length; ++i) {
            uint256 k = 0;
            while (k < text.length && data[i + k] == text[k]) ++k;
            if (k == text.length) ++count;
        }
    }
}
