"""The relay, its clients and their guests: promises, limits and hostile ends, on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
from libp2p.abc import INetStream
from libp2p.connection_types import ConnectionType
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Reservation, Status, StopMessage
from libp2p.relay.circuit_v2.pb.circuit_pb2 import PeerId as WirePeer
from reach_contract import CHECKS, OPEN, OWN, WAIT_S, Town, echo, reached

from shoal.network import libp2p_guests
from shoal.network.blob_client import BlobClient
from shoal.network.blob_server import BlobServer
from shoal.network.blob_service import BlobService
from shoal.network.blob_store import BlobStore
from shoal.network.identity import NodeIdentity
from shoal.network.libp2p_circuit import RelayClient
from shoal.network.libp2p_extension import Extension, Running
from shoal.network.libp2p_node import Libp2pNode
from shoal.network.libp2p_punch import relay_of, socket_of
from shoal.network.libp2p_relay import (
    HOP_PROTOCOL,
    STOP_PROTOCOL,
    RelayLimits,
    RelayServer,
    read_message,
    write_message,
)
from shoal.network.port import Network, Reach
from shoal.protocol.errors import ShoalError, Unavailable
from shoal.protocol.ids import PeerId

if TYPE_CHECKING:
    from trio_typing import TaskStatus

LOCAL = "/ip4/127.0.0.1/tcp/0"


class Libp2pTown:
    """Nodes on loopback, where nothing needs a hole: everything stays relayed unless asked."""

    def __init__(self) -> None:
        self._nodes: list[Libp2pNode] = []

    async def relay(self, limits: RelayLimits | None = None) -> Network:
        return await self.node(RelayServer(limits), listens=True)

    async def worker(self) -> Network:
        return await self.node(RelayClient(punches=False))

    async def node(
        self,
        *extensions: Extension,
        listens: bool = False,
        identity: NodeIdentity | None = None,
    ) -> Libp2pNode:
        node = Libp2pNode(
            identity or NodeIdentity.generate(),
            LOCAL if listens else None,
            extensions=extensions,
        )
        self._nodes.append(node)
        await node.start()
        return node

    async def client(self, relay: Network, extension: Extension | None = None) -> Libp2pNode:
        """A worker that has joined, and serves one protocol to guests and one to others."""
        node = await self.node(extension or RelayClient(punches=False))
        node.serve(OPEN, echo, max_request_bytes=1 << 20, for_guests=True)
        node.serve(OWN, echo)
        await node.connect(relay.addresses[0], timeout_s=WAIT_S)
        return node

    async def close(self) -> None:
        for node in reversed(self._nodes):
            await node.stop()


@asynccontextmanager
async def town() -> AsyncIterator[Libp2pTown]:
    made = Libp2pTown()
    try:
        yield made
    finally:
        await made.close()


class Hostile:
    """An extension that lets a test speak the wire itself."""

    def __init__(self) -> None:
        self.running: Running | None = None

    async def run(self, running: Running, *, task_status: TaskStatus[None]) -> None:
        self.running = running
        task_status.started()
        await trio.sleep_forever()

    @property
    def parts(self) -> Running:
        assert self.running is not None
        return self.running

    async def say(self, peer: str, message: HopMessage) -> HopMessage:
        stream = await self.parts.host.new_stream(ID.from_base58(peer), [HOP_PROTOCOL])
        await write_message(stream, message)
        return HopMessage.FromString(await read_message(stream))

    async def shout(self, peer: str, garbage: bytes) -> None:
        stream = await self.parts.host.new_stream(ID.from_base58(peer), [HOP_PROTOCOL])
        await stream.write(garbage)


class LyingRelay(Hostile):
    """A relay that grants a place, then calls in another's name."""

    async def run(self, running: Running, *, task_status: TaskStatus[None]) -> None:
        async def grant(stream: INetStream) -> None:
            await read_message(stream)
            granted = HopMessage(
                type=HopMessage.STATUS,
                status=Status.OK,
                reservation=Reservation(expire=2_000_000_000),
            )
            await write_message(stream, granted)

        running.host.set_stream_handler(HOP_PROTOCOL, grant)
        await super().run(running, task_status=task_status)

    async def call_as(self, victim: str, named: str) -> Status.ValueType:
        """The victim's answer to the call; when it agrees, this node shakes hands as itself."""
        host, swarm = self.parts.host, self.parts.swarm
        victim_id = ID.from_base58(victim)
        stream = await host.new_stream(victim_id, [STOP_PROTOCOL])
        wanted = WirePeer(id=ID.from_base58(named).to_bytes())
        await write_message(stream, StopMessage(type=StopMessage.CONNECT, peer=wanted))
        status = StopMessage.FromString(await read_message(stream)).status
        if status == Status.OK:
            line = RawConnection(stream, True)
            with trio.move_on_after(WAIT_S):
                try:
                    secured = await swarm.upgrader.upgrade_security(line, True, victim_id)
                    await swarm.upgrader.upgrade_connection(secured, victim_id)
                except Exception:
                    return Status.PERMISSION_DENIED
        return status


