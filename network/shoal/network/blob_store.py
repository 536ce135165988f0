"""Blobs on disk, named by their SHA-256, within a size, least recently used first out."""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Final

from shoal.network.blob_chunks import check_digest, num_chunks
from shoal.network.blob_draft import Draft, disk_errors
from shoal.protocol.blob import CHUNK_BYTES, BlobRef
from shoal.protocol.errors import InvalidRequest, NotFound, Unavailable

_COPY_BYTES: Final = 1 << 20
_DRAFTS: Final = "drafts"
_PARTIAL: Final = ".part"
_UNSETTLED: Final = ".unsettled"
_PARTIAL_KEPT_S: Final = 24 * 3600
_BLOCK_BYTES: Final = 512


@dataclass
class _Partial:
    """A blob here in part.

    ``room_bytes`` is what it counts for: its whole size while it is being assembled, what it
    takes on disk otherwise.
    """

    room_bytes: int
    size_bytes: int = 0
    chunk_bytes: int = CHUNK_BYTES
    verified: set[int] = field(default_factory=set)
    is_claimed: bool = False
    num_readers: int = 0


class BlobRange:
    """Bytes of a blob that may be read; while it is open the blob is not dropped."""

    def __init__(self, store: BlobStore, digest: str, file: IO[bytes], span: range) -> None:
        self._store = store
        self._digest = digest
        self.file = file
        self.start = span.start
        self.size_bytes = len(span)

    def __enter__(self) -> BlobRange:
        """The range is open."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """The range is closed."""
        self.file.close()
        self._store.end_reading(self._digest)

    def read(self) -> bytes:
        """All of the range's bytes."""
        return os.pread(self.file.fileno(), self.size_bytes, self.start)


