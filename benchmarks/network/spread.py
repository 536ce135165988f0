"""How fast a policy version of 20 MB reaches eight workers that pass it on to one another.

Each worker stands in a network namespace of its own, shaped to 20 Mbit/s up and 100 down; the
server has 100 Mbit/s up, and so has the mirror of the last run.  Needs root.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, cast

from benchmarks.network.parties import Party, lines, party, say, until_dismissed
from benchmarks.network.table import Finding, main_of, median

_WORKERS: Final = 8
_SIZE_BYTES: Final = 20_000_000
_SERVER_MBIT: Final = 100
_UP_MBIT: Final = 20
_DOWN_MBIT: Final = 100
_TIMEOUT_S: Final = 120.0
_WANTED: Final = 1 / 3
_P2P_PORT: Final = 4001
_BLOB_PORT: Final = 8700
_PEER_PORT: Final = 8701


def bound_s(num_servers: int) -> float:
    """No way of passing it on is faster: every copy goes up somebody's line once."""
    up_mbit = num_servers * _SERVER_MBIT + _WORKERS * _UP_MBIT
    return _WORKERS * _SIZE_BYTES * 8e-6 / up_mbit


def findings(*, quick: bool) -> Iterator[Finding]:
    """One server to each, then the swarm, then the swarm with a mirror; in one run."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    from netlab import why_not

    reason = why_not()
    if reason is not None:
        yield Finding(what="20 MB to 8 workers", measured=f"not measured: {reason}")
        return
    yield from asyncio.run(_measure(rounds=1 if quick else 3))


async def _measure(rounds: int) -> Iterable[Finding]:
    from netlab import NetLab

    with tempfile.TemporaryDirectory() as folder, NetLab() as lab:
        async with AsyncExitStack() as stack:
            servers = []
            for name in ("server", "mirror"):
                host = lab.host(name)
                host.shape(up_mbit=_SERVER_MBIT, down_mbit=1000)
                role = party(server, f"{folder}/{name}", host.ip, 3 * rounds, prefix=host.argv([]))
                servers.append((host.ip, await stack.enter_async_context(role)))
            said = json.loads(servers[0][1].ready)
            members = []
            for number in range(_WORKERS):
                host = lab.host(f"worker-{number}")
                host.shape(up_mbit=_UP_MBIT, down_mbit=_DOWN_MBIT)
                role = party(member, f"{folder}/{number}", said["address"], prefix=host.argv([]))
                members.append(await stack.enter_async_context(role))
            urls = [f"http://{ip}:{_BLOB_PORT}" for ip, _ in servers]
            refs = iter(said["refs"])
            times: dict[str, list[float]] = {"alone": [], "swarm": [], "mirror": []}
            for _ in range(rounds):
                times["alone"].append(await _spread(members, "alone", urls[:1], next(refs)))
                times["swarm"].append(await _spread(members, "swarm", urls[:1], next(refs)))
                times["mirror"].append(await _spread(members, "swarm", urls, next(refs)))
    return _judge(times)


def _judge(times: dict[str, list[float]]) -> list[Finding]:
    alone = median(times["alone"])
    found = [Finding(what="one server sends to each of 8", measured=f"{alone:.1f} s")]
    for what, key, num_servers in (
        ("passed on among the 8", "swarm", 1),
        ("passed on, and a mirror", "mirror", 2),
    ):
        took = median(times[key])
        bound = bound_s(num_servers)
        found.append(
            Finding(
                what=what,
                measured=f"{took:.1f} s, {took / alone:.2f} of that; lines allow "
                f"{bound:.1f} s ({bound / alone:.2f}), so {took / bound:.2f} of the bound",
                wanted="≤ 1/3 of one server",
                reached=took / alone <= _WANTED,
            )
        )
    return found


async def _spread(
    members: Sequence[Party], mode: str, urls: Sequence[str], ref: dict[str, Any]
) -> float:
    """Seconds until the last of all has the blob."""
    line = json.dumps({"mode": mode, "urls": urls, "ref": ref})
    loop = asyncio.get_running_loop()
    started = loop.time()
    answers = await asyncio.gather(*(one.ask(line, timeout_s=_TIMEOUT_S) for one in members))
    took = loop.time() - started
    if set(answers) != {"here"}:
        raise SystemExit(f"a worker did not get the blob: {answers}")
    return took


async def server(folder: str, ip: str, num_blobs: int) -> None:
    """Serves blobs over HTTP and answers who holds them; says its address and the blobs."""
    import numpy as np

    from shoal.network.blob_server import BlobServer
    from shoal.network.blob_store import BlobStore
    from shoal.network.identity import NodeIdentity
    from shoal.network.libp2p_node import Libp2pNode
    from shoal.orchestrator.deltas import PolicyDeltas
    from shoal.orchestrator.holders import HolderDesk
    from shoal.orchestrator.roster import Roster
    from shoal.protocol.clock import SystemTime

    store = BlobStore(Path(folder), 2 << 30)
    refs = [
        store.put_bytes(np.random.default_rng(seed).bytes(_SIZE_BYTES), pin=True).to_json()
        for seed in range(num_blobs)
    ]
    node = Libp2pNode(NodeIdentity.generate(), f"/ip4/{ip}/tcp/{_P2P_PORT}")
    everyone = SimpleNamespace(member=lambda peer: SimpleNamespace(account=peer))
    deltas = PolicyDeltas(store, node.meters, enabled=False)
    HolderDesk(node, SystemTime(), cast(Roster, everyone), deltas).serve()
    blobs = BlobServer(store, ip, _BLOB_PORT)
    await node.start()
    await blobs.start()
    say(json.dumps({"address": node.addresses[0], "refs": refs}))
    await until_dismissed()
    await blobs.stop()
    await node.stop()


async def member(folder: str, address: str) -> None:
    """A worker's blob plane; fetches what each line asks for, by itself or with the others."""
    from shoal.network.blob_client import BlobClient
    from shoal.network.blob_store import BlobStore
    from shoal.network.identity import NodeIdentity
    from shoal.network.libp2p_node import Libp2pNode
    from shoal.protocol.blob import BlobRef
    from shoal.worker.config import WorkerConfig
    from shoal.worker.plane import open_swarm
    from shoal.worker.session import Link

    node = Libp2pNode(NodeIdentity.generate())
    link = Link(node)
    config = WorkerConfig.model_validate(
        {
            "orchestrator": address,
            "data_dir": Path(folder),
            "blob_listen": f"0.0.0.0:{_PEER_PORT}",
        }
    )
    await node.start()
    alone = BlobStore(Path(folder) / "alone", 2 << 30)
    async with open_swarm(config, node, link) as swarm, BlobClient(alone) as client:
        await link.dial(address)
        link.mark_joined()
        say("ready")
        async for line in lines():
            asked = json.loads(line)
            fetch = swarm.fetch if asked["mode"] == "swarm" else client.fetch
            await fetch(BlobRef(**asked["ref"]), asked["urls"], timeout_s=_TIMEOUT_S)
            say("here")
    await node.stop()


if __name__ == "__main__":
    main_of(__doc__, findings)
