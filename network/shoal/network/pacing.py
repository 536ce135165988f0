"""Token buckets: how often, and how much, one peer may ask of a node."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Final

# Buckets of peers that have gone quiet are forgotten, oldest first; a forgotten one is full.
_MAX_BUCKETS: Final = 4096


class Bucket:
    """Tokens that flow in at a steady rate, up to a burst.

    Args:
        rate: Tokens per second.
        burst: Most tokens held; what may be taken at once after a quiet while.
        now_s: The clock's reading now.
    """

    __slots__ = ("_burst", "_rate", "_since_s", "_tokens")

    def __init__(self, rate: float, burst: float, now_s: float) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = burst
        self._since_s = now_s

    def take(self, tokens: float, now_s: float) -> bool:
        """True, and the tokens are gone, when there were that many."""
        self._fill(now_s)
        if tokens > self._tokens:
            return False
        self._tokens -= tokens
        return True

    def spend(self, tokens: float, now_s: float) -> float:
        """The tokens are gone; how many seconds to wait until the debt this left is paid."""
        self._fill(now_s)
        self._tokens -= tokens
        return 0.0 if self._tokens >= 0 else -self._tokens / self._rate

    def _fill(self, now_s: float) -> None:
        gained = (now_s - self._since_s) * self._rate
        self._since_s = now_s
        self._tokens = min(self._burst, self._tokens + gained)


class Pacer:
    """One bucket per key, for a bounded number of keys.

    Args:
        rate: Tokens per second for each key.
        burst: Most tokens each key holds.
        clock: Seconds, monotonic.
    """

    def __init__(self, rate: float, burst: float, clock: Callable[[], float]) -> None:
        self._rate = rate
        self._burst = burst
        self._clock = clock
        self._buckets: OrderedDict[Hashable, Bucket] = OrderedDict()

    def take(self, key: Hashable, tokens: float = 1.0) -> bool:
        """True, and the tokens are gone, when this key's bucket held that many."""
        now_s = self._clock()
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = Bucket(self._rate, self._burst, now_s)
            if len(self._buckets) > _MAX_BUCKETS:
                self._buckets.popitem(last=False)
        else:
            self._buckets.move_to_end(key)
        return bucket.take(tokens, now_s)
