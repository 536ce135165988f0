"""Deltas give back exactly the bytes wanted, and hostile ones a typed error at bounded cost."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.network.blob_delta import apply_delta, write_delta
from shoal.protocol.blob import CHUNK_BYTES
from shoal.protocol.errors import PeerFault

HEADER = struct.Struct("<8sQ")
BLOCK = struct.Struct("<BIII")


def delta_of(base: bytes, target: bytes) -> bytes:
    parts: list[bytes] = []
    done = write_delta(
        io.BytesIO(base), io.BytesIO(target), len(base), parts.append, max_bytes=1 << 40
    )
    assert done
    return b"".join(parts)


def applied(base: bytes, delta: bytes) -> bytes:
    return b"".join(apply_delta(io.BytesIO(base), io.BytesIO(delta), len(base)))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[bytes, bytes]:
    base = draw(st.binary(max_size=3000))
    target = bytearray(base)
    if base:
        places = st.tuples(st.integers(0, len(base) - 1), st.integers(0, 255))
        for place, value in draw(st.lists(places, max_size=40)):
            target[place] = value
    return base, bytes(target)


@given(pairs())
def test_what_is_applied_is_the_target(pair: tuple[bytes, bytes]) -> None:
    base, target = pair
    assert applied(base, delta_of(base, target)) == target


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.001, 0.3, 1.0]))
@settings(max_examples=8, deadline=None)
def test_blobs_of_several_blocks_come_out_right(seed: int, density: float) -> None:
    draw = np.random.default_rng(seed)
    size = 2 * CHUNK_BYTES + int(draw.integers(0, 9))
    base = draw.bytes(size)
    words = np.frombuffer(base, np.uint8).copy()
    changed = draw.random(size) < density
    words[changed] = draw.integers(0, 256, int(changed.sum()), np.uint8)
    target = words.tobytes()
    delta = delta_of(base, target)
    assert applied(base, delta) == target
    if density < 0.01:
        assert len(delta) < size / 50


def test_gaps_of_every_length_are_kept() -> None:
    base = bytes(2 * 70_000)
    for gap in (0, 1, 253, 254, 255, 256, 509, 510, 511, 65_535):
        target = bytearray(base)
        target[0] = target[2 * (gap + 1)] = 7
        assert applied(base, delta_of(base, bytes(target))) == target


def test_a_delta_that_grows_too_large_is_given_up() -> None:
    base, target = bytes(10_000), np.random.default_rng(0).bytes(10_000)
    parts: list[bytes] = []
    args = io.BytesIO(base), io.BytesIO(target), 10_000, parts.append
    assert not write_delta(*args, max_bytes=5_000)
    assert sum(map(len, parts)) <= 5_000


def test_what_is_hopeless_is_seen_by_its_samples() -> None:
    base, target = bytes(4 << 20), np.random.default_rng(0).bytes(4 << 20)
    parts: list[bytes] = []
    args = io.BytesIO(base), io.BytesIO(target), len(base), parts.append
    assert not write_delta(*args, max_bytes=len(base) // 2)
    assert parts == []


def forged(
    *,
    magic: bytes = b"SHDELTA1",
    announced: int = 8,
    block: tuple[int, int, int, int] | None = None,
    raw: bytes = b"\0\1\2",
    packed: bytes | None = None,
    behind: bytes = b"",
) -> bytes:
    """A delta of one word of two bytes in a blob of eight, with one thing wrong."""
    body = zlib.compress(raw) if packed is None else packed
    fields = block or (2, 1, 1, len(body))
    return HEADER.pack(magic, announced) + BLOCK.pack(*fields) + body + behind


def test_the_forgery_with_nothing_wrong_applies() -> None:
    assert applied(b"\xff" * 8, forged()) == b"\1\2" + b"\xff" * 6


BODY = len(zlib.compress(b"\0\1\2"))


@pytest.mark.parametrize(
    ("delta", "reason"),
    [
        (b"", "header"),
        (b"SHDELTA1\0\0", "header"),
        (forged(magic=b"SHDELTA2"), "begin as one"),
        (forged(announced=2**63), "are wanted"),
        (forged(announced=7), "are wanted"),
        (forged()[:20], "last block"),
        (forged(block=(3, 1, 1, BODY)), "words of 3 bytes"),
        (forged(block=(0, 1, 1, BODY)), "words of 0 bytes"),
        (forged(block=(2, 5, 1, BODY)), "more words than it has"),
        (forged(block=(2, 2**32 - 1, 1, BODY)), "more words than it has"),
        (forged(block=(2, 1, 2**32 - 1, BODY)), "more words than it has"),
        (forged(block=(2, 1, 1, 2**32 - 1)), "larger packed"),
        (forged(block=(2, 1, 1, BODY + 1)), "ends too soon"),
        (forged(block=(2, 1, 1, BODY - 1)), "another size|does not unpack"),
        (forged(block=(2, 0, 0, BODY)), "another size"),
        (forged(block=(2, 0, 1, BODY)), "more words than it has"),
        (forged(raw=b"\0\1"), "another size"),
        (forged(raw=b"\0" * 6_000), "another size"),
        (forged(packed=b"not zlib at all"), "does not unpack"),
        (forged(raw=b"\xff\1\2"), "positions than values"),
        (forged(raw=b"\4\1\2"), "outside its block"),
        (forged(raw=b"\xfe\1\2"), "outside its block"),
        (forged(behind=b"x"), "follow its last block"),
    ],
)
def test_every_wrong_field_is_a_typed_error(delta: bytes, reason: str) -> None:
    with pytest.raises(PeerFault, match=reason) as caught:
        applied(b"\xff" * 8, delta)
    assert caught.value.code == "bad_delta"


@given(st.binary(max_size=200))
def test_noise_is_a_typed_error(noise: bytes) -> None:
    with pytest.raises(PeerFault):
        applied(bytes(64), HEADER.pack(b"SHDELTA1", 64) + noise)


@given(pairs(), st.data())
def test_a_flipped_byte_is_an_error_or_other_bytes(
    pair: tuple[bytes, bytes], data: st.DataObject
) -> None:
    base, target = pair
    delta = bytearray(delta_of(base, target))
    delta[data.draw(st.integers(0, len(delta) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        outcome = applied(base, bytes(delta))
    except PeerFault:
        return
    assert len(outcome) == len(base)


def test_a_bomb_is_not_inflated() -> None:
    bomb = zlib.compress(bytes(256 << 20), 9)
    size = CHUNK_BYTES
    delta = HEADER.pack(b"SHDELTA1", size) + BLOCK.pack(2, 200_000, 200_000, len(bomb)) + bomb
    base = bytes(size)
    tracemalloc.start()
    try:
        with pytest.raises(PeerFault, match="another size"):
            applied(base, delta)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 16 << 20
