"""The figures behind a worker's idle reason: how far it is from the work that comes nearest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shoal.market.clearing import Refusal
from shoal.orchestrator.outlooks import Outlooks
from shoal.orchestrator.placement import Placement
from shoal.orchestrator.roster import Member
from shoal.orchestrator.track_record import TrackRecord
from shoal.orchestrator.workload import Workload
from shoal.protocol.market import ANY_JOB, Bid
from shoal.protocol.node import IdleDetail, IdleReason

Standing = tuple[Bid, bytes]
"""A bid in the book, with its digest."""


class Nearness:
    """How near one worker is to the open work.

    Args:
        node: The worker's node.
        member: The worker; absent when it has not joined since the process started.
        standing: Its bids in the present book.
        workloads: What is open.
        record: Stake and pauses.
        outlooks: How soon it would hand in.
    """

    def __init__(
        self,
        node: str,
        member: Member | None,
        standing: Sequence[Standing],
        workloads: Iterable[Workload],
        record: TrackRecord,
        outlooks: Outlooks,
    ) -> None:
        self._node = node
        self._member = member
        self._record = record
        self._outlooks = outlooks
        self._pairs = [
            (bid, digest, workload, workload.placement)
            for workload in workloads
            if workload.placement is not None and workload.undelivered
            for bid, digest in standing
            if bid.kind is workload.kind and bid.job_id in (workload.lot.job_id, ANY_JOB)
        ]

    def detail(self, reason: IdleReason) -> IdleDetail | None:
        """The figures that explain ``reason``; None where it has none."""
        match reason:
            case IdleReason.PAUSED:
                return IdleDetail(wait_ms=self._record.out_for_ms(self._node))
            case IdleReason.OUTBID:
                return self._outbid()
            case IdleReason.TOO_SLOW:
                return self._too_slow()
            case IdleReason.ABOVE_RESERVE:
                return self._too_dear()
            case IdleReason.TASK_TOO_LARGE:
                return self._too_large()
            case IdleReason.STAKE_TOO_SMALL:
                return self._unbacked()
            case _:
                return None

    def _outbid(self) -> IdleDetail | None:
        places = [
            (place, len(placement.ladder), bid)
            for bid, _, _, placement in self._pairs
            if (place := placement.ladder.place_of(self._node)) is not None
        ]
        if not places:
            return None
        place, count, bid = min(places, key=lambda found: found[0])
        return IdleDetail(
            kind=bid.kind,
            place=place + 1,
            places=max(count, place + 1),
            price_micros=bid.price_micros,
        )

    def _too_slow(self) -> IdleDetail | None:
        times = [
            (*self._outlooks.times_ms(workload, self._node), bid)
            for bid, _, workload, placement in self._pairs
            if self._node in placement.ladder.nodes
        ]
        if not times:
            return None
        task_ms, usual_ms, bid = min(times, key=lambda found: found[0] - found[1])
        return IdleDetail(kind=bid.kind, task_ms=task_ms, usual_ms=usual_ms)

    def _too_dear(self) -> IdleDetail | None:
        limits = [
            (_limit(workload, placement, digest) - bid.price_micros, bid)
            for bid, digest, workload, placement in self._pairs
            if digest in placement.refused
        ]
        if not limits:
            return None
        distance, bid = max(limits, key=lambda found: found[0])
        return IdleDetail(
            kind=bid.kind,
            limit_micros=bid.price_micros + distance,
            price_micros=bid.price_micros,
        )

    def _too_large(self) -> IdleDetail | None:
        sizes = [
            (min(map(len, workload.undelivered)) - bid.capacity, bid)
            for bid, _, workload, _ in self._pairs
        ]
        if not sizes:
            return None
        distance, bid = min(sizes, key=lambda found: found[0])
        return IdleDetail(
            kind=bid.kind,
            task_units=max(0, bid.capacity + distance),
            capacity_units=bid.capacity,
        )

    def _unbacked(self) -> IdleDetail | None:
        if self._member is None:
            return None
        free = self._member.stake_micros - self._record.backed_micros(self._member.account)
        needs = [
            (self._record.backing_micros(workload, min(map(len, workload.undelivered))), bid)
            for bid, _, workload, _ in self._pairs
        ]
        if not needs:
            return None
        needed, bid = min(needs, key=lambda found: found[0])
        return IdleDetail(kind=bid.kind, needed_stake_micros=needed, free_stake_micros=max(0, free))


def _limit(workload: Workload, placement: Placement, digest: bytes) -> int:
    """The most that a unit of the workload may cost, as the bid met it."""
    if placement.refused[digest] is Refusal.ABOVE_POSTED_PRICE:
        return placement.certificate.record.clearing_price_micros
    return workload.reserve.reserve_micros
