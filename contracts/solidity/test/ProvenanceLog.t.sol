// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Ledgers} from "./Ledgers.sol";

contract ProvenanceLogTest is Ledgers {
    function setUp() public {
        deployAll(0);
    }

    function testFuzzHeadsChainAndSubjectsAreTheCallersOwn(bytes32 subject, bytes32 root, uint64 leaves) public {
        vm.prank(ALICE);
        log.anchor(subject, root, leaves);
        bytes32 first = log.head(ALICE, subject);
        eq(first, keccak256(abi.encode(bytes32(0), root, leaves)), "first");
        vm.prank(BOB);
        log.anchor(subject, bytes32("noise"), 9);
        vm.prank(ALICE);
        log.anchor(subject, root, leaves);
        eq(log.head(ALICE, subject), keccak256(abi.encode(first, root, leaves)), "second");
        eq(log.seq(ALICE, subject), 2, "seq");
        eq(log.seq(BOB, subject), 1, "bob");
    }
}
