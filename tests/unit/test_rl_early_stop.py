"""Which version is the best, and when a job stops early."""

from __future__ import annotations

import itertools

import pytest

from shoal.protocol.job import EvalSpec
from shoal.rl.early_stop import Standings


def judged(rules: EvalSpec, *averages: float) -> Standings:
    standings = Standings(rules=rules)
    for number, average in enumerate(averages):
        standings.expect(10 * number)
        standings.record(10 * number, average)
    return standings


def test_the_best_is_the_first_of_the_highest() -> None:
    standings = judged(EvalSpec(), 0.2, 0.5, 0.4, 0.5)
    assert (standings.best_version, standings.best_average) == (10, 0.5)
    assert standings.stop_requested is None


def test_patience_counts_evaluations_in_a_row_without_a_better_one() -> None:
    rules = EvalSpec(patience=2)
    assert judged(rules, 0.2, 0.5, 0.5).stop_requested is None
    assert judged(rules, 0.2, 0.1, 0.3, 0.3).stop_requested is None
    stopped = judged(rules, 0.2, 0.5, 0.5, 0.4).stop_requested
    assert stopped == "2 evaluations in a row were no better than version 10 with 0.500"
    assert judged(EvalSpec(), 0.2, 0.5, 0.5, 0.4).stop_requested is None


def test_the_target_stops_and_the_first_reason_stays() -> None:
    standings = judged(EvalSpec(target=0.5, patience=1), 0.2, 0.5, 0.1)
    assert standings.stop_requested == (
        "version 10 reached 0.500 on held-out prompts, the target is 0.5"
    )


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_the_order_of_arrival_decides_nothing(order: tuple[int, ...]) -> None:
    averages = (0.2, 0.5, 0.5, 0.4)
    rules = EvalSpec(patience=2)
    standings = Standings(rules=rules)
    for version in range(4):
        standings.expect(version)
    for version in order:
        standings.record(version, averages[version])
    ordered = Standings(rules=rules)
    for version, average in enumerate(averages):
        ordered.expect(version)
        ordered.record(version, average)
    assert standings.best_version == ordered.best_version == 1
    assert standings.stop_requested == ordered.stop_requested


def test_a_new_best_is_told_once() -> None:
    standings = Standings(rules=EvalSpec())
    for version in (0, 5, 10):
        standings.expect(version)
    assert not standings.record(5, 0.4), "version 0 is not known yet"
    assert standings.record(0, 0.3)
    assert standings.best_version == 5
    assert not standings.record(10, 0.4)
