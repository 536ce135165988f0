// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20Errors} from "@openzeppelin/contracts/interfaces/draft-IERC6093.sol";
import {ERC3009} from "@openzeppelin/contracts/token/ERC20/extensions/draft-ERC3009.sol";
import {DevUSD} from "../src/DevUSD.sol";
import {Base} from "./Vm.sol";

/// @title EIP-3009: payments that their payer signs and anybody sends.
contract DevUSDTest is Base {
    struct Signature {
        uint8 v;
        bytes32 r;
        bytes32 s;
    }

    uint256 private constant KEY = 0xA11CE;
    bytes32 private constant NONCE = keccak256("nonce");
    address private constant PAYEE = address(0xB0B);
    uint256 private constant AFTER = 999;
    uint256 private constant BEFORE = 2000;

    DevUSD private token;
    address private payer;

    function setUp() public {
        vm.warp(1000);
        token = new DevUSD();
        payer = vm.addr(KEY);
        token.mint(payer, 100);
    }

    function testATransferHappensOnce() public {
        Signature memory s = _signed("TransferWithAuthorization", KEY, 60);
        _transfer(60, s);
        eq(token.balanceOf(PAYEE), 60, "paid");
        require(token.authorizationState(payer, NONCE), "used");
        vm.expectRevert(abi.encodeWithSelector(ERC3009.ERC3009UsedAuthorization.selector, payer, NONCE));
        _transfer(60, s);
    }

    function testAnotherAmountOrSignerIsRefused() public {
        Signature memory s = _signed("TransferWithAuthorization", KEY, 60);
        vm.expectRevert(abi.encodeWithSelector(ERC3009.ERC3009InvalidSignature.selector));
        _transfer(61, s);
        s = _signed("TransferWithAuthorization", KEY + 1, 60);
        vm.expectRevert(abi.encodeWithSelector(ERC3009.ERC3009InvalidSignature.selector));
        _transfer(60, s);
        eq(token.balanceOf(payer), 100, "untouched");
    }

    function testOnlyInsideItsWindow() public {
        Signature memory s = _signed("TransferWithAuthorization", KEY, 60);
        uint256[2] memory outside = [AFTER, BEFORE];
        for (uint256 i = 0; i < outside.length; ++i) {
            vm.warp(outside[i]);
            vm.expectRevert(abi.encodeWithSelector(ERC3009.ERC3009InvalidAuthorizationTime.selector, AFTER, BEFORE));
            _transfer(60, s);
        }
    }

    function testOnlyThePayeeReceives() public {
        Signature memory s = _signed("ReceiveWithAuthorization", KEY, 60);
        vm.expectRevert(abi.encodeWithSelector(IERC20Errors.ERC20InvalidReceiver.selector, PAYEE));
        token.receiveWithAuthorization(payer, PAYEE, 60, AFTER, BEFORE, NONCE, s.v, s.r, s.s);
        vm.prank(PAYEE);
        token.receiveWithAuthorization(payer, PAYEE, 60, AFTER, BEFORE, NONCE, s.v, s.r, s.s);
        eq(token.balanceOf(PAYEE), 60, "paid");
    }

    function testACancelledAuthorisationPaysNothing() public {
        bytes32 kind = keccak256("CancelAuthorization(address authorizer,bytes32 nonce)");
        Signature memory c = _sign(KEY, keccak256(abi.encode(kind, payer, NONCE)));
        token.cancelAuthorization(payer, NONCE, c.v, c.r, c.s);
        Signature memory s = _signed("TransferWithAuthorization", KEY, 60);
        vm.expectRevert(abi.encodeWithSelector(ERC3009.ERC3009UsedAuthorization.selector, payer, NONCE));
        _transfer(60, s);
    }

    function _transfer(uint256 amount, Signature memory s) private {
        token.transferWithAuthorization(payer, PAYEE, amount, AFTER, BEFORE, NONCE, s.v, s.r, s.s);
    }

    function _signed(string memory name, uint256 key, uint256 amount) private view returns (Signature memory) {
        bytes32 kind = keccak256(
            abi.encodePacked(
                name,
                "(address from,address to,uint256 value,uint256 validAfter,uint256 validBefore,bytes32 nonce)"
            )
        );
        return _sign(key, keccak256(abi.encode(kind, payer, PAYEE, amount, AFTER, BEFORE, NONCE)));
    }

    function _sign(uint256 key, bytes32 message) private view returns (Signature memory) {
        (uint8 v, bytes32 r, bytes32 s) =
            vm.sign(key, keccak256(abi.encodePacked("\x19\x01", token.DOMAIN_SEPARATOR(), message)));
        return Signature(v, r, s);
    }
}
