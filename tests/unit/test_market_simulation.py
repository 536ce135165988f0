"""Learning bidders, cartels, cheaters, crashes and shills against the market's pay rules."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shoal.market.pricing import choose_rule
from shoal.market.simulation.comparison import Effort, Estimate
from shoal.market.simulation.counterfactual import TRUTH
from shoal.market.simulation.learning import learn, truthful
from shoal.market.simulation.oracle import deviation_gains, shill_gains
from shoal.market.simulation.population import Population, Scenario, draw_population
from shoal.market.simulation.rules import PayRule
from shoal.market.simulation.trial import fitting_effort
from shoal.market.simulation.work import Audit, Ladder, do_work
from shoal.market.simulation.workforce import Faults, Shift, work_off
from shoal.protocol.errors import InvalidRequest


def sixteen_providers(*, num_markets: int = 12) -> Population:
    return draw_population(Scenario(num_providers=16), num_markets, seed=7)


def of_one_unit_each(population: Population) -> Population:
    one = np.ones_like(population.capacity)
    nine = np.full(population.num_markets, 9)
    return replace(population, capacity=one, most_units=one, num_units=nine)


def test_under_clarke_no_lie_gains_anything() -> None:
    assert deviation_gains(sixteen_providers(), PayRule.CLARKE).max() <= 1e-9


def test_with_one_unit_each_one_price_rewards_no_lie() -> None:
    assert deviation_gains(of_one_unit_each(sixteen_providers()), PayRule.UNIFORM).max() <= 1e-9


def test_with_many_units_each_one_price_rewards_lies_by_little() -> None:
    gains = deviation_gains(sixteen_providers(num_markets=100), PayRule.UNIFORM)

    assert 0 < gains.mean() <= 0.02


@pytest.mark.parametrize("units", [1, 100])
def test_the_search_for_lies_finds_those_that_pay(units: int) -> None:
    population = sixteen_providers()
    population = of_one_unit_each(population) if units == 1 else population

    assert deviation_gains(population, PayRule.PAY_AS_BID).mean() > 0.05


def test_under_pay_as_bid_a_false_bid_of_the_buyers_gains_nothing() -> None:
    assert shill_gains(sixteen_providers(), PayRule.PAY_AS_BID).max() == 0


def test_under_one_price_a_false_bid_of_the_buyers_gains() -> None:
    assert shill_gains(sixteen_providers(), PayRule.UNIFORM).max() > 0.01


def test_bidders_learn_to_ask_more_than_their_cost_and_less_than_the_reserve() -> None:
    population = draw_population(Scenario(num_providers=6), 2, seed=1)

    learned = learn(population, PayRule.PAY_AS_BID, rounds=60)

    assert (learned.unit_price_ratio > truthful(population).social_cost_ratio).all()
    assert (learned.highest_pay_micros <= learned.reserve_micros).all()
    assert (learned.last_actions != TRUTH).any()


def test_a_truthful_market_serves_all_at_the_least_cost() -> None:
    told = truthful(draw_population(Scenario(num_providers=10), 5, seed=3))

    assert told.social_cost_ratio == pytest.approx(np.ones(5))
    assert told.fill_rate == pytest.approx(np.ones(5))


def test_an_estimate_is_its_mean_and_students_interval() -> None:
    estimate = Estimate.of(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))

    # t(0.975, 4) = 2.776, standard error √2.5 ÷ √5.
    assert estimate.mean == 3.0
    assert estimate.half_width == pytest.approx(2.776 * 0.5**0.5, rel=0.01)
    assert Estimate.of(np.array([1.0])).half_width == np.inf


def test_large_markets_are_simulated_with_less_effort() -> None:
    small, large = fitting_effort(40), fitting_effort(10_000)

    assert (small.markets, large.markets) == (32, 1)
    assert large.rounds < small.rounds
    assert fitting_effort(10_000, markets=3, rounds=7) == Effort(markets=3, rounds=7)


@pytest.mark.parametrize(
    "field", [{"num_providers": 1}, {"load": 0.0}, {"share_cap": 0.0}, {"num_giants": 9}]
)
def test_a_market_that_cannot_be_is_refused(field: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        replace(Scenario(num_providers=9), **field)  # type: ignore[arg-type]

    assert refused.value.code == "bad_scenario"


# The work.


def rungs(count: int, **changes: object) -> Ladder:
    fields: dict[str, object] = {
        "capacity": np.full(count, 4),
        "pay_micros": np.full(count, 10),
        "seconds_per_unit": np.full(count, 30.0),
        "failure_rate": np.zeros(count),
        "crash_at_s": np.full(count, np.inf),
        "cheats": np.zeros(count, dtype=np.bool_),
        "stake_micros": np.zeros(count, dtype=np.int64),
    }
    return Ladder(**fields | changes)  # type: ignore[arg-type]


def test_work_goes_to_the_cheapest_rungs_and_is_paid_once() -> None:
    done = do_work(rungs(5), 200, at_once=8, audit=Audit())

    assert done.accepted.sum() == 200
    assert done.accepted[:2].sum() > 190
    assert done.unfinished == 0
    # The last few were given out twice.
    assert 200 < done.attempts <= 210


def test_failed_work_goes_down_the_ladder() -> None:
    done = do_work(rungs(3, failure_rate=np.array([1.0, 0.0, 0.0])), 40, at_once=4, audit=Audit())

    assert done.accepted[0] == 0
    assert done.accepted[1:].sum() == 40


def test_work_that_nobody_is_left_to_do_is_said_to_be_undone() -> None:
    done = do_work(rungs(2, crash_at_s=np.full(2, 60.0)), 400, at_once=8, audit=Audit())

    assert done.unfinished > 0
    assert done.unfinished + done.accepted.sum() == 400


def test_a_caught_cheater_is_out_and_others_do_what_it_held() -> None:
    ladder = rungs(3, cheats=np.array([True, False, False]), stake_micros=np.array([500, 0, 0]))

    done = do_work(ladder, 100, at_once=8, audit=Audit(rate=1.0, power=1.0))

    assert done.caught.tolist() == [True, False, False]
    assert done.cheater_profit_micros.tolist() == [-500, 0, 0]
    assert (done.bad_units, done.accepted.sum()) == (0, 100)


@pytest.fixture(scope="module")
def shift() -> Shift:
    return shift_with(Faults())


def shift_with(faults: Faults) -> Shift:
    population = draw_population(Scenario(num_providers=60, mean_capacity=16), 1, seed=5)
    rule = PayRule(str(choose_rule(60)))
    return work_off(population, truthful(population), rule, 15_000, faults=faults)


def test_crashes_and_cheaters_lengthen_the_work_by_half_at_most(shift: Shift) -> None:
    assert shift.num_crashed > 0
    assert shift.done.unfinished == 0
    assert shift.makespan_ratio <= 1.5


def test_when_nearly_all_providers_crash_the_work_takes_much_longer() -> None:
    shift = shift_with(Faults(crash_share=0.95, cheat_share=0.0))

    assert shift.makespan_ratio > 1.5


def test_every_cheater_loses_more_than_it_is_paid(shift: Shift) -> None:
    assert shift.cheats.sum() == 3
    assert (shift.done.cheater_profit_micros[shift.cheats] < 0).all()


def test_cheaters_that_are_hardly_ever_audited_gain() -> None:
    shift = shift_with(Faults(audit=Audit(rate=0.05, power=0.0001)))

    assert shift.cheaters_ahead == 3


def test_without_audits_there_is_no_simulation_of_them() -> None:
    with pytest.raises(InvalidRequest):
        Faults(audit=Audit(rate=0.0))
