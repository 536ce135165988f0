"""The slices of a batch, made while workers still differentiate the batch before."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from dataclasses import dataclass

from shoal.network.blob_store import BlobStore
from shoal.orchestrator.batches import Batch
from shoal.orchestrator.placement import Parcel
from shoal.protocol.blob import BlobRef
from shoal.protocol.errors import ShoalError
from shoal.rl.gradient import encode_slice, slice_groups


@dataclass(eq=False, kw_only=True)
class BatchSlice:
    """What one gradient task is about.

    Attributes:
        units: Its groups, counted through all slices of the batch in order.
        data: Its rows, encoded.
        num_rows: How many completions.
        blob: As what they were stored last; None before that.
    """

    units: Parcel
    data: bytes
    num_rows: int
    blob: BlobRef | None = None

    async def at_hand(self, blobs: BlobStore) -> BlobRef:
        """As what workers can fetch the rows, though the store may have dropped them meanwhile.

        Raises:
            Unavailable: The disk is full; ask again.
        """
        if self.blob is None or not blobs.has(self.blob.sha256):
            self.blob = await asyncio.to_thread(blobs.put_bytes, self.data)
        return self.blob


class Slicer:
    """Cuts each batch as soon as it is complete, so that its gradient can be offered at once.

    Args:
        blobs: Where slices go.
        max_groups: The most groups of one slice.
    """

    def __init__(self, blobs: BlobStore, max_groups: int) -> None:
        self._blobs = blobs
        self._max_groups = max_groups
        self._cutting: dict[int, asyncio.Task[list[BatchSlice]]] = {}

    def begin(self, batch: Batch) -> None:
        """The batch will be cut once its last group has come."""
        self._cutting[batch.number] = asyncio.create_task(
            self._cut(batch), name=f"slices of batch {batch.number}"
        )

    async def of(self, batch: Batch) -> list[BatchSlice]:
        """The slices of a batch that has begun; none where no group teaches."""
        return await self._cutting.pop(batch.number)

    async def close(self) -> None:
        """Nothing is being cut."""
        for task in self._cutting.values():
            task.cancel()
        await asyncio.gather(*self._cutting.values(), return_exceptions=True)
        self._cutting.clear()

    async def _cut(self, batch: Batch) -> list[BatchSlice]:
        await batch.complete.wait()
        return await asyncio.to_thread(self._make, batch)

    def _make(self, batch: Batch) -> list[BatchSlice]:
        groups = batch.teaching()
        parts = slice_groups(groups, -(-len(groups) // self._max_groups))
        ends = itertools.accumulate(len(part) for part in parts)
        slices = []
        for end, part in zip(ends, parts, strict=True):
            rows = encode_slice(part)
            units = tuple(range(end - len(part), end))
            made = BatchSlice(units=units, data=rows.encode(), num_rows=rows.num_rows)
            # A full disk is told to whoever needs the rows there, who can wait.
            with contextlib.suppress(ShoalError):
                made.blob = self._blobs.put_bytes(made.data)
            slices.append(made)
        return slices
