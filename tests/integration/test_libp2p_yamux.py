"""What Shoal mends in the library's Yamux: frames and turns that need not be, frames too large."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import importlib.util
import inspect
import math
import random
import struct
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import trio
from libp2p.abc import IHost
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.security.noise.io import MAX_PLAINTEXT_LENGTH
from libp2p.stream_muxer.exceptions import MuxedStreamError
from libp2p.stream_muxer.yamux import yamux as mended
from libp2p.stream_muxer.yamux.yamux import (
    HEADER_SIZE,
    YAMUX_HEADER_FORMAT,
    Yamux,
    YamuxStream,
)
from libp2p_strangers import ECHO, WAIT_S, fresh, hostile_peer, started
from trio.testing import MockClock, wait_all_tasks_blocked

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


def _as_it_came() -> ModuleType:
    """The library's module once more, without what Shoal mends."""
    spec = importlib.util.find_spec(mended.__name__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LIBRARY = _as_it_came()
BODY = random.Random(11).randbytes(3 << 20)


class Frames:
    """A secured connection that keeps what is written and brings nothing."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    async def write(self, data: bytes) -> None:
        """Kept."""
        self.written.append(bytes(data))

    @property
    def payload(self) -> bytes:
        """What the data frames carry."""
        return b"".join(frame[HEADER_SIZE:] for frame in self.written)


def _open_stream(module: ModuleType, window: int = 1 << 20) -> tuple[Any, Frames]:
    """A stream of the library, mended or not, whose peer grants `window` bytes."""
    frames = Frames()
    connection = module.Yamux(frames, ID(b"peer"), True)
    stream = module.YamuxStream(1, connection, True)
    connection.streams[1], connection.stream_buffers[1] = stream, bytearray()
    connection.stream_events[1] = trio.Event()
    stream.send_window = window
    return stream, frames


async def _granted_after_a_wait(module: ModuleType) -> bool:
    """Whether a writer goes on when bytes are granted, no time having passed."""
    stream, frames = _open_stream(module, window=100)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.write, BODY[:1000])
        await wait_all_tasks_blocked()
        assert frames.payload == BODY[:100]
        stream.send_window += 5000
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    return frames.payload == BODY[:1000]


def test_a_writer_goes_on_as_soon_as_bytes_are_granted() -> None:
    assert trio.run(_granted_after_a_wait, mended, clock=MockClock())


def test_the_library_would_look_again_after_a_while() -> None:
    """The control."""
    assert not trio.run(_granted_after_a_wait, LIBRARY, clock=MockClock())


@pytest.mark.parametrize("ending", ["closed", "send_closed"])
def test_a_writer_that_waits_hears_of_the_end_at_once(ending: str) -> None:
    async def main() -> None:
        stream, frames = _open_stream(mended, window=0)

        async def write() -> None:
            with pytest.raises(MuxedStreamError):
                await stream.write(b"x")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await wait_all_tasks_blocked()
            setattr(stream, ending, True)
        assert not frames.written

    trio.run(main, clock=MockClock())


def test_a_writer_to_whom_nothing_is_granted_gives_up() -> None:
    async def main() -> float:
        stream, _ = _open_stream(mended, window=0)
        with pytest.raises(MuxedStreamError):
            await stream.write(b"x")
        return trio.current_time()

    assert trio.run(main, clock=MockClock(autojump_threshold=0)) == pytest.approx(5.0)


def _most_packets(window: int) -> int:
    """The packets of the longest frame, once the whole body was written under such windows."""

    async def main() -> int:
        stream, frames = _open_stream(mended, window)

        async def grant() -> None:
            while True:
                await wait_all_tasks_blocked()
                stream.send_window = window

        async with trio.open_nursery() as nursery:
            nursery.start_soon(grant)
            await stream.write(BODY)
            nursery.cancel_scope.cancel()
        assert frames.payload == BODY
        return max(map(len, frames.written))

    most: int = math.ceil(trio.run(main) / MAX_PLAINTEXT_LENGTH)
    return most


@pytest.mark.parametrize(("window", "packets"), [(20_000, 1), (256 << 10, 1), (16 << 20, 3)])
def test_a_frame_is_long_only_where_the_window_is_wide(window: int, packets: int) -> None:
    assert _most_packets(window) == packets


def test_without_that_rule_a_frame_would_be_long_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libp2p_yamux, "_WINDOW_SHARE", 1)
    assert _most_packets(256 << 10) > 1


def test_no_more_is_sent_than_was_granted() -> None:
    async def main() -> bytes:
        stream, frames = _open_stream(mended, window=100_000)
        with trio.move_on_after(1):
            await stream.write(BODY)
        return frames.payload

    assert trio.run(main, clock=MockClock(autojump_threshold=0)) == BODY[:100_000]


async def _what_reads_give(module: ModuleType, ending: str) -> list[object]:
    """What a reader gets of bytes that come in two parts, and how it hears of the end."""
    stream, _ = _open_stream(module)
    connection = stream.conn
    got: list[object] = []

    async def read() -> None:
        try:
            for n in (10, 5, 1000, -1, 7, None, 7):
                got.append(bytes(await stream.read(n)))
        except Exception as error:
            got.append(type(error).__name__)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        for part in (b"0123456789abcdefgh", b"second", b"third", b"fourth"):
            await wait_all_tasks_blocked()
            connection.stream_buffers[1].extend(part)
            connection.stream_events[1].set()
        await wait_all_tasks_blocked()
        setattr(stream, ending, True)
        connection.stream_events[1].set()
    return got


@pytest.mark.parametrize("ending", ["recv_closed", "closed", "reset_received"])
def test_reads_give_what_the_librarys_give(ending: str) -> None:
    given = trio.run(_what_reads_give, mended, ending)
    assert given == trio.run(_what_reads_give, LIBRARY, ending)
    assert given[:3] == [b"0123456789", b"abcde", b"fgh"]
    assert str(given[-1]).startswith("MuxedStream")


def test_bytes_that_came_before_the_end_are_still_read() -> None:
    async def main() -> bytes:
        stream, _ = _open_stream(mended)
        stream.conn.stream_buffers[1].extend(b"last words")
        stream.recv_closed = True
        return bytes(await stream.read(100))

    assert trio.run(main) == b"last words"


def test_the_library_waits_for_nothing_while_it_holds_a_window() -> None:
    """Else what is done here without its lock could come between."""
    held = [
        node
        for node in ast.walk(ast.parse(inspect.getsource(LIBRARY)))
        if isinstance(node, ast.AsyncWith) and "window_lock" in ast.unparse(node.items[0])
    ]
    assert len(held) >= 5
    waits = (ast.Await, ast.AsyncWith, ast.AsyncFor)
    inside = [inner for node in held for part in node.body for inner in ast.walk(part)]
    assert not [ast.unparse(inner) for inner in inside if isinstance(inner, waits)]
