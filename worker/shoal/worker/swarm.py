"""The blob plane of a worker that also asks other workers, and serves them what it holds.

Large blobs only: the orchestrator is asked who holds one, everybody who does is fetched from at
once, and what came is told as it comes.  A holder is a stranger and its word worth nothing;
the digest decides.  Where nobody is known, blobs come from the orchestrator as ever.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final
from weakref import WeakValueDictionary

from shoal.network.blob_chunks import FineList, num_chunks
from shoal.network.blob_delta import apply_delta
from shoal.network.blob_sources import Holder
from shoal.network.reachability import Scope, scope_of
from shoal.protocol.blob import CHUNK_BYTES, BlobRef
from shoal.protocol.errors import ShoalError, Unavailable
from shoal.protocol.holders import (
    FINE_CHUNK_BYTES,
    HOLDERS_PROTOCOL,
    MAX_FAULTS,
    MAX_FINE_BYTES,
    SWARM_BYTES,
    DeltaStep,
    HoldersReply,
    HoldersRequest,
    KnownHolder,
    chunks_in,
)
from shoal.worker.events import log_event, log_failure
from shoal.worker.session import Link
from shoal.worker.sharing import Sharing

if TYPE_CHECKING:
    from shoal.network.blob_client import BlobClient
    from shoal.network.blob_store import BlobStore
    from shoal.network.discovery import Discovery

LASTING_BYTES: Final = 64 << 20
"""Blobs from this size on, in practice bases, are worth a place in the table of providers."""
_ASK_TIMEOUT_S: Final = 5.0
_FIND_TIMEOUT_S: Final = 10.0
_MAX_REPLY_BYTES: Final = 2 << 20


class Swarm:
    """Fetches blobs from whoever holds them; hands in results as the client does.

    Args:
        client: What moves bytes.
        store: Where they come to lie.
        link: The way to the orchestrator.
        sharing: Told of what is held; None serves nothing to others.
        discovery: The table of providers, asked when the orchestrator knows nobody.
    """

    def __init__(
        self,
        client: BlobClient,
        store: BlobStore,
        link: Link,
        sharing: Sharing | None,
        discovery: Discovery | None = None,
    ) -> None:
        self._client = client
        self.store = store
        self._link = link
        self._sharing = sharing
        self._discovery = discovery
        self._providing: set[asyncio.Task[int]] = set()
        self._transfers: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def fetch(
        self,
        ref: BlobRef,
        sources: Sequence[str],
        *,
        timeout_s: float,
        on_bytes: Callable[[int], None] = lambda num_bytes: None,
    ) -> Path:
        """The blob is in the store, verified; its path there.

        Args:
            ref: What to fetch, from a record that is trusted.
            sources: The orchestrator's own holders, which are asked as well.
            timeout_s: The whole transfer's deadline.
            on_bytes: Told how many more bytes have come, as they come.

        Raises:
            Unavailable: nobody gave the right bytes.
            Expired: the transfer clock ran out.
            InvalidRequest: there is no source, or the blob does not fit the store.
        """
        if ref.size_bytes <= SWARM_BYTES or self.store.has(ref.sha256):
            return await self._client.fetch(ref, sources, timeout_s=timeout_s, on_bytes=on_bytes)
        until_s = time.monotonic() + timeout_s
        # Two who want the same blob ask once.
        async with self._transfers.setdefault(ref.sha256, asyncio.Lock()):
            search = Search(self._link, ref, self._sharing)
            known = await search.ask()
            path = await self._shortcut(ref, known, sources, until_s)
            if path is None:
                path = await self._anyhow(search, known, sources, until_s, on_bytes)
        self._note(ref)
        return path

    async def fetch_bytes(self, ref: BlobRef, sources: Sequence[str], *, timeout_s: float) -> bytes:
        """The blob's bytes, verified; small ones do not get into the store.  See `fetch`."""
        if ref.size_bytes <= SWARM_BYTES:
            return await self._client.fetch_bytes(ref, sources, timeout_s=timeout_s)
        path = await self.fetch(ref, sources, timeout_s=timeout_s)
        return await asyncio.to_thread(path.read_bytes)

    async def put(self, url: str, data: bytes, token: str, *, timeout_s: float) -> BlobRef:
        """``data`` is stored by the holder at ``url``; see `BlobClient.put`."""
        return await self._client.put(url, data, token, timeout_s=timeout_s)

    async def _anyhow(
        self,
        search: Search,
        known: HoldersReply | None,
        sources: Sequence[str],
        until_s: float,
        on_bytes: Callable[[int], None],
    ) -> Path:
        try:
            return await self._gather(search, known, sources, until_s, on_bytes)
        except Unavailable as error:
            log_failure("holders_failed", error, blob=search.ref.sha256)
            rest = await self._last_resorts(search.ref)
            if not rest:
                raise
            search.be_coarse()
        return await self._gather(search, None, [*sources, *rest], until_s, on_bytes)

    async def _last_resorts(self, ref: BlobRef) -> list[str | Holder]:
        """Who may be asked when everybody else failed.

        The orchestrator over the connection that carries the leases, which bulk would slow
        down; and, for large and lasting blobs, whoever the table of providers names.
        """
        rest: list[str | Holder] = []
        if self._link.peer is not None:
            rest.append(f"/p2p/{self._link.peer}")
        if self._discovery is not None and ref.size_bytes >= LASTING_BYTES:
            found = await self._discovery.find_providers(ref.sha256, timeout_s=_FIND_TIMEOUT_S)
            nearby = is_nearby(self._link.address)
            rest += [
                Holder(address)
                for contact in found
                for address in contact.addresses[:1]
                if may_dial(address, nearby=nearby)
            ]
        return rest

    async def _gather(
        self,
        search: Search,
        known: HoldersReply | None,
        sources: Sequence[str | Holder],
        until_s: float,
        on_bytes: Callable[[int], None],
    ) -> Path:
        try:
            return await self._client.fetch(
                search.ref,
                [*search.holders_in(known), *sources],
                timeout_s=max(0.0, until_s - time.monotonic()),
                on_bytes=on_bytes,
                on_chunk=search.note_chunk,
                more_sources=search.more,
                on_given_up=search.give_up,
                fine=search.fine,
            )
        finally:
            if search.has_news:
                await search.ask()

    async def _shortcut(
        self,
        ref: BlobRef,
        known: HoldersReply | None,
        sources: Sequence[str],
        until_s: float,
    ) -> Path | None:
        """The blob, made from one that is here; None where that is no shorter, or failed."""
        steps = () if known is None else shortest_chain(ref, known.deltas, self.store.has)
        try:
            for step in reversed(steps):
                await self._take_step(ref, step, sources, until_s)
        except ShoalError as error:
            # Whatever is wrong with a delta, the whole blob is not.
            log_failure("delta_failed", error, blob=ref.sha256)
            return None
        if not steps:
            return None
        num_bytes = sum(step.blob.size_bytes for step in steps)
        log_event("delta_applied", blob=ref.sha256, steps=len(steps), size_bytes=num_bytes)
        return self.store.path(ref.sha256)

    async def _take_step(
        self, ref: BlobRef, step: DeltaStep, sources: Sequence[str], until_s: float
    ) -> None:
        search = Search(self._link, step.blob, self._sharing)
        known = await search.ask() if step.blob.size_bytes > SWARM_BYTES else None
        path = await self._gather(search, known, sources, until_s, lambda num_bytes: None)
        self._note(step.blob)
        await asyncio.to_thread(self._apply, ref.size_bytes, step, path)
        self._client.settle_later(step.target_sha256)

    def _apply(self, size_bytes: int, step: DeltaStep, path: Path) -> None:
        self.store.reserve(size_bytes)
        with (
            self.store.open(step.base_sha256) as base,
            path.open("rb") as delta,
            self.store.draft() as draft,
        ):
            for block in apply_delta(base, delta, size_bytes):
                draft.write(block)
            draft.keep(expected=step.target_sha256, settled=False)

    def _note(self, ref: BlobRef) -> None:
        if self._sharing is None:
            return
        self._sharing.note(ref)
        if self._discovery is not None and ref.size_bytes >= LASTING_BYTES:
            # It asks many nodes; nobody waits for it.
            task = asyncio.create_task(self._discovery.provide(ref.sha256))
            self._providing.add(task)
            task.add_done_callback(self._providing.discard)

    async def close(self) -> None:
        """Nothing is being told to others any more."""
        for task in self._providing:
            task.cancel()
        await asyncio.gather(*self._providing, return_exceptions=True)


