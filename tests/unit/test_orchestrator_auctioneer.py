"""Lots cleared and handed out: who is served, what failing costs, what jobs cost each other."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from market_records import lease as lease_record
from orchestrator_lab import Lab, Peer, Sale, arrival, open_lab, run, until

from shoal.market.lease import LeaseState
from shoal.orchestrator.leases import LiveLease
from shoal.orchestrator.placement import Placement
from shoal.orchestrator.store.database import Database
from shoal.orchestrator.store.tables import CertificateRow
from shoal.protocol.certificate import ClearingCertificate, ClearingRule
from shoal.protocol.errors import InvariantBroken, OverBudget, Unavailable
from shoal.protocol.market import Lease, TaskKind
from shoal.protocol.node import CERTIFICATES_TOPIC, LOTS_TOPIC, FailureCause, IdleReason, LeaseOffer
from shoal.protocol.signing import Signed


def sell(lab: Lab) -> None:
    lab.start(lab.orchestrator.auctioneer.run())


async def units(peer: Peer) -> int:
    return (await arrival(peer.offers)).lease.record.num_units


async def taken(lab: Lab, peer: Peer) -> tuple[LeaseOffer, LiveLease]:
    """The next lease that ``peer`` is offered, once it takes it."""
    offer = await arrival(peer.offers)
    live = lab.live(offer)
    await until(lambda: live.record.state is LeaseState.TAKEN)
    return offer, live


async def certificates(lab: Lab) -> list[ClearingCertificate]:
    """What was signed, in order."""
    rows = await lab.rows(CertificateRow)
    signed = [Signed[ClearingCertificate].decode(row.certificate.encode()) for row in rows]
    for certificate in signed:
        certificate.require_signer(lab.context.domain, lab.context.account.address)
    return [certificate.record for certificate in signed]


async def three(lab: Lab, **changes: Any) -> list[Peer]:
    """Bidders enough for an auction, at 10, 20 and 30 micros."""
    peers = [await lab.peer() for _ in range(3)]
    for number, peer in enumerate(peers, start=1):
        await peer.bid(price_micros=10 * number, turn=number == 3, **changes)
    return peers


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


@pytest.mark.parametrize("prices_rise", [True, False])
def test_a_posted_price_that_only_an_absent_node_takes_rises_until_one_that_is_here_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prices_rise: bool
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            clearings = lab.orchestrator.auctioneer._clearings
            if not prices_rise:
                # The negative control.
                monkeypatch.setattr(clearings, "_is_shut", lambda *_: False)
            job = await lab.add_job()
            cheap, honest = await lab.peer(), await lab.peer()
            await cheap.bid(price_micros=100)
            await honest.bid(price_micros=300)
            clearings._posted[job, TaskKind.ROLLOUT] = 310
            sale = await lab.open_sale(job)
            sell(lab)
            # A newcomer's handicap of 39 keeps the honest one out, and then the cheap one goes.
            await taken(lab, cheap)
            await cheap.network.disconnect(lab.context.network.peer_id)
            roster = lab.orchestrator.roster
            await until(lambda: not roster.member(cheap.node).connected)
            other = await lab.open_sale(job)
            again = await arrival(honest.offers)
            assert again.lease.record.lot_id == other.workload.lot.lot_id
            lab.time.advance(60_000)
            await lab.orchestrator.dispatcher.revoke_job(job, "the holder is gone")
            await lab.settled()
            assert (sale.workload.waiting == []) is prices_rise
            assert again.lease.record.unit_price_micros >= 300

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

            peer.network.subscribe(LOTS_TOPIC, hear)
            peer.network.subscribe(CERTIFICATES_TOPIC, hear)
            await peer.bid()
            sale = await lab.open_sale(job)
            assert await arrival(heard) == sale.workload.lot.encode()
            sell(lab)
            certificate = Signed[ClearingCertificate].decode(await arrival(heard))
            assert [certificate.record] == await certificates(lab)
            await lab.context.network.stop()
            unheard = await lab.open_sale(job)
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


def conclude(lab: Lab, live: LiveLease) -> None:
    """The lease's result was accepted."""
    lab.orchestrator.dispatcher.conclude(
        live, live.record.model_copy(update={"state": LeaseState.ACCEPTED}), unit_ms=1_000
    )
    live.workload.undelivered.discard(live.units)
    lab.orchestrator.settler.ledger(live.lease.job_id).release(live.lease.lease_id)
    lab.orchestrator.auctioneer.room_at(live.lease.node)


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


@pytest.mark.parametrize("ladder_remembers", [True, False])
def test_failed_work_goes_to_the_next_rung_and_not_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ladder_remembers: bool
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            if not ladder_remembers:
                # The negative control.
                monkeypatch.setattr(Placement, "note_failure", lambda *_: None)
            job = await lab.add_job()
            cheap, dear, _ = await three(lab)
            await lab.open_sale(job)
            sell(lab)
            offer, _ = await taken(lab, cheap)
            # A fault of the task keeps nobody from working: only the ladder does.
            await cheap.fail(offer, FailureCause.TASK)
            again, _ = await taken(lab, dear if ladder_remembers else cheap)
            first, second = offer.lease.record, again.lease.record
            assert second.lease_epoch == first.lease_epoch + 1
            assert second.certificate_sha256 == first.certificate_sha256
            assert (second.rung, second.unit_price_micros) == (
                (1, 20) if ladder_remembers else (0, 10)
            )

    run(scenario)


