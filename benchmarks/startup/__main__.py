"""``python -m benchmarks.startup [--rounds 3]``: `shoal --help`, `shoal up`, and memory."""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from shoal.client.devnet import Devnet, DevnetOptions

LIMIT_HELP_S = 0.5
LIMIT_UP_S = 15.0
LIMIT_WORKER_MIB = 700


def help_s() -> float:
    """Wall seconds of ``shoal --help`` in a fresh process."""
    started_s = time.perf_counter()
    command = [sys.executable, "-m", "shoal.client", "--help"]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started_s


async def up(root: Path) -> tuple[float, float]:
    """Wall seconds until a market of three workers is ready, and its largest worker in MiB."""
    started_s = time.perf_counter()
    async with Devnet(DevnetOptions(data_dir=root)):
        ready_s = time.perf_counter() - started_s
        family = psutil.Process().children(recursive=True)
        workers = [child for child in family if "shoal.worker" in child.cmdline()]
        return ready_s, max(child.memory_info().rss for child in workers) / 2**20


def main() -> None:
    """Prints medians beside their limits."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    helps = [help_s() for _ in range(rounds)]
    ups = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="shoal-startup-") as name:
            ups.append(asyncio.run(up(Path(name) / "net")))
    ready_s, worker_mib = (statistics.median(column) for column in zip(*ups, strict=True))
    print("| what | median | limit |\n| --- | ---: | ---: |")
    print(f"| `shoal --help` | {statistics.median(helps):.2f} s | {LIMIT_HELP_S} s |")
    print(f"| `shoal up`, three workers | {ready_s:.1f} s | {LIMIT_UP_S:.0f} s |")
    print(f"| an idle worker's memory | {worker_mib:.0f} MiB | {LIMIT_WORKER_MIB} MiB |")


if __name__ == "__main__":
    main()
