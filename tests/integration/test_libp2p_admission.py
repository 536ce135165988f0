"""What a stranger can take from a node before and after its handshake, and what is counted."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable, Iterator

import pytest
import trio
from libp2p.abc import IHost
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p_strangers import (
    ECHO,
    LOCAL,
    WAIT_S,
    arrived,
    fresh,
    hostile_peer,
    started,
)

from shoal.network import libp2p_node
from shoal.network.bans import Bans
from shoal.network.identity import NodeIdentity
from shoal.network.libp2p_node import Libp2pNode
from shoal.network.port import Limits
from shoal.protocol.errors import ShoalError, Unavailable


@contextlib.contextmanager
def half_open(node: Libp2pNode, number: int) -> Iterator[list[socket.socket]]:
    """That many connections which never say a word."""
    port = int(node.addresses[0].split("/")[4])
    with contextlib.ExitStack() as open_ones:
        yield [
            open_ones.enter_context(socket.create_connection(("127.0.0.1", port), timeout=WAIT_S))
            for _ in range(number)
        ]


async def counted(node: Libp2pNode, name: str, at_least: float = 1, **labels: str) -> None:
    """The node has counted that often."""
    async with asyncio.timeout(WAIT_S):
        while node.meters.value(name, **labels) < at_least:  # noqa: ASYNC110  # counters tell nobody
            await asyncio.sleep(0.01)


def was_closed(connection: socket.socket) -> bool:
    """The other end hung up; waits until it does or says something."""
    try:
        while data := connection.recv(4096):
            assert data
    except ConnectionError:
        return True
    return True


@pytest.mark.parametrize(
    ("limits", "cause"),
    [
        (Limits(max_connections_per_address=3), "connections_per_address"),
        (Limits(max_handshakes=6), "handshakes_per_address"),
        (Limits(max_handshakes=3, handshakes_per_s_per_address=0.001), "handshakes_per_address"),
    ],
)
def test_half_open_connections_over_a_cap_are_refused_at_once(limits: Limits, cause: str) -> None:
    async def run() -> None:
        server = fresh(limits=limits)
        async with started(server):
            with half_open(server, 8) as connections:
                await counted(server, "connections_refused", cause=cause)
                # The refused ones are hung up on without waiting for a handshake.
                refused = await asyncio.to_thread(was_closed, connections[-1])
                assert refused
        assert server.meters.value("connections_refused", cause=cause) >= 1

    asyncio.run(run())


def test_half_open_connections_do_not_keep_honest_ones_out() -> None:
    async def run() -> None:
        # One connection from this address may hang; the others get the rest of the room.
        server, client = fresh(limits=Limits(max_handshakes=16)), fresh(None)
        async with started(server, client):
            with half_open(server, 5):
                peer = await client.connect(server.addresses[0], timeout_s=WAIT_S)
                assert await client.request(peer, ECHO, b"x", timeout_s=WAIT_S) == b"x"

    asyncio.run(run())


def test_connections_begun_too_fast_are_refused() -> None:
    async def run() -> None:
        limits = Limits(max_handshakes=4, handshakes_per_s_per_address=0.001)
        server, clients = fresh(limits=limits), [fresh(None) for _ in range(6)]
        async with started(server, *clients):
            answered = 0
            for client in clients:
                with contextlib.suppress(ShoalError):
                    peer = await client.connect(server.addresses[0], timeout_s=WAIT_S)
                    await client.request(peer, ECHO, b"x", timeout_s=WAIT_S)
                    answered += 1
            assert answered == 4
            assert server.meters.value("connections_refused", cause="handshake_rate") == 2

    asyncio.run(run())


def test_two_nodes_with_one_key_do_not_replace_each_other_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Nothing is forgiven meanwhile, however slowly this machine shakes hands.
    monkeypatch.setattr("shoal.network.libp2p_admission._REPLACEMENTS_PER_S", 1e-9)

    async def run() -> None:
        identity = NodeIdentity.generate()
        # Replaced connections take a while to close; they must not be what refuses the next.
        server = fresh(limits=Limits(max_connections_per_peer=10))
        twins = [Libp2pNode(identity) for _ in range(10)]
        async with started(server, *twins):
            for twin in twins:
                with contextlib.suppress(ShoalError):
                    await twin.connect(server.addresses[0], timeout_s=WAIT_S)
                    await twin.request(server.peer_id, ECHO, b"x", timeout_s=WAIT_S)
            await counted(server, "connections_refused", cause="duplicate")
            assert server.peers() == {identity.peer_id}
            assert server.meters.value("connections_replaced") >= 1

    asyncio.run(run())


def test_streams_with_protocols_nobody_serves_are_counted_and_end_in_a_ban() -> None:
    async def run() -> None:
        server = fresh()
        lost: asyncio.Queue[str] = asyncio.Queue()
        server.on_peer_lost(lambda _peer, cause: lost.put_nowait(cause))
        async with started(server):
            await asyncio.to_thread(hostile_peer, server.addresses[0], stuff)
            assert "banned" in await asyncio.wait_for(lost.get(), WAIT_S)
        assert server.meters.value("bans", reason="unknown_protocol") == 1

    async def stuff(host: IHost, target: ID) -> None:
        with contextlib.suppress(BaseLibp2pError, trio.BrokenResourceError):
            for number in range(1000):
                with contextlib.suppress(BaseLibp2pError):
                    await host.new_stream(target, [TProtocol(f"/none/{number}")])
                if not host.get_network().get_connections(target):
                    return

    asyncio.run(run())


def test_naming_protocols_without_end_ends_the_stream() -> None:
    named = []

    async def stuff(host: IHost, target: ID) -> None:
        stream = await host.get_network().new_stream(target)
        await stream.write(_line("/multistream/1.0.0"))
        with trio.move_on_after(5), contextlib.suppress(BaseLibp2pError):
            for number in range(200):
                await stream.write(_line(f"/none/{number}"))
                assert await stream.read(64)
                named.append(number)

    async def run() -> None:
        server = fresh()
        async with started(server):
            await asyncio.to_thread(hostile_peer, server.addresses[0], stuff)

    asyncio.run(run())
    assert 10 <= len(named) <= 40


def _line(text: str) -> bytes:
    data = text.encode() + b"\n"
    return bytes([len(data)]) + data


async def bad_frames(host: IHost, target: ID) -> None:
    """Streams that begin with bytes no Shoal node would send."""
    for _ in range(20):
        try:
            stream = await host.new_stream(target, [TProtocol(ECHO)])
            await stream.write(struct.pack(">QB", 3, 0xEE) + b"bad")
            await stream.read(4096)
        except (BaseLibp2pError, trio.BrokenResourceError):
            return


async def _after_bad_frames(server: Libp2pNode, identity: NodeIdentity) -> bool:
    """Whether the sender of bad frames is still served afterwards, under the same key."""
    await asyncio.to_thread(hostile_peer, server.addresses[0], bad_frames, identity)
    again = Libp2pNode(identity)
    await again.start()
    try:
        peer = await again.connect(server.addresses[0], timeout_s=WAIT_S)
        return await again.request(peer, ECHO, b"x", timeout_s=WAIT_S) == b"x"
    except Unavailable:
        return False
    finally:
        await again.stop()


def test_bad_frames_ban_their_sender_right_after_its_handshake() -> None:
    async def run() -> None:
        server, honest = fresh(), fresh(None)
        async with started(server, honest):
            assert not await _after_bad_frames(server, NodeIdentity.generate())
            assert server.meters.value("bans", reason="bad_frame") == 1
            assert server.meters.value("connections_refused", cause="banned_peer") == 1
            # Another key from the same address is served: many share one.
            peer = await honest.connect(server.addresses[0], timeout_s=WAIT_S)
            assert await honest.request(peer, ECHO, b"x", timeout_s=WAIT_S) == b"x"

    asyncio.run(run())


def test_without_bans_the_same_sender_would_be_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: with the defence off, the sender of bad frames comes back."""
    monkeypatch.setattr(Bans, "penalise", lambda _self, _subject, _fault: False)

    async def run() -> None:
        server = fresh()
        async with started(server):
            assert await _after_bad_frames(server, NodeIdentity.generate())

    asyncio.run(run())


