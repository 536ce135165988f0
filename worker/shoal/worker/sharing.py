"""Tells the orchestrator which blobs this worker holds and serves, so that others ask it too."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from shoal.network.blob_chunks import num_chunks
from shoal.protocol.blob import BlobRef
from shoal.protocol.errors import ShoalError
from shoal.protocol.holders import (
    HAVE_PROTOCOL,
    MAX_HOLDINGS,
    SWARM_BYTES,
    HaveNotice,
    HaveReply,
    Holding,
    chunk_map,
)
from shoal.worker.events import log_failure
from shoal.worker.session import Backoff, Link

if TYPE_CHECKING:
    from shoal.network.blob_store import BlobStore

_BATCH_S: Final = 0.1
_FIRST_TTL_MS: Final = 60_000
_MAX_SHARED: Final = 256
"""As many as the orchestrator remembers of one worker."""
_REQUEST_TIMEOUT_S: Final = 10.0


@dataclass(frozen=True, kw_only=True)
class Stall:
    """Where others may ask this worker for blobs.

    Attributes:
        sources: Addresses known in advance; the node itself is always one.
        http_port: Port on which blobs are served at every address of this machine; absent,
            they are not, or only at an address that is among the sources.
    """

    sources: tuple[str, ...]
    http_port: int | None = None


class Sharing:
    """Keeps the orchestrator's list of what this worker holds true, batched.

    Args:
        link: The way to the orchestrator.
        store: What is held.
        stall: Where it is served, as things are now.
    """

    def __init__(self, link: Link, store: BlobStore, stall: Callable[[], Stall]) -> None:
        self._link = link
        self._store = store
        self._stall = stall
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._dirty: dict[str, None] = {}
        self._changed = asyncio.Event()

    def holding_of(self, ref: BlobRef) -> Holding | None:
        """What is held of the blob now; None when nothing is."""
        return self._holding(ref.sha256, ref.size_bytes)

    def knows(self, ref: BlobRef) -> bool:
        """Whether the blob is among those told of."""
        return ref.sha256 in self._sizes

    def note(self, ref: BlobRef) -> None:
        """More of the blob is held than was told, or less."""
        self._note(ref.sha256, ref.size_bytes)
        self._changed.set()

    async def run(self) -> None:
        """What is held is told when it changes, when it would lapse, and after each joining."""
        for sha256 in self._store.digests():
            self._note(sha256, self._store.size_of(sha256))
        pause = Backoff()
        while True:
            await self._link.wait_joined()
            try:
                await self._serve_session(pause)
            except ShoalError as error:
                log_failure("holdings_not_told", error)
                await asyncio.sleep(pause.next_s())

    async def _serve_session(self, pause: Backoff) -> None:
        self._dirty |= dict.fromkeys(self._sizes)
        ttl_ms = _FIRST_TTL_MS
        while True:
            self._changed.clear()
            if self._dirty:
                ttl_ms = await self._tell_all()
                pause.reset()
                # What changes in this time is told together; after a quiet while, at once.
                await asyncio.sleep(_BATCH_S)
            if not await self._wait_change(ttl_ms / 1000 / 3):
                self._dirty |= dict.fromkeys(self._sizes)

    async def _wait_change(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return False
        return True

    async def _tell_all(self) -> int:
        while True:
            batch = tuple(self._dirty)[:MAX_HOLDINGS]
            notice = self._notice(batch)
            raw = await self._link.request(
                HAVE_PROTOCOL, notice.encode(), timeout_s=_REQUEST_TIMEOUT_S
            )
            for sha256 in batch:
                self._dirty.pop(sha256, None)
            for sha256 in notice.gone:
                self._sizes.pop(sha256, None)
            if not self._dirty:
                return HaveReply.decode(raw).ttl_ms

    def _notice(self, batch: Sequence[str]) -> HaveNotice:
        holdings, gone = [], []
        for sha256 in batch:
            holding = self._holding(sha256, self._sizes[sha256])
            if holding is None:
                gone.append(sha256)
            else:
                holdings.append(holding)
        stall = self._stall()
        return HaveNotice(
            sources=stall.sources,
            http_port=stall.http_port,
            holdings=tuple(holdings),
            gone=tuple(gone),
        )

    def _holding(self, sha256: str, size_bytes: int) -> Holding | None:
        if self._store.has(sha256):
            return Holding(sha256=sha256)
        held = self._store.held_chunks(sha256)
        if not held:
            return None
        chunk_bytes = self._store.chunk_bytes_of(sha256)
        chunks = chunk_map(held, num_chunks(size_bytes, chunk_bytes))
        fields = {"sha256": sha256, "chunks": chunks, "chunk_bytes": chunk_bytes}
        return Holding.model_validate(fields)

    def _note(self, sha256: str, size_bytes: int) -> None:
        if size_bytes <= SWARM_BYTES:
            return
        self._sizes[sha256] = size_bytes
        self._sizes.move_to_end(sha256)
        self._dirty[sha256] = None
        if len(self._sizes) > _MAX_SHARED:
            oldest = next(iter(self._sizes))
            del self._sizes[oldest]
            self._dirty.pop(oldest, None)
