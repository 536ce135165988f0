"""Who stands at the other end: small programs, each in a process of its own.

A party prints one line as soon as it is ready (where it can be reached, or nothing more than
that it is there) and runs until its standard input ends, so none outlives the benchmark.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import resource
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from shoal.network.blob_server import BlobServer
from shoal.network.blob_store import BlobStore

_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 20.0
_MAX_LINE_BYTES = 16 << 20


class Party:
    """A running child: its first line, and lines asked of it later."""

    def __init__(self, process: asyncio.subprocess.Process, ready: str) -> None:
        self._process = process
        self.ready = ready
        self.pid = process.pid

    async def ask(self, line: str, *, timeout_s: float = 60.0) -> str:
        """The party's answer to `line`."""
        reader, writer = self._process.stdout, self._process.stdin
        if reader is None or writer is None:
            raise RuntimeError("a party is started with pipes")
        writer.write(line.encode() + b"\n")
        return (await asyncio.wait_for(reader.readline(), timeout_s)).decode().strip()


@asynccontextmanager
async def party(
    role: Callable[..., Awaitable[None]], *arguments: object, prefix: Sequence[str] = ()
) -> AsyncIterator[Party]:
    """`role` runs in a child process (under the command `prefix`) until the block is left.

    `role` is named by its module and name, so it must be a module's own function; arguments
    must be JSON values.
    """
    module = role.__module__
    if module == "__main__":
        # A benchmark that is run by itself; its child imports it by its real name.
        module = f"benchmarks.network.{Path(sys.argv[0]).stem}"
    command = [sys.executable, "-m", "benchmarks.network.parties", module, role.__name__]
    process = await asyncio.create_subprocess_exec(
        *prefix,
        *command,
        json.dumps(arguments, default=str),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=_MAX_LINE_BYTES,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        if process.stdout is None or process.stdin is None:
            raise RuntimeError("a party is started with pipes")
        line = await asyncio.wait_for(process.stdout.readline(), _START_TIMEOUT_S)
        if not line:
            raise RuntimeError(f"the party {role.__name__} died before it was ready")
        yield Party(process, line.decode().strip())
    finally:
        if process.stdin is not None:
            process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), _STOP_TIMEOUT_S)
        except TimeoutError:
            process.kill()
            await process.wait()


def say(line: object) -> None:
    """The line reaches whoever started this party."""
    print(line, flush=True)


async def lines() -> AsyncIterator[str]:
    """What the starter asks, until it wants no more."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        yield line.decode().strip()


async def until_dismissed() -> None:
    """Standard input has ended."""
    async for _ in lines():
        pass


async def http_seeder(directory: str, host: str = "127.0.0.1", port: int = 0) -> None:
    """Serves the blobs in `directory` over HTTP; says its base address."""
    server = BlobServer(BlobStore(Path(directory), 8 << 30), host, port)
    await server.start()
    say(server.url)
    await until_dismissed()
    await server.stop()


async def bare_http(file: str) -> None:
    """Serves one file by aiohttp alone; says its address."""

    async def send(_request: web.Request) -> web.StreamResponse:
        return web.FileResponse(file)

    application = web.Application()
    application.add_routes([web.get("/", send)])
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    say(f"http://127.0.0.1:{runner.addresses[0][1]}/")
    await until_dismissed()
    await runner.cleanup()


async def tcp_echo() -> None:
    """Answers each line of 4 KiB with 64 bytes, over asyncio's TCP; says its port."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.readexactly(4096):
                writer.write(bytes(64))
        except asyncio.IncompleteReadError:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    say(server.sockets[0].getsockname()[1])
    await until_dismissed()
    server.close()


def allow_many_files() -> None:
    """This process may open as many files as the system lets it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _main() -> None:
    module, name, arguments = sys.argv[1:]
    role: Callable[..., Any] = getattr(importlib.import_module(module), name)
    allow_many_files()
    asyncio.run(role(*json.loads(arguments)))


if __name__ == "__main__":
    _main()
