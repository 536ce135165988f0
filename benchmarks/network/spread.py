"""How fast a policy version of 20 MB reaches eight workers that pass it on to one another.

Each worker stands in a network namespace of its own, shaped to 20 Mbit/s up and 100 down; the
server has 100 Mbit/s up, and so has the mirror of the third run.  Needs root.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, cast

from benchmarks.network.deltas import built_policy, train_versions
from benchmarks.network.parties import Party, lines, party, say
from benchmarks.network.table import Finding, main_of, median
from shoal.protocol.learning import LoraSpec

if TYPE_CHECKING:
    from netlab import Host

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
_RATE: Final = 1e-4
_LORA: Final = LoraSpec(r=64)
# With them the adapter has 5.0 million numbers.
_HIDDEN, _INTERMEDIATE, _LAYERS, _HEADS = 512, 1376, 8, 8


def bound_s(num_servers: int, size_bytes: int = _SIZE_BYTES) -> float:
    """No way of passing it on is faster: every copy goes up somebody's line once."""
    up_mbit = num_servers * _SERVER_MBIT + _WORKERS * _UP_MBIT
    return _WORKERS * size_bytes * 8e-6 / up_mbit


@dataclass(frozen=True, kw_only=True)
class Run:
    """One spread, from its beginning until the last of all has the blob.

    Attributes:
        took_s: The seconds.
        up_share: How much of what the workers' lines could carry up was used, on average.
        size_bytes: What travelled to each: the blob, or the delta to it.
    """

    took_s: float
    up_share: float
    size_bytes: int


