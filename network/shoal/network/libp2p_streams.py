"""Requests and replies on libp2p streams, on the trio side of the thread.

A stream is kept after its reply and used again, because opening one costs several round
trips; one stream carries one request at a time.
"""

from __future__ import annotations

import functools
import io
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Final, cast

import trio
from libp2p.abc import IHost, IMuxedConn, INetStream
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.host.exceptions import StreamFailure
from libp2p.network.stream.exceptions import StreamError
from libp2p.peer.id import ID

from shoal.network.bans import Fault
from shoal.network.framing import (
    HEADER_BYTES,
    Status,
    decode_error,
    decode_header,
    encode_error,
    encode_header,
    not_connected,
    status_of,
    too_large,
)
from shoal.network.meters import Meters
from shoal.network.port import Limits
from shoal.protocol.errors import Clock, Expired, NotFound, ShoalError, Unavailable
from shoal.protocol.ids import PeerId

_LOG: Final = logging.getLogger(__name__)
_READ_BYTES: Final = 256 << 10
# A body longer than this is sent from where it lies, which saves a copy of it.
_JOINED_BYTES: Final = 16 << 10
_FRAME_TIMEOUT_S: Final = 30.0
_CLOSE_TIMEOUT_S: Final = 1.0
_MAX_IDLE_PER_PROTOCOL: Final = 8
# The caller forgets a quiet stream well before its server closes it, so that a request is
# never written into a stream that is being closed.
_CALLER_IDLE_SHARE: Final = 0.5

_REQUEST: Final = frozenset({Status.REQUEST})
_REPLY: Final = frozenset({Status.OK, Status.ERROR})

# Reading base 58 is a sixth of what a small request costs.
_key_of: Final = functools.lru_cache(maxsize=4096)(ID.from_base58)

Answer = Callable[[PeerId, bytes], Awaitable[bytes]]
Penalise = Callable[[PeerId, Fault], None]
_FAULTS: Final = {"bad_frame": Fault.BAD_FRAME, "message_too_large": Fault.OVERSIZE}
_BROKEN: Final = (StreamError, BaseLibp2pError, trio.BrokenResourceError, trio.ClosedResourceError)


class StreamEndedError(Exception):
    """The stream ended between two frames, which is how a peer says it is done."""


async def read_exactly(stream: INetStream, num_bytes: int) -> bytes:
    """Exactly `num_bytes`, growing only as they arrive.

    Raises:
        StreamEndedError: The stream ended before the first byte.
        Unavailable: It ended after the first and before the last.
    """
    # Hands out what it has gathered without another copy, and holds small parts without waste.
    gathered, missing = io.BytesIO(), num_bytes
    while missing:
        cause: Exception | None = None
        part = b""
        try:
            part = await stream.read(min(_READ_BYTES, missing))
        except _BROKEN as error:
            cause = error
        if not part:
            if missing == num_bytes:
                raise StreamEndedError from cause
            raise _broke("in the middle of a message") from cause
        missing -= gathered.write(part)
    return gathered.getvalue()


async def read_frame(
    stream: INetStream, *, peer: PeerId, expected: frozenset[Status], cap: int
) -> tuple[Status, bytes]:
    """The next frame; its header is checked before its body is read.

    Raises:
        StreamEndedError: The peer closed the stream instead.
        PeerFault: The header is not Shoal's.
        InvalidRequest: The body is over `cap`.
        Unavailable: The stream broke inside the frame.
    """
    header = await read_exactly(stream, HEADER_BYTES)
    num_bytes = decode_header(header, peer=peer, expected=expected, cap=cap)
    try:
        body = await read_exactly(stream, num_bytes)
    except StreamEndedError:
        raise _broke("in the middle of a message") from None
    return status_of(header), body


