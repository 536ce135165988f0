// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.26;

/// @title An append-only log of Merkle roots, one chain of heads per publisher and subject.
interface IProvenanceLog {
    /// @notice `root` over `leaves` statements was appended to `subject` by `publisher`.
    event Anchored(address indexed publisher, bytes32 indexed subject, bytes32 root, uint64 leaves);

    /// @notice Appends `root` to the caller's `subject`.
    function anchor(bytes32 subject, bytes32 root, uint64 leaves) external;

    /// @notice The head of `publisher`'s `subject`; zero when nothing was anchored.
    function head(address publisher, bytes32 subject) external view returns (bytes32);

    /// @notice How many roots `publisher` has anchored under `subject`.
    function seq(address publisher, bytes32 subject) external view returns (uint256);
}
