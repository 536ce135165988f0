"""A node's blobs over libp2p: `/shoal/blob/1`, for those who cannot reach an HTTP port."""

from __future__ import annotations

import asyncio

from shoal.network.blob_chunks import BLOB_PROTOCOL, RANGE_REQUEST_BYTES, decode_span
from shoal.network.blob_gate import SLICE_BYTES, UploadGate
from shoal.network.blob_store import BlobRange, BlobStore
from shoal.network.port import Network
from shoal.protocol.ids import PeerId

__all__ = ["BLOB_PROTOCOL", "BlobService"]


class BlobService:
    """Answers ranges of the store's blobs, whole ones and those still being fetched.

    Args:
        store: What is served.
        network: The node that serves it.
        gate: How much is given to whom; shared with a `BlobServer` of the same node.
    """

    def __init__(
        self,
        store: BlobStore,
        network: Network,
        gate: UploadGate | None = None,
    ) -> None:
        self._store = store
        self._network = network
        self._gate = gate or UploadGate()

    def start(self) -> None:
        """The node answers, guests included; it stops when the node does."""
        self._network.serve(
            BLOB_PROTOCOL, self._answer, max_request_bytes=RANGE_REQUEST_BYTES, for_guests=True
        )

    async def _answer(self, peer: PeerId, payload: bytes) -> bytes:
        span = decode_span(payload)
        with (
            self._gate.serving(peer),
            self._store.open_range(span.digest, span.start, span.size_bytes) as opened,
        ):
            # Read after its turn has come: those who wait hold no memory.
            await self._pay(peer, opened)
            data = await asyncio.to_thread(opened.read)
        self._gate.meters.count("blob_bytes", len(data), plane="p2p", direction="out")
        return data

    async def _pay(self, peer: PeerId, opened: BlobRange) -> None:
        left = opened.size_bytes if self._gate.is_limited else 0
        while left > 0:
            await self._gate.turn(peer, min(left, SLICE_BYTES))
            left -= SLICE_BYTES
