"""Lots cleared and handed out: who is served, what failing costs, what jobs cost each other."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from orchestrator_bidders import certificates, conclude, sell, taken, three
from orchestrator_lab import Lab, Peer, arrival, open_lab, run, until

from shoal.protocol.announcement import (
    CERTIFICATES_TOPIC,
    LOTS_TOPIC,
    CertificateAnnouncement,
    LotAnnouncement,
    topic_of,
)
from shoal.protocol.certificate import ClearingRule
from shoal.protocol.errors import InvariantBroken, OverBudget, Unavailable
from shoal.protocol.market import TaskKind
from shoal.protocol.node import FailureCause, IdleReason
from shoal.protocol.signing import Signed


async def units(peer: Peer) -> int:
    return (await arrival(peer.offers)).lease.record.num_units


def test_the_cheapest_are_served_first_within_their_capacity(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            cheap, dear, dearest = await three(lab, capacity=3)
            await lab.open_sale(job, num_units=5, parcel_units=3)
            sell(lab)
            assert await units(cheap) == 3
            assert await units(dear) == 2
            idle = lab.orchestrator.auctioneer.idle_reason
            assert idle(dearest.node, True) is IdleReason.OUTBID
            assert idle(cheap.node, True) is IdleReason.WORKING
            assert idle(dearest.node, False) is IdleReason.NO_JOBS
            assert dearest.offers.empty()

    run(scenario)


def test_three_bidders_are_paid_as_they_bid_and_their_leases_say_why(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            peers = await three(lab, capacity=2)
            await lab.open_sale(job, num_units=6)
            sell(lab)
            leases = [(await arrival(peer.offers)).lease.record for peer in peers]
            assert [lease.unit_price_micros for lease in leases] == [10, 20, 30]
            assert [lease.rung for lease in leases] == [0, 1, 2]
            # One clearing for the whole lot, whose certificate each lease cites.
            (certificate,) = await certificates(lab)
            assert certificate.rule is ClearingRule.PAY_AS_BID
            assert {lease.certificate_sha256 for lease in leases} == {certificate.digest()}

    run(scenario)


def test_below_three_bidders_a_price_is_posted_and_the_handicap_comes_off_it(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            peer = await lab.peer()
            await peer.bid(price_micros=10)
            await lab.open_sale(job, num_units=2, reserve_micros=1_000)
            sell(lab)
            assert (await arrival(peer.offers)).lease.record.unit_price_micros == 1_000 - 39
            # Its room was four times what was wanted: the next lot is posted lower.
            await lab.open_sale(job, num_units=2, reserve_micros=1_000)
            assert (await arrival(peer.offers)).lease.record.unit_price_micros < 900
            first, second = await certificates(lab)
            assert first.rule is second.rule is ClearingRule.POSTED
            assert first.posted_price_micros == 1_000

    run(scenario)


def test_a_price_that_nobody_takes_rises_until_somebody_does(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            peer = await lab.peer()
            await peer.bid(price_micros=900)
            lab.orchestrator.auctioneer._clearings._posted[job, TaskKind.ROLLOUT] = 1
            await lab.open_sale(job, num_units=2, reserve_micros=1_000)
            sell(lab)
            assert 900 <= (await arrival(peer.offers)).lease.record.unit_price_micros <= 961

    run(scenario)


def test_a_bid_that_its_handicap_lifts_above_the_reserve_wins_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            dear, fair = await lab.peer(), await lab.peer()
            # A newcomer's handicap is 20 micros of a maximum of 500.
            await dear.bid(price_micros=481)
            await fair.bid(price_micros=480)
            await lab.open_sale(job, num_units=1, reserve_micros=500)
            sell(lab)
            assert await units(fair) == 1
            reason = lab.orchestrator.auctioneer.idle_reason(dear.node, True)
            assert reason is IdleReason.ABOVE_RESERVE

    run(scenario)


def prices_stay(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: a posted price keeps nobody out."""
    clearings = lab.orchestrator.auctioneer._clearings
    monkeypatch.setattr(clearings, "_is_shut", lambda *_: False)


async def posted_between(lab: Lab, **bid: Any) -> tuple[str, Peer, Peer]:
    """A job at a posted price of 310 micros, and two who bid 100 and 300 for its rollouts.

    With a newcomer's handicap the dearer one is above the price.
    """
    job = await lab.add_job()
    cheap, dear = await lab.peer(), await lab.peer()
    await cheap.bid(price_micros=100, **bid)
    await dear.bid(price_micros=300, **bid)
    lab.orchestrator.auctioneer._clearings._posted[job, TaskKind.ROLLOUT] = 310
    return job, cheap, dear


