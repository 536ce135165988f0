// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {IJobEscrow} from "./interfaces/IJobEscrow.sol";
import {IStakeVault} from "./interfaces/IStakeVault.sol";
import {Penalty} from "./Penalty.sol";
import {Permit, TokenPull} from "./TokenPull.sol";

/// @title Stake, of providers and coordinators, and which account answers for which node key.
/// @notice Stake leaves in two ways only: to its owner after the unbonding period, or by the court.
/// @dev What a challenger wins is paid as stake of its own, so that no payment to a stranger can make
/// a slash fail. The token must neither take a fee on transfer nor rebase. Nobody owns the contract.
contract StakeVault is IStakeVault {
    using SafeERC20 for IERC20;
    using TokenPull for IERC20;

    struct Stake {
        uint128 active;
        uint128 unbonding;
        uint64 unbondAt;
    }

    /// @inheritdoc IStakeVault
    IERC20 public immutable TOKEN;
    /// @inheritdoc IStakeVault
    address public immutable COURT;
    /// @inheritdoc IStakeVault
    address public immutable ESCROW;
    /// @inheritdoc IStakeVault
    uint64 public immutable UNBONDING_PERIOD;

    /// @inheritdoc IStakeVault
    mapping(address account => Stake) public stakeOf;
    /// @notice The account that bound an Ed25519 node key; zero for a free key.
    mapping(bytes32 nodeKey => address) public nodeOwner;

    event Staked(address indexed account, uint128 amount, uint128 active);
    event NodeBound(address indexed account, bytes32 indexed nodeKey);
    event UnbondRequested(address indexed account, uint128 amount, uint64 unbondAt);
    event Withdrawn(address indexed account, uint128 amount);
    event Slashed(
        address indexed account,
        bytes32 indexed caseId,
        bytes32 indexed injuredJob,
        address challenger,
        uint128 taken,
        uint128 toJob,
        uint128 toChallenger,
        uint128 burnt
    );

    error ZeroAmount();
    error ZeroAccount();
    error ZeroNodeKey();
    error NodeKeyTaken(bytes32 nodeKey, address owner);
    error InsufficientStake(uint128 active, uint128 requested);
    error NothingUnbonding(address account);
    error StillUnbonding(uint64 unbondAt, uint64 nowAt);
    error NotCourt(address caller);
    error BadChallenger(address challenger);
    error NothingToSlash(address account);

    /// @dev Vault, escrow and court name each other, so two of the addresses are computed before
    /// their contracts exist; the court's constructor refuses a set that does not fit together.
    constructor(IERC20 token, address escrow, address court, uint64 unbondingPeriod) {
        TOKEN = token;
        ESCROW = escrow;
        COURT = court;
        UNBONDING_PERIOD = unbondingPeriod;
    }

    /// @notice Adds `amount` of the caller's tokens to its active stake, from its allowance.
    function stake(uint128 amount) external {
        _stake(msg.sender, amount);
        TOKEN.pull(amount);
    }

    /// @inheritdoc IStakeVault
    function stakeFor(address account, uint128 amount) external {
        if (account == address(0)) revert ZeroAccount();
        _stake(account, amount);
        TOKEN.pull(amount);
    }

    /// @notice Adds `amount` of the caller's tokens to its active stake, by its permit.
    function stakeWithPermit(uint128 amount, Permit calldata permit) external {
        _stake(msg.sender, amount);
        TOKEN.pullWithPermit(amount, permit);
    }

    /// @notice The caller answers for `nodeKey` from now on; binding one's own key again does nothing.
    /// @dev Records the account's consent only. The node's consent is its Ed25519 signature in the
    /// binding record, which no precompile can check: readers need both. A stranger who binds a key
    /// it does not hold gains nothing, and the holder takes a fresh key.
    function bindNode(bytes32 nodeKey) external {
        if (nodeKey == 0) revert ZeroNodeKey();
        address owner = nodeOwner[nodeKey];
        if (owner == msg.sender) return;
        if (owner != address(0)) revert NodeKeyTaken(nodeKey, owner);
        nodeOwner[nodeKey] = msg.sender;
        emit NodeBound(msg.sender, nodeKey);
    }

    /// @notice Moves `amount` from active to unbonding; all that is unbonding waits the full period anew.
    function requestUnbond(uint128 amount) external {
        if (amount == 0) revert ZeroAmount();
        Stake storage own = stakeOf[msg.sender];
        if (amount > own.active) revert InsufficientStake(own.active, amount);
        uint64 unbondAt = uint64(block.timestamp) + UNBONDING_PERIOD;
        own.active -= amount;
        own.unbonding += amount;
        own.unbondAt = unbondAt;
        emit UnbondRequested(msg.sender, amount, unbondAt);
    }

    /// @notice Pays the caller everything it unbonded, once the period is over.
    function withdraw() external {
        Stake storage own = stakeOf[msg.sender];
        uint128 amount = own.unbonding;
        if (amount == 0) revert NothingUnbonding(msg.sender);
        if (block.timestamp < own.unbondAt) revert StillUnbonding(own.unbondAt, uint64(block.timestamp));
        own.unbonding = 0;
        own.unbondAt = 0;
        emit Withdrawn(msg.sender, amount);
        TOKEN.safeTransfer(msg.sender, amount);
    }

    /// @inheritdoc IStakeVault
    /// @dev Unbonding stake goes first, matured or not, so that nobody escapes by having asked to
    /// leave. See `Penalty` for the shares; the court itself never receives, so that judging cannot
    /// be a business.
    function slash(address account, uint128 amount, bytes32 caseId, bytes32 injuredJob, address challenger)
        external
        returns (uint128 taken)
    {
        if (msg.sender != COURT) revert NotCourt(msg.sender);
        if (challenger == address(0) || challenger == account || challenger == msg.sender) {
            revert BadChallenger(challenger);
        }
        taken = _take(account, amount);
        (uint128 toJob, uint128 toChallenger, uint128 burnt) = Penalty.split(taken);
        stakeOf[challenger].active += toChallenger;
        emit Slashed(account, caseId, injuredJob, challenger, taken, toJob, toChallenger, burnt);
        if (burnt != 0) TOKEN.safeTransfer(Penalty.BURN, burnt);
        TOKEN.forceApprove(ESCROW, toJob);
        IJobEscrow(ESCROW).compensate(injuredJob, toJob);
    }

    function _take(address account, uint128 amount) private returns (uint128 taken) {
        Stake storage accused = stakeOf[account];
        uint128 fromUnbonding = amount < accused.unbonding ? amount : accused.unbonding;
        uint128 rest = amount - fromUnbonding;
        uint128 fromActive = rest < accused.active ? rest : accused.active;
        taken = fromUnbonding + fromActive;
        if (taken == 0) revert NothingToSlash(account);
        accused.unbonding -= fromUnbonding;
        accused.active -= fromActive;
    }

    function _stake(address account, uint128 amount) private {
        if (amount == 0) revert ZeroAmount();
        uint128 active = stakeOf[account].active + amount;
        stakeOf[account].active = active;
        emit Staked(account, amount, active);
    }
}
