"""Discovery between real nodes on loopback: the table of providers, and the local network."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from discovery_world import KEY, WAIT_S, TableWorld, found, run_in
from zeroconf import const
from zeroconf._dns import DNSPointer
from zeroconf._protocol.outgoing import DNSOutgoing
from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

from shoal.network.discovery import Discovery
from shoal.network.identity import NodeIdentity
from shoal.network.lan import SERVICE, LanAnnouncer, nearby, own_addresses
from shoal.network.libp2p_node import Libp2pNode
from shoal.protocol.clock import SystemTime
from shoal.protocol.discovery import ORCHESTRATORS_KEY
from shoal.protocol.errors import NotFound

LOOPBACK = ("127.0.0.1",)


class World(TableWorld[Libp2pNode]):
    """Nodes on loopback."""

    async def node(
        self, *bootstrap: Libp2pNode, listens: bool = True
    ) -> tuple[Libp2pNode, Discovery]:
        listen = "/ip4/127.0.0.1/tcp/0" if listens else None
        network = Libp2pNode(NodeIdentity.generate(), listen)
        await network.start()
        discovery = Discovery(
            network,
            time=SystemTime(),
            bootstrap=[other.addresses[0] for other in bootstrap],
        )
        self.parts.append((network, discovery))
        await discovery.start()
        return network, discovery


def run(check: Callable[[World], Awaitable[None]]) -> None:
    run_in(World, check)


def test_a_seeker_finds_holders_and_orchestrator_through_one_bootstrap_node() -> None:
    async def check(made: World) -> None:
        orchestrator, home = await made.node()
        holders = [await made.node(orchestrator) for _ in range(2)]
        for _, discovery in holders:
            assert await discovery.provide(KEY) >= 1
        # Its own table: the bootstrap node finds itself listed by those that joined it.
        await home.join()
        assert await home.provide(ORCHESTRATORS_KEY) >= 1

        seeker, discovery = await made.node(orchestrator, listens=False)
        contacts = await discovery.find_providers(KEY, timeout_s=WAIT_S)
        assert {c.peer for c in contacts} == {network.peer_id for network, _ in holders}
        assert {c.peer: c.addresses for c in contacts} == {
            network.peer_id: network.addresses for network, _ in holders
        }
        assert await found(discovery, ORCHESTRATORS_KEY) == {orchestrator.peer_id}
        # What is found can be dialled as it stands.
        assert await seeker.connect(contacts[0].addresses[0], timeout_s=WAIT_S) == contacts[0].peer

    run(check)


def test_a_holder_that_withdraws_is_gone_and_one_that_dies_is_passed_over_once_it_failed() -> None:
    async def check(made: World) -> None:
        orchestrator, _ = await made.node()
        first, first_view = await made.node(orchestrator)
        second, second_view = await made.node(orchestrator)
        _, seeker = await made.node(orchestrator, listens=False)
        await first_view.provide(KEY)
        await second_view.provide(KEY)
        assert await found(seeker) == {first.peer_id, second.peer_id}
        await first_view.withdraw(KEY)
        assert await found(seeker) == {second.peer_id}
        await second_view.stop()
        await second.stop()
        seeker.note_failed(second.peer_id)
        assert await found(seeker) == set()

    run(check)


def test_a_bootstrap_node_that_is_down_costs_no_more_than_its_dial() -> None:
    async def check(made: World) -> None:
        gone, _ = await made.node()
        alive, alive_view = await made.node()
        holder, holder_view = await made.node(alive)
        seeker, discovery = await made.node(gone, alive, listens=False)
        await gone.stop()
        await holder_view.provide(KEY)
        assert await found(discovery) == {holder.peer_id}
        assert gone.peer_id not in seeker.peers()
        assert await found(alive_view) == {holder.peer_id}

    run(check)


def test_a_node_that_only_dials_serves_no_table() -> None:
    async def check(made: World) -> None:
        home, _ = await made.node()
        dialler, _ = await made.node(listens=False)
        await dialler.connect(home.addresses[0], timeout_s=WAIT_S)
        async with asyncio.timeout(WAIT_S):
            while dialler.peer_id not in home.peers():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        with pytest.raises(NotFound):
            await home.request(dialler.peer_id, "/shoal/find/1", b"{}", timeout_s=WAIT_S)

    run(check)


def test_an_orchestrator_in_the_local_network_is_found_while_it_announces_itself() -> None:
    async def check() -> None:
        peers = [NodeIdentity.generate().peer_id for _ in range(2)]
        announcers = [
            LanAnnouncer(peer, [f"/ip4/127.0.0.1/tcp/{4001 + n}/p2p/{peer}"], LOOPBACK)
            for n, peer in enumerate(peers)
        ]
        for announcer in announcers:
            await announcer.start()
        contacts = await nearby(WAIT_S, LOOPBACK, enough=2)
        assert {c.peer: c.addresses for c in contacts} == {
            peer: (f"/ip4/127.0.0.1/tcp/{4001 + n}/p2p/{peer}",) for n, peer in enumerate(peers)
        }
        for announcer in announcers:
            await announcer.stop()
            await announcer.stop()
        assert await nearby(1.0, LOOPBACK) == ()

    asyncio.run(check())


def test_liars_in_the_local_network_are_not_believed() -> None:
    peer, honest = (NodeIdentity.generate().peer_id for _ in range(2))
    entries = [
        b"not an address",
        f"/ip4/169.254.169.254/tcp/80/p2p/{peer}".encode(),
        f"/dns4/example.org/tcp/4001/p2p/{peer}".encode(),
        b"/ip4/127.0.0.1/tcp/4001",
        b"\xff\xfe",
    ]

    async def check() -> None:
        liar = AsyncZeroconf(interfaces=list(LOOPBACK))
        for number, entry in enumerate(entries):
            info = AsyncServiceInfo(
                SERVICE,
                f"liar{number}.{SERVICE}",
                port=1,
                properties={b"dnsaddr0": entry, b"other": b"x"},
                server="liar.local.",
                parsed_addresses=["127.0.0.1"],
            )
            await (await liar.async_register_service(info))
        # A name of another service under ours: what asks for it as ours raises.
        stray = DNSOutgoing(const._FLAGS_QR_RESPONSE | const._FLAGS_AA)
        pointer = DNSPointer(SERVICE, const._TYPE_PTR, const._CLASS_IN, 120, "e._http._tcp.local.")
        stray.add_answer_at_time(pointer, 0)

        async def shout() -> None:
            while True:
                liar.zeroconf.async_send(stray)
                await asyncio.sleep(0.2)

        shouting = asyncio.create_task(shout())
        announcer = LanAnnouncer(honest, [f"/ip4/127.0.0.1/tcp/4001/p2p/{honest}"], LOOPBACK)
        await announcer.start()
        # Asked for as many as there are, so that every liar is heard out.
        contacts = await nearby(4.0, LOOPBACK, enough=len(entries) + 1)
        assert {c.peer for c in contacts} == {honest}
        shouting.cancel()
        await announcer.stop()
        await liar.async_unregister_all_services()
        await liar.async_close()

    asyncio.run(check())


def test_a_wildcard_stands_for_this_machines_own_numbers() -> None:
    peer = NodeIdentity.generate().peer_id
    for address in own_addresses([f"/ip4/0.0.0.0/tcp/4001/p2p/{peer}"]):
        assert address.endswith(f"/tcp/4001/p2p/{peer}")
        assert not address.startswith(("/ip4/0.", "/ip4/127."))
    assert own_addresses([f"/ip4/9.9.9.9/tcp/1/p2p/{peer}"]) == (f"/ip4/9.9.9.9/tcp/1/p2p/{peer}",)
