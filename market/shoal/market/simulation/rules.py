"""Many clearings at once: the market's order of bids, and the four ways to pay for it.

The allocation is that of `shoal.market.auction`: ascending adjusted price, ties in an order
no bidder chose, filled until the units are out.  A test holds the two equal.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

import numpy as np

from shoal.market.simulation.population import Ints


class PayRule(StrEnum):
    """What a winner is paid for a unit.

    Source: reference "Compute marketplaces", §2.1.  CLARKE exists here only: it is the
    oracle the other two are held against.
    """

    PAY_AS_BID = "pay_as_bid"
    UNIFORM = "uniform"
    CLARKE = "clarke"
    POSTED = "posted"


@dataclass(frozen=True, kw_only=True)
class Books:
    """One book of bids for each market; shapes ``(markets, providers)`` and ``(markets,)``.

    ``adjusted_micros`` is price plus handicap, ``units`` the capacity offered, already within
    the share cap.  A bid above the reserve is never filled.
    """

    adjusted_micros: Ints
    units: Ints
    tie_rank: Ints
    num_units: Ints
    reserve_micros: Ints

    def within(self, limit_micros: Ints) -> Books:
        """The same books where nothing above ``limit_micros`` is filled."""
        return replace(self, reserve_micros=np.minimum(self.reserve_micros, limit_micros))

    def at_posted(self, posted_micros: Ints, drawn_rank: Ints) -> Books:
        """The same books where everyone who accepts the posted price is equal, and lots decide.

        Nothing above it is filled.  It is never above the reserve.
        """
        posted = posted_micros[:, None]
        return replace(
            self,
            adjusted_micros=np.where(self.adjusted_micros <= posted, posted, self.adjusted_micros),
            tie_rank=drawn_rank,
            reserve_micros=posted_micros,
        )


class Ladders:
    """The books sorted, with the sums from which every clearing and "what if" is read.

    Args:
        books: Bids of every market.

    Attributes:
        order: Providers by ascending rung.
        position: Each provider's rung.
        key: Adjusted price and tie rank as one integer, in provider order.
        price: Adjusted prices down the ladder, closed by the reserve.
        reach: Units offered above each rung: ``reach[:, k]`` by the first ``k`` rungs.
        worth: What those units cost at their adjusted prices.
    """

    def __init__(self, books: Books) -> None:
        markets, providers = books.adjusted_micros.shape
        self.books = books
        self.radix = 1 << (providers - 1).bit_length()
        self.units = np.where(
            books.adjusted_micros <= books.reserve_micros[:, None], books.units, 0
        )
        self.key = books.adjusted_micros * self.radix + books.tie_rank
        self.order = np.argsort(self.key, axis=1)
        self.position = np.empty_like(self.order)
        rungs = np.broadcast_to(np.arange(providers), self.order.shape)
        np.put_along_axis(self.position, self.order, rungs, axis=1)
        sorted_units = np.take_along_axis(self.units, self.order, axis=1)
        sorted_price = np.take_along_axis(books.adjusted_micros, self.order, axis=1)
        self.sorted_key = np.take_along_axis(self.key, self.order, axis=1)
        self.price = np.concatenate([sorted_price, books.reserve_micros[:, None]], axis=1)
        nothing = np.zeros((markets, 1), dtype=np.int64)
        self.reach = np.concatenate([nothing, np.cumsum(sorted_units, axis=1)], axis=1)
        self.worth = np.concatenate(
            [nothing, np.cumsum(sorted_units * sorted_price, axis=1)], axis=1
        )
        self._key_stride = int(self.key.max()) + self.radix + 1
        self._reach_stride = 2 * int(self.reach[:, -1].max()) + int(books.num_units.max()) + 2

    def rungs_below(self, key: Ints) -> Ints:
        """How many rungs of each market lie below ``key``, shape ``(markets, …)``."""
        return self._search(self.sorted_key, key, self._key_stride, "left")

    def rung_of_unit(self, unit: Ints) -> Ints:
        """The rung that would do unit number ``unit`` (from 0); past the last where none does."""
        return self._search(self.reach[:, 1:], unit, self._reach_stride, "right")

    def cost_of(self, units: Ints) -> Ints:
        """The least adjusted cost of ``units``, shape ``(markets, …)``; unserved at the reserve."""
        rung = self.rung_of_unit(units)
        return self.at(self.worth, rung) + (units - self.at(self.reach, rung)) * self.at(
            self.price, rung
        )

    def at(self, table: Ints, rung: Ints) -> Ints:
        """``table[market, rung]`` for rungs of shape ``(markets, …)``."""
        flat = rung.reshape(rung.shape[0], -1)
        return np.take_along_axis(table, flat, axis=1).reshape(rung.shape)

    @staticmethod
    def _search(table: Ints, query: Ints, stride: int, side: Literal["left", "right"]) -> Ints:
        """`numpy.searchsorted` in each market's row, by keeping the rows' ranges apart."""
        markets, width = table.shape
        offset = np.arange(markets, dtype=np.int64) * stride
        flat = np.clip(query, 0, stride - 1).reshape(markets, -1) + offset[:, None]
        found = np.searchsorted(
            (table + offset[:, None]).ravel(),
            flat.ravel(),
            side=side,
        )
        local = found.reshape(markets, -1) - (np.arange(markets) * width)[:, None]
        rungs: Ints = np.clip(local, 0, width).reshape(query.shape)
        return rungs


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What each provider won and is paid in all; ``(markets, providers)``.

    ``clearing_micros`` is σ*, the adjusted price of the first unfilled unit.
    """

    units: Ints
    pay_micros: Ints
    clearing_micros: Ints


