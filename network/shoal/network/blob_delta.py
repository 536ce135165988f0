"""A blob as what differs from another of the same size: positions and new values, compressed.

Lossless whatever the values mean, since whole words are replaced and nothing is added up.  A
matter of transport only: who applies a delta compares the outcome with the digest it wanted.

Layout, little-endian, one block for each 4 MiB of the blob::

    "SHDELTA1" ‖ u64 size of the blob ‖ blocks
    block = u8 word bytes (2 or 4) ‖ u32 changed words ‖ u32 gap bytes ‖ u32 packed bytes
            ‖ zlib(gaps ‖ values by byte plane) ‖ the bytes behind the last whole word

A gap is how many unchanged words lie before a changed one, in bytes of at most 254, each 255
before them adding 255.  So positions rise strictly whatever the bytes are, and take at most a
byte for each changed word and for each 255 others: every size is known before it is allocated.

Source: PULSE and GRAIL send changed bit patterns by value with coded positions and a full
anchor every ten; blocks, escapes and planes are ours.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Final

import numpy as np
from numpy.typing import NDArray

from shoal.network.blob_chunks import chunk_sizes
from shoal.protocol.errors import PeerFault

_MAGIC: Final = b"SHDELTA1"
_HEADER: Final = struct.Struct("<8sQ")
_BLOCK: Final = struct.Struct("<BIII")
_WORDS: Final[dict[int, type[np.unsignedinteger]]] = {2: np.uint16, 4: np.uint32}
_WIDEST: Final = max(_WORDS)
_ESCAPE: Final = 255
_LEVEL: Final = 1
_NUM_SAMPLES: Final = 8
_SAMPLE_BYTES: Final = 32 << 10
_HOPELESS: Final = 1.2
"""Samples that promise so many times more than is wanted end the attempt before it costs."""


def write_delta(
    base: IO[bytes],
    target: IO[bytes],
    size_bytes: int,
    sink: Callable[[bytes], object],
    *,
    max_bytes: int,
) -> bool:
    """The delta from ``base`` to ``target`` was given to ``sink``, or would be too large.

    Args:
        base: What its user holds, open at its start.
        target: What its user wants, likewise.
        size_bytes: The size of either.
        sink: Takes the delta's bytes, in order.
        max_bytes: Largest delta worth having; one that grows beyond it is given up.

    Returns:
        Whether the delta is complete.
    """
    if _share_of_samples(base, target, size_bytes) * size_bytes > _HOPELESS * max_bytes:
        return False
    sink(_HEADER.pack(_MAGIC, size_bytes))
    written = _HEADER.size
    for size in chunk_sizes(size_bytes):
        block = _encode_block(_exactly(base, size), _exactly(target, size))
        written += len(block)
        if written > max_bytes:
            return False
        sink(block)
    return True


def apply_delta(base: IO[bytes], delta: IO[bytes], size_bytes: int) -> Iterator[bytes]:
    """The wanted blob's bytes, block by block; its digest is the caller's to compare.

    Args:
        base: The blob held, open at its start.
        delta: From a stranger, likewise.
        size_bytes: The size of the blob wanted, and of ``base``.

    Raises:
        PeerFault: ``delta`` is no delta between blobs of this size (code ``bad_delta``).
    """
    header = delta.read(_HEADER.size)
    if len(header) != _HEADER.size:
        raise _bad("it ends in its header")
    magic, announced = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise _bad("it does not begin as one")
    if announced != size_bytes:
        raise _bad(f"it makes {announced} bytes and {size_bytes} are wanted")
    for size in chunk_sizes(size_bytes):
        yield _apply_block(base, delta, size)
    if delta.read(1):
        raise _bad("bytes follow its last block")


def _share_of_samples(base: IO[bytes], target: IO[bytes], size_bytes: int) -> float:
    """What a few places, evenly spread, suggest the delta to be of the whole; 0 for a small blob.

    Both files are at their start again.
    """
    if size_bytes < 4 * _NUM_SAMPLES * _SAMPLE_BYTES:
        return 0.0
    num_bytes = 0
    for sample in range(_NUM_SAMPLES):
        start = size_bytes // _NUM_SAMPLES * sample // _WIDEST * _WIDEST
        base.seek(start)
        target.seek(start)
        num_bytes += len(
            _encode_block(_exactly(base, _SAMPLE_BYTES), _exactly(target, _SAMPLE_BYTES))
        )
    base.seek(0)
    target.seek(0)
    return num_bytes / (_NUM_SAMPLES * _SAMPLE_BYTES)


def _encode_block(base: bytes, target: bytes) -> bytes:
    # The narrower words win where only the low half of a number moved.
    candidates = []
    for word_bytes in _WORDS:
        changed = np.flatnonzero(_words(base, word_bytes) != _words(target, word_bytes))
        candidates.append((changed.size * (word_bytes + 1), word_bytes, changed))
    _, word_bytes, changed = min(candidates, key=lambda candidate: candidate[:2])
    gaps = _gaps_of(changed)
    values = _words(target, word_bytes)[changed]
    # By plane: the bytes that hardly differ between neighbours lie together.
    planes = values.view(np.uint8).reshape(-1, word_bytes).T.tobytes()
    packed = zlib.compress(gaps + planes, _LEVEL)
    tail = target[len(target) // word_bytes * word_bytes :]
    return _BLOCK.pack(word_bytes, changed.size, len(gaps), len(packed)) + packed + tail


def _apply_block(base: IO[bytes], delta: IO[bytes], size: int) -> bytes:
    word_bytes, num_changed, gap_bytes, packed_bytes = _read_block_header(delta, size)
    raw = _inflate(_exactly(delta, packed_bytes), gap_bytes + num_changed * word_bytes)
    positions = _positions_of(raw[:gap_bytes])
    num_words = size // word_bytes
    if positions.size != num_changed:
        raise _bad("a block names more or fewer positions than values")
    if num_changed and positions[-1] >= num_words:
        raise _bad("a position lies outside its block")
    tail_bytes = size - num_words * word_bytes
    block = bytearray(_exactly(base, size))
    values = np.frombuffer(raw, np.uint8, offset=gap_bytes).reshape(word_bytes, num_changed)
    words = np.frombuffer(block, _WORDS[word_bytes], count=num_words)
    words[positions] = np.ascontiguousarray(values.T).view(_WORDS[word_bytes]).ravel()
    if tail_bytes:
        block[size - tail_bytes :] = _exactly(delta, tail_bytes)
    return bytes(block)


def _read_block_header(delta: IO[bytes], size: int) -> tuple[int, int, int, int]:
    header = delta.read(_BLOCK.size)
    if len(header) != _BLOCK.size:
        raise _bad("it ends before its last block")
    word_bytes, num_changed, gap_bytes, packed_bytes = _BLOCK.unpack(header)
    if word_bytes not in _WORDS:
        raise _bad(f"a block has words of {word_bytes} bytes")
    num_words = size // word_bytes
    if num_changed > num_words or gap_bytes > num_changed + num_words // _ESCAPE:
        raise _bad("a block changes more words than it has")
    raw_bytes = gap_bytes + num_changed * word_bytes
    # zlib adds five bytes to 16 KiB at worst, and a little once (zlib's deflate.h).
    if packed_bytes > raw_bytes + raw_bytes // 1000 + 64:
        raise _bad("a block is larger packed than unpacked")
    return word_bytes, num_changed, gap_bytes, packed_bytes


def _inflate(packed: bytes, raw_bytes: int) -> bytes:
    inflater = zlib.decompressobj()
    try:
        # One byte more than announced: what a bomb gets to expand to.
        raw = inflater.decompress(packed, raw_bytes + 1)
    except zlib.error as error:
        raise _bad(f"a block does not unpack ({error})") from None
    if len(raw) != raw_bytes or not inflater.eof or inflater.unused_data:
        raise _bad("a block unpacks to another size than it says")
    return raw


def _words(data: bytes, word_bytes: int) -> NDArray[np.unsignedinteger]:
    return np.frombuffer(data, _WORDS[word_bytes], count=len(data) // word_bytes)


def _gaps_of(positions: NDArray[np.intp]) -> bytes:
    gaps = np.diff(positions, prepend=-1) - 1
    escapes = gaps // _ESCAPE
    coded = np.full(positions.size + int(escapes.sum()), _ESCAPE, np.uint8)
    coded[np.cumsum(escapes + 1) - 1] = gaps % _ESCAPE
    return coded.tobytes()


def _positions_of(coded: bytes) -> NDArray[np.int64]:
    steps = np.frombuffer(coded, np.uint8)
    is_last = steps < _ESCAPE
    # An escape passes over 255 words, any other byte over its own number and the word itself.
    return np.cumsum(steps.astype(np.int64) + is_last)[is_last] - 1


def _exactly(file: IO[bytes], size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise _bad("it, or what it applies to, ends too soon")
    return data


def _bad(reason: str) -> PeerFault:
    return PeerFault(
        f"The delta is not usable: {reason}; fetch the whole blob instead.", code="bad_delta"
    )
