"""How long a node that broke its word is left out: longer with each time, less as time passes.

A promise is broken by a lease refused, run out, given back for a fault of the node, or
rejected.  Each broken promise leaves the node out for ten seconds, doubled with every other
one of the last three hours, up to ten minutes; four kept promises make up for one broken, so
that alternating the two does not keep the pause short.

It is a function of the set of outcomes alone: whoever holds them finds the same pause, in
whatever order they were noted.

Source: docs/architecture, "Reputation".
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from shoal.market.pause import FIRST_PAUSE_MS, LONGEST_PAUSE_MS
from shoal.market.reputation import Outcome

WINDOW_MS = 3 * 3_600_000
KEPT_FOR_ONE_BROKEN = 4
_MAX_DOUBLINGS = 16
_KEPT_MS = WINDOW_MS + LONGEST_PAUSE_MS
"""What is older than this cannot bear on a pause that is not over."""


@dataclass(slots=True)
class _Promises:
    """When a node's latest leases ended, in order, by whether it did what it promised."""

    kept: list[int] = field(default_factory=list)
    broken: list[int] = field(default_factory=list)

    def newest_ms(self) -> int:
        return max([*self.kept[-1:], *self.broken[-1:]])


class Cooldown:
    """The pauses of all nodes.

    Example:
        >>> Cooldown().until_ms("a node that has done nothing")
        0
    """

    def __init__(self, outcomes: Iterable[Outcome] = ()) -> None:
        self._promises: dict[str, _Promises] = {}
        for outcome in outcomes:
            self.note(outcome)

    def note(self, outcome: Outcome) -> None:
        """The outcome counts; the caller notes each lease once, when it ends."""
        promises = self._promises.setdefault(outcome.node, _Promises())
        times = promises.broken if outcome.ending.is_broken_promise else promises.kept
        insort(times, outcome.ended_at_ms)
        oldest_ms = promises.newest_ms() - _KEPT_MS
        for held in (promises.kept, promises.broken):
            del held[: bisect_right(held, oldest_ms)]

    def until_ms(self, node: str) -> int:
        """Until when the node is left out; a time that has passed, or 0, if it is not."""
        promises = self._promises.get(node)
        if promises is None:
            return 0
        # Pauses that began longer ago were over when the newest outcome came.
        first = bisect_right(promises.broken, promises.newest_ms() - LONGEST_PAUSE_MS)
        return max((_pause_end_ms(promises, at) for at in promises.broken[first:]), default=0)

    def is_out(self, node: str, *, now_ms: int) -> bool:
        """Whether the node is left out of auctions now."""
        return self.until_ms(node) > now_ms

    def forget_old(self, *, now_ms: int) -> None:
        """Nodes whose outcomes all lie too far back to matter are forgotten."""
        for node, promises in list(self._promises.items()):
            if promises.newest_ms() <= now_ms - _KEPT_MS:
                del self._promises[node]


def _pause_end_ms(promises: _Promises, broken_at_ms: int) -> int:
    broken = _count(promises.broken, broken_at_ms)
    made_up = _count(promises.kept, broken_at_ms) // KEPT_FOR_ONE_BROKEN
    doublings = min(max(broken - made_up, 1) - 1, _MAX_DOUBLINGS)
    return broken_at_ms + min(FIRST_PAUSE_MS << doublings, LONGEST_PAUSE_MS)


def _count(times: Sequence[int], until_ms: int) -> int:
    """How many of the times lie in the window that ends at ``until_ms``."""
    return bisect_right(times, until_ms) - bisect_right(times, until_ms - WINDOW_MS)
