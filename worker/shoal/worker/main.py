"""The worker process: real parts put together, signals heeded, nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Final

from shoal.network.identity import NodeIdentity
from shoal.protocol.clock import SystemTime
from shoal.protocol.errors import Expired, ShoalError, Unavailable
from shoal.protocol.keystore import load_or_create_account
from shoal.protocol.node import HelloReply
from shoal.worker.config import Device, SamplingChoice, WorkerConfig
from shoal.worker.earnings import Collector
from shoal.worker.events import configure_logging, log_event, log_failure
from shoal.worker.evidence import EvidenceBook
from shoal.worker.finding import finder_of
from shoal.worker.node import Parts, WorkerNode
from shoal.worker.ports import Engine, ProviderChain
from shoal.worker.session import Credentials, Link, greet
from shoal.worker.stake import Unstaked, take_back_stake
from shoal.worker.ways import Ways

if TYPE_CHECKING:
    from shoal.contracts.gateway import ChainGateway
    from shoal.network.port import Network

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


def load_credentials(config: WorkerConfig) -> Credentials:
    """The worker's two keys, made at its first start.

    Raises:
        InvalidRequest: a key file is damaged or may be read by others.
        Unauthorised: the passphrase does not open the keystore.
    """
    return Credentials(
        account=load_or_create_account(config.account_path),
        identity=NodeIdentity.load_or_create(config.node_key_path),
    )


async def run_worker(config: WorkerConfig) -> None:
    """The worker has worked until SIGTERM or SIGINT, and left cleanly.

    Raises:
        ShoalError: it could not start or go on; one sentence says why.
    """
    handler = configure_logging(config.name, config.log_file)
    os.nice(config.niceness)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    _stop_on_signals(stop)
    try:
        await serve(config, stop)
    except ShoalError as error:
        log_failure("worker_failed", error)
        raise
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
        handler.flush()


async def serve(config: WorkerConfig, stop: asyncio.Event) -> None:
    """A worker of real parts has worked until ``stop`` was set."""
    if config.engine is SamplingChoice.VLLM:
        from shoal.models.vllm_engine import require_vllm

        # In a thread, and before anything is bid for: it takes seconds, and may be refused.
        await asyncio.to_thread(require_vllm)
    # Imported here, so that naming this module does not cost a libp2p and a web3 import.
    from shoal.network.libp2p_circuit import RelayClient
    from shoal.network.libp2p_node import Libp2pNode
    from shoal.worker.engine import PolicyEngine
    from shoal.worker.plane import open_swarm
    from shoal.worker.site import open_engine

    credentials = load_credentials(config)
    log_event("starting", node=credentials.node, account=credentials.address)
    async with contextlib.AsyncExitStack() as resources:
        relayed = RelayClient(accepts=config.share)
        network = Libp2pNode(credentials.identity, extensions=[relayed])
        link = Link(network)
        blobs = await resources.enter_async_context(open_swarm(config, network, link))

        async def connect(greeting: HelloReply) -> ProviderChain:
            return await resources.enter_async_context(_chain(config, credentials, greeting))

        engine: Engine = PolicyEngine(config.device, config.num_threads, config.engine)
        if config.ray.address is not None:
            # Likewise in a thread, and before anything is bid for.
            site = await asyncio.to_thread(open_engine, config)
            # Ray put a handler of its own before ours, which aborts 3 s after SIGTERM.
            _stop_on_signals(stop)
            resources.push_async_callback(asyncio.to_thread, site.close)
            config = config.with_actors(site.num_actors)
            log_event("site_joined", actors=site.num_actors)
            engine = site
        parts = Parts(
            network=network,
            credentials=credentials,
            connect_chain=connect,
            blobs=blobs,
            engine=engine,
            device=_device_name(config.device),
            link=link,
        )
        node = WorkerNode(config, parts)
        node.reporter.cache_bytes = lambda: blobs.store.total_bytes
        await node.run(stop)


def _stop_on_signals(stop: asyncio.Event) -> None:
    """SIGTERM and SIGINT set ``stop``, and nothing else."""
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, stop.set)


async def claim_all(config: WorkerConfig) -> int:
    """Everything the known jobs owe the account has been claimed; returns the micros paid.

    Raises:
        ShoalError: the orchestrator or the chain cannot be reached.
    """
    credentials = load_credentials(config)
    async with _greeted(config) as greeting, _chain(config, credentials, greeting) as chain:
        collector = Collector(
            chain,
            EvidenceBook(config.folder / "evidence"),
            credentials.address,
            greeting.domain,
            api_url=greeting.api_url,
            claim_min_micros=0,
        )
        return await collector.collect_all(even_small=True)


async def unstake(config: WorkerConfig) -> Unstaked:
    """The account's stake has left the chain's vault, or is on its way out.

    Raises:
        ShoalError: the orchestrator or the chain cannot be reached.
    """
    credentials = load_credentials(config)
    async with _greeted(config) as greeting, _chain(config, credentials, greeting) as chain:
        return await take_back_stake(chain, credentials.address)


@contextlib.asynccontextmanager
async def _greeted(config: WorkerConfig) -> AsyncIterator[HelloReply]:
    """The orchestrator's greeting, over a connection that lasts as long."""
    from shoal.network.libp2p_node import Libp2pNode

    # A key of its own, so that a running worker's connection is not disturbed.
    network = Libp2pNode(NodeIdentity.generate())
    link = Link(network)
    await network.start()
    try:
        yield await _greet_any(network, link, config)
    finally:
        await network.stop()


async def _greet_any(network: Network, link: Link, config: WorkerConfig) -> HelloReply:
    failure: ShoalError = Unavailable("The orchestrator names no address to dial.")
    time = SystemTime()
    find = finder_of(config, network, time)
    ways = Ways(config.orchestrator, config.folder, time, find=find, trust=config.trust)
    async for address, timeout_s in ways.addresses():
        try:
            peer = await link.dial(address, timeout_s=timeout_s)
            greeting = await greet(link)
            ways.require_trusted(greeting, peer, address)
            return greeting
        except (Unavailable, Expired) as error:
            failure = error
    raise failure


@contextlib.asynccontextmanager
async def _chain(
    config: WorkerConfig, credentials: Credentials, greeting: HelloReply
) -> AsyncIterator[ChainGateway]:
    """The chain the greeting names, through the provider's own node if it has one.

    Raises:
        InvalidRequest: the node at the URL follows another chain, or lacks the contracts.
        Unavailable: none of the URLs answers.
    """
    from shoal.contracts.gateway import ChainGateway
    from shoal.contracts.records import Deployment

    deployment = Deployment(
        chain_id=greeting.domain.chain_id,
        block_number=0,
        **greeting.contracts.model_dump(),
    )
    urls = (config.rpc_url,) if config.rpc_url else greeting.rpc_urls
    failure: ShoalError = Unavailable(
        "The orchestrator names no chain node; set rpc_url to one of your own.", code="no_rpc"
    )
    for url in urls:
        try:
            gateway = await ChainGateway.connect(url, deployment, credentials.account)
        except Unavailable as error:
            failure = error
            continue
        async with gateway:
            yield gateway
        return
    raise failure


def _device_name(device: Device) -> str:
    if device is not Device.AUTO:
        return device.value
    # What decides is torch, which a joining worker has not loaded yet.
    return "auto"
