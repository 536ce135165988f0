// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

/// @title How what a fault costs is shared, whether it was stake or a coordinator's bond.
library Penalty {
    /// @notice Where the burnt part goes. Dollar tokens let only their issuer burn, and refuse the
    /// zero address, so it goes where nobody has a key.
    address internal constant BURN = 0x000000000000000000000000000000000000dEaD;

    /// @notice 60 % to the injured job, 30 % to the challenger, 10 % burnt; who judges gets nothing.
    /// @dev Rounded against challenger and fire, in favour of the injured. A tenth is burnt so that an
    /// accused who is also challenger and sponsor still loses.
    function split(uint128 amount)
        internal
        pure
        returns (uint128 toJobUp, uint128 toChallengerDown, uint128 burntDown)
    {
        toChallengerDown = uint128(uint256(amount) * 30 / 100);
        burntDown = amount / 10;
        toJobUp = amount - toChallengerDown - burntDown;
    }
}
