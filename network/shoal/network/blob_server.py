"""A node's blobs over HTTP: anyone may read by digest, uploads need the owner's word."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import hdrs, web

from shoal.network.blob_chunks import check_digest
from shoal.network.blob_draft import Draft
from shoal.network.blob_gate import SLICE_BYTES, UploadGate
from shoal.network.blob_store import BlobRange, BlobStore
from shoal.protocol.errors import (
    Clock,
    Expired,
    InvalidRequest,
    PeerFault,
    ShoalError,
    Unauthorised,
    Unavailable,
)

Authorise = Callable[[str, str, int], Awaitable[None]]
"""Called with (token, digest, size in bytes); raises `Unauthorised` to refuse the upload."""

_LOG: Final = logging.getLogger(__name__)
# The library writes a traceback for every request it cannot read, and strangers send those at
# will; what goes wrong in a handler is logged here, by `_errors_as_json`.
_HTTP_LOG: Final = logging.getLogger(f"{__name__}.http")
_HTTP_LOG.setLevel(logging.CRITICAL)
_MAX_TOKEN_CHARS: Final = 4096
_STOP_TIMEOUT_S: Final = 1.0
_LINGER_S: Final = 2.0
_MAX_UPLOADS_AT_ONCE: Final = 32
_MAX_CONNECTIONS: Final = 1024
_REQUEST_TIMEOUT_S: Final = 10.0
_KEEPALIVE_S: Final = 30.0
_SEND_BYTES: Final = 1 << 18
# A reader that takes less than a slice in this time only holds a place that others want.
_SEND_TIMEOUT_S: Final = 20.0
_RANGE: Final = re.compile(r"bytes=(\d{1,15})-(\d{0,15})")
# Blobs never change, so any cache may keep them for good (RFC 8246).
_CACHE_CONTROL: Final = "public, max-age=31536000, immutable"


class _Refusal(asyncio.Protocol):
    """Closes the connection it is given."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection is closed at once."""
        if isinstance(transport, asyncio.Transport):
            transport.abort()


