"""Each reasoning-gym example improves significantly on prompts it never saw."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.client.jobfile import load_job_file
from shoal.rl.base_models import fetch_base
from shoal.rl.local import train_locally

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("task", ["gcd", "leg_counting", "spell_backward"])
def test_held_out_accuracy_rises_significantly(task: str, tmp_path: Path) -> None:
    spec = load_job_file(EXAMPLES / f"{task}.toml", [])
    run = train_locally(spec, fetch_base(spec.model, tmp_path, allow_local=False))
    before, after = run.scores[0].average, run.scores[spec.max_steps].average
    assert after.interval.is_above(before.interval), (before, after)
