"""Who gets a connection to the libp2p host, and how much each connection may carry.

An address is judged as its connection is accepted, before a byte is read; a peer id as soon as
the handshake has proved it, before any of its streams is served.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Any, Final
from weakref import WeakKeyDictionary

import trio
from google.protobuf.message import DecodeError
from libp2p.abc import IMuxedConn, INetConn, INetStream
from libp2p.exceptions import BaseLibp2pError
from libp2p.io.abc import ReadWriteCloser
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.exceptions import SwarmException
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.rcmgr import Direction
from multiaddr import Multiaddr

from shoal.network.bans import Bans, Fault
from shoal.network.libp2p_turns import Turns
from shoal.network.libp2p_websocket import accepted, is_websocket
from shoal.network.meters import Meters
from shoal.network.pacing import Bucket, Pacer
from shoal.network.port import Limits
from shoal.protocol.ids import PeerId

_LOG: Final = logging.getLogger(__name__)
_CLOSE_TIMEOUT_S: Final = 1.0
# A peer that reconnects replaces its old connection; two nodes with one key would do so to each
# other for ever.
_REPLACEMENTS_PER_S: Final = 0.2
_REPLACEMENTS_AT_ONCE: Final = 6.0
# What an honest caller bears before it hangs up.
_PATIENCE_S: Final = 1.0


class RefusedError(SwarmException):
    """A connection was refused after its handshake; the cause was counted."""


class Traffic:
    """What one connection has carried, and when its peer was last heard.

    Args:
        bucket: What it may bring in; None for a connection we dialled ourselves.
    """

    __slots__ = ("bucket", "bytes_in", "bytes_out", "heard_s")

    def __init__(self, bucket: Bucket | None) -> None:
        self.bucket = bucket
        self.bytes_in = 0
        self.bytes_out = 0
        self.heard_s = trio.current_time()


class Admission:
    """Accepts, refuses and measures the connections of one swarm.

    Args:
        swarm: The swarm; its way to accept and to add connections is replaced.
        limits: How many connections, and how much each may bring.
        bans: Whom to refuse.
        meters: Where refusals and bytes are counted.
    """

    def __init__(self, swarm: Swarm, limits: Limits, bans: Bans, meters: Meters) -> None:
        self._swarm = swarm
        self._limits = limits
        self._bans = bans
        self._meters = meters
        self._num_open: Counter[str] = Counter()
        self._num_handshakes: Counter[str] = Counter()
        self._begun = Pacer(
            limits.handshakes_per_s_per_address,
            limits.max_handshakes,
            trio.current_time,
        )
        self._turns = Turns()
        self._replacements = Pacer(_REPLACEMENTS_PER_S, _REPLACEMENTS_AT_ONCE, trio.current_time)
        self._traffic: WeakKeyDictionary[IMuxedConn, Traffic] = WeakKeyDictionary()
        self._add = swarm.add_conn
        # The library's handler holds each slot until the swarm ends, counts nothing per address
        # and hands a new connection to its streams' handlers whoever it is from.
        setattr(swarm, "_handle_inbound_connection", self._accept)  # noqa: B010
        setattr(swarm, "add_conn", self._admit)  # noqa: B010

    def heard_s(self, connection: INetConn) -> float | None:
        """When a byte last came over `connection`, on trio's clock; None when not measured."""
        traffic = self._traffic.get(connection.muxed_conn)
        return traffic.heard_s if traffic is not None else None

    def addresses_of(self, peer: ID) -> tuple[str, ...]:
        """The IP addresses `peer` is connected from."""
        found = (_address_of(conn.muxed_conn) for conn in self._swarm.get_connections(peer))
        return tuple(address for address in found if address)

    def count_bytes(self) -> None:
        """The bytes carried since the last call stand in the meters."""
        bytes_in = bytes_out = 0
        for traffic in self._traffic.values():
            bytes_in, traffic.bytes_in = bytes_in + traffic.bytes_in, 0
            bytes_out, traffic.bytes_out = bytes_out + traffic.bytes_out, 0
        if bytes_in or bytes_out:
            self._meters.count("bytes_in", bytes_in, plane="control")
            self._meters.count("bytes_out", bytes_out, plane="control")

    async def _accept(self, raw: ReadWriteCloser, address: Multiaddr) -> None:
        """Serves one accepted socket until it is closed; stands in for the swarm's own method."""
        remote = _remote_of(raw)
        cause = self._refusal_of_address(remote)
        if cause is not None:
            self._meters.count("connections_refused", cause=cause)
            await _close(raw.close)
            return
        waited_s = 0.0
        with _counted(self._num_open, remote):
            try:
                async with AsyncExitStack() as pending:
                    pending.enter_context(_counted(self._num_handshakes, remote))
                    waited_s = await pending.enter_async_context(self._turns.taken(remote))
                    if is_websocket(address):
                        async with accepted(raw) as stream:
                            await self._serve(stream, address, pending)
                    else:
                        await self._serve(raw, address, pending)
            except RefusedError:
                await _close(raw.close)
            except Exception as error:
                _LOG.debug("no handshake with %s: %s", remote, error)
                # Whoever gave up while we let it wait is not at fault.
                self._handshake_failed(remote, is_theirs=waited_s < _PATIENCE_S)
                await _close(raw.close)

    async def _serve(
        self, stream: ReadWriteCloser, address: Multiaddr, pending: AsyncExitStack
    ) -> None:
        """Shakes hands, ends `pending`, and returns when the connection is closed."""
        raw = RawConnection(stream, False)
        muxed = await self._swarm.upgrade_inbound_raw_conn(raw, address)
        await pending.aclose()
        closed = getattr(muxed, "event_closed", None)
        if isinstance(closed, trio.Event):
            await closed.wait()

    def _refusal_of_address(self, remote: str) -> str | None:
        if remote and self._bans.is_banned(remote):
            return "banned_address"
        if len(self._swarm.get_connections()) >= self._limits.max_connections:
            return "connections"
        limits = self._limits
        most = limits.max_connections_per_address
        if most is not None and self._num_open[remote] >= most:
            return "connections_per_address"
        if self._num_handshakes.total() >= limits.max_handshakes:
            return "handshakes"
        # Half is left for everybody else.
        if self._num_handshakes[remote] >= max(1, limits.max_handshakes // 2):
            return "handshakes_per_address"
        return None if self._begun.take(remote) else "handshake_rate"

    def _handshake_failed(self, remote: str, *, is_theirs: bool) -> None:
        self._meters.count("connections_refused", cause="handshake")
        if is_theirs and remote and self._bans.penalise(remote, Fault.HANDSHAKE):
            self._meters.count("bans", reason=Fault.HANDSHAKE.value)

    async def _admit(self, muxed: IMuxedConn, direction: str = "unknown") -> INetConn:
        """Adds a connection whose peer is proved; stands in for the swarm's own method."""
        cause = self._refusal_of_peer(muxed.peer_id, direction)
        if cause is not None:
            self._meters.count("connections_refused", cause=cause)
            await _close(muxed.close)
            raise RefusedError(f"peer {muxed.peer_id} is refused: {cause}")
        self._measure(muxed, direction)
        return await self._add(muxed, direction)

    def _refusal_of_peer(self, peer: ID, direction: str) -> str | None:
        if self._bans.is_banned(PeerId(peer.to_base58())):
            return "banned_peer"
        held = self._swarm.get_connections(peer)
        if len(held) >= self._limits.max_connections_per_peer:
            return "connections_per_peer"
        is_replaced = direction == "inbound" and any(
            getattr(conn, "direction", None) is Direction.INBOUND for conn in held
        )
        if is_replaced and not self._replacements.take(peer):
            return "duplicate"
        return None

    def _measure(self, muxed: IMuxedConn, direction: str) -> None:
        session: Any = getattr(muxed, "secured_conn", None)
        if session is None:
            return
        rate = self._limits.bytes_in_per_s_per_connection
        bucket = Bucket(rate, rate, trio.current_time()) if direction == "inbound" else None
        traffic = self._traffic[muxed] = Traffic(bucket)
        session.read = _measured_read(session.read, traffic)
        session.write = _measured_write(session.write, traffic)


class StreamGate:
    """Serves the streams peers open, as many as they may hold at once.

    Args:
        swarm: The swarm; its stream handler is replaced.
        limits: Streams per peer and in all.
        meters: Where streams and refusals are counted.
        penalise: Holds a fault against a peer.
    """

    def __init__(
        self,
        swarm: Swarm,
        limits: Limits,
        meters: Meters,
        penalise: Callable[[PeerId, Fault], None],
    ) -> None:
        self._limits = limits
        self._meters = meters
        self._penalise = penalise
        self._held: Counter[str] = Counter()
        self._num_held = 0
        self._serve = swarm.common_stream_handler
        swarm.set_stream_handler(self._guard)

    async def _guard(self, stream: INetStream) -> None:
        peer = stream.muxed_conn.peer_id.to_base58()
        cause = None
        if self._num_held >= self._limits.max_streams:
            cause = "streams"
        elif self._held[peer] >= self._limits.max_streams_per_peer:
            cause = "streams_per_peer"
        if cause is not None:
            self._meters.count("streams_refused", cause=cause)
            await stream.reset()
            return
        self._meters.count("streams_opened")
        self._num_held += 1
        self._meters.gauge("streams_open", self._num_held)
        try:
            with _counted(self._held, peer):
                await self._serve(stream)
        except (BaseLibp2pError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            _LOG.debug("a stream of %s broke: %s", peer, error)
            await _close(stream.reset)
        except Exception as error:
            # What a handler of the library's trips over (gossip that does not parse) would
            # otherwise end the swarm, and the node with it.
            _LOG.debug("a stream of %s could not be read: %r", peer, error)
            is_garbage = isinstance(error, DecodeError)
            self._penalise(PeerId(peer), Fault.BAD_FRAME if is_garbage else Fault.BAD_RECORD)
            await _close(stream.reset)
        finally:
            self._num_held -= 1
            self._meters.gauge("streams_open", self._num_held)
        if stream.get_protocol() is None:
            self._meters.count("streams_refused", cause=Fault.UNKNOWN_PROTOCOL.value)
            self._penalise(PeerId(peer), Fault.UNKNOWN_PROTOCOL)


@contextmanager
def _counted(counts: Counter[str], key: str) -> Iterator[None]:
    counts[key] += 1
    try:
        yield
    finally:
        counts[key] -= 1
        if not counts[key]:
            del counts[key]


def _measured_read(
    read: Callable[[int | None], Awaitable[bytes]], traffic: Traffic
) -> Callable[[int | None], Awaitable[bytes]]:
    async def measured(n: int | None = None) -> bytes:
        data = await read(n)
        now_s = traffic.heard_s = trio.current_time()
        traffic.bytes_in += len(data)
        if traffic.bucket is not None:
            wait_s = traffic.bucket.spend(len(data), now_s)
            if wait_s:
                # Not reading makes the peer wait: its window, then its socket, fills up.
                await trio.sleep(wait_s)
        return data

    return measured


def _measured_write(
    write: Callable[[bytes], Awaitable[None]], traffic: Traffic
) -> Callable[[bytes], Awaitable[None]]:
    async def measured(data: bytes) -> None:
        await write(data)
        traffic.bytes_out += len(data)

    return measured


def _remote_of(raw: ReadWriteCloser) -> str:
    """The caller's IP address; empty when its socket is already gone."""
    stream = getattr(raw, "stream", None)
    if not isinstance(stream, trio.SocketStream):
        found = raw.get_remote_address()
        return found[0] if found else ""
    try:
        remote = stream.socket.getpeername()
    except OSError:
        return ""
    # The library reads IPv4's pair only, not IPv6's four parts.
    if hasattr(raw, "_cached_remote_address"):
        raw._cached_remote_address = (str(remote[0]), int(remote[1]))
    return str(remote[0])


def _address_of(muxed: IMuxedConn) -> str | None:
    remote = getattr(muxed, "get_remote_address", lambda: None)()
    return str(remote[0]) if remote else None


async def _close(close: Callable[[], Awaitable[None]]) -> None:
    with trio.CancelScope(deadline=trio.current_time() + _CLOSE_TIMEOUT_S, shield=True):
        try:
            await close()
        except Exception as error:
            _LOG.debug("a refused connection could not be closed: %s", error)
