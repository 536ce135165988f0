"""A large blob being fetched: chunks land in their place as they are verified."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Final, TypeVar

from shoal.network.blob_chunks import chunk_sizes
from shoal.network.blob_draft import disk_errors
from shoal.network.blob_store import BlobStore
from shoal.protocol.blob import CHUNK_BYTES, BlobRef
from shoal.protocol.errors import InvalidRequest, PeerFault, Unavailable

_DIGEST_BYTES: Final = 32
_READ_BYTES: Final = 1 << 20
T = TypeVar("T")


async def to_the_end(function: Callable[[], T]) -> T:
    """What the function returns, run in a thread; a cancelled caller waits for it to end.

    A thread cannot be cancelled, and one that outlives its caller would write into a file
    that is closed, or into whatever has its number by then.
    """
    task = asyncio.ensure_future(asyncio.to_thread(function))
    try:
        return await asyncio.shield(task)
    finally:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # a cancelled caller does not ask for it


class PartialBlob:
    """The file a blob is assembled in; it outlives a failed fetch so the next one resumes.

    Its methods may be called from several threads at once.

    Args:
        store: Where the finished blob goes, and where verified chunks are served from.
        ref: The blob.
        digests: Its chunk list, already verified.
        chunk_bytes: The size of a chunk; smaller ones may be passed on sooner.
    """

    def __init__(
        self, store: BlobStore, ref: BlobRef, digests: bytes, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        self.ref = ref
        self.chunk_bytes: Final = chunk_bytes
        self.sizes: Final = chunk_sizes(ref.size_bytes, chunk_bytes)
        self._store = store
        self._digests = digests
        self._path: Path = store.partial_path(ref.sha256)
        self._file: IO[bytes] | None = None
        self._written: set[int] = set()
        self._whole = hashlib.sha256()
        self._num_hashed = 0
        self._hashing = threading.Lock()

    def __enter__(self) -> PartialBlob:
        """The file is open, and no other fetch of this blob uses it.

        Raises:
            Unavailable: Another fetch of the same blob is under way in this store, or the
                store is full.
            InvalidRequest: The blob would never fit.
        """
        self._store.claim(self.ref.sha256, self.ref.size_bytes, self.chunk_bytes)
        try:
            with disk_errors():
                self._file = self._path.open("r+b" if self._path.exists() else "w+b")
        except BaseException:
            self._store.release(self.ref.sha256)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """The file is closed; it stays where it is unless it was kept, or the disk is full."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if isinstance(error, Unavailable) and error.code == "disk_full":
            self._store.drop_partial(self.ref.sha256)
        self._store.release(self.ref.sha256)

    def missing(self) -> list[int]:
        """The chunks not yet here, found by hashing what is; the others are served again."""
        for index in range(len(self.sizes)):
            if self._is_right(index):
                self._written.add(index)
                self._store.verified(self.ref.sha256, index)
        return [index for index in range(len(self.sizes)) if index not in self._written]

    def accept(self, index: int, data: bytes | bytearray) -> bool:
        """True when these bytes are the chunk; it is then in its place, and served.

        Raises:
            Unavailable: The disk is full (code ``disk_full``).
        """
        if hashlib.sha256(data).digest() != self._digest_of(index):
            return False
        view, place = memoryview(data), index * self.chunk_bytes
        with disk_errors():
            while view:
                num_bytes = os.pwrite(self._descriptor(), view, place)
                view, place = view[num_bytes:], place + num_bytes
        self._written.add(index)
        self._store.verified(self.ref.sha256, index)
        # Whoever is hashing takes this chunk along from the file; nobody waits for them.
        if self._hashing.acquire(blocking=False):
            try:
                if index == self._num_hashed:
                    self._whole.update(data)
                    self._num_hashed += 1
                self._hash_on()
            finally:
                self._hashing.release()
        return True

    def keep(self) -> None:
        """The file is now the blob, hashed whole; `BlobStore.settle` waits for the disk.

        Raises:
            PeerFault: The chunk list belongs to another blob (code ``wrong_digest``).
        """
        with self._hashing:
            self._hash_on()
            digest = self._whole.hexdigest()
        if digest != self.ref.sha256:
            self._store.drop_partial(self.ref.sha256)
            raise PeerFault(
                f"The chunks named for blob {self.ref.sha256} make up {digest}; "
                "its reference is wrong.",
                code="wrong_digest",
                evidence=digest,
            )
        os.ftruncate(self._descriptor(), self.ref.size_bytes)
        self._store.adopt(self._path, digest, self.ref.size_bytes, pin=False, settled=False)

    def _hash_on(self) -> None:
        """The whole hash covers every chunk up to the first that is missing."""
        while self._num_hashed in self._written:
            end = self._num_hashed * self.chunk_bytes + self.sizes[self._num_hashed]
            for start in range(self._num_hashed * self.chunk_bytes, end, _READ_BYTES):
                size_bytes = min(_READ_BYTES, end - start)
                self._whole.update(os.pread(self._descriptor(), size_bytes, start))
            self._num_hashed += 1

    def _digest_of(self, index: int) -> bytes:
        return self._digests[index * _DIGEST_BYTES : (index + 1) * _DIGEST_BYTES]

    def _is_right(self, index: int) -> bool:
        start, size_bytes = index * self.chunk_bytes, self.sizes[index]
        if self._is_hole(start, size_bytes):
            return False
        data = os.pread(self._descriptor(), size_bytes, start)
        return len(data) == size_bytes and hashlib.sha256(data).digest() == self._digest_of(index)

    def _is_hole(self, start: int, size_bytes: int) -> bool:
        """True when nothing was ever written there, so that there is nothing to hash."""
        try:
            return os.lseek(self._descriptor(), start, os.SEEK_DATA) >= start + size_bytes
        except OSError:  # no data from here on
            return True

    def _descriptor(self) -> int:
        if self._file is None:
            raise InvalidRequest("A partial blob is used inside its `with` block only.")
        return self._file.fileno()
