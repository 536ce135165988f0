"""Which peers are alive: our own pings, since TCP tells of a dead link after minutes."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from typing import Final, cast

import trio
from libp2p.abc import INetConn, INetStream, INetwork, INotifee
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStoreError
from libp2p.rcmgr import Direction
from multiaddr import Multiaddr

from shoal.network.bans import Fault
from shoal.network.libp2p_admission import Admission
from shoal.network.libp2p_streams import RequestStreams
from shoal.network.meters import Meters
from shoal.network.port import Limits
from shoal.protocol.errors import ShoalError
from shoal.protocol.ids import PeerId

PING_PROTOCOL: Final = TProtocol("/shoal/ping/1")

_LOG: Final = logging.getLogger(__name__)
_MISSES_ALLOWED: Final = 1
_ACCEPTOR_SHARE: Final = 1.25
_CLOSE_TIMEOUT_S: Final = 0.8
_BUFFER_CHECK_S: Final = 0.25
_CLOSED_REMOTELY: Final = "the connection was closed by the peer or broke"

# Sixteen full-size messages; what a peer sends beyond its flow-control window is not
# refused by the muxer, so a flood would be buffered without end.
_MAX_BUFFERED_MESSAGES: Final = 16

Lost = Callable[[ID, str], None]
Penalise = Callable[[PeerId, Fault], None]


class Loss(StrEnum):
    """Why a peer is gone, in the one word a counter takes."""

    CLOSED = "closed"
    PINGS = "pings"
    FLOOD = "flood"
    BANNED = "banned"


class ConnectionWatch(INotifee):
    """Pings every quiet peer, closes the dead, and reports each lost peer once.

    Args:
        swarm: The node's connections.
        streams: The way a ping is asked, and whose kept streams die with a connection.
        admission: What knows when a connection last carried anything.
        limits: Ping pace and message size.
        meters: Where connections, pings and losses are counted.
        lost: Called with the peer and the cause.
    """

    def __init__(
        self,
        swarm: Swarm,
        streams: RequestStreams,
        admission: Admission,
        limits: Limits,
        meters: Meters,
        lost: Lost,
    ) -> None:
        self._swarm = swarm
        self._streams = streams
        self._admission = admission
        self._limits = limits
        self._meters = meters
        self._lost = lost
        self._scopes: dict[ID, trio.CancelScope] = {}
        self._causes: dict[ID, tuple[str, Loss] | None] = {}
        self._nursery: trio.Nursery | None = None

    def start(self, nursery: trio.Nursery, penalise: Penalise) -> None:
        """Peers that connect from now on are watched, until `nursery` is cancelled."""
        self._nursery = nursery
        nursery.start_soon(self._watch_buffers, penalise)

    async def close(self, peer: ID, *, cause: str | None, loss: Loss = Loss.CLOSED) -> None:
        """No connection to `peer` is open; with a cause, the peer is reported as lost."""
        if not self._swarm.get_connections(peer):
            return
        # The first cause stands: a flood leads to a ban, but the flood is what happened.
        self._causes.setdefault(peer, None if cause is None else (cause, loss))
        connections = self._swarm.get_connections(peer)
        with _shielded() as grace:
            await self._swarm.close_peer(peer)
        if grace.cancelled_caught:
            # Saying goodbye blocks when the link is dead and its send buffer is full, and of a
            # close that was cut short the library tells nobody.
            for connection in connections:
                self._swarm.remove_conn(cast(SwarmConn, connection))
                await self.disconnected(self._swarm, connection)

    async def close_all(self) -> None:
        """Every peer has been told goodbye, and none is reported as lost.

        The library's own stop leaves accepted sockets open, so peers would not notice it.
        """
        peers = list(self._swarm.connections)
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:
                for peer in peers:
                    nursery.start_soon(partial(self.close, peer, cause=None))

    async def connected(self, network: INetwork, conn: INetConn) -> None:
        """A peer's first connection starts its pings; a second inbound one replaces the first."""
        peer = conn.muxed_conn.peer_id
        if self._nursery is None:
            return
        direction = getattr(conn, "direction", Direction.UNKNOWN)
        self._meters.count("connections_opened", direction=str(direction.value))
        self._meters.gauge("connections_open", len(self._swarm.get_connections()))
        if peer not in self._scopes:
            self._scopes[peer] = scope = trio.CancelScope()
            self._causes.pop(peer, None)
            self._nursery.start_soon(self._ping, peer, scope, direction is Direction.OUTBOUND)
        if direction is Direction.INBOUND:
            # A peer dials anew only when it gave the old connection up.
            for other in self._swarm.get_connections(peer):
                if other is not conn and getattr(other, "direction", None) is Direction.INBOUND:
                    self._meters.count("connections_replaced")
                    self._nursery.start_soon(other.close)

    async def disconnected(self, network: INetwork, conn: INetConn) -> None:
        """The peer is reported once its last connection is gone."""
        peer = conn.muxed_conn.peer_id
        self._streams.forget(peer, conn.muxed_conn)
        self._meters.gauge("connections_open", len(self._swarm.get_connections()))
        await _close_socket(conn)
        if self._swarm.get_connections(peer):
            return
        self._streams.forget(peer)
        scope = self._scopes.pop(peer, None)
        if scope is None:
            return
        scope.cancel()
        # Strangers come under ever new names; what is kept of them must not add up.
        with contextlib.suppress(PeerStoreError):
            self._swarm.peerstore.clear_peerdata(peer)
        lost = self._causes.pop(peer, (_CLOSED_REMOTELY, Loss.CLOSED))
        if lost is not None:
            cause, loss = lost
            self._meters.count("peers_lost", cause=loss.value)
            self._lost(peer, cause)

    async def opened_stream(self, network: INetwork, stream: INetStream) -> None:
        """Nothing is kept per stream."""

    async def closed_stream(self, network: INetwork, stream: INetStream) -> None:
        """Nothing is kept per stream."""

    async def listen(self, network: INetwork, multiaddr: Multiaddr) -> None:
        """Nothing is kept per listener."""

    async def listen_close(self, network: INetwork, multiaddr: Multiaddr) -> None:
        """Nothing is kept per listener."""

    async def _ping(self, peer: ID, scope: trio.CancelScope, dialled: bool) -> None:
        # The side that dialled is the first to ask; hearing it, the other need not.
        interval_s = self._limits.ping_interval_s * (1.0 if dialled else _ACCEPTOR_SHARE)
        with scope:
            misses, wait_s = 0, interval_s
            while misses <= _MISSES_ALLOWED:
                await trio.sleep(wait_s)
                quiet_s = self._quiet_s(peer)
                wait_s = interval_s if quiet_s >= interval_s else interval_s - quiet_s
                # What a peer sends proves that it lives; only a quiet one is asked.
                if wait_s < interval_s or await self._answers(peer):
                    misses = 0
                else:
                    misses += 1
                    self._meters.count("pings_missed")
            cause = f"no answer to {misses} pings in a row"
            await self.close(peer, cause=cause, loss=Loss.PINGS)

    def _quiet_s(self, peer: ID) -> float:
        """For how long nothing has come from `peer`; without end where that is not measured."""
        heard = [self._admission.heard_s(conn) for conn in self._swarm.get_connections(peer)]
        last_s = max((at_s for at_s in heard if at_s is not None), default=-math.inf)
        return trio.current_time() - last_s

    async def _answers(self, peer: ID) -> bool:
        nonce = os.urandom(8)
        try:
            echo = await self._streams.request(
                PeerId(peer.to_base58()),
                PING_PROTOCOL,
                nonce,
                timeout_s=self._limits.ping_timeout_s,
            )
        except ShoalError as error:
            _LOG.debug("ping of %s failed: %s", peer, error)
            return False
        return echo == nonce

    async def _watch_buffers(self, penalise: Penalise) -> None:
        most = _MAX_BUFFERED_MESSAGES * self._limits.max_message_bytes
        while True:
            await trio.sleep(_BUFFER_CHECK_S)
            self._admission.count_bytes()
            for peer, connections in list(self._swarm.connections.items()):
                buffered = sum(_buffered_bytes(connection) for connection in connections)
                if buffered > most and self._nursery is not None:
                    cause = f"it sent {buffered} bytes beyond its flow-control window"
                    self._causes.setdefault(peer, (cause, Loss.FLOOD))
                    self._nursery.start_soon(
                        partial(self.close, peer, cause=cause, loss=Loss.FLOOD)
                    )
                    penalise(PeerId(peer.to_base58()), Fault.FLOOD)


def _shielded() -> trio.CancelScope:
    return trio.CancelScope(deadline=trio.current_time() + _CLOSE_TIMEOUT_S, shield=True)


async def _close_socket(connection: INetConn) -> None:
    """The socket is closed, which the library forgets when the other side closed first."""
    secured = getattr(connection.muxed_conn, "secured_conn", None)
    if secured is not None:
        with _shielded(), contextlib.suppress(BaseLibp2pError, trio.BrokenResourceError):
            await secured.close()


def _buffered_bytes(connection: INetConn) -> int:
    buffers: dict[int, bytearray] = getattr(connection.muxed_conn, "stream_buffers", {})
    return sum(map(len, buffers.values()))
