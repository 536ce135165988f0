"""A node's blobs over HTTP: anyone may read by digest, uploads need the owner's word."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import web

from shoal.network.blob_store import BlobStore, Draft, check_digest
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
_MAX_TOKEN_CHARS: Final = 4096
_STOP_TIMEOUT_S: Final = 1.0
_LINGER_S: Final = 2.0
_MAX_UPLOADS_AT_ONCE: Final = 32
# Blobs never change, so any cache may keep them for good (RFC 8246).
_CACHE_CONTROL: Final = "public, max-age=31536000, immutable"


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
    ) -> None:
        self._store = store
        self._host = host
        self._port = port
        self._authorise = authorise
        self._max_upload_bytes = max_upload_bytes
        self._upload_pause_s = upload_pause_s
        self._upload_timeout_s = upload_timeout_s
        self._runner: web.AppRunner | None = None
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
        application = web.Application(middlewares=[_errors_as_json])
        application.add_routes(self.routes())
        runner = web.AppRunner(
            application,
            access_log=None,
            handle_signals=False,
            shutdown_timeout=_STOP_TIMEOUT_S,
            lingering_time=_LINGER_S,
        )
        await runner.setup()
        site = web.TCPSite(runner, self._host, self._port, reuse_address=True)
        try:
            await site.start()
        except OSError as error:
            await runner.cleanup()
            raise InvalidRequest(
                f"Cannot serve blobs on {self._host}:{self._port}: "
                f"{(error.strerror or str(error)).lower()}; stop what holds it or choose "
                "another port.",
                code="address_unavailable",
            ) from error
        self._port = runner.addresses[0][1]
        self._runner = runner

    async def stop(self) -> None:
        """The port is free; a second call does nothing."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    def routes(self) -> list[web.RouteDef]:
        """The handlers, for an application that already has a port."""
        return [
            web.get("/blobs/{sha256}", self._get),
            web.put("/blobs/{sha256}", self._put),
        ]

    async def _get(self, request: web.Request) -> web.StreamResponse:
        path = self._store.path(check_digest(request.match_info["sha256"]))
        # FileResponse answers HEAD and byte ranges and copies with sendfile.
        return web.FileResponse(
            path,
            chunk_size=1 << 18,
            headers={
                "Content-Type": "application/octet-stream",
                "Cache-Control": _CACHE_CONTROL,
            },
        )

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
        return _settled(web.json_response(error.to_wire(), status=status))
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
