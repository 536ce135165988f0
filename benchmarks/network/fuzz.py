"""Malformed messages over sockets: what a flood of them costs a node and its honest peers.

``python -m benchmarks.network.fuzz [--quick]``; the same messages are read in process, 100,000
of each kind, by ``make test-slow``.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import trio

from benchmarks.network.parties import Party, lines, party, say, until_dismissed
from benchmarks.network.table import Finding, main_of, milliseconds, percentile
from shoal.network.bans import Bans
from shoal.network.blob_server import BlobServer
from shoal.network.blob_service import BlobService
from shoal.network.blob_store import BlobStore
from shoal.network.identity import NodeIdentity
from shoal.network.libp2p_node import Libp2pNode
from shoal.protocol.ids import PeerId
from shoal.protocol.node import HEARTBEAT_PROTOCOL

# The strangers and the well-formed messages that the tests use.
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from hostile import Attack, come_from, http_messages, pour_on, raw_messages
from wire_samples import Exchange, exchanges

SEED = int(os.environ.get("SHOAL_FUZZ_SEED", "5"))
BEAT_PAUSE_S = 0.02
PACE_S = 0.002
STRANGERS = "127.0.0.2"
LIMIT_GROWTH_MIB = 50
LIMIT_P99 = 2.0
BLOB = bytes(range(256)) * 256


async def target(is_banning: bool) -> None:
    """A node that reads every protocol as the real parties do, and a blob server.

    It may ban the strangers' address, as it would any but this machine's own; not banning, it
    stands for many strangers.  Says both addresses and the blob; to any line, what errors it has
    logged and whom it has banned or refused.
    """
    errors: list[str] = []
    _collect_errors(errors)
    with TemporaryDirectory(prefix="shoal-bench-") as name:
        store = BlobStore(Path(name), 1 << 30)
        shared = ("127.0.0.1/32",) if is_banning else ("127.0.0.0/8",)
        bans = Bans(time.monotonic, shared_addresses=shared)
        node = Libp2pNode(NodeIdentity.generate(), "/ip4/127.0.0.1/tcp/0", bans=bans)
        for protocol, exchange in exchanges().items():
            _serve(node, protocol, exchange)
        BlobService(store, node).start()
        server = BlobServer(store, "127.0.0.1", 0)
        await node.start()
        await server.start()
        say(json.dumps([node.addresses[0], server.url, store.put_bytes(BLOB).sha256]))
        async for _ in lines():
            say(json.dumps([errors[:5], _kept_out(node)]))
        await server.stop()
        await node.stop()


def _kept_out(node: Libp2pNode) -> dict[str, float]:
    counted: dict[str, float] = {}
    for sample in node.meters.snapshot():
        if sample.name in ("bans", "connections_refused"):
            counted[sample.name] = counted.get(sample.name, 0) + sample.value
    return counted


def _serve(node: Libp2pNode, protocol: str, exchange: Exchange) -> None:
    async def handler(_peer: PeerId, payload: bytes) -> bytes:
        exchange.request.decode(payload)
        return exchange.reply.valid[0] if exchange.reply else b""

    node.serve(protocol, handler)


def _collect_errors(errors: list[str]) -> None:
    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            errors.append(record.getMessage())

    logging.getLogger().addHandler(Collector(level=logging.ERROR))


async def strangers(address: str, count: int, seed: int) -> None:
    """`count` malformed messages of every kind are sent to the node; says how many in all."""
    come_from(STRANGERS)
    say("ready")
    attack = Attack(address, seed, pace_s=PACE_S, gives_up=True)
    await asyncio.to_thread(attack.run, count)
    say(attack.sent.total())
    await until_dismissed()


async def callers(port: int, url_port: int, digest: str, count: int, seed: int) -> None:
    """`count` malformed messages to each of the two ports; says how many in all."""
    come_from(STRANGERS)
    say("ready")
    sent = 0
    for aim, messages in ((port, raw_messages(seed)), (url_port, http_messages(digest, seed))):
        some = itertools.islice(messages, count)
        sent += await asyncio.to_thread(trio.run, _pour, aim, some)
    say(sent)
    await until_dismissed()


async def _pour(port: int, messages: Iterator[bytes]) -> int:
    return await pour_on(port, messages, pace_s=PACE_S)


async def beats_s(node: Libp2pNode, peer: PeerId, until: asyncio.Event) -> list[float]:
    """The seconds of an honest peer's heartbeats, one after another."""
    beat = exchanges()[HEARTBEAT_PROTOCOL].request.valid[0]
    taken = []
    while not until.is_set():
        begun_s = time.perf_counter()
        await node.request(peer, HEARTBEAT_PROTOCOL, beat, timeout_s=30)
        taken.append(time.perf_counter() - begun_s)
        await asyncio.sleep(BEAT_PAUSE_S)
    return taken


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a flood did."""

    sent: int
    growth_bytes: int
    quiet_s: list[float]
    flooded_s: list[float]
    errors: list[str]
    kept_out: dict[str, int]
    took_s: float


async def flood(count: int, quiet_for_s: float, *, is_banning: bool) -> Outcome:
    """`count` messages of every kind, with an honest peer beating before and meanwhile."""
    async with AsyncExitStack() as stack:
        victim = await stack.enter_async_context(party(target, is_banning))
        address, url, digest = json.loads(victim.ready)
        process = psutil.Process(victim.pid)
        honest = Libp2pNode(NodeIdentity.generate())
        await honest.start()
        stack.push_async_callback(honest.stop)
        peer = await honest.connect(address, timeout_s=30)
        over = asyncio.Event()
        asyncio.get_running_loop().call_later(quiet_for_s, over.set)
        quiet_s = await beats_s(honest, peer, over)
        await _send(address, url, digest, max(1, count // 20), SEED)
        before = process.memory_info().rss
        over = asyncio.Event()
        beating = asyncio.create_task(beats_s(honest, peer, over))
        begun_s = time.monotonic()
        sent = await _send(address, url, digest, count, SEED + 1)
        over.set()
        took_s = time.monotonic() - begun_s
        errors, kept_out = json.loads(await victim.ask("errors"))
        return Outcome(
            sent=sent,
            growth_bytes=process.memory_info().rss - before,
            quiet_s=quiet_s,
            flooded_s=await beating,
            errors=errors,
            kept_out=kept_out,
            took_s=took_s,
        )


async def _send(address: str, url: str, digest: str, count: int, seed: int) -> int:
    port, url_port = int(address.split("/")[4]), int(url.rpartition(":")[2])
    async with (
        party(strangers, address, count, seed) as libp2p,
        party(callers, port, url_port, digest, 10 * count, seed) as sockets,
    ):
        return sum(await asyncio.gather(_sent_by(libp2p), _sent_by(sockets)))


async def _sent_by(one: Party) -> int:
    return int(await one.ask("", timeout_s=3600))


def findings(*, quick: bool) -> Iterator[Finding]:
    """Memory, errors and an honest peer's heartbeats under malformed messages of every kind."""
    for is_banning in (True, False):
        flooding = flood(10 if quick else 400, 5.0 if quick else 30.0, is_banning=is_banning)
        yield from _told(asyncio.run(flooding), "" if is_banning else ", no address banned")


