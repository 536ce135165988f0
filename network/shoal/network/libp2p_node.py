"""The real network: one libp2p node in its own trio thread, behind the asyncio port."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from shoal.network.dispatch import Dispatcher
from shoal.network.framing import too_large
from shoal.network.identity import NodeIdentity, public_key_of
from shoal.network.libp2p_host import parse_listen, parse_peer
from shoal.network.libp2p_service import Libp2pService
from shoal.network.naming import resolve
from shoal.network.port import (
    DEFAULT_MAX_REQUEST_BYTES,
    MAX_TOPIC_MESSAGE_BYTES,
    Handler,
    Limits,
    LostHandler,
    TopicHandler,
)
from shoal.network.trio_thread import TrioThread
from shoal.protocol.errors import InvalidRequest, Unavailable
from shoal.protocol.ids import PeerId


class Libp2pNode:
    """A `Network` over TCP, Noise and Yamux.

    Args:
        identity: The node's key; the handshake proves it to every peer.
        listen: Where to listen, as ``/ip4/127.0.0.1/tcp/0``; None dials out only.
        limits: What peers may take from this node.
    """

    def __init__(
        self, identity: NodeIdentity, listen: str | None = None, *, limits: Limits | None = None
    ) -> None:
        self._identity = identity
        self._listen = listen
        self._limits = limits or Limits()
        self._dispatch = Dispatcher(self._limits)
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
        listen = parse_listen(self._listen) if self._listen is not None else None
        built: list[Libp2pService] = []

        async def run(thread: TrioThread, started: Callable[[], None]) -> None:
            service = Libp2pService(self._identity, listen, self._limits, self._dispatch, thread)
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
        self, protocol: str, handler: Handler, *, max_request_bytes: int = DEFAULT_MAX_REQUEST_BYTES
    ) -> None:
        """Requests for `protocol` now reach `handler`."""
        service = self._dispatch.serve(protocol, handler, max_request_bytes)
        if self._thread is not None and self._service is not None:
            self._thread.post(partial(self._service.serve, service))

    def subscribe(self, topic: str, handler: TopicHandler) -> None:
        """Messages on `topic` from other peers now reach `handler`."""
        is_first = self._dispatch.subscribe(topic, handler)
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

    async def disconnect(self, peer: PeerId) -> None:
        """No connection to `peer` is open."""
        public_key_of(peer)
        thread, service = self._parts()
        await thread.call(partial(service.disconnect, peer))

    def peers(self) -> frozenset[PeerId]:
        """The peers connected now."""
        return self._service.peers() if self._service else frozenset()

    def _parts(self) -> tuple[TrioThread, Libp2pService]:
        if self._thread is None or self._service is None:
            raise Unavailable(
                "This node's network is not running; start it first.", code="network_stopped"
            )
        return self._thread, self._service