def clear_books(
    books: Books,
    rule: PayRule,
    *,
    handicap_micros: Ints | None = None,
) -> Outcome:
    """Every market is cleared under ``rule``.

    Args:
        books: Bids of every market.
        rule: How winners are paid; under `PayRule.POSTED` the reserve is the posted price.
        handicap_micros: What of each adjusted price is handicap, and so not paid.
    """
    ladders = Ladders(books)
    handicap = np.zeros_like(books.units) if handicap_micros is None else handicap_micros
    before = np.take_along_axis(ladders.reach, ladders.position, axis=1)
    won = np.clip(books.num_units[:, None] - before, 0, ladders.units)
    clearing = ladders.at(ladders.price, ladders.rung_of_unit(books.num_units[:, None]))
    match rule:
        case PayRule.PAY_AS_BID:
            pay = won * (books.adjusted_micros - handicap)
        case PayRule.UNIFORM:
            pay = won * (np.maximum(books.adjusted_micros, clearing) - handicap)
        case PayRule.CLARKE:
            pay = clarke_pay(ladders, won[:, :, None])[:, :, 0] - won * handicap
        case PayRule.POSTED:
            pay = won * (books.reserve_micros[:, None] - handicap)
            clearing = books.reserve_micros[:, None]
    return Outcome(units=won, pay_micros=pay, clearing_micros=clearing[:, 0])


def clarke_pay(ladders: Ladders, won: Ints) -> Ints:
    """What a provider that serves ``won`` units saves the others, ``(markets, providers, …)``.

    ``C*₋ᵢ − C₋ᵢ(x)``: the others' least cost of all units less their cost of those that ``i``
    does not serve, unserved units at the reserve.
    """
    shape = (won.shape[0],) + (1,) * (won.ndim - 1)
    everything = np.broadcast_to(ladders.books.num_units.reshape(shape), won.shape)
    return _cost_without(ladders, everything) - _cost_without(ladders, everything - won)


def _cost_without(ladders: Ladders, units: Ints) -> Ints:
    """The others' least cost of ``units``, for each provider; ``(markets, providers, …)``."""
    trailing = (1,) * (units.ndim - 2)
    own = ladders.units.reshape(ladders.units.shape + trailing)
    price = ladders.books.adjusted_micros.reshape(own.shape)
    before = np.take_along_axis(ladders.reach, ladders.position, axis=1).reshape(own.shape)
    above = units <= before
    served = np.where(above, units, units + own)
    cost: Ints = ladders.cost_of(served) - np.where(above, 0, own * price)
    return cost
