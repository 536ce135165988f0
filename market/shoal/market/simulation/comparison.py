"""The pay rules side by side: what the buyer pays, what is lost, who earns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from shoal.market.simulation.learning import DEFAULT_ROUNDS, Learned, learn, truthful
from shoal.market.simulation.population import Floats, Ints, Population, Scenario, draw_population
from shoal.market.simulation.rules import PayRule

TRUTHFUL = "truthful_uniform"
# The markets of the reference's table, §2.3, and both of its controls for the cap.
TABLE = (
    ("12 providers", Scenario(num_providers=12)),
    ("12, two giants", Scenario(num_providers=12, num_giants=2)),
    ("12, two giants, share cap 15 %", Scenario(num_providers=12, num_giants=2, share_cap=0.15)),
    ("40 providers", Scenario(num_providers=40)),
    ("12, share cap 15 %", Scenario(num_providers=12, share_cap=0.15)),
    ("12, share cap 15 %, cartel of 3", Scenario(num_providers=12, share_cap=0.15, cartel_size=3)),
    ("12, cartel of 3", Scenario(num_providers=12, cartel_size=3)),
    ("40, cartel of 10", Scenario(num_providers=40, cartel_size=10)),
)
THICKNESSES = (8, 12, 16, 20, 24, 28, 32, 40, 64)
_FEWEST_MARKETS = 4
_QUARTERS = ("smallest quarter", "second", "third", "largest quarter")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over independent markets and half the width of its 95 % interval.

    Fewer than four markets tell too little of their spread: the half-width is then infinite.
    """

    mean: float
    half_width: float

    @classmethod
    def of(cls, values: Floats) -> Estimate:
        """The estimate from one value for each market."""
        count = len(values)
        if count < _FEWEST_MARKETS:
            return cls(mean=float(values.mean()), half_width=math.inf)
        error = float(values.std(ddof=1)) / math.sqrt(count)
        return cls(mean=float(values.mean()), half_width=_t95(count - 1) * error)


@dataclass(frozen=True, kw_only=True)
class RuleResult:
    """One pay rule in one kind of market.

    ``rule`` is a `PayRule` or `TRUTHFUL`.  ``unit_price`` is pay ÷ served unit ÷ the least
    true average cost; ``pay`` is pay ÷ true cost of the units served.
    """

    rule: str
    unit_price: Estimate
    pay: Estimate
    social_cost: Estimate
    fill_rate: Estimate
    highest_pay_of_reserve: float
    sizes: tuple[SizeClass, ...]


@dataclass(frozen=True, kw_only=True)
class SizeClass:
    """What a quarter of the providers, by capacity, has of the market; means over markets.

    ``margin`` is income ÷ true cost of the units done, less 1; absent when none were done.
    """

    name: str
    capacity_share: float
    unit_share: float
    income_share: float
    margin: float | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Every rule in one kind of market."""

    name: str
    scenario: Scenario
    rules: tuple[RuleResult, ...]

    def result(self, rule: str) -> RuleResult:
        """The result of the rule of that name."""
        return next(result for result in self.rules if result.rule == rule)


@dataclass(frozen=True, kw_only=True)
class Thickness:
    """Pay-as-bid against one uniform price, in markets of one number of bidders.

    ``uniform_saves`` is the first unit price less the second, market by market.
    """

    num_providers: int
    load_spread: float
    pay_as_bid: Estimate
    uniform: Estimate
    uniform_saves: Estimate


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is simulated: independent markets, rounds of learning, and the seed of all."""

    markets: int
    rounds: int = DEFAULT_ROUNDS
    seed: int = 0


def compare(
    name: str, scenario: Scenario, effort: Effort, rules: Sequence[PayRule] = tuple(PayRule)
) -> tuple[Comparison, Population, dict[PayRule, Learned]]:
    """Every rule of ``rules`` has been learned in the same markets, beside everyone's truth."""
    population = draw_population(scenario, effort.markets, effort.seed)
    learned = {
        rule: learn(population, rule, rounds=effort.rounds, seed=effort.seed) for rule in rules
    }
    named = [(str(rule), outcome) for rule, outcome in learned.items()]
    named.append((TRUTHFUL, truthful(population, seed=effort.seed)))
    results = tuple(_result(rule, population, outcome) for rule, outcome in named)
    return Comparison(name=name, scenario=scenario, rules=results), population, learned


def compare_thickness(
    scenario: Scenario, effort: Effort, thicknesses: Sequence[int] = THICKNESSES
) -> tuple[Thickness, ...]:
    """Both pay rules in markets of ``scenario`` but with these numbers of bidders."""
    found = []
    for num_providers in thicknesses:
        population = draw_population(
            replace(scenario, num_providers=num_providers), effort.markets, effort.seed
        )
        own, one = (
            learn(population, rule, rounds=effort.rounds, seed=effort.seed).unit_price_ratio
            for rule in (PayRule.PAY_AS_BID, PayRule.UNIFORM)
        )
        found.append(
            Thickness(
                num_providers=num_providers,
                load_spread=scenario.load_spread,
                pay_as_bid=Estimate.of(own),
                uniform=Estimate.of(one),
                uniform_saves=Estimate.of(own - one),
            )
        )
    return tuple(found)


def _result(rule: str, population: Population, learned: Learned) -> RuleResult:
    highest = learned.highest_pay_micros / learned.reserve_micros
    return RuleResult(
        rule=rule,
        unit_price=Estimate.of(learned.unit_price_ratio),
        pay=Estimate.of(learned.pay_ratio),
        social_cost=Estimate.of(learned.social_cost_ratio),
        fill_rate=Estimate.of(learned.fill_rate),
        highest_pay_of_reserve=float(highest.max()),
        sizes=_by_size(population, learned),
    )


def _by_size(population: Population, learned: Learned) -> tuple[SizeClass, ...]:
    """The quarters of the providers of each market, by capacity."""
    order = np.argsort(population.capacity, axis=1, kind="stable")
    quarters = np.array_split(order, len(_QUARTERS), axis=1)
    cost = learned.won_units * population.cost_micros
    found = []
    for name, members in zip(_QUARTERS, quarters, strict=True):
        capacity, units, income, spent = (
            np.take_along_axis(values, members, axis=1).sum(axis=1)
            for values in (population.capacity, learned.won_units, learned.income_micros, cost)
        )
        found.append(
            SizeClass(
                name=name,
                capacity_share=_mean(capacity, population.capacity),
                unit_share=_mean(units, learned.won_units),
                income_share=_mean(income, learned.income_micros),
                margin=float(income.sum() / spent.sum() - 1) if spent.sum() else None,
            )
        )
    return tuple(found)


def _mean(part: Ints | Floats, whole: Ints | Floats) -> float:
    """The mean share that ``part`` has of each market's ``whole``."""
    return float((part / np.maximum(whole.sum(axis=1), 1e-12)).mean())


def _t95(degrees: int) -> float:
    """The 97.5 % point of Student's t, within 1 % from three degrees of freedom on.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5, three terms.
    """
    z: float = 1.959963984540054
    terms: tuple[float, ...] = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + math.fsum(term / degrees**power for power, term in enumerate(terms, start=1))
