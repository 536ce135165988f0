"""What only libp2p can be asked: sockets, processes, hostile bytes, the library's traps."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from libp2p import new_host
from libp2p.abc import IHost, INetStream
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_ID
from libp2p_strangers import (
    ECHO,
    LOCAL,
    WAIT_S,
    arrived,
    fresh,
    hang_up,
    hostile_peer,
    plaintext_dial,
    started,
    under_attack,
)
from multiaddr import Multiaddr

from shoal.network import framing, liveness
from shoal.network.identity import NodeIdentity, peer_id_of
from shoal.network.libp2p_host import build_host
from shoal.network.libp2p_node import Libp2pNode
from shoal.network.libp2p_streams import read_frame
from shoal.network.port import Limits
from shoal.protocol.errors import Expired, InvalidRequest, ShoalError, Unavailable
from shoal.protocol.ids import PeerId

PEER_PROGRAM = textwrap.dedent(
    """
    import asyncio, sys
    from pathlib import Path
    from shoal.network.identity import NodeIdentity
    from shoal.network.libp2p_node import Libp2pNode

    async def echo(peer, payload):
        return payload

    async def main():
        key, role, address = sys.argv[1:]
        listen = address if role == "listen" else None
        node = Libp2pNode(NodeIdentity.load_or_create(Path(key)), listen)
        node.serve("/test/echo/1", echo, max_request_bytes=1 << 20)
        await node.start()
        if role == "dial":
            await node.connect(address, timeout_s=10)
        print(node.addresses[0] if node.addresses else node.peer_id, flush=True)
        await asyncio.Event().wait()

    asyncio.run(main())
    """
)


@asynccontextmanager
async def peer_process(key: str, role: str, address: str) -> AsyncIterator[tuple[int, str]]:
    """A node in a process of its own: its process id and the line it printed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PEER_PROGRAM, key, role, address, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), 30)
        assert line, "the peer process died before it was ready"
        yield process.pid, line.decode().strip()
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        # Lets the transport see its pipe's end before the loop closes.
        await process.stdout.read()


def test_killed_peer_is_reported_and_found_again(tmp_path: object) -> None:
    async def run() -> None:
        node = fresh()
        lost: asyncio.Queue[tuple[PeerId, str]] = asyncio.Queue()
        node.on_peer_lost(lambda peer, cause: lost.put_nowait((peer, cause)))
        key = f"{tmp_path}/key.pem"
        async with started(node):
            async with peer_process(key, "dial", node.addresses[0]) as (pid, name):
                worker = PeerId(name)
                await arrived(node, worker)
                assert await node.request(worker, ECHO, b"a", timeout_s=WAIT_S) == b"a"
                os.kill(pid, signal.SIGKILL)
                peer, cause = await asyncio.wait_for(lost.get(), WAIT_S)
                assert peer == worker
                assert cause
                with pytest.raises(Unavailable):
                    await node.request(worker, ECHO, b"b", timeout_s=WAIT_S)
            async with peer_process(key, "dial", node.addresses[0]) as (_, name):
                assert name == worker
                await arrived(node, worker)
                assert await node.request(worker, ECHO, b"c", timeout_s=WAIT_S) == b"c"
            assert lost.qsize() <= 1

    asyncio.run(run())


def test_dialler_reaches_a_restarted_listener(tmp_path: object) -> None:
    async def run() -> None:
        node = fresh(listen=None)
        gone = asyncio.Event()
        node.on_peer_lost(lambda _peer, _cause: gone.set())
        key = f"{tmp_path}/key.pem"
        async with started(node):
            async with peer_process(key, "listen", LOCAL) as (pid, address):
                server = await node.connect(address, timeout_s=WAIT_S)
                os.kill(pid, signal.SIGKILL)
                await asyncio.wait_for(gone.wait(), WAIT_S)
            # The failed dial is what makes the library refuse the peer for a minute.
            with pytest.raises(Unavailable):
                await node.connect(address, timeout_s=WAIT_S)
            listen, _, _ = address.rpartition("/p2p/")
            async with peer_process(key, "listen", listen) as (_, again):
                assert again == address
                async with asyncio.timeout(WAIT_S):
                    assert await node.connect(address, timeout_s=WAIT_S) == server
                    assert await node.request(server, ECHO, b"x", timeout_s=WAIT_S) == b"x"

    asyncio.run(run())


