"""The trio side of the libp2p node: what runs in the network thread, from start to stop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import trio
from libp2p.abc import INetStream
from libp2p.connection_types import ConnectionType
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError, MultiError
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.peer.peerstore import PeerStoreError
from libp2p.pubsub.pb import rpc_pb2
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from shoal.network.bans import Bans, Fault
from shoal.network.dispatch import Dispatcher, Service
from shoal.network.framing import banned
from shoal.network.identity import NodeIdentity
from shoal.network.libp2p_admission import Admission, StreamGate
from shoal.network.libp2p_extension import Extension, Running
from shoal.network.libp2p_host import build_gossip, build_host, swarm_of
from shoal.network.libp2p_streams import RequestStreams, serve_stream
from shoal.network.liveness import PING_PROTOCOL, ConnectionWatch, Loss
from shoal.network.port import MAX_TOPIC_MESSAGE_BYTES, Limits
from shoal.network.trio_thread import TrioThread
from shoal.protocol.errors import Clock, Expired, InvalidRequest, Unavailable
from shoal.protocol.ids import PeerId

_PING_BYTES: Final = 32
_ANNOUNCE_AFTER_S: Final = (0.3, 1.0, 5.0)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a node listens, and what it gives out in place of those addresses, if anything."""

    listen: Sequence[Multiaddr] = ()
    announce: Sequence[Multiaddr] = ()


