"""Leases: the round trip of an offer pushed to workers that only dialled out.

``python -m benchmarks.network.leases [--quick]``
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager

from benchmarks.network import bare
from benchmarks.network.crew import crew
from benchmarks.network.parties import party, tcp_echo
from benchmarks.network.table import Finding, main_of, milliseconds, percentile
from shoal.network.identity import NodeIdentity
from shoal.network.libp2p_node import Libp2pNode
from shoal.protocol.ids import PeerId
from shoal.protocol.node import HEARTBEAT_PROTOCOL, LEASE_PROTOCOL

WORKERS = 50
OFFER_BYTES = 4096
BEAT_BYTES = 400
BEAT_S = 1.0
LIMIT_MS = 20.0


async def heartbeat(_peer: PeerId, _payload: bytes) -> bytes:
    """What an orchestrator answers to a beat, in size."""
    return bytes(512)


@asynccontextmanager
async def workers(beat_s: float) -> AsyncIterator[tuple[Libp2pNode, list[PeerId]]]:
    """An orchestrator's node here, with `WORKERS` workers of another process connected."""
    node = Libp2pNode(NodeIdentity.generate(), "/ip4/127.0.0.1/tcp/0")
    node.serve(HEARTBEAT_PROTOCOL, heartbeat)
    await node.start()
    try:
        async with party(crew, node.addresses[0], WORKERS, beat_s, BEAT_BYTES) as others:
            peers = [PeerId(name) for name in json.loads(others.ready)["peers"]]
            async with asyncio.timeout(30):
                while not node.peers() >= set(peers):  # noqa: ASYNC110  # the port tells of peers lost, not found
                    await asyncio.sleep(0.01)
            yield node, peers
    finally:
        await node.stop()


async def offers_s(node: Libp2pNode, peers: Sequence[PeerId], count: int) -> list[float]:
    """The seconds of each of `count` offers to a worker drawn at random."""
    draw = random.Random(1)
    # The first offer to a worker opens its stream; what is measured is the market at work.
    for peer in peers:
        await node.request(peer, LEASE_PROTOCOL, bytes(OFFER_BYTES), timeout_s=30)
    taken = []
    for _ in range(count):
        peer = draw.choice(peers)
        begun_s = time.perf_counter()
        await node.request(peer, LEASE_PROTOCOL, bytes(OFFER_BYTES), timeout_s=30)
        taken.append(time.perf_counter() - begun_s)
    return taken


async def tcp_s(port: int, count: int) -> list[float]:
    """The seconds of each of `count` round trips of the same sizes over asyncio's TCP."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    taken = []
    for _ in range(count):
        begun_s = time.perf_counter()
        writer.write(bytes(OFFER_BYTES))
        await reader.readexactly(64)
        taken.append(time.perf_counter() - begun_s)
    writer.close()
    return taken


async def with_workers(beat_s: float, count: int) -> list[float]:
    """Offers while the workers beat every `beat_s`; 0 is quiet."""
    async with workers(beat_s) as (node, peers):
        return await offers_s(node, peers, count)


async def over_bare_libp2p(count: int) -> list[float]:
    """The same sizes between two bare py-libp2p hosts."""
    async with party(bare.server, 0) as other:
        return await asyncio.to_thread(bare.echoes_s, other.ready, count)


async def over_tcp(count: int) -> list[float]:
    """The same sizes over a plain socket."""
    async with party(tcp_echo) as other:
        return await tcp_s(int(other.ready), count)


def findings(*, quick: bool) -> Iterator[Finding]:
    """Round trips over TCP, over bare libp2p, and of offers, quiet and under heartbeats."""
    count = 500 if quick else 3000
    yield Finding(what="asyncio TCP echo", measured=milliseconds(asyncio.run(over_tcp(count))))
    bare_s = asyncio.run(over_bare_libp2p(count))
    yield Finding(what="bare libp2p, one open stream", measured=milliseconds(bare_s))
    for what, beat_s in (("quiet", 0.0), (f"each beating every {BEAT_S:g} s", BEAT_S)):
        taken = asyncio.run(with_workers(beat_s, count))
        yield Finding(
            what=f"offer to one of {WORKERS} workers, {what}",
            measured=milliseconds(taken),
            wanted=f"p99 ≤ {LIMIT_MS:g} ms",
            reached=percentile(taken, 0.99) * 1e3 <= LIMIT_MS,
        )


if __name__ == "__main__":
    main_of(__doc__, findings)
