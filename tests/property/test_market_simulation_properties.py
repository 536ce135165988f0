"""The simulation's shortcuts against the market itself, and against clearing by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from market_records import NOW_MS, SEED, lot
from sealed_market import opened, terms

from shoal.market.clearing import Auction, clear_lot, parcels_of
from shoal.market.frozen import FrozenBook, TermsTable
from shoal.market.pricing import UNIFORM_BIDDERS
from shoal.market.simulation.counterfactual import (
    MARKUPS,
    NUM_ACTIONS,
    WITHHELD,
    action_prices,
    action_units,
    books_of,
    profits_alone,
)
from shoal.market.simulation.oracle import clarke_by_hand
from shoal.market.simulation.population import Scenario, draw_population
from shoal.market.simulation.rules import Books, Ladders, Outcome, PayRule, clear_books
from shoal.market.simulation.work import Audit, Ladder, do_work
from shoal.protocol.merkle import keccak

EPOCH = 7
RESERVE = 60

offer = st.tuples(st.integers(1, 70), st.integers(1, 9), st.integers(0, 20))
# Nobody's adjusted price is above the reserve, so all count as bidders.
eligible = st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(0, 20))
offers = st.lists(offer, min_size=1, max_size=8) | st.lists(
    eligible, min_size=UNIFORM_BIDDERS, max_size=UNIFORM_BIDDERS + 4
)


def cleared_for_real(
    bids: list[tuple[int, int, int]], num_units: int, posted_micros: int
) -> tuple[str, list[tuple[int, int]], list[bytes]]:
    """The rule the market chose, and each bidder's units and pay in it."""
    entries = [
        opened(number, price_micros=price, capacity=units)
        for number, (price, units, _) in enumerate(bids, start=1)
    ]
    table = [
        terms(number, handicap_micros=handicap) for number, (*_, handicap) in enumerate(bids, 1)
    ]
    auction = Auction(
        lot=lot(num_units, epoch=EPOCH, reserve_micros=RESERVE),
        parcels=parcels_of([1] * num_units),
        posted_micros=posted_micros,
    )
    cleared = clear_lot(
        auction, FrozenBook(EPOCH, entries), TermsTable(table), seed=SEED, now_ms=NOW_MS
    )
    won = {rung.bid_digest: rung for rung in cleared.ladder.rungs() if not rung.standby}
    results = []
    for entry in entries:
        rung = won.get("0x" + entry.digest.hex())
        results.append((0, 0) if rung is None else (rung.num_units, rung.pay_micros))
    return str(cleared.rule), results, [entry.digest for entry in entries]


def cleared_at_once(
    bids: list[tuple[int, int, int]],
    num_units: int,
    rule: PayRule,
    *,
    posted_micros: int,
    digests: list[bytes],
) -> Outcome:
    """The same bids, cleared by the simulation."""
    ties = [keccak(SEED + digest) for digest in digests]
    rank = np.argsort(np.argsort(np.array([int(tie.hex(), 16) for tie in ties], dtype=object)))
    price, units, handicap = (
        np.array([column], dtype=np.int64) for column in zip(*bids, strict=True)
    )
    books = Books(
        adjusted_micros=price + handicap,
        units=units,
        tie_rank=rank[None, :],
        num_units=np.array([num_units]),
        reserve_micros=np.array([RESERVE]),
    )
    if rule is PayRule.POSTED:
        books = books.at_posted(np.array([posted_micros]), rank[None, :])
    return clear_books(books, rule, handicap_micros=handicap)


@settings(max_examples=25, deadline=None)
@given(bids=offers, num_units=st.integers(1, 60), posted_micros=st.integers(1, RESERVE))
def test_the_vectorised_clearing_is_the_markets_own(
    bids: list[tuple[int, int, int]], num_units: int, posted_micros: int
) -> None:
    rule, expected, digests = cleared_for_real(bids, num_units, posted_micros)

    found = cleared_at_once(
        bids, num_units, PayRule(rule), posted_micros=posted_micros, digests=digests
    )

    assert found.units[0].tolist() == [units for units, _ in expected]
    assert found.pay_micros[0].tolist() == [units * pay for units, pay in expected]


