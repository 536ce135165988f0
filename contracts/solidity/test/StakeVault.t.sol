// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {DevUSD} from "../src/DevUSD.sol";
import {JobEscrow} from "../src/JobEscrow.sol";
import {Penalty} from "../src/Penalty.sol";
import {StakeVault} from "../src/StakeVault.sol";
import {Permit} from "../src/TokenPull.sol";
import {Ledgers} from "./Ledgers.sol";

contract StakeVaultTest is Ledgers {
    bytes32 private constant NODE = keccak256("node");
    uint128 private constant JOB_FUNDS = 100;

    bytes32 private job;

    function setUp() public {
        deployAll(0);
        job = openJob(JOB_FUNDS);
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

    function testStakeForAnother() public {
        token.mint(BOB, 5);
        vm.prank(BOB);
        token.approve(address(vault), 5);
        vm.prank(BOB);
        vault.stakeFor(ALICE, 5);
        _check(5, 0);
        eq(token.balanceOf(BOB), 0, "paid by the giver");
        vm.expectRevert(abi.encodeWithSelector(StakeVault.ZeroAccount.selector));
        vault.stakeFor(address(0), 5);
        vm.expectRevert(abi.encodeWithSelector(StakeVault.ZeroAmount.selector));
        vault.stakeFor(ALICE, 0);
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
        eq(escrow.jobOf(job).funded, JOB_FUNDS + 600, "the injured job");
        (uint128 active,,) = vault.stakeOf(BOB);
        eq(active, 300, "the challenger");
        eq(token.balanceOf(Penalty.BURN), 100, "burnt");
        eq(token.balanceOf(COURT), 0, "never the court");
        eq(token.balanceOf(address(vault)), 300, "nothing is stranded");
    }

    function testASlashAfterUnbondingWasWithdrawnFindsNothing() public {
        _stake(1000);
        _unbond(1000);
        vm.warp(block.timestamp + UNBONDING);
        vm.prank(ALICE);
        vault.withdraw();
        vm.expectRevert(abi.encodeWithSelector(StakeVault.NothingToSlash.selector, ALICE));
        _slash(1);
        eq(token.balanceOf(ALICE), 1000, "alice");
        eq(token.balanceOf(address(vault)), 0, "vault");
        eq(escrow.jobOf(job).funded, JOB_FUNDS, "job");
    }

    function testASlashForAnUnknownJobChangesNothing() public {
        _stake(1000);
        vm.expectRevert(abi.encodeWithSelector(JobEscrow.NoSuchJob.selector, bytes32("x")));
        vm.prank(COURT);
        vault.slash(ALICE, 10, "case", "x", BOB);
        _check(1000, 0);
        eq(token.balanceOf(address(vault)), 1000, "balance");
    }

    function testOnlyTheCourtSlashesAndNeverForItself() public {
        _stake(1000);
        vm.expectRevert(abi.encodeWithSelector(StakeVault.NotCourt.selector, address(this)));
        vault.slash(ALICE, 1, "case", job, BOB);
        address[3] memory refused = [COURT, ALICE, address(0)];
        for (uint256 i = 0; i < refused.length; ++i) {
            vm.expectRevert(abi.encodeWithSelector(StakeVault.BadChallenger.selector, refused[i]));
            vm.prank(COURT);
            vault.slash(ALICE, 1, "case", job, refused[i]);
        }
        deployPair(address(0), 0, 0);
        vm.expectRevert(abi.encodeWithSelector(StakeVault.NotCourt.selector, COURT));
        _slash(1);
    }

    function testFuzzThePenaltyIsSharedToTheLastUnit(uint128 amount) public pure {
        (uint128 toJob, uint128 toChallenger, uint128 burnt) = Penalty.split(amount);
        eq(uint256(toJob) + toChallenger + burnt, amount, "sum");
        require(uint256(toJob) * 100 >= uint256(amount) * 60, "the injured is rounded up");
        require(uint256(toJob) * 100 < uint256(amount) * 60 + 200, "by less than two units");
        require(uint256(toChallenger) * 100 <= uint256(amount) * 30, "the challenger is rounded down");
        require(uint256(burnt) * 100 <= uint256(amount) * 10, "the fire is rounded down");
    }

    function testFuzzNothingIsStrandedInAnyOrder(uint128 staked, uint256[8] memory moves) public {
        staked = uint128(bound(staked, 1, 1000));
        _stake(staked);
        uint256 taken;
        for (uint256 i = 0; i < moves.length; ++i) {
            (uint128 active, uint128 unbonding, uint64 unbondAt) = vault.stakeOf(ALICE);
            uint256 size = moves[i] / 4;
            if (moves[i] % 4 == 0 && active + unbonding > 0) taken += _slash(uint128(bound(size, 1, 700)));
            if (moves[i] % 4 == 1 && active > 0) _unbond(uint128(bound(size, 1, active)));
            if (moves[i] % 4 == 2) vm.warp(block.timestamp + size % UNBONDING);
            if (moves[i] % 4 == 3 && unbonding > 0 && block.timestamp >= unbondAt) _withdraw(ALICE);
        }
        (uint128 left, uint128 leaving,) = vault.stakeOf(ALICE);
        eq(taken + left + leaving + token.balanceOf(ALICE), 1000, "conserved");
        _leave(ALICE);
        _leave(BOB);
        eq(token.balanceOf(ALICE), 1000 - taken, "all but the slash comes back");
        eq(token.balanceOf(address(vault)), 0, "empty");
        uint256 shared = token.balanceOf(BOB) + token.balanceOf(Penalty.BURN);
        eq(token.balanceOf(address(escrow)) + shared, JOB_FUNDS + taken, "shared");
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
        return vault.slash(ALICE, amount, "case", job, BOB);
    }

    function _withdraw(address account) private {
        vm.prank(account);
        vault.withdraw();
    }

    /// Takes everything of `account`'s out of the vault.
    function _leave(address account) private {
        (uint128 active, uint128 unbonding,) = vault.stakeOf(account);
        if (active + unbonding == 0) return;
        if (active > 0) {
            vm.prank(account);
            vault.requestUnbond(active);
        }
        vm.warp(block.timestamp + UNBONDING);
        _withdraw(account);
    }

    function _check(uint128 wantActive, uint128 wantUnbonding) private view {
        (uint128 active, uint128 unbonding,) = vault.stakeOf(ALICE);
        eq(active, wantActive, "active");
        eq(unbonding, wantUnbonding, "unbonding");
    }
}
