"""What each action would have earned, the others' bids standing.

A provider's action is a markup on its cost and a share of its capacity withheld.  Nobody's
market is cleared again for it: with one provider's rung taken out, its award at any price is
read from the ladder's sums.  The cartel, who move together, are cleared again.
"""

from __future__ import annotations

import numpy as np

from shoal.market.simulation.population import Floats, Ints, Population
from shoal.market.simulation.rules import Books, Ladders, PayRule, clarke_pay, clear_books

# Nine markups on cost and three shares of capacity held back: 27 actions, as in the
# reference's table.  The steps are finest where bids compete.
MARKUPS = (1.0, 1.05, 1.1, 1.15, 1.2, 1.3, 1.4, 1.6, 2.0)
WITHHELD = (0.0, 0.25, 0.5)
NUM_ACTIONS = len(MARKUPS) * len(WITHHELD)
TRUTH = 0


def action_prices(population: Population) -> Ints:
    """The price of each markup, ``(markets, providers, markups)``, none above the reserve.

    A provider whose cost is above the reserve asks its cost, and so takes no part.
    """
    cost = population.cost_micros[:, :, None]
    asked = np.rint(cost * np.asarray(MARKUPS)).astype(np.int64)
    ceiling = np.maximum(population.reserve_micros[:, None, None], cost)
    prices: Ints = np.minimum(asked, ceiling)
    return prices


def action_units(population: Population) -> Ints:
    """The units offered at each share withheld, ``(markets, providers, shares)``, at least one.

    The share cap applies to what is offered.
    """
    kept = 1.0 - np.asarray(WITHHELD)
    offered = np.maximum(1, np.floor(population.capacity[:, :, None] * kept)).astype(np.int64)
    return np.minimum(offered, population.most_units[:, :, None])


def books_of(population: Population, actions: Ints) -> Books:
    """The books when each provider takes its action of ``actions``, ``(markets, providers)``."""
    markup, share = np.divmod(actions, len(WITHHELD))
    price = np.take_along_axis(action_prices(population), markup[:, :, None], axis=2)[:, :, 0]
    units = np.take_along_axis(action_units(population), share[:, :, None], axis=2)[:, :, 0]
    return _books(population, price, units)


def offered(books: Books, rule: PayRule, limit_micros: Ints, rank: Ints) -> Books:
    """``books`` as ``rule`` clears them: within the limit, or at the posted price it is."""
    if rule is PayRule.POSTED:
        return books.at_posted(limit_micros, rank)
    return books.within(limit_micros)


def truthful_books(population: Population) -> Books:
    """The books when everyone asks its cost and offers all it may."""
    return _books(population, population.cost_micros, population.most_units)


def _books(population: Population, price: Ints, units: Ints) -> Books:
    return Books(
        adjusted_micros=price,
        units=units,
        tie_rank=population.tie_rank,
        num_units=population.num_units,
        reserve_micros=population.reserve_micros,
    )


def profits_alone(
    ladders: Ladders,
    rule: PayRule,
    *,
    cost: Ints,
    price: Ints,
    units: Ints,
) -> Ints:
    """Each provider's profit from each of its deviations, ``(markets, providers, m · w)``.

    Args:
        ladders: The others' bids, and the provider's present one, which is taken out.
        rule: How winners are paid.
        cost: True cost of a unit, ``(markets, providers)``.
        price: Prices to try, ``(markets, providers, m)``.
        units: Capacities to try, ``(markets, providers, w)``.
    """
    books = ladders.books
    wanted = books.num_units[:, None, None, None]
    own_units = ladders.units[:, :, None]
    limit = books.reserve_micros[:, None, None]
    if rule is PayRule.POSTED:
        price = np.where(price <= limit, limit, price)
    key = price * ladders.radix + books.tie_rank[:, :, None]
    below = ladders.at(ladders.reach, ladders.rungs_below(key))
    below = below - np.where(ladders.key[:, :, None] < key, own_units, 0)
    may_win = (price <= limit)[:, :, :, None]
    room = wanted - below[:, :, :, None]
    won: Ints = np.where(may_win, np.clip(room, 0, units[:, :, None, :]), 0)
    asked = price[:, :, :, None]
    pay: Ints
    match rule:
        case PayRule.PAY_AS_BID:
            pay = won * asked
        case PayRule.UNIFORM:
            pay = won * _clearing_price(ladders, asked, units, room)
        case PayRule.CLARKE:
            pay = clarke_pay(ladders, won)
        case PayRule.POSTED:
            # Every price that is accepted is the posted one; only being drawn early counts.
            pay = won * limit[:, :, :, None]
    profit: Ints = pay - won * cost[:, :, None, None]
    return profit.reshape(*cost.shape, -1)


def _clearing_price(ladders: Ladders, asked: Ints, units: Ints, room: Ints) -> Ints:
    """σ* at each deviation: the own price where own units are left over, else the others'."""
    own = ladders.units[:, :, None]
    left = np.maximum(ladders.books.num_units[:, None, None] - units, 0)
    rung = ladders.rung_of_unit(left)
    rung = np.where(rung < ladders.position[:, :, None], rung, ladders.rung_of_unit(left + own))
    others = ladders.at(ladders.price, rung)[:, :, None, :]
    return np.where(units[:, :, None, :] > room, asked, np.maximum(others, asked))


def profits_together(
    population: Population,
    actions: Ints,
    rule: PayRule,
    limit_micros: Ints,
    rank: Ints,
) -> Floats:
    """The cartel's joint profit when its members all take one action, ``(markets, actions)``.

    Nothing above ``limit_micros`` is filled: the reserve, or the posted price; ``rank`` orders
    equal prices.
    """
    markets, providers = actions.shape
    tried = np.repeat(actions[:, None, :], NUM_ACTIONS, axis=1)
    tried = np.where(
        population.cartel[:, None, :], np.arange(NUM_ACTIONS)[None, :, None], tried
    ).reshape(markets * NUM_ACTIONS, providers)
    many = _repeated(population, NUM_ACTIONS)
    limit = np.repeat(limit_micros, NUM_ACTIONS)
    books = offered(books_of(many, tried), rule, limit, np.repeat(rank, NUM_ACTIONS, axis=0))
    outcome = clear_books(books, rule)
    profit = np.where(many.cartel, outcome.pay_micros - outcome.units * many.cost_micros, 0)
    joint: Floats = profit.sum(axis=1).reshape(markets, NUM_ACTIONS).astype(np.float64)
    return joint


def _repeated(population: Population, times: int) -> Population:
    """Every market ``times`` times, one after the other."""
    return Population(
        cost_micros=np.repeat(population.cost_micros, times, axis=0),
        capacity=np.repeat(population.capacity, times, axis=0),
        most_units=np.repeat(population.most_units, times, axis=0),
        tie_rank=np.repeat(population.tie_rank, times, axis=0),
        cartel=np.repeat(population.cartel, times, axis=0),
        num_units=np.repeat(population.num_units, times),
        load_spread=population.load_spread,
        reserve_micros=np.repeat(population.reserve_micros, times),
    )
