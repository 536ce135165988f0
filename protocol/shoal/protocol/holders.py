"""Who holds which blob: what workers tell the orchestrator, and what it tells them.

::

    /shoal/have/1     worker → orchestrator   HaveNotice      → HaveReply
    /shoal/holders/1  worker → orchestrator   HoldersRequest  → HoldersReply

Nothing here is trusted with bytes: a blob's digest comes from a signed record, so a wrong word
about who holds it costs a try and no more.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Final, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from shoal.protocol.blob import CHUNK_BYTES, MAX_BLOB_BYTES, BlobRef
from shoal.protocol.ids import PeerIdStr, Sha256
from shoal.protocol.record import Record

HAVE_PROTOCOL = "/shoal/have/1"
HOLDERS_PROTOCOL = "/shoal/holders/1"

SWARM_BYTES = 1 << 20
"""Blobs up to this size are asked of the orchestrator at once.

To ask first who holds one takes a round trip, and on a home line of 20 Mbit/s the blob itself less
than half a second.
"""

FINE_CHUNK_BYTES: Final = 262_144
"""The chunks in which blobs up to `MAX_FINE_BYTES` are passed on from worker to worker."""

MAX_FINE_BYTES = 64 << 20
"""Larger blobs have chunks enough as they are."""

MAX_HOLDERS = 16
MAX_SOURCES = 4
MAX_HOLDINGS = 64
MAX_FAULTS = 16
MAX_DELTAS = 16
MAX_HAVE_BYTES = 512 << 10
MAX_HOLDERS_REQUEST_BYTES = 8 << 10

_MAX_MAP_DIGITS = MAX_BLOB_BYTES // CHUNK_BYTES // 4

Source = Annotated[
    str, StringConstraints(pattern=r"^(https?://[^\s@?#\\]+|/[^\s?#\\]*p2p/\w+)$", max_length=300)
]
"""Where a holder is asked: an HTTP(S) base, or a libp2p address that ends in its peer id."""

ChunkMap = Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{2})+$")]
"""One bit for each chunk, in hex; chunk 0 is the highest bit of the first byte (BEP 3)."""


ChunkBytes = Literal[262_144, 4_194_304]
"""`FINE_CHUNK_BYTES` or `CHUNK_BYTES`."""

FineDigests = Annotated[
    str,
    StringConstraints(
        pattern=r"^([0-9a-f]{64})+$", max_length=64 * (MAX_FINE_BYTES // FINE_CHUNK_BYTES)
    ),
]


def chunk_map(chunks: Iterable[int], num_chunks: int) -> str:
    """The map of the given chunks of a blob that has ``num_chunks``.

    Example:
        >>> chunk_map({0, 9}, 10)
        '8040'
    """
    bits = bytearray(-(-num_chunks // 8))
    for index in chunks:
        bits[index // 8] |= 0x80 >> index % 8
    return bits.hex()


def chunks_in(chunks: str, num_chunks: int) -> frozenset[int]:
    """The chunks below ``num_chunks`` that the map names.

    Example:
        >>> sorted(chunks_in("8040", 10))
        [0, 9]
    """
    bits = bytes.fromhex(chunks)[: -(-num_chunks // 8)]
    return frozenset(
        index
        for index in range(min(num_chunks, 8 * len(bits)))
        if bits[index // 8] & (0x80 >> index % 8)
    )


class Holding(Record):
    """One blob, held whole or in part.

    Absent ``chunks`` means all of it; else they are of ``chunk_bytes`` each.
    """

    sha256: Sha256
    chunks: ChunkMap | None = Field(default=None, max_length=_MAX_MAP_DIGITS)
    chunk_bytes: ChunkBytes = 4_194_304


class HaveNotice(Record):
    """What a worker holds and serves to others.

    Writer: worker.  Reader: orchestrator.  A holding replaces what was said before of that
    blob and lapses unless it is said again; ``gone`` takes blobs back.

    ``sources`` are tried in order.  With ``http_port`` the worker also answers at that port of
    the address its connection comes from, which it cannot know itself; absent, it does not.
    """

    sources: tuple[Source, ...] = Field(max_length=MAX_SOURCES)
    http_port: int | None = Field(default=None, ge=1, le=65535)
    holdings: tuple[Holding, ...] = Field(max_length=MAX_HOLDINGS)
    gone: tuple[Sha256, ...] = Field(default=(), max_length=MAX_HOLDINGS)

    @model_validator(mode="after")
    def _maps_fit_together(self) -> Self:
        if sum(len(holding.chunks or "") for holding in self.holdings) > _MAX_MAP_DIGITS:
            raise ValueError(f"chunk maps have more than {_MAX_MAP_DIGITS} digits together")
        return self


class HaveReply(Record):
    """Writer: orchestrator.  Reader: worker, which says what it holds again within ``ttl_ms``."""

    ttl_ms: int = Field(ge=100, le=3_600_000)


class HoldersRequest(Record):
    """Asks who holds a blob.

    Writer: worker.  Reader: orchestrator.  ``faults`` are holders that gave it wrong bytes of
    this very blob.  With ``fine`` the answer is to have the fine list, if there is one.
    ``chunks`` are those it holds itself by now, which saves it a notice; absent, nothing new.
    """

    sha256: Sha256
    fine: bool = False
    chunks: ChunkMap | None = Field(default=None, max_length=_MAX_MAP_DIGITS)
    chunk_bytes: ChunkBytes = 4_194_304
    faults: tuple[PeerIdStr, ...] = Field(default=(), max_length=MAX_FAULTS)


class KnownHolder(Record):
    """A worker that said it holds the blob.

    Absent ``chunks`` means all of it; else they are of ``chunk_bytes`` each.
    """

    peer: PeerIdStr
    sources: tuple[Source, ...] = Field(min_length=1, max_length=MAX_SOURCES + 2)
    chunks: ChunkMap | None = Field(default=None, max_length=_MAX_MAP_DIGITS)
    chunk_bytes: ChunkBytes = 4_194_304


class DeltaStep(Record):
    """A blob that turns the bytes named ``base_sha256`` into those named ``target_sha256``."""

    base_sha256: Sha256
    target_sha256: Sha256
    blob: BlobRef


class HoldersReply(Record):
    """Who holds a blob, and shorter ways to it for those who hold an earlier one.

    Writer: orchestrator.  Reader: worker.  ``deltas`` is a chain, the step to the blob asked
    for first, each further one leading to the base of the step before it.  ``fine_sha256`` is
    the SHA-256 of each chunk of `FINE_CHUNK_BYTES`, one after the other; absent, it was not
    asked for, or the orchestrator does not hold the blob, or it is too large to need one.
    """

    holders: tuple[KnownHolder, ...] = Field(max_length=MAX_HOLDERS)
    deltas: tuple[DeltaStep, ...] = Field(default=(), max_length=MAX_DELTAS)
    fine_sha256: FineDigests | None = None

    @model_validator(mode="after")
    def _deltas_are_a_chain(self) -> Self:
        for step, before in zip(self.deltas, self.deltas[1:], strict=False):
            if step.base_sha256 != before.target_sha256:
                raise ValueError("deltas: each must lead to the base of the one before it")
        return self
