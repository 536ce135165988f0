"""A direct connection between two peers behind NATs, through a hole both punch at once.

Each side tells the other, over the relayed connection, where a relay sees it; then both dial at
the same moment from the very port the relay sees, so that each NAT takes the other's first packet
for an answer.  The messages are libp2p's DCUtR, from py-libp2p's message classes.  Its own DCUtR
is not used: it dials from a listening port, which a worker that only dials out has not, and it
dials whatever addresses it was told or remembers.

Source:
    https://github.com/libp2p/specs/blob/master/relay/DCUtR.md
"""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import trio
from libp2p.abc import INetConn, INetStream
from libp2p.connection_types import ConnectionType
from libp2p.custom_types import TProtocol
from libp2p.identity.identify.identify import ID as IDENTIFY_PROTOCOL
from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.io.trio import TrioTCPStream
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.dcutr import PROTOCOL_ID as _DCUTR
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch
from multiaddr import Multiaddr

from shoal.network.libp2p_extension import Running
from shoal.network.libp2p_guests import Guests, Way
from shoal.network.libp2p_relay import (
    MESSAGE_FAULTS,
    STREAM_FAULTS,
    read_message,
    write_message,
)
from shoal.network.libp2p_streams import discard

DCUTR_PROTOCOL: Final = TProtocol(_DCUTR)

_LOG: Final = logging.getLogger(__name__)
_MESSAGE_TIMEOUT_S: Final = 10.0
# The kernel sends its first packet again after 1 and 3 s, so two mistimed sides meet within this.
_PUNCH_S: Final = 6.0
_RETRY_S: Final = 0.2
_MAX_WAIT_FOR_PEER_S: Final = 2.0
_MAX_ADDRESSES: Final = 4
_MAX_IDENTIFY_BYTES: Final = 64 << 10
# NATs map connections to high ports; a stranger must not make us knock at a service's.
_LOWEST_PORT: Final = 1024

Place = tuple[str, int]
Settle = Callable[[trio.SocketStream], Awaitable[None]]


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """From where this node dials, and where others see that.

    Attributes:
        source: The local address and port to dial from.
        seen: Where the relay sees that port.
    """

    source: Place
    seen: Place

    def places(self) -> list[Place]:
        """What to tell the peer: where the world sees us, and where our own network does."""
        return [self.seen] if self.source == self.seen else [self.seen, self.source]