class BlobServer:
    """Serves a store over HTTP in the running asyncio loop.

    Args:
        store: What is served and where uploads go.
        host: The address to listen on.
        port: The port; 0 lets the system choose.
        authorise: Who may upload what; None refuses every upload.
        max_upload_bytes: Largest upload, compared with Content-Length before any byte is read.
        upload_pause_s: Longest wait for an upload's next bytes.
        upload_timeout_s: Longest an upload may take in all.
        gate: How much is given to whom; shared with a `BlobService` of the same node.
    """

    def __init__(
        self,
        store: BlobStore,
        host: str,
        port: int,
        *,
        authorise: Authorise | None = None,
        max_upload_bytes: int = 1 << 30,
        upload_pause_s: float = 10.0,
        upload_timeout_s: float = 600.0,
        gate: UploadGate | None = None,
    ) -> None:
        self._store = store
        self._host = host
        self._port = port
        self._authorise = authorise
        self._max_upload_bytes = max_upload_bytes
        self._upload_pause_s = upload_pause_s
        self._upload_timeout_s = upload_timeout_s
        self._gate = gate or UploadGate()
        self._runner: web.AppRunner | None = None
        self._listening: asyncio.Server | None = None
        self._silent: dict[asyncio.BaseProtocol, asyncio.TimerHandle] = {}
        self._num_uploads = 0

    @property
    def url(self) -> str:
        """Where the blobs are, without a trailing slash; the base for `BlobClient`."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._port}"

    async def start(self) -> None:
        """The port is open.

        Raises:
            InvalidRequest: It is taken, or the address is not ours.
        """
        application = web.Application(middlewares=[_errors_as_json, self._mark])
        application.add_routes(self.routes())
        runner = web.AppRunner(
            application,
            access_log=None,
            logger=_HTTP_LOG,
            handle_signals=False,
            shutdown_timeout=_STOP_TIMEOUT_S,
            lingering_time=_LINGER_S,
            keepalive_timeout=_KEEPALIVE_S,
        )
        await runner.setup()
        loop = asyncio.get_running_loop()
        try:
            listening = await loop.create_server(
                lambda: self._admit(runner), self._host, self._port, reuse_address=True
            )
        except OSError as error:
            await runner.cleanup()
            raise InvalidRequest(
                f"Cannot serve blobs on {self._host}:{self._port}: "
                f"{(error.strerror or str(error)).lower()}; stop what holds it or choose "
                "another port.",
                code="address_unavailable",
            ) from error
        self._port = listening.sockets[0].getsockname()[1]
        self._runner, self._listening = runner, listening

    async def stop(self) -> None:
        """The port is free; a second call does nothing."""
        runner, self._runner = self._runner, None
        listening, self._listening = self._listening, None
        if listening is not None:
            listening.close()
        for timer in self._silent.values():
            timer.cancel()
        self._silent.clear()
        if runner is not None:
            await runner.cleanup()

    def _admit(self, runner: web.AppRunner) -> asyncio.Protocol:
        """A connection's handler; over the cap, and for one that never asks, it is closed."""
        server = runner.server
        if server is None or len(server.connections) >= _MAX_CONNECTIONS:
            self._gate.meters.count("blob_connections_refused")
            return _Refusal()
        handler = server()
        # The library waits for a connection's first request for ever.
        self._silent[handler] = asyncio.get_running_loop().call_later(
            _REQUEST_TIMEOUT_S, self._close_silent, handler
        )
        return handler

    def _close_silent(self, handler: asyncio.BaseProtocol) -> None:
        del self._silent[handler]
        transport = getattr(handler, "transport", None)
        if transport is not None:
            self._gate.meters.count("blob_slow_readers")
            transport.abort()

    @web.middleware
    async def _mark(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        timer = self._silent.pop(request.protocol, None)
        if timer is not None:
            timer.cancel()
        return await handler(request)

    def routes(self) -> list[web.RouteDef]:
        """The handlers, for an application that already has a port."""
        return [
            web.get("/blobs/{sha256}", self._get),
            web.put("/blobs/{sha256}", self._put),
        ]

    async def _get(self, request: web.Request) -> web.StreamResponse:
        digest = check_digest(request.match_info["sha256"])
        start, size_bytes = _asked_range(request)
        requester = request.remote or ""
        with (
            self._gate.serving(requester),
            self._store.open_range(digest, start, size_bytes) as opened,
        ):
            response = web.StreamResponse(
                status=206 if hdrs.RANGE in request.headers else 200,
                headers={
                    hdrs.CONTENT_TYPE: "application/octet-stream",
                    hdrs.CACHE_CONTROL: _CACHE_CONTROL,
                    hdrs.ACCEPT_RANGES: "bytes",
                    hdrs.CONTENT_LENGTH: str(opened.size_bytes),
                },
            )
            if response.status == 206:
                last = opened.start + opened.size_bytes - 1
                response.headers[hdrs.CONTENT_RANGE] = f"bytes {opened.start}-{last}/*"
            await response.prepare(request)
            try:
                if request.method != hdrs.METH_HEAD:
                    await self._send(request, opened, requester)
                await response.write_eof()
            except ConnectionError:
                # The reader is gone, or was too slow; nothing can be said to it any more.
                if request.transport is not None:
                    request.transport.abort()
        return response

    async def _send(self, request: web.Request, opened: BlobRange, requester: str) -> None:
        """The range is on its way, copied by the kernel where it can."""
        place, end = opened.start, opened.start + opened.size_bytes
        slice_bytes = SLICE_BYTES if self._gate.is_limited else _SEND_BYTES
        loop = asyncio.get_running_loop()
        while place < end:
            num_bytes = min(slice_bytes, end - place)
            await self._gate.turn(requester, num_bytes)
            if request.transport is None:
                raise ConnectionResetError("the reader is gone")
            try:
                async with asyncio.timeout(_SEND_TIMEOUT_S):
                    await loop.sendfile(request.transport, opened.file, place, num_bytes)
            except TimeoutError:
                self._gate.meters.count("blob_slow_readers")
                raise ConnectionResetError("the reader is too slow") from None
            place += num_bytes
        self._gate.meters.count("blob_bytes", opened.size_bytes, plane="http", direction="out")

    async def _put(self, request: web.Request) -> web.StreamResponse:
        digest = check_digest(request.match_info["sha256"])
        size_bytes = self._announced_size(request)
        await self._check_token(request, digest, size_bytes)
        if self._store.has(digest):
            return _settled(web.json_response({"sha256": digest, "stored": False}))
        if self._num_uploads >= _MAX_UPLOADS_AT_ONCE:
            raise Unavailable(
                f"{self._num_uploads} uploads are under way; try again in a second.",
                code="overloaded",
            )
        self._store.reserve(size_bytes)
        self._num_uploads += 1
        try:
            with self._store.draft() as draft:
                await self._receive(request, draft, size_bytes)
                reference = await asyncio.to_thread(draft.keep, expected=digest)
        finally:
            self._num_uploads -= 1
        return web.json_response(reference.model_dump(), status=201)

    def _announced_size(self, request: web.Request) -> int:
        size_bytes = request.content_length
        if size_bytes is None:
            raise InvalidRequest(
                "An upload must say its size in Content-Length; chunked encoding is refused.",
                code="length_required",
            )
        if size_bytes > self._max_upload_bytes:
            raise InvalidRequest(
                f"An upload of {size_bytes} bytes is over the limit of {self._max_upload_bytes}.",
                code="blob_too_large",
            )
        return size_bytes

    async def _check_token(self, request: web.Request, digest: str, size_bytes: int) -> None:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if self._authorise is None or scheme.lower() != "bearer" or not token:
            raise Unauthorised("An upload needs the bearer token that came with its lease.")
        if len(token) > _MAX_TOKEN_CHARS:
            raise Unauthorised(f"A bearer token has at most {_MAX_TOKEN_CHARS} characters.")
        await self._authorise(token, digest, size_bytes)

    async def _receive(self, request: web.Request, draft: Draft, size_bytes: int) -> None:
        try:
            async with asyncio.timeout(self._upload_timeout_s):
                while draft.size_bytes < size_bytes:
                    async with asyncio.timeout(self._upload_pause_s):
                        part = await request.content.readany()
                    if not part:
                        raise PeerFault(
                            f"The upload ended after {draft.size_bytes} of {size_bytes} bytes; "
                            "nothing was kept.",
                            code="truncated",
                        )
                    draft.write(part)
        except TimeoutError:
            raise Expired(
                f"The upload stalled after {draft.size_bytes} of {size_bytes} bytes; "
                "nothing was kept.",
                clock=Clock.TRANSFER,
            ) from None


@web.middleware
async def _errors_as_json(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except ShoalError as error:
        status = 408 if isinstance(error, Expired) else error.http_status
        if error.code == "bad_range":
            status = 416
        headers = (
            {hdrs.RETRY_AFTER: str(error.retry_after_s)} if isinstance(error, Unavailable) else None
        )
        return _settled(web.json_response(error.to_wire(), status=status, headers=headers))
    except (web.HTTPException, ConnectionError):
        raise
    except Exception:  # the server outlives any one request
        _LOG.exception("a blob request failed")
        fault = Unavailable("The blob server failed; the fault is in its log.")
        return _settled(web.json_response(fault.to_wire(), status=500))


def _settled(response: web.Response) -> web.Response:
    """Closes the connection after the answer: an unread body is dropped with it."""
    response.force_close()
    return response


def _asked_range(request: web.Request) -> tuple[int, int | None]:
    """Where the answer starts and how many bytes it has; None for all that follow.

    Raises:
        InvalidRequest: It is not a single range of bytes (code ``bad_range``).
    """
    asked = request.headers.get(hdrs.RANGE)
    if asked is None:
        return 0, None
    match = _RANGE.fullmatch(asked)
    start, last = (int(match[1]), match[2]) if match is not None else (0, "")
    if match is None or (last and int(last) < start):
        raise InvalidRequest(
            f"{asked[:80]!r} is not one range of bytes; ask for one at a time, like bytes=0-99.",
            code="bad_range",
        )
    return start, int(last) + 1 - start if last else None
