"""Leases given back: whose fault it is, who sits out, and what ends a job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from orchestrator_lab import Lab, Peer, Sale, arrival, open_lab, run, until

from shoal.market.lease import LeaseState
from shoal.orchestrator.leases import LiveLease
from shoal.orchestrator.store.tables import EventRow
from shoal.protocol.errors import Expired, InvalidRequest, NotFound, PeerFault, Unauthorised
from shoal.protocol.node import FailureCause, IdleReason, LeaseOffer

JOBS_FAULTS = [
    FailureCause.PROMPT_TOO_LONG,
    FailureCause.NOT_FINITE,
    FailureCause.ENVIRONMENT,
    FailureCause.TASK,
    FailureCause.WRONG_BASE,
]


class Deal:
    """A job, its one lot of one parcel, and two workers of different accounts."""

    def __init__(self, lab: Lab, job: str, peers: list[Peer], sale: Sale) -> None:
        self.lab, self.job, self.peers, self.sale = lab, job, peers, sale
        self.setbacks = lab.orchestrator.setbacks

    @classmethod
    async def make(cls, lab: Lab, num_peers: int = 2) -> Deal:
        job = await lab.add_job()
        peers = [await lab.peer() for _ in range(num_peers)]
        return cls(lab, job, peers, await lab.open_sale(job, 2))

    async def lease(self, number: int = 0) -> tuple[LeaseOffer, LiveLease]:
        return await self.lab.lease(self.peers[number], self.sale)

    async def events(self) -> list[dict[str, Any]]:
        rows = await self.lab.rows(EventRow)
        return [json.loads(row.data) for row in rows if row.type == "lease_failed"]

    def may_work(self, number: int = 0) -> bool:
        peer = self.peers[number]
        lot_id = self.sale.workload.lot.lot_id
        return self.setbacks.may_work(peer.node, peer.account.address, lot_id)


def test_a_lease_given_back_frees_its_units_at_once_and_says_why(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            deal = await Deal.make(lab)
            offer, live = await deal.lease()
            peer = deal.peers[0]
            await peer.fail(offer, FailureCause.OUT_OF_MEMORY, "12 GB\0 wanted")
            assert live.record.state is LeaseState.FAILED
            assert deal.sale.workload.waiting == [(0, 1)]
            assert lab.orchestrator.settler.ledger(deal.job).held_micros == 0
            row = await lab.lease_row(offer)
            assert (row.state, row.reason) == ("failed", "out_of_memory: 12 GB  wanted")
            event = (await deal.events())[0]
            assert (event["cause"], event["node"]) == ("out_of_memory", peer.node)
            member = lab.orchestrator.roster.member(peer.node)
            assert member.failures == {"out_of_memory": 1}
            # Saying it again is harmless.
            await peer.fail(offer, FailureCause.OUT_OF_MEMORY, "12 GB\0 wanted")
            assert deal.sale.workload.attempts.total() == 2
            assert len(await deal.events()) == 1

    run(scenario)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"lease_id": "lease_00000000"}, NotFound),
        ({"lease_epoch": 9}, PeerFault),
    ],
)
def test_failures_of_other_leases_are_refused(
    tmp_path: Path, change: dict[str, Any], error: type[Exception]
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            deal = await Deal.make(lab)
            offer, live = await deal.lease()
            with pytest.raises(error):
                await deal.peers[0].fail(offer, FailureCause.TASK, **change)
            with pytest.raises(PeerFault):
                await deal.peers[1].fail(offer, FailureCause.TASK)
            stranger = await lab.peer(joined=False)
            with pytest.raises(Unauthorised):
                await stranger.fail(offer, FailureCause.TASK)
            assert live.record.state is LeaseState.RUNNING

    run(scenario)


def test_a_result_after_giving_back_comes_too_late(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            deal = await Deal.make(lab)
            offer, _ = await deal.lease()
            await deal.peers[0].fail(offer, FailureCause.TASK)
            lab.context.blobs.put_bytes(b"late")
            with pytest.raises((InvalidRequest, Expired)):
                await deal.peers[0].submit(deal.peers[0].message(offer, b"late"))

    run(scenario)


@pytest.mark.parametrize("cause", JOBS_FAULTS)
def test_two_providers_that_find_a_task_impossible_end_its_job(
    tmp_path: Path, cause: FailureCause
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            deal = await Deal.make(lab)
            for number in range(2):
                assert not deal.sale.abandoned
                offer, _ = await deal.lease(number)
                await deal.peers[number].fail(offer, cause, "line 7")
            error = deal.sale.abandoned[0]
            assert error.code == f"job_{cause.value}"
            assert "2 providers" in error.message
            assert "line 7" in error.message

    run(scenario)


def test_one_liar_cannot_end_a_job_however_many_nodes_it_has(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            deal = await Deal.make(lab, num_peers=1)
            liar = deal.peers[0]
            for _ in range(7):
                offer, _ = await deal.lease()
                await liar.fail(offer, FailureCause.ENVIRONMENT)
            assert not deal.sale.abandoned
            # Its account, and so each node of it, is kept from this lot, and from no other.
            assert not deal.may_work()
            lot_id = deal.sale.workload.lot.lot_id
            assert not deal.setbacks.may_work("another node", liar.account.address, lot_id)
            assert deal.setbacks.may_work(liar.node, liar.account.address, "another lot")
            # Seven failures in a row cost it ten minutes, in which others get the work.
            lab.time.advance(319_999)
            assert not deal.may_work()
            lab.time.advance(1)
            assert deal.may_work()

    run(scenario)


def test_two_failures_of_different_causes_or_parcels_convince_nobody(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            deal = await Deal.make(lab)
            causes = (FailureCause.ENVIRONMENT, FailureCause.NOT_FINITE)
            for number, cause in enumerate(causes):
                offer, _ = await deal.lease(number)
                await deal.peers[number].fail(offer, cause)
            assert not deal.sale.abandoned
            other = await lab.open_sale(deal.job, 2)
            offer, _ = await lab.lease(deal.peers[1], other)
            await deal.peers[1].fail(offer, FailureCause.ENVIRONMENT)
            assert not other.abandoned

    run(scenario)


@pytest.mark.parametrize(
    ("cause", "is_paused"),
    [
        (FailureCause.OUT_OF_MEMORY, True),
        (FailureCause.NOT_FETCHED, True),
        (FailureCause.NODE, True),
        (FailureCause.TOO_SLOW, True),
        (FailureCause.ENVIRONMENT, False),
        (FailureCause.PROMPT_TOO_LONG, False),
    ],
)
def test_a_node_sits_out_for_its_own_faults_and_not_for_the_jobs(
    tmp_path: Path, cause: FailureCause, is_paused: bool
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            deal = await Deal.make(lab)
            node = deal.peers[0].node
            for expected_ms in (10_000, 20_000):
                offer, _ = await deal.lease()
                await deal.peers[0].fail(offer, cause)
                assert deal.setbacks.is_paused(node) is is_paused
                await deal.peers[0].bid()
                reason = lab.orchestrator.auctioneer.idle_reason(node, True)
                assert (reason is IdleReason.PAUSED) is is_paused
                lab.time.advance(expected_ms - 1)
                assert deal.setbacks.is_paused(node) is is_paused
                lab.time.advance(1)
                assert not deal.setbacks.is_paused(node)

    run(scenario)


def test_a_worker_that_stops_costs_the_unit_no_attempt(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            deal = await Deal.make(lab)
            offer, _ = await deal.lease()
            await deal.peers[0].fail(offer, FailureCause.STOPPING)
            workload = deal.sale.workload
            assert workload.attempts.total() == 0
            assert workload.waiting == [(0, 1)]

    run(scenario)


def test_a_worker_that_stops_is_leased_nothing_until_it_joins_again(tmp_path: Path) -> None:
    """Else it could take a lease and give it back for ever, at no cost to itself."""

    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            deal = await Deal.make(lab)
            stopping, other = deal.peers
            await stopping.bid(price_micros=10)
            lab.start(lab.orchestrator.auctioneer.run())
            offer = await arrival(stopping.offers)
            live = lab.live(offer)
            await until(lambda: live.record.state is LeaseState.TAKEN)
            await stopping.fail(offer, FailureCause.STOPPING)
            await other.bid(price_micros=20)
            offer = await arrival(other.offers)
            assert stopping.offers.empty()
            assert not deal.setbacks.is_paused(stopping.node)
            # Back again it is as welcome as before.
            live = lab.live(offer)
            await until(lambda: live.record.state is LeaseState.TAKEN)
            await stopping.join()
            await other.fail(offer, FailureCause.STOPPING)
            await arrival(stopping.offers)

    run(scenario)


def test_units_given_back_go_to_the_next_bidder(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            deal = await Deal.make(lab)
            await deal.peers[0].bid(price_micros=10)
            lab.start(lab.orchestrator.auctioneer.run())
            offer = await arrival(deal.peers[0].offers)
            live = lab.live(offer)
            await until(lambda: live.record.state is LeaseState.TAKEN)
            # Only now: two who accept a posted price are served in an order drawn by lots.
            await deal.peers[1].bid(price_micros=20)
            await deal.peers[0].fail(offer, FailureCause.OUT_OF_MEMORY)
            second = await arrival(deal.peers[1].offers)
            assert second.lease.record.lease_epoch == 2

    run(scenario)
