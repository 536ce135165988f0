"""What a lie gains: a provider's best deviation from the truth, and a false bid of the buyer's.

These are the yardsticks the pay rules are held against.  `clarke_by_hand` is written unit by
unit, without the sums of `shoal.market.simulation.rules`, so that each can judge the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from shoal.market.simulation.counterfactual import profits_alone, truthful_books
from shoal.market.simulation.population import Floats, Ints, Population
from shoal.market.simulation.rules import Books, Ladders, PayRule, clear_books

# Prices from half to twice the cost, in steps of 2.5 %; capacity held back in tenths.
_TRIED_MARKUPS = np.linspace(0.5, 2.0, 61)
_TRIED_WITHHELD = np.linspace(0.0, 0.9, 10)


def deviation_gains(population: Population, rule: PayRule) -> Floats:
    """The most each provider gains by lying while all others tell the truth.

    As a share of what its full capacity costs, ``(markets, providers)``.  Lies are a price
    and a capacity held back, on a grid that holds the truth too, so no gain is below 0.
    """
    cost = population.cost_micros
    price = np.rint(cost[:, :, None] * _TRIED_MARKUPS).astype(np.int64)
    price = np.concatenate([cost[:, :, None], price], axis=2)
    offered = np.ceil(population.capacity[:, :, None] * (1.0 - _TRIED_WITHHELD))
    units = np.minimum(offered.astype(np.int64), population.most_units[:, :, None])
    profits = profits_alone(
        Ladders(truthful_books(population)), rule, cost=cost, price=price, units=units
    )
    # The first price is the cost and the first capacity all of it: the truth.
    gain: Floats = (profits.max(axis=2) - profits[:, :, 0]) / (cost * population.capacity)
    return gain


def clarke_by_hand(
    price_micros: Sequence[int], units: Sequence[int], num_units: int, reserve_micros: int
) -> list[int]:
    """Each provider's Clarke payment, from lists of single units.

    ``C*₋ᵢ − C₋ᵢ(x)``, unserved units at the reserve; equal prices go to the earlier provider.

    Source: reference "Compute marketplaces", §2.1, R3.
    """

    def served(without: int | None) -> list[tuple[int, int]]:
        offers = [
            (price, provider)
            for provider, (price, count) in enumerate(zip(price_micros, units, strict=True))
            for _ in range(count)
            if provider != without and price <= reserve_micros
        ]
        return sorted(offers)[:num_units]

    def cost(done: Sequence[tuple[int, int]], wanted: int) -> int:
        return sum(price for price, _ in done) + (wanted - len(done)) * reserve_micros

    chosen = served(None)
    pay = []
    for provider in range(len(units)):
        others = [unit for unit in chosen if unit[1] != provider]
        own = len(chosen) - len(others)
        pay.append(cost(served(provider), num_units) - cost(others, num_units - own))
    return pay


def shill_gains(population: Population, rule: PayRule) -> Floats:
    """What a buyer gains by one false bid of its own, at best; a share of its pay, by market.

    The bid stands just below or above each true one, or at the reserve, for one unit, a
    tenth of the units, or all.  Units it wins are done by nobody, and count at the reserve.
    Not bidding is no choice here, so a harmful best bid shows as a loss.
    """
    books = truthful_books(population)
    honest = clear_books(books, rule)
    before = honest.pay_micros.sum(axis=1) + _undone(books, honest.units)
    best = np.full(population.num_markets, -np.inf)
    for price in _shill_prices(books).T:
        for units in (np.ones_like(books.num_units), books.num_units // 10, books.num_units):
            shilled = clear_books(_with_bid(books, price, np.maximum(units, 1)), rule)
            after = shilled.pay_micros[:, :-1].sum(axis=1)
            after = after + _undone(books, shilled.units[:, :-1])
            best = np.maximum(best, (before - after) / before)
    return best


def _undone(books: Books, won: Ints) -> Ints:
    """What the units nobody does cost, at the reserve."""
    undone: Ints = (books.num_units - won.sum(axis=1)) * books.reserve_micros
    return undone


def _shill_prices(books: Books) -> Ints:
    """Just below and just above each bid, and the reserve; ``(markets, prices)``."""
    bids = books.adjusted_micros
    return np.concatenate(
        [np.maximum(bids - 1, 1), bids + 1, books.reserve_micros[:, None]], axis=1
    )


def _with_bid(books: Books, price: Ints, units: Ints) -> Books:
    """The books with one more bidder, which loses ties."""
    last = np.full(len(price), books.units.shape[1], dtype=np.int64)
    return replace(
        books,
        adjusted_micros=np.concatenate([books.adjusted_micros, price[:, None]], axis=1),
        units=np.concatenate([books.units, units[:, None]], axis=1),
        tie_rank=np.concatenate([books.tie_rank, last[:, None]], axis=1),
    )
