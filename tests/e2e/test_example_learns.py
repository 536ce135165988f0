"""The example job, whole, for three seeds: what the README says it reaches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from shoal_command import run, settings

MIN_RISE = 0.30
MAX_WALL_S = 360


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_held_out_accuracy_rises_by_thirty_points(tmp_path: Path, seed: int) -> None:
    out = tmp_path / "out"
    done = run("demo", "--out", str(out), *settings(f"seed={seed}"), timeout_s=1100)
    assert done.returncode == 0, done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert summary["reward_after"] - summary["reward_before"] >= MIN_RISE
    assert summary["wall_s"] <= MAX_WALL_S
    assert summary["provenance"]["verified"]
