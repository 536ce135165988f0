// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.26;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";

/// @title What the other contracts ask of the stake vault.
interface IStakeVault {
    /// @notice The settlement token.
    function TOKEN() external view returns (IERC20);

    /// @notice The only caller of `slash`.
    function COURT() external view returns (address);

    /// @notice Where the part of a penalty that goes to a job is paid.
    function ESCROW() external view returns (address);

    /// @notice Seconds between the last request to unbond and the withdrawal.
    function UNBONDING_PERIOD() external view returns (uint64);

    /// @notice An account's stake: counted, leaving, and when what is leaving may be withdrawn.
    function stakeOf(address account) external view returns (uint128 active, uint128 unbonding, uint64 unbondAt);

    /// @notice Adds `amount` of the caller's tokens to `account`'s active stake.
    function stakeFor(address account, uint128 amount) external;

    /// @notice Takes up to `amount` of `account`'s stake and shares it out; the court only.
    /// @return taken What was there to take: `amount`, or all of a smaller stake.
    function slash(address account, uint128 amount, bytes32 caseId, bytes32 injuredJob, address challenger)
        external
        returns (uint128 taken);
}
