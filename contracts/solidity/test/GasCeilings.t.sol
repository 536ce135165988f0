// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ModelShares} from "../src/ModelShares.sol";
import {Ledgers} from "./Ledgers.sol";

/// @title What each transaction may cost, its base fee and its data included.
/// @notice `snapshots/gas.json` is the table of what they do cost.
/// @dev Run as transactions of their own, so every slot is cold at first as it is on a chain.
/// forge-config: default.isolate = true
contract GasCeilingsTest is Ledgers {
    uint256 private constant DEPTH = 10;
    uint256 private constant TASKS = 5000;
    uint256 private constant PROVIDERS = 50;

    ModelShares private shares;
    bytes32 private jobId;

    function setUp() public {
        deployAll(0);
        shares = new ModelShares(token, escrow);
        jobId = openJob(1e9);
        // Everybody has had the token before, and the escrow and the log other jobs.
        address[4] memory known = [COORDINATOR, ALICE, BOB, address(shares)];
        for (uint256 i = 0; i < known.length; ++i) {
            token.mint(known[i], 1e6);
        }
        vm.prank(sponsor);
        token.approve(address(shares), type(uint256).max);
    }

    function testOpen() public {
        vm.prank(sponsor);
        escrow.open("another", COORDINATOR, 1e6, uint64(block.timestamp) + 1 days);
        _atMost("open", 130_000);
    }

    function testPost() public {
        post(jobId, 1, keccak256("first"), 1);
        _atMost("post first", 160_000);
        post(jobId, 2, keccak256("second"), 2);
        post(jobId, 3, keccak256("third"), 3);
        _atMost("post next", 70_000);
    }

    function testAnchor() public {
        log.anchor(jobId, keccak256("first"), 4);
        _atMost("anchor first", 75_000);
        log.anchor(jobId, keccak256("second"), 4);
        _atMost("anchor next", 35_000);
    }

    function testClaim() public {
        _pay(1, 100);
        _atMost("claim first", 90_000);
        _pay(2, 200);
        _atMost("claim next", 75_000);
    }

    function testShares() public {
        uint256 id = uint256(jobId);
        bytes32[] memory proof = _proof();
        bytes32 root = _rootOf(shares.leafOf(id, ALICE, 40), proof);
        vm.prank(COORDINATOR);
        shares.release(jobId, ModelShares.Release(root, 100, false, address(0), 0));
        vm.prank(sponsor);
        shares.depositRevenue(id, 1000);
        shares.mintByProof(id, ALICE, 40, proof);
        _atMost("mint shares", 115_000);
        shares.claimRevenue(id, ALICE);
        vm.prank(sponsor);
        shares.depositRevenue(id, 1000);
        _atMost("deposit revenue next", 60_000);
        shares.claimRevenue(id, ALICE);
        _atMost("claim revenue next", 60_000);
    }

    /// The second epoch of a job: one root for all its tasks, and each provider claims for itself.
    function testGasPerPaidTask() public {
        uint256 total;
        for (uint32 epochNumber = 1; epochNumber <= 2; ++epochNumber) {
            total = 0;
            bytes32[] memory level = new bytes32[](PROVIDERS);
            for (uint256 i = 0; i < PROVIDERS; ++i) {
                level[i] = leaf(jobId, _provider(i), 100 * epochNumber);
            }
            bytes32[][] memory proofs = _proofsOf(level);
            post(jobId, epochNumber, _foldAll(level), uint128(100 * PROVIDERS * epochNumber));
            total += vm.lastCallGas().gasTotalUsed;
            for (uint256 i = 0; i < PROVIDERS; ++i) {
                escrow.claim(jobId, _provider(i), 100 * epochNumber, proofs[i]);
                total += vm.lastCallGas().gasTotalUsed;
            }
        }
        vm.snapshotValue("gas", "per paid task", total / TASKS);
        require(total <= 1000 * TASKS, "more than 1,000 gas for a paid task");
    }

    function _pay(uint32 number, uint128 cumulative) private {
        bytes32[] memory proof = _proof();
        post(jobId, number, _rootOf(leaf(jobId, ALICE, cumulative), proof), cumulative);
        escrow.claim(jobId, ALICE, cumulative, proof);
    }

    function _atMost(string memory name, uint256 ceiling) private {
        uint256 used = vm.snapshotGasLastCall("gas", name);
        require(used <= ceiling, string.concat(name, " costs more than its ceiling"));
    }

    function _provider(uint256 i) private pure returns (address) {
        return address(uint160(uint256(keccak256(abi.encode("provider", i)))));
    }

    /// Ten siblings, as under a root of a thousand payees.
    function _proof() private pure returns (bytes32[] memory proof) {
        proof = new bytes32[](DEPTH);
        for (uint256 i = 0; i < DEPTH; ++i) {
            proof[i] = keccak256(abi.encode("sibling", i));
        }
    }

    function _rootOf(bytes32 node, bytes32[] memory proof) private pure returns (bytes32) {
        for (uint256 i = 0; i < proof.length; ++i) {
            node = pair(node, proof[i]);
        }
        return node;
    }

    function _foldAll(bytes32[] memory level) private pure returns (bytes32) {
        while (level.length > 1) {
            level = _above(level);
        }
        return level[0];
    }

    function _above(bytes32[] memory level) private pure returns (bytes32[] memory above) {
        above = new bytes32[]((level.length + 1) / 2);
        for (uint256 i = 0; i < above.length; ++i) {
            above[i] = 2 * i + 1 < level.length ? pair(level[2 * i], level[2 * i + 1]) : level[2 * i];
        }
    }

    function _proofsOf(bytes32[] memory leaves) private pure returns (bytes32[][] memory proofs) {
        proofs = new bytes32[][](leaves.length);
        for (uint256 i = 0; i < leaves.length; ++i) {
            bytes32[] memory path_ = new bytes32[](DEPTH);
            (uint256 depth, uint256 place) = (0, i);
            for (bytes32[] memory level = leaves; level.length > 1; level = _above(level)) {
                if (place ^ 1 < level.length) path_[depth++] = level[place ^ 1];
                place /= 2;
            }
            assembly ("memory-safe") {
                mstore(path_, depth)
            }
            proofs[i] = path_;
        }
    }
}
