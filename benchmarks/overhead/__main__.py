"""``python -m benchmarks.overhead [--pairs 3] [--only roles] [--job FILE] [--set max_steps=60]``.

Each pair runs the example job through a whole market on this machine (chain, orchestrator,
two workers) and as the same rollouts, gradients, updates and evaluations in one process with
no market, network, chain or verification.  All start from a ready market or a loaded
interpreter; the base model is built beforehand.

The market runs twice: with two workers that each take half of everything, in tasks of half a
batch, and with one that samples and one that differentiates, in tasks of a whole batch
(``--only halves``, ``--only roles``).  The process with two threads runs before and after each
market, and their mean is what it is compared with, since the machine's speed drifts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import psutil

from shoal.client.api import ShoalClient
from shoal.client.devnet import Devnet, DevnetOptions
from shoal.client.devnet_files import WorkerProfile, worker_profile
from shoal.client.jobfile import load_job_file
from shoal.client.submission import open_gateway, submit_job
from shoal.protocol.errors import InvariantBroken
from shoal.protocol.job import JobSpec, JobState
from shoal.protocol.keystore import load_account

EXAMPLE = Path(__file__).parents[2] / "examples/addition.toml"

_IDLE_CPU_S: Final = 0.3
"""What a market without a job uses in a second, and somewhat more."""

# Of one niceness: what is measured is the market, not how unlike the workers are.
_ALIKE: Final = tuple(replace(worker_profile(n), niceness=0) for n in range(2))


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """How two workers share the job.

    Attributes:
        name: For the table.
        tasks: The share of a batch that one task is, as the reciprocal.
        capacities: What each worker holds, in batches of each kind.
    """

    name: str
    tasks: int
    capacities: Sequence[Mapping[str, int]]

    def job(self, spec: JobSpec) -> JobSpec:
        """The job, cut into tasks for these workers."""
        size = spec.groups_per_batch // self.tasks
        tasks = spec.tasks.model_copy(update={"rollout": size, "gradient": size})
        return spec.model_copy(update={"tasks": tasks})

    def profiles(self, spec: JobSpec) -> tuple[WorkerProfile, ...]:
        """The two workers."""
        return tuple(
            replace(
                profile,
                tables={
                    "capacity": {
                        k: n * spec.groups_per_batch // self.tasks for k, n in held.items()
                    }
                },
            )
            for profile, held in zip(_ALIKE, self.capacities, strict=True)
        )


_HALVES: Final = Arrangement(
    name="each half of everything", tasks=2, capacities=({"rollout": 1, "gradient": 1},) * 2
)
_ROLES: Final = Arrangement(
    name="one samples, one differentiates",
    tasks=1,
    capacities=({"rollout": 2, "gradient": 0}, {"rollout": 0, "gradient": 1}),
)
_ARRANGEMENTS: Final = {"halves": _HALVES, "roles": _ROLES}


async def _at_rest() -> None:
    """The market's processes have loaded their libraries: for a second they had nothing to do."""
    processes = psutil.Process().children(recursive=True)

    def used_s() -> float:
        times = [process.cpu_times() for process in processes]
        return sum(spent.user + spent.system for spent in times)

    before_s = used_s()
    while True:
        await asyncio.sleep(1.0)
        now_s = used_s()
        if now_s - before_s < _IDLE_CPU_S:
            return
        before_s = now_s


async def run_market(spec: JobSpec, root: Path, arrangement: Arrangement) -> float:
    """Wall seconds from submission to completion, escrow opened and closed included."""
    profiles = arrangement.profiles(spec)
    options = DevnetOptions(data_dir=root / "devnet", models_dir=root / "models", profiles=profiles)
    async with (
        Devnet(options) as devnet,
        ShoalClient(devnet.running.api_url) as client,
    ):
        account = load_account(devnet.running.requester_key)
        gateway = await open_gateway(devnet.info, account)
        async with gateway:
            await _at_rest()
            started_s = time.perf_counter()
            submitted = await submit_job(client, gateway, arrangement.job(spec), account)
            view = await client.wait(submitted.job_id)
            wall_s = time.perf_counter() - started_s
        if view.state is not JobState.COMPLETE:
            raise InvariantBroken(f"The job ended as {view.state}: {view.reason}.")
        return wall_s


def run_local(spec: JobSpec, models: Path, threads: int) -> float:
    """Wall seconds of the same job in a fresh process of its own."""
    command = [sys.executable, "-m", "benchmarks.overhead.local", str(models), str(threads)]
    done = subprocess.run(command, input=spec.encode(), stdout=subprocess.PIPE, check=True)
    return float(json.loads(done.stdout)["wall_s"])


def main() -> None:
    """Prints a line for each market run, then medians."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--only", choices=_ARRANGEMENTS, nargs="+", default=list(_ARRANGEMENTS))
    parser.add_argument("--job", type=Path, default=EXAMPLE)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    spec = load_job_file(arguments.job, arguments.set)
    with tempfile.TemporaryDirectory(prefix="shoal-overhead-") as name:
        root = Path(name)
        models = root / "models"
        run_local(spec.model_copy(update={"max_steps": 1}), models, 1)
        found: dict[tuple[str, int], list[float]] = {}
        before_s = run_local(spec, models, 2)
        for pair in range(arguments.pairs):
            one_thread_s = run_local(spec, models, 1)
            for arrangement in (_ARRANGEMENTS[name] for name in arguments.only):
                market_s = asyncio.run(run_market(spec, root, arrangement))
                after_s = run_local(spec, models, 2)
                alone_s = {1: one_thread_s, 2: (before_s + after_s) / 2}
                ratios = []
                for threads, wall_s in alone_s.items():
                    ratios.append(market_s / wall_s)
                    found.setdefault((arrangement.name, threads), []).append(ratios[-1])
                print(
                    f"pair {pair + 1}, {arrangement.name}: market {market_s:.1f} s, one process "
                    f"{one_thread_s:.1f} s (1 thread), {before_s:.1f} and {after_s:.1f} s "
                    "(2 threads); ratios " + ", ".join(f"{ratio:.2f}" for ratio in ratios),
                    flush=True,
                )
                before_s = after_s
        for (name, threads), ratios in found.items():
            median = statistics.median(ratios)
            print(f"median of {len(ratios)}, {name}: {median:.2f} times {threads} thread(s)")


if __name__ == "__main__":
    main()