@pytest.mark.parametrize("prices_rise", [True, False])
def test_a_posted_price_that_only_an_absent_node_takes_rises_until_one_that_is_here_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prices_rise: bool
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            if not prices_rise:
                prices_stay(lab, monkeypatch)
            job, cheap, honest = await posted_between(lab)
            sale = await lab.open_sale(job)
            sell(lab)
            # A newcomer's handicap of 39 keeps the honest one out, and then the cheap one goes.
            await taken(lab, cheap)
            await cheap.network.disconnect(lab.context.network.peer_id)
            roster = lab.orchestrator.roster
            await until(lambda: not roster.member(cheap.node).connected)
            other = await lab.open_sale(job)
            again, _ = await taken(lab, honest)
            assert again.lease.record.lot_id == other.workload.lot.lot_id
            lab.time.advance(60_000)
            await honest.beat()
            await lab.orchestrator.dispatcher.revoke_job(job, "the holder is gone")
            await lab.settled()
            assert (sale.workload.waiting == []) is prices_rise
            assert again.lease.record.unit_price_micros >= 300

    run(scenario)


@pytest.mark.parametrize("prices_rise", [True, False])
def test_a_posted_price_rises_for_work_that_waits_while_a_dearer_node_is_idle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prices_rise: bool
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            if not prices_rise:
                prices_stay(lab, monkeypatch)
            job, cheap, dear = await posted_between(lab, capacity=2)
            sale = await lab.open_sale(job, num_units=4, parcel_units=2)
            sell(lab)
            await taken(lab, cheap)
            await lab.settled()
            assert (sale.workload.waiting == []) is prices_rise
            if prices_rise:
                offer, _ = await taken(lab, dear)
                assert offer.lease.record.unit_price_micros >= 300

    run(scenario)


