"""The real network: one libp2p node in its own trio thread, behind the asyncio port."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

import trio
from libp2p.abc import IHost, INetConn, INetStream, INetwork, INotifee
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.tools.async_service import background_trio_service
from multiaddr import Multiaddr
from shoal.network.dispatch import Dispatcher, Service
from shoal.network.framing import not_connected, too_large
from shoal.network.identity import NodeIdentity
from shoal.network.libp2p_host import (
    build_gossip,
    build_host,
    cap_streams,
    parse_listen,
    parse_peer,
    swarm_of,
)
from shoal.network.libp2p_streams import RequestStreams, serve_stream
from shoal.network.liveness import Liveness, serve_pings
from shoal.network.port import (
    DEFAULT_MAX_REQUEST_BYTES,
    MAX_TOPIC_MESSAGE_BYTES,
    Handler,
    Limits,
    LostHandler,
    TopicHandler,
)
from shoal.network.trio_thread import TrioThread
from shoal.protocol.errors import Clock, Expired, InvalidRequest, Unavailable
from shoal.protocol.ids import PeerId

_LOG: Final = logging.getLogger(__name__)


class Libp2pNode:
    """A `Network` over TCP, Noise and Yamux.

    Args:
        identity: The node's key; its peer id is proved to every peer by the handshake.
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
        self._running: _Running | None = None
        self._addresses: tuple[str, ...] = ()
        self._connected: dict[PeerId, int] = {}

    @property
    def peer_id(self) -> PeerId:
        """This node's own name."""
        return self._identity.peer_id

    @property
    def addresses(self) -> tuple[str, ...]:
        """Multiaddrs others may dial; empty when dial-only or not started."""
        return self._addresses

    async def start(self) -> None:
        """The node listens (if it has an address) and may be used."""
        if self._thread is not None:
            raise InvalidRequest("This node is already started; stop it first.")
        listen = parse_listen(self._listen) if self._listen is not None else None

        async def service(thread: TrioThread, started: Callable[[], None]) -> None:
            running = _Running(self._identity, listen, self._limits, self._dispatch, thread)
            await running.run(started)

        async def keep(thread: TrioThread, started: Callable[[], None]) -> None:
            running = _Running(self._identity, listen, self._limits, self._dispatch, thread)
            self._running = running
            await running.run(started)

        del service
        thread = TrioThread(f"shoal-network-{self.peer_id[-6:]}", keep)
        await thread.start()
        self._thread = thread
        if self._running is not None:
            self._addresses = self._running.addresses()

    async def stop(self) -> None:
        """Every connection is closed and the port is free; a second call does nothing."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        await thread.stop()
        await self._dispatch.stop()
        self._running, self._addresses = None, ()

    def serve(
        self, protocol: str, handler: Handler, *, max_request_bytes: int = DEFAULT_MAX_REQUEST_BYTES
    ) -> None:
        """Requests for `protocol` now reach `handler`."""
        service = self._dispatch.serve(protocol, handler, max_request_bytes)
        if self._thread is not None and self._running is not None:
            running = self._running
            self._thread.post(lambda: running.serve(service))
