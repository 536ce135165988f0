"""A session with the orchestrator: dial, greet, join; and the open link other parts send over."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

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
from shoal.worker.offers import Parties

REQUEST_TIMEOUT_S: Final = 15.0
_DIAL_TIMEOUT_S: Final = 10.0
_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 10.0


class SessionState(StrEnum):
    """What a worker does about its session; ``waiting`` is the pause between two tries."""

    STOPPED = "stopped"
    DIALLING = "dialling"
    JOINING = "joining"
    JOINED = "joined"
    WAITING = "waiting"


@dataclass(frozen=True, kw_only=True)
class Session:
    """How things stand with the orchestrator, for whoever asks what the worker is doing.

    Attributes:
        state: What is going on.
        since_ms: Wall-clock time at which that began.
        address: What is being dialled, or over what the worker is connected.
        peer: The orchestrator's node, while it is connected.
        orchestrator: Its account, once it has greeted this worker.
        last_error: Why the latest try or session failed; absent once joined again.
        last_error_ms: When that was.
        retry_at_ms: When the next try begins, while waiting.
        num_joins: How often this worker has joined since it started.
        round_trip_ms: How long the last heartbeat took to be answered.
        missed_heartbeats: How many in a row were not.
    """

    state: SessionState
    since_ms: int
    address: str | None = None
    peer: PeerId | None = None
    orchestrator: Account | None = None
    last_error: str | None = None
    last_error_ms: int | None = None
    retry_at_ms: int | None = None
    num_joins: int = 0
    round_trip_ms: int | None = None
    missed_heartbeats: int = 0


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
        self._address: str | None = None
        self._lost_because: str | None = None
        self._joined = asyncio.Event()
        self._lost = asyncio.Event()
        network.on_peer_lost(self._on_peer_lost)

    @property
    def peer(self) -> PeerId | None:
        """The orchestrator's node, while it is connected."""
        return self._peer

    @property
    def address(self) -> str | None:
        """Where the orchestrator's node was reached last."""
        return self._address

    @property
    def lost_because(self) -> str | None:
        """Why the last connection ended; None while one stands, or when this side ended it."""
        return self._lost_because

    async def dial(self, address: str, *, timeout_s: float = _DIAL_TIMEOUT_S) -> PeerId:
        """The node at ``address`` is connected; it may be greeted."""
        peer = await self._network.connect(address, timeout_s=timeout_s)
        self._peer, self._address, self._lost_because = peer, address, None
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

    def _on_peer_lost(self, peer: PeerId, cause: str) -> None:
        if peer == self._peer:
            self._peer, self._lost_because = None, cause
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
