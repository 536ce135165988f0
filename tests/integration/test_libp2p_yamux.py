"""What Shoal mends in the library's Yamux: frames that need not be, and frames too large."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Callable
from typing import Any

import pytest
import trio
from libp2p.abc import IHost
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.stream_muxer.yamux.yamux import YAMUX_HEADER_FORMAT, Yamux, YamuxStream
from libp2p_strangers import ECHO, WAIT_S, fresh, hostile_peer, started

from shoal.network import libp2p_yamux
from shoal.network.libp2p_host import swarm_of


async def _updates_sent(monkeypatch: pytest.MonkeyPatch, sizes: list[int]) -> int:
    """How many window updates both sides send while requests of these sizes are echoed."""
    sent = []
    send = YamuxStream.send_window_update

    async def counting(stream: YamuxStream, increment: int, skip_lock: bool = False) -> None:
        sent.append(increment)
        await send(stream, increment, skip_lock)

    server, client = fresh(), fresh(None)
    async with started(server, client):
        peer = await client.connect(server.addresses[0], timeout_s=WAIT_S)
        assert await client.request(peer, ECHO, b"", timeout_s=WAIT_S) == b""
        monkeypatch.setattr(YamuxStream, "send_window_update", counting)
        for size in sizes:
            reply = await client.request(peer, ECHO, bytes(size), timeout_s=WAIT_S)
            assert len(reply) == size
    return len(sent)


def test_small_requests_send_no_window_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asyncio.run(_updates_sent(monkeypatch, [100] * 50)) <= 8


def test_the_library_would_send_one_for_every_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: without the mending, each small request costs several."""

    async def eager(stream: YamuxStream, *, bytes_read: int = 0) -> None:
        await stream.send_window_update(bytes_read)

    monkeypatch.setattr(YamuxStream, "_auto_tune_and_send_window_update", eager)
    assert asyncio.run(_updates_sent(monkeypatch, [100] * 50)) >= 100


def test_messages_far_over_the_window_come_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [1 << 20, 1, 200_000, 300_000, 1 << 20]
    assert asyncio.run(_updates_sent(monkeypatch, sizes)) >= 4


def _announce_frame(length: int, wait_s: float) -> Callable[[IHost, ID], Any]:
    async def attack(host: IHost, target: ID) -> None:
        (connection,) = swarm_of(host).get_connections(target)
        muxed = connection.muxed_conn
        assert isinstance(muxed, Yamux)
        header = struct.pack(YAMUX_HEADER_FORMAT, 0, 0, 1, 101, length)
        with contextlib.suppress(BaseLibp2pError, trio.BrokenResourceError):
            await muxed.secured_conn.write(header + bytes(1000))
        with trio.move_on_after(wait_s):
            await muxed.event_closed.wait()
        ended.append(muxed.event_closed.is_set())

    ended: list[bool] = []
    attack.ended = ended  # type: ignore[attr-defined]
    return attack


async def _ends_the_connection(length: int, wait_s: float) -> bool:
    attack = _announce_frame(length, wait_s)
    server, client = fresh(), fresh(None)
    async with started(server, client):
        await asyncio.to_thread(hostile_peer, server.addresses[0], attack)
        peer = await client.connect(server.addresses[0], timeout_s=WAIT_S)
        assert await client.request(peer, ECHO, b"x", timeout_s=WAIT_S) == b"x"
    (ended,) = attack.ended  # type: ignore[attr-defined]
    return bool(ended)


def test_a_frame_over_the_cap_ends_the_connection_at_once() -> None:
    assert asyncio.run(_ends_the_connection((1 << 20) + 1, wait_s=15.0))


def test_without_the_cap_the_frame_would_be_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the library takes frames of 16 MiB and waits a minute for their bytes."""
    monkeypatch.setattr(libp2p_yamux, "_MAX_FRAME_BYTES", 1 << 24)
    assert not asyncio.run(_ends_the_connection((1 << 20) + 1, wait_s=1.0))
