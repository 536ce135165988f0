"""The orchestrator as a relay: circuits between two peers that both dialled it.

The wire is libp2p's circuit relay v2 (HOP and STOP), from py-libp2p's message classes.  Its own
relay is not used: one circuit's end tears down other circuits of the same peer, anyone may
reserve in another's name, and nothing caps the rate.

Source:
    https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio
from google.protobuf.message import DecodeError, Message
from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError, ParseError
from libp2p.io.exceptions import MessageTooLarge
from libp2p.network.stream.exceptions import StreamError
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import (
    HopMessage,
    Limit,
    Reservation,
    Status,
    StopMessage,
)
from libp2p.relay.circuit_v2.pb.circuit_pb2 import PeerId as WirePeer
from libp2p.relay.circuit_v2.protocol import PROTOCOL_ID as _HOP
from libp2p.relay.circuit_v2.protocol import STOP_PROTOCOL_ID as _STOP
from libp2p.utils.varint import encode_varint_prefixed, read_varint_prefixed_bytes_limited

from shoal.network.bans import Fault
from shoal.network.libp2p_extension import Running
from shoal.network.libp2p_streams import discard
from shoal.protocol.ids import PeerId

if TYPE_CHECKING:
    from trio_typing import TaskStatus

HOP_PROTOCOL: Final = TProtocol(_HOP)
STOP_PROTOCOL: Final = TProtocol(_STOP)

_LOG: Final = logging.getLogger(__name__)
# A peer id and a few numbers; the specification names no bound of its own.
MAX_RELAY_MESSAGE_BYTES: Final = 4096
MAX_PEER_ID_BYTES: Final = 64
_MESSAGE_TIMEOUT_S: Final = 10.0
_PART_BYTES: Final = 64 << 10

STREAM_FAULTS: Final = (
    StreamError,
    BaseLibp2pError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    trio.TooSlowError,
)
"""What a stream or its negotiation may end with when the other side is gone or silent."""
MESSAGE_FAULTS: Final = (DecodeError, ValueError, MessageTooLarge, ParseError)
"""What reading a relay message may end with when it is not one."""


@dataclass(frozen=True, kw_only=True)
class RelayLimits:
    """What a relay gives away, so that its own work never waits for it.

    Attributes:
        max_reservations: Peers that others may be connected to through it.
        reservation_ttl_s: A reservation that is not renewed lapses after this long.
        max_circuits: Circuits open at once.
        max_circuits_per_peer: Circuits open at once from one peer, and to one peer.
        circuit_s: Longest life of a circuit.
        circuit_bytes: Most bytes a circuit carries, both directions together.
        bytes_per_s: Most bytes all circuits carry in a second.
    """

    max_reservations: int = 1024
    reservation_ttl_s: float = 3600.0
    max_circuits: int = 64
    max_circuits_per_peer: int = 4
    circuit_s: float = 600.0
    circuit_bytes: int = 1 << 30
    bytes_per_s: int = 4 << 20


class RelayServer:
    """An extension that carries circuits between its peers, within limits.

    Args:
        limits: What it gives away.
    """

    def __init__(self, limits: RelayLimits | None = None) -> None:
        self._limits = limits or RelayLimits()
        self._running: Running | None = None
        self._reserved: dict[ID, float] = {}
        self._asking: Counter[ID] = Counter()
        self._asked: Counter[ID] = Counter()
        self._free_at_s = 0.0

    async def run(self, running: Running, *, task_status: TaskStatus[None]) -> None:
        """Peers may reserve and connect, until cancelled."""
        self._running = running
        self._reserved.clear()
        running.host.set_stream_handler(HOP_PROTOCOL, self._answer)
        task_status.started()
        await trio.sleep_forever()

    async def _answer(self, stream: INetStream) -> None:
        peer = stream.muxed_conn.peer_id
        try:
            with trio.fail_after(_MESSAGE_TIMEOUT_S):
                message = HopMessage.FromString(await read_message(stream))
            if message.type == HopMessage.RESERVE:
                await write_message(stream, self._reserve(peer))
                await stream.close()
            elif message.type == HopMessage.CONNECT:
                await self._connect(stream, peer, message.peer.id)
            else:
                await self._refuse(stream, Status.UNEXPECTED_MESSAGE)
        except MESSAGE_FAULTS as error:
            _LOG.debug("a relay message from %s is not one: %s", peer, error)
            self._parts().penalise(PeerId(peer.to_base58()), Fault.BAD_FRAME)
            await discard(stream)
        except STREAM_FAULTS as error:
            _LOG.debug("a relay stream from %s ended: %s", peer, error)
            await discard(stream)

    def _reserve(self, peer: ID) -> HopMessage:
        """A place for the asker itself: a name in the message is not looked at."""
        now = trio.current_time()
        self._reserved = {held: until for held, until in self._reserved.items() if until > now}
        if peer not in self._reserved and len(self._reserved) >= self._limits.max_reservations:
            self._count("refused", "reservations")
            return HopMessage(type=HopMessage.STATUS, status=Status.RESERVATION_REFUSED)
        self._reserved[peer] = now + self._limits.reservation_ttl_s
        self._parts().meters.gauge("relay_reservations", len(self._reserved))
        return HopMessage(
            type=HopMessage.STATUS,
            status=Status.OK,
            reservation=Reservation(expire=int(time.time() + self._limits.reservation_ttl_s)),
            limit=self._limit(),
        )

    async def _connect(self, stream: INetStream, asker: ID, named: bytes) -> None:
        if not 0 < len(named) <= MAX_PEER_ID_BYTES:
            raise ValueError("the peer id has a wrong length")
        asked = ID(named)
        refusal = self._refusal(asker, asked)
        if refusal is not None:
            await self._refuse(stream, refusal)
            return
        with self._circuit(asker, asked):
            target = await self._call(asker, asked)
            if target is None:
                await self._refuse(stream, Status.CONNECTION_FAILED)
                return
            try:
                reply = HopMessage(type=HopMessage.STATUS, status=Status.OK, limit=self._limit())
                await write_message(stream, reply)
                await self._carry(stream, target)
            finally:
                await discard(stream)
                await discard(target)

    def _refusal(self, asker: ID, asked: ID) -> Status.ValueType | None:
        until = self._reserved.get(asked, 0.0)
        if until <= trio.current_time() or not self._parts().swarm.get_connections(asked):
            return Status.NO_RESERVATION
        most = self._limits.max_circuits_per_peer
        if asker == asked:
            return Status.PERMISSION_DENIED
        if self._asking.total() >= self._limits.max_circuits:
            return Status.RESOURCE_LIMIT_EXCEEDED
        if self._asking[asker] >= most or self._asked[asked] >= most:
            return Status.RESOURCE_LIMIT_EXCEEDED
        return None

    @contextmanager
    def _circuit(self, asker: ID, asked: ID) -> Iterator[None]:
        self._asking[asker] += 1
        self._asked[asked] += 1
        self._parts().meters.gauge("relay_circuits_open", self._asking.total())
        try:
            yield
        finally:
            for counter, peer in ((self._asking, asker), (self._asked, asked)):
                counter[peer] -= 1
                if not counter[peer]:
                    del counter[peer]
            self._parts().meters.gauge("relay_circuits_open", self._asking.total())

    async def _call(self, asker: ID, asked: ID) -> INetStream | None:
        """A stream to the asked peer, once it has agreed to hear the asker."""
        target: INetStream | None = None
        try:
            with trio.fail_after(_MESSAGE_TIMEOUT_S):
                target = await self._parts().host.new_stream(asked, [STOP_PROTOCOL])
                call = StopMessage(
                    type=StopMessage.CONNECT,
                    peer=WirePeer(id=asker.to_bytes()),
                    limit=self._limit(),
                )
                await write_message(target, call)
                reply = StopMessage.FromString(await read_message(target))
        except (*STREAM_FAULTS, *MESSAGE_FAULTS) as error:
            _LOG.debug("peer %s did not answer a relay call: %s", asked, error)
        else:
            if reply.status == Status.OK:
                return target
        if target is not None:
            await discard(target)
        return None

    async def _carry(self, first: INetStream, second: INetStream) -> None:
        """Bytes pass both ways until one side ends or the circuit has used its share."""
        self._count("carried", "ok")
        left = [self._limits.circuit_bytes]
        with trio.move_on_after(self._limits.circuit_s):
            async with trio.open_nursery() as nursery:

                async def pump(source: INetStream, target: INetStream) -> None:
                    try:
                        await self._pump(source, target, left)
                    except STREAM_FAULTS as error:
                        _LOG.debug("a circuit ended: %s", error)
                    nursery.cancel_scope.cancel()

                nursery.start_soon(pump, first, second)
                nursery.start_soon(pump, second, first)

    async def _pump(self, source: INetStream, target: INetStream, left: list[int]) -> None:
        while part := await source.read(_PART_BYTES):
            left[0] -= len(part)
            if left[0] < 0:
                return
            await self._wait_turn(len(part))
            await target.write(part)
            self._parts().meters.count("relay_bytes", len(part))

    async def _wait_turn(self, num_bytes: int) -> None:
        """Sleeps so that all circuits together keep the rate; they take turns in order."""
        now = trio.current_time()
        begins = max(now, self._free_at_s)
        self._free_at_s = begins + num_bytes / self._limits.bytes_per_s
        await trio.sleep(begins - now)

    async def _refuse(self, stream: INetStream, status: Status.ValueType) -> None:
        self._count("refused", Status.Name(status).lower())
        await write_message(stream, HopMessage(type=HopMessage.STATUS, status=status))
        await stream.close()

    def _limit(self) -> Limit:
        return Limit(duration=int(self._limits.circuit_s), data=self._limits.circuit_bytes)

    def _count(self, outcome: str, cause: str) -> None:
        self._parts().meters.count("relay_requests", outcome=outcome, cause=cause)

    def _parts(self) -> Running:
        if self._running is None:
            raise RuntimeError("the relay is asked before it runs")
        return self._running


async def read_message(stream: INetStream, most_bytes: int = MAX_RELAY_MESSAGE_BYTES) -> bytes:
    """One length-prefixed message, its length checked before it is read."""
    return await read_varint_prefixed_bytes_limited(stream, most_bytes)


async def write_message(stream: INetStream, message: Message) -> None:
    """The message is on the stream, with its length in front."""
    await stream.write(encode_varint_prefixed(message.SerializeToString()))
