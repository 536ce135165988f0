"""Connections that came about through a relay, and the few protocols they may use.

Nobody chose these peers: a relay passed them on, or we were told of them as holders of a blob.
On such a connection this node answers what was offered to guests, and nothing else it serves.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakKeyDictionary

import trio
from libp2p.abc import IMultiselectCommunicator, IMuxedConn, INetConn
from libp2p.connection_types import ConnectionType
from libp2p.custom_types import StreamHandlerFn, TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.io.abc import ReadWriteCloser
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.exceptions import SwarmException
from libp2p.peer.id import ID
from libp2p.protocol_muxer.multiselect import DEFAULT_NEGOTIATE_TIMEOUT, Multiselect
from multiaddr import Multiaddr

from shoal.network.libp2p_extension import Running

_LOG: Final = logging.getLogger(__name__)
_HANDSHAKE_TIMEOUT_S: Final = 10.0
_CLOSE_TIMEOUT_S: Final = 1.0
_IDLE_S: Final = 30.0
# What is being answered over a relayed connection may end before the connection does.
_RELAYED_GRACE_S: Final = 5.0
# Pings of both sides stay well below; one chunk of a blob is far above.
_IDLE_BYTES: Final = 16 << 10

GuestProtocols = Callable[[], frozenset[str]]


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a guest's bytes come.

    Attributes:
        address: The multiaddr that leads there.
        kind: Relayed, or direct after a hole was punched.
        is_initiator: Whether this side speaks first in the handshake.
    """

    address: Multiaddr
    kind: ConnectionType
    is_initiator: bool


