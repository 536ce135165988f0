"""Holders for blob tests: honest ones on loopback, and raw HTTP ones that answer anything."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from shoal.network.blob_gate import UploadGate
from shoal.network.blob_server import BlobServer
from shoal.network.blob_store import BlobStore
from shoal.protocol.errors import Unauthorised

ROOM = 256 << 20
Respond = Callable[[str, asyncio.StreamWriter], Awaitable[None]]


async def allow(token: str, _digest: str, _size_bytes: int) -> None:
    """Only the token ``good`` may upload."""
    if token != "good":
        raise Unauthorised("This token is not for this upload.")


@asynccontextmanager
async def holder(
    directory: Path,
    *,
    upload_pause_s: float = 5,
    max_upload_bytes: int = 64 << 20,
    gate: UploadGate | None = None,
) -> AsyncIterator[tuple[BlobStore, str]]:
    """A store served on loopback, and its address."""
    store = BlobStore(directory, ROOM)
    async with served(
        store, upload_pause_s=upload_pause_s, max_upload_bytes=max_upload_bytes, gate=gate
    ) as url:
        yield store, url


@asynccontextmanager
async def served(
    store: BlobStore,
    *,
    upload_pause_s: float = 5,
    max_upload_bytes: int = 64 << 20,
    gate: UploadGate | None = None,
) -> AsyncIterator[str]:
    """The address at which the store is served."""
    server = BlobServer(
        store,
        "127.0.0.1",
        0,
        authorise=allow,
        upload_pause_s=upload_pause_s,
        max_upload_bytes=max_upload_bytes,
        gate=gate,
    )
    await server.start()
    try:
        yield server.url
    finally:
        await server.stop()


@asynccontextmanager
async def liar(respond: Respond) -> AsyncIterator[tuple[list[str], str]]:
    """A raw HTTP holder that answers whatever `respond` writes; the requests it saw."""
    seen: list[str] = []
    tasks: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            request = (await reader.readuntil(b"\r\n\r\n")).decode()
            seen.append(request)
            await respond(request, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield seen, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def range_of(request: str) -> tuple[int, int]:
    """The first byte a raw request asks for, and the one past the last."""
    first, last = request.split("bytes=")[1].split("\r\n")[0].split("-")
    return int(first), int(last) + 1


def reply(status: str, body: bytes, *headers: str) -> bytes:
    """A raw HTTP answer that ends its connection."""
    lines = (f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers)
    return "\r\n".join((*lines, "", "")).encode() + body
