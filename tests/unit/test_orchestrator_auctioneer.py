"""Bids in, awards out: whose bids stand, who wins, and what a lot's trouble costs the others."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account as EthAccount
from orchestrator_lab import DOMAIN, Lab, Peer, arrival, open_lab, run, until

from shoal.market.lease import LeaseState
from shoal.orchestrator.store.tables import BidRow
from shoal.protocol.errors import (
    InvalidRequest,
    InvariantBroken,
    OverBudget,
    PeerFault,
    Unauthorised,
    Unavailable,
)
from shoal.protocol.market import Bid, BidReceipt, TaskKind
from shoal.protocol.node import BID_PROTOCOL, LOTS_TOPIC, IdleReason
from shoal.protocol.signing import Signed, sign


def sell(lab: Lab) -> None:
    lab.start(lab.orchestrator.auctioneer.run())


async def units(peer: Peer) -> int:
    return (await arrival(peer.offers)).lease.record.num_units


def test_a_bid_stands_and_its_receipt_is_signed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            peer = await lab.peer()
            bid = peer.make_bid(price_micros=250)
            receipt = await peer.bid(bid)
            receipt.require_signer(DOMAIN, lab.context.account.address)
            assert receipt.record.bid_sha256 == bid.digest()
            assert lab.orchestrator.auctioneer.prices(peer.node) == {"rollout": 250}
            assert [row.bid_sha256 for row in await lab.rows(BidRow)] == [bid.digest()]

    run(scenario)


@pytest.mark.parametrize("field", ["node", "account"])
def test_a_bid_for_somebody_else_is_refused(tmp_path: Path, field: str) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            peer, other = await lab.peer(), await lab.peer()
            theirs: dict[str, Any] = {"node": other.node, "account": other.account.address}
            forged = peer.make_bid(**{field: theirs[field]})
            with pytest.raises(Unauthorised) as caught:
                await peer.bid(forged)
            assert caught.value.code == "wrong_node"
            assert not lab.orchestrator.auctioneer.prices(other.node)

    run(scenario)


def test_a_bid_signed_by_another_account_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            peer = await lab.peer()
            signed = sign(peer.make_bid(), DOMAIN, EthAccount.create())
            with pytest.raises(Unauthorised) as caught:
                await peer.ask(BID_PROTOCOL, signed.encode())
            assert caught.value.code == "wrong_signer"
            assert not lab.orchestrator.auctioneer.prices(peer.node)

    run(scenario)


def test_the_same_bid_again_is_harmless_and_an_older_one_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            peer = await lab.peer()
            old, new = peer.make_bid(price_micros=100), peer.make_bid(price_micros=200)
            await peer.bid(old)
            await peer.bid(new)
            assert (await peer.bid(new)).record.bid_sha256 == new.digest()
            with pytest.raises(InvalidRequest) as caught:
                await peer.bid(old)
            assert caught.value.code == "stale_nonce"
            assert lab.orchestrator.auctioneer.prices(peer.node) == {"rollout": 200}

    run(scenario)


def test_one_nonce_may_serve_bids_of_different_kinds(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            peer = await lab.peer()
            for kind in TaskKind:
                await peer.bid(kind=kind, nonce=7)
            assert set(lab.orchestrator.auctioneer.prices(peer.node)) == set(TaskKind)
            assert len(await lab.rows(BidRow)) == len(TaskKind)

    run(scenario)


@pytest.mark.parametrize("data", [b"", b"\xff", b"null", b'{"record":{},"signature":"0x"}'])
def test_malformed_bids_are_a_peer_fault(tmp_path: Path, data: bytes) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            peer = await lab.peer()
            with pytest.raises(PeerFault):
                await peer.ask(BID_PROTOCOL, data)
            await peer.bid()

    run(scenario)


def test_the_cheapest_are_served_first_within_their_capacity(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            cheap, dear, dearest = [await lab.peer() for _ in range(3)]
            await cheap.bid(price_micros=10, capacity=3)
            await dear.bid(price_micros=20, capacity=3)
            await dearest.bid(price_micros=30, capacity=3)
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


def test_a_bid_above_the_reserve_wins_nothing_and_is_told_why(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            dear, fair = await lab.peer(), await lab.peer()
            await dear.bid(price_micros=501)
            await fair.bid(price_micros=500)
            await lab.open_sale(job, num_units=1, reserve_micros=500)
            sell(lab)
            assert await units(fair) == 1
            reason = lab.orchestrator.auctioneer.idle_reason(dear.node, True)
            assert reason is IdleReason.ABOVE_RESERVE

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
            await peer.bid(price_micros=100)
            sale = await lab.open_sale(job, num_units=3, parcel_units=1)
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


def test_a_lost_node_wins_nothing_until_it_bids_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            gone, there = await lab.peer(), await lab.peer()
            await gone.bid(price_micros=1)
            await there.bid(price_micros=2)
            await gone.network.disconnect(lab.context.network.peer_id)
            roster = lab.orchestrator.roster
            await until(lambda: not roster.member(gone.node).connected)
            await lab.open_sale(job, num_units=1)
            sell(lab)
            assert await units(there) == 1
            assert not lab.orchestrator.auctioneer.prices(gone.node)

    run(scenario)


def test_a_suspended_node_waits_and_then_works_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            peer = await lab.peer()
            await peer.bid()
            auctioneer = lab.orchestrator.auctioneer
            auctioneer.suspend(peer.node)
            sale = await lab.open_sale(job, num_units=1)
            sell(lab)
            await until(lambda: not auctioneer._changed.is_set())
            assert sale.workload.waiting == [(0,)]
            lab.time.advance(10_001)
            auctioneer.poke()
            assert await units(peer) == 1

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
            await arrival_of(building)
            lab.orchestrator.auctioneer.withdraw(job)
            go_on.set()
            ledger = lab.orchestrator.settler.ledger(job)
            await until(lambda: ledger.held_micros == 0)
            await lab.orchestrator.dispatcher.drained(job)
            assert peer.offers.empty()
            assert sale.workload.waiting == [(0, 1)]
            assert sale.workload.attempts.total() == 0

    run(scenario)


async def arrival_of(event: asyncio.Event) -> None:
    async with asyncio.timeout(30):
        await event.wait()


def test_a_withdrawn_job_takes_its_bids_along(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job, other = await lab.add_job(), await lab.add_job()
            peer = await lab.peer()
            await peer.bid(job_id=job)
            await peer.bid(job_id=other, kind=TaskKind.EVALUATE)
            lab.orchestrator.auctioneer.withdraw(job)
            assert set(lab.orchestrator.auctioneer.prices(peer.node)) == {TaskKind.EVALUATE}

    run(scenario)


def test_a_network_that_cannot_gossip_holds_no_lot_up(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            heard: asyncio.Queue[bytes] = asyncio.Queue()
            peer = await lab.peer()

            async def hear(sender: object, data: bytes) -> None:
                heard.put_nowait(data)

            peer.network.subscribe(LOTS_TOPIC, hear)
            sale = await lab.open_sale(job)
            assert await arrival(heard) == sale.workload.lot.encode()
            await lab.context.network.stop()
            unheard = await lab.open_sale(job)
            assert unheard.workload in lab.orchestrator.auctioneer._open

    run(scenario)


def test_receipts_are_for_the_bid_that_was_sent(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            peer = await lab.peer()
            bid: Bid = peer.make_bid()
            raw = await peer.ask(BID_PROTOCOL, sign(bid, DOMAIN, peer.account).encode())
            receipt = Signed[BidReceipt].decode(raw).record
            assert receipt.received_at_ms == lab.time.now_ms()

    run(scenario)


async def serve(peer: Peer, lab: Lab, expected: int) -> list[str]:
    """The jobs whose leases the worker was given, each accepted before the next is taken."""
    jobs = []
    for _ in range(expected):
        offer = await arrival(peer.offers)
        live = lab.live(offer)
        await until(lambda live=live: live.record.state is LeaseState.RUNNING)  # type: ignore[misc]
        jobs.append(live.lease.job_id)
        lab.orchestrator.dispatcher.conclude(
            live,
            live.record.model_copy(update={"state": LeaseState.ACCEPTED}),
            unit_ms=1_000,
        )
        live.workload.undelivered.discard(live.units)
        lab.orchestrator.settler.ledger(live.lease.job_id).release(live.lease.lease_id)
        lab.orchestrator.auctioneer.room_at(peer.node)
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
            await until(lambda: not lab.orchestrator.auctioneer._changed.is_set())
            assert lab.orchestrator.dispatcher.num_open(second.node) == 2

    run(scenario)


def test_a_bidder_is_told_why_it_is_idle(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            small, other, silent = [await lab.peer() for _ in range(3)]
            await small.bid(capacity=1)
            await other.bid(kind=TaskKind.EVALUATE)
            await lab.open_sale(job, num_units=2)
            sell(lab)
            await until(lambda: not lab.orchestrator.auctioneer._changed.is_set())
            idle = lab.orchestrator.auctioneer.idle_reason
            assert idle(small.node, True) is IdleReason.TASK_TOO_LARGE
            assert idle(other.node, True) is IdleReason.NO_WORK
            assert idle(silent.node, True) is IdleReason.STARTING
            lab.orchestrator.auctioneer.suspend(small.node)
            assert idle(small.node, True) is IdleReason.PAUSED

    run(scenario)
