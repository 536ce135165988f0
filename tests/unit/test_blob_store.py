"""The blob store: names are digests, room is bounded, nothing half-written is kept."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from shoal.network.blob_parts import PartialBlob
from shoal.network.blob_store import BlobStore
from shoal.protocol.blob import CHUNK_BYTES, BlobRef
from shoal.protocol.errors import InvalidRequest, NotFound, PeerFault, Unavailable


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs", 1000)


def test_bytes_come_back_by_their_digest(store: BlobStore) -> None:
    ref = store.put_bytes(b"hello")
    assert ref.sha256 == hashlib.sha256(b"hello").hexdigest()
    assert (ref.size_bytes, ref.chunks_sha256) == (5, None)
    assert store.read(ref.sha256) == b"hello"
    with store.open(ref.sha256) as file:
        assert file.read() == b"hello"


def test_chunk_list_names_each_chunk(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "blobs", 64 << 20)
    data = b"a" * CHUNK_BYTES + b"b" * CHUNK_BYTES + b"c"
    source = tmp_path / "source"
    source.write_bytes(data)
    ref = store.put_file(source)
    assert ref == store.put_bytes(data)
    assert ref.chunks_sha256 is not None
    parts = [data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES)]
    expected = b"".join(hashlib.sha256(part).digest() for part in parts)
    assert store.read(ref.chunks_sha256) == expected


@pytest.mark.parametrize("size", [CHUNK_BYTES, CHUNK_BYTES + 1])
def test_chunk_list_begins_past_one_chunk(tmp_path: Path, size: int) -> None:
    ref = BlobStore(tmp_path, 64 << 20).put_bytes(bytes(size))
    assert (ref.chunks_sha256 is None) == (size == CHUNK_BYTES)


def test_least_recently_used_is_dropped_first(store: BlobStore) -> None:
    first, second = store.put_bytes(b"1" * 400), store.put_bytes(b"2" * 400)
    store.path(first.sha256)
    third = store.put_bytes(b"3" * 400)
    assert [store.has(ref.sha256) for ref in (first, second, third)] == [True, False, True]
    assert store.total_bytes == 800


def test_pinned_blob_stays_and_a_full_store_says_so(store: BlobStore) -> None:
    pinned = store.put_bytes(b"1" * 700, pin=True)
    with pytest.raises(Unavailable, match="full"):
        store.put_bytes(b"2" * 400)
    assert store.has(pinned.sha256)
    store.unpin(pinned.sha256)
    store.put_bytes(b"2" * 400)
    assert not store.has(pinned.sha256)


def test_blob_larger_than_the_store_is_refused(store: BlobStore) -> None:
    small = store.put_bytes(b"1")
    with pytest.raises(InvalidRequest, match="does not fit"):
        store.put_bytes(b"2" * 1001)
    assert store.has(small.sha256)


def test_wrong_digest_keeps_nothing(store: BlobStore, tmp_path: Path) -> None:
    with store.draft() as draft:
        draft.write(b"evil")
        with pytest.raises(PeerFault) as caught:
            draft.keep(expected=hashlib.sha256(b"good").hexdigest())
    assert caught.value.code == "wrong_digest"
    assert list(store.digests()) == []
    assert list((tmp_path / "blobs" / "drafts").iterdir()) == []


def test_store_is_found_again_and_old_drafts_are_cleared(tmp_path: Path) -> None:
    ref = BlobStore(tmp_path, 1000).put_bytes(b"kept")
    leftover = tmp_path / "drafts" / "abc"
    leftover.write_bytes(b"half")
    again = BlobStore(tmp_path, 1000)
    assert again.read(ref.sha256) == b"kept"
    assert again.total_bytes == 4
    assert not leftover.exists()


def test_damaged_blob_is_found_out(store: BlobStore) -> None:
    ref = store.put_bytes(b"right")
    store.path(ref.sha256).write_bytes(b"wrong")
    with pytest.raises(NotFound, match="damaged"):
        store.read(ref.sha256)
    assert not store.has(ref.sha256)


@pytest.mark.parametrize("name", ["../../etc/passwd", "", "A" * 64, "g" * 64, "a" * 63])
def test_name_that_is_no_digest_is_refused(store: BlobStore, name: str) -> None:
    with pytest.raises(InvalidRequest, match="not a SHA-256"):
        store.path(name)


def test_missing_blob_is_named(store: BlobStore) -> None:
    with pytest.raises(NotFound, match="not in this store"):
        store.path("a" * 64)
    store.delete("a" * 64)


def reference(data: bytes) -> tuple[BlobRef, bytes]:
    """The blob's reference, and its chunk list."""
    parts = [data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES)]
    chunk_list = b"".join(hashlib.sha256(part).digest() for part in parts)
    ref = BlobRef(
        sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
        chunks_sha256=hashlib.sha256(chunk_list).hexdigest(),
    )
    return ref, chunk_list


TWO = b"a" * CHUNK_BYTES + b"b" * 1000


