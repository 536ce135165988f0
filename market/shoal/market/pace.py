"""How long units take: what a lease may last, and when it has lasted too long.

Times are milliseconds of compute for one unit, of accepted results only.
"""

from __future__ import annotations

from collections import deque

from shoal.market.lease import DEADLINE_FACTOR, p90_up
from shoal.protocol.market import TaskKind

_SAMPLES = 50
_OTHERS_FACTOR = 10
"""How much slower than the others' median a node may be at its first lease of a job."""
STRAGGLER_FACTOR = 3
"""A lease this many times longer than expected straggles. Source: docs/architecture, "Market"."""

_Series = dict[str, deque[int]]


class Pace:
    """What has been seen of each job's kinds of work, over all nodes and for each node."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, TaskKind], tuple[deque[int], _Series]] = {}

    def note(self, job_id: str, kind: TaskKind, node: str, unit_ms: int) -> None:
        """An accepted result of ``node`` took ``unit_ms`` for each unit."""
        everybody, by_node = self._seen.setdefault((job_id, kind), (deque(maxlen=_SAMPLES), {}))
        everybody.append(unit_ms)
        by_node.setdefault(node, deque(maxlen=_SAMPLES)).append(unit_ms)

    def forget(self, job_id: str) -> None:
        """The job is over."""
        for kind in TaskKind:
            self._seen.pop((job_id, kind), None)

    def median_unit_ms(self, job_id: str, kind: TaskKind) -> int | None:
        """The median over all nodes; None before the first accepted result."""
        seen = self._seen.get((job_id, kind))
        return sorted(seen[0])[len(seen[0]) // 2] if seen else None

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


def straggles(age_ms: int, expected_ms: int, slack_ms: int) -> bool:
    """Whether a lease of this age has fallen so far behind that another node may try too."""
    return age_ms > STRAGGLER_FACTOR * expected_ms + slack_ms
