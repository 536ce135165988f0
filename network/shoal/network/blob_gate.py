"""How much a node gives to those who fetch from it: a rate shared fairly, and caps."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from shoal.network.meters import Meters
from shoal.network.pacing import Bucket
from shoal.protocol.errors import Unavailable

SLICE_BYTES: Final = 64 << 10
"""Bytes let through at a time; small enough that a slow line is never blocked for long."""
_BITS_PER_MBIT: Final = 1_000_000
# One requester's turn.  Pieces finish one after the other instead of all at the end, so that
# those who have one can pass it on.
_TURN_BYTES: Final = 1 << 20
# Who was too slow to take its turns may make up for this much of them, and no more.
_CREDIT_BYTES: Final = 4 << 20
_BURST_S: Final = 0.05
_RETRY_AFTER_S: Final = 1


@dataclass
class _Requester:
    """One who is being served, and where it stands in the round."""

    num_serves: int = 0
    served_bytes: int = 0
    waiting: deque[tuple[int, asyncio.Future[None]]] = field(default_factory=deque)


class UploadGate:
    """Lets bytes out, each requester in turn.  Belongs to one asyncio loop.

    Args:
        upload_mbit: Megabits per second to all requesters together; 0 for no limit.
        max_serves: Requests being served at once.
        max_serves_per_requester: Those of one requester.
        meters: Where bytes and refusals are counted.
        now_s: A monotonic clock.
    """

    def __init__(
        self,
        upload_mbit: float = 0.0,
        *,
        max_serves: int = 256,
        max_serves_per_requester: int = 16,
        meters: Meters | None = None,
        now_s: Callable[[], float] | None = None,
    ) -> None:
        self._rate = upload_mbit * _BITS_PER_MBIT / 8
        self._max_serves = max_serves
        self._max_per_requester = max_serves_per_requester
        self.meters: Final = meters or Meters()
        self._now_s = now_s or (lambda: asyncio.get_running_loop().time())
        self._requesters: dict[str, _Requester] = {}
        self._round_bytes = 0
        self._num_serves = 0
        self._bucket: Bucket | None = None
        self._timer: asyncio.TimerHandle | None = None

    @contextlib.contextmanager
    def serving(self, requester: str) -> Iterator[None]:
        """One more request of `requester` is being served inside the block.

        Raises:
            Unavailable: It, or everyone together, has as many as are allowed (code
                ``overloaded``).
        """
        entry = self._requesters.get(requester)
        mine = entry.num_serves if entry is not None else 0
        if self._num_serves >= self._max_serves or mine >= self._max_per_requester:
            self.meters.count("blob_serves_refused")
            raise Unavailable(
                f"This node is already serving {self._num_serves} blob requests, {mine} of them "
                f"yours; try again in {_RETRY_AFTER_S} s.",
                code="overloaded",
                retry_after_s=_RETRY_AFTER_S,
            )
        if entry is None:
            entry = self._requesters[requester] = _Requester(served_bytes=self._round_bytes)
        entry.num_serves += 1
        self._num_serves += 1
        try:
            yield
        finally:
            self._num_serves -= 1
            entry.num_serves -= 1
            if not entry.num_serves:
                del self._requesters[requester]

    @property
    def is_limited(self) -> bool:
        """True when bytes have to wait for their turn."""
        return self._rate > 0

    async def turn(self, requester: str, num_bytes: int) -> None:
        """`num_bytes` may be sent to `requester`, who is being served."""
        if not self._rate or num_bytes <= 0:
            return
        turn = asyncio.get_running_loop().create_future()
        self._requesters[requester].waiting.append((num_bytes, turn))
        self._let_through()
        await turn

    def _let_through(self) -> None:
        """Those whose turn it is go on, as far as the rate allows; a timer does the rest."""
        if self._timer is not None:
            return
        while (entry := self._next()) is not None:
            now_s = self._now_s()
            if self._bucket is None:
                burst = max(2 * SLICE_BYTES, self._rate * _BURST_S)
                self._bucket = Bucket(self._rate, burst, now_s)
            num_bytes, turn = entry.waiting.popleft()
            self._round_bytes = max(self._round_bytes, entry.served_bytes)
            entry.served_bytes += num_bytes
            turn.set_result(None)
            debt_s = self._bucket.spend(num_bytes, now_s)
            if debt_s > 0:
                self._timer = asyncio.get_running_loop().call_later(debt_s, self._wake)
                return

    def _wake(self) -> None:
        self._timer = None
        self._let_through()

    def _next(self) -> _Requester | None:
        """The first of those who are waiting and have had fewest turns."""
        best: _Requester | None = None
        for entry in self._requesters.values():
            while entry.waiting and entry.waiting[0][1].done():  # its request was cancelled
                entry.waiting.popleft()
            if not entry.waiting:
                continue
            entry.served_bytes = max(entry.served_bytes, self._round_bytes - _CREDIT_BYTES)
            if best is None or entry.served_bytes // _TURN_BYTES < best.served_bytes // _TURN_BYTES:
                best = entry
        return best
