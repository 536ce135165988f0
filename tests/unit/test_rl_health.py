"""Each diagnosis has a story that raises it, and a like story that must not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from shoal.rl.confidence import Estimate, wilson
from shoal.rl.health import WINDOW, HealthCode, HealthWatch

VECTORS = Path(__file__).parents[1] / "vectors"
# The addition example over the market, and the gcd example with samples four versions old.
RECORDED = {"healthy_run_metrics.jsonl": 1, "healthy_stale_run_metrics.jsonl": 4}
MAX_STALENESS = 1
Story = dict[str, float | list[float]]

HEALTHY: dict[str, float] = {
    "reward": 0.6,
    "reward_std": 0.45,
    "frac_reward_zero_std": 0.3,
    "entropy": 0.5,
    "mismatch_kl/mean": 0.01,
    "is_masked": 0.0,
    "completions/clipped_ratio": 0.02,
    "grad_norm": 0.8,
    "sample/staleness_mean": 1.0,
    "sample/staleness_max": 1.0,
    "market/results_judged": 10.0,
    "market/rejected_wrong_weights": 0.0,
}


def play(
    *parts: Mapping[str, float], max_staleness: int = MAX_STALENESS
) -> tuple[HealthWatch, list[tuple[HealthCode, bool]]]:
    """Ten healthy updates, then ten for each part, changed as it says."""
    watch = HealthWatch(max_staleness)
    changes: list[tuple[HealthCode, bool]] = []
    for number, part in enumerate(part for part in ({}, *parts) for _ in range(10)):
        metrics = {**HEALTHY, "step": number + 1.0, **part}
        changes += [(c.diagnosis.code, c.active) for c in watch.see_update(metrics)]
    return watch, changes


STORIES: dict[HealthCode, dict[str, float]] = {
    HealthCode.NO_SPREAD: {"frac_reward_zero_std": 0.9, "reward": 0.45},
    HealthCode.ENTROPY_COLLAPSE: {"entropy": 0.01},
    HealthCode.MISMATCH_HIGH: {"mismatch_kl/mean": 0.5},
    HealthCode.WEIGHTS_NOT_REACHING_SAMPLER: {"market/rejected_wrong_weights": 4.0},
    HealthCode.REWARD_CRASHED: {"reward": 0.1},
    HealthCode.COMPLETIONS_TRUNCATED: {"completions/clipped_ratio": 0.7},
    HealthCode.GRADIENT_EXPLODED: {"grad_norm": 40.0},
    HealthCode.GRADIENT_NOT_FINITE: {"market/failed/not_finite": 1.0},
    HealthCode.GRADER_ERRORS: {"market/failed/environment": 1.0},
}
BENIGN: dict[HealthCode, dict[str, float]] = {
    HealthCode.NO_SPREAD: {"frac_reward_zero_std": 0.9, "reward": 0.85},
    HealthCode.ENTROPY_COLLAPSE: {"entropy": 0.01, "reward": 0.95},
    HealthCode.MISMATCH_HIGH: {"mismatch_kl/mean": 0.1},
    HealthCode.WEIGHTS_NOT_REACHING_SAMPLER: {"market/rejected_wrong_weights": 0.4},
    HealthCode.REWARD_CRASHED: {"reward": 0.48},
    HealthCode.COMPLETIONS_TRUNCATED: {"completions/clipped_ratio": 0.3},
    HealthCode.GRADIENT_EXPLODED: {"grad_norm": 8.0},
    HealthCode.GRADIENT_NOT_FINITE: {"market/failed/out_of_memory": 1.0},
    HealthCode.GRADER_ERRORS: {"market/failed/stopping": 1.0},
}


def test_health_is_silent() -> None:
    watch, changes = play({}, {})
    assert changes == []
    assert watch.active == ()


@pytest.mark.parametrize("code", STORIES)
def test_a_fault_is_told_once_when_it_begins_and_once_when_it_ends(code: HealthCode) -> None:
    watch, changes = play(STORIES[code], {})
    assert changes == [(code, True), (code, False)]
    assert watch.active == ()
    still, _ = play(STORIES[code])
    (diagnosis,) = still.active
    assert diagnosis.code is code
    assert diagnosis.sentence == f"{diagnosis.finding}: {diagnosis.remedy}"


@pytest.mark.parametrize("code", BENIGN)
def test_what_only_looks_like_it_is_left_alone(code: HealthCode) -> None:
    assert play(BENIGN[code])[1] == []


def test_one_bad_update_is_not_enough() -> None:
    watch = HealthWatch(MAX_STALENESS)
    for step in range(30):
        bad = STORIES[HealthCode.GRADIENT_EXPLODED] if step == 20 else {}
        assert watch.see_update({**HEALTHY, "step": step + 1.0, **bad}) == []


def test_groups_without_spread_are_told_in_plain_words() -> None:
    hard, _ = play({"frac_reward_zero_std": 0.88, "reward": 0.2})
    assert next(d for d in hard.active if d.code is HealthCode.NO_SPREAD).sentence == (
        "88% of groups have zero reward spread and teach nothing: make tasks easier or raise "
        "the group size (rollouts_per_example)"
    )
    easy, _ = play({"frac_reward_zero_std": 0.97, "reward": 0.98})
    assert "nearly solved" in easy.active[0].remedy


def test_samples_of_the_current_version_may_hardly_differ() -> None:
    fresh = {"sample/staleness_mean": 0.0, "sample/staleness_max": 0.0, "mismatch_kl/mean": 0.01}
    watch, _ = play(fresh)
    (diagnosis,) = watch.active
    assert diagnosis.code is HealthCode.MISMATCH_HIGH
    assert "engines or number types" in diagnosis.remedy
    assert play({**fresh, "mismatch_kl/mean": 1e-7})[1] == []


def test_a_sampler_stuck_at_one_version_is_found() -> None:
    def changes(stuck_from: int) -> set[HealthCode]:
        watch = HealthWatch(max_staleness=2)
        found = set()
        for version in range(40):
            lag = max(min(version, 2), version - stuck_from)
            staleness = {"sample/staleness_mean": float(lag), "sample/staleness_max": float(lag)}
            metrics = {**HEALTHY, "step": version + 1.0, **staleness}
            found |= {change.diagnosis.code for change in watch.see_update(metrics)}
        return found

    assert changes(stuck_from=20) == {HealthCode.WEIGHTS_NOT_REACHING_SAMPLER}
    assert changes(stuck_from=1000) == set()


@pytest.mark.parametrize("max_staleness", [0, 1, 4, 16])
def test_waiting_for_the_first_versions_is_no_fault(max_staleness: int) -> None:
    watch = HealthWatch(max_staleness)
    for version in range(3 * max_staleness + 20):
        lag = float(min(version, max_staleness))
        staleness = {"sample/staleness_mean": lag, "sample/staleness_max": lag}
        fresh = {"mismatch_kl/mean": 0.0}
        assert watch.see_update({**HEALTHY, "step": version + 1.0, **staleness, **fresh}) == []


def held_out(rate: float) -> Estimate:
    return Estimate(value=rate, interval=wilson(rate, 512))


@pytest.mark.parametrize(
    ("last", "reward", "found"),
    [
        (0.4, 0.8, {HealthCode.HELD_OUT_FALLING}),
        (0.57, 0.8, set()),
        (0.4, 0.5, set()),
    ],
    ids=["falls while the reward rises", "within the noise", "falls with the reward"],
)
def test_held_out_accuracy_is_compared_with_the_reward_in_training(
    last: float, reward: float, found: set[HealthCode]
) -> None:
    watch = HealthWatch(MAX_STALENESS)
    codes: set[HealthCode] = set()
    for step in range(1, 41):
        if step == 15:
            watch.see_evaluation(15, held_out(0.6))
        if step == 25:
            watch.see_evaluation(25, held_out(last))
        metrics = {**HEALTHY, "step": float(step), "reward": 0.6 if step < 20 else reward}
        codes |= {change.diagnosis.code for change in watch.see_update(metrics)}
    assert codes == found


@pytest.mark.parametrize(
    ("arrivals", "found"),
    [
        ([(20, 0.6), (10, 0.4)], set()),
        ([(20, 0.6), (10, 0.9)], set()),
        ([(20, 0.6), (20, 0.4)], set()),
        ([(20, 0.6), (10, 0.4), (30, 0.4)], {HealthCode.HELD_OUT_FALLING}),
        ([(10, 0.6), (20, 0.4)], {HealthCode.HELD_OUT_FALLING}),
    ],
    ids=["rises", "late and better", "told twice", "falls after a late one", "falls"],
)
def test_an_evaluation_that_comes_late_is_no_fall(
    arrivals: list[tuple[int, float]], found: set[HealthCode]
) -> None:
    watch = HealthWatch(MAX_STALENESS)
    codes: set[HealthCode] = set()
    for step in range(1, 61):
        if step % 15 == 0 and step // 15 <= len(arrivals):
            version, rate = arrivals[step // 15 - 1]
            watch.see_evaluation(version, held_out(rate))
        metrics = {**HEALTHY, "step": float(step), "reward": 0.6 + 0.005 * step}
        codes |= {change.diagnosis.code for change in watch.see_update(metrics)}
    assert codes == found


def test_missing_metrics_raise_nothing() -> None:
    watch = HealthWatch(MAX_STALENESS)
    for step in range(3 * WINDOW):
        assert watch.see_update({"step": float(step)}) == []


def test_judging_a_job_needs_no_torch() -> None:
    code = (
        "import shoal.rl.health, shoal.rl.early_stop, shoal.rl.sample_metrics, sys; "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def recorded(name: str) -> Iterable[dict[str, float]]:
    return (json.loads(line) for line in (VECTORS / name).read_text().splitlines())


@pytest.mark.parametrize("name", RECORDED)
def test_a_real_healthy_run_raises_nothing(name: str) -> None:
    watch = HealthWatch(RECORDED[name])
    runs = list(recorded(name))
    assert len(runs) >= 40
    raised = [
        (metrics["step"], change.diagnosis.sentence)
        for metrics in runs
        for change in watch.see_update(metrics)
    ]
    assert raised == []


def test_the_same_run_with_its_learning_broken_does_not_stay_silent() -> None:
    watch = HealthWatch(MAX_STALENESS)
    found = set()
    for metrics in recorded("healthy_run_metrics.jsonl"):
        if metrics["step"] > 100:
            metrics = metrics | {"reward": 0.02, "entropy": 1e-4}
        found |= {change.diagnosis.code for change in watch.see_update(metrics)}
    assert found >= {HealthCode.REWARD_CRASHED, HealthCode.ENTROPY_COLLAPSE}
