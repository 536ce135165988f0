"""A real node and blob server under malformed messages over sockets: no crash, bounded memory.

How fast honest peers are served meanwhile is measured in ``benchmarks/network``.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
import trio
from hostile import Attack, http_messages, pour_on, raw_messages
from wire_samples import Exchange, announcements, exchanges

from shoal.network.blob_client import BlobClient
from shoal.network.blob_server import BlobServer
from shoal.network.blob_service import BlobService
from shoal.network.blob_store import BlobStore
from shoal.network.identity import NodeIdentity
from shoal.network.libp2p_node import Libp2pNode
from shoal.network.port import TopicVerdict
from shoal.protocol.announcement import LOTS_TOPIC
from shoal.protocol.blob import BlobRef
from shoal.protocol.errors import ShoalError
from shoal.protocol.ids import PeerId
from shoal.protocol.node import HEARTBEAT_PROTOCOL

SEED = int(os.environ.get("SHOAL_FUZZ_SEED", "5"))
LOCAL = "/ip4/127.0.0.1/tcp/0"
WAIT_S = 30.0
WARM, FEW = 2, 12
GROWTH_BYTES = 50 << 20
BLOB = bytes(range(256)) * 256


@asynccontextmanager
async def target(directory: Path) -> AsyncIterator[tuple[Libp2pNode, BlobServer]]:
    """A node that serves every protocol with its real reader, and a blob server."""
    store = BlobStore(directory, 1 << 30)
    node = Libp2pNode(NodeIdentity.generate(), LOCAL)
    for protocol, exchange in exchanges().items():
        node.serve(protocol, reading(exchange))
    BlobService(store, node).start()
    node.subscribe(LOTS_TOPIC, unheard, check=announced)
    server = BlobServer(store, "127.0.0.1", 0)
    await node.start()
    await server.start()
    store.put_bytes(BLOB)
    try:
        yield node, server
    finally:
        await server.stop()
        await node.stop()


def reading(exchange: Exchange) -> Callable[[PeerId, bytes], Awaitable[bytes]]:
    """A handler that decodes as the real one does and answers as it would."""

    async def handler(_peer: PeerId, payload: bytes) -> bytes:
        exchange.request.decode(payload)
        return exchange.reply.valid[0] if exchange.reply else b""

    return handler


def announced(payload: bytes) -> TopicVerdict:
    """Accepts what decodes."""
    try:
        announcements()[LOTS_TOPIC].decode(payload)
    except ShoalError:
        return TopicVerdict.REJECT
    return TopicVerdict.ACCEPT


async def unheard(_peer: PeerId, _payload: bytes) -> None:
    raise AssertionError("a malformed announcement was delivered")


@pytest.mark.timeout(300)
def test_node_survives_malformed_messages_of_every_protocol(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        async with target(tmp_path) as (node, server):
            port = int(node.addresses[0].split("/")[4])
            digest = next(BlobStore(tmp_path, 1 << 30).digests())
            before = 0
            for count in (WARM, FEW):
                attack = Attack(node.addresses[0], SEED + count)
                await asyncio.to_thread(attack.run, count)
                # Some were dropped in the middle, and came back under another name.
                assert set(attack.sent.values()) == {count}
                assert attack.num_strangers > 1
                raw = itertools.islice(raw_messages(SEED), 4 * count)
                await asyncio.to_thread(trio.run, pour_on, port, raw)
                asked = itertools.islice(http_messages(digest, SEED), 20 * count)
                await asyncio.to_thread(trio.run, pour_on, port_of(server), asked)
                gc.collect()
                before = before or psutil.Process().memory_info().rss
            assert psutil.Process().memory_info().rss - before < GROWTH_BYTES
            await honest_peer_is_served(node, server, tmp_path / "honest", digest)

    caplog.set_level(logging.ERROR)
    asyncio.run(run())
    assert [record.getMessage() for record in caplog.records] == []


async def honest_peer_is_served(
    node: Libp2pNode, server: BlobServer, directory: Path, digest: str
) -> None:
    """A heartbeat is answered and a blob comes whole."""
    exchange = exchanges()[HEARTBEAT_PROTOCOL]
    assert exchange.reply is not None
    client = Libp2pNode(NodeIdentity.generate())
    await client.start()
    try:
        peer = await client.connect(node.addresses[0], timeout_s=WAIT_S)
        beat = exchange.request.valid[0]
        reply = await client.request(peer, HEARTBEAT_PROTOCOL, beat, timeout_s=WAIT_S)
        assert reply == exchange.reply.valid[0]
    finally:
        await client.stop()
    async with BlobClient(BlobStore(directory, 1 << 30)) as blobs:
        ref = BlobRef(sha256=digest, size_bytes=len(BLOB))
        path = await blobs.fetch(ref, [server.url], timeout_s=WAIT_S)
        assert path.read_bytes() == BLOB


def port_of(server: BlobServer) -> int:
    return int(server.url.rpartition(":")[2])


def test_handler_that_breaks_is_found_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def breaks(_peer: PeerId, payload: bytes) -> bytes:
        return bytes([payload[99_999]])

    async def run() -> None:
        async with target(tmp_path) as (node, _):
            node.serve(HEARTBEAT_PROTOCOL, breaks)
            await asyncio.to_thread(Attack(node.addresses[0], SEED).run, 1)

    caplog.set_level(logging.ERROR)
    asyncio.run(run())
    assert any("handler failed" in record.getMessage() for record in caplog.records)
