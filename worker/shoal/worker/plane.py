"""The worker's blob plane as its configuration asks: what fetches, what serves, what tells."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Final

from shoal.network.blob_client import BlobClient
from shoal.network.blob_gate import UploadGate
from shoal.network.blob_server import BlobServer
from shoal.network.blob_service import BlobService
from shoal.network.blob_store import BlobStore
from shoal.network.blob_transfer import FetchRules
from shoal.network.discovery import Discovery
from shoal.network.port import Network
from shoal.protocol.clock import SystemTime
from shoal.protocol.holders import MAX_SOURCES
from shoal.worker.config import WorkerConfig
from shoal.worker.session import Link
from shoal.worker.sharing import Sharing, Stall
from shoal.worker.swarm import Swarm

_POLL_S: Final = 0.25
"""How often holders are asked for while a blob is fetched: news of a chunk is late by half."""
_WILDCARDS: Final = frozenset({"0.0.0.0", "[::]", "::"})


@contextlib.asynccontextmanager
async def open_swarm(config: WorkerConfig, network: Network, link: Link) -> AsyncIterator[Swarm]:
    """Blobs are fetched, and what is held is served and told of, inside the block.

    Raises:
        InvalidRequest: ``blob_listen`` is not ours to listen on.
    """
    store = BlobStore(config.folder / "blobs", config.cache_bytes + config.max_base_bytes)
    meters = network.meters
    async with contextlib.AsyncExitStack() as stack:
        rules = FetchRules(poll_s=_POLL_S)
        client = BlobClient(store, network, rules=rules, meters=meters)
        await stack.enter_async_context(client)
        discovery = Discovery(network, time=SystemTime(), bootstrap=config.bootstrap)
        stack.push_async_callback(discovery.stop)
        joining = asyncio.create_task(_join_table(discovery, link), name="discovery")
        stack.push_async_callback(_end, joining)
        if not config.share:
            yield Swarm(client, store, link, None, discovery)
            return
        gate = UploadGate(config.upload_mbit, meters=meters)
        BlobService(store, network, gate).start()
        port = None
        if config.blob_listen is not None:
            host, _, wanted = config.blob_listen.rpartition(":")
            server = BlobServer(store, host.strip("[]"), int(wanted), gate=gate)
            await server.start()
            stack.push_async_callback(server.stop)
            port = int(server.url.rpartition(":")[2])
        sharing = Sharing(link, store, lambda: stall_of(config, network, port))
        telling = asyncio.create_task(sharing.run(), name="sharing")
        stack.push_async_callback(_end, telling)
        swarm = Swarm(client, store, link, sharing, discovery)
        stack.push_async_callback(swarm.close)
        yield swarm


def stall_of(config: WorkerConfig, network: Network, port: int | None) -> Stall:
    """Where others may ask: over HTTP first, which is faster, then at the node's addresses."""
    sources = []
    http_port = None
    if config.blob_url is not None:
        sources.append(config.blob_url.rstrip("/"))
    elif config.blob_listen is not None and port is not None:
        host = config.blob_listen.rpartition(":")[0]
        if host in _WILDCARDS:
            http_port = port
        else:
            sources.append(f"http://{host}:{port}")
    sources += network.addresses
    return Stall(sources=tuple(sources[:MAX_SOURCES]), http_port=http_port)


async def _join_table(discovery: Discovery, link: Link) -> None:
    """The table of providers is joined through the orchestrator, once there is one."""
    await link.wait_joined()
    if link.address is not None:
        discovery.introduce(link.address)
    await discovery.start()


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    # One that had failed before says so here.
    with contextlib.suppress(asyncio.CancelledError):
        await task