class BlobStore:
    """A directory of blobs; every byte in it hashed to its name when it was written.

    Methods may be called from any thread.

    Args:
        directory: Made when missing; belongs to this store alone.
        max_bytes: Room for all blobs together, those here in part included; what is neither
            pinned nor in use is dropped to stay below.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._lock = threading.RLock()
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._pins: dict[str, int] = {}
        self._partials: OrderedDict[str, _Partial] = OrderedDict()
        self._total_bytes = 0
        (directory / _DRAFTS).mkdir(parents=True, exist_ok=True)
        self._drop_unsettled()
        self._index_drafts()
        self._index()

    @property
    def total_bytes(self) -> int:
        """What the blobs take together."""
        return self._total_bytes

    @property
    def max_bytes(self) -> int:
        """What the blobs may take together."""
        return self._max_bytes

    def put_bytes(self, data: bytes, *, pin: bool = False, settled: bool = True) -> BlobRef:
        """The blob is stored; its reference, and its chunk list's when it has one, is made.

        Unless `settled`, it may be used before the disk has it, which `settle` sees to.
        """
        with self.draft() as draft:
            draft.write(data)
            return draft.keep(pin=pin, settled=settled)

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
        """True when the blob is here, whole."""
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

    def open_range(self, digest: str, start: int, size_bytes: int | None) -> BlobRange:
        """The bytes from `start` on, to the end when no size is given; close it after use.

        A blob that is still being fetched gives what was verified so far.

        Raises:
            NotFound: The blob is not here, or these bytes are not yet (code
                ``chunk_not_here``).
            InvalidRequest: The range lies outside the blob (code ``bad_range``).
        """
        with self._lock:
            partial = None if self.has(digest) else self._partials.get(digest)
            if partial is None:
                file, total = self.path(digest).open("rb"), self._sizes[digest]
            elif partial.size_bytes:
                file, total = self.partial_path(digest).open("rb"), partial.size_bytes
            else:
                raise NotFound(f"The blob {digest} is not in this store; ask another holder.")
            try:
                span = _span(digest, start, size_bytes, total)
                if partial is None:
                    self.pin(digest)
                else:
                    _require_chunks(digest, span, partial)
                    partial.num_readers += 1
            except BaseException:
                file.close()
                raise
        return BlobRange(self, digest, file, span)

    def end_reading(self, digest: str) -> None:
        """One reader less; called by `BlobRange`."""
        with self._lock:
            partial = self._partials.get(digest)
            if partial is not None and partial.num_readers:
                partial.num_readers -= 1
            else:
                self.unpin(digest)

    def list_chunks(self, digest: str) -> str | None:
        """The list of the blob's chunks is here too; its digest, None where it needs none."""
        if self.size_of(digest) <= CHUNK_BYTES:
            return None
        with self.open(digest) as file:
            parts = iter(lambda: file.read(CHUNK_BYTES), b"")
            digests = b"".join(hashlib.sha256(part).digest() for part in parts)
        return self.put_bytes(digests).sha256

    def chunk_bytes_of(self, digest: str) -> int:
        """The size of the chunks that `held_chunks` counts."""
        partial = self._partials.get(check_digest(digest))
        return CHUNK_BYTES if partial is None else partial.chunk_bytes

    def held_chunks(self, digest: str) -> frozenset[int] | None:
        """The verified chunks of the blob: all, some, or None when nothing of it is here."""
        with self._lock:
            size_bytes = self._sizes.get(check_digest(digest))
            if size_bytes is not None:
                return frozenset(range(num_chunks(size_bytes)))
            partial = self._partials.get(digest)
            return frozenset(partial.verified) if partial is not None else None

    def delete(self, digest: str) -> None:
        """The blob is not here, pinned or not."""
        with self._lock:
            self._total_bytes -= self._sizes.pop(check_digest(digest), 0)
            self._pins.pop(digest, None)
            self._place(digest).unlink(missing_ok=True)
            self._mark(digest).unlink(missing_ok=True)

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
            # Half a blob that nobody is fetching is worth less than any whole one.
            for drop, candidates in (
                (self.drop_partial, self._idle_partials()),
                (self.delete, [digest for digest in self._sizes if digest not in self._pins]),
            ):
                for digest in candidates:
                    if self._total_bytes + size_bytes <= self._max_bytes:
                        return
                    drop(digest)
            if self._total_bytes + size_bytes > self._max_bytes:
                raise Unavailable(
                    f"The blob store is full: {self._total_bytes} of {self._max_bytes} bytes are "
                    "in use and none may be dropped; raise its size.",
                    code="store_full",
                    retry_after_s=30,
                )

    def adopt(
        self, draft: Path, digest: str, size_bytes: int, *, pin: bool, settled: bool = True
    ) -> None:
        """The finished draft is now the blob of that digest; called by its maker.

        Unless `settled`, its bytes may still be on their way to the disk: `settle` ends that,
        and a store opened after a crash before it drops the blob.
        """
        with self._lock:
            if digest not in self._sizes:
                num_readers = 0
                if draft == self.partial_path(digest) and digest in self._partials:
                    partial = self._partials.pop(digest)
                    self._total_bytes -= partial.room_bytes
                    num_readers = partial.num_readers
                self.reserve(size_bytes)
                if not settled:
                    self._mark(digest).touch()
                os.replace(draft, self._place(digest))
                self._sizes[digest] = size_bytes
                self._total_bytes += size_bytes
                if num_readers:
                    self._pins[digest] = self._pins.get(digest, 0) + num_readers
            self._sizes.move_to_end(digest)
            if pin:
                self.pin(digest)

    def settle(self, digest: str) -> None:
        """The blob's bytes are on the disk; one that is not here is no error."""
        mark = self._mark(check_digest(digest))
        if mark.exists() and self._place(digest).exists():
            with disk_errors(), self._place(digest).open("rb") as file:
                os.fsync(file.fileno())
        mark.unlink(missing_ok=True)

    def partial_path(self, digest: str) -> Path:
        """Where a blob is assembled while it is fetched in chunks."""
        return self._directory / _DRAFTS / f"{check_digest(digest)}{_PARTIAL}"

    def claim(self, digest: str, size_bytes: int, chunk_bytes: int = CHUNK_BYTES) -> None:
        """Nobody else assembles this blob, and there is room for it; `release` ends the claim.

        It is verified and served in chunks of ``chunk_bytes`` from now on.

        Raises:
            Unavailable: Another fetch of it is under way, or the store is full.
            InvalidRequest: It would never fit.
        """
        with self._lock:
            partial = self._partials.setdefault(check_digest(digest), _Partial(0))
            if partial.is_claimed:
                raise Unavailable(
                    f"Blob {digest} is already being fetched into this store; wait for it.",
                    code="fetch_under_way",
                )
            partial.is_claimed = True
            try:
                self.reserve(size_bytes - partial.room_bytes)
            except BaseException:
                self.release(digest)
                raise
            self._total_bytes += size_bytes - partial.room_bytes
            partial.room_bytes = partial.size_bytes = size_bytes
            if partial.chunk_bytes != chunk_bytes:
                partial.chunk_bytes = chunk_bytes
                partial.verified.clear()

    def release(self, digest: str) -> None:
        """The blob may be assembled by another; what is here of it stays until room is needed."""
        with self._lock:
            partial = self._partials.get(digest)
            if partial is None:
                return
            path = self.partial_path(digest)
            partial.is_claimed = False
            room_bytes = path.stat().st_blocks * _BLOCK_BYTES if path.exists() else 0
            self._total_bytes += room_bytes - partial.room_bytes
            partial.room_bytes = room_bytes
            if not path.exists():
                del self._partials[digest]

    def verified(self, digest: str, index: int) -> None:
        """That chunk of a blob being assembled is right, and served from now on."""
        with self._lock:
            partial = self._partials.get(digest)
            if partial is not None:
                partial.verified.add(index)

    def drop_partial(self, digest: str) -> None:
        """Nothing is here of a blob that was not whole."""
        with self._lock:
            partial = self._partials.pop(check_digest(digest), None)
            self._total_bytes -= partial.room_bytes if partial is not None else 0
            self.partial_path(digest).unlink(missing_ok=True)

    def digests(self) -> Iterator[str]:
        """Every blob here, least recently used first."""
        return iter(tuple(self._sizes))

    def partials(self) -> tuple[str, ...]:
        """Every blob of which some chunks are here, and served."""
        with self._lock:
            return tuple(digest for digest, part in self._partials.items() if part.verified)

    def _idle_partials(self) -> list[str]:
        return [
            digest
            for digest, partial in self._partials.items()
            if not partial.is_claimed and not partial.num_readers
        ]

    def _place(self, digest: str) -> Path:
        return self._directory / digest

    def _mark(self, digest: str) -> Path:
        return self._directory / _DRAFTS / f"{digest}{_UNSETTLED}"

    def _drop_unsettled(self) -> None:
        """Drops blobs whose bytes a crash may have kept from the disk."""
        for mark in (self._directory / _DRAFTS).glob(f"*{_UNSETTLED}"):
            self._place(mark.stem).unlink(missing_ok=True)
            mark.unlink()

    def _index_drafts(self) -> None:
        """Drops what a killed process left, but not chunks that a fetch may go on from."""
        oldest = time.time() - _PARTIAL_KEPT_S
        for leftover in (self._directory / _DRAFTS).iterdir():
            stat = leftover.stat()
            if leftover.suffix != _PARTIAL or stat.st_mtime < oldest:
                leftover.unlink(missing_ok=True)
                continue
            room_bytes = stat.st_blocks * _BLOCK_BYTES
            self._partials[leftover.stem] = _Partial(room_bytes)
            self._total_bytes += room_bytes

    def _index(self) -> None:
        found = []
        for entry in os.scandir(self._directory):
            if len(entry.name) == 64 and entry.is_file(follow_symlinks=False):
                stat = entry.stat()
                found.append((stat.st_mtime_ns, entry.name, stat.st_size))
        for _, digest, size_bytes in sorted(found):
            self._sizes[check_digest(digest)] = size_bytes
            self._total_bytes += size_bytes


def _span(digest: str, start: int, size_bytes: int | None, total: int) -> range:
    end = total if size_bytes is None else start + size_bytes
    if not 0 <= start <= end <= total:
        raise InvalidRequest(
            f"Bytes {start} to {end} lie outside the blob {digest} of {total} bytes.",
            code="bad_range",
        )
    return range(start, end)


def _require_chunks(digest: str, span: range, partial: _Partial) -> None:
    chunk_bytes = partial.chunk_bytes
    wanted = range(span.start // chunk_bytes, num_chunks(span.stop, chunk_bytes))
    if not partial.verified.issuperset(wanted):
        raise NotFound(
            f"Not all of bytes {span.start} to {span.stop} of blob {digest} are here yet; ask "
            "again soon, or another holder.",
            code="chunk_not_here",
        )
