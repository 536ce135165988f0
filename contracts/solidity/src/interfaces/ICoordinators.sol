// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.26;

/// @title Who coordinates which job.
interface ICoordinators {
    /// @notice The coordinator of `jobId`; zero for an unknown job.
    function coordinatorOf(bytes32 jobId) external view returns (address);
}
