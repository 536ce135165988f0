"""The sealed auction: one lot, the frozen book of its epoch, one ladder.

Eligible bids stand in ascending ``(price + handicap, keccak(seed ‖ bid digest))``.  Down that
ladder each bid wins whole parcels up to its room; a lot is cleared once, and whoever holds the
book, the terms and the seed computes the same ladder.

Source: docs/architecture, "Market".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from shoal.market.filling import Demand, Room, fill
from shoal.market.frozen import FrozenBook, Ints, Mask, TermsTable
from shoal.market.pricing import MIN_AUCTION_BIDDERS, UNIFORM_BIDDERS, choose_rule
from shoal.protocol.canonical import digest_of, sha256_hex
from shoal.protocol.certificate import ClearingRule, Parcels, Rung, SeedParts
from shoal.protocol.errors import InvalidRequest
from shoal.protocol.ids import Digest
from shoal.protocol.market import Lot
from shoal.protocol.merkle import MerkleTree, hex32, keccak, unhex

RULE_VERSION = 1
NEWCOMER_SHARE_PERMILLE = 50
NEWCOMER_RECEIPTS = 50
STANDBY_SHARE_PERMILLE = 200
_WORD = 32
_NO_CAP = 2**62


class Refusal(StrEnum):
    """Why a bid for a lot is not on its ladder; the first that applies, in this order."""

    EXPIRED = "expired"
    UNSTAKED = "unstaked"
    ABOVE_RESERVE = "above_reserve"
    TASK_TOO_LARGE = "task_too_large"
    STAKE_TOO_SMALL = "stake_too_small"
    ABOVE_POSTED_PRICE = "above_posted_price"


@dataclass(frozen=True, kw_only=True)
class Auction:
    """What is auctioned, under which constants.

    ``posted_micros`` is the adjusted price in force should the posted rule apply.
    ``provider_cap_permille`` is the largest share of the lot one account may win; absent
    leaves it open, which is the rule: a tight cap costs the requester more than it protects.
    """

    lot: Lot
    parcels: tuple[Parcels, ...]
    posted_micros: int
    provider_cap_permille: int | None = None


def code_sha256(provider_cap_permille: int | None = None) -> Digest:
    """The digest that names the clearing rule with its constants."""
    return digest_of(
        {
            "rule": "shoal.market.clearing",
            "version": RULE_VERSION,
            "min_auction_bidders": MIN_AUCTION_BIDDERS,
            "uniform_bidders": UNIFORM_BIDDERS,
            "newcomer_share_permille": NEWCOMER_SHARE_PERMILLE,
            "newcomer_receipts": NEWCOMER_RECEIPTS,
            "standby_share_permille": STANDBY_SHARE_PERMILLE,
            "provider_cap_permille": provider_cap_permille,
        }
    )


def parcels_of(task_sizes: Sequence[int]) -> tuple[Parcels, ...]:
    """The tasks of a lot by size, largest first."""
    sizes, counts = np.unique(np.asarray(task_sizes, dtype=np.int64), return_counts=True)
    pairs = zip(sizes.tolist(), counts.tolist(), strict=True)
    return tuple(Parcels(num_units=size, count=count) for size, count in sorted(pairs)[::-1])


def seed_of(parts: SeedParts, lot_id: str) -> bytes:
    """``keccak256(commit root ‖ salts' hash ‖ block hash ‖ lot id)``."""
    fixed = (parts.commit_root, parts.salts_hash, parts.block_hash)
    return keccak(b"".join(map(unhex, fixed)) + lot_id.encode())


class Ladder:
    """The rungs of one clearing, as columns from the first to the last.

    Records are made only of the rungs that are asked for.
    """

    def __init__(self, book: FrozenBook, bids: Ints, *, sigma: Ints, pay: Ints, won: Won) -> None:
        self._book = book
        self._bids = bids
        self._price = book.price_micros[bids]
        self._handicap = sigma - self._price
        self._pay = pay
        self._won = won

    def __len__(self) -> int:
        return len(self._bids)

    @property
    def num_units(self) -> Ints:
        """The units each rung won or stands by for."""
        return self._won.units

    def rung(self, place: int) -> Rung:
        """The rung at ``place``, from 0."""
        entry = self._book.opened[int(self._bids[place])]
        return Rung(
            rung=place,
            bid_digest=hex32(entry.digest),
            account=entry.bid.account,
            node=entry.bid.node,
            price_micros=int(self._price[place]),
            handicap_micros=int(self._handicap[place]),
            pay_micros=int(self._pay[place]),
            num_units=int(self._won.units[place]),
            room_units=int(self._won.room[place]),
            standby=bool(self._won.standby[place]),
        )

    def rungs(self) -> tuple[Rung, ...]:
        """Every rung, from the first to be given work to the last."""
        return tuple(self.rung(place) for place in range(len(self)))

    def tree(self) -> MerkleTree:
        """The tree over `allocation_leaf` of every rung."""
        count = len(self)
        words = np.zeros((count, 8, _WORD), dtype=np.uint8)
        numbers = (0, np.arange(count)), (1, count), (4, self._price), (5, self._handicap)
        for column, values in (*numbers, (6, self._pay), (7, self._won.units)):
            big_endian = np.broadcast_to(np.asarray(values, dtype=">u8"), (count,)).copy()
            words[:, column, -8:] = big_endian.view(np.uint8).reshape(count, 8)
        words[:, 2] = self._book.digest_bytes[self._bids]
        words[:, 3, -20:] = self._book.account_bytes[self._bids]
        encoded, size = words.tobytes(), 8 * _WORD
        return MerkleTree(
            [keccak(keccak(encoded[at : at + size])) for at in range(0, len(encoded), size)]
        )


@dataclass(frozen=True, kw_only=True)
class Won:
    """What each rung has: units, the room they were taken from, and whether it stands by."""

    units: Ints
    room: Ints
    standby: Mask


@dataclass(frozen=True, kw_only=True)
class Cleared:
    """The outcome of one lot's auction, before it is certified.

    ``supply_units`` is what all eligible bids could have done, which moves a posted price.
    """

    auction: Auction
    ladder: Ladder
    refused: tuple[tuple[bytes, Refusal], ...]
    rule: ClearingRule
    num_bidders: int
    clearing_price_micros: int
    unfilled_units: int
    supply_units: int

    def refused_sha256(self) -> Digest:
        """The digest of every refusal, in the order of commitments."""
        return sha256_hex(b"".join(digest + str(why).encode() for digest, why in self.refused))


def clear_lot(
    auction: Auction, book: FrozenBook, terms: TermsTable, *, seed: bytes, now_ms: int
) -> Cleared:
    """The lot's parcels are awarded down the ladder of its eligible bids.

    A bid's room is its capacity, bounded by what its account's stake backs and, across all
    bids of a node, by the node's largest capacity.  What a node holds already does not
    count: the ladder stands for as long as the lot does, and the dispatcher passes over whoever
    is busy just then.

    Args:
        auction: What is auctioned.
        book: The bids of the epoch; those that do not name the lot's kind and job are no part.
        terms: What receipts and stake say of the bidders.
        seed: 32 bytes that nobody knew when bidding (`seed_of`).
        now_ms: When the certificate is issued; bids past their end are out.

    Raises:
        InvalidRequest: the parcels are not the lot.
    """
    _require_whole(auction)
    sigma = book.price_micros + terms.handicap_micros(book)
    codes = _refusals(auction, book, terms, sigma, now_ms)
    eligible = np.flatnonzero(codes == 0)
    num_bidders = len(np.unique(book.account[eligible]))
    rule = choose_rule(num_bidders)
    if rule is ClearingRule.POSTED:
        codes[eligible[sigma[eligible] > _posted(auction)]] = _CODES[Refusal.ABOVE_POSTED_PRICE]
        eligible = np.flatnonzero(codes == 0)
    order = _ordered(eligible, sigma, book, seed, by_price=rule is not ClearingRule.POSTED)
    won, unfilled, price = _award(auction, book, terms, order, sigma[order], seed)
    if rule is ClearingRule.POSTED:
        price = _posted(auction)
    pay = _pay(rule, book.price_micros[order], sigma[order], price, won.standby | (won.units == 0))
    return Cleared(
        auction=auction,
        ladder=Ladder(book, order, sigma=sigma[order], pay=pay, won=won),
        refused=_named_refusals(codes, book),
        rule=rule,
        num_bidders=num_bidders,
        clearing_price_micros=price,
        unfilled_units=unfilled,
        supply_units=_supply(book.node[order], won.room),
    )


_ELIGIBLE, _NOT_COVERED = 0, -1
_CODES = {reason: number for number, reason in enumerate(Refusal, start=1)}
_REASONS = {number: reason for reason, number in _CODES.items()}


def _refusals(
    auction: Auction, book: FrozenBook, terms: TermsTable, sigma: Ints, now_ms: int
) -> Ints:
    """One code for each bid: 0 for those that may win."""
    smallest = min(parcel.num_units for parcel in auction.parcels)
    rules: list[tuple[Mask, int]] = [
        (~book.covers(auction.lot), _NOT_COVERED),
        (book.lapsed(now_ms), _CODES[Refusal.EXPIRED]),
        (~terms.staked(book), _CODES[Refusal.UNSTAKED]),
        (sigma > auction.lot.reserve_micros, _CODES[Refusal.ABOVE_RESERVE]),
        (book.capacity < smallest, _CODES[Refusal.TASK_TOO_LARGE]),
        (terms.bound_units(book) < smallest, _CODES[Refusal.STAKE_TOO_SMALL]),
    ]
    codes = np.select([mask for mask, _ in rules], [code for _, code in rules], _ELIGIBLE)
    return codes.astype(np.int64)


def _named_refusals(codes: Ints, book: FrozenBook) -> tuple[tuple[bytes, Refusal], ...]:
    places = np.flatnonzero(codes > 0)
    pairs = zip(places.tolist(), codes[places].tolist(), strict=True)
    return tuple((book.digests[place], _REASONS[code]) for place, code in pairs)


def _ordered(eligible: Ints, sigma: Ints, book: FrozenBook, seed: bytes, *, by_price: bool) -> Ints:
    """The eligible bids in the order of their rungs.

    Under a posted price everyone who accepts it is equal, and lots decide: an order by price
    would reward bids below one's own cost.
    """
    ties = [keccak(seed + book.digests[place]) for place in eligible.tolist()]
    limbs = np.frombuffer(b"".join(ties), dtype=">u8").astype(np.uint64).reshape(-1, 4)
    price = sigma[eligible] if by_price else np.zeros_like(eligible)
    # The last key counts first.
    return eligible[np.lexsort((*limbs.T[::-1], price))]


def _award(
    auction: Auction,
    book: FrozenBook,
    terms: TermsTable,
    order: Ints,
    sigma: Ints,
    seed: bytes,
) -> tuple[Won, int, int]:
    """What each rung has, the units left over, and the adjusted price of the next unit.

    That price is the first rung's that has room for one more parcel, and the reserve if none
    has.
    """
    lot = auction.lot
    cap = auction.provider_cap_permille
    cap_units = _NO_CAP if cap is None else -(-lot.num_units * cap // 1_000)
    room = Room(
        capacity=book.capacity[order].tolist(),
        bound=np.minimum(terms.bound_units(book)[order], cap_units).tolist(),
        node=book.node[order].tolist(),
        account=book.account[order].tolist(),
    )
    newcomer = (terms.num_receipts(book)[order] < NEWCOMER_RECEIPTS).tolist()
    demand = Demand({parcel.num_units: parcel.count for parcel in auction.parcels})
    outcome = fill(
        demand,
        room,
        newcomer=newcomer,
        newcomer_parcels=_newcomer_parcels(demand.num_parcels, seed),
        standby_units=max(
            lot.num_units * STANDBY_SHARE_PERMILLE // 1_000, auction.parcels[0].num_units
        ),
    )
    next_rung = outcome.next_rung
    price = lot.reserve_micros if next_rung is None else int(sigma[next_rung])
    won = Won(
        units=np.array(outcome.units, dtype=np.int64),
        room=np.minimum(room.capacity, room.bound).astype(np.int64),
        standby=np.array(outcome.standby, dtype=np.bool_),
    )
    return won, outcome.unfilled_units, price


def _newcomer_parcels(num_parcels: int, seed: bytes) -> int:
    """Newcomers' share of the parcels; what is less than one is drawn by lot from the seed.

    Otherwise small lots, which are most of them, would never have a place for newcomers.
    """
    draw = int.from_bytes(keccak(seed + b"newcomers"), "big") % 1_000
    return (num_parcels * NEWCOMER_SHARE_PERMILLE + draw) // 1_000


def _pay(rule: ClearingRule, bid: Ints, sigma: Ints, price: int, own: Mask) -> Ints:
    """What each rung is paid for an accepted unit; its own bid where ``own``.

    Source: docs/architecture, "Market": R1 ``p``, R2 ``max(p, σ* − h)``, posted ``P − h``.
    """
    handicap = sigma - bid
    if rule is ClearingRule.POSTED:
        return price - handicap
    if rule is ClearingRule.PAY_AS_BID:
        return bid
    return np.where(own, bid, np.maximum(bid, price - handicap))


def _supply(node: Ints, room: Ints) -> int:
    """What all rungs could hold at once; bids of one node share its room."""
    best = np.zeros(int(node.max(initial=-1)) + 1, dtype=np.int64)
    np.maximum.at(best, node, room)
    return int(best.sum())


def _posted(auction: Auction) -> int:
    return min(auction.posted_micros, auction.lot.reserve_micros)


def _require_whole(auction: Auction) -> None:
    total = sum(parcel.num_units * parcel.count for parcel in auction.parcels)
    sizes = [parcel.num_units for parcel in auction.parcels]
    if total != auction.lot.num_units or sizes != sorted(set(sizes), reverse=True):
        raise InvalidRequest(
            f"Lot {auction.lot.lot_id} has {auction.lot.num_units} units and its tasks {total}; "
            "plan lots of whole tasks, each size once, the largest first.",
            code="ragged_lot",
        )
