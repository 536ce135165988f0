// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

/// @notice A provider's word that it did the work of a lease with this result.
struct Receipt {
    string leaseId;
    uint32 leaseEpoch;
    bytes32 jobId;
    bytes32 resultDigest;
    address account;
    string node;
}

/// @notice A standing offer to do units of one kind at a price.
struct Bid {
    bytes32 jobId;
    string kind;
    uint32 epochFrom;
    uint32 epochTo;
    uint96 priceMicros;
    uint32 capacity;
    address account;
    string node;
    uint64 validUntilMs;
    uint64 nonce;
}

/// @notice A coordinator's word that a commitment stands in every market epoch of its range.
struct BidReceipt {
    bytes32 commitment;
    uint32 epochFrom;
    uint32 epochTo;
    uint64 receivedAtMs;
    uint64 seq;
}

/// @notice The commitments of one market epoch, closed by the coordinator.
struct BookSeal {
    uint32 epoch;
    bytes32 commitRoot;
    uint32 numCommitments;
    uint64 sealedAtMs;
}

/// @notice What one auction decided. `certificateDigest` covers all that is not spelled out here.
struct ClearingCertificate {
    bytes32 certificateDigest;
    bytes32 lotDigest;
    bytes32 jobId;
    uint32 epoch;
    bytes32 commitRoot;
    bytes32 revealRoot;
    bytes32 handicapRoot;
    bytes32 allocationRoot;
    uint32 numUnits;
    uint96 reserveMicros;
    uint96 clearingPriceMicros;
    uint8 rule;
}

/// @notice One bid's place in an auction's ladder: a leaf under `allocationRoot`.
struct Rung {
    uint256 rung;
    uint256 count;
    bytes32 bidDigest;
    address account;
    uint96 priceMicros;
    uint96 handicapMicros;
    uint96 payMicros;
    uint32 units;
}

/// @notice What one verifier says of one case.
struct Vote {
    bytes32 caseId;
    bytes32 evidence;
    bool guilty;
}

/// @title The EIP-712 hashes of the records that accounts sign off the chain.
/// @dev The types are those of `shoal.protocol` (`eip712_fields`); a test holds the two equal. A struct
/// without strings is its own EIP-712 encoding: `abi.encode` writes its fields as one word each.
library MarketRecords {
    /// @notice The number of the pay-as-bid rule in a certificate.
    uint8 internal constant PAY_AS_BID = 1;

    bytes32 internal constant DOMAIN_TYPE =
        keccak256("EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)");
    bytes32 internal constant RECEIPT_TYPE = keccak256(
        "Receipt(string leaseId,uint32 leaseEpoch,bytes32 jobId,bytes32 resultDigest,address account,string node)"
    );
    bytes32 internal constant BID_TYPE = keccak256(
        "Bid(bytes32 jobId,string kind,uint32 epochFrom,uint32 epochTo,uint96 priceMicros,uint32 capacity,address account,string node,uint64 validUntilMs,uint64 nonce)"
    );
    bytes32 internal constant BID_RECEIPT_TYPE =
        keccak256("BidReceipt(bytes32 commitment,uint32 epochFrom,uint32 epochTo,uint64 receivedAtMs,uint64 seq)");
    bytes32 internal constant BOOK_SEAL_TYPE =
        keccak256("BookSeal(uint32 epoch,bytes32 commitRoot,uint32 numCommitments,uint64 sealedAtMs)");
    bytes32 internal constant CERTIFICATE_TYPE = keccak256(
        "ClearingCertificate(bytes32 certificateDigest,bytes32 lotDigest,bytes32 jobId,uint32 epoch,bytes32 commitRoot,bytes32 revealRoot,bytes32 handicapRoot,bytes32 allocationRoot,uint32 numUnits,uint96 reserveMicros,uint96 clearingPriceMicros,uint8 rule)"
    );
    bytes32 internal constant VOTE_TYPE = keccak256("Vote(bytes32 caseId,bytes32 evidence,bool guilty)");

    /// @notice Where these signatures count: this chain and one escrow.
    function domainSeparator(address escrow) internal view returns (bytes32) {
        return keccak256(abi.encode(DOMAIN_TYPE, keccak256("Shoal"), keccak256("1"), block.chainid, escrow));
    }

    function structHash(Receipt calldata record) internal pure returns (bytes32) {
        return keccak256(
            abi.encode(
                RECEIPT_TYPE,
                keccak256(bytes(record.leaseId)),
                record.leaseEpoch,
                record.jobId,
                record.resultDigest,
                record.account,
                keccak256(bytes(record.node))
            )
        );
    }

    function structHash(Bid calldata record) internal pure returns (bytes32) {
        return keccak256(
            bytes.concat(
                abi.encode(
                    BID_TYPE,
                    record.jobId,
                    keccak256(bytes(record.kind)),
                    record.epochFrom,
                    record.epochTo,
                    record.priceMicros
                ),
                abi.encode(
                    record.capacity,
                    record.account,
                    keccak256(bytes(record.node)),
                    record.validUntilMs,
                    record.nonce
                )
            )
        );
    }

    function structHash(BidReceipt calldata record) internal pure returns (bytes32) {
        return keccak256(abi.encode(BID_RECEIPT_TYPE, record));
    }

    function structHash(BookSeal calldata record) internal pure returns (bytes32) {
        return keccak256(abi.encode(BOOK_SEAL_TYPE, record));
    }

    function structHash(ClearingCertificate calldata record) internal pure returns (bytes32) {
        return keccak256(abi.encode(CERTIFICATE_TYPE, record));
    }

    function structHash(Vote memory record) internal pure returns (bytes32) {
        return keccak256(abi.encode(VOTE_TYPE, record));
    }

    /// @notice The sealed form of a bid.
    function commitment(bytes32 bidDigest, bytes32 salt) internal pure returns (bytes32) {
        return keccak256(abi.encode(bidDigest, salt));
    }
}