def test_blob_in_part_serves_what_was_verified(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, 64 << 20)
    ref, chunk_list = reference(TWO)
    assert store.held_chunks(ref.sha256) is None
    with PartialBlob(store, ref, chunk_list) as blob:
        assert blob.missing() == [0, 1]
        assert not blob.accept(1, b"x" * 1000)
        with pytest.raises(NotFound) as caught:
            store.open_range(ref.sha256, CHUNK_BYTES, 1000)
        assert caught.value.code == "chunk_not_here"
        assert blob.accept(1, TWO[CHUNK_BYTES:])
        with store.open_range(ref.sha256, CHUNK_BYTES, 1000) as opened:
            assert opened.read() == b"b" * 1000
        for start, size_bytes in ((0, 10), (CHUNK_BYTES - 1, 2), (0, None)):
            with pytest.raises(NotFound, match="ot all of bytes"):
                store.open_range(ref.sha256, start, size_bytes)
        assert store.held_chunks(ref.sha256) == frozenset({1})
        assert not store.has(ref.sha256)
        assert blob.accept(0, TWO[:CHUNK_BYTES])
        # One who reads while the blob becomes whole goes on reading.
        with store.open_range(ref.sha256, 0, 10) as opened:
            blob.keep()
            assert opened.read() == b"a" * 10
    assert store.read(ref.sha256) == TWO
    assert store.partials() == ()
    assert store.held_chunks(ref.sha256) == frozenset({0, 1})


def test_blob_in_part_counts_and_goes_before_any_whole_one(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, CHUNK_BYTES + 10_000)
    ref, chunk_list = reference(TWO)
    kept = store.put_bytes(b"whole")
    with PartialBlob(store, ref, chunk_list) as blob:
        assert blob.accept(1, TWO[CHUNK_BYTES:])
        # While it is assembled it has all of its room, and is not dropped.
        assert store.total_bytes == len(TWO) + 5
        with pytest.raises(Unavailable, match="full"):
            store.reserve(10_000)
        assert not store.has(kept.sha256)
        kept = store.put_bytes(b"whole")
    assert store.partials() == (ref.sha256,)
    assert 1000 <= store.total_bytes - 5 < 100_000
    again = BlobStore(tmp_path, CHUNK_BYTES + 10_000)
    assert again.total_bytes == store.total_bytes
    again.reserve(CHUNK_BYTES + 9_000)
    assert again.has(kept.sha256)
    assert again.total_bytes == 5
    assert list((tmp_path / "drafts").iterdir()) == []


def test_blob_being_read_is_not_dropped(store: BlobStore) -> None:
    first = store.put_bytes(b"1" * 600)
    with store.open_range(first.sha256, 0, None), pytest.raises(Unavailable, match="full"):
        store.put_bytes(b"2" * 600)
    # Control: nobody reads it any more.
    store.put_bytes(b"2" * 600)
    assert not store.has(first.sha256)


def test_blob_whose_bytes_may_not_have_reached_the_disk_is_fetched_again(tmp_path: Path) -> None:
    ref, chunk_list = reference(TWO)
    for settled in (False, True):
        store = BlobStore(tmp_path, 64 << 20)
        with PartialBlob(store, ref, chunk_list) as blob:
            for index in blob.missing():
                assert blob.accept(index, TWO[index * CHUNK_BYTES :][:CHUNK_BYTES])
            blob.keep()
        if settled:
            store.settle(ref.sha256)
        assert BlobStore(tmp_path, 64 << 20).has(ref.sha256) is settled
        assert list((tmp_path / "drafts").iterdir()) == []


@pytest.mark.parametrize("size", [3, CHUNK_BYTES + 1])
def test_what_is_put_unsettled_is_there_at_once_and_for_good_once_settled(
    tmp_path: Path, size: int
) -> None:
    for settled in (False, True):
        store = BlobStore(tmp_path, 64 << 20)
        ref = store.put_bytes(bytes(size), settled=False)
        assert store.read(ref.sha256) == bytes(size)
        if settled:
            store.settle(ref.sha256)
        assert BlobStore(tmp_path, 64 << 20).has(ref.sha256) is settled
        assert list((tmp_path / "drafts").iterdir()) == []


def test_nothing_is_left_of_a_blob_that_is_dropped_before_the_disk_has_it(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, 64 << 20)
    ref = store.put_bytes(b"abc", settled=False)
    assert len(list((tmp_path / "drafts").iterdir())) == 1
    store.delete(ref.sha256)
    assert list((tmp_path / "drafts").iterdir()) == []


def test_full_disk_is_said_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = BlobStore(tmp_path, 64 << 20)
    ref, chunk_list = reference(TWO)

    def no_room(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", no_room)
        patched.setattr(os, "fsync", no_room)
        with pytest.raises(Unavailable) as caught:
            store.put_bytes(b"data")
        assert caught.value.code == "disk_full"
        with (
            pytest.raises(Unavailable) as caught,
            PartialBlob(store, ref, chunk_list) as blob,
        ):
            blob.accept(1, TWO[CHUNK_BYTES:])
        assert caught.value.code == "disk_full"
    assert list((tmp_path / "drafts").iterdir()) == []
    assert store.total_bytes == 0
    # Control: with room it is kept.
    with PartialBlob(store, ref, chunk_list) as blob:
        assert blob.accept(1, TWO[CHUNK_BYTES:])
    assert store.partials() == (ref.sha256,)