async def write_frame(stream: INetStream, status: Status, body: bytes) -> None:
    """The frame is handed to the connection.

    Raises:
        Unavailable: The stream is closed or its reader has stalled.
    """
    try:
        header = encode_header(status, len(body))
        if len(body) <= _JOINED_BYTES:
            await stream.write(header + body)
        else:
            await stream.write(header)
            # The library takes slices of what it is given, and only those are copied.
            await stream.write(cast(bytes, memoryview(body)))
    except _BROKEN as error:
        raise _broke("while it was being written to") from error


class RequestStreams:
    """The caller's side: one reply for one request, over streams that are reused.

    Args:
        host: The running host.
        limits: `max_message_bytes` caps requests and replies.
        meters: Where requests and their outcomes are counted.
    """

    def __init__(self, host: IHost, limits: Limits, meters: Meters) -> None:
        self._host = host
        self._limits = limits
        self._meters = meters
        self._idle: defaultdict[ID, defaultdict[str, list[tuple[float, INetStream]]]] = defaultdict(
            lambda: defaultdict(list)
        )

    async def request(
        self, peer: PeerId, protocol: str, payload: bytes, *, timeout_s: float
    ) -> bytes:
        """The peer's reply; see `Network.request` for what it raises."""
        if len(payload) > self._limits.max_message_bytes:
            raise too_large(
                len(payload), self._limits.max_message_bytes, f"to peer {peer} on {protocol}"
            )
        try:
            with trio.move_on_after(timeout_s):
                body = await self._exchange(peer, protocol, payload)
                self._meters.count("requests_made", protocol=protocol, outcome="ok")
                return body
        except ShoalError as error:
            self._meters.count("requests_made", protocol=protocol, outcome=_outcome_of(error))
            raise
        self._meters.count("requests_made", protocol=protocol, outcome="expired")
        raise Expired(
            f"Peer {peer} did not answer a {protocol} request within {timeout_s:g} s.",
            clock=Clock.REPLY,
            peer_id=peer,
        )

    def forget(self, peer: ID, connection: IMuxedConn | None = None) -> None:
        """No kept stream of `peer` (on `connection` only, if one is named) is used again."""
        kept = self._idle.pop(peer, None)
        if kept is None or connection is None:
            return
        for protocol, entries in kept.items():
            live = [entry for entry in entries if entry[1].muxed_conn is not connection]
            if live:
                self._idle[peer][protocol] = live

    async def _exchange(self, peer: PeerId, protocol: str, payload: bytes) -> bytes:
        peer_key = _key_of(peer)
        stream = await self._take(peer, peer_key, protocol)
        try:
            await write_frame(stream, Status.REQUEST, payload)
            status, body = await read_frame(
                stream, peer=peer, expected=_REPLY, cap=self._limits.max_message_bytes
            )
        except StreamEndedError as error:
            await discard(stream)
            raise Unavailable(
                f"Peer {peer} closed the stream before it answered a {protocol} request; "
                "it may have stopped or refused the request's size.",
                code="no_reply",
            ) from error
        except BaseException:
            await discard(stream)
            raise
        self._keep(peer_key, protocol, stream)
        if status is Status.ERROR:
            raise decode_error(body)
        return body

    async def _take(self, peer: PeerId, peer_key: ID, protocol: str) -> INetStream:
        kept = self._idle[peer_key][protocol] if peer_key in self._idle else []
        while kept:
            unused_since, stream = kept.pop()
            quiet_s = trio.current_time() - unused_since
            if quiet_s < self._limits.idle_stream_s * _CALLER_IDLE_SHARE:
                return stream
            await discard(stream)
        # Without this the library would dial an address it remembers, on its own.
        if not self._host.get_network().get_connections(peer_key):
            raise not_connected(peer)
        try:
            return await self._host.new_stream(peer_key, [TProtocol(protocol)])
        except StreamFailure as error:
            if "not supported" in str(error.__cause__):
                raise NotFound(
                    f"Peer {peer} does not serve {protocol}; it may run another version.",
                    code="unknown_protocol",
                ) from error
            raise _broke("while it was being opened") from error
        except _BROKEN as error:
            raise _broke("while it was being opened") from error

    def _keep(self, peer_key: ID, protocol: str, stream: INetStream) -> None:
        entries = self._idle[peer_key][protocol]
        entries.append((trio.current_time(), stream))
        if len(entries) > _MAX_IDLE_PER_PROTOCOL:
            _, oldest = entries.pop(0)
            trio.lowlevel.spawn_system_task(discard, oldest)


