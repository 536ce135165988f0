// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {MerkleProof} from "@openzeppelin/contracts/utils/cryptography/MerkleProof.sol";
import {ICoordinators} from "./interfaces/ICoordinators.sol";
import {IJobEscrow} from "./interfaces/IJobEscrow.sol";
import {IProvenanceLog} from "./interfaces/IProvenanceLog.sol";
import {IStakeVault} from "./interfaces/IStakeVault.sol";
import {Penalty} from "./Penalty.sol";
import {Permit, TokenPull} from "./TokenPull.sol";

/// @title Requesters' budgets, paid out by one cumulative Merkle root per job and epoch.
/// @notice Per job: claimed <= committed <= funded. A root can spend its own job's money only, and
/// no more than the total posted with it. Whatever an accepted root owes can be claimed for ever.
/// @dev The token must neither take a fee on transfer nor rebase. Nobody owns the contract.
contract JobEscrow is IJobEscrow {
    using SafeERC20 for IERC20;
    using TokenPull for IERC20;

    /// @notice Everything the contract holds about a job. `acceptedRoot` and `acceptedTotal` are those
    /// before the latest post, `root` and `postedTotal` the latest's; `committed` is the one of the two
    /// totals that the job stands by.
    struct Job {
        address sponsor;
        address coordinator;
        uint64 deadline;
        bool closed;
        bool frozen;
        uint32 epoch;
        uint64 readyAt;
        uint128 funded;
        uint128 committed;
        uint128 claimed;
        uint128 refunded;
        uint128 bond;
        uint128 postedTotal;
        uint128 acceptedTotal;
        bytes32 root;
        bytes32 acceptedRoot;
    }

    /// @dev The storage of a `Job`, in slots whose order and company the gas of posts and claims hangs
    /// on. The latest post has the place `epoch % 2` in `totals` and `roots` and the one before it the
    /// other, so that a post overwrites one root and moves none.
    struct Slots {
        address sponsor; // slot 0
        uint64 deadline;
        bool closed;
        bool frozen;
        address coordinator; // slot 1
        uint32 epoch;
        uint64 readyAt;
        uint128 funded; // slot 2
        uint128 claimed;
        uint128 refunded; // slot 3
        uint128 bond;
        uint128[2] totals; // slot 4
        bytes32[2] roots;
    }

    /// @notice What a coordinator states about one epoch. `cumulativeTotal` is the sum of all leaves
    /// under `payRoot`: everything the job owes since it began, not since the last epoch.
    struct Epoch {
        uint32 number;
        bytes32 payRoot;
        bytes32 provRoot;
        uint128 cumulativeTotal;
        uint64 numTasks;
        uint64 numStatements;
    }

    /// @dev Stands for the root before the first. Its slot is paid for with the first post, so that every
    /// later one costs the same; nothing hashes to it.
    bytes32 private constant NO_ROOT = bytes32(uint256(1));
    /// @dev The `readyAt` of a root that the court took back: its window never ends.
    uint64 private constant NEVER = type(uint64).max;

    /// @inheritdoc IJobEscrow
    IERC20 public immutable TOKEN;
    /// @inheritdoc IJobEscrow
    IProvenanceLog public immutable PROVENANCE_LOG;
    /// @inheritdoc IJobEscrow
    address public immutable VAULT;
    /// @inheritdoc IJobEscrow
    address public immutable COURT;
    /// @notice Seconds a root waits before anything can be claimed under it.
    uint64 public immutable CHALLENGE_WINDOW;
    /// @notice What a coordinator must have put up for a job before it may post; zero for nothing.
    uint128 public immutable MIN_BOND;

    mapping(bytes32 jobId => Slots) private _jobs;
    /// @notice What an account has been paid by a job so far.
    mapping(bytes32 jobId => mapping(address who => uint128)) public claimed;

    event Opened(
        bytes32 indexed jobId, address indexed sponsor, address indexed coordinator, uint128 amount, uint64 deadline
    );
    event ToppedUp(bytes32 indexed jobId, address indexed from, uint128 amount, uint128 funded);
    event Compensated(bytes32 indexed jobId, address indexed from, uint128 amount, uint128 funded);
    event BondPutUp(bytes32 indexed jobId, address indexed coordinator, uint128 amount, uint128 bond);
    event BondReturned(bytes32 indexed jobId, address indexed coordinator, uint128 amount);
    event EpochPosted(
        bytes32 indexed jobId,
        uint32 indexed epoch,
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
    event Frozen(
        bytes32 indexed jobId,
        bytes32 indexed caseId,
        address indexed challenger,
        uint128 committed,
        uint128 forfeited,
        uint128 toJob,
        uint128 toChallenger,
        uint128 burnt
    );

    error ZeroAmount();
    error ZeroCoordinator();
    error DeadlinePassed(uint64 deadline, uint64 nowAt);
    error JobExists(bytes32 jobId);
    error NoSuchJob(bytes32 jobId);
    error JobClosed(bytes32 jobId);
    error JobFrozen(bytes32 jobId);
    error NotCourt(address caller);
    error NotCoordinator(address caller, address coordinator);
    error WrongEpoch(uint32 posted, uint32 expected);
    error InsideChallengeWindow(uint64 readyAt, uint64 nowAt);
    error TotalDecreased(uint128 posted, uint128 committed);
    error TotalAboveFunds(uint128 posted, uint128 funded);
    error BadProof(bytes32 jobId, address who, uint128 cumulative);
    error ClaimAboveTotal(uint128 claimedNext, uint128 total);
    error LengthMismatch(uint256 payees, uint256 amounts, uint256 proofs);
    error RefundTooEarly(uint64 deadline, uint64 nowAt);
    error NothingToRefund(bytes32 jobId);
    error BondTooSmall(uint128 bond, uint128 minimum);
    error NoBond(bytes32 jobId);
    error JobStillOpen(bytes32 jobId);
    error BondHeld(uint64 until, uint64 nowAt);

    /// @param vault Where challengers' shares of forfeited bonds are staked.
    /// @param court The only caller of `freeze`; see the vault's constructor.
    constructor(
        IERC20 token,
        IProvenanceLog provenanceLog,
        address vault,
        address court,
        uint64 challengeWindow,
        uint128 minBond
    ) {
        TOKEN = token;
        PROVENANCE_LOG = provenanceLog;
        VAULT = vault;
        COURT = court;
        CHALLENGE_WINDOW = challengeWindow;
        MIN_BOND = minBond;
    }

    /// @notice The id of `sponsor`'s job with `jobDigest`.
    /// @dev The sponsor is part of the id, so nobody can open, or squat, another's job.
    function jobIdOf(address sponsor, bytes32 jobDigest) public pure returns (bytes32) {
        return keccak256(abi.encode(sponsor, jobDigest));
    }

    /// @notice Everything the contract holds about a job; all zero for an unknown one.
    function jobOf(bytes32 jobId) external view returns (Job memory job) {
        Slots storage held = _jobs[jobId];
        uint256 latest = held.epoch % 2;
        job.sponsor = held.sponsor;
        job.coordinator = held.coordinator;
        job.deadline = held.deadline;
        job.closed = held.closed;
        job.frozen = held.frozen;
        job.epoch = held.epoch;
        job.readyAt = held.readyAt;
        job.funded = held.funded;
        job.committed = _committed(held);
        job.claimed = held.claimed;
        job.refunded = held.refunded;
        job.bond = held.bond;
        job.postedTotal = held.totals[latest];
        job.acceptedTotal = held.totals[1 - latest];
        job.root = held.roots[latest];
        job.acceptedRoot = held.epoch < 2 ? bytes32(0) : held.roots[1 - latest];
    }

    /// @inheritdoc ICoordinators
    function coordinatorOf(bytes32 jobId) external view returns (address) {
        return _jobs[jobId].coordinator;
    }

    /// @notice The root claims are checked against now, and the most it may ever have paid.
    function claimable(bytes32 jobId) public view returns (bytes32 root, uint128 total) {
        Slots storage job = _jobs[jobId];
        bool waiting = block.timestamp < job.readyAt;
        if (waiting && job.epoch < 2) return (0, 0);
        uint256 place = waiting ? 1 - job.epoch % 2 : job.epoch % 2;
        return (job.roots[place], job.totals[place]);
    }

    /// @notice Opens the caller's job with `amount` of its tokens, from its allowance.
    /// @param coordinator The only account that may post epochs and close the job.
    /// @param deadline When the sponsor may take back what no epoch has committed.
    function open(bytes32 jobDigest, address coordinator, uint128 amount, uint64 deadline)
        external
        returns (bytes32 jobId)
    {
        jobId = _open(jobDigest, coordinator, amount, deadline);
        TOKEN.pull(amount);
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
        TOKEN.pullWithPermit(amount, permit);
    }

    /// @notice Adds `amount` of the caller's tokens to an open job; a refund still goes to its sponsor.
    function topUp(bytes32 jobId, uint128 amount) external {
        Slots storage job = _running(jobId);
        emit ToppedUp(jobId, msg.sender, amount, _fund(job, amount));
        TOKEN.pull(amount);
    }

    /// @inheritdoc IJobEscrow
    /// @dev A closed job takes it too, and its sponsor can then refund it: the injured need not be
    /// running still.
    function compensate(bytes32 jobId, uint128 amount) external {
        Slots storage job = _existing(jobId);
        emit Compensated(jobId, msg.sender, amount, _fund(job, amount));
        TOKEN.pull(amount);
    }

    /// @notice Adds `amount` of the caller's tokens to what it answers with for the job; the
    /// coordinator only.
    function putUpBond(bytes32 jobId, uint128 amount) external {
        Slots storage job = _running(jobId);
        if (msg.sender != job.coordinator) revert NotCoordinator(msg.sender, job.coordinator);
        if (amount == 0) revert ZeroAmount();
        uint128 bond = job.bond + amount;
        job.bond = bond;
        emit BondPutUp(jobId, msg.sender, amount, bond);
        TOKEN.pull(amount);
    }

    /// @notice Pays the coordinator its bond back, one challenge window after the job ended and after
    /// its last root was accepted; anyone may call.
    function returnBond(bytes32 jobId) external returns (uint128 amount) {
        Slots storage job = _existing(jobId);
        if (!job.closed) revert JobStillOpen(jobId);
        amount = job.bond;
        if (amount == 0) revert NoBond(jobId);
        uint64 until = job.deadline + CHALLENGE_WINDOW;
        if (until < job.readyAt) until = job.readyAt;
        if (block.timestamp < until) revert BondHeld(until, uint64(block.timestamp));
        job.bond = 0;
        emit BondReturned(jobId, job.coordinator, amount);
        TOKEN.safeTransfer(job.coordinator, amount);
    }

    /// @notice Commits the job to the payouts of `post_` and anchors its provenance; the coordinator only.
    /// @dev Refused while the previous root is inside its window: else a coordinator could let a bad
    /// root mature by posting over it. Allowed after the deadline until the refund is taken, so that
    /// finished work can still be paid.
    function post(bytes32 jobId, Epoch calldata post_) external {
        Slots storage job = _running(jobId);
        if (msg.sender != job.coordinator) revert NotCoordinator(msg.sender, job.coordinator);
        uint32 number = job.epoch + 1;
        if (post_.number != number) revert WrongEpoch(post_.number, number);
        if (block.timestamp < job.readyAt) revert InsideChallengeWindow(job.readyAt, uint64(block.timestamp));
        uint128 committed = job.totals[1 - number % 2];
        if (post_.cumulativeTotal < committed) revert TotalDecreased(post_.cumulativeTotal, committed);
        if (post_.cumulativeTotal > job.funded) revert TotalAboveFunds(post_.cumulativeTotal, job.funded);
        // The minimum first: a deployment without one must not pay for reading the bond.
        if (MIN_BOND != 0 && job.bond < MIN_BOND) revert BondTooSmall(job.bond, MIN_BOND);
        if (number == 1) job.roots[0] = NO_ROOT;
        job.epoch = number;
        if (CHALLENGE_WINDOW != 0) job.readyAt = uint64(block.timestamp) + CHALLENGE_WINDOW;
        job.totals[number % 2] = post_.cumulativeTotal;
        job.roots[number % 2] = post_.payRoot;
        emit EpochPosted(
            jobId,
            number,
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
        Slots storage job = _running(jobId);
        if (msg.sender != job.coordinator) revert NotCoordinator(msg.sender, job.coordinator);
        _end(job);
        emit Closed(jobId, _committed(job));
    }

    /// @notice Pays the sponsor what no epoch committed, after `close`, a freeze or the deadline; anyone
    /// may call, and again if the job was compensated since. The job is closed afterwards.
    function refund(bytes32 jobId) external returns (uint128 amount) {
        Slots storage job = _existing(jobId);
        if (block.timestamp < job.deadline) revert RefundTooEarly(job.deadline, uint64(block.timestamp));
        amount = job.funded - _committed(job) - job.refunded;
        if (amount == 0 && job.closed) revert NothingToRefund(jobId);
        _end(job);
        job.refunded += amount;
        emit Refunded(jobId, job.sponsor, amount);
        TOKEN.safeTransfer(job.sponsor, amount);
    }

    /// @inheritdoc IJobEscrow
    /// @dev A root still inside its window is taken back: it never becomes claimable, what was accepted
    /// before it stays claimable for ever, and the rest is the sponsor's to refund. The job is over;
    /// nobody can be put in the coordinator's place. The bond is shared as `Penalty` says. A second
    /// fault finds nothing left to take and changes nothing.
    function freeze(bytes32 jobId, bytes32 caseId, address challenger) external returns (uint128 forfeited) {
        if (msg.sender != COURT) revert NotCourt(msg.sender);
        Slots storage job = _existing(jobId);
        forfeited = job.bond;
        (uint128 toJob, uint128 toChallenger, uint128 burnt) = Penalty.split(forfeited);
        if (block.timestamp < job.readyAt) job.readyAt = NEVER;
        _end(job);
        job.frozen = true;
        job.bond = 0;
        job.funded += toJob;
        emit Frozen(jobId, caseId, challenger, _committed(job), forfeited, toJob, toChallenger, burnt);
        if (burnt != 0) TOKEN.safeTransfer(Penalty.BURN, burnt);
        if (toChallenger != 0) {
            TOKEN.forceApprove(VAULT, toChallenger);
            IStakeVault(VAULT).stakeFor(challenger, toChallenger);
        }
    }

    function _open(bytes32 jobDigest, address coordinator, uint128 amount, uint64 deadline)
        private
        returns (bytes32 jobId)
    {
        if (amount == 0) revert ZeroAmount();
        if (coordinator == address(0)) revert ZeroCoordinator();
        if (deadline <= block.timestamp) revert DeadlinePassed(deadline, uint64(block.timestamp));
        jobId = jobIdOf(msg.sender, jobDigest);
        Slots storage job = _jobs[jobId];
        if (job.sponsor != address(0)) revert JobExists(jobId);
        job.sponsor = msg.sender;
        job.deadline = deadline;
        job.coordinator = coordinator;
        job.funded = amount;
        emit Opened(jobId, msg.sender, coordinator, amount, deadline);
    }

    function _fund(Slots storage job, uint128 amount) private returns (uint128 funded) {
        if (amount == 0) revert ZeroAmount();
        funded = job.funded + amount;
        job.funded = funded;
    }

    /// @dev From here on `deadline` says when the job ended.
    function _end(Slots storage job) private {
        job.closed = true;
        if (block.timestamp < job.deadline) job.deadline = uint64(block.timestamp);
    }

    function _committed(Slots storage job) private view returns (uint128) {
        return job.totals[job.readyAt == NEVER ? 1 - job.epoch % 2 : job.epoch % 2];
    }

    function _existing(bytes32 jobId) private view returns (Slots storage job) {
        job = _jobs[jobId];
        if (job.sponsor == address(0)) revert NoSuchJob(jobId);
    }

    function _running(bytes32 jobId) private view returns (Slots storage job) {
        job = _existing(jobId);
        if (job.frozen) revert JobFrozen(jobId);
        if (job.closed) revert JobClosed(jobId);
    }
}
