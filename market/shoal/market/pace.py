"""How long units take: what a lease may last, and when it has lasted too long.

Times are milliseconds of compute for one unit, of accepted results only; a node's *lag* is what
its leases last beyond computing, mostly for bytes on their way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from itertools import zip_longest

from shoal.market.lease import DEADLINE_FACTOR, p90_up
from shoal.protocol.market import TaskKind

_SAMPLES = 50
_OTHERS_FACTOR = 10
"""How much slower than the others' median a node may be at its first lease of a job."""
_LAGS = 3
"""The median of so many is moved by two in a row, not by one odd lease."""
_LAG_MEMORY = 20
"""A lag counts for so many times its length: to look again, a lease in twenty may be late."""
_LONGEST_LAG_MEMORY_MS = 10_000
"""And no longer: a look costs what a second try takes, not the lag, which may have been a start."""

_SCALE = 10**12

_Series = dict[str, deque[int]]
_Lags = deque[tuple[int, int]]
"""When each was seen, and the lag."""


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """How soon a node would hand something in: what it holds, its lag, and each unit's time.

    Example:
        >>> Outlook(ahead_ms=500, lag_ms=40, unit_ms=2).finish_ms(100)
        740
    """

    ahead_ms: int
    lag_ms: int
    unit_ms: int

    def lease_ms(self, num_units: int) -> int:
        """How long the node takes for a lease of so many units."""
        return self.lag_ms + self.unit_ms * num_units

    def finish_ms(self, num_units: int) -> int:
        """When the node would hand it in, from now."""
        return self.ahead_ms + self.lease_ms(num_units)


