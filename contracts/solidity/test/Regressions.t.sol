// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {FaultCourt} from "../src/FaultCourt.sol";
import {MarketRecords, Vote} from "../src/MarketRecords.sol";
import {StakeVault} from "../src/StakeVault.sol";
import {Ledgers} from "./Ledgers.sol";
import {DeafCourt, ForgetfulVault} from "./Mutants.sol";

/// @title Two defects found in another compute market's contracts, which ours must not have.
/// @dev Each is a property that ours has and a contract with the defect has not.
contract RegressionsTest is Ledgers {
    uint256 private constant SECRET_LOW = 0x71;
    uint256 private constant SECRET_HIGH = 0x72;
    uint128 private constant STAKE = 1_000_000;

    function setUp() public {
        deployAll(0);
        token.mint(ALICE, 2 * STAKE);
    }

    function testASlashPastAMaturedUnbondStrandsNothing() public {
        openJob(1);
        eq(_comesBackAfterASlash(vault, COURT), STAKE - 100_000, "all but the slash comes back");
        eq(token.balanceOf(address(vault)), 30_000, "what stays is the challenger's part");
    }

    /// As found in `StakeManager.slash`: of 900,000 owed, 400,000 could be withdrawn.
    function testAVaultThatForgetsTheUnbondStrandsMoney() public {
        StakeVault forgetful = StakeVault(address(new ForgetfulVault(token, UNBONDING)));
        eq(_comesBackAfterASlash(forgetful, COURT), 400_000, "the unbond is lost");
        eq(token.balanceOf(address(forgetful)), 500_000, "and lies there for ever");
    }

    function testAQuorumIsHeard() public {
        address[] memory verifiers = new address[](2);
        (verifiers[0], verifiers[1]) = (vm.addr(SECRET_LOW), vm.addr(SECRET_HIGH));
        deployPair(vm.computeCreateAddress(address(this), vm.getNonce(address(this)) + 2), 0, 0);
        FaultCourt court =
            new FaultCourt(vault, escrow, FaultCourt.Terms(100_000, 0, UNBONDING, 2, verifiers));
        vm.prank(sponsor);
        token.approve(address(escrow), 1);
        bytes32 jobId = openJob(1);
        _stake(vault);
        for (uint256 i = 0; i < 3; ++i) {
            this.resolveNewCase(court, jobId, bytes32(i));
        }
        (uint128 active,,) = vault.stakeOf(ALICE);
        eq(active, STAKE - 300_000, "three cases, three penalties");
    }

    /// As found in `ValidatorQuorum.newCall`: index out of bounds, always.
    function testACourtWhoseListNeverGrowsHearsNobody() public {
        FaultCourt deaf = FaultCourt(address(new DeafCourt()));
        vm.expectRevert(abi.encodeWithSignature("Panic(uint256)", 0x32));
        this.resolveNewCase(deaf, "job", "evidence");
    }

    /// External, so that a panic in it can be expected.
    function resolveNewCase(FaultCourt court, bytes32 jobId, bytes32 evidence) external {
        vm.prank(BOB);
        bytes32 caseId = court.challenge(jobId, ALICE, evidence);
        bytes32 vote = keccak256(abi.encode(MarketRecords.VOTE_TYPE, Vote(caseId, evidence, true)));
        bytes32 digest = keccak256(abi.encodePacked("\x19\x01", court.domainSeparator(), vote));
        (uint256 first, uint256 second) = (SECRET_LOW, SECRET_HIGH);
        if (vm.addr(first) > vm.addr(second)) (first, second) = (second, first);
        bytes[] memory votes = new bytes[](2);
        (votes[0], votes[1]) = (_signed(first, digest), _signed(second, digest));
        court.resolve(caseId, true, votes);
    }

    /// Half is unbonded and matured, not withdrawn, when the slash comes; then everything is taken out.
    function _comesBackAfterASlash(StakeVault held, address court) private returns (uint256) {
        _stake(held);
        uint256 before = token.balanceOf(ALICE);
        vm.prank(ALICE);
        held.requestUnbond(STAKE / 2);
        vm.warp(block.timestamp + UNBONDING + 1);
        vm.prank(court);
        held.slash(ALICE, 100_000, "case", keccak256(abi.encode(sponsor, DIGEST)), BOB);
        (uint128 active,,) = held.stakeOf(ALICE);
        vm.prank(ALICE);
        held.requestUnbond(active);
        vm.warp(block.timestamp + UNBONDING + 1);
        vm.prank(ALICE);
        held.withdraw();
        return token.balanceOf(ALICE) - before;
    }

    function _stake(StakeVault held) private {
        vm.prank(ALICE);
        token.approve(address(held), STAKE);
        vm.prank(ALICE);
        held.stake(STAKE);
    }

    function _signed(uint256 secret, bytes32 digest) private pure returns (bytes memory) {
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(secret, digest);
        return abi.encodePacked(r, s, v);
    }
}
