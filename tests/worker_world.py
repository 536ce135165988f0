"""A worker in a world of one process: an orchestrator's double, a chain, blobs and an engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account as EthAccount
from worker_double import MemoryBlobs, MemoryChain, OrchestratorDouble, ScriptedEngine, make_task

from shoal.network.identity import NodeIdentity
from shoal.network.memory import MemoryHub, MemoryNetwork
from shoal.protocol.clock import ManualTime
from shoal.protocol.errors import ShoalError
from shoal.protocol.market import TaskKind
from shoal.protocol.node import HelloReply, LeaseOffer
from shoal.worker.config import load_config
from shoal.worker.node import Parts, WorkerNode
from shoal.worker.ports import ProviderChain
from shoal.worker.session import Credentials

ORCHESTRATOR = NodeIdentity(b"o" * 32)
ACCOUNT = EthAccount.create()
IDENTITY = NodeIdentity(b"w" * 32)


class World:
    """A hub with an orchestrator and, once `join`ed, a worker on it."""

    def __init__(self, directory: Path, **options: Any) -> None:
        self.hub = MemoryHub()
        self.directory = directory
        self.double = self.new_orchestrator()
        self.chain = MemoryChain(ACCOUNT.address)
        self.chain_failure: ShoalError | None = None
        self.engine = ScriptedEngine()
        self.stop = asyncio.Event()
        address = f"/memory/1/p2p/{ORCHESTRATOR.peer_id}"
        self.config = load_config(
            None,
            {},
            {"orchestrator": address, "data_dir": directory, "connect_timeout_s": 0.3, **options},
        )
        self.blobs = MemoryBlobs(directory / "blobs")
        self.worker = WorkerNode(
            self.config,
            Parts(
                network=MemoryNetwork(self.hub, IDENTITY, listens=False),
                credentials=Credentials(account=ACCOUNT, identity=IDENTITY),
                connect_chain=self._connect,
                blobs=self.blobs,
                engine=self.engine,
                device="cpu",
                time=ManualTime(),
            ),
        )
        self.running: asyncio.Task[None] | None = None

    def new_orchestrator(self) -> OrchestratorDouble:
        return OrchestratorDouble(MemoryNetwork(self.hub, ORCHESTRATOR), ORCHESTRATOR)

    async def join(self) -> None:
        """The worker runs and the orchestrator has its credentials."""
        await self.double.network.start()
        self.running = asyncio.create_task(self.worker.run(self.stop))
        await self.next(self.double.inbox.joins)
        await self.next(self.double.inbox.beats)

    async def next(self, queue: asyncio.Queue[Any]) -> Any:
        """The next arrival; the worker's own failure if that comes first."""
        assert self.running is not None
        arrival = asyncio.create_task(queue.get())
        await asyncio.wait({arrival, self.running}, return_when=asyncio.FIRST_COMPLETED)
        if not arrival.done():
            arrival.cancel()
            await self.running
        return await arrival

    def offer(self, kind: TaskKind = TaskKind.ROLLOUT, **changes: Any) -> LeaseOffer:
        number = changes.get("number", 0)
        return self.double.offer(
            make_task(kind, number), ACCOUNT.address, IDENTITY.peer_id, **changes
        )

    async def leave(self) -> None:
        self.stop.set()
        self.engine.free.set()
        if self.running is not None:
            await asyncio.gather(self.running, return_exceptions=True)
        await self.double.network.stop()

    async def _connect(self, greeting: HelloReply) -> ProviderChain:
        if self.chain_failure is not None:
            raise self.chain_failure
        return self.chain


Drive = Callable[..., None]
"""Runs a script in a world of its own: `drive(script, **options of the worker)`."""


def driver(directory: Path, monkeypatch: pytest.MonkeyPatch, *, timeout_s: float = 10) -> Drive:
    """What runs scripts in worlds over `directory` whose orchestrator has paid nothing yet."""

    async def no_payouts(url: str) -> None:
        return None

    monkeypatch.setattr("shoal.worker.earnings.get_json", no_payouts)

    def run(script: Callable[[World], Awaitable[None]], **options: Any) -> None:
        async def main() -> None:
            world = World(directory, **options)
            try:
                async with asyncio.timeout(timeout_s):
                    await script(world)
            finally:
                await world.leave()

        asyncio.run(main())

    return run
