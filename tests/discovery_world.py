"""Nodes with their views of the table of providers, and checks that run over them."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

from shoal.network.discovery import Discovery
from shoal.network.port import Network

KEY = hashlib.sha256(b"a blob").hexdigest()
WAIT_S = 30.0
NodeT = TypeVar("NodeT", bound=Network)


class TableWorld(Generic[NodeT]):
    """Started nodes, each with its view of the table; all end with the check."""

    def __init__(self) -> None:
        self.parts: list[tuple[NodeT, Discovery]] = []

    async def close(self) -> None:
        for network, discovery in self.parts:
            await discovery.stop()
            await network.stop()


WorldT = TypeVar("WorldT", bound="TableWorld[Any]")


def run_in(make: Callable[[], WorldT], check: Callable[[WorldT], Awaitable[None]]) -> None:
    """The check holds in a world of its own, which is closed behind it."""

    async def inside() -> None:
        made = make()
        try:
            async with asyncio.timeout(120):
                await check(made)
        finally:
            await made.close()

    asyncio.run(inside())


async def found(discovery: Discovery, key: str = KEY) -> set[str]:
    """The peers that are found to provide `key`."""
    return {c.peer for c in await discovery.find_providers(key, timeout_s=WAIT_S)}
