"""A worker whose link breaks at each moment of a lease, and the way it finds back."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account as EthAccount
from worker_double import OrchestratorDouble
from worker_world import IDENTITY, ORCHESTRATOR, Drive, World, driver

from shoal.network.identity import NodeIdentity
from shoal.network.memory import MemoryNetwork
from shoal.protocol.blob import BlobRef
from shoal.protocol.errors import Unavailable
from shoal.protocol.ids import PeerId
from shoal.protocol.market import TaskKind
from shoal.protocol.node import HEARTBEAT_PROTOCOL, RESULT_PROTOCOL, ResultMessage
from shoal.worker.node import WorkerNode
from shoal.worker.session import SessionState

OTHER = NodeIdentity(b"p" * 32)


@pytest.fixture
def drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Drive:
    return driver(tmp_path, monkeypatch)


async def lose(world: World) -> OrchestratorDouble:
    """The orchestrator's link is gone; the same orchestrator will be found where it was."""
    await world.double.network.stop()
    before, world.double = world.double, world.new_orchestrator()
    world.double.account, world.double.greeting = before.account, before.greeting
    world.double.beat = before.beat
    return before


async def busy(world: World, **changes: Any) -> None:
    """The worker computes on a lease, and goes on until the engine is freed."""
    world.engine.free.clear()
    await world.double.send(world.offer(**changes), IDENTITY.peer_id)
    await asyncio.to_thread(world.engine.started.wait, 5)


def test_the_first_heartbeat_after_a_drop_names_what_is_still_computed(drive: Drive) -> None:
    async def script(world: World) -> None:
        await world.join()
        await busy(world)
        await lose(world)
        await world.double.network.start()
        await world.next(world.double.inbox.joins)
        beat = await world.next(world.double.inbox.beats)
        assert [lease.lease_id for lease in beat.leases] == ["lease_00000000"]

    drive(script)


def test_a_result_uploaded_into_a_broken_link_is_uploaded_again(drive: Drive) -> None:
    async def script(world: World) -> None:
        put, tries = world.blobs.put, []

        async def broken_once(url: str, data: bytes, token: str, *, timeout_s: float) -> BlobRef:
            tries.append(timeout_s)
            if len(tries) == 1:
                raise Unavailable("The upload failed: the connection was reset.")
            return await put(url, data, token, timeout_s=timeout_s)

        world.blobs.put = broken_once  # type: ignore[method-assign]
        await world.join()
        await world.double.send(world.offer(), IDENTITY.peer_id)
        message = await world.next(world.double.inbox.results)
        assert message.result.payload.sha256 in world.blobs.held
        assert len(tries) == 2
        # One try into a link that died silently must leave time for the next.
        assert all(timeout_s < 20 for timeout_s in tries)
        assert world.double.inbox.results.empty()

    drive(script)


def test_a_result_whose_reply_was_lost_is_sent_again_unchanged(drive: Drive) -> None:
    async def script(world: World) -> None:
        heard: list[ResultMessage] = []
        lost = asyncio.Event()

        async def never_replies(peer: PeerId, payload: bytes) -> bytes:
            heard.append(ResultMessage.decode(payload))
            lost.set()
            return await asyncio.Event().wait() and b""

        await world.join()
        world.double.network.serve(RESULT_PROTOCOL, never_replies)
        await world.double.send(world.offer(), IDENTITY.peer_id)
        await lost.wait()
        await lose(world)
        await world.double.network.start()
        again = await world.next(world.double.inbox.results)
        assert [message.encode() for message in heard] == [again.encode()]
        # Computed once: the drop cost nothing but the message.
        assert len(world.engine.ran) == 1

    drive(script)


