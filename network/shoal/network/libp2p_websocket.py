"""libp2p over WebSocket, which passes where only web traffic does.

A node listens in the clear (``/ws``); Noise inside encrypts all the same. For port 443 a TLS proxy
stands in front of it, and dialling ``/tls/ws`` checks that proxy's certificate. The library's own
transport accepts any number of half-open connections, hides the caller's address and waits without
end for a dead peer's goodbye, so only its address parser is used.
"""

from __future__ import annotations

import contextlib
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, cast

import trio
from libp2p.abc import IRawConnection, ITransport
from libp2p.custom_types import THandler
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.transport.exceptions import OpenConnectionError
from libp2p.transport.tcp.tcp import TCPListener
from libp2p.transport.websocket.multiaddr_utils import parse_websocket_multiaddr
from libp2p.utils.multiaddr_utils import extract_host_from_multiaddr
from multiaddr import Multiaddr
from multiaddr.exceptions import ProtocolLookupError
from trio_websocket import (
    ConnectionClosed,
    HandshakeError,
    WebSocketConnection,
    wrap_client_stream,
    wrap_server_stream,
)

_LOG: Final = logging.getLogger(__name__)

# A message carries one write of Noise, which is at most 64 KiB.
_MAX_MESSAGE_BYTES: Final = 256 << 10
_QUEUED_MESSAGES: Final = 4
_OPEN_TIMEOUT_S: Final = 10.0
_GOODBYE_TIMEOUT_S: Final = 0.5

_BROKEN: Final = (
    HandshakeError,
    ConnectionClosed,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
)
_Transport = trio.SocketStream | trio.SSLStream


