"""Blobs on disk, named by their SHA-256, within a size, least recently used first out."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

from shoal.protocol.blob import CHUNK_BYTES, BlobRef
from shoal.protocol.errors import InvalidRequest, NotFound, PeerFault, Unavailable

_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_COPY_BYTES: Final = 1 << 20
_DRAFTS: Final = "drafts"
_PARTIAL: Final = ".part"
_PARTIAL_KEPT_S: Final = 24 * 3600


def check_digest(digest: str) -> str:
    """The digest, once it is known to be 64 lower-case hex digits (so never a path)."""
    if not _SHA256.fullmatch(digest):
        raise InvalidRequest(
            f"{digest[:80]!r} is not a SHA-256 digest; write it as 64 lower-case hex digits."
        )
    return digest


def chunk_sizes(size_bytes: int) -> list[int]:
    """The sizes of a blob's chunks, all 4 MiB but the last; none for an empty blob."""
    full, rest = divmod(size_bytes, CHUNK_BYTES)
    return [CHUNK_BYTES] * full + ([rest] if rest else [])


class BlobStore:
    """A directory of blobs; every byte in it hashed to its name when it was written.

    Methods may be called from any thread.

    Args:
        directory: Made when missing; belongs to this store alone.
        max_bytes: Room for all blobs together; unpinned ones are dropped to stay below.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._lock = threading.RLock()
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._pins: dict[str, int] = {}
        self._total_bytes = 0
        self._claimed: set[str] = set()
        (directory / _DRAFTS).mkdir(parents=True, exist_ok=True)
        self._clear_drafts()
        self._index()

    @property
    def total_bytes(self) -> int:
        """What the blobs take together."""
        return self._total_bytes

    @property
    def max_bytes(self) -> int:
        """What the blobs may take together."""
        return self._max_bytes

    def put_bytes(self, data: bytes, *, pin: bool = False) -> BlobRef:
        """The blob is stored; its reference, and its chunk list's when it has one, is made."""
        with self.draft() as draft:
            draft.write(data)
            return draft.keep(pin=pin)

    def put_file(self, path: Path, *, pin: bool = False) -> BlobRef:
        """A copy of the file is stored; see `put_bytes`."""
        with self.draft() as draft, path.open("rb") as source:
            for part in iter(lambda: source.read(_COPY_BYTES), b""):
                draft.write(part)
            return draft.keep(pin=pin)

    def draft(self) -> Draft:
        """A blob in the making: write to it, then `keep` it, or leave it and it is gone."""
        return Draft(self, self._directory / _DRAFTS / secrets.token_hex(8))

    def has(self, digest: str) -> bool:
        """True when the blob is here."""
        return check_digest(digest) in self._sizes

    def path(self, digest: str) -> Path:
        """Where the blob lies; reading it counts as a use.

        Raises:
            NotFound: It is not here.
        """
        with self._lock:
            if check_digest(digest) not in self._sizes:
                raise NotFound(f"The blob {digest} is not in this store; fetch it first.")
            self._sizes.move_to_end(digest)
        return self._place(digest)

    def size_of(self, digest: str) -> int:
        """The blob's size in bytes."""
        self.path(digest)
        return self._sizes[digest]

    def read(self, digest: str) -> bytes:
        """The blob's bytes, hashed again, so that a damaged disk is found out.

        Raises:
            NotFound: It is not here, or it was damaged and has now been dropped.
        """
        data = self.path(digest).read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            self.delete(digest)
            raise NotFound(f"The blob {digest} was damaged on disk and dropped; fetch it again.")
        return data

    def open(self, digest: str) -> IO[bytes]:
        """The blob, opened for reading; it stays readable even if it is dropped meanwhile."""
        return self.path(digest).open("rb")

    def delete(self, digest: str) -> None:
        """The blob is not here, pinned or not."""
        with self._lock:
            self._total_bytes -= self._sizes.pop(check_digest(digest), 0)
            self._pins.pop(digest, None)
            self._place(digest).unlink(missing_ok=True)

    def pin(self, digest: str) -> None:
        """The blob is not dropped to make room until it is unpinned as often."""
        with self._lock:
            self.path(digest)
            self._pins[digest] = self._pins.get(digest, 0) + 1

    def unpin(self, digest: str) -> None:
        """One pin less; without any, the blob may be dropped to make room."""
        with self._lock:
            left = self._pins.get(check_digest(digest), 0) - 1
            if left > 0:
                self._pins[digest] = left
            else:
                self._pins.pop(digest, None)

    def reserve(self, size_bytes: int) -> None:
        """There is room for `size_bytes` more.

        Raises:
            InvalidRequest: They would never fit.
            Unavailable: Pinned blobs leave too little room.
        """
        if size_bytes > self._max_bytes:
            raise InvalidRequest(
                f"A blob of {size_bytes} bytes does not fit a store of {self._max_bytes}; "
                "raise the store's size.",
                code="blob_too_large",
            )
        with self._lock:
            if self._total_bytes + size_bytes <= self._max_bytes:
                return
            for digest in [digest for digest in self._sizes if digest not in self._pins]:
                if self._total_bytes + size_bytes <= self._max_bytes:
                    return
                self.delete(digest)
            if self._total_bytes + size_bytes > self._max_bytes:
                raise Unavailable(
                    f"The blob store is full: {self._total_bytes} of {self._max_bytes} bytes are "
                    "in use and none may be dropped; raise its size.",
                    code="store_full",
                    retry_after_s=30,
                )

    def adopt(self, draft: Path, digest: str, size_bytes: int, *, pin: bool) -> None:
        """The finished draft is now the blob of that digest; called by `Draft.keep`."""
        with self._lock:
            if digest not in self._sizes:
                self.reserve(size_bytes)
                os.replace(draft, self._place(digest))
                self._sizes[digest] = size_bytes
                self._total_bytes += size_bytes
            self._sizes.move_to_end(digest)
            if pin:
                self.pin(digest)

    def partial_path(self, digest: str) -> Path:
        """Where a blob is assembled while it is fetched in chunks."""
        return self._directory / _DRAFTS / f"{check_digest(digest)}{_PARTIAL}"

    def claim(self, digest: str) -> bool:
        """True when nobody else assembles this blob; `release` ends the claim."""
        with self._lock:
            if digest in self._claimed:
                return False
            self._claimed.add(digest)
            return True

    def release(self, digest: str) -> None:
        """The blob may be assembled by another."""
        with self._lock:
            self._claimed.discard(digest)

    def digests(self) -> Iterator[str]:
        """Every blob here, least recently used first."""
        return iter(tuple(self._sizes))

    def _place(self, digest: str) -> Path:
        return self._directory / digest

    def _clear_drafts(self) -> None:
        """Drops what a killed process left, but not chunks that a fetch may go on from."""
        oldest = time.time() - _PARTIAL_KEPT_S
        for leftover in (self._directory / _DRAFTS).iterdir():
            if leftover.suffix != _PARTIAL or leftover.stat().st_mtime < oldest:
                leftover.unlink(missing_ok=True)

    def _index(self) -> None:
        found = []
        for entry in os.scandir(self._directory):
            if _SHA256.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                stat = entry.stat()
                found.append((stat.st_mtime_ns, entry.name, stat.st_size))
        for _, digest, size_bytes in sorted(found):
            self._sizes[digest] = size_bytes
            self._total_bytes += size_bytes


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
            self._file.close()
        self._path.unlink(missing_ok=True)

    def write(self, data: bytes | memoryview) -> None:
        """The bytes are appended and hashed."""
        if self._file is None:
            raise InvalidRequest("A draft is written inside its `with` block only.")
        self._file.write(data)
        self._whole.update(data)
        view = memoryview(data)
        while view:
            room = CHUNK_BYTES - self.size_bytes % CHUNK_BYTES
            part, view = view[:room], view[room:]
            self._chunk.update(part)
            self.size_bytes += len(part)
            if self.size_bytes % CHUNK_BYTES == 0:
                self._end_chunk()

    def keep(self, *, expected: str | None = None, pin: bool = False) -> BlobRef:
        """The draft is now a blob, durable on disk, and so is its chunk list if it has one.

        Raises:
            PeerFault: The bytes do not hash to `expected` (code ``wrong_digest``).
        """
        digest = self._whole.hexdigest()
        if expected is not None and digest != expected:
            raise PeerFault(
                f"The bytes sent for blob {expected} hash to {digest}; nothing was kept.",
                code="wrong_digest",
                evidence=digest,
            )
        if self._file is None:
            raise InvalidRequest("A draft is kept inside its `with` block only.")
        self._file.flush()
        os.fsync(self._file.fileno())
        chunks = self._keep_chunk_list(pin=pin)
        self._store.adopt(self._path, digest, self.size_bytes, pin=pin)
        return BlobRef(sha256=digest, size_bytes=self.size_bytes, chunks_sha256=chunks)

    def _keep_chunk_list(self, *, pin: bool) -> str | None:
        if self.size_bytes <= CHUNK_BYTES:
            return None
        if self.size_bytes % CHUNK_BYTES:
            self._end_chunk()
        return self._store.put_bytes(b"".join(self._chunk_digests), pin=pin).sha256

    def _end_chunk(self) -> None:
        self._chunk_digests.append(self._chunk.digest())
        self._chunk = hashlib.sha256()
