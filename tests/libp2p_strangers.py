"""Libp2p nodes for tests, and the strangers they must withstand: bare hosts without manners."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import trio
from libp2p import new_host
from libp2p.abc import IHost
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.insecure.transport import PLAINTEXT_PROTOCOL_ID, InsecureTransport
from multiaddr import Multiaddr

from shoal.network.identity import NodeIdentity
from shoal.network.libp2p_host import build_host, swarm_of
from shoal.network.libp2p_node import Libp2pNode
from shoal.network.libp2p_websocket import WebSocketTransport
from shoal.network.port import Limits, Network
from shoal.protocol.ids import PeerId

ECHO = "/test/echo/1"
LOCAL = "/ip4/127.0.0.1/tcp/0"
WAIT_S = 30.0


async def echo(_peer: PeerId, payload: bytes) -> bytes:
    return payload


@asynccontextmanager
async def started(*nodes: Network) -> AsyncIterator[None]:
    """The nodes run inside the block."""
    try:
        for node in nodes:
            await node.start()
        yield
    finally:
        for node in nodes:
            await node.stop()


def fresh(listen: str | Sequence[str] | None = LOCAL, limits: Limits | None = None) -> Libp2pNode:
    node = Libp2pNode(NodeIdentity.generate(), listen, limits=limits)
    node.serve(ECHO, echo)
    return node


async def arrived(node: Libp2pNode, peer: PeerId) -> None:
    """The peer's connection is open at this end too: a dialler knows of it a moment earlier."""
    async with asyncio.timeout(WAIT_S):
        while peer not in node.peers():  # noqa: ASYNC110  # the port tells of peers lost, not of peers found
            await asyncio.sleep(0.005)


Attack = Callable[[IHost, ID], Awaitable[None]]


async def hang_up(host: IHost) -> None:
    """Closes the host's sockets, which the library's own stop leaves open."""
    for connections in list(swarm_of(host).connections.values()):
        for connection in connections:
            with trio.move_on_after(1):
                await connection.close()
            await connection.muxed_conn.secured_conn.close()  # type: ignore[attr-defined]


def hostile_peer(address: str, attack: Attack, identity: NodeIdentity | None = None) -> None:
    """Runs `attack(host, target)` as a bare libp2p host connected to `address`."""

    async def main() -> None:
        host = build_host(identity or NodeIdentity.generate(), Limits())
        async with host.run(listen_addrs=[]):
            target = info_from_p2p_addr(Multiaddr(address))
            with trio.fail_after(20):
                await host.connect(target)
                try:
                    await attack(host, target.peer_id)
                finally:
                    await hang_up(host)

    trio.run(main)


def under_attack(attack: Attack, limits: Limits | None = None) -> None:
    """Runs the attack against a node and checks that the node still serves others."""

    async def run() -> None:
        server, client = fresh(limits=limits), fresh(listen=None)
        async with started(server, client):
            await asyncio.to_thread(hostile_peer, server.addresses[0], attack)
            peer = await client.connect(server.addresses[0], timeout_s=WAIT_S)
            assert await client.request(peer, ECHO, b"x", timeout_s=WAIT_S) == b"x"

    asyncio.run(run())


async def plaintext_dial(address: str) -> bool:
    """Whether a peer that speaks only plaintext gets a connection."""
    keys = create_new_key_pair()
    host = new_host(
        key_pair=keys, sec_opt={TProtocol(PLAINTEXT_PROTOCOL_ID): InsecureTransport(keys)}
    )
    host.get_network().retry_config.max_retries = 0  # type: ignore[attr-defined]
    swarm_of(host).transport_manager.add_transport(WebSocketTransport())
    async with host.run(listen_addrs=[]):
        try:
            with trio.fail_after(5):
                await host.connect(info_from_p2p_addr(Multiaddr(address)))
        except (BaseLibp2pError, trio.TooSlowError):
            return False
        await hang_up(host)
        return True