class WebSocketStream(ReadWriteCloser):
    """Bytes over one WebSocket.

    Args:
        socket: The WebSocket, its handshake done.
        transport: What it runs on.
        remote: The other end's IP address and port, if known.
    """

    def __init__(
        self, socket: WebSocketConnection, transport: Any, remote: tuple[str, int] | None
    ) -> None:
        self._socket = socket
        self._transport = transport
        self._remote = remote
        self._unread = b""

    async def read(self, n: int | None = None) -> bytes:
        """Up to `n` bytes, at least one."""
        while not self._unread:
            try:
                message = await self._socket.get_message()
            except ConnectionClosed as error:
                raise _closed() from error
            self._unread = message.encode() if isinstance(message, str) else message
        size = len(self._unread) if n is None else n
        data, self._unread = self._unread[:size], self._unread[size:]
        return data

    async def write(self, data: bytes) -> None:
        """The bytes are handed to the connection as one message."""
        try:
            await self._socket.send_message(data)
        except (ConnectionClosed, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise _closed() from error

    async def close(self) -> None:
        """The socket is closed; the peer had a moment to answer the goodbye."""
        grace = trio.CancelScope(deadline=trio.current_time() + _GOODBYE_TIMEOUT_S, shield=True)
        with grace, contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self._socket.aclose()
        await trio.aclose_forcefully(self._transport)

    def get_remote_address(self) -> tuple[str, int] | None:
        """The other end's IP address and port, if known."""
        return self._remote


@contextlib.asynccontextmanager
async def accepted(raw: ReadWriteCloser) -> AsyncIterator[WebSocketStream]:
    """A WebSocket over a TCP stream that was just accepted, for as long as the block runs.

    Raises:
        OpenConnectionError: The caller does not speak WebSocket.
    """
    transport = getattr(raw, "stream", None)
    if not isinstance(transport, trio.SocketStream):
        raise OpenConnectionError("only a TCP stream can carry a WebSocket")
    socket: WebSocketConnection | None = None
    async with trio.open_nursery() as nursery:
        # A caller that never asks for an upgrade, or asks for anything else, is left behind here.
        with trio.move_on_after(_OPEN_TIMEOUT_S) as opening, contextlib.suppress(*_BROKEN):
            request = await wrap_server_stream(
                _reader_in(nursery, transport, opening),
                transport,
                message_queue_size=_QUEUED_MESSAGES,
                max_message_size=_MAX_MESSAGE_BYTES,
            )
            socket = await request.accept()
        if socket is not None:
            yield WebSocketStream(socket, transport, raw.get_remote_address())
        nursery.cancel_scope.cancel()
    if socket is None:
        raise OpenConnectionError("the caller does not speak WebSocket")


class WebSocketTransport(ITransport):
    """Dials ``/ws``, ``/wss`` and ``/tls/ws``; listens on ``/ws``.

    Args:
        handshake_timeout_s: Longest that dialling, TLS and the upgrade may take together.
    """

    def __init__(self, handshake_timeout_s: float = _OPEN_TIMEOUT_S) -> None:
        self._timeout_s = handshake_timeout_s
        self._nursery: trio.Nursery | None = None

    def set_background_nursery(self, nursery: trio.Nursery) -> None:
        """Dialled connections are read in `nursery`; the swarm calls this as it starts."""
        self._nursery = nursery

    def protocols(self) -> list[str]:
        """The multiaddr protocols this transport is asked about."""
        return ["ws", "wss"]

    def listen_order(self) -> int:
        """After plain TCP."""
        return 1

    def can_dial(self, maddr: Multiaddr) -> bool:
        """True for an IP address or host name, a port, and a WebSocket on it."""
        try:
            parse_websocket_multiaddr(_without_peer(maddr))
        except (ValueError, KeyError):
            return False
        return True

    def can_listen(self, maddr: Multiaddr) -> bool:
        """True for ``/ws`` without TLS, which a proxy in front adds."""
        return self.can_dial(maddr) and not parse_websocket_multiaddr(_without_peer(maddr)).is_wss

    def create_listener(self, handler_function: THandler) -> TCPListener:
        """A TCP listener; who accepts its connections upgrades them, within their own limits."""
        return _Listener(handler_function)

    async def dial(self, maddr: Multiaddr) -> IRawConnection:
        """A connection to the WebSocket at `maddr`.

        Raises:
            OpenConnectionError: Nobody answers there, does not speak WebSocket, or shows a
                certificate that this machine does not trust for that name.
        """
        parsed = parse_websocket_multiaddr(_without_peer(maddr))
        host = extract_host_from_multiaddr(parsed.rest_multiaddr)
        port = int(str(parsed.rest_multiaddr.value_for_protocol("tcp")))
        if host is None or self._nursery is None:
            raise OpenConnectionError(f"{maddr} names no host, or the node is not running")
        try:
            with trio.fail_after(self._timeout_s):
                stream = await self._open(self._nursery, host, port, is_secure=parsed.is_wss)
        except trio.TooSlowError as error:
            raise OpenConnectionError(f"no answer within {self._timeout_s:g} s") from error
        except (OSError, *_BROKEN) as error:
            # The innermost cause is what people are shown, and TLS's own is a riddle.
            raise OpenConnectionError(_cause(error)) from None
        return RawConnection(stream, True)

    async def _open(
        self, nursery: trio.Nursery, host: str, port: int, *, is_secure: bool
    ) -> WebSocketStream:
        socket: WebSocketConnection | None = None
        tcp = await trio.open_tcp_stream(host, port)
        transport: _Transport = tcp
        try:
            if is_secure:
                context = ssl.create_default_context()
                transport = trio.SSLStream(
                    tcp, context, server_hostname=host, https_compatible=True
                )
                await transport.do_handshake()
            with trio.CancelScope() as opening:
                socket = await wrap_client_stream(
                    _reader_in(nursery, transport, opening),
                    transport,
                    host if port in {80, 443} else f"{host}:{port}",
                    "/",
                    message_queue_size=_QUEUED_MESSAGES,
                    max_message_size=_MAX_MESSAGE_BYTES,
                )
            if socket is None:
                raise OpenConnectionError("what answers there does not speak WebSocket")
        except BaseException:
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(tcp)
            raise
        return WebSocketStream(socket, transport, tcp.socket.getpeername()[:2])


class _Listener(TCPListener):
    def get_addrs(self) -> tuple[Multiaddr, ...]:
        return tuple(address.encapsulate("/ws") for address in super().get_addrs())


class _Reader:
    """Starts a connection's reader so that no error in it ends the node.

    The library waits for the upgrade without end when the reader ended before it, so the reader's
    end ends that wait.
    """

    def __init__(
        self, nursery: trio.Nursery, transport: _Transport, opening: trio.CancelScope
    ) -> None:
        self._nursery = nursery
        self._transport = transport
        self._opening = opening

    def start_soon(self, reader: Callable[[], Awaitable[None]]) -> None:
        self._nursery.start_soon(self._read, reader)

    async def _read(self, reader: Callable[[], Awaitable[None]]) -> None:
        try:
            await reader()
        except Exception as error:
            _LOG.debug("a WebSocket's reader failed: %s", error)
            await trio.aclose_forcefully(self._transport)
        finally:
            self._opening.cancel()


def _reader_in(
    nursery: trio.Nursery, transport: _Transport, opening: trio.CancelScope
) -> trio.Nursery:
    # The library asks for a nursery and only ever starts its one reader in it.
    return cast(trio.Nursery, _Reader(nursery, transport, opening))


def is_websocket(address: Multiaddr) -> bool:
    """True when connections to this listen address begin with a WebSocket upgrade."""
    return any(protocol.name == "ws" for protocol in address.protocols())


def _without_peer(address: Multiaddr) -> Multiaddr:
    # The library's parser takes /tls/ws only where nothing follows it.
    try:
        peer = address.value_for_protocol("p2p")
    except ProtocolLookupError:
        return address
    return address.decapsulate(Multiaddr(f"/p2p/{peer}"))


def _cause(error: BaseException) -> str:
    """What went wrong, preferring TLS's own words to the wrapper trio puts around them."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ssl.SSLCertVerificationError):
            return f"its TLS certificate is not trusted here: {seen.verify_message}"
        if isinstance(seen, ssl.SSLError):
            return f"TLS failed: {seen.reason or seen}"
        seen = seen.__cause__ or seen.__context__
    return str(error) or type(error).__name__


def _closed() -> ConnectionClosedError:
    return ConnectionClosedError("the WebSocket is closed", transport="websocket")
