"""Work that wants a worker: one lot, cut into parcels, and how to make a task of each."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from shoal.market.ladder import is_tail
from shoal.orchestrator.placement import Parcel, Placement
from shoal.orchestrator.store.tables import Base
from shoal.protocol.certificate import ClearingCertificate, ReserveTerms
from shoal.protocol.errors import ShoalError
from shoal.protocol.job import VerifySpec
from shoal.protocol.market import Lease, Lot, TaskKind
from shoal.protocol.result import Result
from shoal.protocol.signing import Signed
from shoal.protocol.task import Task

_URGENCY = {TaskKind.GRADIENT: 0, TaskKind.EVALUATE: 1, TaskKind.ROLLOUT: 2}


def parcels_of(units: Sequence[int], parcel_units: int) -> list[Parcel]:
    """The units in order, ``parcel_units`` to a parcel, the last perhaps smaller."""
    return [
        tuple(units[first : first + parcel_units]) for first in range(0, len(units), parcel_units)
    ]


def work_name(kind: TaskKind, base_sha256: str, max_tokens: int, group_size: int) -> str:
    """What makes the times of units comparable, in a word.

    Example:
        >>> work_name(TaskKind.ROLLOUT, "ab" * 32, 512, 8)
        'rollout:abababababababab:512:8'
    """
    return f"{kind.value}:{base_sha256[:16]}:{max_tokens}:{group_size}"


async def _at_once() -> None:
    """Nothing has to be kept."""


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """Accepted work: the units done, and the verified payload."""

    units: Parcel
    task: Task
    lease: Signed[Lease]
    result: Result
    payload: object
    statement_sha256: str


@dataclass(kw_only=True)
class Workload:
    """A lot whose parcels are handed out, and come back on failure, until all are delivered.

    ``build_task`` makes the task of a parcel; ``deliver`` takes accepted work; ``abandon`` is
    told when a parcel has failed too often to go on.  Nothing of a ``closed`` workload is
    handed out any more.  A parcel is delivered once, however many leases it had.

    ``work`` names what makes the times of its units comparable (`work_name`).  ``placement``
    is the lot's present clearing, absent before the first; ``certified`` holds the digests of
    all its certificates.  ``unwritten`` are the rows of lot and certificates that the database
    does not have yet: they are written with the next lease, and soon without one.  ``untold``
    are the certificates nobody was told of: that waits until they are written.
    ``handed_out`` is set once a worker has taken the last of its parcels that waited.
    ``restorable`` is awaited before any verdict on its results: it returns once a kill would not
    lose the policy version they are of, and raises Unavailable if that can never be;
    ``is_restorable`` says whether it does so at once.
    """

    lot: Lot
    work: str
    reserve: ReserveTerms
    build_task: Callable[[Parcel], Awaitable[Task]]
    deliver: Callable[[Delivery], Awaitable[None]]
    abandon: Callable[[ShoalError], None]
    max_result_bytes: Callable[[int], int]
    verify: VerifySpec
    waiting: list[Parcel]
    restorable: Callable[[], Awaitable[None]] = _at_once
    is_restorable: Callable[[], bool] = lambda: True
    requester: str = ""
    delay_micros_per_s: int = 0
    placement: Placement | None = None
    certified: set[str] = field(default_factory=set)
    unwritten: list[Base] = field(default_factory=list)
    untold: list[Signed[ClearingCertificate]] = field(default_factory=list)
    attempts: Counter[int] = field(default_factory=Counter)
    undelivered: set[Parcel] = field(default_factory=set)
    handed_out: asyncio.Event = field(default_factory=asyncio.Event)
    closed: bool = False

    def __post_init__(self) -> None:
        self.undelivered = set(self.waiting)

    @property
    def kind(self) -> TaskKind:
        """The kind of task its units become."""
        return self.lot.lot_class.kind

    def order(self) -> tuple[int, int]:
        """Sorts workloads: what the learner waits for goes first, then older epochs."""
        return _URGENCY[self.kind], self.lot.epoch

    @property
    def is_tail(self) -> bool:
        """Whether nothing waits and so little is under way that it is done twice."""
        if self.waiting:
            return False
        return is_tail(sum(map(len, self.undelivered)), self.lot.num_units)

    @property
    def owes_record(self) -> bool:
        """Whether lot or certificates are not yet on record, or not yet announced."""
        return bool(self.unwritten or self.untold)

    async def accept(self, delivery: Delivery) -> None:
        """Hands accepted work to whoever wanted it, the first time it comes."""
        if delivery.units in self.undelivered:
            self.undelivered.remove(delivery.units)
            self.waiting = [parcel for parcel in self.waiting if parcel != delivery.units]
            await self.deliver(delivery)

    def take(self, parcel: Parcel) -> None:
        """Removes ``parcel`` from those waiting."""
        self.waiting.remove(parcel)
        self.attempts.update(parcel)

    def give_back(self, parcel: Parcel, *, failed: bool) -> None:
        """Returns a parcel nobody delivered; a refusal is no failure of its units."""
        if not failed:
            self.attempts.subtract(parcel)
        if parcel in self.undelivered:
            self.waiting = sorted({*self.waiting, parcel})


class Market(Protocol):
    """Where workloads are sold."""

    async def open(self, workload: Workload) -> None:
        """Offers what is waiting of the workload."""
