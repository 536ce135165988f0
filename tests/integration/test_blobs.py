"""Blobs over real HTTP: honest transfers, lying holders, uploads nobody asked for."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path

import aiohttp
import pytest
from blob_holders import ROOM, Respond, holder, liar, range_of, reply

from shoal.network import blob_client
from shoal.network.blob_client import BlobClient
from shoal.network.blob_server import BlobServer
from shoal.network.blob_store import BlobStore
from shoal.protocol.blob import CHUNK_BYTES, BlobRef
from shoal.protocol.errors import (
    Expired,
    InvalidRequest,
    PeerFault,
    Unauthorised,
    Unavailable,
)

BIG = os.urandom(1 << 20) * 9 + b"tail"


def run(main: Coroutine[object, object, None]) -> None:
    asyncio.run(main)


def test_small_blob_comes_in_one_request(tmp_path: Path) -> None:
    async def main() -> None:
        data = b"adapter" * 1000
        ref = BlobRef(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))

        async def respond(_request: str, writer: asyncio.StreamWriter) -> None:
            head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(data)}\r\n\r\n"
            writer.write(head.encode() + data)
            await writer.drain()

        async with liar(respond) as (seen, url), BlobClient(BlobStore(tmp_path, ROOM)) as client:
            assert (await client.fetch(ref, [url], timeout_s=5)).read_bytes() == data
            assert await client.fetch_bytes(ref, [url], timeout_s=5) == data
        assert len(seen) == 1

    run(main())


@pytest.mark.parametrize("size_bytes", [60_000, CHUNK_BYTES])
def test_one_chunk_goes_from_memory_to_memory(tmp_path: Path, size_bytes: int) -> None:
    async def main() -> None:
        data = os.urandom(size_bytes)
        ours = BlobStore(tmp_path / "b", ROOM)
        async with holder(tmp_path / "a") as (store, url), BlobClient(ours) as client:
            ref = await client.put(url, data, "good")
            assert store.read(ref.sha256) == data
            assert await client.fetch_bytes(ref, [url], timeout_s=20) == data
            assert not list(ours.digests())
            # Control: what is asked for as a file does get there.
            await client.fetch(ref, [url], timeout_s=20)
            assert list(ours.digests()) == [ref.sha256]

    run(main())


@pytest.mark.parametrize("size_bytes", [60_000, CHUNK_BYTES])
def test_wrong_bytes_do_not_get_into_memory_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size_bytes: int
) -> None:
    async def main() -> None:
        wrong = bytes(size_bytes)

        async def lie(_request: str, writer: asyncio.StreamWriter) -> None:
            writer.write(reply("200 OK", wrong))
            await writer.drain()

        async with (
            holder(tmp_path / "a") as (store, good_url),
            liar(lie) as (_, url),
            BlobClient(BlobStore(tmp_path / "b", ROOM)) as client,
        ):
            data = os.urandom(size_bytes)
            ref = store.put_bytes(data)
            assert await client.fetch_bytes(ref, [url, good_url], timeout_s=20) == data
            with pytest.raises(Unavailable, match="nothing was kept"):
                await client.fetch_bytes(ref, [url], timeout_s=20)

            async def believe(_data: bytes) -> str:
                return ref.sha256

            # Control: unless they are hashed, anything is taken.
            monkeypatch.setattr(blob_client, "_sha256_of", believe)
            assert await client.fetch_bytes(ref, [url], timeout_s=20) == wrong

    run(main())


def test_large_blob_comes_in_verified_ranges_from_several_holders(tmp_path: Path) -> None:
    async def main() -> None:
        async with holder(tmp_path / "a") as (a, url_a), holder(tmp_path / "b") as (b, url_b):
            ref = a.put_bytes(BIG)
            assert b.put_bytes(BIG) == ref
            store = BlobStore(tmp_path / "c", ROOM)
            async with BlobClient(store) as client:
                paths = await asyncio.gather(
                    *(client.fetch(ref, [url_a, url_b], timeout_s=20) for _ in range(3))
                )
            assert {path.read_bytes() == BIG for path in paths} == {True}
            assert list((tmp_path / "c" / "drafts").iterdir()) == []

    run(main())


def test_empty_blob_is_a_blob(tmp_path: Path) -> None:
    async def main() -> None:
        async with holder(tmp_path / "a") as (store, url):
            ref = store.put_bytes(b"")
            async with BlobClient(BlobStore(tmp_path / "b", ROOM)) as client:
                assert await client.fetch_bytes(ref, [url], timeout_s=5) == b""

    run(main())


def lying(good: BlobStore, ref: BlobRef) -> Respond:
    """Answers with the right chunk list, and with zeros instead of the blob."""

    async def respond(request: str, writer: asyncio.StreamWriter) -> None:
        if ref.chunks_sha256 is not None and ref.chunks_sha256 in request:
            writer.write(reply("200 OK", good.read(ref.chunks_sha256)))
        else:
            start, end = range_of(request)
            writer.write(reply("206 Partial Content", bytes(end - start)))
        await writer.drain()

    return respond


def test_holder_with_wrong_bytes_is_dropped_and_another_serves(tmp_path: Path) -> None:
    async def main() -> None:
        async with holder(tmp_path / "a") as (good, good_url):
            ref = good.put_bytes(BIG)
            given_up: list[tuple[str, bool]] = []

            def on_given_up(source: str, lied: bool) -> None:
                given_up.append((source, lied))

            async with liar(lying(good, ref)) as (_, bad_url):
                async with BlobClient(BlobStore(tmp_path / "b", ROOM)) as client:
                    path = await client.fetch(
                        ref, [bad_url, good_url], timeout_s=20, on_given_up=on_given_up
                    )
                assert path.read_bytes() == BIG
                assert given_up == [(bad_url, True)]
                # Negative control: with nobody honest, the same lie ends the fetch.
                async with BlobClient(BlobStore(tmp_path / "c", ROOM)) as client:
                    with pytest.raises(Unavailable, match="wrong digest"):
                        await client.fetch(ref, [bad_url], timeout_s=20)

    run(main())


@pytest.mark.parametrize("announced", [5, 4, 1 << 40])
def test_wrong_truncated_or_mislabelled_body_is_refused(tmp_path: Path, announced: int) -> None:
    async def main() -> None:
        async def respond(_request: str, writer: asyncio.StreamWriter) -> None:
            writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {announced}\r\n\r\nwron".encode())
            await writer.drain()

        ref = BlobRef(sha256=hashlib.sha256(b"right").hexdigest(), size_bytes=5)
        store = BlobStore(tmp_path, ROOM)
        async with liar(respond) as (_, url), BlobClient(store) as client:
            with pytest.raises(Unavailable, match="No source gave blob"):
                await client.fetch(ref, [url], timeout_s=5)
        assert not store.has(ref.sha256)
        assert list((tmp_path / "drafts").iterdir()) == []

    run(main())


def test_endless_body_is_cut_at_the_size_asked_for(tmp_path: Path) -> None:
    sent = 0

    async def main() -> None:
        async def respond(_request: str, writer: asyncio.StreamWriter) -> None:
            nonlocal sent
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            while True:
                writer.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
                sent += 0x10000
                await writer.drain()

        ref = BlobRef(sha256=hashlib.sha256(b"right").hexdigest(), size_bytes=100_000)
        store = BlobStore(tmp_path, ROOM)
        async with liar(respond) as (_, url), BlobClient(store) as client:
            with pytest.raises(Unavailable):
                await client.fetch(ref, [url], timeout_s=5)
        assert not store.has(ref.sha256)
        assert sent < 32 << 20

    run(main())


def test_silent_holder_runs_out_the_transfer_clock(tmp_path: Path) -> None:
    async def main() -> None:
        async def respond(_request: str, _writer: asyncio.StreamWriter) -> None:
            await asyncio.Event().wait()

        ref = BlobRef(sha256="a" * 64, size_bytes=5)
        async with liar(respond) as (_, url), BlobClient(BlobStore(tmp_path, ROOM)) as client:
            with pytest.raises(Expired) as caught:
                await client.fetch(ref, [url], timeout_s=0.2)
        assert caught.value.code == "expired_transfer"

    run(main())


def test_interrupted_fetch_goes_on_where_it_stopped(tmp_path: Path) -> None:
    async def main() -> None:
        async with holder(tmp_path / "a") as (good, _):
            ref = good.put_bytes(BIG)
            assert ref.chunks_sha256 is not None
            chunk_list = good.read(ref.chunks_sha256)
            served: list[str] = []

            async def first_only(request: str, writer: asyncio.StreamWriter) -> None:
                if ref.chunks_sha256 is not None and ref.chunks_sha256 in request:
                    writer.write(reply("200 OK", chunk_list))
                elif (span := range_of(request))[1] <= CHUNK_BYTES:
                    body = BIG[slice(*span)]
                    writer.write(reply("206 Partial Content", body))
                else:
                    writer.write(reply("503 Service Unavailable", b""))
                served.append(request)
                await writer.drain()

            store = BlobStore(tmp_path / "b", ROOM)
            async with liar(first_only) as (_, url), BlobClient(store) as client:
                with pytest.raises(Unavailable, match="503"):
                    await client.fetch(ref, [url], timeout_s=20)
            assert any("bytes=0-" in request for request in served)
            assert store.held_chunks(ref.sha256) == frozenset({0})

            # The store is opened anew, as after a crash; only what is missing is asked for.
            asked: list[tuple[int, int]] = []

            async def record(request: str, writer: asyncio.StreamWriter) -> None:
                asked.append(range_of(request))
                body = BIG[slice(*asked[-1])]
                writer.write(reply("206 Partial Content", body))
                await writer.drain()

            again = BlobStore(tmp_path / "b", ROOM)
            here: list[int] = []
            async with liar(record) as (_, url), BlobClient(again) as client:
                path = await client.fetch(ref, [url], timeout_s=20, on_chunk=here.append)
                assert path.read_bytes() == BIG
            assert min(start for start, _ in asked) == CHUNK_BYTES
            assert sum(end - start for start, end in asked) == len(BIG) - CHUNK_BYTES
            assert (here[0], sorted(here)) == (0, [0, 1, 2])

    run(main())


def test_server_answers_ranges_and_head(tmp_path: Path) -> None:
    async def main() -> None:
        async with holder(tmp_path) as (store, url), aiohttp.ClientSession() as http:
            ref = store.put_bytes(b"0123456789")
            address = f"{url}/blobs/{ref.sha256}"
            async with http.get(address, headers={"Range": "bytes=2-4"}) as answer:
                assert (answer.status, await answer.read()) == (206, b"234")
            async with http.head(address) as answer:
                assert (answer.status, answer.headers["Content-Length"]) == (200, "10")
            async with http.get(address, headers={"Range": "bytes=99-"}) as answer:
                assert answer.status == 416
            async with http.get(f"{url}/blobs/{'a' * 64}") as answer:
                assert (answer.status, (await answer.json())["error"]) == (404, "NotFound")
            async with http.get(f"{url}/blobs/..%2f..%2fetc%2fpasswd") as answer:
                assert answer.status in {400, 404}

    run(main())


@pytest.mark.parametrize("data", [b"small", BIG], ids=["small", "big"])
def test_upload_with_a_right_token_is_kept(tmp_path: Path, data: bytes) -> None:
    async def main() -> None:
        async with holder(tmp_path / "a") as (store, url):
            async with BlobClient(BlobStore(tmp_path / "b", ROOM)) as client:
                ref = await client.put(url, data, "good")
                assert store.read(ref.sha256) == data
                assert await client.put(url, data, "good") == ref
                source = tmp_path / "file"
                source.write_bytes(data)
                assert await client.put(url, source, "good") == ref
            assert ref.chunks_sha256 is None or store.has(ref.chunks_sha256)

    run(main())


@pytest.mark.parametrize("token", ["bad", "x" * 5000])
def test_upload_without_a_right_token_is_refused(tmp_path: Path, token: str) -> None:
    async def main() -> None:
        async with holder(tmp_path / "a") as (store, url):
            async with BlobClient(BlobStore(tmp_path / "b", ROOM)) as client:
                with pytest.raises(Unauthorised):
                    await client.put(url, b"data", token)
            address = f"{url}/blobs/{hashlib.sha256(b'data').hexdigest()}"
            async with (
                aiohttp.ClientSession() as http,
                http.put(address, data=b"data") as answer,
            ):
                assert (answer.status, (await answer.json())["error"]) == (403, "Unauthorised")
            assert list(store.digests()) == []

    run(main())


def test_upload_with_a_wrong_digest_keeps_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        headers = {"Authorization": "Bearer good"}
        async with holder(tmp_path) as (store, url), aiohttp.ClientSession() as http:
            address = f"{url}/blobs/{hashlib.sha256(b'right').hexdigest()}"
            async with http.put(address, data=b"wrong", headers=headers) as answer:
                body = await answer.json()
            assert (answer.status, body["code"]) == (422, "wrong_digest")
            assert list(store.digests()) == []
            async with http.put(address, data=b"right", headers=headers) as answer:
                assert answer.status == 201
        assert list((tmp_path / "drafts").iterdir()) == []

    run(main())


def test_upload_over_the_cap_is_refused_before_it_is_read(tmp_path: Path) -> None:
    async def main() -> None:
        async with holder(tmp_path / "a", max_upload_bytes=100) as (store, url):
            async with BlobClient(BlobStore(tmp_path / "b", ROOM)) as client:
                with pytest.raises(InvalidRequest, match="over the limit of 100"):
                    await client.put(url, bytes(101), "good")
                await client.put(url, bytes(100), "good")

            async def endless() -> AsyncIterator[bytes]:
                yield bytes(10)

            async with aiohttp.ClientSession() as http:
                address = f"{url}/blobs/{'a' * 64}"
                headers = {"Authorization": "Bearer good"}
                async with http.put(address, data=endless(), headers=headers) as answer:
                    assert (await answer.json())["code"] == "length_required"
            assert len(list(store.digests())) == 1

    run(main())


def test_slow_upload_is_given_up(tmp_path: Path) -> None:
    async def main() -> None:
        async with holder(tmp_path, upload_pause_s=0.2) as (store, url):
            host, port = url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(
                f"PUT /blobs/{'a' * 64} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer good\r\n"
                "Content-Length: 100\r\n\r\nsome".encode()
            )
            head = await asyncio.wait_for(reader.readline(), 5)
            assert b" 408 " in head
            writer.close()
            await writer.wait_closed()
            assert list(store.digests()) == []

    run(main())


def test_used_port_is_refused_in_one_sentence(tmp_path: Path) -> None:
    async def main() -> None:
        async with holder(tmp_path / "a") as (store, url):
            port = int(url.rsplit(":", 1)[1])
            with pytest.raises(InvalidRequest, match="already in use"):
                await BlobServer(store, "127.0.0.1", port).start()

    run(main())


def test_chunk_list_of_another_blob_is_found_out(tmp_path: Path) -> None:
    async def main() -> None:
        async with holder(tmp_path / "a") as (store, url):
            other = store.put_bytes(BIG[::-1])
            right = store.put_bytes(BIG)
            forged = right.model_copy(update={"chunks_sha256": other.chunks_sha256})
            async with BlobClient(BlobStore(tmp_path / "b", ROOM)) as client:
                with pytest.raises((Unavailable, PeerFault)):
                    await client.fetch(forged, [url], timeout_s=20)
                assert (await client.fetch(right, [url], timeout_s=20)).read_bytes() == BIG

    run(main())