def timely_ms(outlooks: Collection[Outlook], *, parcel_units: int, waiting_units: int) -> int:
    """By when a node must hand a parcel in so as to hold nobody up, from now.

    That is when all that waits would be done if it were poured over the nodes like water over
    steps, each lease with its lag, so that all end together; though not before the quickest
    could do one parcel; and one more of its leases later, for parcels are not water.  Whoever
    takes longer, the others could have done the work meanwhile.

    Args:
        outlooks: Of all who can have the parcel, one at least.
        parcel_units: Units of one parcel.
        waiting_units: Units of all that waits.

    Source: the bounds of Graham, "Bounds on multiprocessing timing anomalies", SIAM Journal on
    Applied Mathematics 17 (1969): whoever hands work to who is free first is at most one lease
    behind the best schedule.

    Example:
        >>> nodes = [Outlook(ahead_ms=ahead_ms, lag_ms=0, unit_ms=10) for ahead_ms in (0, 400)]
        >>> timely_ms(nodes, parcel_units=10, waiting_units=60)
        600
    """
    steps = sorted(outlooks, key=lambda outlook: outlook.ahead_ms)
    first_ms = min(step.finish_ms(parcel_units) for step in steps)
    rate = filled = level_ms = 0
    for step, following in zip_longest(steps, steps[1:]):
        speed = _SCALE // max(1, step.lease_ms(parcel_units))
        rate, filled = rate + speed, filled + speed * step.ahead_ms
        level_ms = (waiting_units * _SCALE // parcel_units + filled) // max(1, rate)
        if following is not None and level_ms <= following.ahead_ms:
            break
    return max(level_ms, first_ms) + min(step.lease_ms(parcel_units) for step in steps)


class Pace:
    """What has been seen of each job's kinds of work, over all nodes and for each node."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, TaskKind], tuple[deque[int], _Series]] = {}
        self._medians: dict[tuple[str, TaskKind, str | None], int] = {}
        self._lags: dict[tuple[str, TaskKind], dict[str, _Lags]] = {}

    def note(self, job_id: str, kind: TaskKind, node: str, unit_ms: int) -> None:
        """An accepted result of ``node`` took ``unit_ms`` for each unit."""
        everybody, by_node = self._seen.setdefault((job_id, kind), (deque(maxlen=_SAMPLES), {}))
        own = by_node.setdefault(node, deque(maxlen=_SAMPLES))
        everybody.append(unit_ms)
        own.append(unit_ms)
        # Asked for far more often than noted.
        self._medians[job_id, kind, None] = _median(everybody)
        self._medians[job_id, kind, node] = _median(own)

    def note_lag(self, job_id: str, kind: TaskKind, node: str, lag_ms: int, *, now_ms: int) -> None:
        """A lease of ``node`` lasted ``lag_ms`` beyond its own computing and that before it."""
        by_node = self._lags.setdefault((job_id, kind), {})
        by_node.setdefault(node, deque(maxlen=_LAGS)).append((now_ms, lag_ms))

    def lag_ms(self, job_id: str, kind: TaskKind, node: str, *, now_ms: int) -> int:
        """The node's usual lag; nothing where none is known, or not of late.

        A node that is given no work for its lag shows no other, so a lag is believed for
        twenty times its length only, at most ten seconds, and then seen anew.
        """
        seen = self._lags.get((job_id, kind), {}).get(node, ())
        if not seen:
            return 0
        usual_ms = sorted(lag_ms for _, lag_ms in seen)[(len(seen) - 1) // 2]
        memory_ms = min(_LAG_MEMORY * usual_ms, _LONGEST_LAG_MEMORY_MS)
        return usual_ms if now_ms - seen[-1][0] <= memory_ms else 0

    def forget(self, job_id: str) -> None:
        """The job is over."""
        for kind in TaskKind:
            self._lags.pop((job_id, kind), None)
            _, by_node = self._seen.pop((job_id, kind), (None, {}))
            for node in (None, *by_node):
                self._medians.pop((job_id, kind, node), None)

    def median_unit_ms(self, job_id: str, kind: TaskKind) -> int | None:
        """The median over all nodes; None before the first accepted result."""
        return self._medians.get((job_id, kind, None))

    def unit_ms(self, job_id: str, kind: TaskKind, node: str) -> int | None:
        """The node's own median, or that over all nodes while it has none."""
        own_ms = self._medians.get((job_id, kind, node))
        return self.median_unit_ms(job_id, kind) if own_ms is None else own_ms

    def samples(self, job_id: str, kind: TaskKind, node: str) -> tuple[int, ...]:
        """The node's own latest times."""
        seen = self._seen.get((job_id, kind))
        return tuple(seen[1].get(node, ())) if seen else ()

    def allowance_ms(
        self,
        job_id: str,
        kind: TaskKind,
        node: str,
        num_units: int,
        *,
        backlog_ms: int,
        first_ms: int,
    ) -> int:
        """How long the node may take for ``num_units`` behind ``backlog_ms`` of other work.

        3 × p90 of its own times; before it has any, ten times the others' median; before
        anybody has, ``first_ms``.
        """
        own = self.samples(job_id, kind, node)
        if own:
            return DEADLINE_FACTOR * (p90_up(own) * num_units + backlog_ms)
        median = self.median_unit_ms(job_id, kind)
        if median is None:
            return first_ms + DEADLINE_FACTOR * backlog_ms
        return _OTHERS_FACTOR * median * num_units + DEADLINE_FACTOR * backlog_ms


def remaining_ms(age_ms: int, due_ms: int) -> int:
    """How long a lease of this age is expected to last yet, where ``due_ms`` was expected of it.

    One that is late is taken to need as long again as it is late: whoever waits so long for what
    may never come, and then pays for another way, never spends more than twice what was needed.

    Source: Karlin, Manasse, Rudolph and Sleator, "Competitive snoopy caching", Algorithmica 3
    (1988), section 2, for renting and buying.

    Example:
        >>> remaining_ms(100, 300), remaining_ms(700, 300)
        (200, 400)
    """
    return abs(due_ms - age_ms)


def _median(times: Collection[int]) -> int:
    """The upper one of an even number."""
    return sorted(times)[len(times) // 2]
