// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {IERC20Permit} from "@openzeppelin/contracts/token/ERC20/extensions/IERC20Permit.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";

/// @notice An EIP-2612 signature: the owner lets this contract take exactly the amount asked.
struct Permit {
    uint256 deadline;
    uint8 v;
    bytes32 r;
    bytes32 s;
}

/// @title Taking a caller's tokens, with an allowance or with a permit.
library TokenPull {
    /// @notice Uses `permit`, then takes `amount` from `from`.
    /// @dev A permit is public once broadcast, so a stranger may spend it first; the allowance then
    /// exists already and a revert of `permit` must not stop the transfer.
    function pullWithPermit(IERC20 token, address from, uint256 amount, Permit calldata permit) internal {
        try IERC20Permit(address(token))
            .permit(from, address(this), amount, permit.deadline, permit.v, permit.r, permit.s) {}
            catch {}
        SafeERC20.safeTransferFrom(token, from, address(this), amount);
    }
}
