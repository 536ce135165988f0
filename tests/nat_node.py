"""A node in a namespace of its own, told what to do line by line; run as a program.

``python nat_node.py FOLDER relay [RATE]`` listens and relays, so many bytes a second;
``... worker ADDRESS [punch]`` dials the relay there.  Each line on stdin is a JSON list, a command
and its arguments; each is answered by one JSON line, ``{"ok": …}`` or ``{"error": code}``.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from shoal.network.blob_client import BlobClient
from shoal.network.blob_service import BlobService
from shoal.network.blob_store import BlobStore
from shoal.network.identity import NodeIdentity
from shoal.network.libp2p_circuit import RelayClient
from shoal.network.libp2p_extension import Extension
from shoal.network.libp2p_node import Libp2pNode
from shoal.network.libp2p_relay import RelayLimits, RelayServer
from shoal.protocol.blob import BlobRef
from shoal.protocol.errors import ShoalError
from shoal.protocol.ids import PeerId

RELAY_PORT = 4001
TIMEOUT_S = 40.0


class NatNode:
    """One node with its blobs, and the commands it knows."""

    def __init__(self, node: Libp2pNode, store: BlobStore, client: BlobClient) -> None:
        self._node = node
        self._store = store
        self._client = client

    async def do_add(self, text: str, times: int) -> list[str | int | None]:
        """A blob of a repeated text is held here; what names it."""
        ref = await asyncio.to_thread(self._store.put_bytes, text.encode() * times)
        return [ref.sha256, ref.size_bytes, ref.chunks_sha256]

    async def do_fetch(self, named: list[str | int | None], *sources: str) -> int:
        """The blob is here, its digest checked; its size."""
        names = ("sha256", "size_bytes", "chunks_sha256")
        ref = BlobRef.model_validate(dict(zip(names, named, strict=True)))
        path = await self._client.fetch(ref, sources, timeout_s=TIMEOUT_S)
        return path.stat().st_size

    async def do_reach(self, peer: str) -> str:
        """How the peer was reached."""
        return str(await self._node.reach(PeerId(peer), timeout_s=TIMEOUT_S))

    async def do_meter(self, name: str) -> float:
        """The sum of a counter over its labels."""
        return sum(s.value for s in self._node.meters.snapshot() if s.name == name)

    async def do_ask(self, peer: str, protocol: str) -> str:
        """What the peer answers on a protocol."""
        answer = await self._node.request(PeerId(peer), protocol, b"", timeout_s=TIMEOUT_S)
        return answer.decode()


async def own(_peer: PeerId, _payload: bytes) -> bytes:
    return b"for the orchestrator only"


async def main() -> None:
    folder, role, *rest = sys.argv[1:]
    extensions: list[Extension] = []
    listen = None
    if role == "relay":
        listen = f"/ip4/0.0.0.0/tcp/{RELAY_PORT}"
        rate = int(rest[0]) if rest else RelayLimits().bytes_per_s
        extensions.append(RelayServer(RelayLimits(bytes_per_s=rate)))
    else:
        extensions.append(RelayClient(punches="punch" in rest, punch_again_s=2.0))
    identity = NodeIdentity.load_or_create(Path(folder) / "node.key")
    node = Libp2pNode(identity, listen, extensions=extensions)
    store = BlobStore(Path(folder) / "blobs", 1 << 30)
    BlobService(store, node).start()
    node.serve("/test/own/1", own)
    await node.start()
    async with BlobClient(store, node) as client:
        if role == "worker":
            await node.connect(rest[0], timeout_s=TIMEOUT_S)
        sys.stdout.write(f"{node.peer_id}\n")
        sys.stdout.flush()
        await obey(NatNode(node, store, client))
    await node.stop()


async def obey(node: NatNode) -> None:
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command, *arguments = json.loads(line)
        try:
            answer = {"ok": await getattr(node, f"do_{command}")(*arguments)}
        except ShoalError as error:
            answer = {"error": error.code}
        sys.stdout.write(f"{json.dumps(answer)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main())
