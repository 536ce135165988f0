"""The batch auction: one lot, all standing bids, one deterministic clearing.

Units go to bids in ascending ``(price, keccak(seed ‖ bid digest))``, each winner paid its
own price for every accepted unit (pay-as-bid).  Anyone who holds the lot, the bids, the
units in flight and the seed recomputes the same clearing, in whatever order the bids came.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum

from eth_utils.crypto import keccak
from pydantic import Field

from shoal.market.book import StandingBid
from shoal.protocol.errors import InvalidRequest
from shoal.protocol.ids import Account, Digest, Hex32, PeerIdStr, Sha256, ShortId
from shoal.protocol.market import MAX_UNITS, Award, Lot, TaskKind
from shoal.protocol.record import Record

SEED_BYTES = 32


class RejectReason(StrEnum):
    """Why a bid won nothing of a lot; the first that applies, in this order."""

    NOT_COVERED = "not_covered"
    EXPIRED = "expired"
    ABOVE_RESERVE = "above_reserve"
    TASK_TOO_LARGE = "task_too_large"
    NO_CAPACITY = "no_capacity"
    OUTBID = "outbid"


class Rejection(Record):
    """One bid that won nothing, and why.  Writer: the auction.  Reader: the provider."""

    bid_sha256: Sha256
    node: PeerIdStr
    reason: RejectReason


class Clearing(Record):
    """The outcome of one lot's auction.

    Writer: the auction.  Reader: the dispatcher, bidders, whoever replays it.  ``awards`` are
    in the order in which units were given; ``rejected`` is in digest order.
    """

    lot_id: ShortId
    seed: Hex32
    awards: tuple[Award, ...]
    unfilled_units: int = Field(ge=0, le=MAX_UNITS)
    rejected: tuple[Rejection, ...]


def tie_break(seed: bytes, bid_sha256: Digest) -> bytes:
    """``keccak(seed ‖ bid digest)``, which orders bids of equal price.

    Source: docs/architecture, "Market"; the digest is the SHA-256 of the bid's canonical form.
    """
    return keccak(seed + bytes.fromhex(bid_sha256))


def clear(
    lot: Lot,
    book: Sequence[StandingBid],
    *,
    in_flight: Mapping[tuple[str, TaskKind], int],
    seed: bytes,
    now_ms: int,
    task_sizes: Sequence[int] | None = None,
) -> Clearing:
    """The lot's units are awarded to the cheapest bids that can do them.

    A bid wins, in the order of ``task_sizes``, each task left that still fits its room:
    capacity less the units its node holds of this kind.  A node with several matching bids
    shares one count of units in flight among them.  A bid that appears twice counts once.

    Args:
        lot: What is auctioned.
        book: Standing bids; those that do not match are rejected with a reason.
        in_flight: Units each (node, kind) holds now; absent means none.
        seed: 32 bytes that no bidder knew when bidding.
        now_ms: The orchestrator's time.
        task_sizes: How many units each task has, which go to one holder together; absent
            means tasks of one unit.

    Raises:
        InvalidRequest: ``seed`` is not 32 bytes, or the tasks are not the lot.
    """
    if len(seed) != SEED_BYTES:
        raise InvalidRequest(
            f"An auction's seed is {SEED_BYTES} bytes, not {len(seed)}.", code="bad_seed"
        )
    sizes = [1] * lot.num_units if task_sizes is None else list(task_sizes)
    if sum(sizes) != lot.num_units or min(sizes) < 1:
        raise InvalidRequest(
            f"Lot {lot.lot_id} has {lot.num_units} units and its tasks {sum(sizes)}; plan lots "
            "of whole tasks.",
            code="ragged_lot",
        )
    unique = {entry.sha256: entry for entry in book}
    smallest = min(sizes)
    refused = {digest: _unfit(lot, entry, smallest, now_ms) for digest, entry in unique.items()}
    ladder = sorted(
        (unique[digest] for digest, reason in refused.items() if reason is None),
        key=lambda entry: (entry.bid.price_micros, tie_break(seed, entry.sha256)),
    )
    awards, losers = _fill(lot, ladder, in_flight, sizes)
    reasons = {digest: reason for digest, reason in refused.items() if reason} | losers
    return Clearing(
        lot_id=lot.lot_id,
        seed="0x" + seed.hex(),
        awards=awards,
        unfilled_units=sum(sizes),
        rejected=tuple(
            Rejection(bid_sha256=digest, node=unique[digest].bid.node, reason=reasons[digest])
            for digest in sorted(reasons)
        ),
    )


def _unfit(lot: Lot, entry: StandingBid, smallest: int, now_ms: int) -> RejectReason | None:
    """Why the bid cannot compete for the lot at all."""
    bid = entry.bid
    if bid.kind is not lot.lot_class.kind or not bid.covers(lot.job_id, lot.epoch):
        return RejectReason.NOT_COVERED
    if bid.valid_until_ms <= now_ms:
        return RejectReason.EXPIRED
    if bid.price_micros > lot.reserve_micros:
        return RejectReason.ABOVE_RESERVE
    if bid.capacity < smallest:
        return RejectReason.TASK_TOO_LARGE
    return None


def _fill(
    lot: Lot,
    ladder: Sequence[StandingBid],
    in_flight: Mapping[tuple[str, TaskKind], int],
    sizes: list[int],
) -> tuple[tuple[Award, ...], dict[Digest, RejectReason]]:
    """Awards down the ladder, and the reasons of those left out; leaves the rest in ``sizes``."""
    kind = lot.lot_class.kind
    held: dict[str, int] = {}
    awards: list[Award] = []
    losers: dict[Digest, RejectReason] = {}
    for entry in ladder:
        bid = entry.bid
        busy = held.get(bid.node, in_flight.get((bid.node, kind), 0))
        if not sizes:
            full = bid.capacity <= busy
            losers[entry.sha256] = RejectReason.NO_CAPACITY if full else RejectReason.OUTBID
            continue
        units = _take_fitting(sizes, bid.capacity - busy)
        if not units:
            losers[entry.sha256] = RejectReason.NO_CAPACITY
            continue
        held[bid.node] = busy + units
        awards.append(
            Award(
                lot_id=lot.lot_id,
                bid_sha256=entry.sha256,
                account=Account(bid.account),
                node=bid.node,
                num_units=units,
                unit_price_micros=bid.price_micros,
            )
        )
    return tuple(awards), losers


def _take_fitting(sizes: list[int], room: int) -> int:
    """Removes, in order, each task that fits what is left of ``room``; the units removed."""
    left = room
    kept = []
    for size in sizes:
        if size <= left:
            left -= size
        else:
            kept.append(size)
    sizes[:] = kept
    return room - left
