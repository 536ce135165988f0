"""The `shoal` command as its users start it: a process, its exit code and what it says."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

STOP_TIMEOUT_S = 60


def shoal(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "shoal.client", *arguments]


def settings(*pairs: str) -> list[str]:
    """``--set`` for each ``key=value``."""
    return [part for pair in pairs for part in ("--set", pair)]


def run(*arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        shoal(*arguments), capture_output=True, text=True, check=False, timeout=timeout_s
    )


def refused(*arguments: str) -> tuple[int, str]:
    """The exit code and the one sentence of a command that must fail."""
    done = run(*arguments)
    assert done.returncode != 0, done.stdout
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.returncode, done.stderr


@dataclass(frozen=True, kw_only=True)
class Market:
    """A running `shoal up`; ``ready`` is what it said."""

    ready: dict[str, Any]
    folder: Path
    process: subprocess.Popen[str]

    @property
    def url(self) -> str:
        return str(self.ready["api_url"])

    @property
    def payer(self) -> tuple[str, ...]:
        """The options with which its requester pays."""
        return ("--url", self.url, "--key", str(self.ready["requester_key"]))

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def healthy(self) -> bool:
        return bool(self._get("/health")["status"] == "ok")

    def num_jobs(self) -> int:
        return len(self._get("/v1/market/jobs"))

    def text(self, path: str) -> str:
        """What its API answers."""
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return str(answer.read().decode())

    def _get(self, path: str) -> Any:
        return json.loads(self.text(path))


@contextmanager
def market(folder: Path, *arguments: str) -> Iterator[Market]:
    """`shoal up`, ready; stopped by Ctrl-C."""
    process = subprocess.Popen(
        shoal("up", "--data", str(folder), "--json", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, "shoal up ended before it was ready"
        yield Market(ready=json.loads(line), folder=folder, process=process)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=STOP_TIMEOUT_S)
        process.stdout.close()
