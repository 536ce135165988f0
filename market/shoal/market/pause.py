"""How long somebody who let the market down is left out: longer each time in a row."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

FIRST_PAUSE_MS = 10_000
LONGEST_PAUSE_MS = 600_000
_MAX_REMEMBERED = 100_000


@dataclass(slots=True)
class _Record:
    strikes: int = 0
    until_ms: int = 0


class Pauses:
    """Pauses by name: after the free strikes 10 s, and twice as long with each further one.

    Args:
        free_strikes: Strikes that cost nothing yet.
    """

    def __init__(self, free_strikes: int = 0) -> None:
        self._free_strikes = free_strikes
        self._records: OrderedDict[str, _Record] = OrderedDict()

    def strike(self, name: str, *, now_ms: int) -> int:
        """``name`` failed once more; until when it is left out."""
        record = self._records.setdefault(name, _Record())
        self._records.move_to_end(name)
        while len(self._records) > _MAX_REMEMBERED:
            self._records.popitem(last=False)
        record.strikes += 1
        doublings = record.strikes - self._free_strikes - 1
        if doublings >= 0:
            pause_ms = min(FIRST_PAUSE_MS << min(doublings, 16), LONGEST_PAUSE_MS)
            record.until_ms = max(record.until_ms, now_ms + pause_ms)
        return record.until_ms

    def pardon(self, name: str) -> None:
        """``name`` did what it promised: its strikes are forgotten, and any pause is over."""
        self._records.pop(name, None)

    def is_paused(self, name: str, *, now_ms: int) -> bool:
        """Whether ``name`` is left out now."""
        record = self._records.get(name)
        return record is not None and record.until_ms > now_ms
