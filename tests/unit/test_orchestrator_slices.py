"""Slices: a batch is cut once its last group has come, before anybody asks for it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from shoal.network.blob_store import BlobStore
from shoal.orchestrator.batches import Batch, Scored
from shoal.orchestrator.slices import Slicer
from shoal.protocol.errors import Unavailable
from shoal.rl.gradient import Group


def group(*advantages: float) -> Group:
    rows = len(advantages)
    return Group(
        prompt=np.array([1, 2], np.int32),
        token_ids=tuple(np.array([3, 4], np.int32) for _ in range(rows)),
        logprobs=tuple(np.array([-0.5, -0.5], np.float32) for _ in range(rows)),
        truncated=np.zeros(rows, np.bool_),
        advantages=np.array(advantages, np.float32),
        teaching=np.array(advantages) != 0,
    )


def scored(made: Group) -> Scored:
    rewards = tuple(float(a) for a in made.advantages)
    return Scored(group=made, environment=0, rewards=rewards, policy_version=0)


TEACHING = scored(group(1.0, -1.0))
SILENT = scored(group(0.0, 0.0))


def test_batch_is_cut_before_it_is_asked_for(tmp_path: Path) -> None:
    async def main() -> None:
        store = BlobStore(tmp_path, 1 << 20)
        slicer = Slicer(store, max_groups=2)
        batch = Batch(number=0, num_groups=4)
        slicer.begin(batch)
        batch.add([0, 1], [TEACHING, SILENT], "a" * 64)
        cutting = slicer._cutting[0]
        await asyncio.wait((cutting,), timeout=0.05)
        assert not cutting.done()
        batch.add([2, 3], [TEACHING, TEACHING], "b" * 64)
        await asyncio.wait((cutting,), timeout=5)
        assert store.total_bytes > 0
        slices = await slicer.of(batch)
        # Three groups teach; the silent one is not sent out.
        assert [part.units for part in slices] == [(0, 1), (2,)]
        assert [part.num_rows for part in slices] == [4, 2]
        stored = [await part.at_hand(store) for part in slices]
        assert stored == [part.blob for part in slices]
        assert [store.read(blob.sha256) for blob in stored] == [part.data for part in slices]

    asyncio.run(main())


def test_batch_that_teaches_nothing_has_no_slices(tmp_path: Path) -> None:
    async def main() -> None:
        slicer = Slicer(BlobStore(tmp_path, 1 << 20), max_groups=2)
        batch = Batch(number=3, num_groups=1)
        slicer.begin(batch)
        batch.add([0], [SILENT], "a" * 64)
        assert await slicer.of(batch) == []

    asyncio.run(main())


def test_slice_that_was_dropped_is_put_back(tmp_path: Path) -> None:
    async def main() -> None:
        store = BlobStore(tmp_path, 4096)
        slicer = Slicer(store, max_groups=2)
        batch = Batch(number=0, num_groups=1)
        slicer.begin(batch)
        batch.add([0], [TEACHING], "a" * 64)
        (part,) = await slicer.of(batch)
        assert part.blob is not None
        store.put_bytes(bytes(4000))
        assert not store.has(part.blob.sha256)
        assert store.read((await part.at_hand(store)).sha256) == part.data

    asyncio.run(main())


def test_full_disk_is_told_where_the_rows_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(store: BlobStore, data: bytes) -> None:
        raise Unavailable("The disk is full.", code="disk_full")

    async def main() -> None:
        store = BlobStore(tmp_path, 1 << 20)
        slicer = Slicer(store, max_groups=2)
        batch = Batch(number=0, num_groups=1)
        slicer.begin(batch)
        batch.add([0], [TEACHING], "a" * 64)
        with monkeypatch.context() as patch:
            patch.setattr(BlobStore, "put_bytes", full)
            (part,) = await slicer.of(batch)
            with pytest.raises(Unavailable):
                await part.at_hand(store)
        assert store.read((await part.at_hand(store)).sha256) == part.data

    asyncio.run(main())


def test_nothing_waits_for_a_batch_after_the_end(tmp_path: Path) -> None:
    async def main() -> None:
        slicer = Slicer(BlobStore(tmp_path, 1 << 20), max_groups=2)
        slicer.begin(Batch(number=0, num_groups=1))
        cutting = slicer._cutting[0]
        await slicer.close()
        assert cutting.cancelled()

    asyncio.run(main())
