"""Lots cleared: once for each book, anew for what fails, twice for the last units."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from market_records import lease as lease_record
from orchestrator_bidders import certificates, conclude, sell, taken, three
from orchestrator_lab import Lab, Sale, arrival, database_away, open_lab, run, until
from sqlalchemy.exc import OperationalError

from shoal.orchestrator.placement import Placement
from shoal.orchestrator.store.database import Database
from shoal.protocol.market import Lease
from shoal.protocol.node import FailureCause


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
        auctioneer = self.lab.orchestrator.auctioneer
        found = auctioneer._clearings.placement(self.sale.workload, self.parcel)
        assert found is not None
        workload = self.sale.workload
        await auctioneer._safely(workload, auctioneer._write_rest(workload))
        return found

    @staticmethod
    def lease(placement: Placement, rung: int = 0) -> Lease:
        return lease_record(certificate_sha256=placement.sha256, rung=rung)


def test_a_clearing_that_could_not_be_written_down_is_written_later_and_raises_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            clearings = await Clearing.make(lab, peers=3)
            placement = await clearings.placement()
            for rung in (0, 1):
                placement.note_failure(clearings.parcel, clearings.lease(placement, rung))
            with database_away(monkeypatch):
                for _ in range(3):
                    again = await clearings.placement()
            assert again.certificate.record.lot.reserve_micros == 1_100
            assert clearings.sale.workload.reserve.num_raises == 1
            assert len(await certificates(lab)) == 1
            await clearings.placement()
            assert len(await certificates(lab)) == 2

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


def test_a_clearing_of_which_nobody_got_a_lease_is_on_record(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            await (await lab.peer()).bid(price_micros=3_000)
            sale = await lab.open_sale(job, max_micros=2_000)
            sell(lab)
            await until(lambda: sale.workload.placement is not None)
            await until(lambda: not sale.workload.unwritten)
            (certificate,) = await certificates(lab)
            assert certificate.lot.lot_id == sale.workload.lot.lot_id
            assert sale.workload.attempts.total() == 0

    run(scenario)


def test_nobody_is_told_of_a_certificate_that_is_not_on_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job, auctioneer = await lab.add_job(), lab.orchestrator.auctioneer
            await (await lab.peer()).bid(price_micros=3_000)
            told = auctioneer.announcer._certificates
            with database_away(monkeypatch):
                sale = await lab.open_sale(job, max_micros=2_000)
                sell(lab)
                await until(lambda: sale.workload.placement is not None)
                await asyncio.sleep(0.05)
                assert not told
                # Nor is it forgotten with its job, which ends meanwhile.
                auctioneer.withdraw(job)
            auctioneer.poke()
            await until(lambda: bool(told))
            assert [known.record for known in told] == await certificates(lab)
            await until(lambda: not auctioneer._owing)

    run(scenario)


def test_an_answer_lost_after_the_commit_ends_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job, honest = await lab.add_job(), Database.run_now
            lost: list[object] = []

            def run_now(database: Database, work: Any) -> Any:
                done = honest(database, work)
                if work.__qualname__.startswith("Dispatcher._issue") and not lost:
                    lost.append(work)
                    raise OperationalError("COMMIT", {}, Exception("the connection was closed"))
                return done

            monkeypatch.setattr(Database, "run_now", run_now)
            peer = await lab.peer()
            await peer.bid()
            sale = await lab.open_sale(job)
            sell(lab)
            await until(lambda: bool(lost))
            lab.orchestrator.auctioneer.poke()
            await arrival(peer.offers)
            assert sale.abandoned == []
            assert len(await certificates(lab)) == 1

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


def test_a_clearing_that_comes_back_after_another_is_one_certificate(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            clearings = await Clearing.make(lab, peers=0)
            waiting = clearings.sale.workload.waiting
            both = await clearings.placement()
            both.note_failure(clearings.parcel, lease_record())
            other = waiting.pop()
            alone = await clearings.placement()
            assert alone.sha256 != both.sha256
            waiting.append(other)
            alone.note_failure(other, lease_record())
            clearings.parcel = other
            assert (await clearings.placement()).sha256 == both.sha256
            assert len(await certificates(lab)) == 2

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
                assert not new.ladder.raises_reserve(clearings.parcel)
                new.note_failure(clearings.parcel, clearings.lease(old, rung))
            assert new.ladder.raises_reserve(clearings.parcel)
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
                monkeypatch.setattr(lab.orchestrator.dispatcher.outlooks, "tail", list)
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