class Libp2pService:
    """A running host with its request streams, gossip and liveness watch.

    Args:
        identity: The node's key.
        place: Where to listen, if anywhere, and what to announce.
        limits: What peers may take from this node.
        dispatch: Who answers requests, in the asyncio loop, and what is counted.
        bans: Whom to keep out.
        thread: The door to that loop.
        extensions: What runs beside the host until the node stops.
    """

    def __init__(
        self,
        identity: NodeIdentity,
        place: Place,
        limits: Limits,
        dispatch: Dispatcher,
        bans: Bans,
        thread: TrioThread,
        extensions: Sequence[Extension] = (),
    ) -> None:
        self._limits = limits
        self._dispatch = dispatch
        self._thread = thread
        self._extensions = tuple(extensions)
        self._bans = bans
        self._meters = dispatch.meters
        self._listen = list(place.listen)
        self._host = build_host(identity, limits, announce=place.announce)
        self._swarm = swarm_of(self._host)
        self._admission = Admission(self._swarm, limits, bans, self._meters)
        StreamGate(self._swarm, limits, self._meters, self.penalise)
        self._pubsub, self._router = build_gossip(self._host)
        self._streams = RequestStreams(self._host, limits, self._meters)
        self._watch = ConnectionWatch(
            self._swarm, self._streams, self._admission, limits, self._meters, self._lost
        )
        self._nursery: trio.Nursery | None = None

    async def run(self, started: Callable[[], None]) -> None:
        """Runs until the thread is stopping; calls `started` once the host may be used."""
        try:
            await self._run(started)
        finally:
            # The library's cache of seen messages has a thread that nothing else ends.
            self._pubsub.seen_messages.stop()

    async def _run(self, started: Callable[[], None]) -> None:
        async with self._host.run(listen_addrs=self._listen):
            for address in self._listen:
                if str(address) not in self._swarm.listeners:
                    raise InvalidRequest(
                        f"Cannot listen on {address}; stop what holds the port or choose another.",
                        code="address_unavailable",
                    )
            self._swarm.register_notifee(self._watch)
            async with (
                background_trio_service(self._pubsub),
                background_trio_service(self._router),
                trio.open_nursery() as self._nursery,
            ):
                await self._pubsub.wait_until_ready()
                try:
                    self._open_for_business(self._nursery)
                    await self._start_extensions(self._nursery)
                    started()
                    await self._thread.stopping.wait()
                finally:
                    await self._watch.close_all()
                    self._nursery.cancel_scope.cancel()

    def addresses(self) -> tuple[str, ...]:
        """The dialable addresses; a wildcard listen address is given as it is."""
        return tuple(str(address) for address in self._host.get_addrs())

    def peers(self) -> frozenset[PeerId]:
        """The peers connected now; may be called from any thread."""
        # `list` copies the keys without letting another thread run in between.
        return frozenset(PeerId(peer.to_base58()) for peer in list(self._swarm.connections))

    def observed(self, peer: PeerId) -> tuple[str, int] | None:
        """Where our sockets see `peer`; may be called from any thread."""
        for connection in self._swarm.get_connections(ID.from_string(peer)):
            if connection.get_connection_type() is ConnectionType.DIRECT:
                remote = getattr(connection.muxed_conn, "get_remote_address", lambda: None)()
                if remote is not None:
                    return str(remote[0]), int(remote[1])
        return None

    def serve(self, service: Service) -> None:
        """Streams of the service's protocol are answered in the asyncio loop."""

        async def answer(peer: PeerId, payload: bytes) -> bytes:
            return await self._thread.call_asyncio(self._dispatch.answer(service, peer, payload))

        async def handle(stream: INetStream) -> None:
            await serve_stream(
                stream,
                answer,
                cap=service.max_request_bytes,
                limits=self._limits,
                meters=self._meters,
                penalise=self.penalise,
            )

        self._host.set_stream_handler(TProtocol(service.protocol), handle)

    def subscribe(self, topic: str) -> None:
        """Messages on `topic` are carried to the asyncio loop."""
        if self._nursery is not None:
            # Asked before a message is passed on, so that a bad one ends here.
            self._pubsub.set_topic_validator(topic, partial(self._admits, topic), False)
            self._nursery.start_soon(self._follow, topic)
            self._nursery.start_soon(self._announce_again)

    async def connect(self, peer: PeerInfo, *, timeout_s: float) -> None:
        """A connection to `peer` is open; see `Network.connect` for what it raises."""
        peer_id = peer.peer_id
        if self._swarm.get_connections(peer_id):
            return
        if self._bans.is_banned(PeerId(peer_id.to_base58())):
            raise banned(PeerId(peer_id.to_base58()))
        # One failed dial keeps the library from dialling that peer again for a minute.
        self._swarm.unblock_peer(peer_id)
        # Addresses heard earlier would be preferred to the one just asked for.
        with contextlib.suppress(PeerStoreError):
            self._host.get_peerstore().clear_addrs(peer_id)
        with trio.move_on_after(timeout_s):
            try:
                await self._host.connect(peer)
            except BaseLibp2pError as error:
                raise Unavailable(
                    f"Nobody answers as peer {peer_id} at {peer.addrs[0]}: {_innermost(error)}; "
                    "check the address and that the node is running.",
                    code="dial_failed",
                ) from error
            return
        raise Expired(
            f"No connection to {peer.addrs[0]} within {timeout_s:g} s.", clock=Clock.CONNECT
        )

    async def request(
        self, peer: PeerId, protocol: str, payload: bytes, *, timeout_s: float
    ) -> bytes:
        """The peer's answer; see `Network.request` for what it raises."""
        return await self._streams.request(peer, protocol, payload, timeout_s=timeout_s)

    async def publish(self, topic: str, payload: bytes) -> None:
        """The message is handed to the router."""
        await self._pubsub.publish(topic, payload)

    async def disconnect(self, peer: PeerId) -> None:
        """No connection to `peer` is open, and nobody is told that it was lost."""
        await self._watch.close(ID.from_base58(peer), cause=None)

    async def ban(self, peer: PeerId, reason: str) -> None:
        """A peer that `bans` now keeps out is disconnected and reported as lost."""
        self._meters.count("bans", reason=reason)
        await self._watch.close(ID.from_base58(peer), cause="it was banned", loss=Loss.BANNED)

    def penalise(self, peer: PeerId, fault: Fault) -> None:
        """A fault is held against the peer and, more lightly, its addresses; in this thread."""
        self._meters.count("faults", kind=fault.value)
        for address in self._admission.addresses_of(ID.from_base58(peer)):
            if self._bans.penalise(address, fault):
                self._meters.count("bans", reason=fault.value)
        if self._bans.penalise(peer, fault) and self._nursery is not None:
            self._nursery.start_soon(self.ban, peer, fault.value)

    def _open_for_business(self, nursery: trio.Nursery) -> None:
        self._host.set_stream_handler(PING_PROTOCOL, self._echo)
        for service in self._dispatch.services():
            self.serve(service)
        for topic in self._dispatch.topics():
            self.subscribe(topic)
        self._watch.start(nursery, self.penalise)

    async def _start_extensions(self, nursery: trio.Nursery) -> None:
        running = Running(
            host=self._host,
            swarm=self._swarm,
            pubsub=self._pubsub,
            streams=self._streams,
            limits=self._limits,
            thread=self._thread,
            meters=self._meters,
            penalise=self.penalise,
            services=self._dispatch.services,
        )
        for extension in self._extensions:
            await nursery.start(extension.run, running)

    async def _echo(self, stream: INetStream) -> None:
        async def answer(_peer: PeerId, payload: bytes) -> bytes:
            return payload

        await serve_stream(
            stream,
            answer,
            cap=_PING_BYTES,
            limits=self._limits,
            meters=self._meters,
            penalise=self.penalise,
        )

    async def _follow(self, topic: str) -> None:
        subscription = await self._pubsub.subscribe(topic)
        own = self._host.get_id().to_bytes()
        while True:
            message: rpc_pb2.Message = await subscription.get()
            if message.from_id == own or len(message.data) > MAX_TOPIC_MESSAGE_BYTES:
                continue
            sender = PeerId(ID(message.from_id).to_base58())
            deliver = partial(self._dispatch.deliver, topic, sender, message.data)
            self._thread.post_asyncio(deliver)

    def _admits(self, topic: str, forwarder: ID, message: rpc_pb2.Message) -> bool:
        if forwarder == self._host.get_id():
            return True
        bearer = PeerId(forwarder.to_base58())
        return self._dispatch.admits(topic, bearer, message.data)

    async def _announce_again(self) -> None:
        """Tells every peer our topics once more; hearing it twice changes nothing.

        The library announces a new topic to the peers it has, and all topics to a peer it
        is adding, but a peer being added at that very moment hears neither.
        """
        for delay_s in _ANNOUNCE_AFTER_S:
            await trio.sleep(delay_s)
            hello = self._pubsub.get_hello_packet()
            await self._pubsub.message_all_peers(hello.SerializeToString())

    def _lost(self, peer: ID, cause: str) -> None:
        name = PeerId(peer.to_base58())
        self._thread.post_asyncio(partial(self._dispatch.peer_lost, name, cause))


def _innermost(error: BaseException) -> str:
    """The root cause in words, cut to a line."""
    while True:
        if isinstance(error, MultiError) and error.args and error.args[0]:
            first = error.args[0]
            nested = first[0] if isinstance(first, (list, tuple)) else first
        else:
            nested = error.__cause__
        if not isinstance(nested, BaseException):
            break
        error = nested
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200].rstrip(".")
