"""``python -m benchmarks.rl.peer [--pairs 3] [--steps 200]``: Shoal's loop against TRL's.

Each pair trains the same base on the same prompts twice, each in a fresh process with one
torch thread, in alternating order: with `shoal.rl.local` and with TRL's ``GRPOTrainer``.
Base, first adapter, prompts and their order, group size, batch, loss, optimiser and schedule
are equal.  Held-out greedy accuracy is measured by the same code for both, outside the timed
parts.  CPU seconds are those of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shoal.protocol.job import BudgetSpec, EnvSpec, EvalSpec, JobSpec, SamplingSpec
from shoal.protocol.learning import LoraSpec, OptimizerSpec
from shoal.rl.base_models import fetch_base

SIDES = ("shoal", "trl")
_SHARE_OF_GAIN = 0.95
"""The level both must reach: this share of the smaller of the two gains in accuracy."""


@dataclass(frozen=True, kw_only=True)
class StepFigures:
    """One update of either side.

    ``rollout`` is everything from prompts to advantages; ``gradient`` everything from there
    to the gradient; ``update`` the optimiser's step.  ``gradient_tokens`` were differentiated.
    """

    rollout_cpu_s: float
    gradient_cpu_s: float
    update_cpu_s: float
    wall_s: float
    rollout_tokens: int
    gradient_tokens: int


@dataclass(frozen=True, kw_only=True)
class SideFigures:
    """One run of either side; ``accuracy`` by number of updates done."""

    steps: tuple[StepFigures, ...]
    accuracy: Mapping[int, float]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SideFigures:
        """The figures a child process printed."""
        return cls(
            steps=tuple(StepFigures(**step) for step in data["steps"]),
            accuracy={int(version): value for version, value in data["accuracy"].items()},
        )

    def to_json(self) -> str:
        """What `from_json` reads."""
        return json.dumps({"steps": [asdict(s) for s in self.steps], "accuracy": self.accuracy})

    @property
    def step_cpu_s(self) -> list[float]:
        """CPU seconds of each update."""
        return [s.rollout_cpu_s + s.gradient_cpu_s + s.update_cpu_s for s in self.steps]

    def rollout_rate(self) -> float:
        """Completion tokens per CPU second of sampling."""
        tokens = sum(s.rollout_tokens for s in self.steps)
        return tokens / sum(s.rollout_cpu_s for s in self.steps)

    def gradient_rate(self) -> float:
        """Differentiated tokens per CPU second of the gradient."""
        tokens = sum(s.gradient_tokens for s in self.steps)
        return tokens / sum(s.gradient_cpu_s for s in self.steps)

    def cpu_s_to(self, level: float) -> float:
        """CPU seconds until accuracy first reached ``level``, interpolated between measurements."""
        spent = np.concatenate([[0.0], np.cumsum(self.step_cpu_s)])
        versions = sorted(self.accuracy)
        for before, after in pairwise(versions):
            low, high = self.accuracy[before], self.accuracy[after]
            if high >= level:
                share = 1.0 if high == low else max(0.0, (level - low) / (high - low))
                return float(spent[before] + share * (spent[after] - spent[before]))
        return float("inf")


def make_job(steps: int, seed: int, eval_every: int) -> JobSpec:
    """The workload: 64 prompts × 8 completions an update, LoRA r 16 on every linear module."""
    return JobSpec(
        name="peer",
        model="builtin:tiny-addition",
        seed=seed,
        max_steps=steps,
        batch_size=512,
        rollouts_per_example=8,
        max_staleness=0,
        optimizer=OptimizerSpec(learning_rate=1e-3, warmup_steps=5),
        lora=LoraSpec(r=16, alpha=32),
        sampling=SamplingSpec(max_tokens=4),
        environments=(EnvSpec(id="addition"),),
        evaluation=EvalSpec(interval=eval_every, num_examples=512),
        budget=BudgetSpec(
            max_total_micros=1,
            max_rollout_micros=1,
            max_gradient_micros=1,
            max_evaluate_micros=1,
        ),
    )


def run_side(side: str, spec: JobSpec, folder: Path) -> SideFigures:
    """The figures of one run in a fresh process with one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.rl.peer_{side}", str(folder)]
    done = subprocess.run(
        command, input=spec.encode(), stdout=subprocess.PIPE, check=True, env=environment
    )
    return SideFigures.from_json(json.loads(done.stdout.splitlines()[-1]))


def compare(shoal: SideFigures, trl: SideFigures) -> dict[str, float]:
    """The ratios of one pair; above 1 Shoal is faster, but for the cost ratios below."""
    start = (shoal.accuracy[0] + trl.accuracy[0]) / 2
    last = min(figures.accuracy[max(figures.accuracy)] for figures in (shoal, trl))
    level = start + _SHARE_OF_GAIN * (last - start)
    return {
        "level": level,
        "rollout": shoal.rollout_rate() / trl.rollout_rate(),
        "gradient": shoal.gradient_rate() / trl.gradient_rate(),
        "cpu_to_level": shoal.cpu_s_to(level) / trl.cpu_s_to(level),
        "step_cpu": sum(shoal.step_cpu_s) / sum(trl.step_cpu_s),
        "step_wall": sum(s.wall_s for s in shoal.steps) / sum(s.wall_s for s in trl.steps),
    }


def main() -> None:
    """Prints one table row a run, then the ratios of the pairs and their medians."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rl.peer", description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--eval-every", type=int, default=10)
    parser.add_argument("--models", type=Path, help="where built-in bases are kept")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "| pair | side | rollout tok/CPU s | gradient tok/CPU s | CPU ms a step | wall ms a step "
        "| accuracy | CPU s to level |\n|---:|---|---:|---:|---:|---:|---|---:|"
    )
    ratios = []
    with tempfile.TemporaryDirectory(prefix="shoal-peer-") as name:
        for pair in range(arguments.pairs):
            spec = make_job(arguments.steps, pair, arguments.eval_every)
            folder = fetch_base(spec.model, arguments.models or Path(name), allow_local=False)
            order = SIDES if pair % 2 == 0 else SIDES[::-1]
            runs = {side: run_side(side, spec, folder) for side in order}
            ratios.append(compare(runs["shoal"], runs["trl"]))
            for side in SIDES:
                print(_row(pair, side, runs[side], ratios[-1]["level"]), flush=True)
    print("\n| pair | " + " | ".join(ratios[0]) + " |\n|---:|" + "---:|" * len(ratios[0]))
    for pair, row in enumerate(ratios):
        print(f"| {pair} | " + " | ".join(f"{value:.2f}" for value in row.values()) + " |")
    medians = [statistics.median(row[key] for row in ratios) for key in ratios[0]]
    print("| median | " + " | ".join(f"{value:.2f}" for value in medians) + " |")


def _row(pair: int, side: str, run: SideFigures, level: float) -> str:
    cpu_ms = 1e3 * statistics.median(run.step_cpu_s)
    wall_ms = 1e3 * statistics.median(step.wall_s for step in run.steps)
    first, last = run.accuracy[0], run.accuracy[max(run.accuracy)]
    return (
        f"| {pair} | {side} | {run.rollout_rate():,.0f} | {run.gradient_rate():,.0f} "
        f"| {cpu_ms:.0f} | {wall_ms:.0f} | {first:.3f} → {last:.3f} | {run.cpu_s_to(level):.1f} |"
    )


if __name__ == "__main__":
    main()
