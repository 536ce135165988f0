"""A large blob being fetched: chunks land in their place as they are verified."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Final

from shoal.network.blob_store import BlobStore, chunk_sizes
from shoal.protocol.blob import CHUNK_BYTES, BlobRef
from shoal.protocol.errors import InvalidRequest, PeerFault, Unavailable

_DIGEST_BYTES: Final = 32
_READ_BYTES: Final = 1 << 20


class PartialBlob:
    """The file a blob is assembled in; it outlives a failed fetch so the next one resumes.

    Args:
        store: Where the finished blob goes.
        ref: The blob.
        digests: Its chunk list, already verified.
    """

    def __init__(self, store: BlobStore, ref: BlobRef, digests: bytes) -> None:
        self.ref = ref
        self._store = store
        self._digests = digests
        self._sizes = chunk_sizes(ref.size_bytes)
        self._path: Path = store.partial_path(ref.sha256)
        self._file: IO[bytes] | None = None

    def __enter__(self) -> PartialBlob:
        """The file is open, and no other fetch of this blob uses it.

        Raises:
            Unavailable: Another fetch of the same blob is under way in this store.
        """
        if not self._store.claim(self.ref.sha256):
            raise Unavailable(
                f"Blob {self.ref.sha256} is already being fetched into this store; wait for it.",
                code="fetch_under_way",
            )
        try:
            self._file = self._path.open("r+b" if self._path.exists() else "w+b")
        except OSError:
            self._store.release(self.ref.sha256)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """The file is closed; it stays where it is unless it was kept as a blob."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._store.release(self.ref.sha256)

    def size_of(self, index: int) -> int:
        """The chunk's size in bytes."""
        return self._sizes[index]

    def digest_of(self, index: int) -> bytes:
        """The chunk's SHA-256."""
        return self._digests[index * _DIGEST_BYTES : (index + 1) * _DIGEST_BYTES]

    def missing(self) -> list[int]:
        """The chunks not yet here, found by hashing what is."""
        return [index for index in range(len(self._sizes)) if not self._is_right(index)]

    def write(self, index: int, data: bytes) -> None:
        """The chunk is in its place."""
        os.pwrite(self._descriptor(), data, index * CHUNK_BYTES)

    def keep(self) -> None:
        """The file is now the blob, hashed whole once more.

        Raises:
            PeerFault: The chunk list belongs to another blob (code ``wrong_digest``).
        """
        descriptor = self._descriptor()
        os.ftruncate(descriptor, self.ref.size_bytes)
        os.fsync(descriptor)
        with self._path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != self.ref.sha256:
            self._path.unlink(missing_ok=True)
            raise PeerFault(
                f"The chunks named for blob {self.ref.sha256} make up {digest}; "
                "its reference is wrong.",
                code="wrong_digest",
                evidence=digest,
            )
        self._store.adopt(self._path, digest, self.ref.size_bytes, pin=False)

    def _is_right(self, index: int) -> bool:
        data = os.pread(self._descriptor(), self._sizes[index], index * CHUNK_BYTES)
        return len(data) == self._sizes[index] and hashlib.sha256(data).digest() == self.digest_of(
            index
        )

    def _descriptor(self) -> int:
        if self._file is None:
            raise InvalidRequest("A partial blob is used inside its `with` block only.")
        return self._file.fileno()