def test_after_two_failures_the_reserve_rises_by_a_tenth_under_a_new_certificate(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            peers = await three(lab)
            sale = await lab.open_sale(job, max_micros=2_000)
            sell(lab)
            causes = (FailureCause.TASK, FailureCause.ENVIRONMENT)
            for peer, cause in zip(peers[:2], causes, strict=True):
                offer, _ = await taken(lab, peer)
                assert len(await certificates(lab)) == 1
                await peer.fail(offer, cause)
            offer, _ = await taken(lab, peers[0])
            before, after = await certificates(lab)
            assert offer.lease.record.certificate_sha256 == after.digest()
            assert offer.lease.record.lease_epoch == 3
            assert (before.lot.reserve_micros, after.lot.reserve_micros) == (1_000, 1_100)
            assert (before.reserve.num_raises, after.reserve.num_raises) == (0, 1)
            assert sale.workload.reserve == after.reserve
            # What failed under it counts anew: one failure, the next rung, no new clearing.
            await peers[0].fail(offer, FailureCause.NOT_FINITE)
            offer, _ = await taken(lab, peers[1])
            assert len(await certificates(lab)) == 2

    run(scenario)


class Clearing:
    """The auctioneer's clearings of one lot of two parcels, without its loop."""

    def __init__(self, lab: Lab, sale: Sale) -> None:
        self.lab, self.sale, self.parcel = lab, sale, sale.workload.waiting[0]

    @classmethod
    async def make(cls, lab: Lab, peers: int) -> Clearing:
        job = await lab.add_job()
        for number in range(peers):
            await (await lab.peer()).bid(price_micros=10 + number, turn=False)
        await lab.orchestrator.sealer.turn()
        return cls(lab, await lab.open_sale(job, 4, max_micros=2_000))

    async def placement(self) -> Placement:
        clearings = self.lab.orchestrator.auctioneer._clearings
        found = await clearings.placement(self.sale.workload, self.parcel)
        assert found is not None
        return found

    @staticmethod
    def lease(placement: Placement, rung: int = 0) -> Lease:
        return lease_record(certificate_sha256=placement.sha256, rung=rung)


def test_a_raise_that_could_not_be_written_down_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            clearings = await Clearing.make(lab, peers=3)
            placement = await clearings.placement()
            for rung in (0, 1):
                placement.note_failure(clearings.parcel, clearings.lease(placement, rung))

            async def fail(self: Database, work: Any) -> Any:
                raise Unavailable("The database is away.")

            with monkeypatch.context() as patch:
                patch.setattr(Database, "run", fail)
                for _ in range(3):
                    with pytest.raises(Unavailable):
                        await clearings.placement()
            again = await clearings.placement()
            assert again.certificate.record.lot.reserve_micros == 1_100
            assert clearings.sale.workload.reserve.num_raises == 1

    run(scenario)


def test_a_lot_that_nobody_can_take_is_cleared_again_only_with_a_new_book(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            clearings = await Clearing.make(lab, peers=0)
            placement = await clearings.placement()
            placement.note_failure(clearings.parcel, lease_record())
            for _ in range(5):
                lab.time.advance(1)
                again = await clearings.placement()
            # One more for the failure, and none for looking.
            assert len(await certificates(lab)) == 2
            peer = await lab.peer()
            await peer.bid()
            assert len((await clearings.placement()).ladder) == 1
            assert len(again.ladder) == 0

    run(scenario)


def test_the_same_clearing_twice_in_a_millisecond_is_one_certificate(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            clearings = await Clearing.make(lab, peers=0)
            first = await clearings.placement()
            first.note_failure(clearings.parcel, lease_record())
            second = await clearings.placement()
            assert second is not first
            assert second.sha256 == first.sha256
            assert len(await certificates(lab)) == 1

    run(scenario)


def test_a_failure_under_an_earlier_certificate_counts_too(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            clearings = await Clearing.make(lab, peers=3)
            old = await clearings.placement()
            await lab.orchestrator.sealer.turn()
            new = await clearings.placement()
            assert new.sha256 != old.sha256
            for rung in (0, 1):
                assert not new.raises_reserve(clearings.parcel)
                new.note_failure(clearings.parcel, clearings.lease(old, rung))
            assert new.raises_reserve(clearings.parcel)
            assert new.needs_clearing(clearings.parcel)
            # And is carried by a parcel that is out just then.
            new = await clearings.placement()
            new.note_failure(clearings.parcel, clearings.lease(new))
            clearings.sale.workload.take(clearings.parcel)
            await lab.orchestrator.sealer.turn()
            clearings.parcel = clearings.sale.workload.waiting[0]
            assert (await clearings.placement()).ladder.num_failures((0, 1)) == 1

    run(scenario)


@pytest.mark.parametrize("tail_is_doubled", [True, False])
def test_the_last_units_of_a_lot_are_given_to_a_second_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tail_is_doubled: bool
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            if not tail_is_doubled:
                # The negative control.
                monkeypatch.setattr(lab.orchestrator.dispatcher, "tail", list)
            job = await lab.add_job()
            first, second, third = await three(lab, capacity=40)
            await lab.open_sale(job, num_units=40, parcel_units=38)
            sell(lab)
            _, large = await taken(lab, first)
            tail, tail_live = await taken(lab, first)
            assert (large.lease.num_units, tail.lease.record.num_units) == (38, 2)
            await lab.settled()
            assert second.offers.empty()
            conclude(lab, large)
            await lab.settled()
            if not tail_is_doubled:
                assert second.offers.empty()
                return
            again, again_live = await taken(lab, second)
            assert again.lease.record.lease_epoch == tail.lease.record.lease_epoch + 1
            assert (again_live.units, again_live.rival) == (tail_live.units, tail_live)
            # There is no third.
            await lab.settled()
            assert third.offers.empty()

    run(scenario)
