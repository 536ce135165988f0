"""A worker's side of the relay: it reserves a place, reaches others and is reached by them."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final, TypeVar

import trio
from libp2p.abc import INetConn, INetStream, INetwork, INotifee
from libp2p.connection_types import ConnectionType
from libp2p.peer.id import ID
from libp2p.rcmgr import Direction
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Status, StopMessage
from libp2p.relay.circuit_v2.pb.circuit_pb2 import PeerId as WirePeer
from multiaddr import Multiaddr

from shoal.network.framing import not_reachable
from shoal.network.libp2p_extension import Running
from shoal.network.libp2p_guests import Guests, Way
from shoal.network.libp2p_punch import DCUTR_PROTOCOL, Puncher, relay_of
from shoal.network.libp2p_relay import (
    HOP_PROTOCOL,
    MAX_PEER_ID_BYTES,
    MESSAGE_FAULTS,
    STOP_PROTOCOL,
    STREAM_FAULTS,
    read_message,
    write_message,
)
from shoal.network.libp2p_streams import discard
from shoal.network.liveness import PING_PROTOCOL
from shoal.network.port import Reach
from shoal.protocol.errors import Clock, Expired, ShoalError, Unavailable
from shoal.protocol.ids import PeerId

if TYPE_CHECKING:
    from trio_typing import TaskStatus

T = TypeVar("T")
_LOG: Final = logging.getLogger(__name__)
_MESSAGE_TIMEOUT_S: Final = 15.0
_REFUSED_PAUSE_S: Final = 60.0
_RENEW_SHARE: Final = 0.5
# The relay's clock may differ from ours, so its word on the end is held to these.
_RENEW_LEAST_S: Final = 60.0
_RENEW_MOST_S: Final = 1800.0
# A hole that can be punched is there after two or three of the kernel's attempts.
_PUNCH_WAIT_S: Final = 5.0
_MAX_REMEMBERED: Final = 1024


class RelayClient(INotifee):
    """An extension that reaches peers, and is reached by them, through relays it has dialled.

    Args:
        accepts: Whether others may reach this node too; without, it only reaches out.
        punches: Whether it tries for a direct connection; without, everything stays relayed.
        punch_again_s: A peer to whom no hole could be punched is asked for none this long.
        max_guests: Connections of this kind open at once.
    """

    def __init__(
        self,
        *,
        accepts: bool = True,
        punches: bool = True,
        punch_again_s: float = 600.0,
        max_guests: int = 32,
    ) -> None:
        self._accepts = accepts
        self._punches = punches
        self._punch_again_s = punch_again_s
        self._max_guests = max_guests
        self._parts_or_none: _Parts | None = None
        self._relays: set[ID] = set()
        self._locks: OrderedDict[ID, trio.Lock] = OrderedDict()
        self._punch_after_s: OrderedDict[ID, float] = OrderedDict()

    async def run(self, running: Running, *, task_status: TaskStatus[None]) -> None:
        """Relays are used and guests admitted, until cancelled."""
        # Trio's clock and locks are new with each start.
        self._relays.clear()
        self._locks.clear()
        self._punch_after_s.clear()
        async with trio.open_nursery() as nursery:
            guests = Guests(running, nursery, self._open_to_guests, self._max_guests)
            self._parts_or_none = parts = _Parts(running, nursery, guests)
            if self._accepts:
                running.host.set_stream_handler(STOP_PROTOCOL, self._called)
                running.swarm.register_notifee(self)
            if self._accepts and self._punches:
                running.host.set_stream_handler(DCUTR_PROTOCOL, parts.puncher.answer)
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._parts_or_none = None

    async def reach(self, peer: PeerId, *, via: PeerId | None, timeout_s: float) -> Reach:
        """A connection to `peer` is open; see `Network.reach` for what it raises."""
        target = ID.from_base58(peer)
        with trio.move_on_after(timeout_s) as clock:
            async with self._lock(target):
                guests = self._parts().guests
                if guests.connection(target, ConnectionType.DIRECT) is not None:
                    return Reach.DIRECT
                relayed = guests.connection(target, ConnectionType.RELAYED)
                if relayed is None:
                    relays = [ID.from_base58(via)] if via is not None else self._known_relays()
                    relayed = await self._dial_through(relays, target)
                return await self._shorten(target, relayed, clock.deadline)
        raise Expired(
            f"Peer {peer} was not reached through a relay within {timeout_s:g} s.",
            clock=Clock.CONNECT,
            peer_id=peer,
        )

    async def connected(self, network: INetwork, conn: INetConn) -> None:
        """A place is reserved at every peer that this node dialled and that relays."""
        parts = self._parts_or_none
        is_chosen = getattr(conn, "direction", None) is Direction.OUTBOUND
        if parts is not None and is_chosen and not parts.guests.is_guest(conn):
            parts.nursery.start_soon(self._stay_reserved, conn.muxed_conn.peer_id, conn)

    async def disconnected(self, network: INetwork, conn: INetConn) -> None:
        """A relay that is gone is no way to anybody."""
        peer = conn.muxed_conn.peer_id
        if not network.get_connections(peer):
            self._relays.discard(peer)

    async def opened_stream(self, network: INetwork, stream: INetStream) -> None:
        """Nothing is kept per stream."""

    async def closed_stream(self, network: INetwork, stream: INetStream) -> None:
        """Nothing is kept per stream."""

    async def listen(self, network: INetwork, multiaddr: Multiaddr) -> None:
        """Nothing is kept per listener."""

    async def listen_close(self, network: INetwork, multiaddr: Multiaddr) -> None:
        """Nothing is kept per listener."""

    async def _stay_reserved(self, relay: ID, connection: INetConn) -> None:
        """Others may be connected to us by `relay`, for as long as it is connected itself."""
        while not connection.is_closed:
            try:
                pause_s = await self._reserve(relay)
            except (*STREAM_FAULTS, *MESSAGE_FAULTS) as error:
                _LOG.debug("peer %s relays nothing: %s", relay, error)
                return
            await trio.sleep(pause_s)

    async def _reserve(self, relay: ID) -> float:
        """The seconds until it is worth asking again, after `relay` has answered."""
        stream = await self._open_hop(relay)
        try:
            self._relays.add(relay)
            with trio.fail_after(_MESSAGE_TIMEOUT_S):
                await write_message(stream, HopMessage(type=HopMessage.RESERVE))
                reply = HopMessage.FromString(await read_message(stream))
        finally:
            await discard(stream)
        if reply.status != Status.OK:
            return _REFUSED_PAUSE_S
        left_s = reply.reservation.expire - time.time()
        return min(_RENEW_MOST_S, max(_RENEW_LEAST_S, left_s * _RENEW_SHARE))

    async def _open_hop(self, relay: ID) -> INetStream:
        with trio.fail_after(_MESSAGE_TIMEOUT_S):
            return await self._parts().running.host.new_stream(relay, [HOP_PROTOCOL])

    def _known_relays(self) -> list[ID]:
        """The relays we know; before any has answered, the peers we dialled."""
        swarm, guests = self._parts().running.swarm, self._parts().guests
        dialled = [
            connection.muxed_conn.peer_id
            for connection in swarm.get_connections()
            if getattr(connection, "direction", None) is Direction.OUTBOUND
            and not guests.is_guest(connection)
        ]
        return [peer for peer in dialled if peer in self._relays] or dialled

    async def _dial_through(self, relays: Sequence[ID], target: ID) -> INetConn:
        """A relayed connection, by the first relay that has one."""
        said = "this node is connected to no relay"
        for relay in relays:
            if not self._parts().running.swarm.get_connections(relay):
                said = f"the relay {relay} is not connected"
                continue
            try:
                return await self._dial(relay, target)
            except _RelayRefusedError as error:
                said = f"the relay {relay} answered {error}"
            except (*STREAM_FAULTS, *MESSAGE_FAULTS) as error:
                _LOG.debug("no circuit to %s through %s: %s", target, relay, error)
                said = f"the relay {relay} found no way to it"
        raise not_reachable(PeerId(target.to_base58()), said)

    async def _dial(self, relay: ID, target: ID) -> INetConn:
        stream = await self._open_hop(relay)
        try:
            with trio.fail_after(_MESSAGE_TIMEOUT_S):
                wanted = WirePeer(id=target.to_bytes())
                await write_message(stream, HopMessage(type=HopMessage.CONNECT, peer=wanted))
                reply = HopMessage.FromString(await read_message(stream))
            if reply.status != Status.OK:
                raise _RelayRefusedError(f"with {_name_of(reply.status)}")
        except BaseException:
            await discard(stream)
            raise
        way = Way(address=_circuit(relay, target), kind=ConnectionType.RELAYED, is_initiator=True)
        connection = await self._parts().guests.admit(stream, target, way)
        # We know that the handshake is over before the other side has looked at who we are.
        try:
            await self._parts().running.streams.request(
                PeerId(target.to_base58()), PING_PROTOCOL, b"", timeout_s=_MESSAGE_TIMEOUT_S
            )
        except ShoalError as error:
            with suppress(*STREAM_FAULTS):
                await connection.close()
            raise _RelayRefusedError("but the peer hung up") from error
        return connection

    async def _shorten(self, target: ID, relayed: INetConn, deadline_s: float) -> Reach:
        """Direct if a hole is punched soon; the attempt goes on when nobody waits for it."""
        parts = self._parts()
        relay = relay_of(relayed)
        now = trio.current_time()
        if not self._punches or relay is None or now < self._punch_after_s.get(target, 0.0):
            return Reach.RELAYED
        self._punch_after_s[target] = now + self._punch_again_s
        _bound(self._punch_after_s)
        done = trio.Event()

        async def punch() -> None:
            await parts.puncher.reach(target, relay)
            done.set()

        parts.nursery.start_soon(punch)
        # Relayed in time is worth more than direct too late.
        with trio.move_on_after(min(_PUNCH_WAIT_S, max(0.0, (deadline_s - now) / 2))):
            await done.wait()
        is_direct = parts.guests.connection(target, ConnectionType.DIRECT) is not None
        return Reach.DIRECT if is_direct else Reach.RELAYED

    async def _called(self, stream: INetStream) -> None:
        """A relay passes on a peer that wants to speak with us."""
        relay = stream.muxed_conn.peer_id
        try:
            with trio.fail_after(_MESSAGE_TIMEOUT_S):
                call = StopMessage.FromString(await read_message(stream))
                status = self._verdict_on(call, relay)
                await write_message(stream, StopMessage(type=StopMessage.STATUS, status=status))
            if status != Status.OK:
                await stream.close()
                return
            caller = ID(call.peer.id)
            way = Way(
                address=_circuit(relay, caller), kind=ConnectionType.RELAYED, is_initiator=False
            )
            await self._parts().guests.admit(stream, caller, way)
        except (*STREAM_FAULTS, *MESSAGE_FAULTS) as error:
            _LOG.debug("a call through %s failed: %s", relay, error)
            await discard(stream)

    def _verdict_on(self, call: StopMessage, relay: ID) -> Status.ValueType:
        if call.type != StopMessage.CONNECT or not 0 < len(call.peer.id) <= MAX_PEER_ID_BYTES:
            return Status.UNEXPECTED_MESSAGE
        # Only a relay that was asked to may bring strangers.
        if relay not in self._relays:
            return Status.PERMISSION_DENIED
        return Status.OK if self._parts().guests.has_room else Status.RESOURCE_LIMIT_EXCEEDED

    def _open_to_guests(self) -> frozenset[str]:
        services = self._parts().running.services()
        offered = {service.protocol for service in services if service.for_guests}
        return frozenset(offered | {str(PING_PROTOCOL), str(DCUTR_PROTOCOL)})

    def _lock(self, peer: ID) -> trio.Lock:
        lock = self._locks.setdefault(peer, trio.Lock())
        self._locks.move_to_end(peer)
        _bound(self._locks)
        return lock

    def _parts(self) -> _Parts:
        if self._parts_or_none is None:
            raise Unavailable(
                "This node's network is not running; start it first.", code="network_stopped"
            )
        return self._parts_or_none


class _Parts:
    """What exists between one start of the node and its stop."""

    def __init__(self, running: Running, nursery: trio.Nursery, guests: Guests) -> None:
        self.running = running
        self.nursery = nursery
        self.guests = guests
        self.puncher = Puncher(running, guests, nursery)


class _RelayRefusedError(Exception):
    """The relay or the peer said no; the message says which and why."""


def _circuit(relay: ID, peer: ID) -> Multiaddr:
    return Multiaddr(f"/p2p/{relay.to_base58()}/p2p-circuit/p2p/{peer.to_base58()}")


def _name_of(status: int) -> str:
    known = status in Status.values()
    return f"{Status.Name(Status.ValueType(status)).lower()}" if known else f"status {status}"


def _bound(kept: OrderedDict[ID, T]) -> None:
    while len(kept) > _MAX_REMEMBERED:
        kept.popitem(last=False)
