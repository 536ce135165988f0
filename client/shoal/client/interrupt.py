"""Ctrl-C and SIGTERM end a serving command in order."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


async def run_until_interrupted(work: Coroutine[Any, Any, _T]) -> _T | None:
    """What ``work`` returned; None if Ctrl-C or SIGTERM cut it short.

    The first signal cancels ``work``, which then tidies up; further ones are ignored, so
    that impatience leaves no processes behind.
    """
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    cut = False

    def stop() -> None:
        nonlocal cut
        if not cut:
            cut = True
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        return await task
    except asyncio.CancelledError:
        if not cut:
            raise
        return None
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
