"""A worker over real libp2p whose orchestrator moves to another address."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from worker_double import MemoryBlobs, MemoryChain, OrchestratorDouble, ScriptedEngine, make_task
from worker_world import ACCOUNT, IDENTITY, ORCHESTRATOR

from shoal.network.libp2p_node import Libp2pNode
from shoal.protocol.clock import SystemTime
from shoal.protocol.market import TaskKind
from shoal.protocol.node import HelloReply
from shoal.protocol.process import claim_port
from shoal.worker.config import load_config
from shoal.worker.node import Parts, WorkerNode
from shoal.worker.ports import ProviderChain
from shoal.worker.session import Credentials

TIMEOUT_S = 60.0


def listening(port: int) -> OrchestratorDouble:
    """The same orchestrator, not yet started, that will listen at ``port``."""
    return OrchestratorDouble(Libp2pNode(ORCHESTRATOR, f"/ip4/127.0.0.1/tcp/{port}"), ORCHESTRATOR)


def address(port: int) -> str:
    return f"/ip4/127.0.0.1/tcp/{port}/p2p/{ORCHESTRATOR.peer_id}"


def worker(folder: Path, *orchestrator: str) -> WorkerNode:
    async def connect(greeting: HelloReply) -> ProviderChain:
        return MemoryChain(ACCOUNT.address)

    options = {"orchestrator": orchestrator, "data_dir": folder}
    return WorkerNode(
        load_config(None, {}, options),
        Parts(
            network=Libp2pNode(IDENTITY),
            credentials=Credentials(account=ACCOUNT, identity=IDENTITY),
            connect_chain=connect,
            blobs=MemoryBlobs(folder / "blobs"),
            engine=ScriptedEngine(),
            device="cpu",
            time=SystemTime(),
        ),
    )


@pytest.fixture(autouse=True)
def _no_payouts(monkeypatch: pytest.MonkeyPatch) -> None:
    async def get_json(url: str) -> None:
        return None

    monkeypatch.setattr("shoal.worker.earnings.get_json", get_json)


def test_a_worker_follows_its_orchestrator_to_an_address_that_it_was_told(tmp_path: Path) -> None:
    async def main() -> None:
        first, second = claim_port(0, "the test"), claim_port(0, "the test")
        double, stop = listening(first), asyncio.Event()
        told = (address(first), address(second))
        double.greeting = double.greeting.model_copy(
            update={"p2p_addresses": told, "heartbeat_ms": 100}
        )
        await double.network.start()
        node = worker(tmp_path, address(first))
        running = asyncio.create_task(node.run(stop))
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await double.inbox.joins.get()
                await double.network.stop()
                moved = listening(second)
                moved.account, moved.greeting = double.account, double.greeting
                await moved.network.start()
                double = moved
                await double.inbox.joins.get()
                await double.inbox.beats.get()
                assert node.session.address == address(second)
                # And it works there.
                task = make_task(TaskKind.ROLLOUT)
                offer = double.offer(task, ACCOUNT.address, IDENTITY.peer_id)
                assert (await double.send(offer, IDENTITY.peer_id)).refusal is None
                await double.inbox.results.get()
        finally:
            stop.set()
            await asyncio.gather(running, return_exceptions=True)
            await double.network.stop()

    asyncio.run(main())


def test_a_restarted_worker_finds_it_too_with_the_former_address_dead(tmp_path: Path) -> None:
    async def main() -> None:
        first, second = claim_port(0, "the test"), claim_port(0, "the test")
        greeting = None
        for port, config in ((first, address(first)), (second, address(first))):
            double, stop = listening(port), asyncio.Event()
            told = (address(first), address(second))
            double.greeting = greeting or double.greeting.model_copy(
                update={"p2p_addresses": told, "heartbeat_ms": 100}
            )
            greeting = double.greeting
            await double.network.start()
            running = asyncio.create_task(worker(tmp_path, config).run(stop))
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    await double.inbox.joins.get()
            finally:
                stop.set()
                await asyncio.gather(running, return_exceptions=True)
                await double.network.stop()

    asyncio.run(main())
