"""The orchestrator process: opens every socket, file and key, and wires the parts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor

import uvicorn
from fastapi import FastAPI

from shoal.contracts.delivery import Policy
from shoal.contracts.deployment import load_deployment
from shoal.contracts.gateway import ChainGateway
from shoal.models.libraries import load_libraries
from shoal.network.blob_gate import UploadGate
from shoal.network.blob_server import BlobServer
from shoal.network.blob_service import BlobService
from shoal.network.blob_store import BlobStore
from shoal.network.identity import NodeIdentity
from shoal.network.libp2p_node import Libp2pNode
from shoal.network.libp2p_relay import RelayLimits, RelayServer
from shoal.network.port import Limits
from shoal.orchestrator.api import Api
from shoal.orchestrator.auctioneer import Auctioneer
from shoal.orchestrator.bonds import Bonds
from shoal.orchestrator.config import OrchestratorConfig
from shoal.orchestrator.context import Context
from shoal.orchestrator.deltas import PolicyDeltas
from shoal.orchestrator.dispatcher import Dispatcher
from shoal.orchestrator.effects import effect_kinds
from shoal.orchestrator.frontdesk import FrontDesk
from shoal.orchestrator.holders import HolderDesk
from shoal.orchestrator.intake import Intake
from shoal.orchestrator.jobs import Jobs
from shoal.orchestrator.journal import Journal
from shoal.orchestrator.metrics import Vitals
from shoal.orchestrator.open_files import allow_connections
from shoal.orchestrator.outbox import Outbox
from shoal.orchestrator.presence import Presence
from shoal.orchestrator.probe import ProbeDesk
from shoal.orchestrator.publisher import Publisher
from shoal.orchestrator.roster import Roster, own_binding
from shoal.orchestrator.sealer import Sealer
from shoal.orchestrator.setbacks import Setbacks
from shoal.orchestrator.settler import Settler
from shoal.orchestrator.standstill import Standstills
from shoal.orchestrator.store.database import Database
from shoal.orchestrator.track_record import TrackRecord
from shoal.orchestrator.verifier import Verifier
from shoal.orchestrator.views import Views
from shoal.protocol.clock import SystemTime
from shoal.protocol.errors import InvalidRequest, Unavailable
from shoal.protocol.keystore import load_account
from shoal.protocol.signing import Domain

_log = logging.getLogger(__name__)

_TICK_S = 0.25
_STAKES_S = 60.0
_BONDS_S = 60.0
READY_LINE = "shoal-orchestrator-ready"


class Orchestrator:
    """All parts of one orchestrator, running between `started` and its end."""

    def __init__(self, context: Context, api_url: str, blob_url: Callable[[], str]) -> None:
        self.context = context
        self.journal = Journal(context)
        self.roster = Roster(context, api_url, blob_url)
        self.outbox = Outbox(
            context.database,
            context.chain.sender.transactions,
            effect_kinds(context.chain.escrow, context.time),
            context.time,
            Policy(depth=context.config.chain_depth),
        )
        self.settler = Settler(context, self.journal, self.outbox)
        self.bonds = Bonds(context, self.outbox)
        self.record = TrackRecord(context, self.roster)
        self.setbacks = Setbacks(context, self.journal, self.roster, self.record)
        self.dispatcher = Dispatcher(context, self.roster, self.settler, self.setbacks, self.record)
        self.sealer = Sealer(context, self.roster, self.record.backing_of)
        self.auctioneer = Auctioneer(
            context, self.roster, self.dispatcher, self.setbacks, self.sealer, self.record
        )
        self.publisher = Publisher(context, self.journal, own_binding(context))
        deltas = PolicyDeltas(
            context.blobs, context.network.meters, enabled=context.config.policy_deltas
        )
        self.holder_desk = HolderDesk(context.network, context.time, self.roster, deltas)
        self.jobs = Jobs(
            context,
            self.journal,
            self.settler,
            self.dispatcher,
            self.auctioneer,
            self.publisher,
            self.bonds,
            deltas,
        )
        self.verifier = Verifier(
            context, self.journal, self.settler, self.dispatcher, self.record, self.jobs
        )
        self.standstills = Standstills(
            context, self.journal, self.sealer, self.auctioneer, self.dispatcher, self.jobs
        )
        self.intake = Intake(context, self.journal, self.jobs.start)
        self.front_desk = FrontDesk(
            self.roster, self.auctioneer, self.sealer, self.dispatcher, self.jobs.open_jobs
        )
        vitals = Vitals(context, self.roster, self.dispatcher)
        views = Views(context, self.jobs, self.roster, self.auctioneer, vitals)
        self.api = Api(
            context,
            self.intake,
            self.jobs,
            self.journal,
            self.settler,
            self.publisher,
            views,
            self.roster,
        )

    async def run(self, stop: asyncio.Event) -> None:
        """Everything runs until ``stop`` is set or a part breaks."""
        await self.bonds.open()
        await self.record.restore()
        await self.sealer.restore()
        await self.jobs.resume()
        loops = [
            asyncio.create_task(work, name=name)
            for name, work in {
                "sealer": self.sealer.run(),
                "auctioneer": self.auctioneer.run(),
                "announcer": self.auctioneer.announcer.run(),
                "verifier": self.verifier.run(),
                "outbox": self.outbox.run(),
                "funding": self.intake.watch_funding(),
                "jobs": self.jobs.watch(),
                "clocks": self._tick(),
                "settlement": self._settle(),
                "stakes": self._watch_stakes(),
                "bonds": self._watch_bonds(),
                "stop": stop.wait(),
            }.items()
        ]
        try:
            done, _ = await asyncio.wait(loops, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in loops:
                task.cancel()
            await asyncio.gather(*loops, return_exceptions=True)
            await self.jobs.close()
            await self.dispatcher.offers.close()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            await self.dispatcher.reap()
            # Capacity also returns by the clock alone: suspensions end, bids lapse.
            self.auctioneer.poke()
            await self.standstills.look()

    async def _watch_stakes(self) -> None:
        while True:
            await asyncio.sleep(_STAKES_S)
            self.record.forget_old()
            try:
                await self.roster.refresh_stakes()
            except Unavailable as error:
                _log.warning("stakes_not_read", extra={"reason": error.message})

    async def _watch_bonds(self) -> None:
        while True:
            await asyncio.sleep(_BONDS_S)
            try:
                await self.bonds.take_back()
            except Unavailable as error:
                _log.warning("bonds_wait", extra={"reason": error.message})

    async def authorise_upload(self, token: str, digest: str, size_bytes: int) -> None:
        """Passes if ``token`` is a lease's, or of a request for evidence, and these its bytes.

        Raises:
            Unauthorised: it is neither.
        """
        desk = self.verifier.evidence_desk
        if desk.expects(token):
            desk.authorise(token, digest, size_bytes)
        else:
            await self.dispatcher.authorise_upload(token, digest, size_bytes)

    async def _settle(self) -> None:
        while True:
            await asyncio.sleep(self.context.config.epoch_ms / 1000)
            await self.settler.settle_all(
                [job_id for job_id in self.jobs.running_ids() if self.settler.knows(job_id)]
            )


@contextlib.asynccontextmanager
async def open_context(config: OrchestratorConfig) -> AsyncIterator[Context]:
    """Opens what the configuration names; all of it is closed again on the way out.

    Raises:
        InvalidRequest, Unavailable: naming what could not be opened, and why.
    """
    config.data_dir.mkdir(parents=True, exist_ok=True)
    account = load_account(config.key_file)
    deployment = load_deployment(config.deployment_file)
    identity = NodeIdentity.load_or_create(config.data_dir / "node.key")
    async with contextlib.AsyncExitStack() as stack:
        chain = await ChainGateway.connect(config.rpc_url, deployment, account)
        stack.push_async_callback(chain.close)
        database = Database(config.resolved_database_url())
        stack.callback(database.close)
        allow_connections(config.max_connections)
        limits = Limits(max_connections=config.max_connections)
        relay = RelayServer(RelayLimits(bytes_per_s=max(1, int(config.relay_mbit * 125_000))))
        extensions = [relay] if config.relay else []
        network = Libp2pNode(
            identity,
            config.p2p_listen,
            announce=config.p2p_announce,
            limits=limits,
            extensions=extensions,
        )
        await network.start()
        stack.push_async_callback(network.stop)
        compute = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")
        stack.callback(compute.shutdown, wait=True, cancel_futures=True)
        checking = ThreadPoolExecutor(max_workers=1, thread_name_prefix="check")
        stack.callback(checking.shutdown, wait=True, cancel_futures=True)
        auditing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="audit")
        stack.callback(auditing.shutdown, wait=True, cancel_futures=True)
        yield Context(
            config=config,
            database=database,
            network=network,
            blobs=BlobStore(config.data_dir / "blobs", config.blob_cache_bytes),
            chain=chain,
            deployment=deployment,
            account=account,
            identity=identity,
            domain=Domain(chain_id=deployment.chain_id, escrow=deployment.job_escrow),
            time=SystemTime(),
            compute=compute,
            checking=checking,
            auditing=auditing,
        )


async def run_orchestrator(config: OrchestratorConfig) -> None:
    """Runs one orchestrator until SIGINT or SIGTERM; prints one ready line to stdout."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, stop.set)
    await serve(config, stop, _announce)


