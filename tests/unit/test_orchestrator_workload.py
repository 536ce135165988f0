"""Workloads: parcels are handed out whole, come back whole, and are delivered once."""

from __future__ import annotations

import asyncio

from deliveries import made_up_delivery
from orchestrator_lab import Sale

from shoal.orchestrator.workload import parcels_of

JOB = "0x" + "a" * 64


def test_units_are_cut_in_order_and_only_the_last_parcel_is_smaller() -> None:
    assert parcels_of(range(5), 2) == [(0, 1), (2, 3), (4,)]
    assert parcels_of([7, 3], 4) == [(7, 3)]
    assert parcels_of([], 4) == []


def test_a_parcel_is_taken_whole() -> None:
    workload = Sale(JOB, 5, 100, parcel_units=2).workload
    workload.take((0, 1))
    assert workload.waiting == [(2, 3), (4,)]
    assert workload.undelivered == {(0, 1), (2, 3), (4,)}


def test_a_parcel_given_back_waits_in_its_old_place_and_counts_if_it_failed() -> None:
    workload = Sale(JOB, 4, 100, parcel_units=2).workload
    workload.take((0, 1))
    workload.give_back((0, 1), failed=False)
    assert workload.waiting == [(0, 1), (2, 3)]
    assert workload.attempts[0] == 0
    workload.take((0, 1))
    workload.give_back((0, 1), failed=True)
    assert workload.attempts[0] == 1


def test_what_two_leases_bring_is_delivered_once() -> None:
    async def scenario() -> None:
        sale = Sale(JOB, 4, 100, parcel_units=2)
        workload = sale.workload
        workload.take((0, 1))
        await workload.accept(made_up_delivery((0, 1), "first"))
        await workload.accept(made_up_delivery((0, 1), "second"))
        assert [done.payload for done in sale.delivered] == ["first"]
        # A lease of delivered units that ends late brings nothing back.
        workload.give_back((0, 1), failed=True)
        assert workload.waiting == [(2, 3)]

    asyncio.run(scenario())


def test_the_tail_is_the_last_twentieth_under_way() -> None:
    workload = Sale(JOB, 40, 100, parcel_units=2).workload
    parcels = list(workload.waiting)
    for parcel in parcels:
        workload.take(parcel)
    assert not workload.is_tail
    for parcel in parcels[:-1]:
        workload.undelivered.remove(parcel)
    assert workload.is_tail
    # What still waits for a node is given to one, not to two.
    workload.give_back(parcels[-1], failed=True)
    assert not workload.is_tail
