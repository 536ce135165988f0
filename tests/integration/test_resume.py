"""A job killed at any point ends with the very weights of one that was never killed."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from resumable_job import SPEC, STALENESS, STEPS, Ending, Play, played

from shoal.protocol.job import CheckpointSpec, EvalSpec, Release
from shoal.rl.base_models import WarmStart, build_base

pytestmark = pytest.mark.timeout(600)

KILLS_PER_JOB = (4, 4, 4, 4, 1, 1, 1, 1)
"""Twenty kills: some jobs are killed again and again, some once, late."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that answers some prompts rightly and some not, so that groups have spread."""
    torch.set_num_threads(1)
    recipe = WarmStart(
        environment=SPEC["environments"][0], steps=30, batch_size=64, learning_rate=2e-3
    )
    return build_base(recipe, tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def undisturbed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Ending:
    """The job, run to its end by one process and one worker."""
    return finished(Play(folder=tmp_path_factory.mktemp("undisturbed"), base=base))


def finished(play: Play) -> Ending:
    ending = played(play)
    assert ending is not None
    return ending


def same_learning(one: Ending, other: Ending) -> bool:
    return (
        one.adapter_sha256 == other.adapter_sha256
        and one.optimizer_sha256 == other.optimizer_sha256
        and one.evaluations == other.evaluations
        and one.rewards == other.rewards
    )


def test_an_undisturbed_job_samples_as_stale_as_it_may(undisturbed: Ending) -> None:
    assert (undisturbed.version, undisturbed.reason) == (STEPS, "")
    assert undisturbed.staleness == [min(STALENESS, step) for step in range(STEPS)]
    assert sorted(undisturbed.evaluations) == [0, 2, 4, 6]
    assert len(set(undisturbed.rewards)) > 1
    assert undisturbed.released_sha256 == undisturbed.adapter_sha256
    # Groups without spread were drawn again, and every draw was paid once.
    groups = STEPS * SPEC["batch_size"] // SPEC["rollouts_per_example"]
    assert undisturbed.paid_rollouts == groups + undisturbed.redrawn > groups


def test_who_does_the_work_does_not_show_in_the_weights(
    undisturbed: Ending, base: Path, tmp_path: Path
) -> None:
    ending = finished(Play(folder=tmp_path, base=base, num_workers=3, num_refusing=1))
    assert same_learning(ending, undisturbed)


def test_a_job_killed_anywhere_ends_with_the_same_weights_and_scores(
    undisturbed: Ending, base: Path, tmp_path: Path
) -> None:
    draw, steps = random.Random(20), undisturbed.steps_counted

    def kill_at(kills: int) -> int:
        low, high = (1, steps // 5) if kills > 1 else (steps // 3, steps * 9 // 10)
        return draw.randrange(low, high)

    def ended(number: int, kills_at: list[int]) -> Ending:
        folder = tmp_path / str(number)
        for step in kills_at:
            assert played(Play(folder=folder, base=base, kill_at=step)) is None
        return finished(Play(folder=folder, base=base))

    jobs = [[kill_at(kills) for _ in range(kills)] for kills in KILLS_PER_JOB]
    # Two jobs at a time: each computes in one thread.
    with ThreadPoolExecutor(2) as pool:
        for ending in pool.map(ended, range(len(jobs)), jobs):
            assert same_learning(ending, undisturbed)
            # Work accepted before a kill was neither lost nor bought again.
            assert ending.paid_rollouts == undisturbed.paid_rollouts


def test_forgetting_the_optimisers_moments_would_show(
    undisturbed: Ending, base: Path, tmp_path: Path
) -> None:
    kill_at = undisturbed.steps_counted // 2
    assert played(Play(folder=tmp_path, base=base, kill_at=kill_at)) is None
    assert not same_learning(
        finished(Play(folder=tmp_path, base=base, forget_moments=True)), undisturbed
    )


def test_a_job_stops_early_at_the_same_version_with_or_without_a_kill_and_releases_its_best(
    base: Path, tmp_path: Path
) -> None:
    # Any score reaches this target, so the first evaluation decides; it is looked at one
    # version after the last that samples under version 0.
    spec = {
        "evaluation": EvalSpec(interval=1, num_examples=6, target=0.0),
        "checkpoint": CheckpointSpec(interval=4, keep_last=1, release=Release.BEST),
    }
    straight = finished(Play(folder=tmp_path / "straight", base=base, spec=spec))
    assert straight.version == STALENESS + 1
    assert straight.reason.startswith("version 0 reached")
    assert sorted(straight.evaluations) == list(range(STALENESS + 2))
    best = max(straight.evaluations.items(), key=lambda pair: (pair[1], -pair[0]))[0]
    assert straight.released_version == best
    kill_at = straight.steps_counted // 2
    assert played(Play(folder=tmp_path / "cut", base=base, spec=spec, kill_at=kill_at)) is None
    resumed = finished(Play(folder=tmp_path / "cut", base=base, spec=spec))
    assert same_learning(resumed, straight)
    assert (resumed.version, resumed.reason) == (straight.version, straight.reason)
    assert (resumed.released_version, resumed.released_sha256) == (best, straight.released_sha256)
