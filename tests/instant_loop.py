"""An asyncio loop whose clock leaps to the next timer, so that no test waits or depends on load."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _LeapingSelector(selectors.DefaultSelector):
    """Where nothing is ready, time passes at once."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            return super().select(None)
        ready = super().select(0)
        if not ready:
            self.now_s += timeout
        return ready


class _InstantLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._leaping = _LeapingSelector()
        super().__init__(self._leaping)

    def time(self) -> float:
        return self._leaping.now_s


def run_instantly(main: Coroutine[Any, Any, T]) -> T:
    """What ``main`` returns, in a loop that skips every wait for a timer."""
    with asyncio.Runner(loop_factory=_InstantLoop) as runner:
        return runner.run(main)