class Search:
    """Who holds one blob, asked again while it is being fetched.

    Args:
        link: The way to the orchestrator.
        ref: The blob.
        sharing: Told of the first chunk that came; each further question tells of more.
    """

    def __init__(self, link: Link, ref: BlobRef, sharing: Sharing | None) -> None:
        self.ref = ref
        self._link = link
        self._sharing = sharing
        self._peers: dict[str, str] = {}
        self._useless: set[str] = set()
        self._liars: dict[str, None] = {}
        self.fine: FineList | None = None
        self.chunk_bytes = CHUNK_BYTES
        """In which chunks it is fetched; smaller ones once a fine list has come."""
        self.has_news = False
        """Whether the orchestrator has not yet been told of some holder that lied."""

    async def ask(self) -> HoldersReply | None:
        """What the orchestrator knows of the blob; None when it does not answer."""
        try:
            known = await self._ask(fine=self.ref.size_bytes <= MAX_FINE_BYTES)
            self._note_fine(known)
            return known
        except ShoalError as error:
            log_failure("holders_unknown", error, blob=self.ref.sha256)
            return None

    async def more(self) -> Sequence[Holder]:
        """The holders known now.

        Raises:
            ShoalError: the orchestrator does not answer; those known before are still good.
        """
        return self.holders_in(await self._ask())

    def be_coarse(self) -> None:
        """The fine list, which may be what was wrong, is not used any more."""
        self.fine, self.chunk_bytes = None, CHUNK_BYTES

    def note_chunk(self, index: int) -> None:
        """Another chunk is here, and served."""
        if self._sharing is not None and not self._sharing.knows(self.ref):
            self._sharing.note(self.ref)

    def give_up(self, source: str, lied: bool) -> None:
        """``source`` is not asked again; one that ``lied`` is told of at the next question."""
        self._useless.add(source)
        peer = self._peers.get(source)
        if lied and peer is not None:
            self._liars[peer] = None
            self.has_news = True

    def holders_in(self, known: HoldersReply | None) -> list[Holder]:
        """One source for each holder, the first of its own that was not yet given up on."""
        nearby = is_nearby(self._link.address)
        found = [] if known is None else [self._holder(one, nearby) for one in known.holders]
        return [holder for holder in found if holder is not None]

    def _note_fine(self, known: HoldersReply) -> None:
        if known.fine_sha256 is not None:
            fine = FineList(chunk_bytes=FINE_CHUNK_BYTES, digests=bytes.fromhex(known.fine_sha256))
            if fine.fits(self.ref):
                self.fine, self.chunk_bytes = fine, FINE_CHUNK_BYTES

    async def _ask(self, *, fine: bool = False) -> HoldersReply:
        held = None if self._sharing is None else self._sharing.holding_of(self.ref)
        request = HoldersRequest(
            sha256=self.ref.sha256,
            faults=tuple(self._liars)[-MAX_FAULTS:],
            fine=fine,
        )
        if held is not None:
            more = {"chunks": held.chunks, "chunk_bytes": held.chunk_bytes}
            request = request.model_copy(update=more)
        raw = await self._link.request(HOLDERS_PROTOCOL, request.encode(), timeout_s=_ASK_TIMEOUT_S)
        self.has_news = False
        return HoldersReply.decode(raw, max_bytes=_MAX_REPLY_BYTES)

    def _holder(self, known: KnownHolder, nearby: bool) -> Holder | None:
        if known.peer in self._liars:
            return None
        chunks = None
        if known.chunks is not None:
            if known.chunk_bytes != self.chunk_bytes:
                # What it has would have to be told in our own chunks; whole, it is welcome.
                return None
            chunks = chunks_in(known.chunks, num_chunks(self.ref.size_bytes, known.chunk_bytes))
        for source in known.sources:
            if source not in self._useless and may_dial(source, nearby=nearby):
                self._peers[source] = known.peer
                return Holder(source, chunks, allow_private=nearby)
        return None


