"""Shoal's side of the peer benchmark: a job on standard input, figures on output."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from benchmarks.rl.peer import SideFigures, StepFigures
from shoal.protocol.job import JobSpec
from shoal.rl.local import train_locally


def main() -> None:
    """Trains the job from the base in the folder that ``argv`` names."""
    torch.set_num_threads(1)
    run = train_locally(JobSpec.decode(sys.stdin.buffer.read()), Path(sys.argv[1]))
    steps = tuple(
        StepFigures(
            rollout_cpu_s=step.cost.rollout_cpu_s,
            gradient_cpu_s=step.cost.gradient_cpu_s,
            update_cpu_s=step.cost.update_cpu_s,
            wall_s=step.wall_s,
            rollout_tokens=step.cost.rollout_tokens,
            gradient_tokens=step.cost.gradient_tokens,
        )
        for step in run.steps
    )
    print(SideFigures(steps=steps, accuracy=run.evaluations).to_json())


if __name__ == "__main__":
    main()
