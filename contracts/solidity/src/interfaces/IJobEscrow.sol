// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.26;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {ICoordinators} from "./ICoordinators.sol";
import {IProvenanceLog} from "./IProvenanceLog.sol";

/// @title What the other contracts ask of the job escrow.
interface IJobEscrow is ICoordinators {
    /// @notice The settlement token.
    function TOKEN() external view returns (IERC20);

    /// @notice The only caller of `freeze`.
    function COURT() external view returns (address);

    /// @notice Where a challenger's part of a forfeited bond is staked.
    function VAULT() external view returns (address);

    /// @notice Where each epoch's provenance root is anchored.
    function PROVENANCE_LOG() external view returns (IProvenanceLog);

    /// @notice Adds `amount` of the caller's tokens to a job's funds, whether it is open or not.
    function compensate(bytes32 jobId, uint128 amount) external;

    /// @notice Ends a job for its coordinator's fault; the court only.
    /// @return forfeited The bond that was taken.
    function freeze(bytes32 jobId, bytes32 caseId, address challenger) external returns (uint128 forfeited);
}