def run_in(check: Callable[[Libp2pTown], Awaitable[None]]) -> None:
    async def run() -> None:
        async with town() as made:
            await check(made)

    asyncio.run(run())


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_libp2p_keeps(check: Callable[[Town], Awaitable[None]]) -> None:
    run_in(check)


async def _until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not holds():  # noqa: ASYNC110  # what it waits for tells nobody
            await asyncio.sleep(0.01)


def _reserved(relay: Network, num: int) -> Callable[[], bool]:
    return lambda: relay.meters.value("relay_reservations") >= num


async def _why_not(asker: Network, asked: PeerId) -> str:
    with pytest.raises(Unavailable) as caught:
        await asker.reach(asked, timeout_s=WAIT_S)
    assert caught.value.code == "not_reachable"
    return caught.value.message


@pytest.mark.parametrize("max_reservations", [1, 2])
def test_a_relay_keeps_so_many_places(max_reservations: int) -> None:
    async def check(made: Libp2pTown) -> None:
        relay = await made.relay(RelayLimits(max_reservations=max_reservations))
        first = await made.client(relay)
        await _until(_reserved(relay, 1))
        second = await made.client(relay)
        if max_reservations == 1:
            refused = partial(
                relay.meters.value, "relay_requests", outcome="refused", cause="reservations"
            )
            await _until(lambda: refused() >= 1)
            assert "no_reservation" in await _why_not(first, second.peer_id)
        else:
            assert await reached(first, second.peer_id) is Reach.RELAYED

    run_in(check)


@pytest.mark.parametrize("most", [1, 2])
def test_a_peer_is_given_so_many_circuits(most: int) -> None:
    async def check(made: Libp2pTown) -> None:
        relay = await made.relay(RelayLimits(max_circuits_per_peer=most))
        asker, first, second = [await made.client(relay) for _ in range(3)]
        await _until(_reserved(relay, 3))
        await reached(asker, first.peer_id)
        if most == 1:
            assert "resource_limit_exceeded" in await _why_not(asker, second.peer_id)
            assert "resource_limit_exceeded" in await _why_not(second, first.peer_id)
        else:
            assert await reached(asker, second.peer_id) is Reach.RELAYED

    run_in(check)


@pytest.mark.parametrize("circuit_bytes", [100_000, 10_000_000])
def test_a_circuit_carries_so_many_bytes(circuit_bytes: int) -> None:
    async def check(made: Libp2pTown) -> None:
        relay = await made.relay(RelayLimits(circuit_bytes=circuit_bytes))
        asker, asked = await made.client(relay), await made.client(relay)
        lost = asyncio.Event()
        asker.on_peer_lost(lambda peer, _cause: lost.set() if peer == asked.peer_id else None)
        await reached(asker, asked.peer_id)
        payload = bytes(200_000)
        if circuit_bytes < len(payload):
            with pytest.raises(ShoalError):
                await asker.request(asked.peer_id, OPEN, payload, timeout_s=WAIT_S)
            await asyncio.wait_for(lost.wait(), WAIT_S)
            await _until(lambda: relay.meters.value("relay_circuits_open") == 0)
        else:
            answer = await asker.request(asked.peer_id, OPEN, payload, timeout_s=WAIT_S)
            assert answer == payload
        assert relay.meters.value("relay_bytes") <= circuit_bytes

    run_in(check)


