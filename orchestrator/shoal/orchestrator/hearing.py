"""Tells the silence of one node from our own.

A node that falls silent while others are heard is gone, and its leases go to others.  When
several fall silent at once it is our link, or our machine, that was away: then there is nobody
to give the work to, and nobody broke a promise.  So time in which nobody is heard counts for no
one, and after a long silence neither does as much time again, in which the nodes find back one
by one.  A single node's silence is always its own: it cannot be told from ours.
"""

from __future__ import annotations

from typing import Final

_PATIENCE_BEATS: Final = 1.5
"""Nodes beat at different moments, so one beat and a half without any is already silence."""
_TOGETHER_BEATS: Final = 3
"""Nodes last heard within as many beats of each other fell silent together."""
_LONG_BEATS: Final = 3
"""A silence as long as this cost connections, and soon leases."""
_LONGEST_RETURN_MS: Final = 15_000
"""A node pauses for at most ten seconds between two tries, and needs a few to connect."""


class Hearing:
    """Counts the time in which nobody was heard, of several that were.

    Args:
        heartbeat_ms: How often each node beats.

    Example:
        >>> hearing = Hearing(heartbeat_ms=1_000)
        >>> hearing.heard("one", 4_500)
        >>> hearing.heard("another", 5_000)
        >>> hearing.is_deaf(6_500), hearing.is_deaf(6_501)
        (False, True)
        >>> hearing.take_deaf_ms(9_000), hearing.take_deaf_ms(9_100)
        (2500, 100)
    """

    def __init__(self, heartbeat_ms: int) -> None:
        self._patience_ms = round(_PATIENCE_BEATS * heartbeat_ms)
        self._together_ms = _TOGETHER_BEATS * heartbeat_ms
        self._long_ms = _LONG_BEATS * heartbeat_ms
        self._heard_ms: dict[str, int] = {}
        self._return_until_ms = 0
        self._counted_ms = 0
        self._deaf_ms = 0

    def heard(self, node: str, now_ms: int) -> None:
        """The node has sent a heartbeat."""
        self._count(now_ms)
        begun_ms = self._begun_ms()
        if begun_ms is not None and now_ms - begun_ms > self._long_ms:
            self._return_until_ms = now_ms + min(now_ms - begun_ms, _LONGEST_RETURN_MS)
        # Moved to the end: the first are those not heard of for the longest time.
        self._heard_ms.pop(node, None)
        self._heard_ms[node] = now_ms
        while now_ms - next(iter(self._heard_ms.values())) > self._together_ms:
            del self._heard_ms[next(iter(self._heard_ms))]

    def is_deaf(self, now_ms: int) -> bool:
        """Whether nobody is heard just now though several were, or they are still returning."""
        begun_ms = self._begun_ms()
        return now_ms < self._return_until_ms or (begun_ms is not None and now_ms > begun_ms)

    def take_deaf_ms(self, now_ms: int) -> int:
        """How much time counts for no one, of that since this was last asked."""
        self._count(now_ms)
        deaf_ms, self._deaf_ms = self._deaf_ms, 0
        return deaf_ms

    def _begun_ms(self) -> int | None:
        """When silence begins unless somebody is heard; None where it could be one node's own."""
        if len(self._heard_ms) < 2:
            return None
        return next(reversed(self._heard_ms.values())) + self._patience_ms

    def _count(self, now_ms: int) -> None:
        """Adds what counts for no one of the time since this was last called."""
        begun_ms, counted_ms = self._begun_ms(), self._counted_ms
        self._deaf_ms += max(0, min(now_ms, self._return_until_ms) - counted_ms)
        if begun_ms is not None:
            self._deaf_ms += max(0, now_ms - max(counted_ms, begun_ms, self._return_until_ms))
        self._counted_ms = max(counted_ms, now_ms)
