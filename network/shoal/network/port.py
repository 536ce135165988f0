"""What the rest of Shoal may ask of a network; the only view of it that trades ever get.

Two parts keep this promise and pass one contract suite: `Libp2pNode` between machines and
`MemoryNetwork` inside one process.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

from shoal.network.bans import Fault
from shoal.network.meters import Meters
from shoal.protocol.ids import PeerId

Handler = Callable[[PeerId, bytes], Awaitable[bytes]]
TopicHandler = Callable[[PeerId, bytes], Awaitable[None]]
LostHandler = Callable[[PeerId, str], None]


class TopicVerdict(StrEnum):
    """What a topic's check says of one message.

    ``ACCEPT`` passes it on.  ``IGNORE`` drops what no honest forwarder could have known to be
    useless, such as a message that is late.  ``REJECT`` drops what nobody honest would have
    passed on, and counts against the peer that did.
    """

    ACCEPT = "accept"
    IGNORE = "ignore"
    REJECT = "reject"


class Reach(StrEnum):
    """How a peer is connected."""

    DIRECT = "direct"
    RELAYED = "relayed"


TopicCheck = Callable[[bytes], TopicVerdict]

DEFAULT_MAX_REQUEST_BYTES: Final = 1 << 20
MAX_TOPIC_MESSAGE_BYTES: Final = 64 << 10


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one node lets its peers take from it.

    Attributes:
        max_connections: Connections open at once, both directions together.
        max_connections_per_address: Those accepted from one IP address, which many nodes behind
            one router share; None allows as many as in all.
        max_connections_per_peer: Connections one peer may have with us.
        max_handshakes: Connections accepted whose handshake is not finished, in all; one IP
            address may have half of them.
        handshakes_per_s_per_address: Connections one IP address may begin per second, once it
            has used up the `max_handshakes` it may begin at once.
        max_streams: Streams all peers together may hold open towards us.
        max_streams_per_peer: Streams one peer may hold open towards us; more are refused.
        max_requests_in_flight: Requests from all peers being handled at once; more are
            answered with `Unavailable` without reaching a handler.
        requests_per_s_per_peer: Requests of one peer that are handled per second, twice as many
            after a quiet while; more are answered with `Unavailable`.
        bytes_in_per_s_per_connection: What is read per second of a connection we accepted; its
            sender waits.
        max_message_bytes: Largest reply accepted, and upper bound for any protocol's request.
        handler_timeout_s: Longest a handler may work on one request.
        idle_stream_s: A stream without a new request for this long is closed by its server.
        ping_interval_s: Pause between liveness pings to each peer.
        ping_timeout_s: Longest wait for one ping's answer; two misses in a row end the peer.
    """

    max_connections: int = 256
    max_connections_per_address: int | None = None
    max_connections_per_peer: int = 4
    max_handshakes: int = 1024
    handshakes_per_s_per_address: float = 200.0
    max_streams: int = 16_384
    max_streams_per_peer: int = 64
    max_requests_in_flight: int = 512
    requests_per_s_per_peer: float = 1000.0
    bytes_in_per_s_per_connection: float = float(128 << 20)
    max_message_bytes: int = 8 << 20
    handler_timeout_s: float = 120.0
    idle_stream_s: float = 120.0
    ping_interval_s: float = 4.0
    ping_timeout_s: float = 4.0


class Network(Protocol):
    """One node's way to its peers. All methods belong to the asyncio loop that started it."""

    @property
    def peer_id(self) -> PeerId:
        """This node's own name."""
        ...

    @property
    def addresses(self) -> tuple[str, ...]:
        """Multiaddrs others may dial, each ending in ``/p2p/<peer_id>``; empty when dial-only."""
        ...

    @property
    def meters(self) -> Meters:
        """What this node has counted since it was made."""
        ...

    async def start(self) -> None:
        """The node listens (if it has an address) and may be used.

        Raises:
            InvalidRequest: The listen address is malformed or its port is taken.
        """
        ...

    async def stop(self) -> None:
        """Every connection is closed and the port is free; a second call does nothing."""
        ...

    def serve(
        self,
        protocol: str,
        handler: Handler,
        *,
        max_request_bytes: int = DEFAULT_MAX_REQUEST_BYTES,
        for_guests: bool = False,
    ) -> None:
        """Requests for `protocol` now reach `handler`, before or after `start`.

        Peers that came about through a relay are guests: to them nothing is served but what is
        `for_guests`.
        """
        ...

    async def connect(self, address: str, *, timeout_s: float) -> PeerId:
        """A connection to the peer at `address` is open.

        Raises:
            InvalidRequest: The address is malformed or lacks ``/p2p/<peer_id>``.
            Unavailable: Nobody with that peer id answers there, or we ban it.
            Expired: The connect clock ran out.
        """
        ...

    async def reach(self, peer: PeerId, *, via: PeerId | None = None, timeout_s: float) -> Reach:
        """A connection to `peer` is open, through a relay where it cannot be dialled.

        `via` names the relay, which must be connected; without, every relay known is tried.
        Both sides are each other's guests.

        Raises:
            Unavailable: No relay has a way to the peer (code ``not_reachable``).
            Expired: The connect clock ran out.
        """
        ...

    async def request(
        self, peer: PeerId, protocol: str, payload: bytes, *, timeout_s: float
    ) -> bytes:
        """The peer's answer. Works in both directions over one dialled connection.

        Raises:
            Unavailable: The peer is not connected, or the connection broke before the reply.
            Expired: The reply clock ran out.
            NotFound: The peer does not serve `protocol` (code ``unknown_protocol``).
            InvalidRequest: The payload is over a cap (code ``message_too_large``).
            PeerFault: The reply broke the framing rules.
            ShoalError: Whatever the peer's handler raised on purpose.
        """
        ...

    async def publish(self, topic: str, payload: bytes) -> None:
        """The message is handed to gossip; nothing promises that it arrives.

        Raises:
            InvalidRequest: The payload is over `MAX_TOPIC_MESSAGE_BYTES`.
        """
        ...

    def subscribe(
        self, topic: str, handler: TopicHandler, *, check: TopicCheck | None = None
    ) -> None:
        """Messages on `topic` from other peers now reach `handler` with their signer's id.

        Only those that `check` accepts are handled, or passed on to others.  It runs in any
        thread, must be quick, and replaces an earlier one of the topic.
        """
        ...

    def on_peer_lost(self, handler: LostHandler) -> None:
        """`handler(peer, cause)` runs once for each peer lost, but not for `disconnect`."""
        ...

    async def disconnect(self, peer: PeerId) -> None:
        """No connection to `peer` is open; a peer that was not connected is no error."""
        ...

    async def ban(self, peer: PeerId, reason: str, *, for_s: float) -> None:
        """`peer` is disconnected and kept out for `for_s` seconds, a day at most.

        `reason` is one of a few fixed words: it labels a counter.
        """
        ...

    def penalise(self, peer: PeerId, fault: Fault) -> None:
        """A fault is held against `peer`; faults fade, and enough of them at once ban it."""
        ...

    def peers(self) -> frozenset[PeerId]:
        """The peers connected now."""
        ...

    def observed(self, peer: PeerId) -> tuple[str, int] | None:
        """The IP address and port our socket sees `peer` at; None when not directly connected."""
        ...
