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


@st.composite
def drifts(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """Numbers that all moved a little, as fp32 or bf16, or not as numbers at all."""
    base = draw(st.binary(min_size=1, max_size=3000))
    reach = draw(st.sampled_from([1, 100, 2**15, 2**31 - 1]))
    seed = draw(st.integers(0, 2**32 - 1))
    words = np.frombuffer(base.ljust(-(-len(base) // 4) * 4, b"\0"), np.uint32).copy()
    words += np.random.default_rng(seed).integers(-reach, reach, words.size).astype(np.uint32)
    return base, words.tobytes()[: len(base)]


@given(drifts())
def test_what_moved_a_little_everywhere_comes_out_right(pair: tuple[bytes, bytes]) -> None:
    base, target = pair
    assert applied(base, delta_of(base, target)) == target


@pytest.mark.parametrize("word", [np.uint16, np.uint32])
@pytest.mark.parametrize("behind", [0, 1, 3])
def test_small_differences_everywhere_take_little_room(
    word: type[np.unsignedinteger], behind: int
) -> None:
    draw = np.random.default_rng(0)
    num_words = 300_000
    base = draw.integers(0, 2**32, num_words).astype(word)
    # The lowest plane is full, all others are zero; some words wrap.
    target = base + draw.integers(-128, 128, num_words).astype(word)
    pair = [data.tobytes() + draw.bytes(behind) for data in (base, target)]
    delta = delta_of(*pair)
    assert applied(pair[0], delta) == pair[1]
    share = 1 / base.itemsize
    assert share < len(delta) / len(pair[0]) < share + 0.05
    assert delta[HEADER.size] == base.itemsize


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
    *planes: bytes,
    magic: bytes = b"SHDELTA3",
    announced: int = 8,
    word_bytes: int = 2,
    sizes: tuple[int, ...] | None = None,
    behind: bytes = b"",
) -> bytes:
    """A delta of one block, whose planes are given as they are to lie there."""
    lengths = sizes or tuple(map(len, planes))
    start = HEADER.pack(magic, announced) + bytes((word_bytes,))
    return start + struct.pack(f"<{len(lengths)}I", *lengths) + b"".join(planes) + behind


LOW, HIGH = b"\2\2\1\0", bytes(4)
FOUR = zlib.compress(bytes(4))


def test_the_forgeries_with_nothing_wrong_apply() -> None:
    # 2 is the difference +1, which wraps; 1 is -1.
    assert applied(b"\xff" * 8, forged(LOW, HIGH)) == b"\0\0\0\0\xfe\xff\xff\xff"
    packed = zlib.compress(bytes(400))
    assert applied(b"\xff" * 800, forged(packed, packed, announced=800)) == b"\xff" * 800
    planes = [bytes(2)] * 4
    assert applied(b"\xff" * 9, forged(*planes, word_bytes=4, announced=9, behind=b"x")) == (
        b"\xff" * 8 + b"x"
    )


@pytest.mark.parametrize(
    ("delta", "reason"),
    [
        (b"", "header"),
        (b"SHDELTA3\0\0", "header"),
        (forged(LOW, HIGH, magic=b"SHDELTA1"), "begin as one"),
        (forged(LOW, HIGH, announced=2**63), "are wanted"),
        (forged(LOW, HIGH, announced=7), "are wanted"),
        (forged(LOW, HIGH)[: HEADER.size], "last block"),
        (forged(LOW, HIGH)[: HEADER.size + 5], "ends too soon"),
        (forged(LOW, HIGH, word_bytes=0), "words of 0 bytes"),
        (forged(LOW, HIGH, word_bytes=3), "words of 3 bytes"),
        (forged(LOW, HIGH, word_bytes=255), "words of 255 bytes"),
        (forged(LOW), "longer than its block"),
        (forged(LOW, HIGH + b"\0"), "longer than its block"),
        (forged(LOW, sizes=(4, 2**32 - 1)), "longer than its block"),
        (forged(LOW, HIGH[:3], sizes=(4, 4)), "ends too soon"),
        (forged(LOW, FOUR), "longer than its block"),
        (forged(LOW, b""), "another size"),
        (forged(LOW, b"abc"), "does not unpack"),
        (forged(LOW, HIGH, b"", sizes=(4, 4), behind=HIGH), "follow its last block"),
        (forged(LOW, HIGH, HIGH, HIGH, word_bytes=4), "longer than its block"),
        (forged(LOW, HIGH, behind=b"x"), "follow its last block"),
    ],
)
def test_every_wrong_field_is_a_typed_error(delta: bytes, reason: str) -> None:
    with pytest.raises(PeerFault, match=reason) as caught:
        applied(b"\xff" * 8, delta)
    assert caught.value.code == "bad_delta"


@pytest.mark.parametrize(
    ("packed", "reason"),
    [
        (zlib.compress(bytes(399)), "another size"),
        (zlib.compress(bytes(401)), "another size"),
        (zlib.compress(bytes(400))[:-1], "another size"),
        (zlib.compress(bytes(400)) + b"x", "another size"),
        (zlib.compress(bytes(400), wbits=-15), "does not unpack"),
        (zlib.compress(bytes(400))[:-1] + b"\0", "does not unpack"),
    ],
)
def test_a_plane_that_unpacks_wrongly_is_a_typed_error(packed: bytes, reason: str) -> None:
    whole = zlib.compress(bytes(400))
    with pytest.raises(PeerFault, match=reason) as caught:
        applied(bytes(800), forged(whole, packed, announced=800))
    assert caught.value.code == "bad_delta"


@given(st.binary(max_size=200))
def test_noise_is_a_typed_error(noise: bytes) -> None:
    with pytest.raises(PeerFault):
        applied(bytes(64), HEADER.pack(b"SHDELTA3", 64) + noise)


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
    delta = forged(bomb, bomb, announced=CHUNK_BYTES)
    base = bytes(CHUNK_BYTES)
    tracemalloc.start()
    try:
        with pytest.raises(PeerFault, match="another size"):
            applied(base, delta)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # What comes of it is a plane, of which there is a second copy while it grows.
    assert peak_bytes < 16 << 20
