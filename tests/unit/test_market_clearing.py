"""The sealed auction: who is on the ladder, in which order, at what pay."""

from __future__ import annotations

import datetime
from itertools import product
from typing import Any

import pytest
from market_records import JOB_ID, NOW_MS, lot
from sealed_market import auction_of, clear, node, opened, session_of, terms

from shoal.market.clearing import Refusal, clear_lot, code_sha256, parcels_of, seed_of
from shoal.market.filling import Demand
from shoal.market.pricing import UNIFORM_BIDDERS, choose_rule, next_posted_price
from shoal.market.reserve import (
    gpu_prices,
    raised,
    reference_price,
    reserve_for,
    worked_out_again,
)
from shoal.protocol.certificate import ClearingRule, Parcels, ReserveOrigin, SeedParts
from shoal.protocol.errors import InvalidRequest
from shoal.protocol.market import TaskKind
from shoal.protocol.merkle import keccak, unhex, verify


def numbers(count: int) -> range:
    return range(1, count + 1)


def test_the_cheapest_after_their_handicap_win_and_are_paid_their_own_bids() -> None:
    prices = {1: 100, 2: 90, 3: 95, 4: 80}
    handicaps = {1: 0, 2: 30, 3: 0, 4: 60}
    book = [opened(n, price_micros=price) for n, price in prices.items()]
    table = [terms(n, handicap_micros=h) for n, h in handicaps.items()]
    cleared, certificate = clear(book, table)
    rungs = cleared.ladder.rungs()
    assert certificate.rule is ClearingRule.PAY_AS_BID
    assert [r.node for r in rungs] == [node(3), node(1), node(2), node(4)]
    assert [(r.num_units, r.pay_micros, r.standby) for r in rungs] == [
        (8, 95, False),
        (8, 100, False),
        (3, 90, True),
        (0, 80, False),
    ]
    assert certificate.clearing_price_micros == 120
    assert certificate.unfilled_units == 0


def test_the_ladder_is_under_the_allocation_root_leaf_by_leaf() -> None:
    book = [opened(n, price_micros=90 + n) for n in numbers(5)]
    cleared, certificate = clear(book, [terms(n, handicap_micros=n) for n in numbers(5)])
    tree, rungs = cleared.ladder.tree(), cleared.ladder.rungs()
    assert certificate.num_rungs == len(rungs) == 5
    for place, rung in enumerate(rungs):
        proof = tree.proof(place)
        assert verify(unhex(certificate.allocation_root), rung.leaf(5), proof)
        dearer = rung.model_copy(update={"pay_micros": rung.pay_micros + 1})
        assert not verify(unhex(certificate.allocation_root), dearer.leaf(5), proof)


@pytest.mark.parametrize(
    ("bid_changes", "terms_changes", "reason"),
    [
        ({"valid_until_ms": NOW_MS}, {}, Refusal.EXPIRED),
        ({}, {"staked": False}, Refusal.UNSTAKED),
        ({"price_micros": 201}, {}, Refusal.ABOVE_RESERVE),
        ({"price_micros": 150}, {"handicap_micros": 51}, Refusal.ABOVE_RESERVE),
        ({"capacity": 3}, {}, Refusal.TASK_TOO_LARGE),
        ({}, {"bound_units": 3}, Refusal.STAKE_TOO_SMALL),
    ],
)
def test_a_bid_that_cannot_win_is_told_the_rule(
    bid_changes: dict[str, Any], terms_changes: dict[str, Any], reason: Refusal
) -> None:
    book = [opened(1, **bid_changes), opened(2), opened(3), opened(4)]
    table = [terms(1, **terms_changes), *(terms(n) for n in (2, 3, 4))]
    cleared, certificate = clear(book, table, sizes=[4] * 4)
    bad = opened(1, **bid_changes)
    assert cleared.refused == ((bad.digest, reason),)
    assert len(cleared.ladder) == 3
    # Negative control: without what is wrong, the bid is on the ladder.
    fine, other = clear([opened(1), *book[1:]], [terms(1), *table[1:]], sizes=[4] * 4)
    assert (len(fine.ladder), fine.refused) == (4, ())
    assert other.refused_sha256 != certificate.refused_sha256


