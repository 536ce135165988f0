"""A node whose leases last long is given what it can hand in in time, and no more."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from orchestrator_bidders import conclude, sell, taken
from orchestrator_lab import Lab, Peer, Sale, open_lab, run

from shoal.orchestrator.outlooks import Outlooks
from shoal.protocol.market import TaskKind
from shoal.protocol.node import FailureCause, LeaseOffer

UNIT_MS = 1_000
LAG_MS = 10_000


class Lines:
    """A cheap worker on a slow line, and a dear one on a quick line; each has room for a task."""

    def __init__(self, lab: Lab, job: str, slow: Peer, quick: Peer) -> None:
        self.lab, self.job, self.slow, self.quick = lab, job, slow, quick
        self.outlooks = lab.orchestrator.dispatcher.outlooks
        for peer in (slow, quick):
            self.outlooks.pace.note(job, TaskKind.ROLLOUT, peer.node, UNIT_MS)
        for _ in range(2):
            self.note_lag(slow, LAG_MS)

    def lag_ms(self, peer: Peer) -> int:
        """The lag the peer is known for now."""
        now_ms = self.lab.time.now_ms()
        return self.outlooks.pace.lag_ms(self.job, TaskKind.ROLLOUT, peer.node, now_ms=now_ms)

    def note_lag(self, peer: Peer, lag_ms: int) -> None:
        now_ms = self.lab.time.now_ms()
        self.outlooks.pace.note_lag(self.job, TaskKind.ROLLOUT, peer.node, lag_ms, now_ms=now_ms)

    async def pass_s(self, seconds: int, offer: LeaseOffer) -> None:
        """Time passes; both are there, and the quick one is at work on ``offer`` all the while."""
        for _ in range(seconds):
            self.lab.time.advance(1_000)
            await self.slow.beat()
            await self.quick.beat(offer, progress=self.lab.time.now_ms())
        await self.lab.orchestrator.dispatcher.reap()
        await self.lab.settled()

    async def sale(self, num_units: int, parcel_units: int = 2) -> Sale:
        return await self.lab.open_sale(self.job, num_units, parcel_units=parcel_units)


@asynccontextmanager
async def lines(folder: Path) -> AsyncIterator[Lines]:
    async with open_lab(folder) as lab:
        job = await lab.add_job()
        slow, quick = await lab.peer(), await lab.peer()
        await slow.bid(price_micros=10, capacity=2, turn=False)
        await quick.bid(price_micros=20, capacity=2)
        sell(lab)
        yield Lines(lab, job, slow, quick)


def test_a_parcel_waits_for_who_is_busy_and_quick_instead(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with lines(tmp_path) as both:
            sale = await both.sale(4)
            _, first = await taken(both.lab, both.quick)
            await both.lab.settled()
            assert sale.workload.waiting == [(2, 3)]
            assert both.slow.offers.empty()
            conclude(both.lab, first)
            await taken(both.lab, both.quick)
            assert both.slow.offers.empty()

    run(scenario)


def test_without_the_rule_the_slow_line_is_given_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with lines(tmp_path) as both:
            monkeypatch.setattr(
                Outlooks, "in_time", lambda self, workload, parcel, ready, able: ready
            )
            await both.sale(4)
            await taken(both.lab, both.slow)

    run(scenario)


def test_a_lot_large_enough_is_shared_with_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with lines(tmp_path) as both:
            # Forty parcels of two seconds are more than the lag and its own two.
            await both.sale(80)
            await taken(both.lab, both.slow)

    run(scenario)


def test_it_is_given_the_parcel_that_nobody_else_can_have(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with lines(tmp_path) as both:
            sale = await both.sale(4)
            offer, _ = await taken(both.lab, both.quick)
            await both.quick.fail(offer, FailureCause.NOT_FETCHED)
            # Who failed a parcel does not get it again, so there is nobody to wait for.
            again, _ = await taken(both.lab, both.slow)
            assert again.lease.record.num_units == 2
            assert not sale.abandoned

    run(scenario)


def test_it_is_served_when_its_lag_is_old_news(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with lines(tmp_path) as both:
            await both.sale(4)
            await taken(both.lab, both.quick)
            await both.lab.settled()
            assert both.slow.offers.empty()
            # Not by the quick one's being late, which would count for it as well.
            both.note_lag(both.slow, 1)
            both.note_lag(both.slow, 1)
            await both.lab.settled()
            await taken(both.lab, both.slow)

    run(scenario)


def test_nobody_waits_long_for_a_quick_node_that_stays_away(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with lines(tmp_path) as both:
            await both.sale(4)
            offer, _ = await taken(both.lab, both.quick)
            await both.pass_s(3, offer)
            assert both.slow.offers.empty()
            await both.pass_s(12, offer)
            await taken(both.lab, both.slow)

    run(scenario)


def test_a_second_try_goes_to_nobody_who_would_be_later_still(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with lines(tmp_path) as both:
            await both.sale(2)
            offer, live = await taken(both.lab, both.quick)
            await both.pass_s(7, offer)
            assert both.slow.offers.empty()
            # Seen anew, elsewhere: a lag is not believed for so long.
            both.note_lag(both.slow, LAG_MS)
            await both.pass_s(6, offer)
            assert both.slow.offers.empty()
            # Now it may take as long again, and the slow line is the shorter way.
            await both.pass_s(4, offer)
            await taken(both.lab, both.slow)
            assert live.rival is not None

    run(scenario)


def test_without_that_rule_it_goes_to_whoever_is_idle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with lines(tmp_path) as both:
            monkeypatch.setattr(Outlooks, "quicker", lambda self, behind, ready: ready)
            await both.sale(2)
            offer, _ = await taken(both.lab, both.quick)
            await both.pass_s(6, offer)
            await taken(both.lab, both.slow)

    run(scenario)


def test_lags_are_what_leases_last_beyond_their_computing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with lines(tmp_path) as both:
            await both.sale(2)
            offer, live = await taken(both.lab, both.quick)
            both.lab.time.advance(7_000)
            await both.quick.beat(offer, progress=1)
            conclude(both.lab, live)
            assert both.lag_ms(both.quick) == 7_000 - 2 * UNIT_MS

    run(scenario)


def test_a_lease_that_is_outrun_counts_as_what_it_would_have_lasted(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with lines(tmp_path) as both:
            await both.sale(2)
            _, live = await taken(both.lab, both.quick)
            both.lab.time.advance(7_000)
            both.outlooks.note_outrun(live)
            # Five seconds late, and taken to be late by as much again.
            assert both.lag_ms(both.quick) == 5_000 + 5_000

    run(scenario)
