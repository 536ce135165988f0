"""A slow link in user space: frames between two TAP devices arrive late, and some never.

The kernel's own netem is not in every kernel.  Run as
``python netlab_wire.py NETNS_A DEVICE_A NETNS_B DEVICE_B``; each line on stdin, a JSON object with
``delay_ms`` and ``loss_pct``, sets the link from then on, and is answered by a line on stdout.
The end of stdin ends the wire.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import random
import select
import struct
import sys
import time
from collections import deque

TUNSETIFF = 0x400454CA  # <linux/if_tun.h>
IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
CLONE_NEWNET = 0x40000000  # <linux/sched.h>
MAX_FRAME_BYTES = 65_600
MAX_QUEUED_FRAMES = 20_000
FRAMES_PER_TURN = 64


class Direction:
    """Frames from one device to the other, in order, each `delay_s` after it came."""

    def __init__(self, source: int, target: int, seed: int) -> None:
        self.source = source
        self.target = target
        self.delay_s = 0.0
        self.loss = 0.0
        self._queue: deque[tuple[float, bytes]] = deque()
        self._random = random.Random(seed)

    def take(self) -> None:
        """What lies at the source is queued, or lost."""
        for _ in range(FRAMES_PER_TURN):
            try:
                frame = os.read(self.source, MAX_FRAME_BYTES)
            except BlockingIOError:
                return
            if self.loss and self._random.random() < self.loss:
                continue
            if len(self._queue) < MAX_QUEUED_FRAMES:
                self._queue.append((time.monotonic() + self.delay_s, frame))

    def give(self) -> float | None:
        """What is due is at the target; returns the seconds until the next is due."""
        now = time.monotonic()
        while self._queue:
            due, frame = self._queue[0]
            if due > now:
                return due - now
            self._queue.popleft()
            try:
                os.write(self.target, frame)
            except BlockingIOError:
                continue  # a full device queue loses frames, as a router's does
        return None


def open_tap(netns: str, device: str) -> int:
    """A non-blocking TAP device in the named network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{netns}") as namespace:
        if libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter {netns}")
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH14x", device.encode(), IFF_TAP | IFF_NO_PI))
    return tap


def run(first: int, second: int) -> None:
    """Frames pass both ways until stdin ends."""
    ways = (Direction(first, second, seed=1), Direction(second, first, seed=2))
    stdin = sys.stdin.fileno()
    waiting = select.poll()
    for fd in (first, second, stdin):
        waiting.register(fd, select.POLLIN)
    pending = b""
    while True:
        due = [wait_s for wait_s in (way.give() for way in ways) if wait_s is not None]
        timeout_ms = None if not due else max(1, round(min(due) * 1000))
        ready = {fd for fd, _ in waiting.poll(timeout_ms)}
        for way in ways:
            if way.source in ready:
                way.take()
        if stdin in ready:
            part = os.read(stdin, 4096)
            if not part:
                return
            *lines, pending = (pending + part).split(b"\n")
            for line in lines:
                setting = json.loads(line)
                for way in ways:
                    way.delay_s = setting["delay_ms"] / 1000
                    way.loss = setting["loss_pct"] / 100
                os.write(sys.stdout.fileno(), b"set\n")


def main() -> None:
    """The wire is up, which a line on stdout says, and stays until stdin ends."""
    here_a, device_a, here_b, device_b = sys.argv[1:]
    first, second = open_tap(here_a, device_a), open_tap(here_b, device_b)
    os.write(sys.stdout.fileno(), b"up\n")
    run(first, second)


if __name__ == "__main__":
    main()
