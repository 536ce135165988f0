"""A blob being written: it becomes a blob of the store when it is whole, or leaves nothing."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from shoal.protocol.blob import CHUNK_BYTES, BlobRef
from shoal.protocol.errors import InvalidRequest, PeerFault, Unavailable

if TYPE_CHECKING:
    from shoal.network.blob_store import BlobStore

_DISK_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """A disk without room is said as `Unavailable` with code ``disk_full``."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise Unavailable(
            "The disk that holds the blob store has no room left; free some, or lower the "
            "store's size.",
            code="disk_full",
            retry_after_s=30,
        ) from error


class Draft:
    """A blob being written: hashed whole and by chunk as the bytes pass.

    Used as a context manager; leaving it without `keep` leaves nothing behind.
    """

    def __init__(self, store: BlobStore, path: Path) -> None:
        self._store = store
        self._path = path
        self._file: IO[bytes] | None = None
        self._whole = hashlib.sha256()
        self._chunk = hashlib.sha256()
        self._chunk_digests: list[bytes] = []
        self.size_bytes = 0

    def __enter__(self) -> Draft:
        """The draft is open for writing."""
        self._file = self._path.open("xb")
        return self

    def __exit__(self, *_: object) -> None:
        """The draft is closed, and gone unless it was kept."""
        if self._file is not None:
            # What was kept is on disk already; the rest of a full disk's draft is not wanted.
            with contextlib.suppress(OSError):
                self._file.close()
        self._path.unlink(missing_ok=True)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """The bytes are appended and hashed.

        Raises:
            Unavailable: The disk is full (code ``disk_full``).
        """
        if self._file is None:
            raise InvalidRequest("A draft is written inside its `with` block only.")
        with disk_errors():
            self._file.write(data)
        view = memoryview(data)
        while view:
            room = CHUNK_BYTES - self.size_bytes % CHUNK_BYTES
            part, view = view[:room], view[room:]
            self._whole.update(part)
            # The first chunk has the digest that the whole has at its end.
            if self._chunk_digests:
                self._chunk.update(part)
            self.size_bytes += len(part)
            if self.size_bytes % CHUNK_BYTES == 0:
                self._end_chunk()

    def keep(
        self, *, expected: str | None = None, pin: bool = False, settled: bool = True
    ) -> BlobRef:
        """The draft is now a blob, durable on disk, and so is its chunk list if it has one.

        Unless `settled`, the blob itself is durable from the next `BlobStore.settle` on.

        Raises:
            PeerFault: The bytes do not hash to `expected` (code ``wrong_digest``).
            Unavailable: The disk is full (code ``disk_full``).
        """
        digest = self._whole.hexdigest()
        if expected is not None and digest != expected:
            raise wrong_digest(expected, digest)
        if self._file is None:
            raise InvalidRequest("A draft is kept inside its `with` block only.")
        with disk_errors():
            self._file.flush()
            if settled:
                os.fsync(self._file.fileno())
        chunks = self._keep_chunk_list(pin=pin)
        self._store.adopt(self._path, digest, self.size_bytes, pin=pin, settled=settled)
        return BlobRef(sha256=digest, size_bytes=self.size_bytes, chunks_sha256=chunks)

    def _keep_chunk_list(self, *, pin: bool) -> str | None:
        if self.size_bytes <= CHUNK_BYTES:
            return None
        if self.size_bytes % CHUNK_BYTES:
            self._end_chunk()
        return self._store.put_bytes(b"".join(self._chunk_digests), pin=pin).sha256

    def _end_chunk(self) -> None:
        ended = self._chunk if self._chunk_digests else self._whole
        self._chunk_digests.append(ended.digest())
        self._chunk = hashlib.sha256()


def wrong_digest(expected: str, found: str) -> PeerFault:
    """The error for bytes that are not the blob they were sent for."""
    return PeerFault(
        f"The bytes sent for blob {expected} hash to {found}; nothing was kept.",
        code="wrong_digest",
        evidence=found,
    )