def _outcome_of(error: ShoalError) -> str:
    # A code is of the peer's choosing; the classes are few.
    return type(error).default_code


async def serve_stream(
    stream: INetStream,
    answer: Answer,
    *,
    cap: int,
    limits: Limits,
    meters: Meters,
    penalise: Penalise,
) -> None:
    """Every request on `stream` was answered, until the peer closed it or broke the rules.

    A request over `cap` but within the node's message limit is read past and refused, so
    that its sender, still writing, gets to read why; a larger one ends the stream at once and
    counts against the peer.
    """
    peer = PeerId(stream.muxed_conn.peer_id.to_base58())
    try:
        while True:
            with trio.move_on_after(limits.idle_stream_s) as quiet:
                header = await read_exactly(stream, HEADER_BYTES)
            if quiet.cancelled_caught:
                break
            num_bytes = decode_header(
                header, peer=peer, expected=_REQUEST, cap=limits.max_message_bytes
            )
            with trio.fail_after(_FRAME_TIMEOUT_S):
                if num_bytes > cap:
                    await _skip(stream, num_bytes)
                    refusal = too_large(num_bytes, cap, f"announced by peer {peer}")
                    await write_frame(stream, Status.ERROR, encode_error(refusal))
                    continue
                payload = await read_exactly(stream, num_bytes)
            status, body = await _outcome(answer, peer, payload)
            with trio.fail_after(_FRAME_TIMEOUT_S):
                await write_frame(stream, status, body)
    except StreamEndedError:
        pass
    except ShoalError as error:
        # The rest of the stream cannot be understood any more: say why, then reset it.
        _LOG.debug("stream from %s ended: %s", peer, error)
        meters.count("streams_ended", cause=type(error).default_code)
        if error.code in _FAULTS:
            penalise(peer, _FAULTS[error.code])
        with trio.move_on_after(_CLOSE_TIMEOUT_S):
            await _tell(stream, error)
    except trio.TooSlowError:
        _LOG.debug("stream from %s stalled inside a message", peer)
        meters.count("streams_ended", cause="stalled")
    finally:
        await discard(stream)


async def discard(stream: INetStream) -> None:
    """The stream is reset, or was already gone."""
    with trio.CancelScope(deadline=trio.current_time() + _CLOSE_TIMEOUT_S, shield=True):
        try:
            await stream.reset()
        except _BROKEN as error:
            _LOG.debug("a stream could not be reset: %s", error)


async def _skip(stream: INetStream, num_bytes: int) -> None:
    while num_bytes:
        num_bytes -= len(await read_exactly(stream, min(_READ_BYTES, num_bytes)))


async def _outcome(answer: Answer, peer: PeerId, payload: bytes) -> tuple[Status, bytes]:
    try:
        return Status.OK, await answer(peer, payload)
    except ShoalError as error:
        return Status.ERROR, encode_error(error)


async def _tell(stream: INetStream, error: ShoalError) -> None:
    try:
        await write_frame(stream, Status.ERROR, encode_error(error))
        await stream.close()
        # A reset overtakes data that the peer has not read yet; give it a moment to read.
        await trio.sleep(0.1)
    except (Unavailable, *_BROKEN):
        return


def _broke(when: str) -> Unavailable:
    return Unavailable(
        f"The stream to the peer broke {when}; try again once it is connected.",
        code="stream_broken",
    )
