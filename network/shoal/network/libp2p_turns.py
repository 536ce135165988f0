"""In what order handshakes are made, so that a crowd which comes at once gets in.

Hundreds of handshakes worked on together advance in step, and all run out of time together; a few
at a time finish, and what is still waiting has lost nothing. Whoever is slow on purpose must not
close the door for the rest, so nobody waits at the head of a line for long.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import trio

# A handshake takes some 10 ms of CPU on each side and five round trips.
_AT_ONCE: Final = 16
_AT_ONCE_PER_ADDRESS: Final = 8
# What somebody at the head of a line waits at most: 20 a second pass the line of all, and 10 a
# second that of one address, even where everybody before them is stuck.
_PATIENCE_S: Final = 0.05
_PATIENCE_PER_ADDRESS_S: Final = 0.1


class Line:
    """A line whose head passes when a place is free, or when it has waited long enough.

    Args:
        num_places: How many may be past the line at once before its head has to wait.
        patience_s: Longest wait at the head.
    """

    def __init__(self, num_places: int, patience_s: float) -> None:
        self._head = trio.StrictFIFOLock()
        self._places = trio.Semaphore(num_places)
        self._patience_s = patience_s

    @asynccontextmanager
    async def passed(self) -> AsyncIterator[None]:
        """It was our turn."""
        async with self._head:
            with trio.move_on_after(self._patience_s) as waiting:
                await self._places.acquire()
        try:
            yield
        finally:
            if not waiting.cancelled_caught:
                self._places.release()


class Turns:
    """One line for each address, and behind those one for all."""

    def __init__(self) -> None:
        self._everybody = Line(_AT_ONCE, _PATIENCE_S)
        self._lines: dict[str, tuple[Line, set[object]]] = {}

    @asynccontextmanager
    async def taken(self, address: str) -> AsyncIterator[float]:
        """It is this address's turn; gives the seconds it took to come."""
        begun_s = trio.current_time()
        line, waiting = self._lines.setdefault(
            address, (Line(_AT_ONCE_PER_ADDRESS, _PATIENCE_PER_ADDRESS_S), set())
        )
        waiting.add(one := object())
        try:
            async with line.passed(), self._everybody.passed():
                yield trio.current_time() - begun_s
        finally:
            waiting.remove(one)
            if not waiting:
                self._lines.pop(address, None)
