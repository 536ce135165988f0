"""The in-memory network keeps every promise of the port."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from network_contract import CHECKS, World, keep

from shoal.network.identity import NodeIdentity
from shoal.network.memory import MemoryHub, MemoryNetwork
from shoal.network.port import Limits


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_memory_network_keeps(check: Callable[[World], Awaitable[None]]) -> None:
    hub = MemoryHub()

    def make(identity: NodeIdentity, listens: bool, limits: Limits | None) -> MemoryNetwork:
        return MemoryNetwork(hub, identity, listens=listens, limits=limits)

    keep(check, make)
