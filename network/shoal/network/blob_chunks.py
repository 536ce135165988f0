"""A blob's chunks and their sizes, and how a peer is asked for a range of its bytes."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Final

from shoal.protocol.blob import CHUNK_BYTES, MAX_BLOB_BYTES, BlobRef
from shoal.protocol.errors import InvalidRequest

BLOB_PROTOCOL: Final = "/shoal/blob/1"
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_DIGEST_BYTES: Final = 32
_REQUEST: Final = struct.Struct(">32sQI")
RANGE_REQUEST_BYTES: Final = _REQUEST.size
"""Length of a `/shoal/blob/1` request: digest, first byte, number of bytes, big-endian."""


def check_digest(digest: str) -> str:
    """The digest, once it is known to be 64 lower-case hex digits (so never a path)."""
    if not _SHA256.fullmatch(digest):
        raise InvalidRequest(
            f"{digest[:80]!r} is not a SHA-256 digest; write it as 64 lower-case hex digits."
        )
    return digest


def chunk_sizes(size_bytes: int, chunk_bytes: int = CHUNK_BYTES) -> list[int]:
    """The sizes of a blob's chunks, all alike but the last; none for an empty blob."""
    full, rest = divmod(size_bytes, chunk_bytes)
    return [chunk_bytes] * full + ([rest] if rest else [])


def num_chunks(size_bytes: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """How many chunks a blob of that size has."""
    return -(-size_bytes // chunk_bytes)


@dataclass(frozen=True, kw_only=True)
class FineList:
    """The digests, one after the other, of a blob's chunks of another size than usual."""

    chunk_bytes: int
    digests: bytes

    def fits(self, ref: BlobRef) -> bool:
        """Whether it has a digest for each chunk of ``ref``."""
        wanted = _DIGEST_BYTES * num_chunks(ref.size_bytes, self.chunk_bytes)
        return len(self.digests) == wanted


@dataclass(frozen=True, kw_only=True)
class Span:
    """A range of a blob's bytes; ``is_whole`` when it is all of them."""

    digest: str
    start: int
    size_bytes: int
    is_whole: bool = False


def encode_span(span: Span) -> bytes:
    """The request that asks a peer for the span."""
    return _REQUEST.pack(bytes.fromhex(span.digest), span.start, span.size_bytes)


def decode_span(payload: bytes) -> Span:
    """The span a peer asks for.

    Raises:
        InvalidRequest: The request is malformed, or asks for more than one chunk's bytes.
    """
    if len(payload) != RANGE_REQUEST_BYTES:
        raise InvalidRequest(
            f"A {BLOB_PROTOCOL} request has {RANGE_REQUEST_BYTES} bytes and not {len(payload)}."
        )
    digest, start, size_bytes = _REQUEST.unpack(payload)
    if size_bytes > CHUNK_BYTES or start > MAX_BLOB_BYTES:
        raise InvalidRequest(
            f"A {BLOB_PROTOCOL} request for {size_bytes} bytes is over the limit of {CHUNK_BYTES}."
        )
    return Span(digest=digest.hex(), start=start, size_bytes=size_bytes)
