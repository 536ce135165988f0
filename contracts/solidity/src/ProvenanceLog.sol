// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IProvenanceLog} from "./interfaces/IProvenanceLog.sol";

/// @title Heads of provenance logs, held in storage so that `eth_getProof` can prove them.
/// @dev Subjects are namespaced by the caller: nobody can write into another's log, so nothing
/// here needs an owner. The head commits to every root and its leaf count, in order.
contract ProvenanceLog is IProvenanceLog {
    /// @inheritdoc IProvenanceLog
    mapping(address publisher => mapping(bytes32 subject => bytes32)) public head;

    /// @inheritdoc IProvenanceLog
    mapping(address publisher => mapping(bytes32 subject => uint64)) public seq;

    /// @inheritdoc IProvenanceLog
    function anchor(bytes32 subject, bytes32 root, uint64 leaves) external returns (bytes32 next) {
        next = keccak256(abi.encode(head[msg.sender][subject], root, leaves));
        uint64 position = ++seq[msg.sender][subject];
        head[msg.sender][subject] = next;
        emit Anchored(msg.sender, subject, position, root, leaves, next);
    }
}
