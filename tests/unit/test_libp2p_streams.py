"""Reading messages off a libp2p stream: whole, in order, and without waste."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from libp2p.network.stream.exceptions import StreamEOF

from shoal.network.libp2p_streams import StreamEndedError, read_exactly
from shoal.protocol.errors import Unavailable

BODY = random.Random(3).randbytes(70_000)


class Dribble:
    """A stream that brings `data` in parts of `part_bytes`, and then ends."""

    def __init__(self, data: bytes, part_bytes: int) -> None:
        self._data = data
        self._part_bytes = part_bytes
        self._place = 0

    async def read(self, n: int | None = None) -> bytes:
        """The next part."""
        assert n is not None
        size = min(n, self._part_bytes)
        part = self._data[self._place : self._place + size]
        if not part:
            raise StreamEOF
        self._place += size
        return part


def read(stream: Any, num_bytes: int) -> bytes:
    return trio.run(read_exactly, stream, num_bytes)


@pytest.mark.parametrize("part_bytes", [1, 3, 4096, 1 << 20])
def test_a_message_comes_whole_however_it_is_cut(part_bytes: int) -> None:
    assert read(Dribble(BODY, part_bytes), 60_000) == BODY[:60_000]


def test_an_end_between_messages_is_told_from_one_inside() -> None:
    with pytest.raises(StreamEndedError):
        read(Dribble(b"", 10), 5)
    with pytest.raises(Unavailable, match="middle"):
        read(Dribble(b"abc", 10), 5)
    assert read(Dribble(b"", 10), 0) == b""


def _peak_bytes(gather: Callable[[Any, int], Awaitable[bytes]]) -> int:
    stream: Any = Dribble(BODY[:10_000], 2)

    async def main() -> int:
        tracemalloc.start()
        try:
            assert await gather(stream, 10_000) == BODY[:10_000]
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    return trio.run(main)


async def _kept_apart(stream: Any, num_bytes: int) -> bytes:
    return b"".join([await stream.read(2) for _ in range(num_bytes // 2)])


def test_a_message_in_tiny_parts_takes_little_more_room_than_its_bytes() -> None:
    assert _peak_bytes(read_exactly) < 50_000
    # The control: parts joined in the end, each with a head of its own until then.
    assert _peak_bytes(_kept_apart) > 150_000