def test_a_bidder_nobody_has_terms_for_has_no_stake() -> None:
    cleared, _ = clear([opened(1)], [])
    assert [why for _, why in cleared.refused] == [Refusal.UNSTAKED]


def test_bids_of_other_kinds_jobs_and_epochs_are_no_part_of_the_lot() -> None:
    book = [
        opened(1, kind=TaskKind.GRADIENT),
        opened(2, job_id="0x" + "1" * 64),
        opened(3, epoch_to=6),
        opened(4, job_id=JOB_ID),
    ]
    cleared, _ = clear(book, [terms(n) for n in numbers(4)])
    assert [rung.node for rung in cleared.ladder.rungs()] == [node(4)]
    assert cleared.refused == ()


def test_in_thick_markets_all_are_paid_the_price_of_the_next_unit() -> None:
    count = UNIFORM_BIDDERS
    book = [opened(n, price_micros=100 + n, capacity=1) for n in numbers(count)]
    table = [terms(n, handicap_micros=n % 2) for n in numbers(count)]
    cleared, certificate = clear(book, table, num_units=10)
    assert certificate.rule is ClearingRule.UNIFORM
    assert certificate.clearing_price_micros == 112
    for rung in cleared.ladder.rungs():
        if rung.num_units and not rung.standby:
            expected = max(rung.price_micros, 112 - rung.handicap_micros)
        else:
            expected = rung.price_micros
        assert rung.pay_micros == expected
    few, fewer = clear(book[:-1], table, num_units=10)
    assert fewer.rule is ClearingRule.PAY_AS_BID
    assert few.ladder.rung(0).pay_micros == few.ladder.rung(0).price_micros


def test_two_nodes_of_one_account_are_one_bidder() -> None:
    same = opened(1).bid.account
    book = [opened(n, account=same) for n in numbers(4)]
    table = [terms(n).model_copy(update={"account": same}) for n in numbers(4)]
    _, certificate = clear(book, table)
    assert (certificate.num_bidders, certificate.rule) == (1, ClearingRule.POSTED)


def test_below_three_bidders_the_posted_price_pays_all_who_accept_it() -> None:
    book = [opened(1, price_micros=80), opened(2, price_micros=121)]
    table = [terms(1, handicap_micros=10), terms(2)]
    cleared, certificate = clear(book, table, posted_micros=120)
    assert certificate.rule is ClearingRule.POSTED
    assert certificate.posted_price_micros == certificate.clearing_price_micros == 120
    assert [(r.pay_micros, r.num_units) for r in cleared.ladder.rungs()] == [(110, 8)]
    assert [why for _, why in cleared.refused] == [Refusal.ABOVE_POSTED_PRICE]
    assert cleared.supply_units == 8
    capped, _ = clear(book, table, posted_micros=10_000)
    assert capped.clearing_price_micros == 200


def test_under_a_posted_price_bidding_lower_does_not_move_up_the_ladder() -> None:
    orders = set()
    for nonce in range(12):
        book = [opened(1, price_micros=50, nonce=nonce), opened(2, price_micros=99)]
        cleared, _ = clear(book, [terms(1), terms(2)])
        orders.add(cleared.ladder.rung(0).node)
    assert orders == {node(1), node(2)}


def test_the_posted_price_follows_demand_over_supply_within_the_reserve() -> None:
    def moved(price: int, demand: int, supply: int, reserve: int = 10_000) -> int:
        return next_posted_price(
            price, demand_units=demand, supply_units=supply, reserve_micros=reserve
        )

    assert moved(1_000, 10, 10) == 1_000
    # exp(0.25 · (−1/2)) and exp(0.25 · 1), the latter for any shortage.
    assert moved(100_000, 5, 10, 10**6) == 88_249
    assert moved(100_000, 20, 10, 10**6) == moved(100_000, 1, 0, 10**6) == 128_403
    assert moved(1, 20, 10) == 2
    assert moved(1, 1, 1_000) == 1
    assert moved(9_000, 20, 10) == 10_000
    prices = [moved(1_000_000, demand, 100, 10**9) for demand in range(250)]
    assert prices == sorted(prices)


