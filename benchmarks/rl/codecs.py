"""What each gradient codec, and each number of local steps, costs in bytes and in accuracy.

Trains the acceptance workload once for every choice and seed, in one process with two
contributors, and prints a Markdown table.  Every run has the same number of rollouts: ``h4``
are four local steps, a batch four times as large and a quarter of the updates, so a local step
sees as many rollouts as a contributor's part of a batch of ``h1``; ``b4`` is as large a batch
with one step, which sends as many bytes.  A run that is on record (the file ``runs.json`` of
``--work``) is not done again.

    python -m benchmarks.rl.codecs --schedules h1 h2 h4 h8 b4 --seeds 1
    python -m benchmarks.rl.codecs --only fp32 int8 --schedules h1 --rollouts 30720 --seeds 1
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.rl.record import Record
from shoal.protocol.job import BudgetSpec, EnvSpec, EvalSpec, JobSpec, SamplingSpec
from shoal.protocol.learning import (
    CodecKind,
    CodecSpec,
    GradientSpec,
    LoraSpec,
    OptimizerSpec,
)
from shoal.rl.base_models import fetch_base
from shoal.rl.local import train_locally

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
BATCH_SIZE = 512
"""Rollouts of a batch of ``h1``."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a run is trained.

    The rates of ``h4`` and ``b4`` are the best of those that the README lists.  ``batches`` is
    how many times larger a batch is than one of ``h1``.
    """

    local_steps: int
    batches: int
    learning_rate: float
    warmup_steps: int
    outer_learning_rate: float = 1.0
    outer_momentum: float = 0.0
    max_staleness: int = 0


SCHEDULES: dict[str, Schedule] = {
    "h1": Schedule(local_steps=1, batches=1, learning_rate=1e-3, warmup_steps=5, max_staleness=1),
    "h2": Schedule(
        local_steps=2,
        batches=2,
        learning_rate=1e-3,
        warmup_steps=8,
        outer_learning_rate=0.7,
        outer_momentum=0.6,
    ),
    "h4": Schedule(
        local_steps=4,
        batches=4,
        learning_rate=1e-3,
        warmup_steps=2,
        outer_learning_rate=0.5,
        outer_momentum=0.6,
    ),
    "h8": Schedule(
        local_steps=8,
        batches=8,
        learning_rate=1e-3,
        warmup_steps=4,
        outer_learning_rate=0.7,
        outer_momentum=0.6,
    ),
    "b4": Schedule(local_steps=1, batches=4, learning_rate=3e-3, warmup_steps=5, max_staleness=1),
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One finished run; bytes are one contributor's."""

    upload_bytes: float
    download_bytes: float
    updates: int
    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """The runs of one choice, one for each seed."""

    codec: str
    schedule: str
    runs: tuple[Run, ...]

    @property
    def accuracies(self) -> list[float]:
        """Held-out greedy accuracy after each run."""
        return [run.after for run in self.runs]

    @property
    def upload_bytes(self) -> float:
        """What one contributor sent in a whole run."""
        return statistics.fmean(run.upload_bytes for run in self.runs)

    @property
    def download_bytes(self) -> float:
        """The policy versions one contributor fetched in a whole run."""
        return statistics.fmean(run.download_bytes for run in self.runs)

    @property
    def updates(self) -> int:
        """Updates of a run."""
        return self.runs[0].updates


def job(seed: int, rollouts: int, codec: CodecSpec, schedule: Schedule) -> JobSpec:
    """The acceptance workload: LoRA rank 16, 64 prompts of 8 completions or a multiple of it."""
    updates = max(1, rollouts // (BATCH_SIZE * schedule.batches))
    return JobSpec(
        name="codecs",
        model="builtin:tiny-addition",
        seed=seed,
        max_steps=updates,
        batch_size=BATCH_SIZE * schedule.batches,
        rollouts_per_example=8,
        max_staleness=schedule.max_staleness,
        optimizer=OptimizerSpec(
            learning_rate=schedule.learning_rate, warmup_steps=schedule.warmup_steps
        ),
        lora=LoraSpec(r=16, alpha=32),
        gradient=GradientSpec(
            codec=codec,
            local_steps=schedule.local_steps,
            outer_learning_rate=schedule.outer_learning_rate,
            outer_momentum=schedule.outer_momentum,
        ),
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


def measure(spec: JobSpec, folder: Path) -> Run:
    """One run of ``spec``."""
    run = train_locally(spec, folder, contributors=CONTRIBUTORS)
    return Run(
        upload_bytes=sum(step.cost.upload_bytes for step in run.steps) / CONTRIBUTORS,
        download_bytes=len(run.steps) * len(run.adapter),
        updates=len(run.steps),
        before=run.reward_before,
        after=run.reward_after,
    )


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown, each beside fp32 with the same schedule.

    How many times smaller an upload is refers to the largest in the table.
    """
    exact = {row.schedule: row for row in rows if row.codec == "fp32"}
    largest = max(row.upload_bytes for row in rows)
    lines = [
        "| schedule | codec | updates | upload per update | upload, whole run "
        "| times smaller | download, whole run | accuracy (seeds) | less fp32 |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    for row in rows:
        base = exact.get(row.schedule)
        mean = statistics.fmean(row.accuracies)
        seeds = " ".join(f"{value:.3f}" for value in row.accuracies)
        less = f"{mean - statistics.fmean(base.accuracies):+.3f}" if base else "-"
        lines.append(
            f"| {row.schedule} | {row.codec} | {row.updates} "
            f"| {row.upload_bytes / row.updates / 1e3:.1f} kB "
            f"| {row.upload_bytes / 1e6:.2f} MB | {largest / row.upload_bytes:.1f} "
            f"| {row.download_bytes / 1e6:.1f} MB | {mean:.3f} ({seeds}) | {less} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs what the command line asks for and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=CODECS, default=list(CODECS))
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--rollouts", type=int, default=200 * BATCH_SIZE)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/codecs"))
    parser.add_argument("--models", type=Path, default=Path.home() / ".cache/shoal/models")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.models.mkdir(parents=True, exist_ok=True)
    folder = fetch_base("builtin:tiny-addition", args.models, allow_local=False)
    record = Record(args.work / "runs.json")

    def row(schedule: str, name: str) -> Row:
        found = [
            record.find_or_do(
                f"{schedule}, {name}, seed {seed}",
                job(seed, args.rollouts, CODECS[name], SCHEDULES[schedule]),
                lambda spec: asdict(measure(spec, folder)),
            )
            for seed in range(args.first_seed, args.first_seed + args.seeds)
        ]
        return Row(codec=name, schedule=schedule, runs=tuple(Run(**run) for run in found))

    rows = [row(schedule, name) for schedule in args.schedules for name in args.only]
    sys.stdout.write(table(rows))


if __name__ == "__main__":
    main()
