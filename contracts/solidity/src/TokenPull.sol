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

/// @title Taking a caller's tokens, with an allowance or with a permit, or nothing at all.
library TokenPull {
    /// @notice The token moved less than it was asked to: it takes a fee, or does not move at all.
    error ReceivedLess(uint256 received, uint256 expected);

    /// @notice Takes `amount` from the caller, to the last unit.
    /// @dev What is booked must be there: a token that keeps a fee would have one job's shortfall
    /// paid from another's money.
    function pull(IERC20 token, uint256 amount) internal {
        uint256 before = token.balanceOf(address(this));
        SafeERC20.safeTransferFrom(token, msg.sender, address(this), amount);
        uint256 held = token.balanceOf(address(this));
        if (held < before + amount) revert ReceivedLess(held < before ? 0 : held - before, amount);
    }

    /// @notice Uses the caller's `permit`, then takes `amount` from it.
    /// @dev A permit is public once broadcast, so a stranger may spend it first; the allowance then
    /// exists already and a revert of `permit` must not stop the transfer.
    function pullWithPermit(IERC20 token, uint256 amount, Permit calldata permit) internal {
        try IERC20Permit(address(token))
            .permit(msg.sender, address(this), amount, permit.deadline, permit.v, permit.r, permit.s) {}
            catch {}
        pull(token, amount);
    }
}
