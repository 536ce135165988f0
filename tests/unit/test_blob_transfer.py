"""A transfer of small chunks has the first of them to pass on before it asks for many."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import cast

import pytest

from shoal.network.blob_board import Board
from shoal.network.blob_chunks import Span
from shoal.network.blob_parts import PartialBlob
from shoal.network.blob_sources import Holder, OnBytes, SourceOpener
from shoal.network.blob_store import BlobStore
from shoal.network.blob_transfer import FetchRules, Listener, Transfer
from shoal.network.meters import Meters
from shoal.protocol.blob import BlobRef
from shoal.protocol.holders import FINE_CHUNK_BYTES

DATA = bytes(range(256)) * (6 * FINE_CHUNK_BYTES // 256)


class Holding:
    """A holder that gives each piece when it is told to; opens as its own source."""

    max_readings = 3
    max_piece_bytes = FINE_CHUNK_BYTES
    shows_progress = True

    def __init__(self) -> None:
        self.asked: list[asyncio.Event] = []
        self.changed = asyncio.Event()

    def open(self, holder: Holder) -> Holding:
        return self

    async def read_into(self, span: Span, room: memoryview, on_bytes: OnBytes) -> None:
        turn = asyncio.Event()
        self.asked.append(turn)
        self.changed.set()
        await turn.wait()
        room[:] = DATA[span.start : span.start + span.size_bytes]
        on_bytes(span.size_bytes)

    async def until_asked(self, times: int) -> None:
        while len(self.asked) < times:
            self.changed.clear()
            await self.changed.wait()
        for _ in range(20):  # whoever else would ask, had its turn
            await asyncio.sleep(0)


@pytest.mark.parametrize("resumed", [False, True])
def test_one_chunk_is_asked_of_a_holder_until_the_first_is_here(
    tmp_path: Path, resumed: bool
) -> None:
    asyncio.run(ask_one_holder(tmp_path, resumed))


async def ask_one_holder(folder: Path, resumed: bool) -> None:
    parts = [DATA[at : at + FINE_CHUNK_BYTES] for at in range(0, len(DATA), FINE_CHUNK_BYTES)]
    digests = b"".join(hashlib.sha256(part).digest() for part in parts)
    ref = BlobRef(sha256=hashlib.sha256(DATA).hexdigest(), size_bytes=len(DATA))
    holding = Holding()
    with PartialBlob(BlobStore(folder, 1 << 30), ref, digests, FINE_CHUNK_BYTES) as blob:
        if resumed:
            assert blob.accept(0, parts[0])
        board = Board(blob.sizes, blob.missing(), None)
        opener = cast(SourceOpener, holding)
        transfer = Transfer(blob, board, opener, FetchRules(), Listener(), Meters())
        running = asyncio.ensure_future(transfer.run([Holder("one")]))
        await holding.until_asked(1)
        assert len(holding.asked) == (3 if resumed else 1)
        holding.asked[0].set()
        await holding.until_asked(4)
        assert len(holding.asked) == 4
        while not running.done():
            for turn in holding.asked:
                turn.set()
            await asyncio.wait({running}, timeout=0.01)
        await running
        assert board.is_done