def test_silent_peer_is_closed_after_two_missed_pings(tmp_path: object) -> None:
    async def run() -> None:
        node = fresh(limits=Limits(ping_interval_s=0.1, ping_timeout_s=0.3))
        lost: asyncio.Queue[str] = asyncio.Queue()
        node.on_peer_lost(lambda _peer, cause: lost.put_nowait(cause))
        async with (
            started(node),
            peer_process(f"{tmp_path}/key.pem", "dial", node.addresses[0]) as (pid, name),
        ):
            await arrived(node, PeerId(name))
            # Answered pings keep the peer: several rounds pass without a loss.
            for _ in range(3):
                await asyncio.sleep(0.2)
                await node.request(PeerId(name), ECHO, b"", timeout_s=WAIT_S)
            assert lost.empty()
            os.kill(pid, signal.SIGSTOP)
            assert "2 pings" in await asyncio.wait_for(lost.get(), WAIT_S)
            assert node.peers() == frozenset()

    asyncio.run(run())


def test_used_port_is_refused_in_one_sentence() -> None:
    async def run() -> None:
        first = fresh()
        async with started(first):
            listen, _, _ = first.addresses[0].rpartition("/p2p/")
            second = fresh(listen)
            with pytest.raises(InvalidRequest, match="already in use") as caught:
                await second.start()
            assert caught.value.code == "address_unavailable"
            await second.stop()
        # The port is free again at once.
        async with started(fresh(listen)):
            pass

    asyncio.run(run())


@pytest.mark.parametrize("listen", ["", "localhost:4001", "/ip4/127.0.0.1/udp/1/quic-v1", "/ip4"])
def test_malformed_listen_address_is_refused(listen: str) -> None:
    with pytest.raises(InvalidRequest):
        asyncio.run(fresh(listen).start())


def test_start_and_stop_leave_no_thread() -> None:
    async def run() -> None:
        server, clients = fresh(), [fresh(listen=None) for _ in range(5)]
        async with started(server, *clients):
            for client in clients:
                await client.connect(server.addresses[0], timeout_s=WAIT_S)
            await server.stop()

    before = set(threading.enumerate())
    asyncio.run(run())
    # Trio keeps an idle worker thread for a few seconds; ours and the library's must be gone.
    left = {thread.name for thread in threading.enumerate() if thread not in before}
    assert all(name.startswith("Trio") for name in left), left


def test_node_that_was_stopped_starts_again() -> None:
    async def run() -> None:
        server, client = fresh(), fresh(listen=None)
        for _ in range(2):
            async with started(server, client):
                peer = await client.connect(server.addresses[0], timeout_s=WAIT_S)
                assert await client.request(peer, ECHO, b"x", timeout_s=WAIT_S) == b"x"

    asyncio.run(run())


def test_slots_of_closed_connections_are_free_again() -> None:
    async def run() -> None:
        server = fresh(limits=Limits(max_connections=2))
        async with started(server):
            for _ in range(6):
                client = fresh(listen=None)
                gone = asyncio.Event()
                server.on_peer_lost(lambda _peer, _cause, gone=gone: gone.set())  # type: ignore[misc]
                async with started(client):
                    peer = await client.connect(server.addresses[0], timeout_s=WAIT_S)
                    assert await client.request(peer, ECHO, b"x", timeout_s=WAIT_S) == b"x"
                await asyncio.wait_for(gone.wait(), WAIT_S)

    asyncio.run(run())


def test_connections_over_the_limit_are_refused() -> None:
    async def run() -> None:
        server, clients = fresh(limits=Limits(max_connections=2)), [fresh(None) for _ in range(3)]
        async with started(server, *clients):
            answered = 0
            for client in clients:
                try:
                    peer = await client.connect(server.addresses[0], timeout_s=WAIT_S)
                    await client.request(peer, ECHO, b"x", timeout_s=WAIT_S)
                    answered += 1
                except ShoalError:
                    pass
            assert answered == 2

    asyncio.run(run())


def test_host_name_in_an_address_is_resolved() -> None:
    async def run() -> None:
        server, client = fresh(), fresh(listen=None)
        async with started(server, client):
            named = server.addresses[0].replace("/ip4/127.0.0.1/", "/dns4/localhost/")
            assert await client.connect(named, timeout_s=WAIT_S) == server.peer_id
            nowhere = server.addresses[0].replace("/ip4/127.0.0.1/", "/dns4/nowhere.invalid/")
            await client.disconnect(server.peer_id)
            with pytest.raises((Unavailable, Expired)):
                await client.connect(nowhere, timeout_s=WAIT_S)

    asyncio.run(run())


