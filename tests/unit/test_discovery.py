"""The table of providers over networks in memory: found, withdrawn, lapsed, lied about."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext

import pytest
from discovery_world import KEY, WAIT_S, TableWorld, found, run_in

from shoal.network.discovery import FORGIVE_MS, TTL_S, Discovery
from shoal.network.identity import NodeIdentity
from shoal.network.lookup import MAX_DIALS
from shoal.network.memory import MemoryHub, MemoryNetwork
from shoal.protocol.clock import ManualTime
from shoal.protocol.discovery import (
    FIND_PROTOCOL,
    MAX_CLOSER,
    PROVIDE_PROTOCOL,
    Contact,
    FindReply,
    FindRequest,
    ProvideRequest,
)
from shoal.protocol.errors import InvalidRequest, NotFound, PeerFault
from shoal.protocol.ids import PeerId


def in_memory(address: str, peer: str) -> bool:
    return address == f"/memory/1/p2p/{peer}"


class World(TableWorld[MemoryNetwork]):
    """Nodes in one hub."""

    def __init__(self) -> None:
        super().__init__()
        self.hub = MemoryHub()
        self.time = ManualTime()
        self._count = 0

    async def network(self, *, listens: bool = True) -> MemoryNetwork:
        self._count += 1
        identity = NodeIdentity(self._count.to_bytes(32, "big"))
        network = MemoryNetwork(self.hub, identity, listens=listens)
        await network.start()
        return network

    async def node(
        self, *bootstrap: MemoryNetwork, listens: bool = True
    ) -> tuple[MemoryNetwork, Discovery]:
        network = await self.network(listens=listens)
        discovery = Discovery(
            network,
            time=self.time,
            bootstrap=[f"/memory/1/p2p/{other.peer_id}" for other in bootstrap],
            rule=in_memory,
        )
        await discovery.start()
        await discovery.join()
        self.parts.append((network, discovery))
        return network, discovery


def run(check: Callable[[World], Awaitable[None]]) -> None:
    run_in(World, check)


def test_a_seeker_that_knows_one_node_finds_providers_it_never_heard_of() -> None:
    async def check(made: World) -> None:
        first, _ = await made.node()
        others = [await made.node(first) for _ in range(30)]
        holders = [others[3], others[17]]
        for _, discovery in holders:
            assert await discovery.provide(KEY) > 0
        seeker, discovery = await made.node(first, listens=False)
        assert await found(discovery) == {network.peer_id for network, _ in holders}
        # What a walk opened it closed again, but for the node it was configured with.
        assert seeker.peers() <= {first.peer_id}

    run(check)


def test_a_node_that_only_dials_is_told_to_nobody() -> None:
    async def check(made: World) -> None:
        first, first_view = await made.node()
        _, hidden = await made.node(first, listens=False)
        assert await hidden.provide(KEY) == 0
        assert await found(first_view) == set()
        # The control: the same from one that listens.
        listener, open_view = await made.node(first)
        assert await open_view.provide(KEY) == 1
        assert await found(first_view) == {listener.peer_id}

    run(check)


def test_a_withdrawn_holder_is_found_no_more() -> None:
    async def check(made: World) -> None:
        first, _ = await made.node()
        holder, view = await made.node(first)
        _, seeker = await made.node(first)
        await view.provide(KEY)
        assert await found(seeker) == {holder.peer_id}
        await view.withdraw(KEY)
        assert await found(seeker) == set()

    run(check)


@pytest.mark.parametrize("in_order", [True, False])
def test_a_record_on_its_way_does_not_outlive_its_withdrawal(
    monkeypatch: pytest.MonkeyPatch, in_order: bool
) -> None:
    """As when the table is joined late and what is provided is told once more meanwhile."""

    async def check(made: World) -> None:
        first, _ = await made.node()
        holder, view = await made.node(first)
        _, seeker = await made.node(first)
        if not in_order:
            # The negative control.
            monkeypatch.setattr(view, "_announcing", Unlocked())
        is_sent, may_arrive = asyncio.Event(), asyncio.Event()
        request = holder.request

        async def late_once(
            peer: PeerId, protocol: str, payload: bytes, *, timeout_s: float
        ) -> bytes:
            if protocol == PROVIDE_PROTOCOL and not is_sent.is_set():
                is_sent.set()
                await may_arrive.wait()
            return await request(peer, protocol, payload, timeout_s=timeout_s)

        monkeypatch.setattr(holder, "request", late_once)
        providing = asyncio.create_task(view.provide(KEY))
        await is_sent.wait()
        withdrawing = asyncio.create_task(view.withdraw(KEY))
        if not in_order:
            await withdrawing
        may_arrive.set()
        await asyncio.gather(providing, withdrawing)
        assert await found(seeker) == (set() if in_order else {holder.peer_id})

    run(check)


class Unlocked:
    """In place of the locks of keys: everybody passes."""

    def setdefault(self, _key: str, _lock: asyncio.Lock) -> AbstractAsyncContextManager[None]:
        return nullcontext()


def test_a_holder_that_vanished_lapses_and_is_passed_over_before_that() -> None:
    async def check(made: World) -> None:
        first, _ = await made.node()
        holder, view = await made.node(first)
        _, seeker = await made.node(first)
        await view.provide(KEY)
        await view.stop()
        await holder.stop()
        assert await found(seeker) == {holder.peer_id}
        seeker.note_failed(holder.peer_id)
        assert await found(seeker) == set()
        made.time.advance(FORGIVE_MS)
        assert await found(seeker) == {holder.peer_id}
        made.time.advance(TTL_S * 1000 - FORGIVE_MS)
        assert await found(seeker) == set()

    run(check)


def test_nobody_asked_and_nothing_found_are_empty_answers() -> None:
    async def check(made: World) -> None:
        _, alone = await made.node()
        assert await alone.find_providers(KEY, timeout_s=WAIT_S) == ()
        gone = NodeIdentity.generate().peer_id
        alone.introduce(f"/memory/1/p2p/{gone}")
        assert await alone.find_providers(KEY, timeout_s=WAIT_S) == ()

    run(check)


def test_a_bootstrap_address_without_a_peer_is_refused() -> None:
    async def check(made: World) -> None:
        network = await made.network()
        for address in ("/ip4/192.0.2.1/tcp/4001", "example.org:4001", "/p2p/nobody"):
            with pytest.raises(InvalidRequest):
                Discovery(network, time=made.time, bootstrap=[address])
        await network.stop()

    run(check)


def test_a_liar_sends_the_seeker_nowhere_and_costs_a_bounded_number_of_dials() -> None:
    async def check(made: World) -> None:
        liar = await made.network()
        victims = [NodeIdentity((1000 + n).to_bytes(32, "big")).peer_id for n in range(200)]
        told = iter(range(0, 10_000, MAX_CLOSER))

        async def lie(_: PeerId, payload: bytes) -> bytes:
            FindRequest.decode(payload)
            begin = next(told) % len(victims)
            closer = victims[begin : begin + MAX_CLOSER]
            return FindReply(
                providers=(
                    Contact(peer=victims[0], addresses=("/ip4/10.0.0.1/tcp/22/p2p/" + victims[0],)),
                    Contact(peer=victims[1], addresses=(f"/memory/1/p2p/{victims[2]}",)),
                ),
                closer=tuple(Contact(peer=v, addresses=(f"/memory/1/p2p/{v}",)) for v in closer),
            ).encode()

        liar.serve(FIND_PROTOCOL, lie)
        seeker = await made.network()
        dialled: list[str] = []
        connect = seeker.connect

        async def counted(address: str, *, timeout_s: float) -> PeerId:
            dialled.append(address)
            return await connect(address, timeout_s=timeout_s)

        seeker.connect = counted  # type: ignore[method-assign]
        view = Discovery(
            seeker,
            time=made.time,
            bootstrap=[f"/memory/1/p2p/{liar.peer_id}"],
            rule=in_memory,
        )
        assert await view.find_providers(KEY, timeout_s=WAIT_S) == ()
        assert 1 < len(dialled) <= MAX_DIALS
        for network in (liar, seeker):
            await network.stop()

    run(check)


@pytest.mark.parametrize("reply", [b"", b"{}", b"[1,2]", b"\xff" * 100, b"0" * 70_000])
def test_a_malformed_answer_costs_its_sender_its_place(reply: bytes) -> None:
    async def check(made: World) -> None:
        broken = await made.network()

        async def answer(_: PeerId, __: bytes) -> bytes:
            return reply

        broken.serve(FIND_PROTOCOL, answer)
        _, view = await made.node(broken)
        holder, holder_view = await made.node()
        view.introduce(holder.addresses[0])
        await holder_view.provide(KEY)
        assert await found(view) == {holder.peer_id}
        await broken.stop()

    run(check)


def test_a_stranger_may_provide_only_as_itself_and_only_where_it_may_be_dialled() -> None:
    async def check(made: World) -> None:
        first, view = await made.node()
        stranger = await made.network()
        await stranger.connect(first.addresses[0], timeout_s=WAIT_S)

        async def provide(address: str) -> bytes:
            request = ProvideRequest(key=KEY, addresses=(address,)).encode()
            return await stranger.request(
                first.peer_id, PROVIDE_PROTOCOL, request, timeout_s=WAIT_S
            )

        victim = NodeIdentity.generate().peer_id
        for address in (f"/memory/1/p2p/{victim}", f"/ip4/10.0.0.1/tcp/22/p2p/{stranger.peer_id}"):
            with pytest.raises(InvalidRequest):
                await provide(address)
        assert await found(view) == set()
        await provide(stranger.addresses[0])
        assert await found(view) == {stranger.peer_id}
        await stranger.stop()

    run(check)


def test_a_peer_seen_elsewhere_may_not_name_a_victims_host() -> None:
    async def check(made: World) -> None:
        first = await made.network()
        view = Discovery(first, time=made.time, rule=lambda _address, _peer: True)
        await view.start()
        stranger = await made.network()
        made.hub.observed[stranger.peer_id] = ("8.8.8.8", 4001)
        await stranger.connect(first.addresses[0], timeout_s=WAIT_S)

        async def provide(host: str) -> bytes:
            address = f"/ip4/{host}/tcp/22/p2p/{stranger.peer_id}"
            request = ProvideRequest(key=KEY, addresses=(address,)).encode()
            return await stranger.request(
                first.peer_id, PROVIDE_PROTOCOL, request, timeout_s=WAIT_S
            )

        with pytest.raises(InvalidRequest):
            await provide("9.9.9.9")
        assert await found(view) == set()
        await provide("8.8.8.8")
        assert await found(view) == {stranger.peer_id}
        await view.stop()
        for network in (first, stranger):
            await network.stop()

    run(check)


@pytest.mark.parametrize(
    "payload", [b"", b"{}", b'{"key":"00"}', b'{"key":1}', b"\x00" * 50, b"[" * 3_000]
)
def test_a_malformed_request_is_the_senders_fault(payload: bytes) -> None:
    async def check(made: World) -> None:
        first, _ = await made.node()
        stranger = await made.network()
        await stranger.connect(first.addresses[0], timeout_s=WAIT_S)
        for protocol in (FIND_PROTOCOL, PROVIDE_PROTOCOL):
            with pytest.raises(PeerFault):
                await stranger.request(first.peer_id, protocol, payload, timeout_s=WAIT_S)
        await stranger.stop()

    run(check)


def test_a_node_that_only_dials_answers_no_questions() -> None:
    async def check(made: World) -> None:
        first, _ = await made.node()
        dialler, _ = await made.node(first, listens=False)
        await dialler.connect(first.addresses[0], timeout_s=WAIT_S)
        request = FindRequest(key=KEY).encode()
        with pytest.raises(NotFound):
            await first.request(dialler.peer_id, FIND_PROTOCOL, request, timeout_s=WAIT_S)

    run(check)
