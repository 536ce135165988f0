"""Yamux with window updates by the half window and frames of a bounded size.

py-libp2p answers every read, however small, with a window update of its own, so a request and
its reply cost six frames instead of two; it also grants some of those bytes twice, which makes
its windows grow without data to carry. And it gathers a frame of up to 16 MiB, for as long as its
sender likes to take, where nothing counts it.
"""

from __future__ import annotations

from typing import Final

import trio
from libp2p.security.noise.io import MAX_PLAINTEXT_LENGTH
from libp2p.stream_muxer.yamux import yamux as yamux_module
from libp2p.stream_muxer.yamux.yamux import Yamux, YamuxStream

# py-libp2p sends 64 KiB at most, go-yamux and rust-yamux little more.
_MAX_FRAME_BYTES: Final = 1 << 20

_read_data_body = Yamux._read_data_body


async def _release_window(stream: YamuxStream, *, bytes_read: int = 0) -> None:
    """The peer may send again what was read, once that is half of the window.

    Source: github.com/hashicorp/yamux, stream.go, sendWindowUpdate.
    """
    async with stream.window_lock:
        buffered = len(stream.conn.stream_buffers.get(stream.stream_id, b""))
        delta = stream.target_recv_window - (stream.recv_window + buffered)
        if delta < stream._grow_threshold():
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
    return await _read_data_body(connection, length)


def mend_yamux() -> None:
    """From now on every Yamux connection of this process behaves as this module says."""
    setattr(YamuxStream, "_auto_tune_and_send_window_update", _release_window)  # noqa: B010
    setattr(Yamux, "_read_data_body", _read_bounded_body)  # noqa: B010
    # The library's full frame is a few bytes over what Noise carries at once, so each one
    # went out as two packets, the second nearly empty.
    setattr(yamux_module, "MAX_MESSAGE_SIZE", MAX_PLAINTEXT_LENGTH)  # noqa: B010
