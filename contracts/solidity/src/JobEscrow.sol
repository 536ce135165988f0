// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {MerkleProof} from "@openzeppelin/contracts/utils/cryptography/MerkleProof.sol";
import {IProvenanceLog} from "./interfaces/IProvenanceLog.sol";
import {Permit, TokenPull} from "./TokenPull.sol";

/// @title Requesters' budgets, paid out by one cumulative Merkle root per job and epoch.
/// @notice Per job: claimed <= committed <= funded. A root can spend its own job's money only, and
/// no more than the total posted with it. Whatever an accepted root owes can be claimed for ever.
/// @dev The token must neither take a fee on transfer nor rebase. Nobody owns the contract.
contract JobEscrow {
    using SafeERC20 for IERC20;
    using TokenPull for IERC20;

    /// @dev One storage slot per pair of lines. `acceptedRoot` and `acceptedTotal` are those before
    /// the latest post; they are what claims use while the latest is inside its challenge window.
    struct Job {
        address sponsor;
        uint64 deadline;
        bool closed;
        bool refundTaken;
        address coordinator;
        uint64 epoch;
        uint128 funded;
        uint128 committed;
        uint128 claimed;
        uint128 refunded;
        uint128 acceptedTotal;
        uint64 readyAt;
        bytes32 acceptedRoot;
        bytes32 root;
    }

    /// @notice What a coordinator states about one epoch. `cumulativeTotal` is the sum of all leaves
    /// under `payRoot`: everything the job owes since it began, not since the last epoch.
    struct Epoch {
        uint64 number;
        bytes32 payRoot;
        bytes32 provRoot;
        uint128 cumulativeTotal;
        uint64 numTasks;
        uint64 numStatements;
    }

    /// @notice The settlement token.
    IERC20 public immutable TOKEN;
    /// @notice Where each epoch's provenance root goes, in the transaction that posts its payouts.
    IProvenanceLog public immutable PROVENANCE_LOG;
    /// @notice Seconds a root waits before anything can be claimed under it.
    uint64 public immutable CHALLENGE_WINDOW;

    mapping(bytes32 jobId => Job) private _jobs;
    /// @notice What an account has been paid by a job so far.
    mapping(bytes32 jobId => mapping(address who => uint128)) public claimed;

    event Opened(
        bytes32 indexed jobId, address indexed sponsor, address indexed coordinator, uint128 amount, uint64 deadline
    );
    event ToppedUp(bytes32 indexed jobId, address indexed from, uint128 amount, uint128 funded);
    event EpochPosted(
        bytes32 indexed jobId,
        uint64 indexed epoch,
        bytes32 payRoot,
        bytes32 provRoot,
        uint128 cumulativeTotal,
        uint64 numTasks,
        uint64 numStatements
    );
    event Claimed(bytes32 indexed jobId, address indexed who, uint128 amount, uint128 cumulative);
    event ClaimSkipped(bytes32 indexed jobId, address indexed who, bytes reason);
    event Closed(bytes32 indexed jobId, uint128 committed);
    event Refunded(bytes32 indexed jobId, address indexed sponsor, uint128 amount);

    error ZeroAmount();
    error ZeroCoordinator();
    error DeadlinePassed(uint64 deadline, uint64 nowAt);
    error JobExists(bytes32 jobId);
    error NoSuchJob(bytes32 jobId);
    error JobClosed(bytes32 jobId);
    error NotCoordinator(address caller, address coordinator);
    error WrongEpoch(uint64 posted, uint64 expected);
    error InsideChallengeWindow(uint64 readyAt, uint64 nowAt);
    error TotalDecreased(uint128 posted, uint128 committed);
    error TotalAboveFunds(uint128 posted, uint128 funded);
    error BadProof(bytes32 jobId, address who, uint128 cumulative);
    error ClaimAboveTotal(uint128 claimedNext, uint128 total);
    error LengthMismatch(uint256 payees, uint256 amounts, uint256 proofs);
    error RefundTooEarly(uint64 deadline, uint64 nowAt);
    error AlreadyRefunded(bytes32 jobId);

    constructor(IERC20 token, IProvenanceLog provenanceLog, uint64 challengeWindow) {
        TOKEN = token;
        PROVENANCE_LOG = provenanceLog;
        CHALLENGE_WINDOW = challengeWindow;
    }

    /// @notice The id of `sponsor`'s job with `jobDigest`.
    /// @dev The sponsor is part of the id, so nobody can open, or squat, another's job.
    function jobIdOf(address sponsor, bytes32 jobDigest) public pure returns (bytes32) {
        return keccak256(abi.encode(sponsor, jobDigest));
    }

    /// @notice Everything the contract holds about a job; all zero for an unknown one.
    function jobOf(bytes32 jobId) external view returns (Job memory) {
        return _jobs[jobId];
    }

    /// @notice The root claims are checked against now, and the most it may ever have paid.
    function claimable(bytes32 jobId) public view returns (bytes32 root, uint128 total) {
        Job storage job = _jobs[jobId];
        return block.timestamp < job.readyAt ? (job.acceptedRoot, job.acceptedTotal) : (job.root, job.committed);
    }

    /// @notice Opens the caller's job with `amount` of its tokens, from its allowance.
    /// @param coordinator The only account that may post epochs and close the job.
    /// @param deadline When the sponsor may take back what no epoch has committed.
    function open(bytes32 jobDigest, address coordinator, uint128 amount, uint64 deadline)
        external
        returns (bytes32 jobId)
    {
        jobId = _open(jobDigest, coordinator, amount, deadline);
        TOKEN.safeTransferFrom(msg.sender, address(this), amount);
    }

    /// @notice Opens the caller's job with `amount` of its tokens, by its permit.
    function openWithPermit(
        bytes32 jobDigest,
        address coordinator,
        uint128 amount,
        uint64 deadline,
        Permit calldata permit
    ) external returns (bytes32 jobId) {
        jobId = _open(jobDigest, coordinator, amount, deadline);
        TOKEN.pullWithPermit(msg.sender, amount, permit);
    }

    /// @notice Adds `amount` of the caller's tokens to an open job; a refund still goes to its sponsor.
    function topUp(bytes32 jobId, uint128 amount) external {
        Job storage job = _existing(jobId);
        if (job.closed) revert JobClosed(jobId);
        if (amount == 0) revert ZeroAmount();
        uint128 funded = job.funded + amount;
        job.funded = funded;
        emit ToppedUp(jobId, msg.sender, amount, funded);
        TOKEN.safeTransferFrom(msg.sender, address(this), amount);
    }

    /// @notice Commits the job to the payouts of `post_` and anchors its provenance; the coordinator only.
    /// @dev Refused while the previous root is inside its window: else a coordinator could let a bad
    /// root mature by posting over it. Allowed after the deadline until the refund is taken, so that
    /// finished work can still be paid.
    function post(bytes32 jobId, Epoch calldata post_) external {
        Job storage job = _existing(jobId);
        if (msg.sender != job.coordinator) revert NotCoordinator(msg.sender, job.coordinator);
        if (job.closed) revert JobClosed(jobId);
        if (post_.number != job.epoch + 1) revert WrongEpoch(post_.number, job.epoch + 1);
        if (block.timestamp < job.readyAt) revert InsideChallengeWindow(job.readyAt, uint64(block.timestamp));
        if (post_.cumulativeTotal < job.committed) revert TotalDecreased(post_.cumulativeTotal, job.committed);
        if (post_.cumulativeTotal > job.funded) revert TotalAboveFunds(post_.cumulativeTotal, job.funded);
        if (CHALLENGE_WINDOW != 0) {
            job.acceptedRoot = job.root;
            job.acceptedTotal = job.committed;
            job.readyAt = uint64(block.timestamp) + CHALLENGE_WINDOW;
        }
        job.epoch = post_.number;
        job.root = post_.payRoot;
        job.committed = post_.cumulativeTotal;
        emit EpochPosted(
            jobId,
            post_.number,
            post_.payRoot,
            post_.provRoot,
            post_.cumulativeTotal,
            post_.numTasks,
            post_.numStatements
        );
        PROVENANCE_LOG.anchor(jobId, post_.provRoot, post_.numStatements);
    }

    /// @notice Pays `who` what the claimable root owes it beyond what it has had; anyone may call.
    /// @return amount What was paid: zero for a claim made before, so that a retry is harmless.
    function claim(bytes32 jobId, address who, uint128 cumulative, bytes32[] calldata proof)
        external
        returns (uint128 amount)
    {
        (bytes32 root, uint128 total) = claimable(jobId);
        bytes32 leaf =
            keccak256(bytes.concat(keccak256(abi.encode(block.chainid, address(this), jobId, who, cumulative))));
        if (!MerkleProof.verifyCalldata(proof, root, leaf)) revert BadProof(jobId, who, cumulative);
        uint128 before = claimed[jobId][who];
        if (cumulative <= before) return 0;
        amount = cumulative - before;
        uint128 claimedNext = _jobs[jobId].claimed + amount;
        if (claimedNext > total) revert ClaimAboveTotal(claimedNext, total);
        claimed[jobId][who] = cumulative;
        _jobs[jobId].claimed = claimedNext;
        emit Claimed(jobId, who, amount, cumulative);
        TOKEN.safeTransfer(who, amount);
    }

    /// @notice Claims for many payees of a job, each on its own: who cannot be paid is reported in
    /// `ClaimSkipped` with the reason and stops nobody else.
    /// @dev Each claim is an external call, so that a payee the token refuses reverts alone. An item
    /// starved of gas is skipped like any other and can be claimed again.
    /// @return paid The sum paid.
    function claimMany(
        bytes32 jobId,
        address[] calldata who,
        uint128[] calldata cumulative,
        bytes32[][] calldata proofs
    ) external returns (uint128 paid) {
        if (who.length != cumulative.length || who.length != proofs.length) {
            revert LengthMismatch(who.length, cumulative.length, proofs.length);
        }
        for (uint256 i = 0; i < who.length; ++i) {
            try this.claim(jobId, who[i], cumulative[i], proofs[i]) returns (uint128 amount) {
                paid += amount;
            } catch (bytes memory reason) {
                emit ClaimSkipped(jobId, who[i], reason);
            }
        }
    }

    /// @notice Ends the job: no more epochs, and what is not committed may be refunded at once; the
    /// coordinator only. What is committed stays claimable.
    function close(bytes32 jobId) external {
        Job storage job = _existing(jobId);
        if (msg.sender != job.coordinator) revert NotCoordinator(msg.sender, job.coordinator);
        if (job.closed) revert JobClosed(jobId);
        job.closed = true;
        emit Closed(jobId, job.committed);
    }

    /// @notice Pays the sponsor what no epoch committed, once, after `close` or the deadline; anyone
    /// may call. The job is closed afterwards.
    function refund(bytes32 jobId) external returns (uint128 amount) {
        Job storage job = _existing(jobId);
        if (job.refundTaken) revert AlreadyRefunded(jobId);
        if (!job.closed && block.timestamp < job.deadline) {
            revert RefundTooEarly(job.deadline, uint64(block.timestamp));
        }
        amount = job.funded - job.committed;
        job.closed = true;
        job.refundTaken = true;
        job.refunded = amount;
        emit Refunded(jobId, job.sponsor, amount);
        TOKEN.safeTransfer(job.sponsor, amount);
    }

    function _open(bytes32 jobDigest, address coordinator, uint128 amount, uint64 deadline)
        private
        returns (bytes32 jobId)
    {
        if (amount == 0) revert ZeroAmount();
        if (coordinator == address(0)) revert ZeroCoordinator();
        if (deadline <= block.timestamp) revert DeadlinePassed(deadline, uint64(block.timestamp));
        jobId = jobIdOf(msg.sender, jobDigest);
        Job storage job = _jobs[jobId];
        if (job.sponsor != address(0)) revert JobExists(jobId);
        job.sponsor = msg.sender;
        job.deadline = deadline;
        job.coordinator = coordinator;
        job.funded = amount;
        emit Opened(jobId, msg.sender, coordinator, amount, deadline);
    }

    function _existing(bytes32 jobId) private view returns (Job storage job) {
        job = _jobs[jobId];
        if (job.sponsor == address(0)) revert NoSuchJob(jobId);
    }
}
