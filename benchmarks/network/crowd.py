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
from typing import Any

import psutil

from benchmarks.network import parties
from benchmarks.network.parties import Party, party
from benchmarks.network.table import Finding, main_of, milliseconds

PROCESSES = 4
BEAT_S = 1.0
BEAT_BYTES = 400
BEAT_REPLY_BYTES = 512
SETTLE_S = 10.0
FLAT_SHARE = 0.02
"""Memory may rise by this share of itself while it is watched and still counts as flat."""


@dataclass
class Watched:
    """What an orchestrator's process was seen to use, once a second."""

    at_s: list[float] = field(default_factory=list)
    rss_bytes: list[int] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    def look(self, process: psutil.Process) -> None:
        """One more second."""
        used = process.cpu_times()
        self.at_s.append(time.monotonic())
        self.rss_bytes.append(process.memory_info().rss)
        self.cpu_s.append(used.user + used.system)

    def cpu_share(self) -> float:
        """CPU seconds a second."""
        return (self.cpu_s[-1] - self.cpu_s[0]) / (self.at_s[-1] - self.at_s[0])

    def slope_bytes_per_s(self) -> float:
        """How memory rises, by least squares."""
        return statistics.linear_regression(self.at_s, self.rss_bytes).slope


@dataclass
class Outcome:
    """What one crowd was seen to do."""

    before_bytes: int
    watched: Watched
    connect_s: list[float]
    beats_s: list[float]
    num_lost: int
    causes: list[str]
    connected: int


async def watch(num_workers: int, watch_s: float) -> Outcome:
    """The outcome of `num_workers` workers that beat for `watch_s` after settling."""
    async with AsyncExitStack() as stack:
        desk = await stack.enter_async_context(party(parties.front_desk, BEAT_REPLY_BYTES))
        process = psutil.Process(desk.pid)
        before = process.memory_info().rss
        share = num_workers // PROCESSES
        joining = [
            stack.enter_async_context(party(parties.crowd, desk.ready, share, BEAT_S, BEAT_BYTES))
            for _ in range(PROCESSES)
        ]
        crowds: list[Party] = [await joined for joined in joining]
        connect_s = [took for one in crowds for took in json.loads(one.ready)["connect_s"]]
        await asyncio.sleep(SETTLE_S)
        await reports(crowds)
        watched = Watched()
        end_s = time.monotonic() + watch_s
        while time.monotonic() < end_s:
            watched.look(process)
            await asyncio.sleep(1.0)
        told = await reports(crowds)
        return Outcome(
            before_bytes=before,
            watched=watched,
            connect_s=connect_s,
            beats_s=[took for one in told for took in one["beats_s"]],
            num_lost=sum(one["lost"] for one in told),
            causes=[cause for one in told for cause in one["failures"]],
            connected=int(await desk.ask("peers")),
        )


async def reports(crowds: Sequence[Party]) -> list[dict[str, Any]]:
    """What each crowd's beats took since it was last asked."""
    return [json.loads(await one.ask("beats")) for one in crowds]


def findings(*, quick: bool) -> Iterator[Finding]:
    """Memory, CPU, connect time and heartbeats of a crowd."""
    num_workers, watch_s = (100, 20.0) if quick else (500, 120.0)
    outcome = asyncio.run(watch(num_workers, watch_s))
    watched = outcome.watched
    yield Finding(
        what=f"{num_workers} workers connected at the end",
        measured=f"{outcome.connected}, {outcome.num_lost} beats lost"
        + (f" ({outcome.causes[0]})" if outcome.causes else ""),
        wanted=f"{num_workers}, none",
        reached=outcome.connected == num_workers and not outcome.num_lost,
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
    yield Finding(what="connecting", measured=milliseconds(outcome.connect_s))
    yield Finding(what="a heartbeat's round trip", measured=milliseconds(outcome.beats_s))


if __name__ == "__main__":
    main_of(__doc__, findings)
