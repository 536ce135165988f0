"""Workers pass blobs on over real HTTP ports and real libp2p, on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np
import pytest
from swarm_lab import Origin, Sharer, open_origin, open_sharer

from shoal.network.discovery import Discovery
from shoal.network.identity import NodeIdentity
from shoal.network.libp2p_node import Libp2pNode
from shoal.protocol.blob import CHUNK_BYTES, BlobRef
from shoal.protocol.clock import SystemTime
from shoal.protocol.errors import Unavailable
from shoal.protocol.holders import HoldersReply, HoldersRequest
from shoal.protocol.ids import PeerId
from shoal.worker import swarm

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
HTTP = {"blob_listen": "127.0.0.1:0"}


class Loopback:
    """An orchestrator's side, and workers that join it one by one."""

    def __init__(self, folder: Path, stack: AsyncExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._num = 0
        self.origin: Origin

    async def start(self) -> None:
        node = Libp2pNode(NodeIdentity.generate(), LOOPBACK)
        await node.start()
        self._stack.push_async_callback(node.stop)
        self.origin = open_origin(node, self._folder / "origin")

    async def join(self, **settings: object) -> Sharer:
        """One more worker, on an HTTP port or, without one, at its node's address."""
        self._num += 1
        node = Libp2pNode(NodeIdentity.generate(), LOOPBACK)
        folder = self._folder / f"worker-{self._num}"
        sharer = open_sharer(node, folder, self.origin, **settings)
        return await self._stack.enter_async_context(sharer)

    async def until_held(self, ref: BlobRef) -> None:
        """Somebody is known to hold some of the blob."""
        request = HoldersRequest(sha256=ref.sha256).encode()
        async with asyncio.timeout(20):
            while True:
                reply = await self.origin.desk._holders(PeerId("nobody"), request)
                if HoldersReply.decode(reply).holders:
                    return
                await asyncio.sleep(0.05)


def told(folder: Path, story: Callable[[Loopback], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(90), AsyncExitStack() as stack:
            lab = Loopback(folder, stack)
            await lab.start()
            await story(lab)

    asyncio.run(main())


@pytest.mark.parametrize("settings", [HTTP, {}], ids=["http", "libp2p"])
def test_three_share_among_themselves_once_the_origin_has_gone(
    tmp_path: Path, settings: dict[str, object]
) -> None:
    async def story(lab: Loopback) -> None:
        data = np.random.default_rng(0).bytes(3 * CHUNK_BYTES + 7)
        ref = lab.origin.store.put_bytes(data)
        # Slow enough that the others still need each other while they hold some of it.
        first = await lab.join(upload_mbit=64, **settings)
        second, third = await lab.join(**settings), await lab.join(**settings)
        await first.fetch(ref, lab.origin.source)
        await lab.until_held(ref)
        lab.origin.store.delete(ref.sha256)
        paths = await asyncio.gather(
            second.fetch(ref, lab.origin.source), third.fetch(ref, lab.origin.source)
        )
        for path in paths:
            assert path.read_bytes() == data
        assert first.given_bytes() >= ref.size_bytes
        assert second.given_bytes() + third.given_bytes() > 0

    told(tmp_path, story)


def test_who_does_not_share_has_no_port(tmp_path: Path) -> None:
    async def story(lab: Loopback) -> None:
        data = np.random.default_rng(0).bytes(CHUNK_BYTES)
        ref = lab.origin.store.put_bytes(data)
        silent = await lab.join(share=False, **HTTP)
        sharing = await lab.join(**HTTP)
        for worker in (silent, sharing):
            assert (await worker.fetch(ref, lab.origin.source)).read_bytes() == data
        await lab.until_held(ref)
        request = HoldersRequest(sha256=ref.sha256).encode()
        reply = HoldersReply.decode(await lab.origin.desk._holders(PeerId("nobody"), request))
        assert [holder.peer for holder in reply.holders] == [sharing.network.peer_id]
        assert reply.holders[0].sources[0].startswith("http://127.0.0.1:")

    told(tmp_path, story)


def test_a_holder_the_orchestrator_forgot_is_found_in_the_table_of_providers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swarm, "LASTING_BYTES", 1 << 20)

    async def story(lab: Loopback) -> None:
        data = np.random.default_rng(0).bytes(CHUNK_BYTES + 7)
        ref = lab.origin.store.put_bytes(data)
        table = Discovery(lab.origin.network, time=SystemTime())
        await table.start()
        holder, seeker = await lab.join(), await lab.join()
        await holder.fetch(ref, lab.origin.source)
        async with asyncio.timeout(30):
            while not await table.find_providers(  # noqa: ASYNC110  # it tells nobody
                ref.sha256, timeout_s=1
            ):
                await asyncio.sleep(0.1)
        await lab.until_held(ref)
        lab.origin.store.delete(ref.sha256)
        # Without the table nobody is left to ask.
        alone = await lab.join(share=False)
        alone.swarm._discovery = None
        directory = lab.origin.desk._directory
        directory.withdraw(holder.network.peer_id)
        # Nor is it told again by the holder, which says every few seconds what it has.
        monkeypatch.setattr(directory, "announce", lambda *_, **__: None)
        with pytest.raises(Unavailable, match="No source"):
            await alone.fetch(ref, lab.origin.source)
        assert (await seeker.fetch(ref, lab.origin.source)).read_bytes() == data
        await table.stop()

    told(tmp_path, story)
