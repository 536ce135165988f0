// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {MessageHashUtils} from "@openzeppelin/contracts/utils/cryptography/MessageHashUtils.sol";
import {DroppedBid, Evidence, LoggedVerdict, PricedBid} from "./Evidence.sol";
import {IJobEscrow} from "./interfaces/IJobEscrow.sol";
import {IStakeVault} from "./interfaces/IStakeVault.sol";
import {Bid, BidReceipt, BookSeal, ClearingCertificate, MarketRecords, Receipt, Vote} from "./MarketRecords.sol";
import {TokenPull} from "./TokenPull.sol";

/// @title Where faults are proven, and what they cost.
/// @notice Objective faults need no judge: the evidence is what the accused signed, or what it anchored,
/// and is checked here to the last byte. For the rest a challenger puts up a bond and named verifiers
/// vote. A case is decided once; whoever judges gains nothing.
/// @dev All signatures are EIP-712 in the domain of `shoal.protocol.signing`: name "Shoal", version
/// "1", this chain, and the escrow as verifying contract. What the court pays out becomes stake of
/// the payee in the vault, so that no payee can make a decision fail. Nobody owns the contract.
contract FaultCourt {
    using MarketRecords for *;
    using SafeERC20 for IERC20;
    using TokenPull for IERC20;

    enum Fault {
        Equivocation,
        DoublePay,
        PriceAboveBid,
        PriceBelowBid,
        DroppedBid,
        TwoBooks,
        Subjective
    }

    enum Status {
        None,
        Open,
        Upheld,
        Dismissed,
        Lapsed
    }

    /// @notice A case. `evidence` never changes: the hash of what proved an objective fault, or what
    /// the challenger named when it opened a subjective case.
    struct Case {
        address accused;
        Fault fault;
        Status status;
        uint64 voteBy;
        address challenger;
        bytes32 jobId;
        bytes32 evidence;
    }

    /// @notice What a court is set up with, for good.
    /// @param penalty The stake that one fault costs, as far as there is any.
    /// @param challengeBond What opening a subjective case takes, and losing it costs.
    /// @param votingPeriod Seconds in which verifiers can decide a subjective case.
    /// @param quorum How many of `verifiers` must say the same; at least two, and more than half.
    /// @param verifiers Who may vote; nobody where no subjective case shall be heard.
    struct Terms {
        uint128 penalty;
        uint128 challengeBond;
        uint64 votingPeriod;
        uint256 quorum;
        address[] verifiers;
    }

    /// @notice The settlement token.
    IERC20 public immutable TOKEN;
    /// @notice Whose stake the court can take.
    IStakeVault public immutable VAULT;
    /// @notice Whose jobs the court can freeze.
    IJobEscrow public immutable ESCROW;
    /// @notice The stake that one fault costs, as far as there is any.
    uint128 public immutable PENALTY;
    /// @notice What opening a subjective case takes, and losing it costs.
    uint128 public immutable CHALLENGE_BOND;
    /// @notice Seconds in which verifiers can decide a subjective case.
    uint64 public immutable VOTING_PERIOD;
    /// @notice How many verifiers must say the same.
    uint256 public immutable QUORUM;

    /// @notice Every case by its id.
    mapping(bytes32 caseId => Case) public caseOf;
    /// @notice Who may vote.
    mapping(address account => bool) public isVerifier;

    event Challenged(
        bytes32 indexed caseId,
        address indexed accused,
        address indexed challenger,
        bytes32 jobId,
        bytes32 evidence,
        uint64 voteBy
    );
    event Decided(
        bytes32 indexed caseId,
        address indexed accused,
        address indexed challenger,
        Fault fault,
        Status status,
        bytes32 jobId,
        bytes32 evidence
    );
    event Penalised(bytes32 indexed caseId, address indexed accused, uint128 stakeTaken, uint128 bondTaken);

    error NotWired(address contract_);
    error ZeroPenalty();
    error BadQuorum(uint256 quorum, uint256 verifiers);
    error BadVerifier(address verifier);
    error UnbondingTooShort(uint64 unbondingPeriod, uint64 votingPeriod);
    error NoSuchJob(bytes32 jobId);
    error NoVerifiers();
    error SelfAccusation(address account);
    error CaseExists(bytes32 caseId, Status status);
    error CaseNotOpen(bytes32 caseId, Status status);
    error VotingOver(uint64 voteBy, uint64 nowAt);
    error VotingNotOver(uint64 voteBy, uint64 nowAt);
    error TooFewVotes(uint256 votes, uint256 quorum);
    error NotAVerifier(address signer);
    error VotesOutOfOrder(address previous, address signer);
    error WrongSigner(address signer, address expected);
    error DifferentRecords(string field);
    error SameStatement(bytes32 digest);
    error WrongRule(uint8 rule);
    error PriceKept(uint96 payMicros, uint96 bidMicros);
    error WrongBid(bytes32 digest, bytes32 expected);
    error EpochNotCovered(uint32 epoch, uint32 from, uint32 to);
    error BidForAnotherJob(bytes32 bidJob, bytes32 jobId);
    error AboveReserve(uint96 priceMicros, uint96 reserveMicros);

    /// @dev The last of the set to be deployed: it refuses to exist unless vault and escrow name this
    /// very address and each other. Stake must stay in reach while a vote lasts.
    constructor(IStakeVault vault, IJobEscrow escrow, Terms memory terms) {
        if (vault.COURT() != address(this) || vault.ESCROW() != address(escrow)) revert NotWired(address(vault));
        if (escrow.COURT() != address(this) || escrow.VAULT() != address(vault)) revert NotWired(address(escrow));
        if (address(vault.TOKEN()) != address(escrow.TOKEN())) revert NotWired(address(vault.TOKEN()));
        uint64 unbonding = vault.UNBONDING_PERIOD();
        if (unbonding < terms.votingPeriod) revert UnbondingTooShort(unbonding, terms.votingPeriod);
        if (terms.penalty == 0) revert ZeroPenalty();
        uint256 count = terms.verifiers.length;
        if (count != 0 && (terms.quorum < 2 || terms.quorum > count || terms.quorum * 2 <= count)) {
            revert BadQuorum(terms.quorum, count);
        }
        for (uint256 i = 0; i < count; ++i) {
            address verifier = terms.verifiers[i];
            if (verifier == address(0) || isVerifier[verifier]) revert BadVerifier(verifier);
            isVerifier[verifier] = true;
        }
        TOKEN = vault.TOKEN();
        VAULT = vault;
        ESCROW = escrow;
        PENALTY = terms.penalty;
        CHALLENGE_BOND = terms.challengeBond;
        VOTING_PERIOD = terms.votingPeriod;
        QUORUM = count == 0 ? 0 : terms.quorum;
    }

    /// @notice Proves that an account signed two results for one lease, under one fencing number.
    /// @dev A lease is one task given to one node; each time the task is leased again the number rises.
    function equivocation(
        Receipt calldata first,
        bytes calldata firstSignature,
        Receipt calldata second,
        bytes calldata secondSignature
    ) external returns (bytes32 caseId) {
        bytes32 lease = keccak256(bytes(first.leaseId));
        if (first.account != second.account) revert DifferentRecords("account");
        if (first.jobId != second.jobId) revert DifferentRecords("jobId");
        if (lease != keccak256(bytes(second.leaseId))) revert DifferentRecords("leaseId");
        if (first.leaseEpoch != second.leaseEpoch) revert DifferentRecords("leaseEpoch");
        if (first.resultDigest == second.resultDigest) revert SameStatement(first.resultDigest);
        _requireSigner(first.structHash(), firstSignature, first.account);
        _requireSigner(second.structHash(), secondSignature, first.account);
        caseId = keccak256(abi.encode(Fault.Equivocation, first.account, first.jobId, lease, first.leaseEpoch));
        _uphold(caseId, Fault.Equivocation, first.jobId, first.account, msg.sender);
        uint128 taken = VAULT.slash(first.account, PENALTY, caseId, first.jobId, msg.sender);
        emit Penalised(caseId, first.account, taken, 0);
    }

    /// @notice Proves that the job's provenance log pays one task twice, in one epoch or in two.
    function doublePay(bytes32 jobId, LoggedVerdict calldata first, LoggedVerdict calldata second)
        external
        returns (bytes32 caseId)
    {
        address coordinator = _coordinator(jobId);
        if (first.epoch == second.epoch && first.seq == second.seq) revert SameStatement(sha256(first.payload));
        bytes32 task = _paidTask(jobId, coordinator, first);
        if (task != _paidTask(jobId, coordinator, second)) revert DifferentRecords("task_id");
        caseId = keccak256(abi.encode(Fault.DoublePay, jobId, task));
        _punish(caseId, Fault.DoublePay, jobId, coordinator, msg.sender);
    }

    /// @notice Proves that a certificate under pay-as-bid pays a bid more than it asked.
    function priceAboveBid(PricedBid calldata evidence) external returns (bytes32 caseId) {
        address coordinator = _requirePriced(evidence);
        if (evidence.certificate.rule != MarketRecords.PAY_AS_BID) revert WrongRule(evidence.certificate.rule);
        if (evidence.rung.payMicros <= evidence.bid.priceMicros) {
            revert PriceKept(evidence.rung.payMicros, evidence.bid.priceMicros);
        }
        caseId = _priceCase(Fault.PriceAboveBid, evidence);
        _punish(caseId, Fault.PriceAboveBid, evidence.certificate.jobId, coordinator, msg.sender);
    }

    /// @notice Proves that a certificate, under whatever rule, pays a bid less than it asked.
    function priceBelowBid(PricedBid calldata evidence) external returns (bytes32 caseId) {
        address coordinator = _requirePriced(evidence);
        if (evidence.rung.payMicros >= evidence.bid.priceMicros) {
            revert PriceKept(evidence.rung.payMicros, evidence.bid.priceMicros);
        }
        caseId = _priceCase(Fault.PriceBelowBid, evidence);
        _punish(caseId, Fault.PriceBelowBid, evidence.certificate.jobId, coordinator, msg.sender);
    }

    /// @notice Proves that a receipted bid, good for the certificate's job, epoch and reserve, is not in
    /// the book it was cleared on.
    /// @dev Commitments are sealed and cancelled ones keep their leaf, so there is no honest reason to
    /// leave one out, and its rank among the others need not be shown. The bidder is the challenger,
    /// whoever sends this: copying the proof gains nothing.
    function droppedBid(DroppedBid calldata evidence) external returns (bytes32 caseId) {
        ClearingCertificate calldata certificate = evidence.certificate;
        BidReceipt calldata receipt = evidence.receipt;
        Bid calldata bid = evidence.bid;
        address coordinator = _requireCertificate(certificate, evidence.certificateSignature);
        _requireSigner(receipt.structHash(), evidence.receiptSignature, coordinator);
        bytes32 commitment = MarketRecords.commitment(_digest(bid.structHash()), evidence.salt);
        if (commitment != receipt.commitment) revert WrongBid(commitment, receipt.commitment);
        _requireCovered(certificate.epoch, receipt.epochFrom, receipt.epochTo);
        _requireCovered(certificate.epoch, bid.epochFrom, bid.epochTo);
        if (bid.jobId != 0 && bid.jobId != certificate.jobId) revert BidForAnotherJob(bid.jobId, certificate.jobId);
        if (bid.priceMicros > certificate.reserveMicros) {
            revert AboveReserve(bid.priceMicros, certificate.reserveMicros);
        }
        Evidence.requireExcluded(commitment, evidence.neighbours, certificate.commitRoot);
        caseId = keccak256(abi.encode(Fault.DroppedBid, certificate.jobId, certificate.epoch, commitment));
        _punish(caseId, Fault.DroppedBid, certificate.jobId, coordinator, bid.account);
    }

    /// @notice Proves that a coordinator sealed one book for a market epoch and cleared another.
    function twoBooks(
        ClearingCertificate calldata certificate,
        bytes calldata certificateSignature,
        BookSeal calldata seal,
        bytes calldata sealSignature
    ) external returns (bytes32 caseId) {
        address coordinator = _requireCertificate(certificate, certificateSignature);
        _requireSigner(seal.structHash(), sealSignature, coordinator);
        if (certificate.epoch != seal.epoch) revert DifferentRecords("epoch");
        if (certificate.commitRoot == seal.commitRoot) revert SameStatement(seal.commitRoot);
        caseId = keccak256(abi.encode(Fault.TwoBooks, certificate.jobId, coordinator, seal.epoch));
        _punish(caseId, Fault.TwoBooks, certificate.jobId, coordinator, msg.sender);
    }

    /// @notice Opens a case that only people can judge, with a bond from the caller's allowance.
    /// @param evidence Hash of what the verifiers are to look at.
    function challenge(bytes32 jobId, address accused, bytes32 evidence) external returns (bytes32 caseId) {
        if (QUORUM == 0) revert NoVerifiers();
        _coordinator(jobId);
        if (accused == msg.sender) revert SelfAccusation(accused);
        caseId = keccak256(abi.encode(Fault.Subjective, jobId, accused, evidence));
        uint64 voteBy = uint64(block.timestamp) + VOTING_PERIOD;
        _record(caseId, Case(accused, Fault.Subjective, Status.Open, voteBy, msg.sender, jobId, evidence));
        emit Challenged(caseId, accused, msg.sender, jobId, evidence, voteBy);
        if (CHALLENGE_BOND != 0) TOKEN.pull(CHALLENGE_BOND);
    }

    /// @notice Decides an open case by the votes of a quorum that all say `guilty`, or all not; anyone may
    /// call. Guilty costs the accused its penalty; not guilty gives it the challenger's bond.
    /// @param signatures Of the `Vote`, in ascending order of their signers.
    function resolve(bytes32 caseId, bool guilty, bytes[] calldata signatures) external {
        Case memory found = _requireOpen(caseId);
        if (block.timestamp > found.voteBy) revert VotingOver(found.voteBy, uint64(block.timestamp));
        if (signatures.length < QUORUM) revert TooFewVotes(signatures.length, QUORUM);
        _requireVotes(_digest(Vote(caseId, found.evidence, guilty).structHash()), signatures);
        _decide(caseId, found, guilty ? Status.Upheld : Status.Dismissed);
        _payBond(guilty ? found.challenger : found.accused);
        if (!guilty) return;
        uint128 taken = VAULT.slash(found.accused, PENALTY, caseId, found.jobId, found.challenger);
        emit Penalised(caseId, found.accused, taken, 0);
    }

    /// @notice Ends a case that no quorum decided in time; its challenger has the bond back. Anyone may call.
    function lapse(bytes32 caseId) external {
        Case memory found = _requireOpen(caseId);
        if (block.timestamp <= found.voteBy) revert VotingNotOver(found.voteBy, uint64(block.timestamp));
        _decide(caseId, found, Status.Lapsed);
        _payBond(found.challenger);
    }

    /// @notice The EIP-712 domain separator that all evidence is signed in.
    function domainSeparator() public view returns (bytes32) {
        return MarketRecords.domainSeparator(address(ESCROW));
    }

    function _paidTask(bytes32 jobId, address coordinator, LoggedVerdict calldata verdict)
        private
        view
        returns (bytes32)
    {
        return Evidence.requirePaid(ESCROW.PROVENANCE_LOG(), address(ESCROW), coordinator, jobId, verdict);
    }

    /// @dev The rung names the bid by the digest of what was signed, so the bid needs no signature here:
    /// a coordinator that prices a bid nobody signed is no better.
    function _requirePriced(PricedBid calldata evidence) private view returns (address coordinator) {
        coordinator = _requireCertificate(evidence.certificate, evidence.certificateSignature);
        Evidence.requireRung(evidence.rung, evidence.proof, evidence.certificate.allocationRoot);
        bytes32 digest = _digest(evidence.bid.structHash());
        if (digest != evidence.rung.bidDigest) revert WrongBid(digest, evidence.rung.bidDigest);
    }

    function _priceCase(Fault fault, PricedBid calldata evidence) private pure returns (bytes32) {
        return keccak256(abi.encode(fault, evidence.certificate.certificateDigest, evidence.rung.bidDigest));
    }

    function _requireCertificate(ClearingCertificate calldata certificate, bytes calldata signature)
        private
        view
        returns (address coordinator)
    {
        coordinator = _coordinator(certificate.jobId);
        _requireSigner(certificate.structHash(), signature, coordinator);
    }

    function _requireVotes(bytes32 digest, bytes[] calldata signatures) private view {
        address previous = address(0);
        for (uint256 i = 0; i < signatures.length; ++i) {
            address signer = ECDSA.recoverCalldata(digest, signatures[i]);
            if (!isVerifier[signer]) revert NotAVerifier(signer);
            if (signer <= previous) revert VotesOutOfOrder(previous, signer);
            previous = signer;
        }
    }

    function _requireSigner(bytes32 structHash, bytes calldata signature, address expected) private view {
        address signer = ECDSA.recoverCalldata(_digest(structHash), signature);
        if (signer != expected) revert WrongSigner(signer, expected);
    }

    function _requireCovered(uint32 epoch, uint32 from, uint32 to) private pure {
        if (epoch < from || epoch > to) revert EpochNotCovered(epoch, from, to);
    }

    function _requireOpen(bytes32 caseId) private view returns (Case memory found) {
        found = caseOf[caseId];
        if (found.status != Status.Open) revert CaseNotOpen(caseId, found.status);
    }

    function _coordinator(bytes32 jobId) private view returns (address coordinator) {
        coordinator = ESCROW.coordinatorOf(jobId);
        if (coordinator == address(0)) revert NoSuchJob(jobId);
    }

    function _digest(bytes32 structHash) private view returns (bytes32) {
        return MessageHashUtils.toTypedDataHash(domainSeparator(), structHash);
    }

    /// @dev A coordinator's fault ends its job and takes its bond there, whether or not it has stake:
    /// what was found is recorded either way.
    function _punish(bytes32 caseId, Fault fault, bytes32 jobId, address coordinator, address challenger) private {
        _uphold(caseId, fault, jobId, coordinator, challenger);
        uint128 bondTaken = ESCROW.freeze(jobId, caseId, challenger);
        // The third value, when stake is free to leave, is nothing to a court.
        // slither-disable-next-line unused-return
        (uint128 active, uint128 unbonding,) = VAULT.stakeOf(coordinator);
        uint128 stakeTaken =
            active + unbonding == 0 ? 0 : VAULT.slash(coordinator, PENALTY, caseId, jobId, challenger);
        emit Penalised(caseId, coordinator, stakeTaken, bondTaken);
    }

    /// @dev The evidence of an objective case is the call that brought it.
    function _uphold(bytes32 caseId, Fault fault, bytes32 jobId, address accused, address challenger) private {
        if (challenger == accused) revert SelfAccusation(accused);
        Case memory found = Case(accused, fault, Status.Open, 0, challenger, jobId, keccak256(msg.data));
        _record(caseId, found);
        _decide(caseId, found, Status.Upheld);
    }

    function _record(bytes32 caseId, Case memory opened) private {
        Status status = caseOf[caseId].status;
        if (status != Status.None) revert CaseExists(caseId, status);
        caseOf[caseId] = opened;
    }

    function _decide(bytes32 caseId, Case memory found, Status status) private {
        caseOf[caseId].status = status;
        emit Decided(caseId, found.accused, found.challenger, found.fault, status, found.jobId, found.evidence);
    }

    function _payBond(address winner) private {
        if (CHALLENGE_BOND == 0) return;
        TOKEN.forceApprove(address(VAULT), CHALLENGE_BOND);
        VAULT.stakeFor(winner, CHALLENGE_BOND);
    }
}