def test_a_circuit_ends_with_its_time() -> None:
    async def check(made: Libp2pTown) -> None:
        relay = await made.relay(RelayLimits(circuit_s=0.5))
        asker, asked = await made.client(relay), await made.client(relay)
        lost = asyncio.Event()
        asker.on_peer_lost(lambda peer, _cause: lost.set() if peer == asked.peer_id else None)
        await reached(asker, asked.peer_id)
        await asyncio.wait_for(lost.wait(), WAIT_S)
        assert relay.peer_id in asker.peers()

    run_in(check)


def test_one_circuits_end_leaves_the_others() -> None:
    async def check(made: Libp2pTown) -> None:
        relay = await made.relay()
        first, second, asked = [await made.client(relay) for _ in range(3)]
        await reached(first, asked.peer_id)
        await reached(second, asked.peer_id)
        await first.disconnect(asked.peer_id)
        await _until(lambda: relay.meters.value("relay_circuits_open") == 1)
        assert await second.request(asked.peer_id, OPEN, b"still", timeout_s=WAIT_S) == b"still"

    run_in(check)


def test_a_worker_that_does_not_share_is_reached_by_nobody() -> None:
    async def check(made: Libp2pTown) -> None:
        relay = await made.relay()
        private = await made.client(relay, RelayClient(accepts=False))
        other = await made.client(relay)
        await _until(_reserved(relay, 1))
        assert "no_reservation" in await _why_not(other, private.peer_id)
        assert await reached(private, other.peer_id) in set(Reach)

    run_in(check)


def test_it_is_the_door_that_keeps_guests_from_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    async def open_door(
        self: libp2p_guests.Guests, communicator: Any, negotiate_timeout: int = 10
    ) -> Any:
        return await self._negotiate(communicator, negotiate_timeout)

    monkeypatch.setattr(libp2p_guests.Guests, "_negotiate_for", open_door)

    async def check(made: Libp2pTown) -> None:
        relay = await made.relay()
        asker, asked = await made.client(relay), await made.client(relay)
        await reached(asker, asked.peer_id)
        assert await asker.request(asked.peer_id, OWN, b"in", timeout_s=WAIT_S) == b"in"

    run_in(check)


def test_a_worker_that_was_started_again_is_reached_again() -> None:
    async def check(made: Libp2pTown) -> None:
        relay = await made.relay()
        asker, asked = await made.client(relay), await made.client(relay)
        await reached(asker, asked.peer_id)
        for node in (asked, asker):
            await node.stop()
            await node.start()
            await node.connect(relay.addresses[0], timeout_s=WAIT_S)
        assert await reached(asker, asked.peer_id) is Reach.RELAYED
        assert await asker.request(asked.peer_id, OPEN, b"again", timeout_s=WAIT_S) == b"again"

    run_in(check)


def test_without_a_relay_a_blob_comes_from_its_other_holder(tmp_path: Path) -> None:
    async def check(made: Libp2pTown) -> None:
        orchestrator = await made.node(listens=True)
        asker, holder = await made.client(orchestrator), await made.client(orchestrator)
        source = f"/p2p/{holder.peer_id}"
        assert await _why_not(asker, holder.peer_id)
        data = b"the same everywhere" * 1000
        held, own = BlobStore(tmp_path / "held", 1 << 30), BlobStore(tmp_path / "own", 1 << 30)
        ref = held.put_bytes(data)
        BlobService(held, holder).start()
        server = BlobServer(held, "127.0.0.1", 0)
        await server.start()
        try:
            async with BlobClient(own, asker) as client:
                with pytest.raises(Unavailable):
                    await client.fetch(ref, [source], timeout_s=WAIT_S)
                await client.fetch(ref, [source, server.url], timeout_s=WAIT_S)
        finally:
            await server.stop()
        assert own.read(ref.sha256) == data

    run_in(check)


