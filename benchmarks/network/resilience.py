"""What a fault costs a job: its makespan with the fault over the same job's without.

One market of three workers, two of them behind NAT, each in a network namespace of its own, runs
the same job again and again: with one fault each, begun when a third of the policy versions are
made, and untouched before and after.  Needs root.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks.network.table import Finding, main_of

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

if TYPE_CHECKING:
    from home_market import HomeMarket, Worker

_WANTED: Final = 2.0
_ABSENT_S: Final = 20.0
_OFFICE_CUT_S: Final = 10.0
_SLOW_MS: Final = 200
"""As `ping` shows it: half of it each way."""
_SLOWER_MS: Final = 400
_LOSS_PCT: Final = 5.0
_STEPS: Final = 24
_QUICK_STEPS: Final = 12
_OFFICE_STEPS: Final = 60
"""Nothing can go on while the orchestrator is cut off: a job must last longer than that."""
_ENV_CASES: Final = "SHOAL_RESILIENCE_CASES"
"""Names of cases, with commas, where not all are wanted."""

Fault = Callable[["HomeMarket"], Awaitable[None]]


def _victim(market: HomeMarket) -> Worker:
    return market.workers["home"]


async def _nothing(market: HomeMarket) -> None:
    """The control: no fault."""


async def _kill(market: HomeMarket) -> None:
    _victim(market).kill()
    _victim(market).start()


async def _stop(market: HomeMarket) -> None:
    _victim(market).signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(_ABSENT_S)
    finally:
        _victim(market).signal(signal.SIGCONT)


async def _pull(market: HomeMarket) -> None:
    _victim(market).host.cut()
    try:
        await asyncio.sleep(_ABSENT_S)
    finally:
        _victim(market).host.mend()


async def _cut_office(market: HomeMarket) -> None:
    market.office.cut()
    try:
        await asyncio.sleep(_OFFICE_CUT_S)
    finally:
        market.office.mend()


async def _slow_down(market: HomeMarket, round_trip_ms: int = _SLOW_MS) -> None:
    """Slow until the job ends, when the fault is cancelled."""
    slow = [market.workers[name].host for name in ("home", "far")]
    for host in slow:
        host.delay(round_trip_ms / 2, loss_pct=_LOSS_PCT)
    try:
        await asyncio.Event().wait()
    finally:
        for host in slow:
            host.delay(0)


_CASES: Final[dict[str, tuple[str, Fault]]] = {
    "kill": ("kill -9 of a worker, restarted at once", _kill),
    "stop": (f"SIGSTOP of a worker for {_ABSENT_S:g} s", _stop),
    "cable": (f"a worker's cable pulled for {_ABSENT_S:g} s", _pull),
    "office": (f"the orchestrator's cable pulled for {_OFFICE_CUT_S:g} s", _cut_office),
    "slow": (f"{_SLOW_MS} ms of round trip, {_LOSS_PCT:g} % loss on two of three", _slow_down),
    "slower": (
        f"{_SLOWER_MS} ms of round trip, {_LOSS_PCT:g} % loss on two of three",
        partial(_slow_down, round_trip_ms=_SLOWER_MS),
    ),
}
_FOR_INFORMATION: Final = frozenset({"slower"})
"""Harder than what is promised."""


def findings(*, quick: bool) -> Iterator[Finding]:
    """The clean makespan, then each fault's ratio to it."""
    from netlab import NetLab, why_not

    reason = why_not()
    if reason is not None:
        yield Finding(what="makespan under faults", measured=f"not measured: {reason}")
        return
    from home_market import HomeMarket

    usual_steps = _QUICK_STEPS if quick else _STEPS
    wanted = os.environ.get(_ENV_CASES, ",".join(_CASES)).split(",")
    with tempfile.TemporaryDirectory() as folder, NetLab() as lab, asyncio.Runner() as runner:
        market = HomeMarket(lab, lab.host("office"), Path(folder))
        runner.run(_open(market))
        # Bases are fetched and everything is loaded by the first job, which is not counted.
        runner.run(_makespan_s(market, _nothing, steps=2))
        clean_s: dict[int, float] = {}
        for name in wanted:
            what, fault = _CASES[name]
            steps = _OFFICE_STEPS if name == "office" else usual_steps
            if steps not in clean_s:
                clean_s[steps] = runner.run(_makespan_s(market, _nothing, steps=steps))
            before_s = clean_s[steps]
            makespan_s = runner.run(_makespan_s(market, fault, steps=steps))
            clean_s[steps] = after_s = runner.run(_makespan_s(market, _nothing, steps=steps))
            # A shared machine is now slow and now quick: what stands beside it is compared.
            ratio = 2 * makespan_s / (before_s + after_s)
            yield Finding(
                what=what,
                measured=f"{ratio:.2f} x ({makespan_s:.1f} s for {steps} updates; clean before "
                f"{before_s:.1f}, after {after_s:.1f} s)",
                wanted="" if name in _FOR_INFORMATION else f"<= {_WANTED:g} x",
                reached=None if name in _FOR_INFORMATION else ratio <= _WANTED,
            )


async def _open(market: HomeMarket) -> None:
    await market.open()
    for host in (market.lab.host("open"), market.lab.natted("home"), market.lab.natted("far")):
        await market.add(host)
    await market.wait_connected()


async def _makespan_s(market: HomeMarket, fault: Fault, *, steps: int) -> float:
    """From the submission to the last policy version, by the orchestrator's own clock."""
    from shoal.client.demo import example_job
    from shoal.client.jobfile import load_job_file
    from shoal.protocol.job import JobState

    settings = (f"max_steps={steps}", f"eval.interval={steps}", "eval.num_examples=64")
    job_id = await market.submit(load_job_file(example_job(), settings))
    await market.wait_for(job_id, lambda view: 3 * view.policy_version >= steps)
    striking = asyncio.ensure_future(fault(market))
    try:
        view = await market.wait_for(job_id, lambda view: view.state is JobState.COMPLETE)
    finally:
        striking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await striking
    await market.wait_connected()
    await market.wait_unpaused()
    assert view.started_ms is not None
    assert view.finished_ms is not None
    return (view.finished_ms - view.started_ms) / 1000


if __name__ == "__main__":
    main_of(__doc__, findings)
