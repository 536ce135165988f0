"""The in-memory network keeps every promise of the port."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from network_contract import CHECKS, World

from shoal.network.identity import NodeIdentity
from shoal.network.memory import MemoryHub, MemoryNetwork
from shoal.network.port import Limits, Network


class MemoryWorld:
    def __init__(self) -> None:
        self._hub = MemoryHub()
        self._nodes: list[MemoryNetwork] = []

    async def node(
        self,
        *,
        listens: bool = True,
        identity: NodeIdentity | None = None,
        limits: Limits | None = None,
    ) -> Network:
        key = identity or NodeIdentity.generate()
        node = MemoryNetwork(self._hub, key, listens=listens, limits=limits)
        self._nodes.append(node)
        await node.start()
        return node

    async def close(self) -> None:
        for node in self._nodes:
            await node.stop()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_memory_network_keeps(check: Callable[[World], Awaitable[None]]) -> None:
    async def run() -> None:
        world = MemoryWorld()
        try:
            await check(world)
        finally:
            await world.close()

    asyncio.run(run())
