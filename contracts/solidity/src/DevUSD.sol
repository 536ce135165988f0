// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ERC20} from "@openzeppelin/contracts/token/ERC20/ERC20.sol";
import {ERC20Permit} from "@openzeppelin/contracts/token/ERC20/extensions/ERC20Permit.sol";
import {ERC3009} from "@openzeppelin/contracts/token/ERC20/extensions/draft-ERC3009.sol";

/// @title The settlement token of a development chain: worthless dollars with six decimals.
/// @dev Stands where a stablecoin stands on a public chain; it is never deployed there. Like that,
/// it takes EIP-2612 permits and EIP-3009 authorisations.
contract DevUSD is ERC20, ERC20Permit, ERC3009 {
    /// @notice The faucet: the account that deployed the token.
    address public immutable MINTER;

    /// @notice `caller` is not the faucet.
    error NotMinter(address caller);

    constructor() ERC20("Shoal development dollar", "DevUSD") ERC20Permit("Shoal development dollar") {
        MINTER = msg.sender;
    }

    /// @notice Gives `amount` new base units to `to`; the faucet only.
    function mint(address to, uint256 amount) external {
        if (msg.sender != MINTER) revert NotMinter(msg.sender);
        _mint(to, amount);
    }

    /// @notice Six, as for the dollar tokens it stands for: one base unit is one micro.
    function decimals() public pure override returns (uint8) {
        return 6;
    }
}
