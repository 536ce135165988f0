"""A crowd: what 500 connected workers cost an orchestrator.

``python -m benchmarks.network.crowd [--quick]``
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from benchmarks.network.crew import crew, front_desk
from benchmarks.network.parties import Party, party
from benchmarks.network.table import Finding, main_of, milliseconds

PROCESSES = 2
BEAT_S = 1.0
BEAT_BYTES = 400
BEAT_REPLY_BYTES = 512
SETTLE_S = 10.0
FLAT_SHARE = 0.02
"""Memory may rise by this share of itself while it is watched and still counts as flat."""
LIMIT_BACK_S = 60.0
_LOOK_S = 0.25


@dataclass
class Watched:
    """What an orchestrator's process was seen to use, once a second."""

    at_s: list[float] = field(default_factory=list)
    rss_bytes: list[int] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    def look(self, process: psutil.Process) -> None:
        """One more second."""
        self.at_s.append(time.monotonic())
        self.rss_bytes.append(process.memory_info().rss)
        self.cpu_s.append(_cpu_s(process))

    def cpu_share(self) -> float:
        """CPU seconds a second."""
        return (self.cpu_s[-1] - self.cpu_s[0]) / (self.at_s[-1] - self.at_s[0])

    def slope_bytes_per_s(self) -> float:
        """How memory rises, by least squares."""
        return statistics.linear_regression(self.at_s, self.rss_bytes).slope


@dataclass
class Outcome:
    """What one crowd was seen to do.

    Attributes:
        before_bytes: The orchestrator's memory before anybody came.
        watched: What it used while all were beating.
        joined_s: How long each took to join.
        beats_s: The heartbeats' round trips.
        num_failed: Beats without an answer.
        failures: Why, for a few of them.
        connected: Workers connected at the end.
        back_s: After a restart, the seconds until all were connected again; None: never.
        back_cpu_s: The CPU time which the new orchestrator spent on that.
    """

    before_bytes: int
    watched: Watched
    joined_s: list[float]
    beats_s: list[float]
    num_failed: int
    failures: list[str]
    connected: int
    back_s: float | None
    back_cpu_s: float


async def watch(num_workers: int, watch_s: float) -> Outcome:
    """The outcome of `num_workers` workers that beat for `watch_s`, then lose their desk."""
    async with AsyncExitStack() as stack:
        root = stack.enter_context(TemporaryDirectory(prefix="shoal-bench-"))
        desk_of = (front_desk, BEAT_REPLY_BYTES, str(Path(root) / "key"))
        desk_stack = await stack.enter_async_context(AsyncExitStack())
        desk = await desk_stack.enter_async_context(party(*desk_of, 0))
        before = psutil.Process(desk.pid).memory_info().rss
        crews = await _crews(stack, desk.ready, num_workers)
        await asyncio.sleep(SETTLE_S)
        joined_s = [took for told in await reports(crews) for took in told["joined_s"]]
        watched = await _watched(desk.pid, watch_s)
        told = await reports(crews)
        connected = int(await desk.ask("peers"))
        psutil.Process(desk.pid).kill()
        begun_s = time.monotonic()
        await desk_stack.aclose()
        port = int(desk.ready.split("/")[4])
        desk = await stack.enter_async_context(party(*desk_of, port))
        back_s = await _back_s(desk, num_workers, begun_s)
        return Outcome(
            before_bytes=before,
            watched=watched,
            joined_s=joined_s,
            beats_s=[took for one in told for took in one["beats_s"]],
            num_failed=sum(one["lost"] for one in told),
            failures=[cause for one in told for cause in one["failures"]],
            connected=connected,
            back_s=back_s,
            back_cpu_s=_cpu_s(psutil.Process(desk.pid)),
        )


async def _crews(stack: AsyncExitStack, address: str, num_workers: int) -> list[Party]:
    share = num_workers // PROCESSES
    coming = (party(crew, address, share, BEAT_S, BEAT_BYTES) for _ in range(PROCESSES))
    return list(await asyncio.gather(*(stack.enter_async_context(one) for one in coming)))


async def _watched(pid: int, watch_s: float) -> Watched:
    watched = Watched()
    process = psutil.Process(pid)
    end_s = time.monotonic() + watch_s
    while time.monotonic() < end_s:
        watched.look(process)
        await asyncio.sleep(1.0)
    return watched


async def _back_s(desk: Party, num_workers: int, begun_s: float) -> float | None:
    while (taken_s := time.monotonic() - begun_s) < 2 * LIMIT_BACK_S:
        if int(await desk.ask("peers")) == num_workers:
            return taken_s
        await asyncio.sleep(_LOOK_S)
    return None


def _cpu_s(process: psutil.Process) -> float:
    used = process.cpu_times()
    return float(used.user + used.system)


async def reports(crews: Sequence[Party]) -> list[dict[str, Any]]:
    """How each crew fared since it was last asked."""
    return [json.loads(await one.ask("fared")) for one in crews]


def findings(*, quick: bool) -> Iterator[Finding]:
    """Memory, CPU, connect time and heartbeats of a crowd."""
    num_workers, watch_s = (100, 20.0) if quick else (500, 120.0)
    outcome = asyncio.run(watch(num_workers, watch_s))
    watched = outcome.watched
    yield Finding(
        what=f"{num_workers} workers connected at the end",
        measured=f"{outcome.connected}, {outcome.num_failed} beats lost"
        + (f" ({outcome.failures[0]})" if outcome.failures else ""),
        wanted=f"{num_workers}, none",
        reached=outcome.connected == num_workers and not outcome.num_failed,
    )
    per_worker = (statistics.median(watched.rss_bytes) - outcome.before_bytes) / num_workers
    yield Finding(what="memory per worker", measured=f"{per_worker / 1024:,.0f} KiB")
    slope = watched.slope_bytes_per_s() / num_workers
    rise = slope * watch_s / per_worker
    yield Finding(
        what=f"its rise over {watch_s:.0f} s",
        measured=f"{rise:+.2%} ({slope * 3600 / 1024:+,.1f} KiB a worker and hour)",
        wanted=f"≤ {FLAT_SHARE:.0%}",
        reached=rise <= FLAT_SHARE,
    )
    yield Finding(
        what=f"CPU of the orchestrator's node, a beat every {BEAT_S:g} s from each",
        measured=f"{watched.cpu_share():.2f} of a core",
    )
    yield Finding(what="joining, 48 at once", measured=milliseconds(outcome.joined_s))
    yield Finding(what="a heartbeat's round trip", measured=milliseconds(outcome.beats_s))
    back_s = outcome.back_s
    yield Finding(
        what="all connected again after the orchestrator was killed and started anew",
        measured="never"
        if back_s is None
        else f"{back_s:.1f} s, {outcome.back_cpu_s:.1f} s of the new one's CPU",
        wanted=f"≤ {LIMIT_BACK_S:g} s",
        reached=back_s is not None and back_s <= LIMIT_BACK_S,
    )


if __name__ == "__main__":
    main_of(__doc__, findings)
