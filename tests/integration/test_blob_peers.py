"""Blobs from holders that have only a part, over HTTP and over the node's own connection."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from pathlib import Path

import pytest
from blob_holders import ROOM, holder, liar, range_of, reply, served
from libp2p_strangers import started

from shoal.network.blob_chunks import BLOB_PROTOCOL, Span, encode_span
from shoal.network.blob_client import BlobClient
from shoal.network.blob_gate import UploadGate
from shoal.network.blob_parts import PartialBlob
from shoal.network.blob_service import BlobService
from shoal.network.blob_sources import Holder
from shoal.network.blob_store import BlobStore
from shoal.network.blob_transfer import FetchRules
from shoal.network.identity import NodeIdentity
from shoal.network.libp2p_node import Libp2pNode
from shoal.network.memory import MemoryHub, MemoryNetwork
from shoal.protocol.blob import CHUNK_BYTES, BlobRef
from shoal.protocol.errors import InvalidRequest, NotFound, Unavailable

BIG = os.urandom(1 << 20) * 9 + b"tail"
QUICK = FetchRules(poll_s=0.05, stall_s=1.0)


def run(main: Coroutine[object, object, None]) -> None:
    asyncio.run(main)


def memory_nodes(number: int) -> list[MemoryNetwork]:
    hub = MemoryHub()
    return [MemoryNetwork(hub, NodeIdentity.generate()) for _ in range(number)]


def hold_part(store: BlobStore, ref: BlobRef, chunk_list: bytes, chunks: set[int]) -> None:
    """The store holds those chunks of `BIG`, as after a fetch that was broken off."""
    assert store.put_bytes(chunk_list).sha256 == ref.chunks_sha256
    with PartialBlob(store, ref, chunk_list) as blob:
        for index in chunks:
            assert blob.accept(index, BIG[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES])


def test_peer_serves_over_its_own_connection(tmp_path: Path) -> None:
    async def main() -> None:
        a, b = (
            Libp2pNode(NodeIdentity.generate(), "/ip4/127.0.0.1/tcp/0"),
            Libp2pNode(NodeIdentity.generate()),
        )
        held = BlobStore(tmp_path / "a", ROOM)
        ref, small = held.put_bytes(BIG), held.put_bytes(b"adapter")
        gate = UploadGate()
        BlobService(held, a, gate).start()
        async with started(a, b), BlobClient(BlobStore(tmp_path / "b", ROOM), b) as client:
            # The first dials; then the peer is known by its id alone.
            assert await client.fetch_bytes(small, [a.addresses[0]], timeout_s=30) == b"adapter"
            path = await client.fetch(ref, [f"/p2p/{a.peer_id}"], timeout_s=60)
            assert path.read_bytes() == BIG
            assert gate.meters.value("blob_bytes", plane="p2p", direction="out") >= len(BIG)
            assert b.meters.value("blob_bytes", plane="p2p", direction="in") >= len(BIG)

    run(main())


def test_holders_of_parts_complete_each_other(tmp_path: Path) -> None:
    """One over HTTP and one over the node's connection, neither with all of it."""

    async def main() -> None:
        source = BlobStore(tmp_path / "source", ROOM)
        ref = source.put_bytes(BIG)
        assert ref.chunks_sha256 is not None
        chunk_list = source.read(ref.chunks_sha256)
        first, second = BlobStore(tmp_path / "1", ROOM), BlobStore(tmp_path / "2", ROOM)
        hold_part(first, ref, chunk_list, {0, 2})
        hold_part(second, ref, chunk_list, {1})
        a, b = memory_nodes(2)
        BlobService(second, a).start()
        async with started(a, b), served(first) as url:
            peer = f"/memory/1/p2p/{a.peer_id}"
            for number, chunks in enumerate(((frozenset({0, 2}), frozenset({1})), (None, None))):
                store = BlobStore(tmp_path / f"to-{number}", ROOM)
                here: list[int] = []
                async with BlobClient(store, b, rules=QUICK) as client:
                    path = await client.fetch(
                        ref,
                        [Holder(url, chunks[0], allow_private=True), Holder(peer, chunks[1])],
                        timeout_s=30,
                        on_chunk=here.append,
                    )
                assert path.read_bytes() == BIG
                assert sorted(here) == [0, 1, 2]
            # Control: one of them alone has not got it all.
            async with BlobClient(BlobStore(tmp_path / "x", ROOM), b, rules=QUICK) as client:
                with pytest.raises(Unavailable, match="lacks chunks"):
                    await client.fetch(ref, [url], timeout_s=30)

    run(main())