def test_an_award_of_several_parcels_is_one_lease_for_each(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            peer = await lab.peer()
            await peer.bid(capacity=5)
            await lab.open_sale(job, num_units=5)
            sell(lab)
            assert sorted([await units(peer) for _ in range(3)]) == [1, 2, 2]

    run(scenario)


def test_a_bidder_too_small_for_the_smallest_parcel_is_told_so(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            small, large = await lab.peer(), await lab.peer()
            await small.bid(price_micros=10, capacity=3)
            await large.bid(price_micros=20, capacity=4)
            await lab.open_sale(job, num_units=8, parcel_units=4)
            sell(lab)
            # The cheaper bid could only tear a task apart.
            assert await units(large) == 4
            reason = lab.orchestrator.auctioneer.idle_reason(small.node, True)
            assert reason is IdleReason.TASK_TOO_LARGE
            assert small.offers.empty()

    run(scenario)


def test_money_that_is_held_is_waited_for_and_none_at_all_halts(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job(funded_micros=250)
            peer = await lab.peer()
            await peer.bid(price_micros=90)
            # Posted at 104, of which a newcomer's handicap takes four.
            sale = await lab.open_sale(job, num_units=3, parcel_units=1, reserve_micros=104)
            sell(lab)
            first = await arrival(peer.offers)
            await arrival(peer.offers)
            auctioneer = lab.orchestrator.auctioneer
            for _ in range(3):
                auctioneer.poke()
                await asyncio.sleep(0)
            assert sale.workload.waiting == [(2,)]
            assert not sale.abandoned
            # Both leases are paid for; 50 micros remain, nobody holds any, and a unit costs 100.
            for live in list(lab.orchestrator.dispatcher.live_leases(job)):
                ledger = lab.orchestrator.settler.ledger(job)
                ledger.release(live.lease.lease_id)
                lab.orchestrator.dispatcher._forget(live)
                ledger.hold(live.lease.lease_id + "x", 100)
            auctioneer.poke()
            await until(lambda: bool(sale.abandoned))
            assert isinstance(sale.abandoned[0], OverBudget)
            assert first.lease.record.unit_price_micros == 100

    run(scenario)


def test_a_lost_node_is_leased_nothing_though_its_bid_stands(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            gone, there, _ = await three(lab)
            await gone.network.disconnect(lab.context.network.peer_id)
            roster = lab.orchestrator.roster
            await until(lambda: not roster.member(gone.node).connected)
            await lab.open_sale(job, num_units=1)
            sell(lab)
            offer = await arrival(there.offers)
            assert (offer.lease.record.num_units, offer.lease.record.rung) == (1, 1)
            # Back again it is first in line.
            await gone.network.connect(lab.context.network.addresses[0], timeout_s=1)
            await gone.join()
            await lab.open_sale(job, num_units=1)
            assert (await arrival(gone.offers)).lease.record.rung == 0

    run(scenario)


def test_a_node_that_broke_its_word_waits_and_then_works_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            peer = await lab.peer()
            await peer.bid()
            sale = await lab.open_sale(job)
            offer, _ = await lab.lease(peer, sale)
            await peer.fail(offer, FailureCause.OUT_OF_MEMORY)
            sell(lab)
            await lab.settled()
            assert sale.workload.waiting == [(0, 1)]
            lab.time.advance(10_000)
            await peer.beat()
            await lab.settled()
            assert await units(peer) == 2

    run(scenario)


@pytest.mark.parametrize("failure", [ValueError("a defect"), KeyError("task")])
def test_a_lot_that_cannot_be_built_costs_its_own_job_only(
    tmp_path: Path, failure: Exception
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            broken_job, job = await lab.add_job(), await lab.add_job()
            peer = await lab.peer()
            await peer.bid(capacity=8)
            broken = await lab.open_sale(broken_job, num_units=2)

            def fail(units: Any) -> Any:
                raise failure

            broken.make = fail
            await lab.open_sale(job, num_units=2)
            sell(lab)
            assert (await arrival(peer.offers)).lease.record.job_id == job
            assert isinstance(broken.abandoned[0], InvariantBroken)
            assert broken.workload.waiting == [(0, 1)]
            assert lab.orchestrator.settler.ledger(broken_job).held_micros == 0

    run(scenario)


def test_a_store_that_is_full_is_waited_for(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            peer = await lab.peer()
            await peer.bid()
            sale = await lab.open_sale(job)
            tries = 0

            async def full_once() -> None:
                nonlocal tries
                tries += 1
                if tries == 1:
                    raise Unavailable("The blob store is full.")

            sale.before_build = full_once
            sell(lab)
            await until(lambda: tries == 1)
            assert lab.orchestrator.settler.ledger(job).held_micros == 0
            lab.orchestrator.auctioneer.poke()
            assert await units(peer) == 2
            assert not sale.abandoned

    run(scenario)


def test_a_job_withdrawn_while_its_task_is_built_gets_no_lease(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            peer = await lab.peer()
            await peer.bid()
            sale = await lab.open_sale(job)
            building, go_on = asyncio.Event(), asyncio.Event()

            async def slowly() -> None:
                building.set()
                await go_on.wait()

            sale.before_build = slowly
            sell(lab)
            async with asyncio.timeout(30):
                await building.wait()
            lab.orchestrator.auctioneer.withdraw(job)
            go_on.set()
            ledger = lab.orchestrator.settler.ledger(job)
            await until(lambda: ledger.held_micros == 0)
            await lab.orchestrator.dispatcher.drained(job)
            assert peer.offers.empty()
            assert sale.workload.waiting == [(0, 1)]
            assert sale.workload.attempts.total() == 0

    run(scenario)


def test_lots_and_certificates_are_gossiped_and_a_network_that_cannot_holds_nothing_up(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            heard: asyncio.Queue[bytes] = asyncio.Queue()
            peer = await lab.peer()

            async def hear(sender: object, data: bytes) -> None:
                heard.put_nowait(data)

            account = lab.context.account.address
            for topic in (LOTS_TOPIC, CERTIFICATES_TOPIC):
                peer.network.subscribe(topic_of(topic, lab.context.domain, account), hear)
            await peer.bid()
            sales = [await lab.open_sale(job), await lab.open_sale(job)]
            await lab.orchestrator.auctioneer.announcer.flush()
            # Both lots together, so that a burst of them is one message.
            lots = Signed[LotAnnouncement].decode(await arrival(heard))
            lots.require_signer(lab.context.domain, account)
            assert lots.record.lots == tuple(sale.workload.lot for sale in sales)
            sell(lab)
            await arrival(peer.offers)
            await until(lambda: bool(lab.orchestrator.auctioneer.announcer._certificates))
            await lab.orchestrator.auctioneer.announcer.flush()
            told = Signed[CertificateAnnouncement].decode(await arrival(heard))
            (first, *_) = told.record.certificates
            assert first.record == (await certificates(lab))[0]
            first.require_signer(lab.context.domain, account)
            await lab.context.network.stop()
            unheard = await lab.open_sale(job)
            await lab.orchestrator.auctioneer.announcer.flush()
            assert unheard.workload in lab.orchestrator.auctioneer._open

    run(scenario)


async def serve(peer: Peer, lab: Lab, expected: int) -> list[str]:
    """The jobs whose leases the worker was given, each accepted before the next is taken."""
    jobs = []
    for _ in range(expected):
        _, live = await taken(lab, peer)
        jobs.append(live.lease.job_id)
        conclude(lab, live)
    return jobs


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_jobs_share_a_worker_by_the_operators_weights(tmp_path: Path, weight: float) -> None:
    heavy, light = "0x" + "7" * 40, "0x" + "8" * 40

    async def scenario() -> None:
        async with open_lab(tmp_path, job_weights={heavy.upper().replace("X", "x"): weight}) as lab:
            jobs = [await lab.add_job(), await lab.add_job()]
            for job, requester in zip(jobs, (heavy, light), strict=True):
                sale = await lab.open_sale(job, num_units=64)
                sale.workload.requester = requester
            peer = await lab.peer()
            await peer.bid(capacity=64)
            sell(lab)
            served = await serve(peer, lab, 24)
            shares = [served.count(job) for job in jobs]
            # Within one lease for each job of the ratio of the weights.
            assert abs(shares[0] / weight - shares[1]) <= 1 / weight + 1
            assert min(shares) >= 24 / (1 + weight) - 2

    run(scenario)


def test_two_jobs_of_one_requester_share_its_weight(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            jobs = [await lab.add_job() for _ in range(3)]
            for job, requester in zip(jobs, ("0x1", "0x1", "0x2"), strict=True):
                sale = await lab.open_sale(job, num_units=64)
                sale.workload.requester = requester
            peer = await lab.peer()
            await peer.bid(capacity=64)
            sell(lab)
            served = await serve(peer, lab, 24)
            assert abs(served.count(jobs[2]) - 12) <= 2
            assert abs(served.count(jobs[0]) - served.count(jobs[1])) <= 2

    run(scenario)


def test_alone_a_job_fills_a_worker_and_with_another_takes_two_leases(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            peer = await lab.peer()
            await peer.bid(capacity=8)
            await lab.open_sale(job, num_units=16)
            sell(lab)
            for _ in range(4):
                await arrival(peer.offers)
            second = await lab.peer()
            await lab.open_sale(await lab.add_job(), num_units=16)
            await second.bid(capacity=8, price_micros=1)
            for _ in range(2):
                await arrival(second.offers)
            await lab.settled()
            assert lab.orchestrator.dispatcher.num_open(second.node) == 2

    run(scenario)


def test_a_bidder_is_told_why_it_is_idle(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            small, other, silent = [await lab.peer() for _ in range(3)]
            await small.bid(capacity=1)
            await other.bid(kind=TaskKind.EVALUATE)
            sale = await lab.open_sale(job, num_units=2)
            sell(lab)
            await lab.settled()
            idle = lab.orchestrator.auctioneer.idle_reason
            assert idle(small.node, True) is IdleReason.TASK_TOO_LARGE
            assert idle(other.node, True) is IdleReason.NO_WORK
            assert idle(silent.node, True) is IdleReason.STARTING
            offer, _ = await lab.lease(small, sale)
            await small.fail(offer, FailureCause.OUT_OF_MEMORY)
            assert idle(small.node, True) is IdleReason.PAUSED

    run(scenario)


def test_bids_of_a_job_that_is_over_compete_no_more(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job, other = await lab.add_job(), await lab.add_job()
            peer = await lab.peer()
            await peer.bid(job_id=job)
            await peer.bid(job_id=other, kind=TaskKind.EVALUATE)
            auctioneer = lab.orchestrator.auctioneer
            assert set(auctioneer.prices(peer.node)) == {TaskKind.ROLLOUT, TaskKind.EVALUATE}
            auctioneer.forget_job(job)
            await lab.orchestrator.sealer.turn()
            assert set(auctioneer.prices(peer.node)) == {TaskKind.EVALUATE}

    run(scenario)