@pytest.mark.parametrize("defended", [True, False])
def test_an_offer_after_a_drop_waits_until_both_agree_on_what_is_held(
    drive: Drive, monkeypatch: pytest.MonkeyPatch, defended: bool
) -> None:
    async def at_once(node: WorkerNode) -> None:
        return None

    if not defended:
        monkeypatch.setattr(WorkerNode, "_wait_in_step", at_once)

    async def script(world: World) -> None:
        await world.join()
        await busy(world)
        held = "lease_00000000"
        await lose(world)
        world.double.beat = world.double.beat.model_copy(update={"revoked": (held,)})
        answer = asyncio.Event()
        reply = world.double._on_beat

        async def later(peer: PeerId, payload: bytes) -> bytes:
            await answer.wait()
            return await reply(peer, payload)

        world.double.network.serve(HEARTBEAT_PROTOCOL, later)
        await world.double.network.start()
        await world.next(world.double.inbox.joins)
        # The lease fills all the room there is, and was taken back while nobody could say so.
        offer = world.offer(number=1)
        asking = asyncio.create_task(world.double.send(offer, IDENTITY.peer_id))
        await asyncio.wait({asking}, timeout=0.05)
        assert asking.done() is not defended
        answer.set()
        assert ((await asking).refusal is None) is defended

    drive(script, **{"capacity.rollout": 2})


def test_the_session_says_what_is_going_on(drive: Drive) -> None:
    async def script(world: World) -> None:
        seen = [world.worker.session.state]
        is_waiting = asyncio.Event()

        def note() -> None:
            if world.worker.session.state is not seen[-1]:
                seen.append(world.worker.session.state)
            if seen[-1] is SessionState.WAITING:
                is_waiting.set()

        world.worker.on_change = note
        await world.join()
        joined = world.worker.session
        assert (joined.num_joins, joined.peer) == (1, ORCHESTRATOR.peer_id)
        assert joined.address == world.config.orchestrator[0]
        assert joined.orchestrator == world.double.greeting.orchestrator
        await lose(world)
        await is_waiting.wait()
        waiting = world.worker.session
        assert waiting.last_error is not None
        assert waiting.retry_at_ms is not None
        assert waiting.peer is None
        await world.double.network.start()
        await world.next(world.double.inbox.joins)
        await world.next(world.double.inbox.beats)
        assert (world.worker.session.num_joins, world.worker.session.last_error) == (2, None)
        world.stop.set()
        assert world.running is not None
        await world.running
        assert seen[:4] == ["stopped", "dialling", "joining", "joined"]
        assert seen[-1] is SessionState.STOPPED

    drive(script)


def test_a_way_that_leads_nowhere_is_passed_over(drive: Drive) -> None:
    nowhere = f"/memory/1/p2p/{OTHER.peer_id}"

    async def script(world: World) -> None:
        await world.join()
        assert world.worker.session.address == f"/memory/1/p2p/{ORCHESTRATOR.peer_id}"

    drive(script, orchestrator=f"{nowhere}, /memory/1/p2p/{ORCHESTRATOR.peer_id}")


def test_a_way_that_leads_to_another_orchestrator_is_not_taken(drive: Drive) -> None:
    elsewhere = f"/memory/1/p2p/{OTHER.peer_id}"

    async def script(world: World) -> None:
        await world.join()
        await lose(world)
        other = OrchestratorDouble(MemoryNetwork(world.hub, OTHER), OTHER)
        other.account = EthAccount.create()
        await other.network.start()
        try:
            await world.next(other.inbox.hellos)
            await world.next(other.inbox.hellos)
            assert other.inbox.joins.empty()
            await world.double.network.start()
            await world.next(world.double.inbox.joins)
        finally:
            await other.network.stop()

    drive(script, orchestrator=f"/memory/1/p2p/{ORCHESTRATOR.peer_id},{elsewhere}")


def test_a_stopped_worker_drops_what_was_revoked_and_goes_on(drive: Drive) -> None:
    async def script(world: World) -> None:
        await world.join()
        await busy(world)
        # What it finds on waking: its lease is somebody else's.
        revoked = ("lease_00000000",)
        world.double.beat = world.double.beat.model_copy(update={"revoked": revoked})
        while world.worker.assignments():
            await world.next(world.double.inbox.beats)
        world.engine.free.set()
        await world.double.send(world.offer(TaskKind.ROLLOUT, number=1), IDENTITY.peer_id)
        message = await world.next(world.double.inbox.results)
        assert message.result.lease_id == "lease_00000001"
        assert world.double.inbox.results.empty()

    drive(script)