def findings(*, quick: bool) -> Iterator[Finding]:
    """One server to each, then the swarm, then a mirror as well, then a delta; in one run."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    from netlab import why_not

    reason = why_not()
    if reason is not None:
        yield Finding(what="20 MB to 8 workers", measured=f"not measured: {reason}")
        return
    yield from asyncio.run(_measure(rounds=1 if quick else 3))


async def _measure(rounds: int) -> Iterable[Finding]:
    from netlab import NetLab

    runs: dict[str, list[Run]] = {"alone": [], "swarm": [], "mirror": [], "delta": []}
    with tempfile.TemporaryDirectory() as folder, NetLab() as lab:
        async with AsyncExitStack() as stack:
            servers = []
            for name in ("server", "mirror"):
                host = lab.host(name)
                host.shape(up_mbit=_SERVER_MBIT, down_mbit=1000)
                num_versions = rounds + 1 if name == "server" else 0
                asked = (f"{folder}/{name}", host.ip, 3 * rounds, num_versions)
                one = party(server, *asked, prefix=host.argv([]))
                servers.append((host.ip, await stack.enter_async_context(one)))
            said = json.loads(servers[0][1].ready)
            members = []
            for number in range(_WORKERS):
                host = lab.host(f"worker-{number}")
                host.shape(up_mbit=_UP_MBIT, down_mbit=_DOWN_MBIT)
                role = party(member, f"{folder}/{number}", said["address"], prefix=host.argv([]))
                members.append((host, await stack.enter_async_context(role)))
            urls = [f"http://{ip}:{_BLOB_PORT}" for ip, _ in servers]
            refs, versions = iter(said["refs"]), iter(said["versions"])
            await _spread(members, "swarm", urls[:1], next(versions))
            for _ in range(rounds):
                runs["alone"].append(await _spread(members, "alone", urls[:1], next(refs)))
                runs["swarm"].append(await _spread(members, "swarm", urls[:1], next(refs)))
                runs["mirror"].append(await _spread(members, "swarm", urls, next(refs)))
                publisher = servers[0][1]
                runs["delta"].append(
                    await _spread(members, "swarm", urls[:1], next(versions), publisher)
                )
    return _judge(runs)


def _judge(runs: dict[str, list[Run]]) -> list[Finding]:
    alone = median([run.took_s for run in runs["alone"]])
    found = [Finding(what="one server sends to each of 8", measured=f"{alone:.1f} s")]
    for what, key, num_servers in (
        ("passed on among the 8", "swarm", 1),
        ("passed on, and a mirror", "mirror", 2),
        ("the next version, to 8 who hold the one before", "delta", 1),
    ):
        took = median([run.took_s for run in runs[key]])
        size_bytes = round(median([run.size_bytes for run in runs[key]]))
        up_share = median([run.up_share for run in runs[key]])
        bound = bound_s(num_servers, size_bytes)
        found.append(
            Finding(
                what=what,
                measured=f"{took:.1f} s, {took / alone:.2f} of that; lines allow "
                f"{bound:.1f} s ({bound / alone:.2f}) for {size_bytes / 1e6:.1f} MB to each, so "
                f"{took / bound:.2f} of the bound; {up_share:.0%} of the workers' lines up in use",
                wanted="≤ 1/3 of one server",
                reached=took / alone <= _WANTED,
            )
        )
    return found


async def _spread(
    members: Sequence[tuple[Host, Party]],
    mode: str,
    urls: Sequence[str],
    ref: dict[str, Any],
    publisher: Party | None = None,
) -> Run:
    """The blob is with all; with a ``publisher``, as the version after the one they hold."""
    line = json.dumps({"mode": mode, "urls": urls, "ref": ref})
    loop = asyncio.get_running_loop()
    before_bytes = sum(_sent_bytes(host) for host, _ in members)
    started = loop.time()
    if publisher is not None:
        await publisher.ask("follow", timeout_s=_TIMEOUT_S)
    answers = await asyncio.gather(*(one.ask(line, timeout_s=_TIMEOUT_S) for _, one in members))
    took_s = loop.time() - started
    if set(answers) != {"here"}:
        raise SystemExit(f"a worker did not get the blob: {answers}")
    up_bytes = sum(_sent_bytes(host) for host, _ in members) - before_bytes
    size_bytes = ref["size_bytes"]
    if publisher is not None:
        size_bytes = int(await publisher.ask("size", timeout_s=_TIMEOUT_S))
    return Run(
        took_s=took_s,
        up_share=up_bytes * 8e-6 / (_WORKERS * _UP_MBIT * took_s),
        size_bytes=size_bytes,
    )


def _sent_bytes(host: Host) -> int:
    """What has left the host by all of its devices but itself."""
    links = json.loads(host.run(["ip", "-s", "-j", "link"]).stdout)
    return sum(link["stats64"]["tx"]["bytes"] for link in links if link["ifname"] != "lo")


async def server(folder: str, ip: str, num_blobs: int, num_versions: int) -> None:
    """Serves blobs over HTTP and answers who holds them; says its address and the blobs.

    Asked to ``follow``, it publishes the next version; asked for the ``size``, it says how large
    the delta to it was.
    """
    import numpy as np

    from shoal.network.blob_server import BlobServer
    from shoal.network.blob_store import BlobStore
    from shoal.network.identity import NodeIdentity
    from shoal.network.libp2p_node import Libp2pNode
    from shoal.orchestrator.deltas import PolicyDeltas
    from shoal.orchestrator.holders import HolderDesk
    from shoal.orchestrator.roster import Roster
    from shoal.protocol.clock import SystemTime
    from shoal.protocol.policy import PolicyVersion

    store = BlobStore(Path(folder), 2 << 30)
    blobs = [np.random.default_rng(seed).bytes(_SIZE_BYTES) for seed in range(num_blobs)]
    refs = [store.put_bytes(blob, pin=True) for blob in blobs]
    adapters = [store.put_bytes(version, pin=True) for version in _versions(num_versions)]
    versions = [
        PolicyVersion(job_id="0x" + "a" * 64, version=n, base_sha256="0" * 64, adapter=adapter)
        for n, adapter in enumerate(adapters)
    ]
    node = Libp2pNode(NodeIdentity.generate(), f"/ip4/{ip}/tcp/{_P2P_PORT}")
    everyone = SimpleNamespace(member=lambda peer: SimpleNamespace(account=peer))
    deltas = PolicyDeltas(store, node.meters, enabled=True)
    HolderDesk(node, SystemTime(), cast(Roster, everyone), deltas).serve()
    holder = BlobServer(store, ip, _BLOB_PORT)
    await node.start()
    await holder.start()
    said = {"refs": refs, "versions": adapters}
    shown = {name: [ref.to_json() for ref in found] for name, found in said.items()}
    say(json.dumps({"address": node.addresses[0], **shown}))
    steps = iter(itertools.pairwise(versions))
    async for asked in lines():
        if asked == "follow":
            before, after = next(steps)
            deltas.follow(before, after)
            say("published")
        else:
            step, *_ = await deltas.leading_to(after.adapter.sha256)
            say(step.blob.size_bytes)
    await deltas.close()
    await holder.stop()
    await node.stop()


def _versions(count: int) -> Iterator[bytes]:
    """Consecutive adapters of 20 MB from training at a rate of 1e-4."""
    from shoal.models.tiny import build_model, build_tokenizer

    if not count:
        return
    small = build_model(0, len(build_tokenizer()))
    small.config.update(
        {
            "hidden_size": _HIDDEN,
            "intermediate_size": _INTERMEDIATE,
            "num_hidden_layers": _LAYERS,
            "num_attention_heads": _HEADS,
            "num_key_value_heads": _HEADS,
            "head_dim": _HIDDEN // _HEADS,
        }
    )
    yield from train_versions(built_policy(type(small)(small.config), _LORA), _RATE, count)


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