def _with_no_shared_address(clock: Callable[[], float]) -> Bans:
    return Bans(clock, shared_addresses=())


def test_an_address_that_keeps_at_it_is_refused_before_its_handshake(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Loopback is never banned, so the test takes away that exception."""
    monkeypatch.setattr(libp2p_node, "Bans", _with_no_shared_address)

    async def run() -> None:
        server, other = fresh(), fresh(None)
        async with started(server, other):
            for _ in range(6):
                await asyncio.to_thread(hostile_peer_if_let_in, server.addresses[0])
            with pytest.raises(ShoalError):
                await other.connect(server.addresses[0], timeout_s=WAIT_S)
            assert server.meters.value("connections_refused", cause="banned_address") >= 1

    asyncio.run(run())


def hostile_peer_if_let_in(address: str) -> None:
    with contextlib.suppress(BaseLibp2pError, ExceptionGroup):
        hostile_peer(address, bad_frames)


def test_reading_a_connection_is_paced() -> None:
    async def run() -> None:
        limits = Limits(bytes_in_per_s_per_connection=200_000.0)
        server, client = fresh(limits=limits), fresh(None)
        async with started(server, client):
            peer = await client.connect(server.addresses[0], timeout_s=WAIT_S)
            begun = asyncio.get_running_loop().time()
            await client.request(peer, ECHO, bytes(500_000), timeout_s=WAIT_S)
            # A burst of one second's worth is free, the rest comes at the rate.
            assert asyncio.get_running_loop().time() - begun > 1.0
            await counted(server, "bytes_in", 500_000, plane="control")
            await counted(server, "bytes_out", 500_000, plane="control")

    asyncio.run(run())


def test_a_frame_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.network.libp2p_streams._FRAME_TIMEOUT_S", 0.3)
    ended = []

    async def drip(host: IHost, target: ID) -> None:
        stream = await host.new_stream(target, [TProtocol(ECHO)])
        await stream.write(struct.pack(">QB", 1000, 0))
        with trio.move_on_after(20), contextlib.suppress(BaseLibp2pError):
            while True:
                await stream.write(b"x")
                await trio.sleep(0.05)
        ended.append(len(host.get_network().get_connections(target)))

    async def run() -> None:
        server = fresh()
        async with started(server):
            await asyncio.to_thread(hostile_peer, server.addresses[0], drip)
            assert server.meters.value("streams_ended", cause="stalled") == 1

    asyncio.run(run())
    # The stream is gone, the connection is not: a slow link is no crime.
    assert ended == [1]


def test_workers_that_come_at_once_meet_no_limit() -> None:
    async def run() -> None:
        server, clients = fresh(LOCAL), [fresh(None) for _ in range(20)]
        async with started(server, *clients):
            await asyncio.gather(
                *(client.connect(server.addresses[0], timeout_s=WAIT_S) for client in clients)
            )
            for client in clients:
                await arrived(server, client.peer_id)
            await counted(server, "connections_open", len(clients))
            refused = [s for s in server.meters.snapshot() if s.name == "connections_refused"]
            assert refused == []

    asyncio.run(run())
