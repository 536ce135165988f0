"""Which bytes of a blob are asked of whom: the books of one transfer, without any I/O.

A chunk is asked in pieces, whole where a holder is fast and many chunks are left, in smaller
ones where several holders can share the last chunks.  It is verified as a whole; a piece that
comes slowly may be asked of a second holder, and the first to bring it is believed until then.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from shoal.protocol.blob import CHUNK_BYTES

MAX_FAILURES: Final = 3
_FIRST_PIECE_BYTES: Final = 1 << 20
_USUAL_PIECE_BYTES: Final = 256 << 10
"""Smaller pieces are asked only where several holders share the last chunks."""
_MIN_PIECE_BYTES: Final = 64 << 10
_PIECE_S: Final = 0.5
"""A larger piece is what its holder is expected to bring in this time."""
# Copies may cost a tenth of the blob, and only where they are likely to win.
_COPY_SHARE: Final = 10
_COPY_GAIN: Final = 2.0
_RATE_WEIGHT: Final = 0.3
_CHUNKS_COMPARED: Final = 1024
_LACKING_S: Final = 0.5


@dataclass
class Giver:
    """One holder, and what became of asking it.

    Attributes:
        name: The source, as it was given.
        chunks: What it holds; None for everything.
        max_readings: How many pieces may be asked of it at once.
        max_piece_bytes: The longest piece asked of it.
        rate: Bytes per second of one piece, smoothed; 0 until the first has come.
    """

    name: str
    chunks: frozenset[int] | None = None
    max_readings: int = 2
    max_piece_bytes: int = CHUNK_BYTES
    rate: float = 0.0
    failures: int = 0
    fault: str = ""
    lied: bool = False
    rests_until_s: float = 0.0
    num_readings: int = 0
    lacking: dict[int, float] = field(default_factory=dict)

    @property
    def is_usable(self) -> bool:
        """False once it is not asked again in this transfer."""
        return self.failures < MAX_FAILURES

    def may_hold(self, index: int) -> bool:
        """True unless it is known not to have the chunk."""
        return self.chunks is None or index in self.chunks

    def may_give(self, index: int, now_s: float) -> bool:
        """True when the chunk may be asked of it now."""
        return self.may_hold(index) and self.lacking.get(index, 0.0) <= now_s

    def lacks(self, index: int, now_s: float) -> None:
        """It said that it has not got the chunk yet; that is no fault."""
        self.lacking[index] = now_s + _LACKING_S

    def give_up(self, fault: str, *, lied: bool = False) -> None:
        """It is not asked again."""
        self.failures, self.fault, self.lied = MAX_FAILURES, fault, lied or self.lied


@dataclass(frozen=True)
class _Part:
    """Bytes that came from one holder; their hash, once the chunk they were in was wrong."""

    giver: Giver
    start: int
    end: int
    digest: bytes = b""


@dataclass(eq=False)
class Chunk:
    """A chunk being fetched, piece by piece."""

    index: int
    room: bytearray
    waiting: list[tuple[int, int]]
    given: list[_Part] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    suspects: list[_Part] = field(default_factory=list)

    @property
    def is_single(self) -> bool:
        """True when one holder must bring all of it, so that we learn who lied."""
        return bool(self.suspects)


@dataclass(eq=False)
class Reading:
    """A piece asked of one holder: bytes `start` to `end` of the chunk, `got` of them here."""

    chunk: Chunk
    giver: Giver
    start: int
    end: int
    begun_s: float
    room: memoryview
    is_copy: bool = False
    got: int = 0

    @property
    def left(self) -> int:
        """The bytes that have not come yet."""
        return self.end - self.start - self.got


class Board:
    """Hands out pieces and takes them back.

    Args:
        sizes: Every chunk's size in bytes.
        missing: The chunks to fetch.
        order: Draws among equally rare chunks; None takes them in order.
    """

    def __init__(
        self, sizes: Sequence[int], missing: Iterable[int], order: random.Random | None
    ) -> None:
        self._sizes = sizes
        self._missing = sorted(missing, reverse=True)
        if order is not None:
            order.shuffle(self._missing)
        self._open: dict[int, Chunk] = {}
        self._suspects: dict[int, list[_Part]] = {}
        self._spare: list[bytearray] = []
        self._missing_bytes = sum(sizes[index] for index in self._missing)
        self._copies_left = self._missing_bytes // _COPY_SHARE
        self.givers: dict[str, Giver] = {}
        self.num_left = len(self._missing)

    @property
    def is_done(self) -> bool:
        """True when every chunk was accepted."""
        return self.num_left == 0

    @property
    def num_readings(self) -> int:
        """Pieces that are on their way."""
        return sum(len(chunk.readings) for chunk in self._open.values())

    def usable(self) -> list[Giver]:
        """The holders that may still be asked."""
        return [giver for giver in self.givers.values() if giver.is_usable]

    def take(self, giver: Giver, now_s: float) -> Reading | None:
        """A piece to ask of `giver` now, if there is one for it."""
        if not giver.is_usable or giver.rests_until_s > now_s:
            return None
        if giver.num_readings >= giver.max_readings:
            return None
        for chunk in self._open.values():
            if chunk.waiting and giver.may_give(chunk.index, now_s):
                return self._read(chunk, giver, now_s)
        index = self._rarest(giver, now_s)
        if index is None:
            return self._copy(giver, now_s)
        self._missing.remove(index)
        size = self._sizes[index]
        self._missing_bytes -= size
        chunk = Chunk(index=index, room=self._room(size), waiting=[(0, size)])
        chunk.suspects = self._suspects.pop(index, [])
        self._open[index] = chunk
        return self._read(chunk, giver, now_s)

    def brought(self, reading: Reading, now_s: float) -> tuple[Chunk | None, list[Reading]]:
        """The piece is here: its chunk if that is now complete, and readings now needless."""
        chunk, giver = reading.chunk, reading.giver
        self._end(reading)
        took_s = max(now_s - reading.begun_s, 1e-6)
        rate = (reading.end - reading.start) / took_s
        giver.rate = rate if not giver.rate else giver.rate + _RATE_WEIGHT * (rate - giver.rate)
        if giver.is_usable:  # who was found out stays so, whatever else was on its way
            giver.failures = 0
        if reading.is_copy:
            chunk.room[reading.start : reading.end] = reading.room
        needless = [
            other
            for other in chunk.readings
            if other.start < reading.end and reading.start < other.end
        ]
        for other in needless:
            self._end(other)
            if not other.is_copy and other.start < reading.start:
                chunk.given.append(_Part(other.giver, other.start, reading.start))
        chunk.given.append(_Part(giver, reading.start, reading.end))
        return (None if chunk.waiting or chunk.readings else chunk), needless

    def broke_off(self, reading: Reading) -> None:
        """The piece will not be finished by its holder; what came of it is kept."""
        chunk = reading.chunk
        if reading not in chunk.readings:
            return
        self._end(reading)
        twin = next((other for other in chunk.readings if other.end == reading.end), None)
        if reading.is_copy:
            if twin is None:
                chunk.waiting.append((reading.start, reading.end))
            return
        # A copy brings all from its start on, so what overlaps is the other holder's word.
        kept = reading.start + reading.got if twin is None else twin.start
        if chunk.is_single:
            kept = reading.start
        if kept > reading.start:
            chunk.given.append(_Part(reading.giver, reading.start, kept))
        if twin is None:
            chunk.waiting.append((kept, reading.end))

    def accept(self, chunk: Chunk) -> list[Giver]:
        """The chunk was right; the holders whose earlier bytes of it are now known to be wrong."""
        del self._open[chunk.index]
        self.num_left -= 1
        room = memoryview(chunk.room)
        liars = [
            part.giver
            for part in chunk.suspects
            if hashlib.sha256(room[part.start : part.end]).digest() != part.digest
        ]
        if len(room) == CHUNK_BYTES:
            self._spare.append(chunk.room)
        return liars

    def reject(self, chunk: Chunk) -> Giver | None:
        """The chunk was wrong and will be asked again; who lied, if only one can have."""
        del self._open[chunk.index]
        self._missing.append(chunk.index)
        self._missing_bytes += self._sizes[chunk.index]
        givers = {id(part.giver): part.giver for part in chunk.given}
        if len(givers) == 1:
            if chunk.suspects:
                self._suspects[chunk.index] = chunk.suspects
            return next(iter(givers.values()))
        room = memoryview(chunk.room)
        self._suspects[chunk.index] = [
            _Part(
                part.giver,
                part.start,
                part.end,
                hashlib.sha256(room[part.start : part.end]).digest(),
            )
            for part in chunk.given
        ]
        return None

    def _read(self, chunk: Chunk, giver: Giver, now_s: float) -> Reading:
        start, end = chunk.waiting.pop()
        if not chunk.is_single:
            wanted = self._piece_bytes(giver)
            # What would be left must be worth a request of its own.
            if end - start >= wanted + _MIN_PIECE_BYTES // 2:
                chunk.waiting.append((start + wanted, end))
                end = start + wanted
        reading = Reading(
            chunk=chunk,
            giver=giver,
            start=start,
            end=end,
            begun_s=now_s,
            room=memoryview(chunk.room)[start:end],
        )
        return self._begin(reading)

    def _room(self, size: int) -> bytearray:
        """Room for a chunk; that of one that is done is used again, which saves its faults."""
        return self._spare.pop() if self._spare and size == CHUNK_BYTES else bytearray(size)

    def _begin(self, reading: Reading) -> Reading:
        reading.chunk.readings.append(reading)
        reading.giver.num_readings += 1
        return reading

    def _end(self, reading: Reading) -> None:
        reading.chunk.readings.remove(reading)
        reading.giver.num_readings -= 1

    def _piece_bytes(self, giver: Giver) -> int:
        wanted = max(giver.rate * _PIECE_S, _USUAL_PIECE_BYTES)
        if not giver.rate:
            wanted = _FIRST_PIECE_BYTES
        usable = self.usable()
        if len(usable) > 1:
            # Ever smaller towards the end, and smaller for who is slow, so that all of them
            # finish together.
            left = self._missing_bytes + sum(
                end - start for chunk in self._open.values() for start, end in chunk.waiting
            )
            wanted = min(wanted, left * _share_of(giver, usable))
        whole = int(wanted) // _MIN_PIECE_BYTES * _MIN_PIECE_BYTES
        return max(_MIN_PIECE_BYTES, min(giver.max_piece_bytes, whole))

    def _rarest(self, giver: Giver, now_s: float) -> int | None:
        """The missing chunk that fewest holders have, of those that this one may give."""
        best, fewest = None, math.inf
        usable = self.usable()
        all_alike = all(other.chunks is None for other in usable)
        for index in self._missing[: -_CHUNKS_COMPARED - 1 : -1]:
            if not giver.may_give(index, now_s):
                continue
            if all_alike:
                return index
            num_holders = sum(other.may_hold(index) for other in usable)
            if num_holders < fewest:
                best, fewest = index, num_holders
        if best is None:
            return next((i for i in self._missing if giver.may_give(i, now_s)), None)
        return best

    def _copy(self, giver: Giver, now_s: float) -> Reading | None:
        """The rest of a piece that another holder brings much more slowly than this one would."""
        if not giver.rate:
            return None
        for chunk in self._open.values():
            if chunk.is_single or not giver.may_give(chunk.index, now_s):
                continue
            for slow in chunk.readings:
                if self._is_worth_a_copy(slow, giver, now_s):
                    self._copies_left -= slow.left
                    start = slow.start + slow.got
                    return self._begin(
                        Reading(
                            chunk=chunk,
                            giver=giver,
                            start=start,
                            end=slow.end,
                            begun_s=now_s,
                            room=memoryview(bytearray(slow.left)),
                            is_copy=True,
                        )
                    )
        return None

    def _is_worth_a_copy(self, slow: Reading, giver: Giver, now_s: float) -> bool:
        if slow.is_copy or slow.giver is giver or not 0 < slow.left <= self._copies_left:
            return False
        if any(other.is_copy and other.end == slow.end for other in slow.chunk.readings):
            return False
        elapsed_s = now_s - slow.begun_s
        rate = slow.got / elapsed_s if slow.got and elapsed_s > 0 else slow.giver.rate
        # One of which nothing has come is late once the other would have brought it twice over.
        left_s = slow.left / rate - (0 if slow.got else elapsed_s) if rate else math.inf
        if left_s <= 0:
            left_s = elapsed_s
        if math.isinf(left_s) and elapsed_s < _COPY_GAIN * slow.left / giver.rate:
            return False
        return slow.left / giver.rate * _COPY_GAIN < left_s


def _share_of(giver: Giver, usable: Sequence[Giver]) -> float:
    """How much of what all bring in some time comes with one reading of this giver.

    One of unknown rate counts as the average of the others.
    """
    rates = [other.rate for other in usable if other.rate]
    average = sum(rates) / len(rates) if rates else 1.0
    all_rates = sum(other.max_readings * (other.rate or average) for other in usable)
    return (giver.rate or average) / all_rates
