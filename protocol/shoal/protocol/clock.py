"""Time, passed in rather than read, so that tests own it."""

from __future__ import annotations

import time
from typing import Protocol


class TimeSource(Protocol):
    """Where a component reads the time."""

    def now_ms(self) -> int:
        """Milliseconds since the Unix epoch."""
        ...


class SystemTime:
    """The machine's clock."""

    def now_ms(self) -> int:
        """Milliseconds since the Unix epoch."""
        return time.time_ns() // 1_000_000


class ManualTime:
    """A clock that moves only when told to."""

    def __init__(self, now_ms: int = 1_700_000_000_000) -> None:
        self._now_ms = now_ms

    def now_ms(self) -> int:
        """Milliseconds since the Unix epoch."""
        return self._now_ms

    def advance(self, ms: int) -> None:
        """Moves time forward by ``ms``."""
        self._now_ms += ms
