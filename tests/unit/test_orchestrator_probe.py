"""`/shoal/probe/1`: what it answers, what it costs at most, and whom it never dials."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from shoal.network.identity import NodeIdentity
from shoal.network.memory import MemoryHub, MemoryNetwork
from shoal.orchestrator import probe as probe_module
from shoal.orchestrator.probe import Allowance, ProbeDesk, ProbeLimits
from shoal.protocol.clock import ManualTime
from shoal.protocol.errors import InvalidRequest, PeerFault, Unavailable
from shoal.protocol.probe import (
    MAX_FILLING_BYTES,
    PROBE_PROTOCOL,
    DialBack,
    ProbeReply,
    ProbeRequest,
    pack_probe,
    unpack_probe,
)

TOKEN = "ab" * 16
DIAL = ProbeRequest(dial_back=DialBack(port=4001, token=TOKEN))
WAIT_S = 10.0


class World:
    """A desk, its clock, and askers who are seen wherever a test says."""

    def __init__(self, limits: ProbeLimits | None) -> None:
        self.hub = MemoryHub()
        self.now_s = 0.0
        self.network = MemoryNetwork(self.hub, NodeIdentity.generate())
        self.askers: list[MemoryNetwork] = []
        desk = ProbeDesk(self.network, ManualTime(7_000), limits, lambda: self.now_s)
        desk.serve()

    async def asker(self, host: str | None) -> MemoryNetwork:
        network = MemoryNetwork(self.hub, NodeIdentity.generate(), listens=False)
        await network.start()
        self.askers.append(network)
        await network.connect(self.network.addresses[0], timeout_s=WAIT_S)
        if host is not None:
            self.hub.observed[network.peer_id] = (host, 50_123)
        return network

    async def ask(
        self, asker: MemoryNetwork, request: ProbeRequest, filling_bytes: int = 0
    ) -> tuple[ProbeReply, int]:
        message = pack_probe(request, filling_bytes)
        answer = await asker.request(
            self.network.peer_id, PROBE_PROTOCOL, message, timeout_s=WAIT_S
        )
        return unpack_probe(ProbeReply, answer)


@asynccontextmanager
async def world(limits: ProbeLimits | None = None) -> AsyncIterator[World]:
    made = World(limits)
    await made.network.start()
    try:
        yield made
    finally:
        for network in (*made.askers, made.network):
            await network.stop()


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 2 * WAIT_S))


@pytest.fixture
def dialled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, str]]:
    """What the desk dialled; everybody is reached."""
    calls: list[tuple[str, int, str]] = []

    async def reaches(host: str, port: int, token: str) -> bool:
        calls.append((host, port, token))
        return True

    monkeypatch.setattr(probe_module, "reaches", reaches)
    return calls


def test_the_clock_the_address_and_the_filling_come_back() -> None:
    async def scenario() -> None:
        async with world() as there:
            asker = await there.asker("203.0.113.7")
            reply, came = await there.ask(asker, ProbeRequest(download_bytes=5_000), 300)
            assert (reply.now_ms, reply.received_bytes, came) == (7_000, 300, 5_000)
            assert reply.observed == "/ip4/203.0.113.7/tcp/50123"
            assert reply.reached is None

    run(scenario)


def test_only_the_askers_own_address_is_dialled(dialled: list[tuple[str, int, str]]) -> None:
    async def scenario() -> None:
        async with world() as there:
            reply, _ = await there.ask(await there.asker("203.0.113.7"), DIAL)
            assert reply.reached is True
            assert dialled == [("203.0.113.7", 4001, TOKEN)]
            # A request that names a host is no request.
            forged = b'{"dial_back":{"host":"10.0.0.1","port":22,"token":"' + TOKEN.encode()
            forged += b'"},"download_bytes":0}'
            asker = await there.asker("203.0.113.8")
            with pytest.raises(PeerFault, match="host"):
                await asker.request(
                    there.network.peer_id,
                    PROBE_PROTOCOL,
                    len(forged).to_bytes(2, "big") + forged,
                    timeout_s=WAIT_S,
                )
            assert len(dialled) == 1

    run(scenario)


def test_who_is_not_seen_is_not_dialled(dialled: list[tuple[str, int, str]]) -> None:
    async def scenario() -> None:
        async with world() as there:
            reply, _ = await there.ask(await there.asker(None), DIAL)
            assert (reply.reached, reply.observed) == (None, None)
            assert dialled == []

    run(scenario)


@pytest.mark.parametrize("port", [1, 22, 25, 1_023])
def test_ports_of_system_services_are_not_dialled(
    port: int, dialled: list[tuple[str, int, str]]
) -> None:
    async def scenario() -> None:
        async with world() as there:
            request = ProbeRequest(dial_back=DialBack(port=port, token=TOKEN))
            with pytest.raises(InvalidRequest, match=f"Port {port}") as caught:
                await there.ask(await there.asker("203.0.113.7"), request)
            assert caught.value.code == "port_not_dialled"
            assert dialled == []

    run(scenario)


LIMITS = ProbeLimits(
    bytes_of_one=1 << 20,
    bytes_per_s_of_one=1 << 10,
    dials_of_one=2,
    dials_per_s_of_one=0.1,
    dials_of_all=3,
    dials_per_s_of_all=0.1,
)
BIG = ProbeRequest(download_bytes=MAX_FILLING_BYTES)


async def _refused(asking: Coroutine[Any, Any, object]) -> Unavailable:
    with pytest.raises(Unavailable) as caught:
        await asking
    assert caught.value.code == "overloaded"
    return caught.value


def test_bytes_are_capped_for_each_address_whatever_peer_asks() -> None:
    async def scenario() -> None:
        async with world(LIMITS) as there:
            await there.ask(await there.asker("203.0.113.7"), BIG)
            # A new peer id at the same address is no new allowance.
            error = await _refused(there.ask(await there.asker("203.0.113.7"), BIG))
            assert error.retry_after_s > 0
            await there.ask(await there.asker("203.0.113.8"), BIG)
            there.now_s += 1_000
            await there.ask(there.askers[0], BIG)

    run(scenario)


def test_without_the_cap_nothing_is_refused() -> None:
    """The control of the test above."""

    async def scenario() -> None:
        async with world() as there:
            for _ in range(4):
                await there.ask(await there.asker("203.0.113.7"), BIG)

    run(scenario)


def test_all_addresses_together_are_capped() -> None:
    limits = ProbeLimits(bytes_of_all=1 << 20, bytes_per_s_of_all=1 << 10)

    async def scenario() -> None:
        async with world(limits) as there:
            await there.ask(await there.asker("203.0.113.1"), BIG)
            await _refused(there.ask(await there.asker("203.0.113.2"), BIG))

    run(scenario)


def test_an_ipv6_home_is_one_address() -> None:
    async def scenario() -> None:
        async with world(LIMITS) as there:
            await there.ask(await there.asker("2001:db8:1:2::1"), BIG)
            await _refused(there.ask(await there.asker("2001:db8:1:2:ffff::9"), BIG))
            reply, _ = await there.ask(await there.asker("2001:db8:1:3::1"), BIG)
            assert reply.observed == "/ip6/2001:db8:1:3::1/tcp/50123"

    run(scenario)


def test_dials_are_capped_for_one_and_for_all(dialled: list[tuple[str, int, str]]) -> None:
    async def scenario() -> None:
        async with world(LIMITS) as there:
            one = await there.asker("203.0.113.7")
            await there.ask(one, DIAL)
            await there.ask(one, DIAL)
            await _refused(there.ask(one, DIAL))
            await there.ask(await there.asker("203.0.113.8"), DIAL)
            await _refused(there.ask(await there.asker("203.0.113.9"), DIAL))
            assert len(dialled) == 3
            there.now_s += 1_000
            await there.ask(one, DIAL)

    run(scenario)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\x00",
        b"\xff\xff",
        b"\x00\x05{}",
        b"\x08\x01" + b" " * 2_049,
        b"\x00\x04null",
        b"\x00\x16" + b'{"download_bytes":1e9}',
        b"\x00\x18" + b'{"download_bytes":99999999}'[:24],
        b"\x00\x02{}" + bytes(MAX_FILLING_BYTES + 1),
    ],
)
def test_a_malformed_probe_is_a_peers_fault(message: bytes) -> None:
    async def scenario() -> None:
        async with world() as there:
            asker = await there.asker("203.0.113.7")
            with pytest.raises(PeerFault):
                await asker.request(
                    there.network.peer_id, PROBE_PROTOCOL, message, timeout_s=WAIT_S
                )

    run(scenario)


def test_more_filling_than_a_message_holds_is_not_packed() -> None:
    with pytest.raises(InvalidRequest, match="at most"):
        pack_probe(ProbeRequest(), MAX_FILLING_BYTES + 1)


def test_an_allowance_comes_back_and_forgets_who_took_nothing_lately() -> None:
    now = [0.0]
    allowance = Allowance(10, 2.0, lambda: now[0])
    assert allowance.wait_s("a", 10) == 0
    assert allowance.wait_s("a", 4) == 2.0
    now[0] = 2.0
    assert allowance.wait_s("a", 4) == 0
    for number in range(5_000):
        allowance.wait_s(str(number), 1)
    assert len(allowance._taken) == 4_096