def test_garbage_on_the_port_does_not_harm_the_node() -> None:
    async def run() -> None:
        server, client = fresh(), fresh(listen=None)
        async with started(server, client):
            port = int(server.addresses[0].split("/")[4])
            for garbage in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096), b"\xff" * 100_000, b""):
                await asyncio.to_thread(_send_raw, port, garbage)
            peer = await client.connect(server.addresses[0], timeout_s=WAIT_S)
            assert await client.request(peer, ECHO, b"x", timeout_s=WAIT_S) == b"x"

    asyncio.run(run())


def _send_raw(port: int, data: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        try:
            connection.sendall(data)
        except OSError:
            return


async def refused_for(stream: INetStream) -> str:
    """The code of the typed error with which the request on the stream is answered."""
    status, body = await read_frame(
        stream, peer=PeerId("t"), expected=frozenset(framing.Status), cap=1 << 20
    )
    assert status is framing.Status.ERROR
    return framing.decode_error(body).code


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, (8 << 20) + 1])
def test_huge_length_prefix_is_refused_before_any_room_is_made(length: int) -> None:
    async def attack(host: IHost, target: ID) -> None:
        stream = await host.new_stream(target, [TProtocol(ECHO)])
        await stream.write(struct.pack(">QB", length, 0))
        assert await refused_for(stream) == "message_too_large"

    under_attack(attack)


def test_garbage_on_a_stream_is_answered_with_a_typed_error() -> None:
    async def attack(host: IHost, target: ID) -> None:
        stream = await host.new_stream(target, [TProtocol(ECHO)])
        await stream.write(b"\x00" * 8 + b"\xee" + os.urandom(1000))
        assert await refused_for(stream) == "bad_frame"

    under_attack(attack)


def test_message_cut_short_reaches_no_handler() -> None:
    seen: list[bytes] = []

    async def run() -> None:
        server = Libp2pNode(NodeIdentity.generate(), LOCAL)

        async def handler(_peer: PeerId, payload: bytes) -> bytes:
            seen.append(payload)
            return b""

        server.serve(ECHO, handler)
        async with started(server):
            await asyncio.to_thread(hostile_peer, server.addresses[0], cut_short)
            await asyncio.to_thread(hostile_peer, server.addresses[0], whole)

    async def cut_short(host: IHost, target: ID) -> None:
        stream = await host.new_stream(target, [TProtocol(ECHO)])
        await stream.write(struct.pack(">QB", 10, 0) + b"half")
        await stream.close()

    async def whole(host: IHost, target: ID) -> None:
        stream = await host.new_stream(target, [TProtocol(ECHO)])
        await stream.write(struct.pack(">QB", 4, 0) + b"half")
        await read_frame(stream, peer=PeerId("t"), expected=frozenset(framing.Status), cap=10)

    asyncio.run(run())
    assert seen == [b"half"]


def test_streams_over_the_limit_are_reset() -> None:
    async def attack(host: IHost, target: ID) -> None:
        opened = 0
        for _ in range(12):
            try:
                with trio.fail_after(5):
                    await host.new_stream(target, [TProtocol(ECHO)])
                opened += 1
            except (BaseLibp2pError, trio.TooSlowError):
                pass
        assert opened <= 6

    under_attack(attack, Limits(max_streams_per_peer=6))


def test_flood_past_the_flow_control_window_ends_the_peer() -> None:
    async def attack(host: IHost, target: ID) -> None:
        stream = await host.new_stream(target, [TProtocol("/test/busy/1")])
        await stream.write(struct.pack(">QB", 1, 0) + b"x")

        async def flood() -> None:
            while True:
                stream.muxed_stream.send_window = 1 << 30  # type: ignore[attr-defined]
                await stream.write(bytes(1 << 20))

        with pytest.raises((BaseLibp2pError, trio.BrokenResourceError)):
            await flood()

    async def run() -> None:
        server = fresh(limits=Limits(max_message_bytes=1 << 20))
        lost: asyncio.Queue[str] = asyncio.Queue()
        server.on_peer_lost(lambda _peer, cause: lost.put_nowait(cause))

        async def busy(_peer: PeerId, _payload: bytes) -> bytes:
            await asyncio.Event().wait()
            return b""

        server.serve("/test/busy/1", busy)
        async with started(server):
            await asyncio.to_thread(hostile_peer, server.addresses[0], attack)
            assert "flow-control" in await asyncio.wait_for(lost.get(), WAIT_S)

    asyncio.run(run())


