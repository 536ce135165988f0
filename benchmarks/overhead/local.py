"""The single-process side of the benchmark: a job on standard input, figures on output."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from shoal.protocol.job import JobSpec
from shoal.rl.base_models import fetch_base
from shoal.rl.local import train_locally


def main() -> None:
    """Trains the job in this process; ``argv`` is the models' folder and a thread count."""
    models, threads = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(threads)
    spec = JobSpec.decode(sys.stdin.buffer.read())
    run = train_locally(spec, fetch_base(spec.model, models, allow_local=False))
    figures = {
        "wall_s": run.wall_s,
        "cpu_s": run.cpu_s,
        "reward_before": run.reward_before,
        "reward_after": run.reward_after,
    }
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
