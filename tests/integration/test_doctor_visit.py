"""The doctor's way out over real sockets: what answers, what only seems to, whom a probe dials."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from worker_double import OrchestratorDouble

from shoal.network.blob_server import BlobServer
from shoal.network.blob_store import BlobStore
from shoal.network.identity import NodeIdentity
from shoal.network.libp2p_node import Libp2pNode
from shoal.orchestrator import probe as probe_module
from shoal.orchestrator.probe import ProbeDesk, ProbeLimits, reaches
from shoal.protocol.clock import ManualTime, SystemTime
from shoal.protocol.errors import Unavailable
from shoal.protocol.probe import MAX_FILLING_BYTES, DialBack, ProbeRequest
from shoal.worker.config import WorkerConfig, load_config
from shoal.worker.doctor import line, reach
from shoal.worker.doctor.report import Finding, Level, Report
from shoal.worker.doctor.visit import visit
from shoal.worker.session import Link

TOKEN = "ab" * 16
WAIT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Home:
    """An orchestrator with its blobs, and a doctor's node."""

    double: OrchestratorDouble
    blob_url: str
    node: Libp2pNode
    link: Link

    @property
    def address(self) -> str:
        return self.double.network.addresses[0]


@asynccontextmanager
async def home(folder: Path, limits: ProbeLimits | None = None) -> AsyncIterator[Home]:
    async with AsyncExitStack() as stack:
        identity = NodeIdentity.generate()
        network = Libp2pNode(identity, "/ip4/127.0.0.1/tcp/0")
        double = OrchestratorDouble(network, identity)
        ProbeDesk(network, SystemTime(), limits).serve()
        await network.start()
        stack.push_async_callback(network.stop)
        blobs = BlobServer(BlobStore(folder / "blobs", 1 << 20), "127.0.0.1", 0)
        await blobs.start()
        stack.push_async_callback(blobs.stop)
        double.greeting = double.greeting.model_copy(
            update={"blob_urls": (blobs.url,), "rpc_urls": ("http://127.0.0.1:1",)}
        )
        node = Libp2pNode(NodeIdentity.generate())
        stack.push_async_callback(node.stop)
        yield Home(double=double, blob_url=blobs.url, node=node, link=Link(node))


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))


@asynccontextmanager
async def listening(say: bytes) -> AsyncIterator[int]:
    """A port whose listener says ``say`` and then nothing."""
    held: list[asyncio.StreamWriter] = []

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held.append(writer)
        writer.write(say)

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        for writer in held:
            writer.close()
        server.close()
        await server.wait_closed()


def test_only_who_says_the_token_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_module, "_DIAL_TIMEOUT_S", 0.3)

    async def scenario() -> None:
        async with listening(TOKEN.encode()) as port:
            assert await reaches("127.0.0.1", port, TOKEN)
        assert not await reaches("127.0.0.1", port, TOKEN)
        for say in (b"", b"220 mail.example ESMTP\r\n" * 9, TOKEN.encode()[:-1], b"\x13/multi"):
            async with listening(say) as port:
                assert not await reaches("127.0.0.1", port, TOKEN)

    run(scenario)


def test_the_line_is_measured_and_its_other_end_dials_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with home(tmp_path) as there:
            await there.node.start()
            await there.link.dial(there.address)
            assert there.double.network.observed(NodeIdentity.generate().peer_id) is None
            pulse = line.Pulse()
            await pulse.feel(there.link, SystemTime().now_ms)
            assert line.judge_clock(pulse).level is Level.OK
            assert 0 < pulse.round_trip_ms < 60_000
            assert pulse.observed is not None
            assert pulse.observed.startswith("/ip4/127.0.0.1/tcp/")
            speeds = await line.look_at_speed(there.link, pulse.round_trip_ms)
            assert [finding.what for finding in speeds] == ["bandwidth down", "bandwidth up"]
            (finding,) = await line.look_at_nat(there.link, pulse.observed, {})
            assert "can be dialled from outside" in finding.measured
            # What others listen on counts for nothing, not even towards an own address.
            async with listening(b"SSH-2.0-OpenSSH\r\n" + b" " * 40) as port:
                dial = DialBack(port=port, token=TOKEN)
                reply, _ = await line.ask(there.link, ProbeRequest(dial_back=dial), timeout_s=20)
                assert reply.reached is False
                busy = await line.look_at_nat(there.link, pulse.observed, {"blob_listen": port})
                assert busy[0].level is Level.WARN
                assert "cannot be tried" in busy[0].measured

    run(scenario)


