// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {FaultCourt} from "../src/FaultCourt.sol";
import {JobEscrow} from "../src/JobEscrow.sol";
import {BookSeal, ClearingCertificate, MarketRecords, Receipt, Vote} from "../src/MarketRecords.sol";
import {ModelShares} from "../src/ModelShares.sol";
import {Ledgers} from "./Ledgers.sol";

/// @title Random but sensible use of the contracts by everyone at once, lies and faults included.
/// @dev What is seen to break is noted in flags: a revert in here would only undo the call.
contract Handler is Ledgers {
    uint256 private constant COORDINATOR_SECRET = 0xC1C1;
    uint256 private constant WORKER_SECRET = 0xA1A1;
    uint128 public constant CHALLENGE_BOND = 1e6;
    /// Few, so that one history does much to each, and checking all of them is cheap.
    uint256 private constant MAX_JOBS = 5;
    uint256 private constant MAX_CASES = 10;

    FaultCourt public court;
    ModelShares public shares;
    address[4] public parties;
    bytes32[] public jobs;
    bytes32[] public cases;
    uint256[3] private _verifierSecrets = [uint256(0x71), 0x72, 0x73];
    address private _worker;
    address private _coordinator;

    mapping(bytes32 jobId => mapping(bytes32 root => uint128[2])) private _owed;
    mapping(bytes32 jobId => uint128[2]) private _latest;
    mapping(bytes32 caseId => bytes32) public recorded;
    mapping(bytes32 caseId => FaultCourt.Status) public decided;
    bool private _begun;

    bool public committedFell;
    bool public slashedTooMuch;
    bool public decidedTwice;

    constructor(uint64 window) {
        deployAll(window);
        _coordinator = vm.addr(COORDINATOR_SECRET);
        _worker = vm.addr(WORKER_SECRET);
        parties = [sponsor, _coordinator, _worker, BOB];
        address courtAt = vm.computeCreateAddress(address(this), vm.getNonce(address(this)) + 2);
        deployPair(courtAt, window, 0);
        address[] memory verifiers = new address[](3);
        for (uint256 i = 0; i < 3; ++i) {
            verifiers[i] = vm.addr(_verifierSecrets[i]);
        }
        court = new FaultCourt(vault, escrow, FaultCourt.Terms(5e8, CHALLENGE_BOND, 5 hours, 2, verifiers));
        shares = new ModelShares(token, escrow);
        address[4] memory spenders = [address(escrow), address(vault), address(court), address(shares)];
        for (uint256 i = 0; i < parties.length; ++i) {
            token.mint(parties[i], PURSE);
            for (uint256 j = 0; j < spenders.length; ++j) {
                vm.prank(parties[i]);
                token.approve(spenders[j], type(uint256).max);
            }
        }
    }

    /// @dev Ends a job for good, so it happens to one in eight.
    modifier seldom(uint256 which) {
        if (which % 8 == 0) _;
    }

    function passTime(uint256 seconds_) external {
        vm.warp(block.timestamp + bound(seconds_, 1, 6 hours));
    }

    /// Jobs with money and parties with stake, so that what follows has something to work on.
    function begin() external {
        if (_begun) return;
        _begun = true;
        for (uint256 i = 0; i < 3; ++i) {
            open(uint128(1e9 * (i + 1)), uint64(5 days));
        }
        for (uint256 who = 0; who < parties.length; ++who) {
            stake(who, 2e9);
        }
    }

    function open(uint128 amount, uint64 life) public {
        if (jobs.length == MAX_JOBS) return;
        bytes32 digest = keccak256(abi.encode(jobs.length));
        uint64 deadline = uint64(block.timestamp + bound(life, 1, 10 days));
        vm.prank(sponsor);
        jobs.push(escrow.open(digest, _coordinator, uint128(bound(amount, 1, PURSE / 100)), deadline));
    }

    function topUp(uint256 which, uint128 amount) external {
        vm.prank(BOB);
        escrow.topUp(_job(which), uint128(bound(amount, 1, PURSE / 100)));
    }

    function putUpBond(uint256 which, uint128 amount) external {
        vm.prank(_coordinator);
        escrow.putUpBond(_job(which), uint128(bound(amount, 1, PURSE / 100)));
    }

    /// Half of the roots promise more than their total.
    function postEpoch(uint256 which, uint128 a, uint128 b, uint128 understated) external {
        bytes32 jobId = _job(which);
        JobEscrow.Job memory job = escrow.jobOf(jobId);
        uint128[2] memory next = _latest[jobId];
        next[0] += uint128(bound(a, 0, job.funded / 3));
        next[1] += uint128(bound(b, 0, job.funded / 3));
        uint128 total = next[0] + next[1];
        if (understated % 2 == 0) total -= uint128(bound(understated, 0, total));
        bytes32 root = pair(leaf(jobId, _worker, next[0]), leaf(jobId, BOB, next[1]));
        vm.prank(_coordinator);
        escrow.post(jobId, epoch(job.epoch + 1, root, total));
        _latest[jobId] = next;
        _owed[jobId][root] = next;
        if (total < job.committed) committedFell = true;
    }

    function claim(uint256 which, bool worker) external {
        bytes32 jobId = _job(which);
        (bytes32 root,) = escrow.claimable(jobId);
        uint128[2] memory own = _owed[jobId][root];
        bytes32 a = leaf(jobId, _worker, own[0]);
        bytes32 b = leaf(jobId, BOB, own[1]);
        if (worker) escrow.claim(jobId, _worker, own[0], path(b));
        else escrow.claim(jobId, BOB, own[1], path(a));
    }

    function close(uint256 which) external seldom(which) {
        vm.prank(_coordinator);
        escrow.close(_job(which / 8));
    }

    function refund(uint256 which) external {
        escrow.refund(_job(which));
    }

    function returnBond(uint256 which) external {
        escrow.returnBond(_job(which));
    }

    function stake(uint256 who, uint128 amount) public {
        vm.prank(_party(who));
        vault.stake(uint128(bound(amount, 1, PURSE / 50)));
    }

    function unbond(uint256 who, uint128 amount) external {
        (uint128 active,,) = vault.stakeOf(_party(who));
        vm.prank(_party(who));
        vault.requestUnbond(uint128(bound(amount, 1, active)));
    }

    function withdraw(uint256 who) external {
        vm.prank(_party(who));
        vault.withdraw();
    }

    /// The worker signs two results for one lease.
    function equivocate(uint256 which, uint256 lease) external {
        if (cases.length >= 2 * MAX_CASES) return;
        Receipt memory first = Receipt(_text(lease % 64), 1, _job(which), "one", _worker, "node");
        Receipt memory second = Receipt(_text(lease % 64), 1, _job(which), "two", _worker, "node");
        bytes memory signature = _signed(WORKER_SECRET, _hash(first));
        uint128 before = _stakeOf(_worker);
        bytes memory other = _signed(WORKER_SECRET, _hash(second));
        vm.prank(BOB);
        bytes32 caseId = court.equivocation(first, signature, second, other);
        if (_stakeOf(_worker) > before || before - _stakeOf(_worker) > 5e8) slashedTooMuch = true;
        _note(caseId);
    }

    /// The coordinator seals one book and clears another.
    function clearAnotherBook(uint256 which, uint32 marketEpoch) external seldom(which) {
        bytes32 jobId = _job(which / 8);
        ClearingCertificate memory certificate;
        (certificate.jobId, certificate.epoch, certificate.commitRoot) = (jobId, marketEpoch, "cleared");
        BookSeal memory seal = BookSeal(marketEpoch, "sealed", 0, 0);
        bytes memory signature =
            _signed(COORDINATOR_SECRET, keccak256(abi.encode(MarketRecords.CERTIFICATE_TYPE, certificate)));
        bytes memory other = _signed(COORDINATOR_SECRET, keccak256(abi.encode(MarketRecords.BOOK_SEAL_TYPE, seal)));
        vm.prank(BOB);
        _note(court.twoBooks(certificate, signature, seal, other));
    }

    function challenge(uint256 which, uint256 accused, bytes32 evidence) external {
        if (cases.length >= MAX_CASES) return;
        vm.prank(BOB);
        bytes32 caseId = court.challenge(_job(which), parties[accused % 3], evidence);
        cases.push(caseId);
        recorded[caseId] = recordOf(caseId);
    }

    /// Two verifiers say the same, of a case that may be decided already.
    function resolve(uint256 which, bool guilty) external {
        bytes32 caseId = cases[which % cases.length];
        (,,,,,, bytes32 evidence) = court.caseOf(caseId);
        bytes32 vote = keccak256(abi.encode(MarketRecords.VOTE_TYPE, Vote(caseId, evidence, guilty)));
        (uint256 low, uint256 high) = (_verifierSecrets[0], _verifierSecrets[1]);
        if (vm.addr(low) > vm.addr(high)) (low, high) = (high, low);
        bytes[] memory votes = new bytes[](2);
        (votes[0], votes[1]) = (_signed(low, vote), _signed(high, vote));
        court.resolve(caseId, guilty, votes);
        _noteDecision(caseId);
    }

    function lapse(uint256 which) external {
        bytes32 caseId = cases[which % cases.length];
        court.lapse(caseId);
        _noteDecision(caseId);
    }

    /// Half of the releases promise more points than their total.
    function release(uint256 which, uint96 understated) external {
        bytes32 jobId = _job(which);
        uint256 id = uint256(jobId);
        bytes32 root = pair(shares.leafOf(id, _worker, 70), shares.leafOf(id, BOB, 30));
        uint96 total = understated % 2 == 0 ? 100 : uint96(bound(understated, 1, 100));
        vm.prank(_coordinator);
        shares.release(jobId, ModelShares.Release(root, total, true, address(0), 0));
    }

    function mint(uint256 which, bool worker) external {
        uint256 id = uint256(_job(which));
        bytes32 a = shares.leafOf(id, _worker, 70);
        bytes32 b = shares.leafOf(id, BOB, 30);
        if (worker) shares.mintByProof(id, _worker, 70, path(b));
        else shares.mintByProof(id, BOB, 30, path(a));
    }

    function depositRevenue(uint256 which, uint128 amount) external {
        vm.prank(sponsor);
        shares.depositRevenue(uint256(_job(which)), uint128(bound(amount, 1, PURSE / 100)));
    }

    function claimRevenue(uint256 which, uint256 who) external {
        shares.claimRevenue(uint256(_job(which)), _party(who));
    }

    function moveShares(uint256 which, uint256 from, uint256 to, uint256 amount) external {
        uint256 id = uint256(_job(which));
        uint256 held = shares.balanceOf(_party(from), id);
        vm.prank(_party(from));
        shares.safeTransferFrom(_party(from), _party(to), id, bound(amount, 0, held), "");
    }

    // ---- what the invariants look at

    function contracts() external view returns (JobEscrow, address vault_, address token_) {
        return (escrow, address(vault), address(token));
    }

    function numJobs() external view returns (uint256) {
        return jobs.length;
    }

    function numCases() external view returns (uint256) {
        return cases.length;
    }

    /// Everything of a case that must never change.
    function recordOf(bytes32 caseId) public view returns (bytes32) {
        (address accused, FaultCourt.Fault fault,, uint64 voteBy, address challenger, bytes32 jobId, bytes32 evidence) =
            court.caseOf(caseId);
        return keccak256(abi.encode(accused, fault, voteBy, challenger, jobId, evidence));
    }

    function stakes() external view returns (uint256 sum) {
        for (uint256 i = 0; i < parties.length; ++i) {
            sum += _stakeOf(parties[i]);
        }
    }

    function _note(bytes32 caseId) private {
        cases.push(caseId);
        recorded[caseId] = recordOf(caseId);
        _noteDecision(caseId);
    }

    function _noteDecision(bytes32 caseId) private {
        if (decided[caseId] != FaultCourt.Status.None) decidedTwice = true;
        (,, FaultCourt.Status status,,,,) = court.caseOf(caseId);
        decided[caseId] = status;
    }

    function _stakeOf(address who) private view returns (uint128) {
        (uint128 active, uint128 unbonding,) = vault.stakeOf(who);
        return active + unbonding;
    }

    function _job(uint256 which) private view returns (bytes32) {
        return jobs[which % jobs.length];
    }

    function _party(uint256 which) private view returns (address) {
        return parties[which % parties.length];
    }

    function _text(uint256 number) private pure returns (string memory) {
        return string(abi.encodePacked("lease-", number));
    }

    function _hash(Receipt memory record) private pure returns (bytes32) {
        return keccak256(
            abi.encode(
                MarketRecords.RECEIPT_TYPE,
                keccak256(bytes(record.leaseId)),
                record.leaseEpoch,
                record.jobId,
                record.resultDigest,
                record.account,
                keccak256(bytes(record.node))
            )
        );
    }

    function _signed(uint256 secret, bytes32 structHash) private view returns (bytes memory) {
        (uint8 v, bytes32 r, bytes32 s) =
            vm.sign(secret, keccak256(abi.encodePacked("\x19\x01", court.domainSeparator(), structHash)));
        return abi.encodePacked(r, s, v);
    }
}
