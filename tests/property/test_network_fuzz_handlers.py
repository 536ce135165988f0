"""Whatever bytes reach a running orchestrator or worker: an answer, or a typed refusal.

The handlers are called as the network calls them, by a peer that has joined and holds a lease,
so what is malformed only a little gets as deep as it can.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import psutil
import pytest
from eth_account import Account as EthAccount
from malformed import Malformer
from orchestrator_lab import DOMAIN, Lab, Peer, open_lab
from wire_samples import announced_by, announcements, exchanges
from worker_double import MemoryBlobs, MemoryChain, OrchestratorDouble, ScriptedEngine, make_task

from shoal.network.blob_service import BlobService
from shoal.network.discovery import Discovery
from shoal.network.identity import NodeIdentity
from shoal.network.memory import MemoryHub, MemoryNetwork
from shoal.network.port import Handler, TopicVerdict
from shoal.orchestrator.probe import ProbeDesk
from shoal.protocol.clock import ManualTime
from shoal.protocol.errors import ShoalError
from shoal.protocol.ids import PeerId
from shoal.protocol.market import TaskKind
from shoal.protocol.node import (
    CANCEL_PROTOCOL,
    COMMIT_PROTOCOL,
    EVIDENCE_PROTOCOL,
    FAILURE_PROTOCOL,
    HEARTBEAT_PROTOCOL,
    JOIN_PROTOCOL,
    LEASE_PROTOCOL,
    RESULT_PROTOCOL,
    REVEAL_PROTOCOL,
    FailureCause,
    Heartbeat,
    HelloReply,
    JoinRequest,
    LeaseFailure,
    LeaseOffer,
    LeaseProgress,
)
from shoal.protocol.sealing import BidCancel
from shoal.protocol.signing import sign
from shoal.worker.config import load_config
from shoal.worker.node import Parts, WorkerNode
from shoal.worker.ports import ProviderChain
from shoal.worker.session import Credentials

SEED = int(os.environ.get("SHOAL_FUZZ_SEED", "5"))
FEW = 1_000
MANY = 100_000
GROWTH_BYTES = 50 << 20
PAYLOAD = b"what was computed"


def handlers_of(network: MemoryNetwork) -> dict[str, Handler]:
    """What the network calls, by protocol."""
    return {service.protocol: service.handler for service in network._dispatch.services()}


async def flood(
    handler: Handler, caller: PeerId, valid: Sequence[bytes], count: int, seed: int
) -> int:
    """How many of `count` malformed requests were refused, all of them with a typed error."""
    refused = 0
    for number, data in enumerate(itertools.islice(Malformer(valid, seed), count)):
        try:
            await handler(caller, data)
        except ShoalError:
            refused += 1
        except Exception as error:
            raise AssertionError(
                f"request {number} of seed {seed} ended in {error!r}: {data[:300]!r}"
            ) from error
    return refused


async def requests_of(peer: Peer, offer: LeaseOffer) -> dict[str, list[bytes]]:
    """What an honest worker with that lease would send."""
    lease = offer.lease.record
    progress = LeaseProgress(lease_id=lease.lease_id, lease_epoch=lease.lease_epoch, progress=1)
    failure = LeaseFailure(
        lease_id=lease.lease_id,
        lease_epoch=lease.lease_epoch,
        cause=FailureCause.NODE,
        detail="no",
    )
    sealed = peer.seal(peer.make_bid())
    await peer.commit(sealed)
    cancel = BidCancel(commitment=sealed.commitment, from_epoch=1 << 20)
    return {
        JOIN_PROTOCOL: [JoinRequest(bound_node=peer.bound(), name="peer", device="cpu").encode()],
        COMMIT_PROTOCOL: [sealed.encode()],
        CANCEL_PROTOCOL: [sign(cancel, DOMAIN, peer.account).encode()],
        HEARTBEAT_PROTOCOL: [Heartbeat(leases=(progress,)).encode()],
        RESULT_PROTOCOL: [peer.message(offer, PAYLOAD).encode()],
        FAILURE_PROTOCOL: [failure.encode()],
    }


async def flood_orchestrator(lab: Lab, count: int) -> None:
    """Every protocol it serves was flooded, and it serves another worker as before."""
    network = lab.context.network
    assert isinstance(network, MemoryNetwork)
    discovery = Discovery(network, time=lab.context.time, rule=lambda address, peer: True)
    await discovery.start()
    ProbeDesk(network, lab.context.time).serve()
    lab.orchestrator.holder_desk.serve()
    BlobService(lab.context.blobs, network).start()
    served = handlers_of(network)
    workers = {REVEAL_PROTOCOL, LEASE_PROTOCOL, EVIDENCE_PROTOCOL}
    assert served.keys() == exchanges().keys() - workers
    job = await lab.add_job()
    liar, honest = await lab.peer(), await lab.peer()
    offer, _ = await lab.lease(liar, await lab.open_sale(job))
    lab.context.blobs.put_bytes(PAYLOAD)
    valid = await requests_of(liar, offer)
    for protocol, handler in served.items():
        samples = valid.get(protocol) or exchanges()[protocol].request.valid
        assert await flood(handler, liar.node, samples, count, SEED) > count * 0.5, protocol
    await discovery.stop()
    await honest.join()
    kept, _ = await lab.lease(honest, await lab.open_sale(job))
    assert (await honest.beat(kept)).revoked == ()


def test_orchestrator_refuses_what_is_malformed_and_serves_on(tmp_path: Path) -> None:
    async def script() -> None:
        async with open_lab(tmp_path) as lab:
            await flood_orchestrator(lab, FEW)

    asyncio.run(script())


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_orchestrator_survives_a_hundred_thousand_of_each(tmp_path: Path) -> None:
    async def script() -> None:
        async with open_lab(tmp_path) as lab:
            await bounded(lambda: flood_orchestrator(lab, MANY))

    asyncio.run(script())


class Provider:
    """A worker that runs, and its handlers."""

    def __init__(self, directory: Path) -> None:
        hub = MemoryHub()
        home, identity = NodeIdentity(b"o" * 32), NodeIdentity(b"w" * 32)
        account = EthAccount.create()
        self.double = OrchestratorDouble(MemoryNetwork(hub, home), home)
        self.network = MemoryNetwork(hub, identity, listens=False)
        self.chain = MemoryChain(account.address)
        self.stop = asyncio.Event()
        self.time = ManualTime()
        address = f"/memory/1/p2p/{home.peer_id}"
        settings = {"orchestrator": address, "data_dir": directory, "connect_timeout_s": 1.0}
        self.worker = WorkerNode(
            load_config(None, {}, settings),
            Parts(
                network=self.network,
                credentials=Credentials(account=account, identity=identity),
                connect_chain=self._connect,
                blobs=MemoryBlobs(directory / "blobs"),
                engine=ScriptedEngine(),
                device="cpu",
                time=self.time,
            ),
        )
        self.address = account.address

    def offer(self, number: int) -> LeaseOffer:
        """An honest lease of the orchestrator it works for."""
        task = make_task(TaskKind.ROLLOUT, number)
        return self.double.offer(task, self.address, self.network.peer_id, number=number)

    async def _connect(self, greeting: HelloReply) -> ProviderChain:
        return self.chain


async def flood_worker(provider: Provider, count: int) -> None:
    """Every protocol it serves was flooded by its orchestrator, and it does a task as before."""
    await provider.double.network.start()
    running = asyncio.create_task(provider.worker.run(provider.stop))
    try:
        async with asyncio.timeout(20):
            await provider.double.inbox.beats.get()
        for protocol, handler in handlers_of(provider.network).items():
            samples = list(exchanges()[protocol].request.valid)
            if protocol == LEASE_PROTOCOL:
                samples = [provider.offer(number).encode() for number in range(3)]
            caller = provider.double.network.peer_id
            assert await flood(handler, caller, samples, count, SEED) > count * 0.5, protocol
        flood_topics(provider, count // 4)
        async with asyncio.timeout(20):
            await provider.double.send(provider.offer(99), provider.network.peer_id)
            while (await provider.double.inbox.results.get()).result.lease_id != "lease_00000099":
                pass
    finally:
        provider.stop.set()
        await asyncio.gather(running, return_exceptions=True)
        await provider.double.network.stop()


def flood_topics(provider: Provider, count: int) -> None:
    """On every topic the orchestrator's own word is accepted, and nothing made of it."""
    checks = provider.network._dispatch._checks
    assert len(checks) == len(announcements())
    for topic, message in announced_by(provider.double, provider.time.now_ms()).items():
        (check,) = (check for name, check in checks.items() if name.startswith(topic))
        for data in itertools.islice(Malformer(message.valid, SEED), count):
            if data not in message.valid:
                assert check(data) is not TopicVerdict.ACCEPT, data[:300]
        assert check(message.valid[0]) is TopicVerdict.ACCEPT


