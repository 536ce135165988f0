"""Streams: blobs over ``/shoal/blob/1`` against what a bare libp2p stream carries.

``python -m benchmarks.network.streams [--quick]``
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.network import bare
from benchmarks.network.blobs import made_blob
from benchmarks.network.parties import party, say, until_dismissed
from benchmarks.network.table import Finding, main_of, median
from shoal.network.blob_client import BlobClient
from shoal.network.blob_service import BlobService
from shoal.network.blob_store import BlobStore
from shoal.network.identity import NodeIdentity
from shoal.network.libp2p_node import Libp2pNode
from shoal.protocol.blob import BlobRef

LIMIT_SHARE = 0.8


async def holder(directory: str) -> None:
    """A node that serves its blobs over libp2p only; says its address."""
    node = Libp2pNode(NodeIdentity.generate(), "/ip4/127.0.0.1/tcp/0")
    BlobService(BlobStore(Path(directory), 8 << 30), node).start()
    await node.start()
    say(node.addresses[0])
    await until_dismissed()
    await node.stop()


async def fetch_s(address: str, ref: BlobRef) -> float:
    """The seconds in which the blob is fetched, checked and stored."""
    node = Libp2pNode(NodeIdentity.generate())
    await node.start()
    try:
        with TemporaryDirectory(prefix="shoal-bench-") as name:
            async with BlobClient(BlobStore(Path(name), 8 << 30), node) as client:
                await node.connect(address, timeout_s=30)
                begun_s = time.perf_counter()
                await client.fetch(ref, [address], timeout_s=600)
                return time.perf_counter() - begun_s
    finally:
        await node.stop()


async def mended(size_bytes: int) -> None:
    """What `bare.server` does, in a process where Shoal has mended the library."""
    await bare.serving(size_bytes)


async def rounds(size_bytes: int, count: int) -> tuple[list[float], list[float], list[float]]:
    """The seconds of the bare stream, the mended one and the blob, `count` times in turn."""
    bare_s, mended_s, blob_s = [], [], []
    with TemporaryDirectory(prefix="shoal-bench-") as name:
        ref = made_blob(Path(name), size_bytes)
        async with (
            party(bare.server, size_bytes) as pourer,
            party(mended, size_bytes) as mender,
            party(holder, name) as other,
        ):
            for _ in range(count):
                async with party(bare.poured, pourer.ready, size_bytes) as one:
                    bare_s.append(float(one.ready))
                mended_s.append(await asyncio.to_thread(bare.pour_s, mender.ready, size_bytes))
                blob_s.append(await fetch_s(other.ready, ref))
    return bare_s, mended_s, blob_s


def findings(*, quick: bool) -> Iterator[Finding]:
    """One blob over a libp2p stream, its digest checked, against a bare stream."""
    size_bytes, count = (64 << 20, 3) if quick else (256 << 20, 5)
    taken = asyncio.run(rounds(size_bytes, count))
    bare_s, mended_s, blob_s = taken
    mib = size_bytes >> 20
    bare_rate, mended_rate, blob_rate = (size_bytes / median(each) / 1e6 for each in taken)
    yield Finding(
        what=f"{mib} MiB over a bare libp2p stream (Noise, Yamux)",
        measured=f"{bare_rate:.0f} MB/s",
    )
    share, of_mended = (
        median([one / other for one, other in zip(stream_s, blob_s, strict=True)])
        for stream_s in (bare_s, mended_s)
    )
    yield Finding(
        what=f"{mib} MiB over the same stream, Noise and Yamux mended as in a worker",
        measured=f"{mended_rate:.0f} MB/s",
    )
    yield Finding(
        what=f"{mib} MiB over `/shoal/blob/1`, checked and on disk",
        measured=f"{blob_rate:.0f} MB/s, {share:.0%} of the bare stream, "
        f"{of_mended:.0%} of the mended one",
        wanted=f"≥ {LIMIT_SHARE:.0%}",
        reached=share >= LIMIT_SHARE,
    )


if __name__ == "__main__":
    main_of(__doc__, findings)