class Puncher:
    """Punches holes towards peers that are connected through a relay.

    Args:
        running: The node.
        guests: Who admits the connections that come of it.
        nursery: Where admissions run to their end.
    """

    def __init__(self, running: Running, guests: Guests, nursery: trio.Nursery) -> None:
        self._running = running
        self._nursery = nursery
        self._guests = guests
        self._busy: set[ID] = set()
        self._offering: set[ID] = set()

    async def reach(self, peer: ID, relay: ID) -> bool:
        """True once a direct connection to `peer`, so far relayed through `relay`, is open."""
        stream: INetStream | None = None
        self._offering.add(peer)
        try:
            outlook = await self._look_out(relay)
            if outlook is None:
                return False
            with trio.fail_after(_MESSAGE_TIMEOUT_S):
                stream = await self._running.host.new_stream(peer, [DCUTR_PROTOCOL])
                begun = trio.current_time()
                await write_message(stream, _connect_message(outlook))
                theirs = _places_in(await read_message(stream))
                round_trip_s = trio.current_time() - begun
                await write_message(stream, HolePunch(type=HolePunch.SYNC))
            await trio.sleep(min(round_trip_s / 2, _MAX_WAIT_FOR_PEER_S))
            # The side that offers is the handshake's responder, as the specification has it.
            return await self._punch(peer, outlook, theirs, is_initiator=False)
        except (*STREAM_FAULTS, *MESSAGE_FAULTS, OSError) as error:
            _LOG.debug("no hole to %s: %s", peer, error)
            return False
        finally:
            self._offering.discard(peer)
            if stream is not None:
                await discard(stream)

    async def answer(self, stream: INetStream) -> None:
        """Takes part when `stream`'s peer wants to punch; only over a relayed connection."""
        peer = stream.muxed_conn.peer_id
        try:
            # When both offer at once, the offer of the greater id goes on.
            ours = self._running.host.get_id()
            if peer in self._offering and ours.to_bytes() > peer.to_bytes():
                return
            relay = relay_of(self._guests.connection(peer, ConnectionType.RELAYED))
            outlook = await self._look_out(relay) if relay is not None else None
            if outlook is None or peer in self._busy:
                return
            with trio.fail_after(_MESSAGE_TIMEOUT_S):
                theirs = _places_in(await read_message(stream))
                await write_message(stream, _connect_message(outlook))
                sync = HolePunch.FromString(await read_message(stream))
            if sync.type == HolePunch.SYNC:
                await self._punch(peer, outlook, theirs, is_initiator=True)
        except (*STREAM_FAULTS, *MESSAGE_FAULTS, OSError) as error:
            _LOG.debug("no hole for %s: %s", peer, error)
        finally:
            await discard(stream)

    async def _look_out(self, relay: ID) -> Outlook | None:
        """Where the connection to `relay` leaves from, and where it is seen there."""
        connection = self._guests.connection(relay, ConnectionType.DIRECT)
        shared = socket_of(connection) if connection is not None else None
        if shared is None:
            return None
        seen = await self._seen_by(relay)
        if seen is None:
            return None
        # The first of them may say so late.
        _share_port(shared)
        host, port = shared.getsockname()[:2]
        return Outlook(source=(str(host), int(port)), seen=seen)

    async def _seen_by(self, relay: ID) -> Place | None:
        """Where `relay` says that it sees us."""
        stream: INetStream | None = None
        try:
            with trio.fail_after(_MESSAGE_TIMEOUT_S):
                stream = await self._running.host.new_stream(relay, [IDENTIFY_PROTOCOL])
                told = Identify.FromString(await read_message(stream, _MAX_IDENTIFY_BYTES))
            return _place(told.observed_addr)
        except (*STREAM_FAULTS, *MESSAGE_FAULTS) as error:
            _LOG.debug("relay %s did not say where it sees us: %s", relay, error)
            return None
        finally:
            if stream is not None:
                await discard(stream)

    async def _punch(
        self, peer: ID, outlook: Outlook, theirs: Sequence[Place], *, is_initiator: bool
    ) -> bool:
        targets = worth_dialling(theirs, outlook)
        if not targets or peer in self._busy:
            return False
        self._busy.add(peer)
        made = trio.Event()
        settle = partial(self._settle, peer, is_initiator, made)
        try:
            with trio.move_on_after(_PUNCH_S):
                async with trio.open_nursery() as nursery:
                    for target in targets:
                        nursery.start_soon(_dial, outlook.source, target, settle)
                    nursery.start_soon(_listen, outlook.source, targets, settle)
                    await made.wait()
                    nursery.cancel_scope.cancel()
        finally:
            self._busy.discard(peer)
        self._running.meters.count("holes", outcome="punched" if made.is_set() else "failed")
        if made.is_set():
            self._guests.leave_relay(peer)
        return made.is_set()

    async def _settle(
        self, peer: ID, is_initiator: bool, made: trio.Event, stream: trio.SocketStream
    ) -> None:
        """The stream has become a connection to `peer`, or is closed.

        Not cancelled with the attempt: where both sides got through to each other, each might
        otherwise give up the connection that the other has settled on.
        """
        ended = trio.Event()

        async def admit() -> None:
            line = TrioTCPStream(stream)
            try:
                host, port = stream.socket.getpeername()[:2]
                way = Way(
                    address=_multiaddr((str(host), int(port))),
                    kind=ConnectionType.DIRECT,
                    is_initiator=is_initiator,
                )
                await self._guests.admit(line, peer, way)
                made.set()
            except (*STREAM_FAULTS, OSError) as error:
                _LOG.debug("no handshake with %s through a hole: %s", peer, error)
                await stream.aclose()
            finally:
                ended.set()

        self._nursery.start_soon(admit)
        await ended.wait()


def relay_of(connection: INetConn | None) -> ID | None:
    """The relay a relayed connection goes through."""
    if connection is None:
        return None
    for address in connection.get_transport_addresses():
        relay, circuit, _ = str(address).partition("/p2p-circuit")
        if circuit:
            return ID.from_string(relay.rpartition("/p2p/")[2])
    return None


