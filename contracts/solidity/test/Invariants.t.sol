// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {FaultCourt} from "../src/FaultCourt.sol";
import {JobEscrow} from "../src/JobEscrow.sol";
import {ModelShares} from "../src/ModelShares.sol";
import {Handler} from "./Handler.sol";
import {Base} from "./Vm.sol";

abstract contract InvariantChecks is Base {
    Handler internal handler;

    function everythingHolds() internal view {
        checkEveryJobIsSolventAndTheBalanceIsTheirSum();
        checkTheVaultHoldsExactlyTheStakes();
        checkCasesAreDecidedOnceOnFixedEvidence();
        checkSharesSumToTheirSupplyAndRevenueIsThere();
    }

    function checkEveryJobIsSolventAndTheBalanceIsTheirSum() public view {
        require(!handler.committedFell(), "committed fell");
        (JobEscrow escrow,, address token) = handler.contracts();
        uint256 held;
        for (uint256 i = 0; i < handler.numJobs(); ++i) {
            JobEscrow.Job memory job = escrow.jobOf(handler.jobs(i));
            require(job.claimed <= job.committed, "claimed above committed");
            require(uint256(job.committed) + job.refunded <= job.funded, "committed above funded");
            require(!job.frozen || job.bond == 0, "a frozen job has its bond");
            held += uint256(job.funded) + job.bond - job.claimed - job.refunded;
        }
        require(IERC20(token).balanceOf(address(escrow)) == held, "balance is not the sum of the jobs");
    }

    function checkTheVaultHoldsExactlyTheStakes() public view {
        require(!handler.slashedTooMuch(), "slashed above the penalty or the stake");
        (, address vault, address token) = handler.contracts();
        require(IERC20(token).balanceOf(vault) == handler.stakes(), "balance is not the sum of the stakes");
    }

    function checkCasesAreDecidedOnceOnFixedEvidence() public view {
        require(!handler.decidedTwice(), "decided twice");
        FaultCourt court = handler.court();
        uint256 numOpen;
        for (uint256 i = 0; i < handler.numCases(); ++i) {
            bytes32 caseId = handler.cases(i);
            require(handler.recordOf(caseId) == handler.recorded(caseId), "a case changed");
            (,, FaultCourt.Status status,,,,) = court.caseOf(caseId);
            FaultCourt.Status decision = handler.decided(caseId);
            if (status == FaultCourt.Status.Open) ++numOpen;
            else require(status == decision, "a decision changed");
        }
        (,, address token) = handler.contracts();
        uint256 bonds = numOpen * handler.CHALLENGE_BOND();
        require(IERC20(token).balanceOf(address(court)) == bonds, "balance is not the open bonds");
    }

    function checkSharesSumToTheirSupplyAndRevenueIsThere() public view {
        ModelShares shares = handler.shares();
        uint256 owed;
        for (uint256 i = 0; i < handler.numJobs(); ++i) {
            uint256 id = uint256(handler.jobs(i));
            uint256 sum;
            for (uint256 j = 0; j < 4; ++j) {
                sum += shares.balanceOf(handler.parties(j), id);
                owed += shares.revenueOwedDown(id, handler.parties(j));
            }
            require(sum == shares.totalSupply(id), "balances are not the supply");
            require(sum <= shares.modelOf(id).totalPoints, "supply above the release");
        }
        (,, address token) = handler.contracts();
        require(owed <= IERC20(token).balanceOf(address(shares)), "more revenue owed than held");
    }
}

/// @title The checks after every step of random histories.
abstract contract RandomHistories is InvariantChecks {
    function targetContracts() public view returns (address[] memory targets) {
        targets = new address[](1);
        targets[0] = address(handler);
    }

    /// @dev One invariant, so that each history is checked for all of them.
    function invariant_everythingHolds() public view {
        everythingHolds();
    }
}

contract InvariantsWithoutWindowTest is RandomHistories {
    function setUp() public {
        handler = new Handler(0);
        handler.begin();
    }
}

contract InvariantsWithWindowTest is RandomHistories {
    function setUp() public {
        handler = new Handler(2 hours);
        handler.begin();
    }
}

/// @title The negative control: the actions do go through, and one missing unit is noticed.
contract InvariantsControlTest is InvariantChecks {
    address private constant THIEF = address(0xBAD);

    function setUp() public {
        handler = new Handler(0);
        handler.begin();
        handler.topUp(0, 1e6);
        handler.putUpBond(0, 1e6);
        handler.putUpBond(1, 1e6);
        handler.postEpoch(0, 3e8, 2e8, 1);
        handler.claim(0, true);
        handler.unbond(2, 1e8);
        handler.equivocate(0, 7);
        handler.unbond(2, 1e8);
        handler.challenge(0, 0, "first");
        handler.challenge(0, 1, "second");
        handler.resolve(1, true);
        handler.resolve(2, false);
        handler.challenge(0, 2, "third");
        handler.release(0, 0);
        handler.depositRevenue(0, 1e6);
        handler.mint(0, true);
        handler.mint(0, false);
        handler.claimRevenue(0, 2);
        handler.moveShares(0, 2, 0, 5);
        handler.clearAnotherBook(0, 3);
        handler.close(8);
        handler.passTime(6 hours - 1);
        handler.lapse(3);
        handler.withdraw(2);
        handler.refund(1);
        handler.returnBond(1);
        handler.challenge(0, 0, "fourth");
    }

    /// Had an action been refused, so would the set-up have been.
    function testEverythingHoldsAfterOneOfEach() public view {
        everythingHolds();
    }

    function testAMissingUnitIsNoticedWhereverItIsMissing() public {
        (JobEscrow escrow, address vault, address token) = handler.contracts();
        address[3] memory holders = [address(escrow), vault, address(handler.court())];
        for (uint256 i = 0; i < holders.length; ++i) {
            vm.prank(holders[i]);
            IERC20(token).transfer(THIEF, 1);
        }
        vm.expectRevert("balance is not the sum of the jobs");
        this.checkEveryJobIsSolventAndTheBalanceIsTheirSum();
        vm.expectRevert("balance is not the sum of the stakes");
        this.checkTheVaultHoldsExactlyTheStakes();
        vm.expectRevert("balance is not the open bonds");
        this.checkCasesAreDecidedOnceOnFixedEvidence();
    }

    /// The rounding of one deposit may be missing before anybody misses it: less than a unit.
    function testMissingRevenueIsNoticed() public {
        (,, address token) = handler.contracts();
        vm.prank(address(handler.shares()));
        IERC20(token).transfer(THIEF, 2);
        vm.expectRevert("more revenue owed than held");
        this.checkSharesSumToTheirSupplyAndRevenueIsThere();
    }
}