def test_the_rule_follows_from_the_number_of_bidders_alone() -> None:
    rules = [choose_rule(count) for count in (0, 2, 3, 27, 28, 500)]
    assert [rule.number for rule in rules] == [0, 0, 1, 1, 2, 2]


def test_the_reserve_is_nine_tenths_of_a_data_centre_or_the_requesters_maximum() -> None:
    gpu = "NVIDIA H100 80GB HBM3"
    row = reference_price(gpu)
    assert row is not None
    assert row.micros_per_hour == 3_990_000
    terms_of = reserve_for(10_000, gpu=gpu, units_per_1000_gpu_hours=1_000_000)
    assert terms_of.reference_micros == 3_990
    assert terms_of.reserve_micros == 3_591
    assert terms_of.origin is ReserveOrigin.REFERENCE
    low = reserve_for(3_000, gpu=gpu, units_per_1000_gpu_hours=1_000_000)
    assert (low.reserve_micros, low.origin) == (3_000, ReserveOrigin.REQUESTER)
    unknown = reserve_for(3_000, gpu="GeForce 256", units_per_1000_gpu_hours=5)
    assert (unknown.reserve_micros, unknown.origin) == (3_000, ReserveOrigin.REQUESTER)
    assert unknown.reference_micros is None
    with pytest.raises(InvalidRequest) as caught:
        reserve_for(3_000, gpu=gpu)
    assert caught.value.code == "no_benchmark"


def test_a_raised_reserve_can_be_worked_out_again() -> None:
    once = raised(reserve_for(125, gpu=None))
    assert once.reserve_micros == 125
    steps = [reserve_for(10_000, gpu="NVIDIA H200", units_per_1000_gpu_hours=10**7)]
    for _ in range(40):
        steps.append(raised(steps[-1]))
    assert steps[1].reserve_micros == 455
    assert steps[-1].reserve_micros == 10_000
    assert all(worked_out_again(step) == step for step in steps)
    forged = steps[2].model_copy(update={"reserve_micros": 9_999})
    assert worked_out_again(forged) != forged


def test_every_price_of_the_table_names_its_source_and_date() -> None:
    for row in gpu_prices():
        assert row.source.startswith("https://")
        assert row.found_in.startswith("https://")
        assert datetime.date(2026, 1, 1) <= row.read_on
        assert 100_000 < row.micros_per_hour < 20_000_000


def test_a_provider_cap_bounds_all_nodes_of_an_account() -> None:
    same = opened(1).bid.account
    book = [opened(n, account=same if n < 3 else opened(n).bid.account) for n in numbers(5)]
    table = [
        terms(n).model_copy(update={"account": entry.bid.account})
        for n, entry in zip(numbers(5), book, strict=True)
    ]
    cleared, certificate = clear(book, table, num_units=30, provider_cap_permille=250)
    held = sum(r.num_units for r in cleared.ladder.rungs() if r.account == same)
    assert held == 8
    assert certificate.code_sha256 == code_sha256(250) != code_sha256()
    free, _ = clear(book, table, num_units=30)
    assert sum(r.num_units for r in free.ladder.rungs() if r.account == same) > 8


def test_two_bids_of_one_node_share_its_capacity_and_the_accounts_stake() -> None:
    book = [opened(1, price_micros=50), opened(1, price_micros=60, job_id=JOB_ID)]
    book += [opened(2), opened(3, price_micros=110)]
    table = [terms(2), terms(3)]
    cleared, _ = clear(book, [terms(1), *table])
    assert [r.num_units for r in cleared.ladder.rungs()][:3] == [8, 0, 8]
    bound, _ = clear(book, [terms(1, bound_units=5), *table])
    assert [r.num_units for r in bound.ladder.rungs()] == [5, 0, 8, 3]


def test_newcomers_have_a_twentieth_of_the_parcels_whatever_they_ask() -> None:
    book = [opened(n, price_micros=60, capacity=100) for n in numbers(4)]
    book.append(opened(5, price_micros=190, capacity=100))
    table = [terms(n) for n in numbers(4)]
    cleared, _ = clear(book, [*table, terms(5, num_receipts=49)], num_units=100)
    last = cleared.ladder.rung(4)
    assert (last.node, last.num_units, last.pay_micros, last.standby) == (node(5), 5, 190, False)
    known, _ = clear(book, [*table, terms(5, num_receipts=50)], num_units=100)
    assert known.ladder.rung(4).num_units == 0 or known.ladder.rung(4).standby


