"""The parent's end of `nat_node`: a node in a namespace, and what it is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from nat_node import RELAY_PORT
from netlab import Host

_PROGRAM = Path(__file__).with_name("nat_node.py")


class Child:
    """A node in its namespace, and what it is told."""

    def __init__(self, host: Host, folder: Path, *argv: str) -> None:
        folder.mkdir()
        self.host = host
        self._process = host.popen(
            [sys.executable, str(_PROGRAM), str(folder), *argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._peer_id: str | None = None

    @property
    def peer_id(self) -> str:
        """The node's name, once it is up and connected."""
        if self._peer_id is None:
            self._peer_id = self._line()
        return self._peer_id

    @property
    def source(self) -> str:
        """Where others may ask it for blobs, by its name alone."""
        return f"/p2p/{self.peer_id}"

    @property
    def address(self) -> str:
        """Where it is dialled, when it listens."""
        return f"/ip4/{self.host.ip}/tcp/{RELAY_PORT}{self.source}"

    def tell(self, command: str, *arguments: object) -> dict[str, Any]:
        """The node's answer, an error's code included."""
        assert self.peer_id
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([command, *arguments]) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._line())
        return answer

    def get(self, command: str, *arguments: object) -> Any:
        """What the command gave."""
        answer = self.tell(command, *arguments)
        assert "ok" in answer, answer
        return answer["ok"]

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        assert line, f"{self.host.name} ended with {self._process.wait(10)}"
        return str(line)
