// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IProvenanceLog} from "./interfaces/IProvenanceLog.sol";

/// @title Heads of provenance logs, held in storage so that `eth_getProof` can prove them.
/// @dev Subjects are namespaced by the caller: nobody can write into another's log, so nothing
/// here needs an owner. The head commits to every root and its leaf count, in order.
contract ProvenanceLog is IProvenanceLog {
    struct Log {
        bytes32 head;
        uint256 seq;
    }

    mapping(address publisher => mapping(bytes32 subject => Log)) private _logs;

    /// @inheritdoc IProvenanceLog
    function anchor(bytes32 subject, bytes32 root, uint64 leaves) external {
        Log storage own = _logs[msg.sender][subject];
        own.head = keccak256(abi.encode(own.head, root, leaves));
        // Counting past 2**256 anchors is not a danger worth its gas.
        unchecked {
            ++own.seq;
        }
        emit Anchored(msg.sender, subject, root, leaves);
    }

    /// @inheritdoc IProvenanceLog
    function head(address publisher, bytes32 subject) external view returns (bytes32) {
        return _logs[publisher][subject].head;
    }

    /// @inheritdoc IProvenanceLog
    function seq(address publisher, bytes32 subject) external view returns (uint256) {
        return _logs[publisher][subject].seq;
    }
}
