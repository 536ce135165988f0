"""A job half on a Ray site learns what it learns on plain workers alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_shared_with_a_site_matches_the_plain_one() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.rl.site", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=850,
    )
    assert done.stdout, done.stderr
    figures = json.loads(done.stdout)
    mixed, plain = figures["mixed"], figures["plain"]
    assert mixed["provenance"]
    assert plain["provenance"]
    assert 0.25 <= figures["site_share"] <= 0.75
    # Two jobs that learn nothing would agree as well.
    for job in (mixed, plain):
        assert job["after"]["interval"]["low"] > job["before"]["interval"]["high"]
    low, high = (mixed["after"]["interval"][end] for end in ("low", "high"))
    assert low <= plain["after"]["interval"]["high"]
    assert plain["after"]["interval"]["low"] <= high
    assert done.returncode == 0
