"""Providers who learn what to bid: Hedge over 27 actions, everyone at once, round after round.

Each round every provider draws an action from its weights, the market clears, and every
action's weight is multiplied by ``exp(η · what it would have earned)``, earnings being
measured against the most the provider could earn: all it may sell, at the reserve.

Source: Freund and Schapire, "A decision-theoretic generalization of on-line learning",
JCSS 55 (1997), §2 (Hedge); with all payoffs known each round, regret grows as √rounds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from shoal.market.pricing import next_posted_price
from shoal.market.simulation.counterfactual import (
    NUM_ACTIONS,
    action_prices,
    action_units,
    books_of,
    offered,
    profits_alone,
    profits_together,
    truthful_books,
)
from shoal.market.simulation.population import Floats, Ints, Population
from shoal.market.simulation.rules import Books, Ladders, Outcome, PayRule, clear_books

DEFAULT_ROUNDS = 2_000
# Constant, so that a learner follows what the others do now; the documents show how little
# the table moves when it is halved or doubled.
LEARNING_RATE = 8.0
# What of the rounds counts as having learned.
MEASURED_SHARE = 0.25


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What bidders who have learned do; means over the measured rounds.

    Every array is ``(markets,)`` but those marked.

    Attributes:
        pay_micros: What the buyer paid, a round.
        served_cost_micros: What the units served truly cost.
        served_units: Units served.
        least_cost_micros: What all units would have cost at best, nobody withholding, no cap.
        num_units: Units auctioned, a round.
        reserve_micros: The reserve.
        highest_pay_micros: The most paid for a unit in any round.
        income_micros: Pay of each provider, ``(markets, providers)``.
        won_units: Units of each provider, ``(markets, providers)``.
        last_actions: Everyone's action in the last round, ``(markets, providers)``.
    """

    pay_micros: Floats
    served_cost_micros: Floats
    served_units: Floats
    least_cost_micros: Floats
    num_units: Floats
    reserve_micros: Ints
    highest_pay_micros: Ints
    income_micros: Floats
    won_units: Floats
    last_actions: Ints

    @property
    def pay_ratio(self) -> Floats:
        """Buyer's pay ÷ true cost of the units served."""
        return self.pay_micros / self.served_cost_micros

    @property
    def unit_price_ratio(self) -> Floats:
        """Pay of a served unit ÷ the least true average cost; what a buyer compares rules by."""
        least = self.least_cost_micros / self.num_units
        ratio: Floats = self.pay_micros / self.served_units / least
        return ratio

    @property
    def social_cost_ratio(self) -> Floats:
        """True cost, unserved units at the reserve, ÷ the least there could be."""
        unserved = (self.num_units - self.served_units) * self.reserve_micros
        ratio: Floats = (self.served_cost_micros + unserved) / self.least_cost_micros
        return ratio

    @property
    def fill_rate(self) -> Floats:
        """Units served ÷ units auctioned."""
        return self.served_units / self.num_units