@settings(max_examples=60, deadline=None)
@given(bids=offers, num_units=st.integers(1, 60))
def test_clarke_payments_are_those_counted_unit_by_unit(
    bids: list[tuple[int, int, int]], num_units: int
) -> None:
    price, units, _ = (list(column) for column in zip(*bids, strict=True))
    books = Books(
        adjusted_micros=np.array([price]),
        units=np.array([units]),
        tie_rank=np.arange(len(price))[None, :],
        num_units=np.array([num_units]),
        reserve_micros=np.array([RESERVE]),
    )

    pay = clear_books(books, PayRule.CLARKE).pay_micros[0].tolist()

    assert pay == clarke_by_hand(price, units, num_units, RESERVE)


@pytest.mark.parametrize("rule", list(PayRule))
@pytest.mark.parametrize("load", [0.3, 0.6, 1.0])
def test_what_an_action_would_have_earned_is_what_clearing_with_it_pays(
    rule: PayRule, load: float
) -> None:
    population = draw_population(Scenario(num_providers=6, load=load, share_cap=0.4), 3, seed=2)
    rng = np.random.default_rng(5)
    actions = rng.integers(0, NUM_ACTIONS, population.cost_micros.shape)
    posted = np.full(3, 11_000)

    def allowed(books: Books) -> Books:
        return books.at_posted(posted, books.tie_rank) if rule is PayRule.POSTED else books

    gains = profits_alone(
        Ladders(allowed(books_of(population, actions))),
        rule,
        cost=population.cost_micros,
        price=action_prices(population),
        units=action_units(population),
    )

    assert gains.shape[2] == len(MARKUPS) * len(WITHHELD)
    for provider in range(6):
        for action in range(NUM_ACTIONS):
            changed = actions.copy()
            changed[:, provider] = action
            outcome = clear_books(allowed(books_of(population, changed)), rule)
            profit = outcome.pay_micros - outcome.units * population.cost_micros
            assert gains[:, provider, action].tolist() == profit[:, provider].tolist()


def test_a_clearing_that_forgets_the_tie_break_is_noticed() -> None:
    bids = [(10, 3, 0)] * 6
    rule, expected, digests = cleared_for_real(bids, 9, 20)
    reversed_digests = digests[::-1]

    found = cleared_at_once(bids, 9, PayRule(rule), posted_micros=20, digests=reversed_digests)

    assert found.units[0].tolist() != [units for units, _ in expected]


def test_markets_are_cleared_apart_from_each_other() -> None:
    population = draw_population(Scenario(num_providers=9), 5, seed=3)
    books = books_of(population, np.zeros(population.cost_micros.shape, dtype=np.int64))
    together = clear_books(books, PayRule.UNIFORM)

    for market in range(5):
        alone = replace(
            books,
            adjusted_micros=books.adjusted_micros[market : market + 1],
            units=books.units[market : market + 1],
            tie_rank=books.tie_rank[market : market + 1],
            num_units=books.num_units[market : market + 1],
            reserve_micros=books.reserve_micros[market : market + 1],
        )
        outcome = clear_books(alone, PayRule.UNIFORM)
        assert outcome.pay_micros.tolist() == together.pay_micros[market : market + 1].tolist()


@settings(max_examples=60, deadline=None)
@given(
    cheats=st.lists(st.booleans(), min_size=2, max_size=6),
    crashes_s=st.lists(st.integers(0, 300), min_size=6, max_size=6),
    num_units=st.integers(1, 120),
    at_once=st.integers(1, 30),
    seed=st.integers(0, 99),
)
def test_one_honest_rung_that_stays_is_enough_to_finish_and_nothing_is_paid_twice(
    cheats: list[bool], crashes_s: list[int], num_units: int, at_once: int, seed: int
) -> None:
    count = len(cheats) + 1
    ladder = Ladder(
        capacity=np.arange(1, count + 1),
        pay_micros=np.full(count, 10),
        seconds_per_unit=np.full(count, 30.0),
        failure_rate=np.full(count, 0.2),
        crash_at_s=np.array([*crashes_s[: count - 1], np.inf], dtype=np.float64),
        cheats=np.array([*cheats, False]),
        stake_micros=np.full(count, 1_000),
    )

    done = do_work(ladder, num_units, at_once=at_once, audit=Audit(rate=0.5, power=0.5), seed=seed)

    assert done.unfinished == 0
    assert done.accepted.sum() == num_units
    assert done.attempts >= num_units
