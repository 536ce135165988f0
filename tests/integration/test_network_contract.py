"""The libp2p node keeps every promise of the port, over real sockets on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from network_contract import CHECKS, World

from shoal.network.identity import NodeIdentity
from shoal.network.libp2p_node import Libp2pNode
from shoal.network.port import Limits, Network


class Libp2pWorld:
    """Nodes over one transport: ``tcp/0``, or ``tcp/0/ws`` for WebSocket."""

    def __init__(self, transport: str) -> None:
        self._listen = f"/ip4/127.0.0.1/{transport}"
        self._nodes: list[Libp2pNode] = []

    async def node(
        self,
        *,
        listens: bool = True,
        identity: NodeIdentity | None = None,
        limits: Limits | None = None,
    ) -> Network:
        listen = self._listen if listens else None
        node = Libp2pNode(identity or NodeIdentity.generate(), listen, limits=limits)
        self._nodes.append(node)
        await node.start()
        return node

    async def close(self) -> None:
        for node in self._nodes:
            await node.stop()


@pytest.mark.parametrize("transport", ["tcp/0", "tcp/0/ws"], ids=["tcp", "websocket"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_libp2p_keeps(check: Callable[[World], Awaitable[None]], transport: str) -> None:
    async def run() -> None:
        world = Libp2pWorld(transport)
        try:
            await check(world)
        finally:
            await world.close()

    asyncio.run(run())