def test_a_clock_that_is_off_is_seen_over_the_wire(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with home(tmp_path) as there:
            late = ManualTime(SystemTime().now_ms() - 60_000)
            ProbeDesk(there.double.network, late).serve()
            await there.node.start()
            await there.link.dial(there.address)
            pulse = line.Pulse()
            await pulse.feel(there.link, SystemTime().now_ms)
            assert line.judge_clock(pulse).level is Level.FAIL
            assert "ahead of the orchestrator" in line.judge_clock(pulse).measured

    run(scenario)


def test_who_asks_too_much_waits_and_the_doctor_says_so(tmp_path: Path) -> None:
    async def scenario() -> None:
        tight = ProbeLimits(bytes_of_one=1 << 20, bytes_per_s_of_one=1.0)
        async with home(tmp_path, tight) as there:
            await there.node.start()
            await there.link.dial(there.address)
            request = ProbeRequest(download_bytes=MAX_FILLING_BYTES)
            await line.ask(there.link, request)
            with pytest.raises(Unavailable, match="only so many probes") as caught:
                await line.ask(there.link, request)
            assert caught.value.code == "overloaded"
            (finding,) = await line.look_at_speed(there.link, 1.0)
            assert finding.level is Level.WARN
            assert "try again in" in finding.measured

    run(scenario)


def found(findings: list[Finding], words: str) -> Finding:
    return next(finding for finding in findings if words in finding.what)


def test_each_address_is_tried_and_one_that_works_is_enough(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with home(tmp_path) as there, listening(b"HTTP/1.1 400 Bad Request\r\n") as other:
            await there.node.start()
            peer = there.double.identity.peer_id
            way = reach.Way(link=there.link)
            wanted = [
                f"/ip4/127.0.0.1/tcp/1/p2p/{peer}",
                there.address,
                f"/ip4/127.0.0.1/tcp/{other}/p2p/{peer}",
            ]
            await reach.look_for_orchestrator(way, there.node, wanted)
            assert way.greeting == there.double.greeting
            assert [finding.level for finding in way.findings] == [
                Level.WARN,
                Level.OK,
                Level.WARN,
            ]
            assert way.findings[0].measured == "refused"
            assert way.link.peer == peer
            (blobs,) = await reach.look_at_blobs(there.double.greeting)
            assert blobs.level is Level.OK

    run(scenario)


def test_an_address_with_anothers_peer_id_fails(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with home(tmp_path) as there:
            await there.node.start()
            way = reach.Way(link=there.link)
            wrong = there.address.replace(
                there.double.identity.peer_id, NodeIdentity.generate().peer_id
            )
            await reach.look_for_orchestrator(way, there.node, [wrong])
            assert way.greeting is None
            assert [finding.level for finding in way.findings] == [Level.FAIL]
            assert "peer id" in way.findings[0].mend

    run(scenario)


def configured(folder: Path, *addresses: str) -> WorkerConfig:
    return load_config(
        None, {}, {"data_dir": folder / "worker", "orchestrator": ",".join(addresses)}
    )


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is silent is given up sooner; who answers, does so at once."""
    monkeypatch.setattr(reach, "_HANDSHAKE_S", 1.5)


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading torch in a process of its own takes seconds and is looked at elsewhere."""
    from shoal.worker.doctor import compute

    async def nothing(_: WorkerConfig) -> list[Finding]:
        return []

    monkeypatch.setattr(compute, "look_at_compute", nothing)


@pytest.mark.usefixtures("without_torch")
def test_a_whole_visit_makes_nothing_and_names_what_fails(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with home(tmp_path) as there:
            report = await visit(configured(tmp_path, there.address), there.node)
            findings = list(report.findings)
            assert found(findings, "reach").level is Level.OK
            assert found(findings, "clock").level is Level.OK
            assert there.double.account.address in found(findings, "orchestrator").measured
            assert found(findings, "bandwidth up")
            assert found(findings, "blobs").level is Level.OK
            # Nothing listens on port 1: the chain is the one thing that fails.
            assert [f.check for f in findings if f.level is Level.FAIL] == ["chain"]
            assert report.exit_code == 1
            assert not (tmp_path / "worker").exists()
            assert there.double.inbox.joins.empty()

    run(scenario)


@pytest.mark.usefixtures("without_torch")
def test_a_visit_to_nobody_ends_and_says_so(tmp_path: Path) -> None:
    async def scenario() -> None:
        peer = NodeIdentity.generate().peer_id
        async with listening(b"") as silent:
            addresses = [f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer}" for port in (1, silent)]
            report: Report = await visit(
                configured(tmp_path, *addresses), Libp2pNode(NodeIdentity.generate())
            )
            assert found(list(report.findings), "orchestrator").level is Level.FAIL
            assert "2 addresses tried" in found(list(report.findings), "orchestrator").measured

    run(scenario)