def test_with_a_relay_a_blob_comes_from_its_holder(tmp_path: Path) -> None:
    async def check(made: Libp2pTown) -> None:
        relay = await made.relay()
        asker, holder = await made.client(relay), await made.client(relay)
        held, own = BlobStore(tmp_path / "held", 1 << 30), BlobStore(tmp_path / "own", 1 << 30)
        ref = held.put_bytes(b"relayed" * 1000)
        BlobService(held, holder).start()
        await reached(asker, holder.peer_id)
        async with BlobClient(own, asker) as client:
            await client.fetch(ref, [f"/p2p/{holder.peer_id}"], timeout_s=WAIT_S)
        assert relay.meters.value("relay_bytes") > ref.size_bytes

    run_in(check)


def test_a_worker_takes_so_many_guests() -> None:
    async def check(made: Libp2pTown) -> None:
        relay = await made.relay()
        asked = await made.client(relay, RelayClient(punches=False, max_guests=1))
        first, second = await made.client(relay), await made.client(relay)
        assert await reached(first, asked.peer_id) is Reach.RELAYED
        assert "connection_failed" in await _why_not(second, asked.peer_id)

    run_in(check)


def test_a_place_is_reserved_for_the_asker_whatever_name_it_gives() -> None:
    async def check(made: Libp2pTown) -> None:
        relay = await made.relay()
        # It runs no client, so it has no place of its own.
        victim = await made.node()
        await victim.connect(relay.addresses[0], timeout_s=WAIT_S)
        wire = Hostile()
        attacker = await made.client(relay, wire)
        named = WirePeer(id=ID.from_base58(victim.peer_id).to_bytes())
        reserve = HopMessage(type=HopMessage.RESERVE, peer=named)
        reply = await attacker.call(partial(wire.say, relay.peer_id, reserve))
        assert reply.status == Status.OK
        connect = HopMessage(type=HopMessage.CONNECT, peer=named)
        reply = await attacker.call(partial(wire.say, relay.peer_id, connect))
        assert reply.status == Status.NO_RESERVATION

    run_in(check)


@pytest.mark.parametrize(
    "garbage",
    [b"\x04\xff\xff\xff\xff", b"\xff" * 9 + b"\x01", b"\x80\x80\x04", b"\x00" * 4],
    ids=["no message", "2^63 bytes", "64 KiB", "nothing"],
)
def test_garbage_ends_its_stream_and_the_relay_goes_on(garbage: bytes) -> None:
    async def check(made: Libp2pTown) -> None:
        relay = await made.relay()
        wire = Hostile()
        attacker = await made.client(relay, wire)
        for _ in range(3):
            await attacker.call(partial(wire.shout, relay.peer_id, garbage))
        assert relay.peer_id in attacker.peers()
        first, second = await made.client(relay), await made.client(relay)
        assert await reached(first, second.peer_id) is Reach.RELAYED

    run_in(check)


def test_who_goes_on_sending_garbage_is_banned() -> None:
    async def check(made: Libp2pTown) -> None:
        relay = await made.relay()
        wire = Hostile()
        attacker = await made.client(relay, wire)
        lost = asyncio.Event()
        attacker.on_peer_lost(lambda _peer, _cause: lost.set())
        for _ in range(50):
            if lost.is_set():
                break
            with suppress(Exception):
                await attacker.call(partial(wire.shout, relay.peer_id, b"\x04\xff\xff\xff\xff"))
        await asyncio.wait_for(lost.wait(), WAIT_S)
        assert relay.meters.value("bans", reason="bad_frame") == 1

    run_in(check)