def test_chunk_is_passed_on_while_the_rest_is_still_coming(tmp_path: Path) -> None:
    async def main() -> None:
        async with holder(tmp_path / "a") as (good, _):
            ref = good.put_bytes(BIG)
            assert ref.chunks_sha256 is not None
            chunk_list = good.read(ref.chunks_sha256)
            go_on = asyncio.Event()
            asked: list[int] = []  # the first chunk asked for is the one that comes at once

            async def origin(request: str, writer: asyncio.StreamWriter) -> None:
                if ref.chunks_sha256 is not None and ref.chunks_sha256 in request:
                    writer.write(reply("200 OK", chunk_list))
                else:
                    start, end = range_of(request)
                    asked.append(start // CHUNK_BYTES)
                    if asked[-1] != asked[0]:
                        await go_on.wait()
                    writer.write(reply("206 Partial Content", BIG[start:end]))
                await writer.drain()

            middle, last = BlobStore(tmp_path / "m", ROOM), BlobStore(tmp_path / "l", ROOM)
            first_chunk = asyncio.Event()
            passed_on: list[int] = []

            def on_chunk(index: int) -> None:
                first_chunk.set()

            def on_passed_on(index: int) -> None:
                passed_on.append(index)
                go_on.set()  # only now does the origin give the rest

            async with (
                liar(origin) as (_, origin_url),
                served(middle) as middle_url,
                BlobClient(middle, rules=QUICK) as one,
                BlobClient(last, rules=FetchRules(stall_s=20)) as other,
            ):
                coming = asyncio.ensure_future(
                    one.fetch(ref, [origin_url], timeout_s=30, on_chunk=on_chunk)
                )
                await asyncio.wait_for(first_chunk.wait(), 20)
                assert middle.partials() == (ref.sha256,)
                path = await other.fetch(ref, [middle_url], timeout_s=30, on_chunk=on_passed_on)
                assert passed_on[0] == asked[0]
                assert path.read_bytes() == (await coming).read_bytes() == BIG
            assert middle.held_chunks(ref.sha256) == frozenset({0, 1, 2})

    run(main())


def test_holder_that_turns_up_later_is_asked(tmp_path: Path) -> None:
    async def main() -> None:
        async with holder(tmp_path / "a") as (good, url):
            ref = good.put_bytes(BIG)
            polls = 0

            async def more() -> list[str | Holder]:
                nonlocal polls
                polls += 1
                if polls == 1:
                    raise Unavailable("The orchestrator is away.")
                return [url] if polls > 2 else []

            a, b = memory_nodes(2)
            BlobService(BlobStore(tmp_path / "empty", ROOM), a).start()
            async with started(a, b):
                store = BlobStore(tmp_path / "b", ROOM)
                assert ref.chunks_sha256 is not None
                store.put_bytes(good.read(ref.chunks_sha256))
                async with BlobClient(store, b, rules=FetchRules(poll_s=0.05)) as client:
                    path = await client.fetch(
                        ref,
                        [Holder(f"/memory/1/p2p/{a.peer_id}", frozenset())],
                        timeout_s=30,
                        more_sources=more,
                    )
            assert path.read_bytes() == BIG
            assert polls >= 3

    run(main())


def test_requests_that_are_none_are_refused(tmp_path: Path) -> None:
    async def main() -> None:
        held = BlobStore(tmp_path / "a", ROOM)
        ref = held.put_bytes(BIG)
        a, b = memory_nodes(2)
        BlobService(held, a).start()

        async def ask(payload: bytes) -> bytes:
            return await b.request(a.peer_id, BLOB_PROTOCOL, payload, timeout_s=10)

        def span(start: int, size_bytes: int, digest: str = ref.sha256) -> bytes:
            return encode_span(Span(digest=digest, start=start, size_bytes=size_bytes))

        async with started(a, b):
            await b.connect(a.addresses[0], timeout_s=5)
            for payload in (b"", b"x" * 43, b"x" * 45, span(0, CHUNK_BYTES + 1), span(len(BIG), 1)):
                with pytest.raises(InvalidRequest):
                    await ask(payload)
            for start in (1 << 63, 2**64 - 1):
                with pytest.raises(InvalidRequest):
                    await ask(span(start, 1))
            with pytest.raises(NotFound):
                await ask(span(0, 1, "a" * 64))
            assert await ask(span(len(BIG) - 4, 4)) == b"tail"

    run(main())


def test_source_that_cannot_be_reached_is_said_by_name(tmp_path: Path) -> None:
    async def main() -> None:
        ref = BlobRef(sha256="a" * 64, size_bytes=10)
        a, b = memory_nodes(2)
        async with started(b):
            peer = f"/memory/1/p2p/{a.peer_id}"
            async with BlobClient(BlobStore(tmp_path / "b", ROOM), b) as client:
                with pytest.raises(Unavailable, match="Nobody answers as peer"):
                    await client.fetch(ref, [peer], timeout_s=10)
                for name, word in (
                    ("/ip4/1.2.3.4/tcp/1", "/p2p/"),
                    ("ftp://x/", "not the address"),
                ):
                    with pytest.raises(Unavailable, match=word):
                        await client.fetch(ref, [name], timeout_s=10)
            async with BlobClient(BlobStore(tmp_path / "c", ROOM)) as client:
                with pytest.raises(Unavailable, match="no network"):
                    await client.fetch(ref, [peer], timeout_s=10)

    run(main())