@pytest.fixture
def no_payouts(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(url: str) -> None:
        return None

    monkeypatch.setattr("shoal.worker.earnings.get_json", nothing)


@pytest.mark.usefixtures("no_payouts")
def test_worker_refuses_what_is_malformed_and_works_on(tmp_path: Path) -> None:
    async def script() -> None:
        await flood_worker(Provider(tmp_path), FEW)

    asyncio.run(script())


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("no_payouts")
def test_worker_survives_a_hundred_thousand_of_each(tmp_path: Path) -> None:
    async def script() -> None:
        await bounded(lambda: flood_worker(Provider(tmp_path), MANY))

    asyncio.run(script())


def test_handler_that_trusts_its_input_is_found_out() -> None:
    async def trusting(_peer: PeerId, data: bytes) -> bytes:
        return bytes(data[8:9].index(b"x"))

    async def script() -> None:
        valid = exchanges()[HEARTBEAT_PROTOCOL].request.valid
        with pytest.raises(AssertionError, match="ValueError"):
            await flood(trusting, PeerId("liar"), valid, FEW, SEED)

    asyncio.run(script())


async def bounded(work: Callable[[], Awaitable[None]]) -> None:
    """The work was done and left less than `GROWTH_BYTES` behind."""
    before = psutil.Process().memory_info().rss
    await work()
    assert psutil.Process().memory_info().rss - before < GROWTH_BYTES
