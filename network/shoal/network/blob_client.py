"""Fetches blobs from several holders at once, trusting none of them, and uploads them."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final
from weakref import WeakValueDictionary

import aiohttp

from shoal.network.blob_parts import PartialBlob
from shoal.network.blob_store import BlobStore, chunk_sizes
from shoal.protocol.blob import CHUNK_BYTES, BlobRef
from shoal.protocol.canonical import parse_json
from shoal.protocol.errors import (
    Clock,
    Expired,
    InvalidRequest,
    PeerFault,
    ShoalError,
    Unavailable,
    error_from_wire,
)

_LOG: Final = logging.getLogger(__name__)
_READ_BYTES: Final = 1 << 18
_MAX_ERROR_BYTES: Final = 16 << 10
_DIGEST_BYTES: Final = 32
# One range in flight and one on its way per holder keeps its disk and our hashing both busy.
_RANGES_PER_SOURCE: Final = 2
_CONNECT_TIMEOUT_S: Final = 5.0
_PAUSE_TIMEOUT_S: Final = 15.0
_TRIES_PER_SOURCE: Final = 3
_TRANSPORT_ERRORS: Final = (aiohttp.ClientError, ConnectionError, TimeoutError)


@dataclass
class _Source:
    """One holder and what became of asking it; ``on_bytes`` hears how many more came."""

    url: str
    on_bytes: Callable[[int], None]
    failures: int = 0
    fault: str = ""

    @property
    def usable(self) -> bool:
        return self.failures < _TRIES_PER_SOURCE


@dataclass
class _Queue:
    """The chunks still to fetch, shared by every holder's workers."""

    waiting: list[int]
    done: int = 0
    total: int = 0
    in_flight: int = 0
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def take(self) -> int | None:
        """The next chunk, or None when all are done; waits while others work on the last."""
        async with self.changed:
            while not self.waiting:
                if self.done == self.total:
                    return None
                await self.changed.wait()
            self.in_flight += 1
            return self.waiting.pop()

    async def finish(self, index: int, *, fetched: bool) -> None:
        """The chunk is done, or waits for another try."""
        async with self.changed:
            self.in_flight -= 1
            if fetched:
                self.done += 1
            else:
                self.waiting.append(index)
            self.changed.notify_all()


