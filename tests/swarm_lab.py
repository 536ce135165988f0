"""Workers that share blobs over an in-memory network, round an orchestrator's desk of holders."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from shoal.network.blob_gate import UploadGate
from shoal.network.blob_service import BlobService
from shoal.network.blob_store import BlobStore
from shoal.network.identity import NodeIdentity
from shoal.network.memory import MemoryHub, MemoryNetwork
from shoal.network.port import Network
from shoal.orchestrator.deltas import PolicyDeltas
from shoal.orchestrator.holders import HolderDesk
from shoal.orchestrator.roster import Roster
from shoal.protocol.blob import BlobRef
from shoal.protocol.clock import SystemTime
from shoal.protocol.errors import Unauthorised
from shoal.protocol.ids import PeerId
from shoal.protocol.policy import PolicyVersion
from shoal.worker.config import WorkerConfig
from shoal.worker.plane import open_swarm
from shoal.worker.session import Link
from shoal.worker.swarm import Swarm

STORE_BYTES = 1 << 30
JOB_ID = "0x" + "a" * 64


class Members:
    """The part of a roster that the desk asks; everyone is a member but those ``strange``."""

    def __init__(self) -> None:
        self.strange: set[PeerId] = set()

    def member(self, peer: PeerId) -> Any:
        if peer in self.strange:
            raise Unauthorised(f"Node {peer} has not joined; join first.", code="not_joined")
        return SimpleNamespace(account=peer)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The orchestrator's side: its node, its blobs, its desk."""

    network: Network
    store: BlobStore
    members: Members
    deltas: PolicyDeltas
    desk: HolderDesk

    @property
    def address(self) -> str:
        return self.network.addresses[0]

    @property
    def source(self) -> str:
        return f"/p2p/{self.network.peer_id}"


@dataclass(frozen=True, kw_only=True)
class Sharer:
    """A worker's blob plane."""

    network: Network
    link: Link
    store: BlobStore
    swarm: Swarm

    async def fetch(self, ref: BlobRef, *sources: str, timeout_s: float = 30.0) -> Path:
        return await self.swarm.fetch(ref, sources, timeout_s=timeout_s)

    def given_bytes(self) -> float:
        """What this worker gave to others."""
        return sum(
            sample.value
            for sample in self.network.meters.snapshot()
            if sample.name == "blob_bytes" and ("direction", "out") in sample.labels
        )


def open_origin(network: Network, folder: Path, upload_mbit: float = 0.0) -> Origin:
    """The orchestrator's side over ``network``, which is started."""
    store, members = BlobStore(folder, STORE_BYTES), Members()
    deltas = PolicyDeltas(store, network.meters, enabled=True)
    desk = HolderDesk(network, SystemTime(), cast(Roster, members), deltas)
    desk.serve()
    gate = UploadGate(upload_mbit, meters=network.meters)
    BlobService(store, network, gate).start()
    return Origin(network=network, store=store, members=members, deltas=deltas, desk=desk)


@asynccontextmanager
async def open_sharer(
    network: Network, folder: Path, origin: Origin, **settings: object
) -> AsyncIterator[Sharer]:
    """A worker that has joined; ``network`` is started here and stopped again."""
    fields = {"orchestrator": origin.address, "data_dir": folder, **settings}
    config = WorkerConfig.model_validate(fields)
    link = Link(network)
    await network.start()
    try:
        async with open_swarm(config, network, link) as swarm:
            await link.dial(origin.address)
            link.mark_joined()
            yield Sharer(network=network, link=link, store=swarm.store, swarm=swarm)
    finally:
        await network.stop()


class SwarmLab:
    """A hub with an origin; workers join one by one."""

    def __init__(self, folder: Path, stack: AsyncExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self.hub = MemoryHub()
        self._num = 0
        self.origin: Origin

    async def start(self) -> None:
        network = MemoryNetwork(self.hub, NodeIdentity.generate())
        await network.start()
        self._stack.push_async_callback(network.stop)
        self.origin = open_origin(network, self._folder / "origin")

    async def join(self, **settings: object) -> Sharer:
        """One more worker that listens, has joined, and shares unless told otherwise."""
        self._num += 1
        network = MemoryNetwork(self.hub, NodeIdentity.generate())
        folder = self._folder / f"worker-{self._num}"
        return await self._stack.enter_async_context(
            open_sharer(network, folder, self.origin, **settings)
        )


@asynccontextmanager
async def swarm_lab(folder: Path) -> AsyncIterator[SwarmLab]:
    """A lab that is taken down again."""
    async with AsyncExitStack() as stack:
        lab = SwarmLab(folder, stack)
        await lab.start()
        yield lab


def in_lab(story: Callable[[SwarmLab], Awaitable[None]]) -> Callable[[Path], None]:
    """The story as a test: told in a lab of its own, for a minute at most."""

    def test(tmp_path: Path) -> None:
        async def main() -> None:
            async with asyncio.timeout(60), swarm_lab(tmp_path) as lab:
                await story(lab)

        asyncio.run(main())

    # Not functools.wraps: pytest would ask for the story's own parameters.
    test.__name__ = story.__name__
    return test


def version(number: int, adapter: BlobRef) -> PolicyVersion:
    """Policy version ``number`` of the lab's job."""
    return PolicyVersion(job_id=JOB_ID, version=number, base_sha256="0" * 64, adapter=adapter)
