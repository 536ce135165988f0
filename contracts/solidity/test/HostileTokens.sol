// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {DevUSD} from "../src/DevUSD.sol";

/// @title A token that moves money and returns nothing, as the oldest dollar tokens do.
contract NoReturnToken {
    mapping(address => uint256) public balanceOf;
    mapping(address => mapping(address => uint256)) public allowance;

    function mint(address to, uint256 amount) external {
        balanceOf[to] += amount;
    }

    function approve(address spender, uint256 amount) external {
        allowance[msg.sender][spender] = amount;
    }

    function transfer(address to, uint256 amount) external {
        _move(msg.sender, to, amount);
    }

    function transferFrom(address from, address to, uint256 amount) external {
        allowance[from][msg.sender] -= amount;
        _move(from, to, amount);
    }

    function _move(address from, address to, uint256 amount) private {
        balanceOf[from] -= amount;
        balanceOf[to] += amount;
    }
}

/// @title A token that says no by returning false instead of reverting, once it is told to.
contract FalseReturnToken is DevUSD {
    bool public refusing;

    function refuse(bool now_) external {
        refusing = now_;
    }

    function transfer(address to, uint256 amount) public override returns (bool) {
        return !refusing && super.transfer(to, amount);
    }

    function transferFrom(address from, address to, uint256 amount) public override returns (bool) {
        return !refusing && super.transferFrom(from, to, amount);
    }
}

/// @title A token that keeps a hundredth of every transfer, once it is told to.
contract FeeToken is DevUSD {
    uint256 public feePercent;

    function charge(uint256 percent) external {
        feePercent = percent;
    }

    function _update(address from, address to, uint256 amount) internal override {
        uint256 fee = from == address(0) || to == address(0) ? 0 : amount * feePercent / 100;
        if (fee != 0) super._update(from, address(0), fee);
        super._update(from, to, amount - fee);
    }
}

/// @title A token that calls somebody in the middle of every transfer, before the money has moved.
contract ReentrantToken is DevUSD {
    address public target;
    bytes public callback;
    uint256 public successes;
    bool private _inside;

    function arm(address target_, bytes calldata callback_) external {
        (target, callback) = (target_, callback_);
    }

    function _update(address from, address to, uint256 amount) internal override {
        if (target != address(0) && !_inside) {
            _inside = true;
            (bool ok,) = target.call(callback);
            if (ok) ++successes;
            _inside = false;
        }
        super._update(from, to, amount);
    }
}

/// @title A token that refuses one account, as dollar tokens do.
contract BlacklistToken is DevUSD {
    address public refused;

    error Refused(address account);

    function refuse(address account) external {
        refused = account;
    }

    function _update(address from, address to, uint256 amount) internal override {
        if (refused != address(0) && (to == refused || from == refused)) revert Refused(refused);
        super._update(from, to, amount);
    }
}

/// @title A token whose issuer changes everybody's balance in proportion.
contract RebasingToken {
    mapping(address => uint256) private _parts;
    mapping(address => mapping(address => uint256)) public allowance;
    uint256 public percent = 100;

    function rebase(uint256 percent_) external {
        percent = percent_;
    }

    function mint(address to, uint256 amount) external {
        _parts[to] += amount * 100 / percent;
    }

    function approve(address spender, uint256 amount) external returns (bool) {
        allowance[msg.sender][spender] = amount;
        return true;
    }

    function balanceOf(address who) public view returns (uint256) {
        return _parts[who] * percent / 100;
    }

    function transfer(address to, uint256 amount) external returns (bool) {
        return _move(msg.sender, to, amount);
    }

    function transferFrom(address from, address to, uint256 amount) external returns (bool) {
        allowance[from][msg.sender] -= amount;
        return _move(from, to, amount);
    }

    function _move(address from, address to, uint256 amount) private returns (bool) {
        uint256 parts = amount * 100 / percent;
        _parts[from] -= parts;
        _parts[to] += parts;
        return true;
    }
}