def socket_of(connection: INetConn) -> trio.socket.SocketType | None:
    """The TCP socket under a connection; None when it is not one of its own."""
    layer: Any = connection.muxed_conn
    for name in ("secured_conn", "conn", "read_writer", "read_write_closer", "stream", "stream"):
        layer = getattr(layer, name, None)
    return layer.socket if isinstance(layer, trio.SocketStream) else None


def worth_dialling(theirs: Sequence[Place], outlook: Outlook) -> list[Place]:
    """The peer's places that an honest peer could mean.

    A public one; or, when the peer comes from the same public address as we do, or the relay
    itself is on a private network, a private one, which is then the shorter way.
    """
    our_public = outlook.seen[0]
    is_local = _is_private(our_public)
    is_neighbour = any(host == our_public for host, _ in theirs)
    private = [place for place in theirs if _is_private(place[0])]
    public = [place for place in theirs if not _is_private(place[0])]
    if is_local:
        return private
    return private if is_neighbour else public


def _is_private(host: str) -> bool:
    return not ipaddress.ip_address(host).is_global


def _connect_message(outlook: Outlook) -> HolePunch:
    addresses = [_multiaddr(place).to_bytes() for place in outlook.places()]
    return HolePunch(type=HolePunch.CONNECT, ObsAddrs=addresses)


def _places_in(body: bytes) -> list[Place]:
    """The usable places in a peer's CONNECT message, a few at most."""
    message = HolePunch.FromString(body)
    if message.type != HolePunch.CONNECT:
        raise ValueError("the peer did not say where it is seen")
    found = (_place(address) for address in list(message.ObsAddrs)[:_MAX_ADDRESSES])
    return [place for place in found if place is not None]


def _place(address: bytes) -> Place | None:
    """The IP address and port of a plain TCP multiaddr that may be dialled."""
    try:
        parsed = Multiaddr(address)
        names = [protocol.name for protocol in parsed.protocols()]
        if names not in (["ip4", "tcp"], ["ip6", "tcp"]):
            return None
        host = ipaddress.ip_address(str(parsed.value_for_protocol(names[0])))
        port = int(str(parsed.value_for_protocol("tcp")))
    except Exception:  # the library raises several unrelated classes here
        return None
    if port < _LOWEST_PORT or host.is_multicast or host.is_unspecified or host.is_link_local:
        return None
    return str(host), port


def _multiaddr(place: Place) -> Multiaddr:
    host, port = place
    return Multiaddr(f"/{'ip6' if ':' in host else 'ip4'}/{host}/tcp/{port}")


async def _dial(source: Place, target: Place, settle: Settle) -> None:
    """Dials until cancelled; the kernel knocks again by itself, but not after a refusal."""
    if (":" in source[0]) != (":" in target[0]):
        return
    while True:
        opened = _shared_socket(target[0])
        try:
            await opened.bind(source)
            await opened.connect(target)
        except OSError as error:
            _LOG.debug("no connection from %s to %s: %s", source, target, error)
            opened.close()
        except BaseException:
            opened.close()
            raise
        else:
            await settle(trio.SocketStream(opened))
        await trio.sleep(_RETRY_S)


async def _listen(source: Place, targets: Sequence[Place], settle: Settle) -> None:
    """Takes in whom no NAT keeps out; without one, two dials never meet in the middle."""
    hosts = {host for host, _ in targets}
    with _shared_socket(source[0]) as listening:
        try:
            await listening.bind(source)
            listening.listen(1)
        except OSError as error:
            _LOG.debug("cannot listen at %s: %s", source, error)
            return
        while True:
            accepted, remote = await listening.accept()
            if remote[0] in hosts:
                await settle(trio.SocketStream(accepted))
            else:
                accepted.close()


def _shared_socket(host: str) -> trio.socket.SocketType:
    opened = trio.socket.socket(
        socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM
    )
    _share_port(opened)
    return opened


def _share_port(opened: trio.socket.SocketType) -> None:
    """Other sockets of this user that say so too may have the same port."""
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "SO_REUSEPORT"):
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
