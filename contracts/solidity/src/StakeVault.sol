// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {Permit, TokenPull} from "./TokenPull.sol";

/// @title Providers' stake, and which account answers for which node key.
/// @notice Stake leaves in two ways only: to its owner after the unbonding period, or by the court.
/// @dev The token must neither take a fee on transfer nor rebase. Nobody owns the contract.
contract StakeVault {
    using SafeERC20 for IERC20;
    using TokenPull for IERC20;

    struct Stake {
        uint128 active;
        uint128 unbonding;
        uint64 unbondAt;
    }

    /// @notice The settlement token.
    IERC20 public immutable TOKEN;
    /// @notice The only caller of `slash`; zero when no stake can be slashed.
    address public immutable COURT;
    /// @notice Seconds between the last request to unbond and the withdrawal.
    uint64 public immutable UNBONDING_PERIOD;

    /// @notice An account's stake: counted, leaving, and when what is leaving may be withdrawn.
    mapping(address account => Stake) public stakeOf;
    /// @notice The account that bound an Ed25519 node key; zero for a free key.
    mapping(bytes32 nodeKey => address) public nodeOwner;

    event Staked(address indexed account, uint128 amount, uint128 active);
    event NodeBound(address indexed account, bytes32 indexed nodeKey);
    event UnbondRequested(address indexed account, uint128 amount, uint64 unbondAt);
    event Withdrawn(address indexed account, uint128 amount);
    event Slashed(address indexed account, bytes32 indexed caseId, address indexed recipient, uint128 amount);

    error ZeroAmount();
    error ZeroNodeKey();
    error NodeKeyTaken(bytes32 nodeKey, address owner);
    error InsufficientStake(uint128 active, uint128 requested);
    error NothingUnbonding(address account);
    error StillUnbonding(uint64 unbondAt, uint64 nowAt);
    error NotCourt(address caller);
    error BadRecipient(address recipient);

    constructor(IERC20 token, address court, uint64 unbondingPeriod) {
        TOKEN = token;
        COURT = court;
        UNBONDING_PERIOD = unbondingPeriod;
    }

    /// @notice Adds `amount` of the caller's tokens to its active stake, from its allowance.
    function stake(uint128 amount) external {
        _stake(amount);
        TOKEN.safeTransferFrom(msg.sender, address(this), amount);
    }

    /// @notice Adds `amount` of the caller's tokens to its active stake, by its permit.
    function stakeWithPermit(uint128 amount, Permit calldata permit) external {
        _stake(amount);
        TOKEN.pullWithPermit(msg.sender, amount, permit);
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

    /// @notice Takes up to `amount` of `account`'s stake and pays it to `recipient`; the court only.
    /// @dev Unbonding stake goes first, matured or not, so that nobody escapes by having asked to
    /// leave. The court itself never receives, so that judging cannot be a business.
    /// @return taken What was there to take: `amount`, or all of a smaller stake.
    function slash(address account, uint128 amount, bytes32 caseId, address recipient)
        external
        returns (uint128 taken)
    {
        if (msg.sender != COURT) revert NotCourt(msg.sender);
        if (recipient == address(0) || recipient == address(this) || recipient == msg.sender) {
            revert BadRecipient(recipient);
        }
        Stake storage accused = stakeOf[account];
        uint128 fromUnbonding = amount < accused.unbonding ? amount : accused.unbonding;
        uint128 rest = amount - fromUnbonding;
        uint128 fromActive = rest < accused.active ? rest : accused.active;
        taken = fromUnbonding + fromActive;
        if (taken == 0) revert ZeroAmount();
        accused.unbonding -= fromUnbonding;
        accused.active -= fromActive;
        emit Slashed(account, caseId, recipient, taken);
        TOKEN.safeTransfer(recipient, taken);
    }

    function _stake(uint128 amount) private {
        if (amount == 0) revert ZeroAmount();
        uint128 active = stakeOf[msg.sender].active + amount;
        stakeOf[msg.sender].active = active;
        emit Staked(msg.sender, amount, active);
    }
}
