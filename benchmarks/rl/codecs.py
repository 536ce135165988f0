"""What each gradient codec, and each number of local steps, costs in bytes and in accuracy.

Trains the acceptance workload once for every choice and seed, in one process with two
contributors, and prints a Markdown table.  A choice is judged against fp32 with the same
number of local steps, updates and seeds.

    python -m benchmarks.rl.codecs --seeds 3
    python -m benchmarks.rl.codecs --only fp32 topk --local-steps 1 --updates 60 --seeds 1
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from shoal.protocol.job import BudgetSpec, EnvSpec, EvalSpec, JobSpec, SamplingSpec
from shoal.protocol.learning import (
    CodecKind,
    CodecSpec,
    GradientSpec,
    LoraSpec,
    OptimizerSpec,
)
from shoal.rl.base_models import fetch_base
from shoal.rl.local import LocalRun, train_locally

CONTRIBUTORS = 2
CODECS: dict[str, CodecSpec] = {
    "fp32": CodecSpec(),
    "fp16": CodecSpec(kind=CodecKind.FP16),
    "int8": CodecSpec(kind=CodecKind.INT8, error_feedback=1.0),
    "topk-1/4-2bit": CodecSpec(
        kind=CodecKind.TOPK, chunk=1024, keep=256, bits=2, error_feedback=0.95
    ),
    "topk-1/8-4bit": CodecSpec(
        kind=CodecKind.TOPK, chunk=1024, keep=128, bits=4, error_feedback=0.95
    ),
    "topk-1/16-2bit": CodecSpec(
        kind=CodecKind.TOPK, chunk=4096, keep=256, bits=2, error_feedback=0.95
    ),
    "topk-1/64-2bit": CodecSpec(
        kind=CodecKind.TOPK, chunk=4096, keep=64, bits=2, error_feedback=0.95
    ),
    "topk-1/4-2bit-forgetful": CodecSpec(kind=CodecKind.TOPK, chunk=1024, keep=256, bits=2),
}
SHARE_OF_UPDATES = {1: 1.0, 2: 1.0, 4: 0.5, 8: 0.5}
"""Updates with this many local steps, as a share of those with one; the table names both."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """The runs of one choice, one for each seed."""

    name: str
    local_steps: int
    runs: tuple[LocalRun, ...]

    @property
    def accuracies(self) -> list[float]:
        """Held-out greedy accuracy after each run."""
        return [run.reward_after for run in self.runs]

    @property
    def upload_bytes(self) -> float:
        """What one contributor sent in a whole run."""
        sent = [sum(step.cost.upload_bytes for step in run.steps) for run in self.runs]
        return statistics.fmean(sent) / CONTRIBUTORS

    @property
    def download_bytes(self) -> float:
        """The policy versions one contributor fetched in a whole run."""
        return statistics.fmean(len(run.steps) * len(run.adapter) for run in self.runs)

    @property
    def updates(self) -> int:
        """Updates of a run."""
        return len(self.runs[0].steps)


def job(seed: int, updates: int, gradient: GradientSpec, learning_rate: float = 1e-3) -> JobSpec:
    """The acceptance workload: 64 prompts, 8 completions each, LoRA rank 16."""
    return JobSpec(
        name="codecs",
        model="builtin:tiny-addition",
        seed=seed,
        max_steps=updates,
        batch_size=512,
        rollouts_per_example=8,
        optimizer=OptimizerSpec(learning_rate=learning_rate),
        lora=LoraSpec(r=16, alpha=32),
        gradient=gradient,
        sampling=SamplingSpec(max_tokens=4),
        environments=(EnvSpec(id="addition"),),
        evaluation=EvalSpec(interval=updates, num_examples=800),
        budget=BudgetSpec(
            max_total_micros=1,
            max_rollout_micros=1,
            max_gradient_micros=1,
            max_evaluate_micros=1,
        ),
    )


def measure(name: str, local_steps: int, args: argparse.Namespace, folder: Path) -> Row:
    """One choice over all seeds."""
    updates = max(1, round(args.updates * SHARE_OF_UPDATES[local_steps]))
    gradient = GradientSpec(
        codec=CODECS[name],
        local_steps=local_steps,
        outer_learning_rate=args.outer_learning_rate,
        outer_momentum=args.outer_momentum,
    )
    rate = 1e-3 if local_steps == 1 else args.local_learning_rate
    runs = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        started_s = time.process_time()
        runs.append(
            train_locally(job(seed, updates, gradient, rate), folder, contributors=CONTRIBUTORS)
        )
        sys.stderr.write(
            f"{name} H={local_steps} seed {seed}: {runs[-1].reward_before:.3f} to "
            f"{runs[-1].reward_after:.3f} in {time.process_time() - started_s:.0f} CPU seconds\n"
        )
    return Row(name=name, local_steps=local_steps, runs=tuple(runs))


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown, each beside fp32 with the same number of local steps."""
    exact = {row.local_steps: row for row in rows if row.name == "fp32"}
    lines = [
        "| local steps | codec | updates | upload per update | times smaller | upload, whole run "
        "| download, whole run | accuracy (seeds) | less fp32 |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    for row in rows:
        base = exact.get(row.local_steps)
        mean = statistics.fmean(row.accuracies)
        seeds = " ".join(f"{value:.3f}" for value in row.accuracies)
        ratio = f"{base.upload_bytes / row.upload_bytes:.1f}" if base else "-"
        less = f"{mean - statistics.fmean(base.accuracies):+.3f}" if base else "-"
        lines.append(
            f"| {row.local_steps} | {row.name} | {row.updates} "
            f"| {row.upload_bytes / row.updates / 1e3:.1f} kB | {ratio} "
            f"| {row.upload_bytes / 1e6:.2f} MB | {row.download_bytes / 1e6:.1f} MB "
            f"| {mean:.3f} ({seeds}) | {less} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs what the command line asks for and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", nargs="+", help="codecs whose name begins so; all by default")
    parser.add_argument("--local-steps", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--updates", type=int, default=200, help="with one local step")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--local-learning-rate", type=float, default=3e-4)
    parser.add_argument("--outer-learning-rate", type=float, default=1.0)
    parser.add_argument("--outer-momentum", type=float, default=0.0)
    parser.add_argument("--models", type=Path, default=Path.home() / ".cache/shoal/models")
    args = parser.parse_args()
    unknown = set(args.local_steps) - SHARE_OF_UPDATES.keys()
    if unknown:
        parser.error(f"--local-steps takes {sorted(SHARE_OF_UPDATES)}, not {sorted(unknown)}")
    names = [n for n in CODECS if not args.only or any(n.startswith(o) for o in args.only)]
    torch.set_num_threads(1)
    args.models.mkdir(parents=True, exist_ok=True)
    folder = fetch_base("builtin:tiny-addition", args.models, allow_local=False)
    rows = [measure(name, steps, args, folder) for steps in args.local_steps for name in names]
    sys.stdout.write(table(rows))


if __name__ == "__main__":
    main()
