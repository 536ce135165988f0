"""The real network: one libp2p node in its own trio thread, behind the asyncio port."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

from shoal.network.bans import Bans, Fault
from shoal.network.dispatch import Dispatcher
from shoal.network.framing import not_reachable, too_large
from shoal.network.identity import NodeIdentity, public_key_of
from shoal.network.libp2p_circuit import RelayClient
from shoal.network.libp2p_extension import Extension
from shoal.network.libp2p_host import parse_announce, parse_listen, parse_peer
from shoal.network.libp2p_service import Libp2pService, Place
from shoal.network.meters import Meters
from shoal.network.naming import resolve
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
from shoal.network.trio_thread import TrioThread
from shoal.protocol.errors import InvalidRequest, Unavailable
from shoal.protocol.ids import PeerId

T = TypeVar("T")


class Libp2pNode:
    """A `Network` over TCP or WebSocket, Noise and Yamux.

    Args:
        identity: The node's key; the handshake proves it to every peer.
        listen: Where to listen, one address or several, as ``/ip4/127.0.0.1/tcp/0`` or
            ``/ip4/127.0.0.1/tcp/0/ws``; None dials out only.
        announce: Addresses given out in place of those, such as a proxy's or a router's.
        limits: What peers may take from this node.
        extensions: What runs beside the host, in the network thread.
        bans: Whom to keep out; by default nobody yet, and never an address of this machine.
    """

    def __init__(
        self,
        identity: NodeIdentity,
        listen: str | Sequence[str] | None = None,
        *,
        announce: Sequence[str] = (),
        limits: Limits | None = None,
        extensions: Sequence[Extension] = (),
        bans: Bans | None = None,
    ) -> None:
        self._identity = identity
        self._listen = (listen,) if isinstance(listen, str) else tuple(listen or ())
        self._announce = tuple(announce)
        self._limits = limits or Limits()
        self._bans = bans or Bans(time.monotonic)
        self._dispatch = Dispatcher(self._limits, Meters(), self.penalise)
        self._extensions = tuple(extensions)
        self._thread: TrioThread | None = None
        self._service: Libp2pService | None = None

    @property
    def peer_id(self) -> PeerId:
        """This node's own name."""
        return self._identity.peer_id

    @property
    def addresses(self) -> tuple[str, ...]:
        """Multiaddrs others may dial; empty when dial-only or not started."""
        return self._service.addresses() if self._service else ()

    async def start(self) -> None:
        """The node listens (if it has an address) and may be used."""
        if self._thread is not None:
            raise InvalidRequest("This node is already started; stop it first.")
        place = Place(listen=parse_listen(self._listen), announce=parse_announce(self._announce))
        built: list[Libp2pService] = []

        async def run(thread: TrioThread, started: Callable[[], None]) -> None:
            service = Libp2pService(
                self._identity,
                place,
                self._limits,
                self._dispatch,
                self._bans,
                thread,
                self._extensions,
            )
            built.append(service)
            await service.run(started)

        thread = TrioThread(f"shoal-network-{self.peer_id[-6:]}", run)
        await thread.start()
        self._thread, self._service = thread, built[0]

    async def stop(self) -> None:
        """Every connection is closed and the port is free; a second call does nothing."""
        thread, self._thread, self._service = self._thread, None, None
        if thread is not None:
            await thread.stop()
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
        service = self._dispatch.serve(protocol, handler, max_request_bytes, for_guests=for_guests)
        if self._thread is not None and self._service is not None:
            self._thread.post(partial(self._service.serve, service))

    def subscribe(
        self, topic: str, handler: TopicHandler, *, check: TopicCheck | None = None
    ) -> None:
        """Messages on `topic` from other peers that pass `check` now reach `handler`."""
        is_first = self._dispatch.subscribe(topic, handler, check)
        if is_first and self._thread is not None and self._service is not None:
            self._thread.post(partial(self._service.subscribe, topic))

    def on_peer_lost(self, handler: LostHandler) -> None:
        """`handler(peer, cause)` runs once for each peer lost."""
        self._dispatch.on_peer_lost(handler)

    async def connect(self, address: str, *, timeout_s: float) -> PeerId:
        """A connection to the peer at `address` is open."""
        peer = parse_peer(address)
        peer_id = PeerId(peer.peer_id.to_base58())
        if peer_id == self.peer_id:
            raise InvalidRequest(f"{address!r} is this node's own address; dial another node.")
        thread, service = self._parts()
        begun = time.monotonic()
        peer = parse_peer(await resolve(address, timeout_s=timeout_s))
        left_s = max(0.0, timeout_s - (time.monotonic() - begun))
        await thread.call(partial(service.connect, peer, timeout_s=left_s))
        return peer_id

    async def reach(self, peer: PeerId, *, via: PeerId | None = None, timeout_s: float) -> Reach:
        """A connection to `peer` is open, through a relay where it cannot be dialled."""
        public_key_of(peer)
        self._parts()
        client = next((one for one in self._extensions if isinstance(one, RelayClient)), None)
        if client is not None:
            return await self.call(partial(client.reach, peer, via=via, timeout_s=timeout_s))
        if peer in self.peers():
            return Reach.DIRECT
        raise not_reachable(peer, "this node uses no relay")

    async def request(
        self, peer: PeerId, protocol: str, payload: bytes, *, timeout_s: float
    ) -> bytes:
        """The peer's answer, over whichever side's connection there is."""
        public_key_of(peer)
        thread, service = self._parts()
        return await thread.call(
            partial(service.request, peer, protocol, payload, timeout_s=timeout_s)
        )

    async def publish(self, topic: str, payload: bytes) -> None:
        """The message is handed to gossip."""
        if len(payload) > MAX_TOPIC_MESSAGE_BYTES:
            raise too_large(len(payload), MAX_TOPIC_MESSAGE_BYTES, f"for topic {topic}")
        thread, service = self._parts()
        await thread.call(partial(service.publish, topic, payload))

    @property
    def meters(self) -> Meters:
        """What this node has counted since it was made."""
        return self._dispatch.meters

    def penalise(self, peer: PeerId, fault: Fault) -> None:
        """A fault is held against `peer`; enough of them at once ban it."""
        if self._thread is not None and self._service is not None:
            self._thread.post(partial(self._service.penalise, peer, fault))

    async def ban(self, peer: PeerId, reason: str, *, for_s: float) -> None:
        """`peer` is disconnected and kept out for `for_s` seconds, a day at most."""
        public_key_of(peer)
        self._bans.ban(peer, reason, for_s)
        thread, service = self._parts()
        await thread.call(partial(service.ban, peer, reason))

    async def disconnect(self, peer: PeerId) -> None:
        """No connection to `peer` is open."""
        public_key_of(peer)
        thread, service = self._parts()
        await thread.call(partial(service.disconnect, peer))

    def peers(self) -> frozenset[PeerId]:
        """The peers connected now."""
        return self._service.peers() if self._service else frozenset()

    def observed(self, peer: PeerId) -> tuple[str, int] | None:
        """The IP address and port our socket sees `peer` at; None when not directly connected."""
        return self._service.observed(peer) if self._service else None

    async def call(self, function: Callable[[], Awaitable[T]]) -> T:
        """What `function` returns or raises in the network thread: the way to an extension.

        Raises:
            Unavailable: The node is not running, or stops before the call ends.
        """
        thread, _ = self._parts()
        return await thread.call(function)

    def _parts(self) -> tuple[TrioThread, Libp2pService]:
        if self._thread is None or self._service is None:
            raise Unavailable(
                "This node's network is not running; start it first.", code="network_stopped"
            )
        return self._thread, self._service
