"""One blob's transfer in chunks: many holders asked at once, none of them trusted."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from shoal.network.blob_board import Board, Chunk, Giver, Reading
from shoal.network.blob_chunks import Span
from shoal.network.blob_parts import PartialBlob, to_the_end
from shoal.network.blob_sources import TRANSPORT_ERRORS, BlobSource, Holder, SourceOpener
from shoal.network.meters import Meters
from shoal.protocol.blob import CHUNK_BYTES, BlobRef
from shoal.protocol.errors import Expired, InvalidRequest, PeerFault, ShoalError, Unavailable

MoreSources = Callable[[], Awaitable[Sequence[str | Holder]]]
_LOG: Final = logging.getLogger(__name__)
_MAX_GIVERS: Final = 32
_FINE_READINGS: Final = 4
"""Small chunks on their way from all holders together, as long as each has one."""
_IDLE_WAIT_S: Final = 0.1
_MAX_CHECKS: Final = 4
"""Chunks being hashed and written while their holders already bring the next."""
# One may have been under way when the last holder was lost; the next knows of it.
_LAST_POLLS: Final = 2
_REST_AFTER_FAILURE_S: Final = 0.1
_FIRST_POLL_S: Final = 0.05
_POLL_SHARE: Final = 0.25
"""A pause between two questions is this share of the time since the transfer began."""
_MAX_REST_S: Final = 30.0


@dataclass(frozen=True, kw_only=True)
class FetchRules:
    """How patient a fetch is.

    Attributes:
        floor_bytes_per_s: A holder slower than this over `floor_window_s` is replaced.
        floor_window_s: How long it may be slow.
        stall_s: Longest wait while holders are connected and none has what is missing.
        poll_s: Longest pause between two questions for more sources.
    """

    floor_bytes_per_s: float = 8192.0
    floor_window_s: float = 10.0
    stall_s: float = 30.0
    poll_s: float = 0.5


@dataclass(kw_only=True)
class Listener:
    """Who is told how a fetch goes; every call is made in the asyncio loop."""

    on_bytes: Callable[[int], None] = lambda num_bytes: None
    on_chunk: Callable[[int], None] = lambda index: None
    on_given_up: Callable[[str, bool], None] = lambda source, lied: None
    more_sources: MoreSources | None = None


@dataclass
class _Reader:
    """One holder's source and the tasks that read from it."""

    giver: Giver
    source: BlobSource
    tasks: list[asyncio.Task[None]] = field(default_factory=list)


