"""Yamux with few frames and few turns of the scheduler, and frames of a bounded size.

py-libp2p answers every read, however small, with a window update of its own, so a request and
its reply cost six frames instead of two; it also grants some of those bytes twice, which makes
its windows grow without data to carry. And it gathers a frame of up to 16 MiB, for as long as its
sender likes to take, where nothing counts it.

It takes two locks for each frame it writes and three for each part it reads, which cost far more
than moving the bytes: every one hands the thread to whoever else is ready. What it does inside
them waits for nothing, so in one thread nobody can come between. A sender whose window is used up
looks again every 10 ms, although it could be told.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import trio
from libp2p.security.noise.io import MAX_PLAINTEXT_LENGTH as _PACKET_BYTES
from libp2p.stream_muxer.exceptions import MuxedStreamError
from libp2p.stream_muxer.yamux.yamux import (
    HEADER_SIZE,
    TYPE_DATA,
    YAMUX_HEADER_FORMAT,
    Yamux,
    YamuxStream,
)

from shoal.network.libp2p_noise import PACKETS_AT_ONCE

# py-libp2p sends 64 KiB at most, go-yamux and rust-yamux little more.
_MAX_FRAME_BYTES: Final = 1 << 20
# A frame fills as many packets of Noise as a quarter of the window does, a few at most: the window
# is wide on a fast line only, and on a slow one nobody else's frame waits for a long one. (The
# library's full frame is a few bytes over what one packet carries.)
_WINDOW_SHARE: Final = 4
_WINDOW_TIMEOUT_S: Final = 5.0
_HEADER: Final = struct.Struct(YAMUX_HEADER_FORMAT)
_CHANGED: Final = "_shoal_changed"

_read_data_body = Yamux._read_data_body
_read = YamuxStream.read


class _Watched:
    """An attribute of a stream; who waits for it to change is woken when it is set."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, stream: YamuxStream, owner: type[YamuxStream]) -> Any:
        return stream.__dict__[self._name]

    def __set__(self, stream: YamuxStream, value: object) -> None:
        stream.__dict__[self._name] = value
        changed: trio.Event | None = stream.__dict__.pop(_CHANGED, None)
        if changed is not None:
            changed.set()


async def _write(stream: YamuxStream, data: bytes) -> None:
    """The data was handed to the connection, frame by frame as the peer's window allows."""
    view = memoryview(data)
    while view:
        await _await_window(stream)
        window = stream.send_window
        num_packets = max(1, min(PACKETS_AT_ONCE, window // _WINDOW_SHARE // _PACKET_BYTES))
        size = min(window, num_packets * _PACKET_BYTES - HEADER_SIZE, len(view))
        stream.send_window = window - size
        header = _HEADER.pack(0, TYPE_DATA, 0, stream.stream_id, size)
        await stream.conn._write_frame(b"".join((header, view[:size])))
        view = view[size:]


async def _await_window(stream: YamuxStream) -> None:
    """The stream is open and its window is not used up.

    Raises:
        MuxedStreamError: It was closed, or the peer has granted nothing for too long.
    """
    if stream.send_window <= 0:
        with trio.move_on_after(_WINDOW_TIMEOUT_S):
            while not (stream.send_closed or stream.closed) and stream.send_window <= 0:
                await stream.__dict__.setdefault(_CHANGED, trio.Event()).wait()
    if stream.send_closed or stream.closed:
        raise MuxedStreamError("Stream is closed")
    if stream.send_window <= 0:
        raise MuxedStreamError("Timed out waiting for window update")


async def _write_frame(connection: Yamux, data: bytes) -> None:
    """The frame was written, after those that were there before it."""
    async with connection._write_lock:
        await connection.secured_conn.write(data)


async def _read_part(stream: YamuxStream, n: int | None = -1) -> bytes:
    """What has come, `n` bytes of it at most; the library says why if nothing more will."""
    connection, number = stream.conn, stream.stream_id
    while n is not None and n > 0:
        buffer, event = connection.stream_buffers.get(number), connection.stream_events.get(number)
        is_ending = stream.closed or stream.recv_closed or stream.reset_received
        if buffer is None or event is None or is_ending:
            break
        if buffer:
            with memoryview(buffer) as view:
                data = bytes(view[:n])
            del buffer[:n]
            await stream._auto_tune_and_send_window_update(bytes_read=len(data))
            return data
        await event.wait()
        if connection.stream_events.get(number) is event:
            connection.stream_events[number] = trio.Event()
    return await _read(stream, n)


async def _release_window(stream: YamuxStream, *, bytes_read: int = 0) -> None:
    """The peer may send again what was read, once that is half of the window.

    Source: github.com/hashicorp/yamux, stream.go, sendWindowUpdate.
    """
    buffered = len(stream.conn.stream_buffers.get(stream.stream_id, b""))
    delta = stream.target_recv_window - (stream.recv_window + buffered)
    if delta < stream.target_recv_window // 2:
        return
    granted = stream._grow_to_delta(buffered) + stream._apply_autotune_epoch(buffered)
    if granted > 0:
        await stream.send_window_update(granted)


async def _read_bounded_body(connection: Yamux, length: int) -> bytes:
    """A data frame's body.

    Raises:
        trio.TooSlowError: The frame is too large; the library ends the connection at this.
    """
    if length > _MAX_FRAME_BYTES:
        raise trio.TooSlowError
    if length <= getattr(connection.secured_conn, "num_ready", 0):  # a clock costs more
        return await connection.secured_conn.read(length)
    return await _read_data_body(connection, length)


def mend_yamux() -> None:
    """From now on every Yamux connection of this process behaves as this module says."""
    for name in ("send_window", "closed", "send_closed"):
        setattr(YamuxStream, name, _Watched(name))
    setattr(YamuxStream, "write", _write)  # noqa: B010
    setattr(YamuxStream, "read", _read_part)  # noqa: B010
    setattr(YamuxStream, "_auto_tune_and_send_window_update", _release_window)  # noqa: B010
    setattr(Yamux, "_write_frame", _write_frame)  # noqa: B010
    setattr(Yamux, "_read_data_body", _read_bounded_body)  # noqa: B010
