"""Bidders who learn: what each pay rule costs, thick and thin, and what a cartel adds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shoal.market.pricing import choose_rule
from shoal.market.simulation.comparison import TRUTHFUL, Comparison, Effort, compare
from shoal.market.simulation.population import Scenario
from shoal.market.simulation.rules import PayRule

# The unit prices of docs/market-simulation.md, from 32 markets and 2,000 rounds.
PUBLISHED = {
    12: {PayRule.PAY_AS_BID: 1.272, PayRule.UNIFORM: 1.330},
    40: {PayRule.PAY_AS_BID: 1.275, PayRule.UNIFORM: 1.266},
}
EFFORT = Effort(markets=8, rounds=1_200)
SHORT = Effort(markets=8, rounds=400)
BOTH = (PayRule.PAY_AS_BID, PayRule.UNIFORM)


@pytest.fixture(scope="module")
def learned() -> dict[int, Comparison]:
    return {
        count: compare("reduced", Scenario(num_providers=count), EFFORT, BOTH)[0]
        for count in PUBLISHED
    }


def unit_price(comparison: Comparison, rule: PayRule | str) -> float:
    return comparison.result(str(rule)).unit_price.mean


@pytest.mark.parametrize("rule", BOTH)
@pytest.mark.parametrize("count", list(PUBLISHED))
def test_the_published_table_is_found_again(
    learned: dict[int, Comparison], count: int, rule: PayRule
) -> None:
    assert unit_price(learned[count], rule) == pytest.approx(PUBLISHED[count][rule], rel=0.05)


def test_pay_as_bid_costs_less_in_thin_markets_and_one_price_in_thick_ones(
    learned: dict[int, Comparison],
) -> None:
    for count, cheaper, dearer in ((12, *BOTH), (40, *BOTH[::-1])):
        assert unit_price(learned[count], cheaper) < unit_price(learned[count], dearer)
        assert str(choose_rule(count)) == str(cheaper)


def test_nobody_who_learns_is_cheaper_than_the_truth(learned: dict[int, Comparison]) -> None:
    for comparison in learned.values():
        truth = unit_price(comparison, TRUTHFUL)
        assert all(unit_price(comparison, rule) > truth for rule in BOTH)


@pytest.mark.parametrize("count", list(PUBLISHED))
def test_a_cartel_of_a_quarter_raises_the_cost_by_a_tenth_at_most(count: int) -> None:
    rule = PayRule(str(choose_rule(count)))
    alone = Scenario(num_providers=count)
    without, with_cartel = (
        compare("cartel", scenario, SHORT, (rule,))[0].result(str(rule))
        for scenario in (alone, replace(alone, cartel_size=count // 4))
    )

    assert with_cartel.unit_price.mean <= 1.10 * without.unit_price.mean
    assert with_cartel.highest_pay_of_reserve <= 1


def test_a_cartel_nobody_can_do_without_takes_more() -> None:
    scenario = Scenario(num_providers=12)
    effort = replace(SHORT, rounds=150)
    without, with_cartel = (
        compare("pivotal", item, effort, (PayRule.UNIFORM,))[0].result("uniform")
        for item in (scenario, replace(scenario, cartel_size=6))
    )

    assert with_cartel.unit_price.mean > 1.10 * without.unit_price.mean
    assert with_cartel.highest_pay_of_reserve == pytest.approx(1.0)


def test_the_same_seed_gives_the_same_table() -> None:
    effort = Effort(markets=4, rounds=40, seed=9)

    first, second = (
        compare("again", Scenario(num_providers=8, load_spread=0.25), effort)[0] for _ in range(2)
    )

    assert np.isfinite(unit_price(first, PayRule.POSTED))
    assert first == second
