// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {StakeVault} from "../src/StakeVault.sol";
import {DevUSD} from "../src/DevUSD.sol";
import {Permit} from "../src/TokenPull.sol";
import {Ledgers} from "./Ledgers.sol";

contract StakeVaultTest is Ledgers {
    bytes32 private constant NODE = keccak256("node");

    function setUp() public {
        deployAll(0);
        token.mint(ALICE, 1000);
        vm.prank(ALICE);
        token.approve(address(vault), 1000);
    }

    function testStakeUnbondWithdraw() public {
        _stake(600);
        _unbond(200);
        uint64 first = uint64(block.timestamp) + UNBONDING;
        vm.warp(first - 1);
        vm.expectRevert(abi.encodeWithSelector(StakeVault.StillUnbonding.selector, first, first - 1));
        vm.prank(ALICE);
        vault.withdraw();
        _unbond(100);
        vm.warp(first);
        vm.expectRevert(abi.encodeWithSelector(StakeVault.StillUnbonding.selector, first - 1 + UNBONDING, first));
        vm.prank(ALICE);
        vault.withdraw();
        vm.warp(first - 1 + UNBONDING);
        vm.prank(ALICE);
        vault.withdraw();
        eq(token.balanceOf(ALICE), 700, "back");
        _check(300, 0);
        vm.expectRevert(abi.encodeWithSelector(StakeVault.NothingUnbonding.selector, ALICE));
        vm.prank(ALICE);
        vault.withdraw();
    }

    function testStakeWithPermit() public {
        Permit memory p = permit(SPONSOR_KEY, address(vault), 70);
        vm.prank(sponsor);
        vault.stakeWithPermit(70, p);
        (uint128 active,,) = vault.stakeOf(sponsor);
        eq(active, 70, "active");
    }

    function testStakeErrors() public {
        vm.expectRevert(abi.encodeWithSelector(StakeVault.ZeroAmount.selector));
        vault.stake(0);
        vm.expectRevert(abi.encodeWithSelector(StakeVault.ZeroAmount.selector));
        vm.prank(ALICE);
        vault.requestUnbond(0);
        vm.expectRevert(abi.encodeWithSelector(StakeVault.InsufficientStake.selector, 0, 1));
        vm.prank(ALICE);
        vault.requestUnbond(1);
    }

    function testBindNode() public {
        vm.prank(ALICE);
        vault.bindNode(NODE);
        vm.prank(ALICE);
        vault.bindNode(keccak256("second node"));
        vm.prank(ALICE);
        vault.bindNode(NODE);
        require(vault.nodeOwner(NODE) == ALICE, "owner");
        vm.expectRevert(abi.encodeWithSelector(StakeVault.NodeKeyTaken.selector, NODE, ALICE));
        vm.prank(BOB);
        vault.bindNode(NODE);
        vm.expectRevert(abi.encodeWithSelector(StakeVault.ZeroNodeKey.selector));
        vault.bindNode(0);
    }

    function testSlashTakesMaturedUnbondingFirstThenActive() public {
        _stake(1000);
        _unbond(400);
        vm.warp(block.timestamp + UNBONDING + 1);
        eq(_slash(100), 100, "first");
        _check(600, 300);
        eq(_slash(500), 500, "second");
        _check(400, 0);
        eq(_slash(900), 400, "no more than there is");
        eq(token.balanceOf(BOB), 1000, "the injured");
        eq(token.balanceOf(COURT), 0, "never the court");
        vm.expectRevert(abi.encodeWithSelector(StakeVault.ZeroAmount.selector));
        _slash(1);
    }

    function testOnlyTheCourtSlashesAndNeverForItself() public {
        _stake(1000);
        vm.expectRevert(abi.encodeWithSelector(StakeVault.NotCourt.selector, address(this)));
        vault.slash(ALICE, 1, "case", BOB);
        address[3] memory refused = [COURT, address(vault), address(0)];
        for (uint256 i = 0; i < refused.length; ++i) {
            vm.expectRevert(abi.encodeWithSelector(StakeVault.BadRecipient.selector, refused[i]));
            vm.prank(COURT);
            vault.slash(ALICE, 1, "case", refused[i]);
        }
        vault = new StakeVault(token, address(0), UNBONDING);
        vm.expectRevert(abi.encodeWithSelector(StakeVault.NotCourt.selector, COURT));
        _slash(1);
    }

    function testFuzzNothingIsStranded(uint128 staked, uint128 unbonded, uint128 slashed) public {
        staked = uint128(bound(staked, 1, 1000));
        unbonded = uint128(bound(unbonded, 1, staked));
        slashed = uint128(bound(slashed, 1, 2000));
        _stake(staked);
        _unbond(unbonded);
        uint128 taken = _slash(slashed);
        (uint128 active, uint128 unbonding,) = vault.stakeOf(ALICE);
        eq(uint256(taken) + active + unbonding, staked, "conserved");
        if (active > 0) _unbond(active);
        vm.warp(block.timestamp + UNBONDING);
        if (active + unbonding > 0) {
            vm.prank(ALICE);
            vault.withdraw();
        }
        eq(token.balanceOf(ALICE), 1000 - taken, "all but the slash comes back");
        eq(token.balanceOf(address(vault)), 0, "empty");
    }

    function testOnlyTheFaucetMints() public {
        vm.expectRevert(abi.encodeWithSelector(DevUSD.NotMinter.selector, ALICE));
        vm.prank(ALICE);
        token.mint(ALICE, 1);
        eq(token.decimals(), 6, "decimals");
    }

    function _stake(uint128 amount) private {
        vm.prank(ALICE);
        vault.stake(amount);
    }

    function _unbond(uint128 amount) private {
        vm.prank(ALICE);
        vault.requestUnbond(amount);
    }

    function _slash(uint128 amount) private returns (uint128) {
        vm.prank(COURT);
        return vault.slash(ALICE, amount, "case", BOB);
    }

    function _check(uint128 wantActive, uint128 wantUnbonding) private view {
        (uint128 active, uint128 unbonding,) = vault.stakeOf(ALICE);
        eq(active, wantActive, "active");
        eq(unbonding, wantUnbonding, "unbonding");
    }
}
