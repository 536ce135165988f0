"""The auction: order, fill, reasons."""

from __future__ import annotations

import pytest
from market_records import NOW_MS, SEED, lot, peer, standing

from shoal.market.auction import Clearing, RejectReason, clear, tie_break
from shoal.market.book import StandingBid
from shoal.protocol.errors import InvalidRequest
from shoal.protocol.market import TaskKind


def run(book: list[StandingBid], num_units: int = 16, **options: object) -> Clearing:
    settings: dict[str, object] = {"in_flight": {}, "seed": SEED, "now_ms": NOW_MS}
    return clear(lot(num_units), book, **(settings | options))  # type: ignore[arg-type]


def test_the_cheapest_are_filled_first_and_paid_their_own_price() -> None:
    book = [standing(1, price_micros=120), standing(2, price_micros=80), standing(3)]
    clearing = run(book)
    won = [(a.node, a.num_units, a.unit_price_micros) for a in clearing.awards]
    assert won == [(peer(2), 8, 80), (peer(3), 8, 100)]
    assert clearing.unfilled_units == 0
    assert [r.reason for r in clearing.rejected] == [RejectReason.OUTBID]
    assert clearing == run(book[::-1] + book)


def test_equal_prices_are_ordered_by_the_seed() -> None:
    book = [standing(n) for n in range(1, 9)]
    first = {run(book, 8, seed=bytes([s]) * 32).awards[0].node for s in range(40)}
    assert len(first) > 4
    order = sorted(book, key=lambda entry: tie_break(SEED, entry.sha256))
    assert run(book, 8).awards[0].bid_sha256 == order[0].sha256


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"price_micros": 201}, RejectReason.ABOVE_RESERVE),
        ({"valid_until_ms": NOW_MS}, RejectReason.EXPIRED),
        ({"kind": TaskKind.GRADIENT}, RejectReason.NOT_COVERED),
        ({"epoch_to": 6}, RejectReason.NOT_COVERED),
        ({"job_id": "0x" + "1" * 64}, RejectReason.NOT_COVERED),
    ],
)
def test_a_bid_that_does_not_fit_is_told_why(
    changes: dict[str, object], reason: RejectReason
) -> None:
    clearing = run([standing(1, **changes)])
    assert clearing.awards == ()
    assert clearing.unfilled_units == 16
    assert [r.reason for r in clearing.rejected] == [reason]
    assert run([standing()]).awards


def test_capacity_counts_what_the_node_already_holds_of_this_kind() -> None:
    busy = {(peer(1), TaskKind.ROLLOUT): 5, (peer(1), TaskKind.GRADIENT): 8}
    assert run([standing()], in_flight=busy).awards[0].num_units == 3
    full = {(peer(1), TaskKind.ROLLOUT): 9}
    assert run([standing()], in_flight=full).rejected[0].reason is RejectReason.NO_CAPACITY


def test_two_bids_of_one_node_share_its_capacity() -> None:
    book = [standing(1, price_micros=50), standing(1, price_micros=60, job_id=lot().job_id)]
    clearing = run(book)
    assert sum(a.num_units for a in clearing.awards) == 8
    assert clearing.rejected[0].reason is RejectReason.NO_CAPACITY


def test_tasks_are_not_torn_apart() -> None:
    clearing = run([standing(capacity=7), standing(2, price_micros=101)], task_sizes=[4] * 4)
    assert [a.num_units for a in clearing.awards] == [4, 8]
    assert clearing.unfilled_units == 4
    with pytest.raises(InvalidRequest):
        run([standing()], num_units=6, task_sizes=[4])


def test_a_bid_takes_each_task_that_fits_and_leaves_the_others_to_the_next() -> None:
    book = [standing(capacity=7), standing(2, price_micros=101, capacity=6)]
    clearing = run(book, num_units=13, task_sizes=[4, 6, 2, 1])
    assert [a.num_units for a in clearing.awards] == [7, 6]
    assert clearing.unfilled_units == 0


def test_a_bidder_too_small_for_any_task_is_told_so_and_not_that_it_is_busy() -> None:
    book = [standing(capacity=3), standing(2, capacity=8, price_micros=120)]
    clearing = run(book, num_units=8, task_sizes=[4, 4], in_flight={(peer(2), TaskKind.ROLLOUT): 5})
    assert clearing.awards == ()
    assert {r.node: r.reason for r in clearing.rejected} == {
        peer(1): RejectReason.TASK_TOO_LARGE,
        peer(2): RejectReason.NO_CAPACITY,
    }


def test_a_seed_is_32_bytes() -> None:
    with pytest.raises(InvalidRequest):
        run([standing()], seed=b"short")
