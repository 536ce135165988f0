"""avg@k, pass@k and their intervals, against published and simulated figures."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.rl.confidence import Interval, estimate_mean, pass_at_k, score_held_out, wilson


def test_wilson_agrees_with_published_figures() -> None:
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I.
    for successes, trials, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        found = wilson(successes / trials, trials)
        assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


def test_one_greedy_answer_each_gives_wilsons_interval() -> None:
    rewards = [1.0] * 81 + [0.0] * 182
    assert estimate_mean(rewards, 1).interval == wilson(81 / 263, 263)


def test_samples_of_one_prompt_are_not_counted_as_independent() -> None:
    alike = estimate_mean([1.0] * 50 + [0.0] * 50, 8)
    mixed = estimate_mean([0.5] * 50 + [0.25, 0.75] * 25, 8)
    independent = wilson(0.5, 800)
    assert alike.interval == wilson(0.5, 100)
    assert mixed.interval.low >= alike.interval.low
    assert mixed.interval.low <= independent.low


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.Generator(np.random.Philox(key=3))
    covered = 0
    for _ in range(400):
        chances = random.beta(0.6, 0.4, size=64)
        values = random.binomial(4, chances) / 4
        interval = estimate_mean(values.tolist(), 4).interval
        covered += interval.low <= 0.6 <= interval.high
    # 95 % of 400 is 380; below 362 or above 395 has a probability under one in ten thousand.
    assert 362 <= covered <= 396


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one() -> None:
    for num_correct in range(6):
        outcomes = [index < num_correct for index in range(5)][:5]
        correct = sum(outcomes)
        for k in range(1, 6):
            subsets = list(itertools.combinations(outcomes, k))
            share = sum(any(subset) for subset in subsets) / len(subsets)
            assert pass_at_k(5, correct, k) == pytest.approx(share)


def test_the_naive_estimate_would_be_biased() -> None:
    # 1 − (1 − c/n)^k, which Chen et al. show to underestimate.
    assert pass_at_k(10, 2, 5) - 0.05 > 1 - (1 - 2 / 10) ** 5


def test_held_out_figures_carry_their_names() -> None:
    score = score_held_out([[1.0, 0.0, 0.0, 1.0], [0.0] * 4, [1.0] * 4])
    figures = score.metrics("eval/addition")
    assert figures["eval/addition/avg@4"] == pytest.approx(0.5)
    assert figures["eval/addition/pass@1"] == pytest.approx(0.5)
    assert figures["eval/addition/pass@4"] == pytest.approx(2 / 3)
    assert figures["eval/addition/avg@4/low"] < 0.5 < figures["eval/addition/avg@4/high"]
    assert {name.partition("@")[2].partition("/")[0] for name in figures} == {"1", "2", "4"}


def test_part_of_the_reward_is_no_solution() -> None:
    score = score_held_out([[0.9], [1.0]])
    assert score.average.value == pytest.approx(0.95)
    assert score.passes[1].value == 0.5


def test_above_means_no_overlap() -> None:
    assert Interval(low=0.6, high=0.7).is_above(Interval(low=0.3, high=0.55))
    assert not Interval(low=0.5, high=0.7).is_above(Interval(low=0.3, high=0.55))


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=40),
    st.integers(1, 16),
)
def test_an_estimate_stays_in_range_and_in_its_interval(values: list[float], samples: int) -> None:
    found = estimate_mean(values, samples)
    assert 0 <= found.interval.low <= found.value + 1e-9
    assert found.value - 1e-9 <= found.interval.high <= 1
    assert found.interval.high > found.interval.low
