"""The in-memory network reaches peers through each other as the port promises."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from reach_contract import CHECKS, Town

from shoal.network.identity import NodeIdentity
from shoal.network.memory import MemoryHub, MemoryNetwork
from shoal.network.port import Network


class MemoryTown:
    def __init__(self) -> None:
        self._hub = MemoryHub()
        self._nodes: list[MemoryNetwork] = []

    async def relay(self) -> Network:
        return await self._node(listens=True)

    async def worker(self) -> Network:
        return await self._node(listens=False)

    async def close(self) -> None:
        for node in self._nodes:
            await node.stop()

    async def _node(self, *, listens: bool) -> Network:
        node = MemoryNetwork(self._hub, NodeIdentity.generate(), listens=listens)
        self._nodes.append(node)
        await node.start()
        return node


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_memory_keeps(check: Callable[[Town], Awaitable[None]]) -> None:
    async def run() -> None:
        town = MemoryTown()
        try:
            await check(town)
        finally:
            await town.close()

    asyncio.run(run())
