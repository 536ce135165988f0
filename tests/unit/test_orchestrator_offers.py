"""From an offer to the first word of work: who answers when, and which clock runs meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from orchestrator_lab import Lab, Peer, Sale, arrival, open_lab, run, until

from shoal.market.lease import LeaseState
from shoal.network.memory import MemoryNetwork
from shoal.orchestrator.leases import LiveLease
from shoal.protocol.errors import Clock, Expired
from shoal.protocol.node import LeaseOffer

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
            await until(lambda: not lab.orchestrator.dispatcher._offers)
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
