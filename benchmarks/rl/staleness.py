"""What old samples cost: held-out accuracy by staleness, with and without correction.

Trains the acceptance workload in one process, every batch sampled exactly so many policy
versions before the one it updates, and prints a Markdown table.  ``clip`` is the default
correction, ``decoupled`` weights by truncated π_prox/μ, ``none`` takes old samples for new
ones: the negative control.  Each run is judged against the synchronous ones.  A run that is on
record (the file ``runs.json`` of ``--work``) is not done again.

    python -m benchmarks.rl.staleness --seeds 3
    python -m benchmarks.rl.staleness --seeds 1 --updates 60 --staleness 4 --only clip none
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.rl.record import Record
from shoal.protocol.job import BudgetSpec, EnvSpec, EvalSpec, JobSpec, SamplingSpec
from shoal.protocol.learning import (
    CorrectionSpec,
    LoraSpec,
    LossSpec,
    OldPolicy,
    OptimizerSpec,
    RatioBound,
)
from shoal.rl.base_models import fetch_base
from shoal.rl.local import train_locally

CORRECTIONS: dict[str, CorrectionSpec] = {
    "clip": CorrectionSpec(),
    "decoupled": CorrectionSpec(
        old_policy=OldPolicy.PROXIMAL,
        token_bound=RatioBound.TRUNCATE,
        sequence_bound=RatioBound.MASK,
    ),
    "none": CorrectionSpec(
        old_policy=OldPolicy.PROXIMAL,
        token_bound=RatioBound.NONE,
        sequence_bound=RatioBound.NONE,
    ),
}
WINDOW = 10
"""Updates over which the training reward is averaged when its lowest point is looked for."""


METRICS = ("mismatch_kl/mean", "clip_ratio/region_mean", "is_masked")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One finished run: held-out avg@k at its end, training reward by update, mean metrics."""

    after: float
    rewards: Sequence[float]
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Row:
    """The runs of one staleness and correction, one for each seed."""

    staleness: int
    correction: str
    runs: tuple[Run, ...]

    @property
    def accuracies(self) -> list[float]:
        """Held-out avg@k after each run."""
        return [run.after for run in self.runs]

    @property
    def lowest(self) -> float:
        """The lowest training reward on the way, of any seed."""
        return min(
            statistics.fmean(run.rewards[start : start + WINDOW])
            for run in self.runs
            for start in range(0, len(run.rewards), WINDOW)
        )

    def metric(self, name: str) -> float:
        """The mean of a metric over the runs."""
        return statistics.fmean(run.metrics[name] for run in self.runs)


def job(seed: int, updates: int, staleness: int, correction: str) -> JobSpec:
    """The acceptance workload: 64 prompts, 8 completions each, LoRA rank 16."""
    return JobSpec(
        name="staleness",
        model="builtin:tiny-addition",
        seed=seed,
        max_steps=updates,
        batch_size=512,
        rollouts_per_example=8,
        max_staleness=staleness,
        loss=LossSpec(correction=CORRECTIONS[correction]),
        optimizer=OptimizerSpec(learning_rate=1e-3),
        lora=LoraSpec(r=16, alpha=32),
        sampling=SamplingSpec(max_tokens=4),
        environments=(EnvSpec(id="addition"),),
        evaluation=EvalSpec(
            interval=updates, num_examples=800, samples_per_example=4, temperature=1.0
        ),
        budget=BudgetSpec(
            max_total_micros=1,
            max_rollout_micros=1,
            max_gradient_micros=1,
            max_evaluate_micros=1,
        ),
    )


def measure(spec: JobSpec, folder: Path) -> Run:
    """One run of ``spec``; a metric is the mean over the updates that had one."""
    run = train_locally(spec, folder)
    seen = [step.update.metrics for step in run.steps if step.update.metrics]
    return Run(
        after=run.reward_after,
        rewards=[step.reward for step in run.steps],
        metrics={name: statistics.fmean(metrics[name] for metrics in seen) for name in METRICS},
    )


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown, each mean also as a share of the synchronous one."""
    synchronous = statistics.fmean(rows[0].accuracies)
    lines = [
        "| staleness | correction | held-out avg@4 (seeds) | of synchronous | lowest reward "
        "| mismatch KL | clipped | masked |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        mean = statistics.fmean(row.accuracies)
        seeds = " ".join(f"{value:.3f}" for value in row.accuracies)
        lines.append(
            f"| {row.staleness} | {row.correction} | {mean:.3f} ({seeds}) "
            f"| {mean / synchronous:.1%} | {row.lowest:.3f} "
            f"| {row.metric('mismatch_kl/mean'):.4f} "
            f"| {row.metric('clip_ratio/region_mean'):.1%} | {row.metric('is_masked'):.1%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs what the command line asks for and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--staleness", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--only", nargs="+", choices=CORRECTIONS, default=list(CORRECTIONS))
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/staleness"))
    parser.add_argument("--models", type=Path, default=Path.home() / ".cache/shoal/models")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.models.mkdir(parents=True, exist_ok=True)
    folder = fetch_base("builtin:tiny-addition", args.models, allow_local=False)
    record = Record(args.work / "runs.json")

    def row(staleness: int, correction: str) -> Row:
        found = [
            record.find_or_do(
                f"staleness {staleness}, {correction}, seed {seed}",
                job(seed, args.updates, staleness, correction),
                lambda spec: asdict(measure(spec, folder)),
            )
            for seed in range(args.first_seed, args.first_seed + args.seeds)
        ]
        return Row(
            staleness=staleness, correction=correction, runs=tuple(Run(**run) for run in found)
        )

    # Without staleness every correction is the same: there is nothing to correct.
    rows = [row(0, "clip")]
    rows += [row(staleness, correction) for staleness in args.staleness for correction in args.only]
    sys.stdout.write(table(rows))


if __name__ == "__main__":
    main()
