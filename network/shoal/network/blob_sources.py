"""Where a blob's bytes come from: an HTTP holder, or a peer over its libp2p connection."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import aiohttp
from yarl import URL

from shoal.network.blob_chunks import BLOB_PROTOCOL, Span, encode_span
from shoal.network.egress import PublicResolver, check_url
from shoal.network.port import Network
from shoal.protocol.blob import CHUNK_BYTES
from shoal.protocol.canonical import parse_json
from shoal.protocol.errors import (
    InvalidRequest,
    NotFound,
    PeerFault,
    ShoalError,
    Unavailable,
    error_from_wire,
)
from shoal.protocol.ids import PeerId

OnBytes = Callable[[int], None]
TRANSPORT_ERRORS: Final = (aiohttp.ClientError, ConnectionError, TimeoutError, OSError)
CONNECT_TIMEOUT_S: Final = 5.0
_READ_BYTES: Final = 1 << 18
_MAX_ERROR_BYTES: Final = 16 << 10
_PAUSE_TIMEOUT_S: Final = 15.0
# Below the thirty seconds after which a `BlobServer` closes a quiet connection.
_KEPT_S: Final = 25.0
_DIAL_TIMEOUT_S: Final = 10.0
_UNHEARD_S: Final = 5.0
_CONTENT_RANGE: Final = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")


@dataclass(frozen=True)
class Holder:
    """One who may hold a blob.

    Attributes:
        source: ``http(s)://…``, whose blobs lie at ``<source>/blobs/<sha256>``, or a multiaddr
            that ends in ``/p2p/<peer id>``; nothing but ``/p2p/<peer id>`` means a peer that is
            connected, or that the network knows a way to.
        chunks: The chunks it holds; None for all of them.
        allow_private: False when a stranger named it: it is then asked at public addresses only.
    """

    source: str
    chunks: frozenset[int] | None = None
    allow_private: bool = False


class BlobSource(Protocol):
    """What fetches ranges from one holder.  Nothing it brings has been verified."""

    @property
    def max_readings(self) -> int:
        """How many ranges may be asked at once to keep the holder busy."""
        ...

    @property
    def max_piece_bytes(self) -> int:
        """The longest range that is worth asking at once."""
        ...

    @property
    def shows_progress(self) -> bool:
        """True when `read_into` tells of bytes as they come, and not of all at the end."""
        ...

    async def read_into(self, span: Span, room: memoryview, on_bytes: OnBytes) -> None:
        """`room` is filled with the span, from its start; `on_bytes` hears how many more.

        Raises:
            PeerFault: The holder sent what nobody asked for.
            ShoalError: What the holder answered instead.
            OSError: The connection failed, or one of `TRANSPORT_ERRORS`.
        """
        ...


class HttpSource:
    """A holder asked with HTTP ranges.

    Args:
        session: Whose connections are used.
        base: The holder's address.
    """

    max_readings = 3
    max_piece_bytes = CHUNK_BYTES
    shows_progress = True

    def __init__(self, session: aiohttp.ClientSession, base: URL) -> None:
        self._session = session
        self._base = str(base).rstrip("/")

    async def read_into(self, span: Span, room: memoryview, on_bytes: OnBytes) -> None:
        """See `BlobSource.read_into`."""
        # Identity encoding, so that no holder can make us inflate a bomb.
        headers = {"Accept-Encoding": "identity"}
        last = span.start + span.size_bytes - 1
        if not span.is_whole:
            headers["Range"] = f"bytes={span.start}-{last}"
        async with self._session.get(
            f"{self._base}/blobs/{span.digest}",
            headers=headers,
            timeout=aiohttp.ClientTimeout(
                sock_connect=CONNECT_TIMEOUT_S, sock_read=_PAUSE_TIMEOUT_S
            ),
            allow_redirects=False,
        ) as answer:
            if answer.status != (200 if span.is_whole else 206):
                raise await refusal(answer)
            _check_content_range(answer, span)
            await _fill(answer.content, room, on_bytes)


async def _fill(content: aiohttp.StreamReader, room: memoryview, on_bytes: OnBytes) -> None:
    got = 0
    async for part in content.iter_any():
        end = got + len(part)
        if end > len(room):
            raise PeerFault(
                f"The holder sent more than the {len(room)} bytes asked for.", code="oversize"
            )
        room[got:end] = part
        on_bytes(len(part))
        got = end
        if got == len(room):
            return
    if got < len(room):
        raise Unavailable(
            f"The holder sent {got} of the {len(room)} bytes asked for.", code="truncated"
        )


def _check_content_range(answer: aiohttp.ClientResponse, span: Span) -> None:
    """A range that says what it is must be the one that was asked for."""
    said = answer.headers.get("Content-Range")
    if span.is_whole or said is None:
        return
    match = _CONTENT_RANGE.fullmatch(said)
    asked = span.start, span.start + span.size_bytes - 1
    if match is None or (int(match[1]), int(match[2])) != asked:
        raise PeerFault(
            f"The holder was asked for bytes {asked[0]} to {asked[1]} and sent {said[:80]!r}.",
            code="wrong_range",
        )


async def refusal(answer: aiohttp.ClientResponse) -> ShoalError:
    """The error the holder answered with, or one that says what it answered instead."""
    body = await answer.content.read(_MAX_ERROR_BYTES)
    try:
        return error_from_wire(parse_json(body))
    except ValueError:
        pass
    if answer.status == 404:
        return NotFound("The holder does not have the blob.")
    message = f"The holder answered with HTTP status {answer.status}."
    wait = answer.headers.get("Retry-After", "")
    if answer.status in {429, 503} and wait.isascii() and wait.isdigit() and len(wait) < 5:
        return Unavailable(message, code="overloaded", retry_after_s=min(3600, int(wait)))
    return Unavailable(message, code="http_status")


class PeerSource:
    """A peer asked over `/shoal/blob/1`.

    Args:
        network: This node's way to its peers.
        address: The peer's multiaddr.
        floor_bytes_per_s: Slower than this the answer is not waited for.
    """

    # One answer being read, one on its way, one being prepared.
    max_readings = 3
    # A reply is held in memory whole, at both ends; longer ones are hardly faster.
    max_piece_bytes = 2 << 20
    shows_progress = False

    def __init__(self, network: Network, address: str, floor_bytes_per_s: float) -> None:
        self._network = network
        self._address = address
        self._peer = PeerId(address.rpartition("/p2p/")[2])
        self._floor = floor_bytes_per_s
        self._dialling = asyncio.Lock()

    async def read_into(self, span: Span, room: memoryview, on_bytes: OnBytes) -> None:
        """See `BlobSource.read_into`."""
        if self._peer not in self._network.peers():
            if self._address == f"/p2p/{self._peer}":
                await self._network.reach(self._peer, timeout_s=_DIAL_TIMEOUT_S)
            else:
                await self._network.connect(self._address, timeout_s=_DIAL_TIMEOUT_S)
        data = await self._network.request(
            self._peer,
            BLOB_PROTOCOL,
            encode_span(span),
            timeout_s=_PAUSE_TIMEOUT_S + span.size_bytes / self._floor,
        )
        if len(data) != len(room):
            raise PeerFault(
                f"The holder was asked for {len(room)} bytes and sent {len(data)}.",
                code="wrong_range",
            )
        room[:] = data
        on_bytes(len(data))


def _impatient_socket(
    address: tuple[int | socket.AddressFamily, int | socket.SocketKind, int, str, tuple[Any, ...]],
) -> socket.socket:
    """A socket that breaks when what it sends has not arrived for a while.

    Left alone, TCP waits twice as long after each try, so that an upload comes back to life as
    long after its line as the line was dead (RFC 6298, section 5.5); a new connection does not.
    """
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    # tcp(7); where the system has no such clock, the upload's own deadline ends it.
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * _UNHEARD_S))
    return made


class SourceOpener:
    """Opens sources by name; its HTTP sessions, whose connections are reused, are its own.

    Args:
        network: The way to peers; None where there is none.
        floor_bytes_per_s: The slowest answer waited for.
    """

    def __init__(self, network: Network | None, floor_bytes_per_s: float) -> None:
        self._network = network
        self._floor = floor_bytes_per_s
        self._sessions: dict[tuple[bool, bool], aiohttp.ClientSession] = {}

    def open(self, holder: Holder) -> BlobSource:
        """The source of that name.

        Raises:
            InvalidRequest: The name is no source's, or nothing here can reach it.
            Unauthorised: A stranger named an address that is not public.
        """
        if holder.source.startswith("/"):
            if self._network is None:
                raise InvalidRequest(f"{holder.source[:200]!r} is a peer, and no network is up.")
            if "/p2p/" not in holder.source:
                raise InvalidRequest(
                    f"{holder.source[:200]!r} does not end in /p2p/ and a peer id."
                )
            return PeerSource(self._network, holder.source, self._floor)
        url = check_url(holder.source, allow_private=holder.allow_private)
        return HttpSource(self.session(allow_private=holder.allow_private), url)

    def session(self, *, allow_private: bool, uploads: bool = False) -> aiohttp.ClientSession:
        """The session that may, or may not, connect to addresses that are not public.

        Uploads have connections of their own: TCP learns for each direction apart how much the
        line bears, and on a long one a connection that only ever fetched takes many round trips
        to learn it.
        """
        session = self._sessions.get((allow_private, uploads))
        if session is None or session.closed:
            session = self._sessions[allow_private, uploads] = aiohttp.ClientSession(
                auto_decompress=False,
                trust_env=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                connector=aiohttp.TCPConnector(
                    limit=64,
                    limit_per_host=8,
                    keepalive_timeout=_KEPT_S,
                    socket_factory=_impatient_socket,
                    resolver=None if allow_private else PublicResolver(),
                ),
                read_bufsize=_READ_BYTES,
            )
        return session

    async def close(self) -> None:
        """Every session is closed."""
        sessions = tuple(self._sessions.values())
        self._sessions.clear()
        for session in sessions:
            await session.close()
