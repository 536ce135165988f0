"""A network inside one process: the libp2p node's twin, same promises, no sockets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import TypeVar

from shoal.network.bans import Bans, Fault
from shoal.network.dispatch import Dispatcher
from shoal.network.framing import (
    banned,
    decode_error,
    encode_error,
    not_connected,
    not_reachable,
    too_large,
)
from shoal.network.identity import NodeIdentity, public_key_of
from shoal.network.meters import Meters
from shoal.network.port import (
    DEFAULT_MAX_REQUEST_BYTES,
    MAX_TOPIC_MESSAGE_BYTES,
    Handler,
    Limits,
    LostHandler,
    Reach,
    TopicCheck,
    TopicHandler,
)
from shoal.protocol.errors import (
    Clock,
    Expired,
    InvalidRequest,
    NotFound,
    ShoalError,
    Unavailable,
)
from shoal.protocol.ids import PeerId

T = TypeVar("T")
_CLOSED_REMOTELY = "the connection was closed by the peer or broke"


class MemoryHub:
    """The place where memory networks find each other; one per simulated world."""

    def __init__(self) -> None:
        self.nodes: dict[PeerId, MemoryNetwork] = {}
        self.observed: dict[PeerId, tuple[str, int]] = {}
        """At which IP address and port a node is seen; absent where none is."""

    def listener(self, peer: PeerId) -> MemoryNetwork | None:
        """The node of that name, if it runs and listens."""
        node = self.nodes.get(peer)
        return node if node is not None and node.addresses else None


class MemoryNetwork:
    """A `Network` over function calls, with the caps and errors of the real one.

    Args:
        hub: Where its peers are.
        identity: The node's key.
        listens: False dials out only, like a worker behind NAT.
        limits: What peers may take from this node.
    """

    def __init__(
        self,
        hub: MemoryHub,
        identity: NodeIdentity,
        *,
        listens: bool = True,
        limits: Limits | None = None,
    ) -> None:
        self._hub = hub
        self._identity = identity
        self._listens = listens
        self._limits = limits or Limits()
        self._bans = Bans(time.monotonic)
        self._dispatch = Dispatcher(self._limits, Meters(), self.penalise)
        self._peers: set[PeerId] = set()
        self._guests: set[PeerId] = set()
        self._broken: dict[PeerId, asyncio.Event] = {}
        self._running = False

    @property
    def peer_id(self) -> PeerId:
        """This node's own name."""
        return self._identity.peer_id

    @property
    def addresses(self) -> tuple[str, ...]:
        """Addresses other nodes of the hub may dial; empty when dial-only or not started."""
        return (f"/memory/1/p2p/{self.peer_id}",) if self._running and self._listens else ()

    async def start(self) -> None:
        """The node is on the hub."""
        if self._running:
            raise InvalidRequest("This node is already started; stop it first.")
        if self.peer_id in self._hub.nodes:
            raise InvalidRequest(
                f"Cannot listen as {self.peer_id}: address already in use; "
                "stop what holds it or choose another.",
                code="address_unavailable",
            )
        self._hub.nodes[self.peer_id] = self
        self._running = True

    async def stop(self) -> None:
        """Every connection is closed; a second call does nothing."""
        if not self._running:
            return
        self._running = False
        del self._hub.nodes[self.peer_id]
        for peer in tuple(self._peers):
            self._part(peer)
        await self._dispatch.stop()

    def serve(
        self,
        protocol: str,
        handler: Handler,
        *,
        max_request_bytes: int = DEFAULT_MAX_REQUEST_BYTES,
        for_guests: bool = False,
    ) -> None:
        """Requests for `protocol` now reach `handler`."""
        self._dispatch.serve(protocol, handler, max_request_bytes, for_guests=for_guests)

    def subscribe(
        self, topic: str, handler: TopicHandler, *, check: TopicCheck | None = None
    ) -> None:
        """Messages on `topic` from other nodes that pass `check` now reach `handler`."""
        self._dispatch.subscribe(topic, handler, check)

    def on_peer_lost(self, handler: LostHandler) -> None:
        """`handler(peer, cause)` runs once for each peer lost."""
        self._dispatch.on_peer_lost(handler)

    async def connect(self, address: str, *, timeout_s: float) -> PeerId:
        """A connection to the node at `address` is open."""
        self._must_run()
        _, slash, name = address.rpartition("/p2p/")
        if not slash:
            raise InvalidRequest(
                f"The address {address[:512]!r} does not end in /p2p/ and a peer id; "
                "copy it whole from the node's start-up line."
            )
        peer = PeerId(name)
        public_key_of(peer)
        if peer == self.peer_id:
            raise InvalidRequest(f"{address!r} is this node's own address; dial another node.")
        if timeout_s <= 0:
            raise Expired(
                f"No connection to {address} within {timeout_s:g} s.", clock=Clock.CONNECT
            )
        if self._bans.is_banned(peer):
            raise banned(peer)
        other = self._hub.listener(peer)
        if other is None or not self._may_meet(other):
            raise Unavailable(
                f"Nobody answers as peer {peer} at {address}; check the address and that the "
                "node is running.",
                code="dial_failed",
            )
        self._meet(peer)
        other._meet(self.peer_id)
        return peer

    async def reach(self, peer: PeerId, *, via: PeerId | None = None, timeout_s: float) -> Reach:
        """A connection to `peer` is open, passed on by a node that both are connected to."""
        public_key_of(peer)
        self._must_run()
        if peer in self._peers:
            return Reach.RELAYED if peer in self._guests else Reach.DIRECT
        if timeout_s <= 0:
            raise Expired(
                f"Peer {peer} was not reached through a relay within {timeout_s:g} s.",
                clock=Clock.CONNECT,
                peer_id=peer,
            )
        if self._bans.is_banned(peer):
            raise banned(peer)
        relays = self._peers if via is None else self._peers & {via}
        if not relays:
            raise not_reachable(peer, "this node is connected to no relay")
        other = self._hub.nodes.get(peer)
        if other is None or not relays & other._peers or not self._may_meet(other):
            raise not_reachable(peer, "no relay has a way to it")
        self._meet(peer)
        other._meet(self.peer_id)
        self._guests.add(peer)
        other._guests.add(self.peer_id)
        return Reach.RELAYED

    async def request(
        self, peer: PeerId, protocol: str, payload: bytes, *, timeout_s: float
    ) -> bytes:
        """The peer's answer, in either direction of a connection."""
        try:
            body = await self._request(peer, protocol, payload, timeout_s)
        except ShoalError as error:
            outcome = type(error).default_code
            self.meters.count("requests_made", protocol=protocol, outcome=outcome)
            raise
        self.meters.count("requests_made", protocol=protocol, outcome="ok")
        return body

    async def _request(
        self, peer: PeerId, protocol: str, payload: bytes, timeout_s: float
    ) -> bytes:
        public_key_of(peer)
        self._must_run()
        if len(payload) > self._limits.max_message_bytes:
            raise too_large(
                len(payload), self._limits.max_message_bytes, f"to peer {peer} on {protocol}"
            )
        other = self._hub.nodes.get(peer)
        if peer not in self._peers or other is None:
            raise not_connected(peer)
        try:
            async with asyncio.timeout(timeout_s):
                return await self._unless_broken(
                    peer, other._answer(self.peer_id, protocol, payload)
                )
        except TimeoutError:
            raise Expired(
                f"Peer {peer} did not answer a {protocol} request within {timeout_s:g} s.",
                clock=Clock.REPLY,
                peer_id=peer,
            ) from None

    async def publish(self, topic: str, payload: bytes) -> None:
        """Every other node reachable over connections hears the message."""
        if len(payload) > MAX_TOPIC_MESSAGE_BYTES:
            raise too_large(len(payload), MAX_TOPIC_MESSAGE_BYTES, f"for topic {topic}")
        self._must_run()
        seen = {self.peer_id}
        frontier = [(peer, self.peer_id) for peer in self._peers]
        while frontier:
            peer, bearer = frontier.pop()
            node = self._hub.nodes.get(peer)
            if peer in seen or node is None:
                continue
            seen.add(peer)
            # Gossip is forwarded only by nodes that follow the topic themselves and accept it.
            if topic not in node._dispatch.topics():
                continue
            if node._dispatch.admits(topic, bearer, payload):
                node._dispatch.deliver(topic, self.peer_id, payload)
                frontier.extend((other, peer) for other in node._peers)

    @property
    def meters(self) -> Meters:
        """What this node has counted since it was made."""
        return self._dispatch.meters

    def penalise(self, peer: PeerId, fault: Fault) -> None:
        """A fault is held against `peer`; enough of them at once ban it."""
        self.meters.count("faults", kind=fault.value)
        if self._bans.penalise(peer, fault):
            self._keep_out(peer, fault.value)

    async def ban(self, peer: PeerId, reason: str, *, for_s: float) -> None:
        """`peer` is disconnected and kept out for `for_s` seconds, a day at most."""
        public_key_of(peer)
        self._must_run()
        self._bans.ban(peer, reason, for_s)
        self._keep_out(peer, reason)

    def _keep_out(self, peer: PeerId, reason: str) -> None:
        self.meters.count("bans", reason=reason)
        if peer in self._peers:
            self._part(peer)
            self.meters.count("peers_lost", cause="banned")
            self._dispatch.peer_lost(peer, "it was banned")

    async def disconnect(self, peer: PeerId) -> None:
        """No connection to `peer` is open."""
        public_key_of(peer)
        self._must_run()
        if peer in self._peers:
            self._part(peer)

    def peers(self) -> frozenset[PeerId]:
        """The peers connected now."""
        return frozenset(self._peers)

    def observed(self, peer: PeerId) -> tuple[str, int] | None:
        """Where the hub says `peer` is seen, while it is connected."""
        return self._hub.observed.get(peer) if peer in self._peers else None

    def _must_run(self) -> None:
        if not self._running:
            raise Unavailable(
                "This node's network is not running; start it first.", code="network_stopped"
            )

    def _has_room(self) -> bool:
        return len(self._peers) < self._limits.max_connections

    def _may_meet(self, other: MemoryNetwork) -> bool:
        return not other._bans.is_banned(self.peer_id) and self._has_room() and other._has_room()

    def _meet(self, peer: PeerId) -> None:
        self._peers.add(peer)
        self.meters.gauge("connections_open", len(self._peers))
        self._broken.setdefault(peer, asyncio.Event())

    def _part(self, peer: PeerId) -> None:
        """Ends the connection on both sides; the other side hears that we were lost."""
        self._forget(peer)
        other = self._hub.nodes.get(peer)
        if other is not None and self.peer_id in other._peers:
            other._forget(self.peer_id)
            lost = other._dispatch.peer_lost
            asyncio.get_running_loop().call_soon(lost, self.peer_id, _CLOSED_REMOTELY)

    def _forget(self, peer: PeerId) -> None:
        self._peers.discard(peer)
        self.meters.gauge("connections_open", len(self._peers))
        self._guests.discard(peer)
        self._broken.pop(peer, asyncio.Event()).set()

    async def _answer(self, caller: PeerId, protocol: str, payload: bytes) -> bytes:
        """The reply as the caller would read it: errors go through their wire form."""
        service = self._dispatch.service(protocol)
        if service is None or (caller in self._guests and not service.for_guests):
            raise NotFound(
                f"Peer {self.peer_id} does not serve {protocol}; it may run another version.",
                code="unknown_protocol",
            )
        if len(payload) > service.max_request_bytes:
            raise too_large(len(payload), service.max_request_bytes, f"announced by peer {caller}")
        try:
            return await self._dispatch.answer(service, caller, payload)
        except ShoalError as error:
            raise decode_error(encode_error(error)) from None

    async def _unless_broken(self, peer: PeerId, reply: Awaitable[T]) -> T:
        """The reply, unless the connection to `peer` ends first."""
        broken = asyncio.ensure_future(self._broken[peer].wait())
        answer = asyncio.ensure_future(reply)
        try:
            await asyncio.wait({broken, answer}, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return await answer
            raise Unavailable(
                f"Peer {peer} closed the connection before it answered; try again once it is "
                "connected.",
                code="no_reply",
            )
        finally:
            for task in (broken, answer):
                task.cancel()
            await asyncio.gather(broken, answer, return_exceptions=True)
