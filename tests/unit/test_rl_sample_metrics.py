"""The figures of a batch of rollouts, in TRL's definitions."""

from __future__ import annotations

import statistics

import pytest

from shoal.protocol.job import EnvSpec
from shoal.rl.environments import metric_names
from shoal.rl.sample_metrics import SampledGroup, sample_metrics

NAMES = ("addition", "reasoning_gym:gcd")


def group(
    rewards: list[float], environment: int = 0, staleness: int = 0, cut: int = 0
) -> SampledGroup:
    """The first ``cut`` completions are truncated at 5 tokens, the others have 3."""
    truncated = [number < cut for number in range(len(rewards))]
    return SampledGroup(
        environment=environment,
        rewards=rewards,
        lengths=[5 if flag else 3 for flag in truncated],
        truncated=truncated,
        staleness=staleness,
    )


def test_the_spread_of_the_batch_is_not_that_of_its_groups() -> None:
    figures = sample_metrics([group([1.0, 1.0]), group([0.0, 0.0])], NAMES)
    assert figures["reward_std"] == pytest.approx(statistics.stdev([1, 1, 0, 0]))
    assert figures["group_reward_std"] == 0.0
    assert figures["frac_reward_zero_std"] == 1.0
    mixed = sample_metrics([group([1.0, 0.0]), group([0.0, 0.0])], NAMES)
    assert mixed["group_reward_std"] == pytest.approx(statistics.stdev([1, 0]) / 2)
    assert mixed["frac_reward_zero_std"] == 0.5


def test_rewards_are_told_by_environment() -> None:
    groups = [group([1.0, 0.0]), group([1.0, 1.0], environment=1)]
    figures = sample_metrics(groups, NAMES)
    assert figures["reward"] == 0.75
    assert figures["rewards/addition/mean"] == 0.5
    assert figures["rewards/reasoning_gym:gcd/mean"] == 1.0
    assert figures["rewards/reasoning_gym:gcd/std"] == 0.0
    assert "rewards/reasoning_gym:gcd/mean" not in sample_metrics(groups[:1], NAMES)


def test_lengths_are_told_with_and_without_what_was_cut_off() -> None:
    figures = sample_metrics([group([1.0, 0.0, 0.0, 0.0], cut=1)], NAMES)
    assert figures["completions/clipped_ratio"] == 0.25
    assert figures["completions/mean_length"] == 3.5
    assert figures["completions/mean_terminated_length"] == 3.0
    assert figures["completions/max_length"] == 5.0
    assert figures["completions/max_terminated_length"] == 3.0
    assert figures["num_tokens"] == 14.0
    none_ended = sample_metrics([group([0.0, 0.0], cut=2)], NAMES)
    assert none_ended["completions/clipped_ratio"] == 1.0
    assert none_ended["completions/mean_terminated_length"] == 0.0


def test_staleness_is_that_of_the_samples() -> None:
    figures = sample_metrics([group([1.0, 0.0], staleness=3), group([1.0, 0.0])], NAMES)
    assert figures["sample/staleness_mean"] == 1.5
    assert figures["sample/staleness_max"] == 3.0


def test_environments_that_share_an_id_are_numbered() -> None:
    specs = [EnvSpec(id="addition"), EnvSpec(id="x"), EnvSpec(id="addition", args={"digits": 1})]
    assert metric_names(specs) == ("addition#0", "x", "addition#2")
