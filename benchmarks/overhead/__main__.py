"""``python -m benchmarks.overhead [--pairs 3] [--workers 2] [--job FILE] [--set max_steps=60]``.

Each pair runs the example job twice: through a whole market on this machine (chain,
orchestrator, workers) and as the same rollouts, gradients, updates and evaluations in
one process with no market, network, chain or verification.  Both start from a ready market
or a loaded interpreter; the base model is built beforehand.
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
from dataclasses import replace
from pathlib import Path

from shoal.client.api import ShoalClient
from shoal.client.devnet import Devnet, DevnetOptions
from shoal.client.devnet_files import worker_profile
from shoal.client.jobfile import load_job_file
from shoal.client.submission import open_gateway, submit_job
from shoal.protocol.errors import InvariantBroken
from shoal.protocol.job import JobSpec, JobState
from shoal.protocol.keystore import load_account

EXAMPLE = Path(__file__).parents[2] / "examples/addition.toml"


async def run_market(spec: JobSpec, root: Path, workers: int) -> float:
    """Wall seconds from submission to completion, escrow opened and closed included."""
    # Workers of one kind: what is measured is the market, not how unlike they are.
    profiles = tuple(replace(worker_profile(n), niceness=0) for n in range(workers))
    options = DevnetOptions(data_dir=root / "devnet", models_dir=root / "models", profiles=profiles)
    async with (
        Devnet(options) as devnet,
        ShoalClient(devnet.running.api_url) as client,
    ):
        account = load_account(devnet.running.requester_key)
        gateway = await open_gateway(devnet.info, account)
        async with gateway:
            started_s = time.perf_counter()
            submitted = await submit_job(client, gateway, spec, account)
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
    """Prints one line a pair, then medians."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--job", type=Path, default=EXAMPLE)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    spec = load_job_file(arguments.job, arguments.set)
    with tempfile.TemporaryDirectory(prefix="shoal-overhead-") as name:
        root = Path(name)
        models = root / "models"
        run_local(spec.model_copy(update={"max_steps": 1}), models, 1)
        rows = []
        for pair in range(arguments.pairs):
            market_s = asyncio.run(run_market(spec, root, arguments.workers))
            one_s, two_s = run_local(spec, models, 1), run_local(spec, models, 2)
            rows.append((market_s / one_s, market_s / two_s))
            print(
                f"pair {pair + 1}: market {market_s:.1f} s, one process {one_s:.1f} s "
                f"(1 thread), {two_s:.1f} s (2 threads); ratios {rows[-1][0]:.2f}, "
                f"{rows[-1][1]:.2f}",
                flush=True,
            )
        one, two = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"median ratio over {len(rows)} pairs: {one:.2f} (1 thread), {two:.2f} (2 threads)")


if __name__ == "__main__":
    main()
