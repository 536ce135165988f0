"""Units of work that want a worker: one lot, and how to make a task of some of its units."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from shoal.protocol.errors import ShoalError
from shoal.protocol.job import VerifySpec
from shoal.protocol.market import Lease, Lot, TaskKind
from shoal.protocol.result import Result
from shoal.protocol.signing import Signed
from shoal.protocol.task import Task

_URGENCY = {TaskKind.GRADIENT: 0, TaskKind.EVALUATE: 1, TaskKind.ROLLOUT: 2}


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """Accepted work: the units done, and the verified payload."""

    units: tuple[int, ...]
    task: Task
    lease: Signed[Lease]
    result: Result
    payload: object
    statement_sha256: str


@dataclass(kw_only=True)
class Workload:
    """A lot whose units are handed out, and come back on failure, until all are delivered.

    ``build_task`` makes the task for some unit numbers; ``deliver`` takes accepted work;
    ``abandon`` is told when a unit has failed too often to go on.  Nothing of a ``closed``
    workload is handed out any more.
    """

    lot: Lot
    max_reserve_micros: int
    build_task: Callable[[Sequence[int]], Awaitable[Task]]
    deliver: Callable[[Delivery], Awaitable[None]]
    abandon: Callable[[ShoalError], None]
    max_result_bytes: Callable[[int], int]
    verify: VerifySpec
    waiting: list[int]
    attempts: Counter[int] = field(default_factory=Counter)
    failures: int = 0
    undelivered: int = 0
    closed: bool = False

    def __post_init__(self) -> None:
        self.undelivered = len(self.waiting)

    @property
    def kind(self) -> TaskKind:
        """The kind of task its units become."""
        return self.lot.lot_class.kind

    def order(self) -> tuple[int, int]:
        """Sorts workloads: what the learner waits for goes first, then older epochs."""
        return _URGENCY[self.kind], self.lot.epoch

    async def accept(self, delivery: Delivery) -> None:
        """Hands accepted work to whoever wanted it."""
        self.undelivered -= len(delivery.units)
        await self.deliver(delivery)

    def take(self, count: int) -> tuple[int, ...]:
        """Removes ``count`` units from those waiting."""
        taken, self.waiting = tuple(self.waiting[:count]), self.waiting[count:]
        self.attempts.update(taken)
        return taken

    def give_back(self, units: Sequence[int], *, failed: bool) -> None:
        """Returns units nobody delivered; a refusal is no failure of the unit."""
        if failed:
            self.failures += 1
        else:
            self.attempts.subtract(units)
        self.waiting = sorted({*self.waiting, *units})
