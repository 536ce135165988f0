"""From an offer to the first word of work: who answers when, and which clock runs meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from orchestrator_lab import Lab, Peer, Sale, arrival, open_lab, run, until

from shoal.market.lease import LeaseState
from shoal.network.memory import MemoryNetwork
from shoal.orchestrator.leases import LiveLease
from shoal.protocol.errors import Clock, Expired, Unavailable
from shoal.protocol.node import LEASE_PROTOCOL, LeaseOffer

PAYLOAD = b"done at once"


async def offered(lab: Lab, *, answered: bool = True) -> tuple[Peer, Sale, LeaseOffer, LiveLease]:
    """A parcel offered to a worker, which takes it or does not answer yet."""
    job = await lab.add_job()
    peer, sale = await lab.peer(), await lab.open_sale(job)
    if not answered:
        peer.gate.clear()
    award = lab.award(peer, sale)
    await lab.orchestrator.dispatcher.grant(sale.workload, sale.workload.waiting[0], award)
    offer = await arrival(peer.offers)
    live = lab.live(offer)
    if answered:
        await until(lambda: live.record.state is LeaseState.TAKEN)
    return peer, sale, offer, live


def test_the_first_heartbeat_that_names_a_lease_is_its_start(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            peer, _, offer, live = await offered(lab)
            lab.time.advance(9_000)
            await peer.beat()
            # Alive, but not yet at this lease: nothing of it has begun.
            assert live.record.state is LeaseState.TAKEN
            await peer.beat(offer)
            assert (live.record.state, live.record.progress_at_ms) == (
                LeaseState.RUNNING,
                lab.time.now_ms(),
            )

    run(scenario)


def test_a_lease_taken_and_never_begun_ends_by_the_start_clock(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            _, _, _, live = await offered(lab)
            lab.time.advance(10_000)
            await lab.orchestrator.dispatcher.reap()
            assert live.record.state is LeaseState.TAKEN
            lab.time.advance(1)
            await lab.orchestrator.dispatcher.reap()
            assert (live.record.state, live.record.clock) == (LeaseState.EXPIRED, Clock.START)

    run(scenario)


def test_a_task_shorter_than_a_heartbeat_is_handed_in_without_one(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            peer, _, offer, live = await offered(lab)
            lab.context.blobs.put_bytes(PAYLOAD)
            await peer.submit(peer.message(offer, PAYLOAD))
            assert live.record.state is LeaseState.SUBMITTED

    run(scenario)


def test_a_result_may_come_before_the_answer_to_the_offer(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            peer, _, offer, live = await offered(lab, answered=False)
            lab.context.blobs.put_bytes(PAYLOAD)
            await peer.submit(peer.message(offer, PAYLOAD))
            peer.gate.set()
            await until(lambda: not lab.orchestrator.dispatcher.offers)
            assert live.record.state is LeaseState.SUBMITTED

    run(scenario)


@pytest.mark.parametrize(("late_ms", "clock"), [(10_000, None), (10_001, Clock.OFFER)])
def test_a_connection_that_gives_up_is_a_refusal_only_within_the_offers_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late_ms: int, clock: Clock | None
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            peer, sale = await lab.peer(), await lab.open_sale(job)

            async def silent(self: MemoryNetwork, *args: Any, **named: Any) -> bytes:
                lab.time.advance(late_ms)
                raise Expired("No answer came.", clock=Clock.REPLY)

            monkeypatch.setattr(MemoryNetwork, "request", silent)
            live = await lab.orchestrator.dispatcher.grant(
                sale.workload, sale.workload.waiting[0], lab.award(peer, sale)
            )
            await lab.orchestrator.dispatcher.drained(job)
            ended = LeaseState.REFUSED if clock is None else LeaseState.EXPIRED
            assert (live.record.state, live.record.clock) == (ended, clock)
            assert sale.workload.waiting == [(0, 1)]

    run(scenario)


def test_the_next_offer_names_what_was_taken_back_until_a_heartbeat_has(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            peer, _, first, _ = await offered(lab)
            assert first.revoked == ()
            await lab.orchestrator.dispatcher.revoke_job(first.lease.record.job_id, "enough")
            workload = (sale := await lab.open_sale(await lab.add_job(), 4)).workload

            async def next_offer() -> LeaseOffer:
                award = lab.award(peer, sale)
                await lab.orchestrator.dispatcher.grant(workload, workload.waiting[0], award)
                return await arrival(peer.offers)

            taken_back = (first.lease.record.lease_id,)
            assert (await next_offer()).revoked == taken_back
            assert (await peer.beat(first)).revoked == taken_back
            assert (await next_offer()).revoked == ()

    run(scenario)


@pytest.mark.parametrize(("breaks", "state"), [(1, LeaseState.TAKEN), (2, LeaseState.REFUSED)])
def test_an_offer_whose_connection_was_replaced_goes_over_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, breaks: int, state: LeaseState
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            peer, sale = await lab.peer(), await lab.open_sale(job)
            left, request = [None] * breaks, MemoryNetwork.request

            async def breaking(self: MemoryNetwork, *args: Any, **named: Any) -> bytes:
                if left and args[1] == LEASE_PROTOCOL:
                    left.pop()
                    raise Unavailable("The stream to the peer broke.", code="stream_broken")
                return await request(self, *args, **named)

            monkeypatch.setattr(MemoryNetwork, "request", breaking)
            live = await lab.orchestrator.dispatcher.grant(
                sale.workload, sale.workload.waiting[0], lab.award(peer, sale)
            )
            await until(lambda: live.record.state is not LeaseState.OFFERED)
            assert live.record.state is state

    run(scenario)
