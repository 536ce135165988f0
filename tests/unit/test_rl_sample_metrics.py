"""The figures of a batch of rollouts, in TRL's definitions."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import numpy as np
import pytest

from shoal.protocol.job import EnvSpec
from shoal.rl.environments import metric_names
from shoal.rl.sample_metrics import SampledBatch, sample_metrics

NAMES = ("addition", "reasoning_gym:gcd")


@dataclass(frozen=True, kw_only=True)
class Group:
    """The first ``cut`` completions are truncated at 5 tokens, the others have 3."""

    rewards: list[float]
    environment: int = 0
    staleness: int = 0
    cut: int = 0

    def truncated(self) -> list[bool]:
        return [number < self.cut for number in range(len(self.rewards))]


def figures_of(*groups: Group) -> dict[str, float]:
    truncated_b = np.array([cut for group in groups for cut in group.truncated()])
    batch = SampledBatch(
        environments_p=np.array([group.environment for group in groups]),
        rewards_pg=np.array([group.rewards for group in groups]),
        lengths_b=np.where(truncated_b, 5, 3),
        truncated_b=truncated_b,
        staleness_p=np.array([group.staleness for group in groups]),
    )
    return sample_metrics(batch, NAMES)


def test_the_spread_of_the_batch_is_not_that_of_its_groups() -> None:
    figures = figures_of(Group(rewards=[1.0, 1.0]), Group(rewards=[0.0, 0.0]))
    assert figures["reward_std"] == pytest.approx(statistics.stdev([1, 1, 0, 0]))
    assert figures["group_reward_std"] == 0.0
    assert figures["frac_reward_zero_std"] == 1.0
    mixed = figures_of(Group(rewards=[1.0, 0.0]), Group(rewards=[0.0, 0.0]))
    assert mixed["group_reward_std"] == pytest.approx(statistics.stdev([1, 0]) / 2)
    assert mixed["frac_reward_zero_std"] == 0.5


def test_rewards_are_told_by_environment() -> None:
    groups = [Group(rewards=[1.0, 0.0]), Group(rewards=[1.0, 1.0], environment=1)]
    figures = figures_of(*groups)
    assert figures["reward"] == 0.75
    assert figures["rewards/addition/mean"] == 0.5
    assert figures["rewards/reasoning_gym:gcd/mean"] == 1.0
    assert figures["rewards/reasoning_gym:gcd/std"] == 0.0
    assert "rewards/reasoning_gym:gcd/mean" not in figures_of(groups[0])


def test_lengths_are_told_with_and_without_what_was_cut_off() -> None:
    figures = figures_of(Group(rewards=[1.0, 0.0, 0.0, 0.0], cut=1))
    assert figures["completions/clipped_ratio"] == 0.25
    assert figures["completions/mean_length"] == 3.5
    assert figures["completions/mean_terminated_length"] == 3.0
    assert figures["completions/max_length"] == 5.0
    assert figures["completions/max_terminated_length"] == 3.0
    assert figures["num_tokens"] == 14.0
    none_ended = figures_of(Group(rewards=[0.0, 0.0], cut=2))
    assert none_ended["completions/clipped_ratio"] == 1.0
    assert none_ended["completions/mean_terminated_length"] == 0.0


def test_staleness_is_that_of_the_samples() -> None:
    figures = figures_of(Group(rewards=[1.0, 0.0], staleness=3), Group(rewards=[1.0, 0.0]))
    assert figures["sample/staleness_mean"] == 1.5
    assert figures["sample/staleness_max"] == 3.0


def test_environments_that_share_an_id_are_numbered() -> None:
    specs = [EnvSpec(id="addition"), EnvSpec(id="x"), EnvSpec(id="addition", args={"digits": 1})]
    assert metric_names(specs) == ("addition#0", "x", "addition#2")
