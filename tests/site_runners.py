"""What the actors of a test's site run instead of a model; imported inside Ray's processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.protocol.errors import PeerFault


class Doubler:
    """Doubles numbers, and does whatever else a part tells it to."""

    def run(self, on_progress: Callable[[], None], action: str, value: Any) -> Any:
        on_progress()
        match action:
            case "double":
                return 2 * value
            case "fail":
                raise PeerFault("The part is bad.", code="malformed", evidence=str(value))
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "die once":
                # The mark outlives the process that makes it.
                try:
                    Path(value).touch(exist_ok=False)
                except FileExistsError:
                    return "alive"
                os.kill(os.getpid(), signal.SIGKILL)
            case "tell niceness":
                return os.nice(0)
            case "step for ever":
                while True:
                    on_progress()
        raise AssertionError(f"no action {action!r}")


class Unstartable:
    """Never starts."""

    def __init__(self) -> None:
        raise OSError("no such device")

    def run(self, on_progress: Callable[[], None], *arguments: Any) -> Any:
        raise AssertionError("it never started")
