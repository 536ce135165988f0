"""py-libp2p with nothing of Shoal around it: Noise, Yamux, one stream.

Shoal mends the library for the whole process it runs in, so what is to be bare runs in a party.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio
from libp2p import new_host
from libp2p.abc import IHost, INetStream
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.custom_types import TProtocol
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_ID
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX_ID
from libp2p.stream_muxer.yamux.yamux import Yamux
from multiaddr import Multiaddr

from benchmarks.network.parties import say, until_dismissed

POUR = TProtocol("/bare/pour/1")
ECHO = TProtocol("/bare/echo/1")
REQUEST_BYTES = 4096
REPLY_BYTES = 64
_WRITE_BYTES = 1 << 20
_READ_BYTES = 1 << 18
T = TypeVar("T")


def bare_host() -> IHost:
    """A host that speaks what Shoal's speaks."""
    keys = create_new_key_pair()
    noise = NoiseTransport(keys, noise_privkey=create_noise_key_pair().private_key)
    return new_host(
        key_pair=keys,
        sec_opt={NOISE_ID: noise},
        muxer_opt={TProtocol(YAMUX_ID): Yamux},
        disable_identify_address_discovery=True,
    )


async def server(size_bytes: int) -> None:
    """See `serving`; the library is as it came."""
    _require_bare()
    await serving(size_bytes)


async def poured(address: str, size_bytes: int) -> None:
    """Says in how many seconds one stream from `address` brings `size_bytes`."""
    _require_bare()
    say(await asyncio.to_thread(pour_s, address, size_bytes))
    await until_dismissed()


def _require_bare() -> None:
    if "shoal.network.libp2p_host" in sys.modules:
        raise RuntimeError("this process has Shoal's host in it; start a party for what is bare")


async def serving(size_bytes: int) -> None:
    """Pours `size_bytes` into each stream of `POUR` and answers `ECHO`; says its address."""
    token: list[trio.lowlevel.TrioToken] = []
    stop = trio.Event()

    async def pour(stream: INetStream) -> None:
        block = bytes(_WRITE_BYTES)
        for _ in range(size_bytes // _WRITE_BYTES):
            await stream.write(block)
        await stream.close()

    async def echo(stream: INetStream) -> None:
        while await _read(stream, REQUEST_BYTES):
            await stream.write(bytes(REPLY_BYTES))

    async def run() -> None:
        host = bare_host()
        async with host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]):
            host.set_stream_handler(POUR, pour)
            host.set_stream_handler(ECHO, echo)
            token.append(trio.lowlevel.current_trio_token())
            say(host.get_addrs()[0])
            await stop.wait()

    running = asyncio.create_task(asyncio.to_thread(trio.run, run))
    await until_dismissed()
    token[0].run_sync_soon(stop.set)
    await asyncio.wait_for(running, 10)


def pour_s(address: str, size_bytes: int) -> float:
    """The seconds in which one stream from `address` brings `size_bytes`."""

    async def receive(stream: INetStream) -> float:
        begun_s = time.perf_counter()
        left = size_bytes
        while left:
            left -= len(await stream.read(min(_READ_BYTES, left)))
        return time.perf_counter() - begun_s

    taken_s: float = trio.run(_with_stream, address, POUR, receive)
    return taken_s


def echoes_s(address: str, count: int) -> list[float]:
    """The seconds of each of `count` round trips on one open stream."""

    async def ask(stream: INetStream) -> list[float]:
        taken = []
        for _ in range(count):
            begun_s = time.perf_counter()
            await stream.write(bytes(REQUEST_BYTES))
            await _read(stream, REPLY_BYTES)
            taken.append(time.perf_counter() - begun_s)
        return taken

    return trio.run(_with_stream, address, ECHO, ask)


async def _with_stream(
    address: str, protocol: TProtocol, use: Callable[[INetStream], Awaitable[T]]
) -> T:
    host = bare_host()
    async with host.run(listen_addrs=[]):
        peer = info_from_p2p_addr(Multiaddr(address))
        await host.connect(peer)
        result = await use(await host.new_stream(peer.peer_id, [protocol]))
        await host.disconnect(peer.peer_id)
        return result


async def _read(stream: INetStream, num_bytes: int) -> bytes:
    got = b""
    while len(got) < num_bytes:
        part = await stream.read(num_bytes - len(got))
        if not part:
            break
        got += part
    return got
