"""Fetches blobs from several holders at once, trusting none of them, and uploads them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Final, TypeVar
from weakref import WeakValueDictionary

import aiohttp

from shoal.network.blob_board import Board
from shoal.network.blob_chunks import FineList, Span, num_chunks
from shoal.network.blob_draft import wrong_digest
from shoal.network.blob_parts import PartialBlob, to_the_end
from shoal.network.blob_sources import (
    CONNECT_TIMEOUT_S,
    TRANSPORT_ERRORS,
    BlobSource,
    Holder,
    SourceOpener,
    refusal,
)
from shoal.network.blob_store import BlobStore
from shoal.network.blob_transfer import (
    FetchRules,
    Listener,
    MoreSources,
    Transfer,
    as_holder,
    in_words,
    nobody_has,
)
from shoal.network.meters import Meters
from shoal.network.port import Network
from shoal.protocol.blob import CHUNK_BYTES, BlobRef
from shoal.protocol.errors import (
    Clock,
    Expired,
    InvalidRequest,
    PeerFault,
    ShoalError,
    Unavailable,
)

_LOG: Final = logging.getLogger(__name__)
_T = TypeVar("_T")
_DIGEST_BYTES: Final = 32
_AT_ONCE_BYTES: Final = 1 << 20
"""What is no longer is hashed and sent in one go: handing it to a thread, or sending it bit by
bit, would cost more than it holds the loop up."""
_SETTLE_AFTER_S: Final = 1.0
_OUR_DISK: Final = frozenset({"store_full", "disk_full"})


class BlobClient:
    """Brings blobs into a store.

    Args:
        store: Where blobs go, and where one that is already there is found.
        network: The way to holders that are peers; None asks HTTP holders only.
        rules: How patient a fetch is.
        meters: Where bytes and faults are counted; the network's own when absent.
    """

    def __init__(
        self,
        store: BlobStore,
        network: Network | None = None,
        *,
        rules: FetchRules | None = None,
        meters: Meters | None = None,
    ) -> None:
        self._store = store
        self._rules = rules or FetchRules()
        self._meters = meters or (network.meters if network is not None else Meters())
        self._opener = SourceOpener(network, self._rules.floor_bytes_per_s)
        self._transfers: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._settling: set[asyncio.Task[None]] = set()
        self._closing = asyncio.Event()

    async def __aenter__(self) -> BlobClient:
        """The client may be used; leaving the block closes it."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """The client's connections are closed."""
        await self.close()

    async def close(self) -> None:
        """Connections are closed and what was fetched is on the disk; twice does nothing."""
        self._closing.set()
        await self._opener.close()
        await asyncio.gather(*self._settling)

    async def fetch(
        self,
        ref: BlobRef,
        sources: Sequence[str | Holder],
        *,
        timeout_s: float,
        on_bytes: Callable[[int], None] = lambda num_bytes: None,
        on_chunk: Callable[[int], None] | None = None,
        more_sources: MoreSources | None = None,
        on_given_up: Callable[[str, bool], None] = lambda source, lied: None,
        fine: FineList | None = None,
    ) -> Path:
        """The blob is in the store, verified; its path there.

        Args:
            ref: What to fetch, from a record that is trusted.
            sources: Holders.  One given by its address alone is one's own word and may be at
                a private address; see `Holder`.  A blob of one chunk is asked of one after
                the other, a larger one of all at once.
            timeout_s: The whole transfer's deadline.  What was verified before a failure is
                kept, and a later call goes on from there.
            on_bytes: Told how many more bytes have come and were found right.
            on_chunk: Told each chunk that is here and served from now on, those that a call
                before this one had brought included.
            more_sources: Asked now and then, while chunks are missing, for all the holders
                known by then.
            on_given_up: Told once of each source that is not asked again, and whether it
                sent what no honest holder sends.
            fine: Digests of smaller chunks, so that each can be passed on sooner.  Nobody need
                vouch for them: the blob's own digest still decides.

        Raises:
            Unavailable: No holder gave the right bytes; names what was wrong with each.
            Expired: The transfer clock ran out.
            InvalidRequest: There is no source, or the blob does not fit the store.
        """
        if self._store.has(ref.sha256):
            return self._store.path(ref.sha256)
        holders = [] if more_sources is not None and not sources else _named(ref, sources)
        listener = Listener(
            on_bytes=on_bytes,
            on_chunk=on_chunk or (lambda index: None),
            on_given_up=on_given_up,
            more_sources=more_sources,
        )
        # Those who exchange chunks had better hold different ones; alone, in order is cheapest.
        swarms = on_chunk is not None or more_sources is not None
        order = random.Random() if swarms else None
        # Two who want the same blob share one transfer.
        async with _in_time(ref, timeout_s), self._transfer_of(ref.sha256):
            await self._fetch_missing(ref, holders, listener, order, fine)
        return self._store.path(ref.sha256)

    async def fetch_bytes(
        self, ref: BlobRef, sources: Sequence[str | Holder], *, timeout_s: float
    ) -> bytes:
        """The blob's bytes, verified; see `fetch`.

        One chunk goes from memory to memory unless it is in the store: the disk would cost more
        than fetching it again.
        """
        if ref.size_bytes > CHUNK_BYTES or self._store.has(ref.sha256):
            await self.fetch(ref, sources, timeout_s=timeout_s)
            return await asyncio.to_thread(self._store.read, ref.sha256)
        async with _in_time(ref, timeout_s):
            return await self._ask_each(ref, _named(ref, sources), Listener(), self._read_alone)

    async def put(
        self, url: str, data: bytes | Path, token: str, *, timeout_s: float = 60.0
    ) -> BlobRef:
        """The blob is at the holder; its reference.

        A file, and what has several chunks, is in our store afterwards too.

        Raises:
            ShoalError: The holder refused it, with its reason.
            Unavailable: The holder does not answer.
            Expired: The transfer clock ran out.
        """
        if isinstance(data, bytes) and len(data) <= CHUNK_BYTES:
            ref = BlobRef(sha256=await _sha256_of(data), size_bytes=len(data))
            body = data if len(data) <= _AT_ONCE_BYTES else io.BytesIO(data)
            await self._upload(url, ref, body, token, timeout_s)
            return ref
        if isinstance(data, Path):
            ref = await asyncio.to_thread(self._store.put_file, data, pin=True)
        else:
            # The holder syncs what it takes; ours is a copy.
            ref = await asyncio.to_thread(self._store.put_bytes, data, pin=True, settled=False)
        try:
            stored = io.BytesIO(data) if isinstance(data, bytes) else self._store.open(ref.sha256)
            await self._upload(url, ref, stored, token, timeout_s)
        finally:
            self.settle_later(ref.sha256)
            self._store.unpin(ref.sha256)
            if ref.chunks_sha256 is not None:
                self._store.unpin(ref.chunks_sha256)
        return ref

    async def _upload(
        self, url: str, ref: BlobRef, body: bytes | IO[bytes], token: str, timeout_s: float
    ) -> None:
        address = f"{url.rstrip('/')}/blobs/{ref.sha256}"
        headers = {"Authorization": f"Bearer {token}", "Content-Length": str(ref.size_bytes)}
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        try:
            async with self._opener.session(allow_private=True, uploads=True).put(
                address, data=body, headers=headers, timeout=timeout
            ) as answer:
                if answer.status not in {200, 201}:
                    raise await refusal(answer)
        except (aiohttp.ClientError, ConnectionError) as error:
            raise Unavailable(
                f"The upload to {address} failed: {in_words(error)}.", code="upload_failed"
            ) from error
        except TimeoutError:
            raise Expired(
                f"The upload to {address} did not finish within {timeout_s:g} s.",
                clock=Clock.TRANSFER,
            ) from None
        self._meters.count("blob_bytes", ref.size_bytes, plane="http", direction="out")

    def _transfer_of(self, digest: str) -> asyncio.Lock:
        lock = self._transfers.get(digest)
        if lock is None:
            self._transfers[digest] = lock = asyncio.Lock()
        return lock

    async def _fetch_missing(
        self,
        ref: BlobRef,
        holders: Sequence[Holder],
        listener: Listener,
        order: random.Random | None,
        fine: FineList | None,
    ) -> None:
        if self._store.has(ref.sha256):
            return
        if fine is not None and fine.fits(ref) and holders:
            try:
                await self._fetch_finely(ref, fine, holders, listener, order)
            except (PeerFault, Unavailable) as error:
                # A wrong list makes liars of all; the usual one, which is signed for, decides.
                if error.code in _OUR_DISK:
                    raise
                _LOG.info("the fine list of blob %s is of no use: %s", ref.sha256, error)
            else:
                return
        if ref.size_bytes <= CHUNK_BYTES or ref.chunks_sha256 is None:
            self._store.reserve(ref.size_bytes)
            if not holders and listener.more_sources is not None:
                holders = [as_holder(source) for source in await listener.more_sources()]
            await self._fetch_whole(ref, holders, listener)
        else:
            await self._fetch_chunks(ref, ref.chunks_sha256, holders, listener, order)

    async def _fetch_whole(
        self, ref: BlobRef, holders: Sequence[Holder], listener: Listener
    ) -> None:
        """The blob is in the store, from the first holder that has it right."""
        await self._ask_each(ref, holders, listener, self._read_whole)
        self.settle_later(ref.sha256)
        listener.on_bytes(ref.size_bytes)

    async def _ask_each(
        self,
        ref: BlobRef,
        holders: Sequence[Holder],
        listener: Listener,
        read: Callable[[BlobRef, BlobSource], Awaitable[_T]],
    ) -> _T:
        """What `read` makes of the first holder that has the blob right."""
        faults: dict[str, str] = {}
        waited_s = 0.0
        while holders:
            busy: list[Holder] = []
            rest_s = self._rules.stall_s
            for holder in holders:
                try:
                    return await read(ref, self._opener.open(holder))
                except (ShoalError, *TRANSPORT_ERRORS) as error:
                    if isinstance(error, Unavailable) and error.code in _OUR_DISK:
                        raise
                    faults[holder.source] = in_words(error)
                    if isinstance(error, Unavailable) and error.code == "overloaded":
                        busy.append(holder)
                        rest_s = min(rest_s, max(1.0, error.retry_after_s))
                        continue
                    _LOG.info("source %s failed for blob %s: %s", holder.source, ref.sha256, error)
                    listener.on_given_up(holder.source, isinstance(error, PeerFault))
            holders, waited_s = busy, waited_s + rest_s
            if waited_s > self._rules.stall_s:
                break
            if busy:
                await asyncio.sleep(rest_s)
        raise nobody_has(ref, faults)

    async def _read_alone(self, ref: BlobRef, source: BlobSource) -> bytes:
        """A blob of one chunk, from memory to memory."""
        span = Span(digest=ref.sha256, start=0, size_bytes=ref.size_bytes, is_whole=True)
        data = await self._read_span(span, source)
        digest = await _sha256_of(data)
        if digest != ref.sha256:
            raise wrong_digest(ref.sha256, digest)
        return bytes(data)

    async def _read_whole(self, ref: BlobRef, source: BlobSource) -> None:
        """A blob into the store, one chunk after the other."""
        with self._store.draft() as draft:
            # A blob without a chunk list is one chunk, unless its reference is a poor one.
            for start in range(0, ref.size_bytes, CHUNK_BYTES):
                size_bytes = min(CHUNK_BYTES, ref.size_bytes - start)
                span = Span(
                    digest=ref.sha256,
                    start=start,
                    size_bytes=size_bytes,
                    is_whole=size_bytes == ref.size_bytes,
                )
                draft.write(await self._read_span(span, source))
            await to_the_end(lambda: draft.keep(expected=ref.sha256, settled=False))

    async def _read_span(self, span: Span, source: BlobSource) -> bytearray:
        room = bytearray(span.size_bytes)
        # A holder that dribbles is as little use as one that is silent.
        async with asyncio.timeout(
            self._rules.floor_window_s + span.size_bytes / self._rules.floor_bytes_per_s
        ):
            await source.read_into(span, memoryview(room), lambda num_bytes: None)
        plane = "http" if source.shows_progress else "p2p"
        self._meters.count("blob_bytes", span.size_bytes, plane=plane, direction="in")
        return room

    async def _fetch_chunks(
        self,
        ref: BlobRef,
        chunk_list: str,
        holders: Sequence[Holder],
        listener: Listener,
        order: random.Random | None,
    ) -> None:
        list_ref = BlobRef(sha256=chunk_list, size_bytes=_DIGEST_BYTES * num_chunks(ref.size_bytes))
        if not self._store.has(chunk_list):
            await self._fetch_whole(list_ref, holders, Listener())
        self._store.pin(chunk_list)
        try:
            digests = self._store.read(chunk_list)
            if len(digests) != list_ref.size_bytes:
                raise InvalidRequest(
                    f"The chunk list of blob {ref.sha256} does not match the blob's size; "
                    "ask for a right reference."
                )
            with PartialBlob(self._store, ref, digests) as blob:
                await self._assemble(blob, holders, listener, order)
        finally:
            self._store.unpin(chunk_list)
        self.settle_later(ref.sha256)

    async def _fetch_finely(
        self,
        ref: BlobRef,
        fine: FineList,
        holders: Sequence[Holder],
        listener: Listener,
        order: random.Random | None,
    ) -> None:
        with PartialBlob(self._store, ref, fine.digests, fine.chunk_bytes) as blob:
            await self._assemble(blob, holders, listener, order)
        self.settle_later(ref.sha256, is_listed=False)

    def settle_later(self, digest: str, *, is_listed: bool = True) -> None:
        """The blob's bytes are on their way to the disk; `close` waits for them.

        Args:
            digest: The blob.
            is_listed: Whether the list of its chunks is here too; it is made otherwise, for
                those who ask this node and have no fine list.
        """
        settling = asyncio.ensure_future(self._settle(digest, is_listed))
        self._settling.add(settling)
        settling.add_done_callback(self._settling.discard)

    async def _settle(self, digest: str, is_listed: bool) -> None:
        # Whoever waited for the blob uses it first.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SETTLE_AFTER_S):
                await self._closing.wait()
        try:
            await asyncio.to_thread(self._store.settle, digest)
            if not is_listed:
                await asyncio.to_thread(self._store.list_chunks, digest)
        except ShoalError as error:  # it is gone again, or will be fetched again after a crash
            _LOG.info("blob %s did not settle: %s", digest, error)

    async def _assemble(
        self,
        blob: PartialBlob,
        holders: Sequence[Holder],
        listener: Listener,
        order: random.Random | None,
    ) -> None:
        missing = await to_the_end(blob.missing)
        for index in sorted(set(range(len(blob.sizes))).difference(missing)):
            listener.on_chunk(index)
        board = Board(blob.sizes, missing, order)
        transfer = Transfer(blob, board, self._opener, self._rules, listener, self._meters)
        await transfer.run(holders)
        await to_the_end(blob.keep)


def _named(ref: BlobRef, sources: Sequence[str | Holder]) -> list[Holder]:
    """The holders, each once."""
    if not sources:
        raise InvalidRequest(f"Blob {ref.sha256} has no source to be fetched from.")
    return list({holder.source: holder for holder in map(as_holder, sources)}.values())


async def _sha256_of(data: bytes | bytearray) -> str:
    if len(data) <= _AT_ONCE_BYTES:
        return hashlib.sha256(data).hexdigest()
    return (await asyncio.to_thread(hashlib.sha256, data)).hexdigest()


@contextlib.asynccontextmanager
async def _in_time(ref: BlobRef, timeout_s: float) -> AsyncIterator[None]:
    """What is inside ends by its clock, or is ended."""
    try:
        async with asyncio.timeout(timeout_s) as deadline:
            yield
    except TimeoutError:
        if not deadline.expired():
            raise
        raise Expired(
            f"Blob {ref.sha256} was not fetched within {timeout_s:g} s; "
            "what was verified is kept for the next try.",
            clock=Clock.TRANSFER,
        ) from None