class Guests:
    """Admits guests' connections and holds each to the protocols open to guests.

    Args:
        running: The node; its protocol negotiation is replaced for guests' streams.
        nursery: Where the watch over each guest runs.
        protocols: What guests may ask for now.
        max_guests: Guests' connections open at once.
    """

    def __init__(
        self, running: Running, nursery: trio.Nursery, protocols: GuestProtocols, max_guests: int
    ) -> None:
        self._running = running
        self._nursery = nursery
        self._protocols = protocols
        self._max_guests = max_guests
        self._num_pending = 0
        self._lines: WeakKeyDictionary[IMuxedConn, _Line] = WeakKeyDictionary()
        host = running.host
        if not isinstance(host, BasicHost):
            raise TypeError(f"expected a BasicHost, found {type(host).__name__}")
        self._multiselect: Multiselect = host.multiselect
        self._negotiate = host.multiselect.negotiate
        setattr(host.multiselect, "negotiate", self._negotiate_for)  # noqa: B010

    @property
    def has_room(self) -> bool:
        """Whether one more guest would be admitted."""
        return len(self._open()) + self._num_pending < self._max_guests

    def connection(self, peer: ID, kind: ConnectionType) -> INetConn | None:
        """An open connection of that kind to `peer`, whoever chose it."""
        for connection in self._running.swarm.get_connections(peer):
            if connection.is_closed:
                continue
            line = self._lines.get(connection.muxed_conn)
            # The library knows no kind for connections that it secured itself.
            found = line.way.kind if line is not None else ConnectionType.DIRECT
            if found is kind:
                return connection
        return None

    def is_guest(self, connection: INetConn) -> bool:
        """Whether the connection was admitted here."""
        return connection.muxed_conn in self._lines

    def leave_relay(self, peer: ID) -> None:
        """Nothing goes to `peer` through a relay any more, now that it can go directly."""
        relayed = self.connection(peer, ConnectionType.RELAYED)
        if relayed is not None:
            self._running.streams.forget(peer, relayed.muxed_conn)
            self._nursery.start_soon(self._close_later, relayed)

    async def admit(self, stream: ReadWriteCloser, peer: ID, way: Way) -> INetConn:
        """A connection to `peer`, proved to be its, over `stream`.

        Raises:
            SwarmException: The other end is somebody else, is refused, or there is no room.
            trio.TooSlowError: The handshake did not end in time.
        """
        line = _Line(stream, way)
        try:
            with self._place(), trio.fail_after(_HANDSHAKE_TIMEOUT_S):
                return await self._admit(line, peer, way)
        except BaseException:
            grace = trio.CancelScope(deadline=trio.current_time() + _CLOSE_TIMEOUT_S, shield=True)
            with grace, suppress(Exception):
                await line.close()
            raise

    @contextmanager
    def _place(self) -> Iterator[None]:
        """A guest that is shaking hands has its place already."""
        if not self.has_room:
            self._running.meters.count("connections_refused", cause="guests")
            raise SwarmException("as many guests are connected as this node takes")
        self._num_pending += 1
        try:
            yield
        finally:
            self._num_pending -= 1

    async def _admit(self, line: _Line, peer: ID, way: Way) -> INetConn:
        swarm = self._running.swarm
        secured = await swarm.upgrader.upgrade_security(line, way.is_initiator, peer)
        if secured.get_remote_peer() != peer:
            raise SwarmException(f"the other end is not {peer}")
        muxed: Any = await swarm.upgrader.upgrade_connection(secured, peer)
        # The library asks the secured connection, which does not know.
        muxed.get_transport_addresses = lambda: [way.address]
        muxed.get_connection_type = lambda: way.kind
        # Before the swarm sees it, because streams may be opened on it from then on.
        self._lines[muxed] = line
        connection = await swarm.add_conn(
            muxed, direction="outbound" if way.is_initiator else "inbound"
        )
        self._running.meters.count("guests_admitted", kind=way.kind.value)
        self._nursery.start_soon(self._retire_idle, connection, line)
        return connection

    async def _close_later(self, connection: INetConn) -> None:
        await trio.sleep(_RELAYED_GRACE_S)
        with suppress(Exception):
            await connection.close()

    async def _retire_idle(self, connection: INetConn, line: _Line) -> None:
        """A guest that carries nothing but pings gives its place, and the relay's, back."""
        before = -_IDLE_BYTES
        while not connection.is_closed:
            if line.num_bytes - before < _IDLE_BYTES:
                with suppress(Exception):
                    await connection.close()
                return
            before = line.num_bytes
            await trio.sleep(_IDLE_S)

    async def _negotiate_for(
        self,
        communicator: IMultiselectCommunicator,
        negotiate_timeout: int = DEFAULT_NEGOTIATE_TIMEOUT,
    ) -> tuple[TProtocol | None, StreamHandlerFn | None]:
        """Stands in for the host's negotiation of an incoming stream."""
        stream = getattr(communicator, "read_writer", None)
        muxed = getattr(stream, "muxed_conn", None)
        if muxed is None or muxed not in self._lines:
            return await self._negotiate(communicator, negotiate_timeout)
        allowed = self._protocols()
        offered: dict[TProtocol | None, StreamHandlerFn | None] = {
            name: handler
            for name, handler in self._multiselect.handlers.items()
            if name is not None and str(name) in allowed
        }
        # Its own kind, which bounds how long a stranger may go on naming protocols.
        return await type(self._multiselect)(offered).negotiate(communicator, negotiate_timeout)

    def _open(self) -> list[IMuxedConn]:
        return [muxed for muxed in self._lines if not muxed.is_closed]


class _Line(RawConnection):
    """The bytes under a guest's connection, counted."""

    def __init__(self, stream: ReadWriteCloser, way: Way) -> None:
        super().__init__(
            stream, way.is_initiator, connection_type=way.kind, addresses=[way.address]
        )
        self.way = way
        self.num_bytes = 0

    async def read(self, n: int | None = None) -> bytes:
        data = await super().read(n)
        self.num_bytes += len(data)
        return data

    async def write(self, data: bytes) -> None:
        await super().write(data)
        self.num_bytes += len(data)

    def get_remote_address(self) -> tuple[str, int] | None:
        """None for a relayed guest: the socket is the relay's, which is not to blame."""
        if self.way.kind is ConnectionType.RELAYED:
            return None
        return super().get_remote_address()