def test_a_relay_cannot_bring_somebody_under_anothers_name() -> None:
    async def check(made: Libp2pTown) -> None:
        wire = LyingRelay()
        relay = await made.node(wire, listens=True)
        client = RelayClient(punches=False)
        victim = await made.client(relay, client)
        other = NodeIdentity.generate().peer_id
        await _until(lambda: ID.from_base58(relay.peer_id) in client._relays)
        status = await relay.call(partial(wire.call_as, victim.peer_id, other))
        assert status == Status.PERMISSION_DENIED
        assert victim.meters.value("guests_admitted", kind=ConnectionType.RELAYED.value) == 0
        # Under its own name it would have come in: it is the name that was refused.
        status = await relay.call(partial(wire.call_as, victim.peer_id, relay.peer_id))
        assert status == Status.OK
        await _until(
            lambda: victim.meters.value("guests_admitted", kind=ConnectionType.RELAYED.value) == 1
        )

    run_in(check)


def test_only_a_relay_that_was_asked_may_bring_callers() -> None:
    async def check(made: Libp2pTown) -> None:
        relay = await made.relay()
        wire = LyingRelay()
        intruder = await made.node(wire)
        # A listening worker is dialled by the intruder; it never asked it for a place.
        victim = await made.node(RelayClient(punches=False), listens=True)
        await victim.connect(relay.addresses[0], timeout_s=WAIT_S)
        await intruder.connect(victim.addresses[0], timeout_s=WAIT_S)
        own = intruder.peer_id
        status = await intruder.call(partial(wire.call_as, victim.peer_id, own))
        assert status == Status.PERMISSION_DENIED

    run_in(check)


def test_an_idle_guest_gives_its_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libp2p_guests, "_IDLE_S", 0.3)

    async def check(made: Libp2pTown) -> None:
        relay = await made.relay()
        asker, asked = await made.client(relay), await made.client(relay)
        lost = asyncio.Event()
        asker.on_peer_lost(lambda peer, _cause: lost.set() if peer == asked.peer_id else None)
        await reached(asker, asked.peer_id)
        await asyncio.wait_for(lost.wait(), WAIT_S)
        await _until(lambda: relay.meters.value("relay_circuits_open") == 0)
        assert await reached(asker, asked.peer_id) is Reach.RELAYED

    run_in(check)


def test_a_hole_between_neighbours_takes_the_load_off_the_relay() -> None:
    async def check(made: Libp2pTown) -> None:
        relay = await made.relay()
        first = await made.client(relay, RelayClient())
        second = await made.client(relay, RelayClient())
        await reached(first, second.peer_id)
        # It waits for the hole, but not for ever.
        async with asyncio.timeout(WAIT_S):
            while await first.reach(second.peer_id, timeout_s=WAIT_S) is not Reach.DIRECT:
                pass
        before = relay.meters.value("relay_bytes")
        payload = bytes(500_000)
        answer = await first.request(second.peer_id, OPEN, payload, timeout_s=WAIT_S)
        assert answer == payload
        assert relay.meters.value("relay_bytes") - before < len(payload)
        # A guest is one however it came to be connected.
        with pytest.raises(ShoalError) as caught:
            await first.request(second.peer_id, OWN, b"", timeout_s=WAIT_S)
        assert caught.value.code == "unknown_protocol"

    run_in(check)


def test_the_librarys_layers_lead_to_the_socket_and_the_relay() -> None:
    async def check(made: Libp2pTown) -> None:
        relay = await made.relay()
        wire = Hostile()
        node = await made.client(relay, wire)

        async def look() -> tuple[str, int]:
            connection = wire.parts.swarm.get_connections(ID.from_base58(relay.peer_id))[0]
            found = socket_of(connection)
            assert found is not None
            assert relay_of(connection) is None
            host, port = found.getpeername()[:2]
            return str(host), int(port)

        _, _, ip, _, port, *_ = relay.addresses[0].split("/")
        assert await node.call(look) == (ip, int(port))

    run_in(check)
