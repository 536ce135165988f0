"""The libp2p node keeps every promise of the port, over real sockets on loopback."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from network_contract import CHECKS, World, keep

from shoal.network.identity import NodeIdentity
from shoal.network.libp2p_node import Libp2pNode
from shoal.network.port import Limits


@pytest.mark.parametrize("transport", ["tcp/0", "tcp/0/ws"], ids=["tcp", "websocket"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_libp2p_keeps(check: Callable[[World], Awaitable[None]], transport: str) -> None:
    def make(identity: NodeIdentity, listens: bool, limits: Limits | None) -> Libp2pNode:
        listen = f"/ip4/127.0.0.1/{transport}" if listens else None
        return Libp2pNode(identity, listen, limits=limits)

    keep(check, make)