def _told(outcome: Outcome, under: str) -> Iterator[Finding]:
    growth_mib = outcome.growth_bytes / 2**20
    rate = outcome.sent / outcome.took_s
    yield Finding(
        what=f"memory after {outcome.sent:,} malformed messages (seed {SEED}){under}",
        measured=f"{growth_mib:+.1f} MiB; {rate:,.0f} messages/s, "
        f"{outcome.kept_out.get('bans', 0):,} bans, "
        f"{outcome.kept_out.get('connections_refused', 0):,} connections refused",
        wanted=f"≤ {LIMIT_GROWTH_MIB} MiB",
        reached=growth_mib <= LIMIT_GROWTH_MIB,
    )
    yield Finding(
        what=f"errors in the node's log{under}",
        measured="; ".join(outcome.errors) or "none",
        wanted="none",
        reached=not outcome.errors,
    )
    ratio = percentile(outcome.flooded_s, 0.99) / percentile(outcome.quiet_s, 0.99)
    yield Finding(
        what=f"an honest peer's heartbeat, quiet{under}", measured=milliseconds(outcome.quiet_s)
    )
    yield Finding(
        what=f"an honest peer's heartbeat, meanwhile{under}",
        measured=f"{milliseconds(outcome.flooded_s)}: p99 {ratio:.2f} times as long",
        wanted=f"≤ {LIMIT_P99:g} times",
        reached=ratio <= LIMIT_P99,
    )


if __name__ == "__main__":
    main_of(__doc__, findings)