async def serve(
    config: OrchestratorConfig, stop: asyncio.Event, on_ready: Callable[[str, Context], None]
) -> None:
    """One orchestrator of real parts has run until ``stop`` was set.

    ``on_ready`` is called with the API's URL once everything answers.
    """
    listening = _bind(config.api_host, config.api_port)
    api_url = f"http://{config.public_host}:{listening.getsockname()[1]}"
    async with open_context(config) as context:
        blob_server: BlobServer | None = None
        orchestrator = Orchestrator(
            context, api_url, lambda: _advertised(blob_server, config.public_host)
        )
        # Before anything is served: what was under way when the last process ended.
        await orchestrator.outbox.open()
        gate = UploadGate(config.upload_mbit, meters=context.network.meters)
        blob_server = BlobServer(
            context.blobs,
            host=config.blob_host,
            port=config.blob_port,
            authorise=orchestrator.authorise_upload,
            gate=gate,
        )
        await blob_server.start()
        # For who cannot reach that port: the same, over the connection it has.
        BlobService(context.blobs, context.network, gate).start()
        orchestrator.front_desk.serve(context.network)
        ProbeDesk(context.network, context.time).serve()
        orchestrator.holder_desk.serve()
        presence = Presence(context)
        server = _server(orchestrator.api.app())
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            await presence.start()
            on_ready(api_url, context)
            # In the compute thread, before any job's work: the first job need not wait for it.
            context.compute.submit(load_libraries, 1)
            await orchestrator.run(stop)
        finally:
            await presence.stop()
            orchestrator.journal.dismiss()
            server.should_exit = True
            await serving
            await blob_server.stop()


def _advertised(blob_server: BlobServer | None, public_host: str) -> str:
    """Where others reach the blob server, which may itself listen on a wildcard address."""
    if blob_server is None:
        return ""
    return f"http://{public_host}:{blob_server.url.rpartition(':')[2]}"


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Of a socket whose protocol is not named, asyncio leaves Nagle's algorithm on: a body would
    # wait 40 ms for the acknowledgement of its own headers.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise InvalidRequest(
            f"The API cannot listen on {host}:{port}: {error.strerror}; choose another api_port "
            "or stop what uses it.",
            code="port_in_use",
        ) from None
    return listening


def _server(app: FastAPI) -> uvicorn.Server:
    server = uvicorn.Server(
        uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=2)
    )
    # Signals are ours: uvicorn would otherwise take them and leave the workers hanging.
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
    return server


def _announce(api_url: str, context: Context) -> None:
    line = {"event": READY_LINE, "api_url": api_url, "p2p": list(context.network.addresses)}
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
