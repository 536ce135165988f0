"""Child processes of the devnet: started with a log file, watched, stopped in order.

Each child leads a process group of its own, so that Ctrl-C reaches the devnet alone, which
then stops its children in an order that lets each finish its business.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from shoal.protocol.errors import Unavailable
from shoal.protocol.process import end_with_parent

STOP_GRACE_S = 8.0
_TAIL_BYTES = 8192
_MAX_SENTENCE_CHARS = 400


class Child:
    """One running process and its log file.

    Args:
        name: What people call it.
        process: The process, started by `start`.
        log_path: Where its standard output and error go.
    """

    def __init__(self, name: str, process: asyncio.subprocess.Process, log_path: Path) -> None:
        self.name = name
        self.log_path = log_path
        self._process = process

    @classmethod
    async def start(
        cls,
        name: str,
        arguments: Sequence[str],
        log_path: Path,
        *,
        environment: Mapping[str, str] | None = None,
    ) -> Self:
        """``arguments`` run as a process that dies with this one (Linux).

        Raises:
            Unavailable: the program cannot be started.
        """
        log_path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with log_path.open("ab") as log:
                process = await asyncio.create_subprocess_exec(
                    *arguments,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, **(environment or {})},
                    start_new_session=True,
                    preexec_fn=end_with_parent(),
                )
        except OSError as error:
            raise Unavailable(
                f"{name} cannot be started: {error.strerror}: {error.filename}."
            ) from None
        return cls(name, process, log_path)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.returncode is None

    async def wait(self) -> int:
        """The exit status, once it ends."""
        return await self._process.wait()

    def require_running(self) -> None:
        """Passes only while the process runs.

        Raises:
            Unavailable: it ended; the sentence carries the last thing it said.
        """
        if not self.running:
            raise Unavailable(
                f"{self.name} stopped with status {self._process.returncode}: "
                f"{self.last_words()} (log: {self.log_path})",
                code="child_died",
            )

    def last_words(self) -> str:
        """The last line of the log, as a sentence."""
        try:
            with self.log_path.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
                text = log.read().decode(errors="replace")
        except OSError as error:
            return f"its log cannot be read ({error.strerror})."
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return _sentence(lines[-1])[:_MAX_SENTENCE_CHARS] if lines else "it said nothing."

    def kill(self) -> None:
        """The process is ended at once, without a chance to tidy up."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """The process has ended: asked first, forced after ``grace_s``."""
        if not self.running:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._process.wait(), grace_s)
        except TimeoutError:
            self.kill()
            await self._process.wait()


def _sentence(line: str) -> str:
    """The words in ``line``, which may be a structured event."""
    try:
        event = json.loads(line)
    except ValueError:
        return line
    if isinstance(event, dict):
        for key in ("message", "error", "event"):
            if isinstance(event.get(key), str):
                return str(event[key])
    return line