def test_a_peer_whose_goodbye_is_cut_short_is_lost_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        server, client = fresh(), fresh(None)
        lost: asyncio.Queue[tuple[PeerId, str]] = asyncio.Queue()
        server.on_peer_lost(lambda peer, cause: lost.put_nowait((peer, cause)))
        async with started(server, client):
            await client.connect(server.addresses[0], timeout_s=WAIT_S)
            await arrived(server, client.peer_id)
            with monkeypatch.context() as patched:
                patched.setattr(liveness, "_CLOSE_TIMEOUT_S", 0.0)
                await server.ban(client.peer_id, "test", for_s=60)
            told = await asyncio.wait_for(lost.get(), WAIT_S)
            assert told == (client.peer_id, "it was banned")
            assert client.peer_id not in server.peers()

    asyncio.run(main())


def test_reader_that_stalls_does_not_hold_up_others() -> None:
    async def run() -> None:
        server, client = fresh(limits=Limits(max_message_bytes=8 << 20)), fresh(listen=None)

        async def big(_peer: PeerId, _payload: bytes) -> bytes:
            return bytes(8 << 20)

        server.serve("/test/big/1", big)

        async def stall(host: IHost, target: ID) -> None:
            stream = await host.new_stream(target, [TProtocol("/test/big/1")])
            await stream.write(struct.pack(">QB", 1, 0) + b"x")
            ready.set()
            await trio.to_thread.run_sync(release.wait)

        ready, release = threading.Event(), threading.Event()
        async with started(server, client):
            attack = asyncio.ensure_future(
                asyncio.to_thread(hostile_peer, server.addresses[0], stall)
            )
            try:
                await asyncio.to_thread(ready.wait, WAIT_S)
                peer = await client.connect(server.addresses[0], timeout_s=WAIT_S)
                for _ in range(20):
                    assert await client.request(peer, ECHO, b"x", timeout_s=1) == b"x"
            finally:
                release.set()
                await attack

    asyncio.run(run())


def test_peer_without_encryption_is_refused() -> None:
    async def run() -> None:
        server = fresh()
        async with started(server):
            dial = lambda: trio.run(plaintext_dial, server.addresses[0])  # noqa: E731
            assert not await asyncio.to_thread(dial)
            assert server.peers() == frozenset()

    asyncio.run(run())


def test_the_librarys_default_host_does_accept_plaintext() -> None:
    """The negative control: without our security options the same dial succeeds."""

    async def main() -> bool:
        listen = [Multiaddr(LOCAL)]
        default = new_host(key_pair=create_new_key_pair(), listen_addrs=listen)
        async with default.run(listen_addrs=listen):
            accepted = await plaintext_dial(str(default.get_addrs()[0]))
            await hang_up(default)
            return accepted

    assert trio.run(main)


def test_peer_id_is_the_librarys_own() -> None:
    identity = NodeIdentity.generate()
    host = build_host(identity, Limits())
    assert host.get_id().to_base58() == identity.peer_id == peer_id_of(identity.public_key)
    offered = host.get_network().upgrader.security_multistream.transports  # type: ignore[attr-defined]
    assert list(offered) == [NOISE_ID]


def test_cancelled_caller_leaves_the_connection_usable() -> None:
    async def run() -> None:
        server, client = fresh(), fresh(listen=None)
        entered = asyncio.Event()

        async def wait_forever(_peer: PeerId, _payload: bytes) -> bytes:
            entered.set()
            await asyncio.Event().wait()
            return b""

        server.serve("/test/wait/1", wait_forever)
        async with started(server, client):
            peer = await client.connect(server.addresses[0], timeout_s=WAIT_S)
            asking = asyncio.ensure_future(
                client.request(peer, "/test/wait/1", b"", timeout_s=WAIT_S)
            )
            await asyncio.wait_for(entered.wait(), WAIT_S)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            assert await client.request(peer, ECHO, b"x", timeout_s=WAIT_S) == b"x"

    asyncio.run(run())