def is_nearby(address: str | None) -> bool:
    """Whether an orchestrator reached at ``address`` shares this machine's private network.

    Only then may a holder, whom nobody vouches for, name a private address: its worker sits
    behind the same router.  From the Internet such a name could only mean a trap.
    """
    return address is not None and scope_of(address) in {Scope.PRIVATE, Scope.LOOPBACK}


def may_dial(source: str, *, nearby: bool) -> bool:
    """Whether a libp2p address named by a stranger is dialled; HTTP has rules of its own."""
    if not source.startswith("/") or source.startswith("/p2p/"):
        return True
    scope = scope_of(source)
    return scope is Scope.PUBLIC or (nearby and scope is not None)


def shortest_chain(
    ref: BlobRef, deltas: Iterable[DeltaStep], has: Callable[[str], bool]
) -> tuple[DeltaStep, ...]:
    """The steps, last first, from a blob that is here; none where the whole blob is less to fetch.

    Args:
        ref: The blob wanted.
        deltas: A chain that ends with it, last step first.
        has: Whether a blob is here.
    """
    steps: list[DeltaStep] = []
    num_bytes = 0
    for step in deltas:
        if not steps and step.target_sha256 != ref.sha256:
            return ()
        steps.append(step)
        num_bytes += step.blob.size_bytes
        if num_bytes >= ref.size_bytes:
            return ()
        if has(step.base_sha256):
            return tuple(steps)
    return ()