class Transfer:
    """Fetches a partial blob's missing chunks.

    Args:
        blob: The blob; open.
        board: Its chunks and pieces.
        opener: Opens sources.
        rules: How patient it is.
        listener: Who is told.
        meters: Where bytes and faults are counted.
    """

    def __init__(
        self,
        blob: PartialBlob,
        board: Board,
        opener: SourceOpener,
        rules: FetchRules,
        listener: Listener,
        meters: Meters,
    ) -> None:
        self._blob = blob
        self._board = board
        self._opener = opener
        self._rules = rules
        self._listener = listener
        self._meters = meters
        self._readers: dict[str, _Reader] = {}
        self._refused: dict[str, str] = {}
        self._reads: dict[Reading, asyncio.Future[None]] = {}
        self._checks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._now_s = asyncio.get_running_loop().time
        self._moved_s = self._now_s()
        self._polls_since_loss = 0
        self._has_chunk = board.num_left < len(blob.sizes)

    async def run(self, holders: Sequence[Holder]) -> None:
        """Every chunk is here, verified.

        Raises:
            Unavailable: No holder gives what is missing; names what was wrong with each.
        """
        poll: asyncio.Task[None] | None = None
        try:
            self._add(holders)
            if self._listener.more_sources is not None:
                poll = asyncio.ensure_future(self._poll(self._listener.more_sources))
            while not self._board.is_done:
                self._raise_failures(poll)
                if not (self._board.num_readings or self._checks) and self._is_hopeless():
                    raise nobody_has(self._blob.ref, self._faults())
                if not await self._wait(_IDLE_WAIT_S):
                    self._change()  # those who rested may be asked again
        finally:
            tasks = [task for reader in self._readers.values() for task in reader.tasks]
            tasks += [*self._checks, *([poll] if poll else [])]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _raise_failures(self, poll: asyncio.Task[None] | None) -> None:
        """Whatever ended a task that is not a holder's doing ends the transfer."""
        working = [task for reader in self._readers.values() for task in reader.tasks]
        for task in [*working, *self._checks]:
            if task.done():
                task.result()
        self._checks = {task for task in self._checks if not task.done()}
        if poll is not None and poll.done():
            poll.result()

    def _is_hopeless(self) -> bool:
        waited_s = self._now_s() - self._moved_s
        if waited_s >= self._rules.stall_s:
            return True
        if self._board.usable():
            return False
        # Whoever names sources hears of the loss first, and may then name another.
        return self._listener.more_sources is None or self._polls_since_loss >= _LAST_POLLS

    def _add(self, holders: Sequence[Holder]) -> None:
        for holder in holders:
            name = holder.source
            if name in self._readers:
                self._readers[name].giver.chunks = holder.chunks
                continue
            if name in self._refused or len(self._readers) >= _MAX_GIVERS:
                continue
            try:
                source = self._opener.open(holder)
            except ShoalError as error:
                self._refused[name] = error.message
                self._listener.on_given_up(name, False)
                continue
            giver = Giver(
                name,
                chunks=holder.chunks,
                max_readings=source.max_readings,
                max_piece_bytes=source.max_piece_bytes,
            )
            reader = self._readers[name] = _Reader(giver, source)
            self._board.givers[name] = giver
            self._moved_s = self._now_s()
            reader.tasks = [
                asyncio.ensure_future(self._work(reader)) for _ in range(source.max_readings)
            ]
        self._spread_thin()
        self._change()

    def _spread_thin(self) -> None:
        """Where many give small chunks, each is asked for few at once.

        Those who pass on share their lines among many; of three chunks asked of one at once
        each comes three times later, and the last ones are waited for.  So does the first, until
        which this node has nothing to pass on.
        """
        if self._blob.chunk_bytes == CHUNK_BYTES:
            return
        giving = [r for r in self._readers.values() if r.giver.chunks is None or r.giver.chunks]
        share = _FINE_READINGS // max(1, len(giving)) if self._has_chunk else 1
        for reader in self._readers.values():
            # Who holds all has most to give; its line must not rest between two questions.
            least = 2 if self._has_chunk and reader.giver.chunks is None else 1
            reader.giver.max_readings = max(least, min(reader.source.max_readings, share))

    async def _poll(self, more_sources: MoreSources) -> None:
        begun_s = self._now_s()
        while True:
            await asyncio.sleep(poll_pause_s(self._now_s() - begun_s, self._rules.poll_s))
            try:
                found = await more_sources()
            except ShoalError as error:
                _LOG.info("no more sources just now: %s", error)
            else:
                self._add([as_holder(source) for source in found])
            self._polls_since_loss += 1

    async def _work(self, reader: _Reader) -> None:
        giver = reader.giver
        while giver.is_usable and not self._board.is_done:
            reading = self._board.take(giver, self._now_s())
            if reading is None:
                await self._changed.wait()
                continue
            try:
                await self._read(reader, reading)
            finally:
                self._board.broke_off(reading)
                self._change()
        if not giver.is_usable:
            self._let_go(giver)

    def _let_go(self, giver: Giver) -> None:
        """Told once for each holder that is not asked again."""
        if giver.name not in self._refused:
            self._refused[giver.name] = giver.fault
            self._polls_since_loss = 0
            self._meters.count("blob_sources_given_up", lied=str(giver.lied).lower())
            _LOG.info("source %s is not asked again: %s", giver.name, giver.fault)
            self._listener.on_given_up(giver.name, giver.lied)

    async def _read(self, reader: _Reader, reading: Reading) -> None:
        giver = reader.giver
        try:
            if not await self._bring(reader, reading):
                return
        except PeerFault as error:
            # What nobody asked for is never bad luck: this holder is not asked again.
            giver.give_up(error.message, lied=True)
        except InvalidRequest as error:  # asking again cannot help, unless it is still fetching
            if error.code == "chunk_not_here":
                giver.lacks(reading.chunk.index, self._now_s())
            else:
                giver.give_up(error.message)
        except (ShoalError, *TRANSPORT_ERRORS) as error:
            self._failed(giver, error)
        else:
            chunk, needless = self._board.brought(reading, self._now_s())
            for other in needless:
                self._reads.pop(other).cancel()
            if chunk is not None:
                await self._check(chunk)

    async def _bring(self, reader: _Reader, reading: Reading) -> bool:
        """True when the piece is here; False when another holder brought it first."""

        def on_bytes(num_bytes: int) -> None:
            reading.got += num_bytes

        span = Span(
            digest=self._blob.ref.sha256,
            start=reading.chunk.index * self._blob.chunk_bytes + reading.start,
            size_bytes=reading.end - reading.start,
        )
        read = asyncio.ensure_future(reader.source.read_into(span, reading.room, on_bytes))
        self._reads[reading] = read
        try:
            while True:
                before = reading.got
                done, _ = await asyncio.wait({read}, timeout=self._rules.floor_window_s)
                if done:
                    break
                if reader.source.shows_progress:
                    self._require_floor(reading.got - before)
            if self._reads.get(reading) is not read:
                return False
            read.result()
            return True
        finally:
            self._reads.pop(reading, None)
            read.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await read
            self._meters.count("blob_bytes", reading.got, plane=_plane(reader), direction="in")

    def _require_floor(self, num_bytes: int) -> None:
        if num_bytes < self._rules.floor_bytes_per_s * self._rules.floor_window_s:
            raise Unavailable(
                f"The holder brought {num_bytes} bytes in {self._rules.floor_window_s:g} s, "
                "which is below the floor.",
                code="too_slow",
            )

    def _failed(self, giver: Giver, error: BaseException) -> None:
        now_s = self._now_s()
        if isinstance(error, Unavailable) and error.code == "overloaded":
            # It is there and says when to come back; only the stall clock ends this.
            giver.fault = error.message
            giver.rests_until_s = now_s + min(_MAX_REST_S, max(1, error.retry_after_s))
            return
        if giver.rests_until_s > now_s:  # its other readings failed for the same cause
            return
        giver.failures, giver.fault = giver.failures + 1, in_words(error)
        giver.rests_until_s = now_s + _REST_AFTER_FAILURE_S * 2**giver.failures

    async def _check(self, chunk: Chunk) -> None:
        """The chunk is being verified; waited for only where too many are."""
        self._checks.add(asyncio.ensure_future(self._verify(chunk)))
        while sum(not task.done() for task in self._checks) >= _MAX_CHECKS:
            await self._wait(_IDLE_WAIT_S)

    async def _verify(self, chunk: Chunk) -> None:
        right = await to_the_end(partial(self._blob.accept, chunk.index, chunk.room))
        if right:
            for liar in self._board.accept(chunk):
                self._caught(liar, chunk.index)
            self._moved_s = self._now_s()
            if not self._has_chunk:
                self._has_chunk = True
                self._spread_thin()
            self._listener.on_bytes(len(chunk.room))
            self._listener.on_chunk(chunk.index)
        else:
            only = self._board.reject(chunk)
            if only is not None:
                self._caught(only, chunk.index)
        self._change()

    def _caught(self, giver: Giver, index: int) -> None:
        giver.give_up(
            f"Chunk {index} of blob {self._blob.ref.sha256} has a wrong digest.", lied=True
        )
        self._let_go(giver)

    def _faults(self) -> dict[str, str]:
        asked = {name: reader.giver.fault for name, reader in self._readers.items()}
        return {
            **{name: fault or "it lacks chunks" for name, fault in asked.items()},
            **self._refused,
        }

    def _change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _wait(self, timeout_s: float) -> bool:
        """Whether something changed before the time was over."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._changed.wait()
        except TimeoutError:
            return False


def poll_pause_s(elapsed_s: float, longest_s: float) -> float:
    """How long to wait before the next question for more sources.

    Short in the beginning: while nobody knows who has the first chunks, the lines of all those
    who have them carry nothing.
    """
    return min(longest_s, max(_FIRST_POLL_S, _POLL_SHARE * elapsed_s))


def as_holder(source: str | Holder) -> Holder:
    """The holder; one given by its address alone is one's own word, and may be private."""
    if isinstance(source, Holder):
        return source
    return Holder(source.rstrip("/"), allow_private=True)


def nobody_has(ref: BlobRef, faults: dict[str, str]) -> Unavailable:
    """The error for a blob that no source gave."""
    tried = "; ".join(f"{name}: {fault or 'not asked'}" for name, fault in list(faults.items())[:8])
    return Unavailable(
        f"No source gave blob {ref.sha256}: {tried or 'none is known'}.",
        code="blob_unavailable",
        retry_after_s=2,
    )


def in_words(error: BaseException) -> str:
    """The error as half a sentence."""
    if isinstance(error, (TimeoutError, Expired)):
        return "it stopped answering"
    return (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(".")


def _plane(reader: _Reader) -> str:
    return "http" if reader.source.shows_progress else "p2p"