class _Tally:
    """Sums over the measured rounds."""

    def __init__(self, population: Population) -> None:
        shape = population.cost_micros.shape
        self._population = population
        self._best = Ladders(replace(truthful_books(population), units=population.capacity))
        self._rounds = 0
        self._pay = np.zeros(shape)
        self._units = np.zeros(shape)
        self._least = np.zeros(shape[0])
        self._wanted = np.zeros(shape[0])
        self._highest = np.zeros(shape[0], dtype=np.int64)

    def add(self, outcome: Outcome, num_units: Ints) -> None:
        """One more round, in which ``num_units`` were auctioned."""
        self._rounds += 1
        self._pay += outcome.pay_micros
        self._units += outcome.units
        self._wanted += num_units
        self._least += self._best.cost_of(num_units[:, None])[:, 0]
        dearest = -(-outcome.pay_micros // np.maximum(outcome.units, 1))
        self._highest = np.maximum(self._highest, dearest.max(axis=1))

    def learned(self, actions: Ints) -> Learned:
        """The means."""
        pay, units = self._pay / self._rounds, self._units / self._rounds
        return Learned(
            pay_micros=pay.sum(axis=1),
            served_cost_micros=(units * self._population.cost_micros).sum(axis=1),
            served_units=units.sum(axis=1),
            least_cost_micros=self._least / self._rounds,
            num_units=self._wanted / self._rounds,
            reserve_micros=self._population.reserve_micros,
            highest_pay_micros=self._highest,
            income_micros=pay,
            won_units=units,
            last_actions=actions,
        )


class _Minds:
    """Everyone's weights, as the sums of what each action would have earned.

    The cartel is one mind: its members take one action, weighed by what it earns them all.
    """

    def __init__(self, population: Population, rate: float, rng: np.random.Generator) -> None:
        self._population = population
        self._rate = rate
        self._rng = rng
        self._most = _most_profit(population)
        self._scores = np.zeros((*population.cost_micros.shape, NUM_ACTIONS))
        self._joint_scores = np.zeros((population.num_markets, NUM_ACTIONS))
        self._joint_most = np.maximum(np.where(population.cartel, self._most, 0).sum(axis=1), 1)
        self._prices = action_prices(population)
        self._offers = action_units(population)

    def draw(self) -> Ints:
        """An action each, ``(markets, providers)``."""
        alone = _drawn(self._scores, self._rng)
        if not self._population.cartel.any():
            return alone
        together = _drawn(self._joint_scores, self._rng)
        return np.where(self._population.cartel, together[:, None], alone)

    def learn(self, actions: Ints, books: Books, rule: PayRule) -> None:
        """Everyone has seen what each action would have earned in ``books``."""
        gains = profits_alone(
            Ladders(books),
            rule,
            cost=self._population.cost_micros,
            price=self._prices,
            units=self._offers,
        )
        self._scores += self._rate * gains / self._most[:, :, None]
        if self._population.cartel.any():
            joint = profits_together(
                self._population, actions, rule, books.reserve_micros, books.tie_rank
            )
            self._joint_scores += self._rate * joint / self._joint_most[:, None]


def learn(
    population: Population,
    rule: PayRule,
    *,
    rounds: int = DEFAULT_ROUNDS,
    rate: float = LEARNING_RATE,
    seed: int = 0,
) -> Learned:
    """Everyone has learned for ``rounds`` rounds under ``rule``; the last quarter is measured."""
    minds = _Minds(population, rate, np.random.default_rng([seed, 1]))
    demand = _Demand(population, np.random.default_rng([seed, 2]))
    lots = np.random.default_rng([seed, 3])
    limit, rank = population.reserve_micros, population.tie_rank
    tally = _Tally(population)
    measured_from = rounds - max(1, int(rounds * MEASURED_SHARE))
    actions = np.zeros(population.cost_micros.shape, dtype=np.int64)
    for number in range(rounds):
        actions = minds.draw()
        books = replace(books_of(population, actions), num_units=demand.draw())
        if rule is PayRule.POSTED:
            rank = np.argsort(lots.random(rank.shape), axis=1)
        cleared = offered(books, rule, limit, rank)
        if number >= measured_from:
            tally.add(clear_books(cleared, rule), books.num_units)
        minds.learn(actions, cleared, rule)
        if rule is PayRule.POSTED:
            limit = _next_posted(limit, books)
    return tally.learned(actions)


def truthful(
    population: Population, rule: PayRule = PayRule.UNIFORM, *, rounds: int = 200, seed: int = 0
) -> Learned:
    """What it costs when everyone tells the truth; the mean of ``rounds`` where load varies."""
    books = truthful_books(population)
    demand = _Demand(population, np.random.default_rng([seed, 2]))
    tally = _Tally(population)
    for _ in range(rounds if population.load_spread else 1):
        drawn = replace(books, num_units=demand.draw())
        tally.add(clear_books(drawn, rule), drawn.num_units)
    return tally.learned(np.zeros(population.cost_micros.shape, dtype=np.int64))


class _Demand:
    """How many units each round auctions."""

    def __init__(self, population: Population, rng: np.random.Generator) -> None:
        self._mean = population.num_units
        self._spread = population.load_spread
        self._rng = rng

    def draw(self) -> Ints:
        """This round's units, ``(markets,)``."""
        if not self._spread:
            return self._mean
        factor = 1.0 + self._spread * (2.0 * self._rng.random(len(self._mean)) - 1.0)
        return np.maximum(1, np.rint(self._mean * factor)).astype(np.int64)


def _drawn(scores: Floats, rng: np.random.Generator) -> Ints:
    """An action each, drawn in proportion to ``exp(score)``."""
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    reach = np.cumsum(weights, axis=-1)
    drawn = rng.random(scores.shape[:-1]) * reach[..., -1]
    actions: Ints = np.minimum((reach <= drawn[..., None]).sum(axis=-1), NUM_ACTIONS - 1)
    return actions


def _most_profit(population: Population) -> Floats:
    """What each could earn at most in a round, ``(markets, providers)``; at least 1."""
    margin = population.reserve_micros[:, None] - population.cost_micros
    return np.maximum(population.most_units * margin, 1).astype(np.float64)


def _next_posted(posted: Ints, books: Books) -> Ints:
    """The posted price after a round, by the market's own rule.

    ``books`` still hold the bids above it, and the reserve above which it never rises.
    """
    willing = books.adjusted_micros <= posted[:, None]
    supply = np.where(willing, books.units, 0).sum(axis=1)
    moved = [
        next_posted_price(price, demand_units=wanted, supply_units=offers, reserve_micros=most)
        for price, wanted, offers, most in zip(
            posted.tolist(),
            books.num_units.tolist(),
            supply.tolist(),
            books.reserve_micros.tolist(),
            strict=True,
        )
    ]
    return np.array(moved, dtype=np.int64)