class BlobClient:
    """Brings blobs into a store; one HTTP session, whose connections are reused.

    Args:
        store: Where blobs go, and where one that is already there is found.
    """

    def __init__(self, store: BlobStore) -> None:
        self._store = store
        self._session: aiohttp.ClientSession | None = None
        self._transfers: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

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
        """The client's connections are closed; a second call does nothing."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

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
            sources: Base addresses of holders, as ``http://host:port``; the first is asked
                first, and all at once when the blob has several chunks.
            timeout_s: The whole transfer's deadline.  What was verified before a failure is
                kept, and a later call goes on from there.
            on_bytes: Told how many more bytes have come, as they come.

        Raises:
            Unavailable: No holder gave the right bytes; names what was wrong with each.
            Expired: The transfer clock ran out.
            InvalidRequest: There is no source, or the blob does not fit the store.
        """
        if self._store.has(ref.sha256):
            return self._store.path(ref.sha256)
        if not sources:
            raise InvalidRequest(f"Blob {ref.sha256} has no source to be fetched from.")
        holders = [_Source(url.rstrip("/"), on_bytes) for url in dict.fromkeys(sources)]
        try:
            async with asyncio.timeout(timeout_s) as deadline:
                # Two who want the same blob share one transfer.
                async with self._transfer_of(ref.sha256):
                    await self._fetch_missing(ref, holders)
        except TimeoutError:
            if not deadline.expired():
                raise
            raise Expired(
                f"Blob {ref.sha256} was not fetched within {timeout_s:g} s; "
                "what was verified is kept for the next try.",
                clock=Clock.TRANSFER,
            ) from None
        return self._store.path(ref.sha256)

    async def fetch_bytes(self, ref: BlobRef, sources: Sequence[str], *, timeout_s: float) -> bytes:
        """The blob's bytes; see `fetch`."""
        await self.fetch(ref, sources, timeout_s=timeout_s)
        return await asyncio.to_thread(self._store.read, ref.sha256)

    async def put(
        self, url: str, data: bytes | Path, token: str, *, timeout_s: float = 60.0
    ) -> BlobRef:
        """The blob is at the holder and in our store; its reference.

        Raises:
            ShoalError: The holder refused it, with its reason.
            Unavailable: The holder does not answer.
            Expired: The transfer clock ran out.
        """
        if isinstance(data, Path):
            ref = await asyncio.to_thread(self._store.put_file, data, pin=True)
        else:
            ref = await asyncio.to_thread(self._store.put_bytes, data, pin=True)
        try:
            await self._upload(f"{url.rstrip('/')}/blobs/{ref.sha256}", ref, token, timeout_s)
        finally:
            self._store.unpin(ref.sha256)
            if ref.chunks_sha256 is not None:
                self._store.unpin(ref.chunks_sha256)
        return ref

    async def _upload(self, address: str, ref: BlobRef, token: str, timeout_s: float) -> None:
        headers = {"Authorization": f"Bearer {token}", "Content-Length": str(ref.size_bytes)}
        small = ref.size_bytes <= CHUNK_BYTES
        body = self._store.read(ref.sha256) if small else self._store.open(ref.sha256)
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=_CONNECT_TIMEOUT_S)
        try:
            async with self._http().put(
                address, data=body, headers=headers, timeout=timeout
            ) as answer:
                if answer.status not in {200, 201}:
                    raise await _refusal(answer)
        except TimeoutError:
            raise Expired(
                f"The upload to {address} did not finish within {timeout_s:g} s.",
                clock=Clock.TRANSFER,
            ) from None
        except (aiohttp.ClientError, ConnectionError) as error:
            raise Unavailable(
                f"The upload to {address} failed: {_in_words(error)}.", code="upload_failed"
            ) from error

    def _transfer_of(self, digest: str) -> asyncio.Lock:
        lock = self._transfers.get(digest)
        if lock is None:
            self._transfers[digest] = lock = asyncio.Lock()
        return lock

    async def _fetch_missing(self, ref: BlobRef, holders: list[_Source]) -> None:
        if self._store.has(ref.sha256):
            return
        self._store.reserve(ref.size_bytes)
        if ref.size_bytes <= CHUNK_BYTES or ref.chunks_sha256 is None:
            await self._fetch_whole(ref, holders)
        else:
            await self._fetch_chunks(ref, ref.chunks_sha256, holders)

    async def _fetch_whole(self, ref: BlobRef, holders: list[_Source]) -> None:
        """The blob came in one request from the first holder that has it right."""
        for holder in holders:
            try:
                await self._stream_whole(ref, holder)
            except (ShoalError, *_TRANSPORT_ERRORS) as error:
                if isinstance(error, Unavailable) and error.code == "store_full":
                    raise
                holder.fault = _in_words(error)
                _LOG.info("source %s failed for blob %s: %s", holder.url, ref.sha256, holder.fault)
            else:
                return
        raise _nobody(ref, holders)

    async def _stream_whole(self, ref: BlobRef, holder: _Source) -> None:
        with self._store.draft() as draft:
            async with self._get(ref.sha256, holder) as answer:
                await _check_status(answer, 200)
                async for part in answer.content.iter_chunked(_READ_BYTES):
                    if draft.size_bytes + len(part) > ref.size_bytes:
                        raise _oversize(ref.size_bytes)
                    draft.write(part)
                    holder.on_bytes(len(part))
                    if draft.size_bytes == ref.size_bytes:
                        break
            # Too few bytes need no check of their own: they cannot hash to the digest.
            await asyncio.to_thread(draft.keep, expected=ref.sha256)

    async def _fetch_chunks(self, ref: BlobRef, chunk_list: str, holders: list[_Source]) -> None:
        sizes = chunk_sizes(ref.size_bytes)
        list_ref = BlobRef(sha256=chunk_list, size_bytes=_DIGEST_BYTES * len(sizes))
        if not self._store.has(chunk_list):
            await self._fetch_whole(list_ref, holders)
        digests = self._store.read(chunk_list)
        if len(digests) != list_ref.size_bytes:
            raise InvalidRequest(
                f"The chunk list of blob {ref.sha256} does not match the blob's size; "
                "ask for a right reference."
            )
        with PartialBlob(self._store, ref, digests) as partial:
            missing = await asyncio.to_thread(partial.missing)
            queue = _Queue(waiting=missing[::-1], done=len(sizes) - len(missing), total=len(sizes))
            await self._drain(queue, partial, holders)
            if queue.done < queue.total:
                raise _nobody(ref, holders)
            await asyncio.to_thread(partial.keep)

    async def _drain(self, queue: _Queue, partial: PartialBlob, holders: list[_Source]) -> None:
        workers = {
            asyncio.ensure_future(self._work(queue, partial, holder))
            for holder in holders
            for _ in range(min(_RANGES_PER_SOURCE, len(queue.waiting)))
        }
        try:
            running = workers
            while running:
                ended, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    task.result()
                # What is still on its way from a failing holder may be right, and is kept.
                if not queue.in_flight and not any(holder.usable for holder in holders):
                    return
        finally:
            for task in workers:
                task.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _work(self, queue: _Queue, partial: PartialBlob, holder: _Source) -> None:
        while holder.usable:
            index = await queue.take()
            if index is None:
                return
            fetched = False
            try:
                if not holder.usable:  # it was found out while this worker waited
                    return
                data = await self._get_range(partial, index, holder)
                await asyncio.to_thread(partial.write, index, data)
                holder.on_bytes(len(data))
                fetched = True
            except PeerFault as error:
                # Wrong bytes are never bad luck: this holder is not asked again.
                holder.failures, holder.fault = _TRIES_PER_SOURCE, error.message
            except (ShoalError, *_TRANSPORT_ERRORS) as error:
                holder.failures, holder.fault = holder.failures + 1, _in_words(error)
            finally:
                await asyncio.shield(queue.finish(index, fetched=fetched))

    async def _get_range(self, partial: PartialBlob, index: int, holder: _Source) -> bytes:
        start, size = index * CHUNK_BYTES, partial.size_of(index)
        wanted = f"bytes={start}-{start + size - 1}"
        async with self._get(partial.ref.sha256, holder, {"Range": wanted}) as answer:
            await _check_status(answer, 206)
            buffer = bytearray()
            async for part in answer.content.iter_chunked(_READ_BYTES):
                if len(buffer) + len(part) > size:
                    raise _oversize(size)
                buffer += part
                if len(buffer) == size:
                    break
        data = bytes(buffer)
        digest = await asyncio.to_thread(lambda: hashlib.sha256(data).digest())
        if digest != partial.digest_of(index):
            raise PeerFault(
                f"Chunk {index} of blob {partial.ref.sha256} from {holder.url} has a wrong digest.",
                code="wrong_digest",
                evidence=digest.hex(),
            )
        return data

    def _get(
        self, digest: str, holder: _Source, headers: dict[str, str] | None = None
    ) -> aiohttp.client._RequestContextManager:
        # Identity encoding, so that no holder can make us inflate a bomb.
        return self._http().get(
            f"{holder.url}/blobs/{digest}",
            headers={"Accept-Encoding": "identity", **(headers or {})},
            timeout=aiohttp.ClientTimeout(
                sock_connect=_CONNECT_TIMEOUT_S, sock_read=_PAUSE_TIMEOUT_S
            ),
            allow_redirects=False,
        )

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None or self._session.closed:
            self._session = aiohttp.ClientSession(
                auto_decompress=False,
                trust_env=False,
                connector=aiohttp.TCPConnector(limit=64, limit_per_host=8),
                read_bufsize=_READ_BYTES,
            )
        return self._session


async def _check_status(answer: aiohttp.ClientResponse, expected: int) -> None:
    if answer.status != expected:
        raise await _refusal(answer)


async def _refusal(answer: aiohttp.ClientResponse) -> ShoalError:
    """The error the holder answered with, or one that says what it answered instead."""
    body = await answer.content.read(_MAX_ERROR_BYTES)
    try:
        return error_from_wire(parse_json(body))
    except ValueError:
        return Unavailable(
            f"The holder answered with HTTP status {answer.status}.", code="http_status"
        )


def _oversize(size_bytes: int) -> PeerFault:
    return PeerFault(
        f"The holder sent more than the {size_bytes} bytes asked for.", code="oversize"
    )


def _nobody(ref: BlobRef, holders: list[_Source]) -> Unavailable:
    tried = "; ".join(f"{holder.url}: {holder.fault or 'not asked'}" for holder in holders[:8])
    return Unavailable(
        f"No source gave blob {ref.sha256}: {tried}.", code="blob_unavailable", retry_after_s=2
    )


def _in_words(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "it stopped answering"
    return (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(".")