def test_in_small_lots_newcomers_have_their_share_by_lot() -> None:
    won = 0
    book = [opened(n, price_micros=60, capacity=100) for n in numbers(4)]
    book.append(opened(5, price_micros=190))
    session = session_of(book, [*(terms(n) for n in numbers(4)), terms(5, num_receipts=0)])
    for number in range(30):
        auctioned = {"lot_id": f"lot_{number:010d}"}
        seed = seed_of(session.seed_parts(), auctioned["lot_id"])
        cleared = clear_lot(
            auction_of(lot(4, **auctioned)), session.book, session.terms, seed=seed, now_ms=NOW_MS
        )
        rungs = cleared.ladder.rungs()
        won += sum(r.num_units for r in rungs if r.node == node(5) and not r.standby)
    # 30 lots of 4 parcels: 6 expected, and the seeds are fixed.
    assert 1 <= won <= 14


def test_tasks_of_several_units_stay_whole_and_fill_room_as_far_as_can_be() -> None:
    book = [opened(1, capacity=7, price_micros=90), opened(2, capacity=6), opened(3), opened(4)]
    table = [terms(n) for n in numbers(4)]
    cleared, certificate = clear(book, table, num_units=13, sizes=[4, 6, 2, 1])
    assert cleared.ladder.rung(0).num_units == 7
    assert certificate.unfilled_units == 0
    assert certificate.parcels == tuple(Parcels(num_units=size, count=1) for size in (6, 4, 2, 1))
    torn = [opened(n, capacity=5) for n in numbers(3)]
    left, other = clear(torn, table, num_units=16, sizes=[4] * 4)
    assert [r.num_units for r in left.ladder.rungs()] == [4, 4, 4]
    assert (other.unfilled_units, other.clearing_price_micros) == (4, 200)


def test_parcels_that_are_not_the_lot_are_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        clear([opened(1)], [terms(1)], num_units=16, sizes=[4] * 3)
    assert caught.value.code == "ragged_lot"


def test_room_is_filled_to_the_last_unit_that_whole_parcels_can_fill() -> None:
    for sizes in product(range(4), repeat=3):
        parcels = {size: count for size, count in zip((5, 4, 3), sizes, strict=True) if count}
        if not parcels:
            continue
        for room in range(30):
            demand = Demand(dict(parcels))
            before = demand.num_units
            taken = demand.take(room)
            reachable = {
                5 * a + 4 * b + 3 * c for a, b, c in product(*(range(count + 1) for count in sizes))
            }
            assert taken == max(total for total in reachable if total <= room)
            assert demand.num_units == before - taken


def test_the_seed_mixes_what_the_orchestrator_the_bidders_and_the_chain_chose() -> None:
    base = {
        "commit_root": "0x" + "1" * 64,
        "salts_hash": "0x" + "2" * 64,
        "block_hash": "0x" + "3" * 64,
        "block_number": 4,
    }
    changes: list[dict[str, Any]] = [{}, *({name: "0x" + "4" * 64} for name in list(base)[:3])]
    seeds = {
        seed_of(SeedParts.model_validate(base | change), "lot_0123456789") for change in changes
    }
    assert len(seeds) == 4
    plain = keccak(b"\x11" * 32 + b"\x22" * 32 + b"\x33" * 32 + b"lot_0123456789")
    assert seed_of(SeedParts.model_validate(base), "lot_0123456789") == plain


def test_parcels_are_listed_once_by_size() -> None:
    assert parcels_of([2, 4, 4, 1]) == (
        Parcels(num_units=4, count=2),
        Parcels(num_units=2, count=1),
        Parcels(num_units=1, count=1),
    )


def test_an_empty_book_leaves_everything_unfilled_at_the_reserve() -> None:
    cleared, certificate = clear([], [])
    assert len(cleared.ladder) == 0
    assert certificate.unfilled_units == 16
    assert certificate.clearing_price_micros == 200
    assert certificate.allocation_root == "0x" + "0" * 64
