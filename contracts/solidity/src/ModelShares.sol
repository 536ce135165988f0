// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {ERC1155} from "@openzeppelin/contracts/token/ERC1155/ERC1155.sol";
import {ERC2981} from "@openzeppelin/contracts/token/common/ERC2981.sol";
import {MerkleProof} from "@openzeppelin/contracts/utils/cryptography/MerkleProof.sol";
import {SafeCast} from "@openzeppelin/contracts/utils/math/SafeCast.sol";
import {ICoordinators} from "./interfaces/ICoordinators.sol";
import {TokenPull} from "./TokenPull.sol";

/// @title Shares in the models that jobs made, and the revenue those shares earn.
/// @notice The id of a model is the id of its job as a number. The job's coordinator releases it
/// once: one root of who has how many points, one total. Nothing can dilute a model afterwards.
/// @dev Revenue is divided by the released total, not by the shares minted so far, so whoever mints
/// late has lost nothing and whoever mints early has gained nothing. Nobody owns the contract. The
/// token must neither take a fee on transfer nor rebase.
contract ModelShares is ERC1155, ERC2981 {
    using SafeCast for uint256;
    using SafeERC20 for IERC20;
    using TokenPull for IERC20;

    /// @notice What a coordinator fixes about a model, once.
    /// @param root Merkle root of `leafOf` for every holder.
    /// @param totalPoints The sum of all leaves; the most shares there will ever be.
    /// @param transferable Whether holders may pass shares on; off unless somebody says so.
    /// @param royaltyReceiver Who a market should send the resale royalty of ERC-2981 to.
    /// @param royaltyBps That royalty in hundredths of a percent; zero for none.
    struct Release {
        bytes32 root;
        uint96 totalPoints;
        bool transferable;
        address royaltyReceiver;
        uint96 royaltyBps;
    }

    /// @dev `revenuePerPoint` is scaled by `SCALE`, rounded down at each deposit.
    struct Model {
        bytes32 root;
        uint96 totalPoints;
        uint96 minted;
        bool transferable;
        uint256 revenuePerPoint;
    }

    /// @dev `shift` makes up for points that came or went by transfer: scaled revenue an account is
    /// owed beyond (or, negative, short of) its balance times all revenue since the release.
    struct Holder {
        uint128 minted;
        uint128 withdrawn;
        int256 shift;
    }

    /// @dev Above any total of points, so a deposit loses less than one base unit to rounding.
    uint256 private constant SCALE = 2 ** 96;

    /// @notice The settlement token, in which revenue comes.
    IERC20 public immutable TOKEN;
    /// @notice Who knows each job's coordinator: the job escrow.
    ICoordinators public immutable JOBS;

    mapping(uint256 id => Model) private _models;
    mapping(uint256 id => mapping(address who => Holder)) private _holders;

    event Released(uint256 indexed id, address indexed coordinator, bytes32 root, uint96 totalPoints, bool transferable);
    event RevenueDeposited(uint256 indexed id, address indexed from, uint128 amount);
    event RevenueClaimed(uint256 indexed id, address indexed who, uint128 amount);

    error NotCoordinator(address caller, address coordinator);
    error AlreadyReleased(uint256 id);
    error NotReleased(uint256 id);
    error ZeroPoints();
    error ZeroAmount();
    error BadProof(uint256 id, address who, uint96 cumulativePoints);
    error PointsAboveTotal(uint256 mintedNext, uint96 totalPoints);
    error TransfersLocked(uint256 id);

    constructor(IERC20 token, ICoordinators jobs) ERC1155("") {
        TOKEN = token;
        JOBS = jobs;
    }

    /// @notice Everything the contract holds about a model; all zero for one that is not released.
    function modelOf(uint256 id) external view returns (Model memory) {
        return _models[id];
    }

    /// @notice How many of a model's shares exist now; at most its `totalPoints`.
    function totalSupply(uint256 id) external view returns (uint256) {
        return _models[id].minted;
    }

    /// @notice How many points `who` has minted of a model, wherever the shares are now.
    function mintedOf(uint256 id, address who) external view returns (uint128) {
        return _holders[id][who].minted;
    }

    /// @notice The leaf that entitles `who` to `cumulativePoints` of a model.
    /// @dev Chain, contract and model are part of it, so no leaf serves twice.
    function leafOf(uint256 id, address who, uint96 cumulativePoints) public view returns (bytes32) {
        return keccak256(bytes.concat(keccak256(abi.encode(block.chainid, address(this), id, who, cumulativePoints))));
    }

    /// @notice What `who` can claim of a model's revenue now, rounded down.
    function revenueOwedDown(uint256 id, address who) public view returns (uint128) {
        Holder storage holder = _holders[id][who];
        int256 scaled = (balanceOf(who, id) * _models[id].revenuePerPoint).toInt256() + holder.shift;
        return (uint256(scaled) / SCALE).toUint128() - holder.withdrawn;
    }

    /// @notice Fixes the shares of the model that job `jobId` made; its coordinator only, once.
    function release(bytes32 jobId, Release calldata terms) external {
        address coordinator = JOBS.coordinatorOf(jobId);
        if (msg.sender != coordinator) revert NotCoordinator(msg.sender, coordinator);
        uint256 id = uint256(jobId);
        Model storage model = _models[id];
        if (model.totalPoints != 0) revert AlreadyReleased(id);
        if (terms.totalPoints == 0) revert ZeroPoints();
        model.root = terms.root;
        model.totalPoints = terms.totalPoints;
        model.transferable = terms.transferable;
        if (terms.royaltyBps != 0) _setTokenRoyalty(id, terms.royaltyReceiver, terms.royaltyBps);
        emit Released(id, coordinator, terms.root, terms.totalPoints, terms.transferable);
    }

    /// @notice Mints to `who` what the root says it has beyond what it has minted; anyone may call.
    /// @return points What was minted: zero for a mint made before, so that a retry is harmless.
    function mintByProof(uint256 id, address who, uint96 cumulativePoints, bytes32[] calldata proof)
        external
        returns (uint96 points)
    {
        Model storage model = _released(id);
        if (!MerkleProof.verifyCalldata(proof, model.root, leafOf(id, who, cumulativePoints))) {
            revert BadProof(id, who, cumulativePoints);
        }
        Holder storage holder = _holders[id][who];
        uint256 before = holder.minted;
        if (cumulativePoints <= before) return 0;
        points = uint96(cumulativePoints - before);
        uint256 mintedNext = uint256(model.minted) + points;
        if (mintedNext > model.totalPoints) revert PointsAboveTotal(mintedNext, model.totalPoints);
        holder.minted = cumulativePoints;
        model.minted = uint96(mintedNext);
        _mint(who, id, points, "");
    }

    /// @notice Gives `amount` of the caller's tokens to a model's holders, minted or not, by points.
    function depositRevenue(uint256 id, uint128 amount) external {
        Model storage model = _released(id);
        if (amount == 0) revert ZeroAmount();
        model.revenuePerPoint += amount * SCALE / model.totalPoints;
        emit RevenueDeposited(id, msg.sender, amount);
        TOKEN.pull(amount);
    }

    /// @notice Pays `who` its revenue of a model; anyone may call.
    /// @return amount What was paid: zero when nothing is owed, so that a retry is harmless.
    function claimRevenue(uint256 id, address who) external returns (uint128 amount) {
        amount = revenueOwedDown(id, who);
        if (amount == 0) return 0;
        _holders[id][who].withdrawn += amount;
        emit RevenueClaimed(id, who, amount);
        TOKEN.safeTransfer(who, amount);
    }

    /// @inheritdoc ERC1155
    function supportsInterface(bytes4 interfaceId) public view override(ERC1155, ERC2981) returns (bool) {
        return super.supportsInterface(interfaceId);
    }

    /// @dev A mint shifts nothing: its points count from the release. A transfer moves the points and
    /// leaves the revenue so far with their old holder, to the last fraction.
    function _update(address from, address to, uint256[] memory ids, uint256[] memory values) internal override {
        super._update(from, to, ids, values);
        if (from == address(0)) return;
        for (uint256 i = 0; i < ids.length; ++i) {
            Model storage model = _models[ids[i]];
            if (!model.transferable) revert TransfersLocked(ids[i]);
            int256 earned = (values[i] * model.revenuePerPoint).toInt256();
            _holders[ids[i]][from].shift += earned;
            _holders[ids[i]][to].shift -= earned;
        }
    }

    function _released(uint256 id) private view returns (Model storage model) {
        model = _models[id];
        if (model.totalPoints == 0) revert NotReleased(id);
    }
}
