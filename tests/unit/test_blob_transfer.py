"""When a transfer asks whom: for small chunks, and for more sources."""

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
from shoal.network.blob_transfer import FetchRules, Listener, Transfer, poll_pause_s
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


PARTS = [DATA[at : at + FINE_CHUNK_BYTES] for at in range(0, len(DATA), FINE_CHUNK_BYTES)]


def partial_of(folder: Path) -> PartialBlob:
    digests = b"".join(hashlib.sha256(part).digest() for part in PARTS)
    ref = BlobRef(sha256=hashlib.sha256(DATA).hexdigest(), size_bytes=len(DATA))
    return PartialBlob(BlobStore(folder, 1 << 30), ref, digests, FINE_CHUNK_BYTES)


def transfer_of(
    blob: PartialBlob, opener: object, rules: FetchRules, listener: Listener
) -> tuple[Transfer, Board]:
    board = Board(blob.sizes, blob.missing(), None)
    return Transfer(blob, board, cast(SourceOpener, opener), rules, listener, Meters()), board


async def ask_one_holder(folder: Path, resumed: bool) -> None:
    holding = Holding()
    with partial_of(folder) as blob:
        if resumed:
            assert blob.accept(0, PARTS[0])
        transfer, board = transfer_of(blob, holding, FetchRules(), Listener())
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


class Crowd:
    """Opens a source of its own for each holder."""

    def __init__(self, holders: list[Holder]) -> None:
        self.sources = {holder.source: Holding() for holder in holders}

    def open(self, holder: Holder) -> Holding:
        return self.sources[holder.source]


@pytest.mark.parametrize("resumed", [False, True])
def test_among_many_who_holds_all_is_asked_for_two(tmp_path: Path, resumed: bool) -> None:
    async def main() -> None:
        everything = frozenset(range(len(PARTS)))
        holders = [Holder("whole"), *(Holder(f"part-{n}", everything) for n in range(2))]
        crowd = Crowd(holders)
        with partial_of(tmp_path) as blob:
            if resumed:
                assert blob.accept(0, PARTS[0])
            transfer, _ = transfer_of(blob, crowd, FetchRules(), Listener())
            running = asyncio.ensure_future(transfer.run(holders))
            await asyncio.gather(*(one.until_asked(1) for one in crowd.sources.values()))
            asked = {name: len(one.asked) for name, one in crowd.sources.items()}
            assert asked == {"whole": 2 if resumed else 1, "part-0": 1, "part-1": 1}
            running.cancel()
            await asyncio.wait({running})

    asyncio.run(main())


@pytest.mark.parametrize(
    ("elapsed_s", "longest_s", "pause_s"),
    [(0.0, 0.25, 0.05), (0.6, 0.25, 0.15), (60.0, 0.25, 0.25), (0.0, 0.02, 0.02)],
)
def test_questions_for_more_sources_come_soon_and_then_rarely(
    elapsed_s: float, longest_s: float, pause_s: float
) -> None:
    assert poll_pause_s(elapsed_s, longest_s) == pytest.approx(pause_s)


def test_the_first_question_does_not_wait_for_the_longest_pause(tmp_path: Path) -> None:
    async def main() -> None:
        asked = asyncio.Event()

        async def more() -> list[Holder]:
            asked.set()
            return []

        with partial_of(tmp_path) as blob:
            rules, listener = FetchRules(poll_s=3600.0), Listener(more_sources=more)
            transfer, _ = transfer_of(blob, Holding(), rules, listener)
            running = asyncio.ensure_future(transfer.run([Holder("silent")]))
            async with asyncio.timeout(30):
                await asked.wait()
            running.cancel()
            await asyncio.wait({running})

    asyncio.run(main())
