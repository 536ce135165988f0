"""The way to the orchestrator: dial, greet, join; and the open session other parts send over."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from eth_account.signers.local import LocalAccount

from shoal.network.identity import NodeIdentity
from shoal.network.port import Network
from shoal.protocol.canonical import parse_json
from shoal.protocol.errors import InvalidRequest, PeerFault, Unavailable
from shoal.protocol.ids import Account, PeerId
from shoal.protocol.node import (
    HELLO_PROTOCOL,
    JOIN_PROTOCOL,
    PROTOCOL_VERSION,
    BoundNode,
    HelloReply,
    HelloRequest,
    JoinReply,
    JoinRequest,
    NodeBinding,
)
from shoal.protocol.signing import Domain, sign
from shoal.protocol.version import SOFTWARE_VERSION
from shoal.worker.http import get_json
from shoal.worker.offers import Parties

REQUEST_TIMEOUT_S: Final = 15.0
_DIAL_TIMEOUT_S: Final = 10.0
_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 10.0


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """The two keys of a worker: the account that is paid and the node that works."""

    account: LocalAccount
    identity: NodeIdentity

    @property
    def address(self) -> Account:
        """The account's address."""
        return Account(self.account.address)

    @property
    def node(self) -> PeerId:
        """The node's peer id."""
        return self.identity.peer_id

    def bind(self, domain: Domain, now_ms: int) -> BoundNode:
        """The binding of node to account, signed by both."""
        binding = NodeBinding(
            account=self.address,
            node=self.node,
            node_key="0x" + self.identity.public_key.hex(),
            valid_from_ms=now_ms,
        )
        return BoundNode(
            binding=sign(binding, domain, self.account),
            node_signature="0x" + self.identity.sign(binding.node_message()).hex(),
        )

    def parties(self, greeting: HelloReply) -> Parties:
        """Who the two sides of this worker's leases are."""
        return Parties(
            domain=greeting.domain,
            orchestrator=Account(greeting.orchestrator),
            account=self.address,
            node=self.node,
        )


class Link:
    """The connection to the orchestrator, as long as there is one.

    Args:
        network: This worker's node.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self._peer: PeerId | None = None
        self._joined = asyncio.Event()
        self._lost = asyncio.Event()
        network.on_peer_lost(self._on_peer_lost)

    @property
    def peer(self) -> PeerId | None:
        """The orchestrator's node, while it is connected."""
        return self._peer

    async def dial(self, address: str) -> PeerId:
        """The node at ``address`` is connected; it may be greeted."""
        peer = await self._network.connect(address, timeout_s=_DIAL_TIMEOUT_S)
        self._peer = peer
        self._lost.clear()
        return peer

    async def close(self) -> None:
        """There is no connection."""
        peer, self._peer = self._peer, None
        self._joined.clear()
        self._lost.set()
        if peer is not None:
            await self._network.disconnect(peer)

    def mark_joined(self) -> None:
        """Work may be sent."""
        self._joined.set()

    async def wait_joined(self) -> None:
        """Returns when the orchestrator has this worker on its list."""
        await self._joined.wait()

    async def wait_lost(self, timeout_s: float) -> bool:
        """True as soon as the connection is gone; False after ``timeout_s`` of it holding."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._lost.wait()
        except TimeoutError:
            return False
        return True

    async def request(
        self, protocol: str, payload: bytes, *, timeout_s: float = REQUEST_TIMEOUT_S
    ) -> bytes:
        """The orchestrator's reply.

        Raises:
            Unavailable: there is no connection just now.
        """
        if self._peer is None:
            raise Unavailable(
                "The orchestrator is not connected just now; the worker is dialling it again.",
                code="not_connected",
            )
        return await self._network.request(self._peer, protocol, payload, timeout_s=timeout_s)

    def _on_peer_lost(self, peer: PeerId, _: str) -> None:
        if peer == self._peer:
            self._peer = None
            self._joined.clear()
            self._lost.set()


class Backoff:
    """Pauses that double up to ten seconds, each drawn from its upper half.

    Drawing keeps the workers of a restarted orchestrator from returning all at once.
    """

    def __init__(self) -> None:
        self._longest_s = _FIRST_PAUSE_S

    def reset(self) -> None:
        """The next pause is short again."""
        self._longest_s = _FIRST_PAUSE_S

    def next_s(self) -> float:
        """How long to wait before the next try."""
        longest_s = self._longest_s
        self._longest_s = min(2 * longest_s, _LONGEST_PAUSE_S)
        return random.uniform(longest_s / 2, longest_s)


async def find_addresses(orchestrator: str) -> tuple[str, ...]:
    """The libp2p addresses to dial for what the provider wrote down.

    Raises:
        InvalidRequest: it is neither an address ending in ``/p2p/<id>`` nor an http(s) URL.
        Unavailable: nothing answers at the URL.
    """
    if orchestrator.startswith("/"):
        return (orchestrator,)
    if urlsplit(orchestrator).scheme not in {"http", "https"}:
        raise InvalidRequest(
            f"The orchestrator {orchestrator!r} is neither an address like "
            "/ip4/192.0.2.1/tcp/4001/p2p/12D3… nor a URL like https://example.org; "
            "copy one from the orchestrator's start-up lines.",
            code="bad_orchestrator",
        )
    info = await get_json(f"{orchestrator.rstrip('/')}/v1/market/info")
    addresses = info.get("p2p_addresses") if isinstance(info, dict) else None
    if not isinstance(addresses, list) or not addresses:
        raise PeerFault(
            f"{orchestrator} names no libp2p address; check that it is an orchestrator's URL.",
            code="no_addresses",
        )
    return tuple(str(address)[:500] for address in addresses[:16])


async def greet(link: Link) -> HelloReply:
    """The orchestrator's greeting, once both speak the same version.

    Raises:
        InvalidRequest: the versions differ (code ``stale_version``).
        PeerFault: the greeting is malformed or contradicts itself.
    """
    hello = HelloRequest(protocol_version=PROTOCOL_VERSION, software_version=SOFTWARE_VERSION)
    reply = await link.request(HELLO_PROTOCOL, hello.encode())
    _require_same_version(reply)
    greeting = HelloReply.decode(reply)
    if greeting.domain.escrow.lower() != greeting.contracts.job_escrow.lower():
        raise PeerFault(
            "The orchestrator's greeting signs for one escrow and pays from another; it is not "
            "joined.",
            evidence=greeting.digest(),
            code="two_escrows",
        )
    return greeting


async def join(link: Link, bound: BoundNode, name: str, device: str) -> JoinReply:
    """The orchestrator has this worker on its list."""
    request = JoinRequest(bound_node=bound, name=name, device=device)
    return JoinReply.decode(await link.request(JOIN_PROTOCOL, request.encode()))


def _require_same_version(reply: bytes) -> None:
    # Read before the greeting as a whole: another version's greeting has other fields, and
    # its owner should hear about the version, not about a field.
    try:
        raw: Any = parse_json(reply)
    except ValueError:
        return
    theirs = raw.get("protocol_version") if isinstance(raw, dict) else None
    if not isinstance(theirs, int) or theirs == PROTOCOL_VERSION:
        return
    software = str(raw.get("software_version"))[:40]
    side = "this worker" if theirs > PROTOCOL_VERSION else "the orchestrator"
    raise InvalidRequest(
        f"The orchestrator speaks protocol version {theirs} (Shoal {software}) and this worker "
        f"version {PROTOCOL_VERSION} (Shoal {SOFTWARE_VERSION}); update {side}.",
        code="stale_version",
    )
