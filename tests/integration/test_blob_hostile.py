"""Holders that lie, dawdle, refuse or point elsewhere: the fetch goes on with the others."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import logging
import os
import socket
from collections.abc import Coroutine
from pathlib import Path

import aiohttp
import pytest
from blob_holders import ROOM, Respond, holder, liar, range_of, reply, served

import shoal.network.blob_server as blob_server_module
from shoal.network.blob_chunks import FineList
from shoal.network.blob_client import BlobClient
from shoal.network.blob_gate import UploadGate
from shoal.network.blob_sources import Holder
from shoal.network.blob_store import BlobStore
from shoal.network.blob_transfer import FetchRules
from shoal.network.meters import Meters
from shoal.protocol.blob import CHUNK_BYTES, BlobRef
from shoal.protocol.errors import Expired, Unavailable

BIG = os.urandom(1 << 20) * 9 + b"tail"
FINE = 256 << 10


def run(main: Coroutine[object, object, None]) -> None:
    asyncio.run(main)


class Heard:
    """Sources given up, and whether they lied."""

    def __init__(self) -> None:
        self.given_up: dict[str, bool] = {}

    def __call__(self, source: str, lied: bool) -> None:
        assert source not in self.given_up
        self.given_up[source] = lied


class DropsHeard(Meters):
    """Meters that say when a slow reader is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.dropped = asyncio.Event()

    def count(self, name: str, by: float = 1, **labels: str) -> None:
        super().count(name, by, **labels)
        if name == "blob_slow_readers":
            self.dropped.set()


def ranges(answer: Respond, good: BlobStore, ref: BlobRef) -> Respond:
    """The right chunk list, and `answer` for all else."""

    async def respond(request: str, writer: asyncio.StreamWriter) -> None:
        if ref.chunks_sha256 is not None and ref.chunks_sha256 in request:
            writer.write(reply("200 OK", good.read(ref.chunks_sha256)))
            await writer.drain()
        else:
            await answer(request, writer)

    return respond


async def wrong_range(request: str, writer: asyncio.StreamWriter) -> None:
    start, end = range_of(request)
    header = f"Content-Range: bytes {start + 1}-{end}/{len(BIG)}"
    writer.write(reply("206 Partial Content", BIG[start:end], header))
    await writer.drain()


async def too_much(request: str, writer: asyncio.StreamWriter) -> None:
    start, end = range_of(request)
    writer.write(reply("206 Partial Content", BIG[start:end] + b"more"))
    await writer.drain()


async def other_bytes(request: str, writer: asyncio.StreamWriter) -> None:
    start, end = range_of(request)
    writer.write(reply("206 Partial Content", bytes(end - start)))
    await writer.drain()


async def cut_short(request: str, writer: asyncio.StreamWriter) -> None:
    start, end = range_of(request)
    writer.write(b"HTTP/1.1 206 Partial Content\r\nContent-Length: %d\r\n\r\n" % (end - start))
    writer.write(BIG[start : start + 1000])
    await writer.drain()


async def whole_blob(_request: str, writer: asyncio.StreamWriter) -> None:
    writer.write(reply("200 OK", BIG))
    await writer.drain()


async def broken(_request: str, writer: asyncio.StreamWriter) -> None:
    writer.write(reply("500 Internal Server Error", b"oh"))
    await writer.drain()


@pytest.mark.parametrize(
    ("answer", "lies"),
    [
        (wrong_range, True),
        (too_much, True),
        (other_bytes, True),
        (cut_short, False),
        (whole_blob, False),
        (broken, False),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_bad_holder_is_given_up_and_the_others_finish(
    tmp_path: Path, answer: Respond, lies: bool
) -> None:
    async def main() -> None:
        meters = Meters()
        async with holder(tmp_path / "a") as (good, _):
            ref = good.put_bytes(BIG)
            heard = Heard()
            asked = asyncio.Event()

            async def once(request: str, writer: asyncio.StreamWriter) -> None:
                asked.set()
                await answer(request, writer)

            async def after_the_bad_one() -> list[str]:
                # The honest one comes in only when the other was found out, so it is asked.
                return [good_url] if heard.given_up else []

            async with liar(ranges(once, good, ref)) as (_, bad), served(good) as good_url:
                store = BlobStore(tmp_path / "b", ROOM)
                rules = FetchRules(poll_s=0.05)
                async with BlobClient(store, rules=rules, meters=meters) as client:
                    path = await client.fetch(
                        ref,
                        [bad],
                        timeout_s=30,
                        on_given_up=heard,
                        more_sources=after_the_bad_one,
                    )
                assert path.read_bytes() == BIG
            assert asked.is_set()
            assert heard.given_up == {bad: lies}
            assert meters.value("blob_sources_given_up", lied=str(lies).lower()) == 1

    run(main())


def test_one_of_two_holders_of_a_chunk_lies_and_only_that_one_is_given_up(tmp_path: Path) -> None:
    async def main() -> None:
        async with holder(tmp_path / "a") as (good, _):
            data = BIG[: CHUNK_BYTES + 1000]
            ref = good.put_bytes(data)
            held_up = asyncio.Event()

            async def zeros(request: str, writer: asyncio.StreamWriter) -> None:
                held_up.set()
                await other_bytes(request, writer)

            async def honest(request: str, writer: asyncio.StreamWriter) -> None:
                await held_up.wait()  # so that both have a part in the first chunk
                start, end = range_of(request)
                writer.write(reply("206 Partial Content", data[start:end]))
                await writer.drain()

            heard = Heard()
            async with (
                liar(ranges(zeros, good, ref)) as (_, bad),
                liar(ranges(honest, good, ref)) as (_, slow),
                BlobClient(BlobStore(tmp_path / "b", ROOM)) as client,
            ):
                path = await client.fetch(ref, [slow, bad], timeout_s=30, on_given_up=heard)
                assert path.read_bytes() == data
            assert heard.given_up == {bad: True}

    run(main())


@pytest.mark.parametrize("floor_window_s", [0.3, 60.0])
def test_holder_below_the_floor_is_replaced_and_its_bytes_are_kept(
    tmp_path: Path, floor_window_s: float
) -> None:
    async def main() -> None:
        good, gate = BlobStore(tmp_path / "a", ROOM), UploadGate()
        ref = good.put_bytes(BIG)
        dribbling = asyncio.Event()

        async def dribble(request: str, writer: asyncio.StreamWriter) -> None:
            start, end = range_of(request)
            head = f"HTTP/1.1 206 Partial Content\r\nContent-Length: {end - start}\r\n\r\n"
            # All but the end of it at once, so there is something to keep.
            writer.write(head.encode() + BIG[start : end - 10])
            await writer.drain()
            dribbling.set()
            await asyncio.Event().wait()

        heard = Heard()

        async def later() -> list[str]:
            return [good_url] if heard.given_up else []

        rules = FetchRules(floor_window_s=floor_window_s, poll_s=0.05)
        async with (
            liar(ranges(dribble, good, ref)) as (_, slow),
            served(good, gate=gate) as good_url,
            BlobClient(BlobStore(tmp_path / "b", ROOM), rules=rules) as client,
        ):

            async def fetch(timeout_s: float) -> Path:
                return await client.fetch(
                    ref, [slow], timeout_s=timeout_s, on_given_up=heard, more_sources=later
                )

            if floor_window_s < 1:
                assert (await fetch(30)).read_bytes() == BIG
                assert heard.given_up == {slow: False}
                sent = gate.meters.value("blob_bytes", plane="http", direction="out")
                assert sent < len(BIG) - (1 << 20)
            else:
                # Control: a fetch that does not look at the speed waits until its clock runs out.
                with pytest.raises(Expired):
                    await fetch(1.5)
            assert dribbling.is_set()

    run(main())


@pytest.mark.parametrize("size_bytes", [1000, len(BIG)], ids=["small", "big"])
def test_busy_holder_is_asked_again_when_it_said(tmp_path: Path, size_bytes: int) -> None:
    async def main() -> None:
        data = BIG[:size_bytes]
        good = BlobStore(tmp_path / "a", ROOM)
        ref = good.put_bytes(data)
        loop = asyncio.get_running_loop()
        refused_s: list[float] = []
        asked_s: list[float] = []

        async def busy_once(request: str, writer: asyncio.StreamWriter) -> None:
            asked_s.append(loop.time())
            if not refused_s:
                refused_s.append(loop.time())
                writer.write(reply("503 Service Unavailable", b"", "Retry-After: 1"))
            elif "bytes=" in request:
                writer.write(reply("206 Partial Content", data[slice(*range_of(request))]))
            else:
                writer.write(reply("200 OK", data))
            await writer.drain()

        heard = Heard()
        async with (
            liar(ranges(busy_once, good, ref)) as (_, url),
            BlobClient(BlobStore(tmp_path / "b", ROOM)) as client,
        ):
            assert (await client.fetch(ref, [url], timeout_s=30, on_given_up=heard)).exists()
        assert not heard.given_up
        assert max(asked_s) - refused_s[0] >= 0.99

    run(main())


def test_server_refuses_over_its_cap_and_says_when_to_come_back(tmp_path: Path) -> None:
    async def main() -> None:
        gate = UploadGate(max_serves=1)
        async with holder(tmp_path, gate=gate) as (store, url), aiohttp.ClientSession() as http:
            address = f"{url}/blobs/{store.put_bytes(b'data').sha256}"
            with gate.serving("another"):
                async with http.get(address) as answer:
                    assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
                    assert (await answer.json())["code"] == "overloaded"
            async with http.get(address) as answer:
                assert (answer.status, await answer.read()) == (200, b"data")

    run(main())


def test_reader_that_does_not_read_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        meters = DropsHeard()
        gate = UploadGate(meters=meters)
        async with holder(tmp_path, gate=gate) as (store, url):
            ref = store.put_bytes(bytes(48 << 20))
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            host, port = url.removeprefix("http://").split(":")
            loop = asyncio.get_running_loop()
            await loop.sock_connect(sock, (host, int(port)))
            await loop.sock_sendall(
                sock, f"GET /blobs/{ref.sha256} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
            )
            await asyncio.wait_for(meters.dropped.wait(), 20)
            sock.close()
            # Its place is free again.
            async with (
                aiohttp.ClientSession() as http,
                http.head(f"{url}/blobs/{ref.sha256}") as answer,
            ):
                assert answer.status == 200

    monkeypatch.setattr(blob_server_module, "_SEND_TIMEOUT_S", 0.3)
    run(main())


@pytest.mark.parametrize(
    "asked", ["bytes=0-1,4-5", "bytes=-3", "bytes=5-4", "items=0-1", "bytes=0-99"]
)
def test_only_single_ranges_inside_the_blob_are_served(tmp_path: Path, asked: str) -> None:
    async def main() -> None:
        async with holder(tmp_path) as (store, url), aiohttp.ClientSession() as http:
            address = f"{url}/blobs/{store.put_bytes(b'0123456789').sha256}"
            async with http.get(address, headers={"Range": asked}) as answer:
                assert (answer.status, (await answer.json())["code"]) == (416, "bad_range")
            async with http.get(address, headers={"Range": "bytes=7-9"}) as answer:
                assert (answer.status, await answer.read()) == (206, b"789")
                assert answer.headers["Content-Range"] == "bytes 7-9/*"

    run(main())


@pytest.mark.parametrize("size_bytes", [1000, len(BIG)], ids=["small", "big"])
def test_stranger_cannot_send_us_to_a_private_address(tmp_path: Path, size_bytes: int) -> None:
    async def main() -> None:
        good = BlobStore(tmp_path / "a", ROOM)
        data = BIG[:size_bytes]
        ref = good.put_bytes(data)

        async def honest(request: str, writer: asyncio.StreamWriter) -> None:
            if "bytes=" in request:
                writer.write(reply("206 Partial Content", data[slice(*range_of(request))]))
            else:
                writer.write(reply("200 OK", data))
            await writer.drain()

        async with (
            liar(ranges(honest, good, ref)) as (seen, url),
            BlobClient(BlobStore(tmp_path / "b", ROOM)) as client,
        ):
            port = url.rpartition(":")[2]
            for name in (url, f"http://localhost:{port}", f"http://[::ffff:127.0.0.1]:{port}"):
                with pytest.raises(Unavailable, match="not a public address"):
                    await client.fetch(ref, [Holder(name)], timeout_s=20)
            assert seen == []
            # Control: the same holder, named by one's own configuration.
            path = await client.fetch(ref, [Holder(url, allow_private=True)], timeout_s=20)
            assert path.read_bytes() == data

    run(main())


def test_redirect_is_not_followed(tmp_path: Path) -> None:
    async def main() -> None:
        async with holder(tmp_path / "a") as (good, good_url):
            ref = good.put_bytes(b"secret of the inner network")

            async def elsewhere(_request: str, writer: asyncio.StreamWriter) -> None:
                place = f"Location: {good_url}/blobs/{ref.sha256}"
                writer.write(reply("302 Found", b"", place))
                await writer.drain()

            async with (
                liar(elsewhere) as (seen, url),
                BlobClient(BlobStore(tmp_path / "b", ROOM)) as client,
            ):
                with pytest.raises(Unavailable, match="302"):
                    await client.fetch(ref, [url], timeout_s=20)
                assert len(seen) == 1
                assert await client.fetch_bytes(ref, [good_url], timeout_s=20)

    run(main())


@pytest.mark.parametrize("request_timeout_s", [0.2, 60.0])
def test_connection_that_never_asks_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_timeout_s: float
) -> None:
    async def main() -> None:
        async with holder(tmp_path) as (store, url), aiohttp.ClientSession() as http:
            address = f"{url}/blobs/{store.put_bytes(b'data').sha256}"
            async with http.get(address) as answer:
                assert await answer.read() == b"data"
            host, port = url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"GET /blobs/")
            if request_timeout_s < 1:
                with contextlib.suppress(ConnectionError):
                    assert await asyncio.wait_for(reader.read(), 20) == b""
                # One that has asked stays open for the next request.
                async with http.get(address) as answer:
                    assert await answer.read() == b"data"
            else:
                # Control: left alone, it holds its place.
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(reader.read(), 0.5)
            writer.close()

    monkeypatch.setattr(blob_server_module, "_REQUEST_TIMEOUT_S", request_timeout_s)
    run(main())


def test_connections_over_the_cap_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with holder(tmp_path) as (_, url):
            host, port = url.removeprefix("http://").split(":")
            held = [await asyncio.open_connection(host, int(port)) for _ in range(2)]
            for _, writer in held:
                writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            for reader, _ in held:
                assert b" 404 " in await asyncio.wait_for(reader.readline(), 10)
            reader, writer = await asyncio.open_connection(host, int(port))
            with contextlib.suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(), 10) == b""
            for _, open_writer in (*held, (reader, writer)):
                open_writer.close()

    monkeypatch.setattr(blob_server_module, "_MAX_CONNECTIONS", 2)
    run(main())


def test_reader_that_hangs_up_leaves_no_trace(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with holder(tmp_path) as (store, url):
            ref = store.put_bytes(bytes(32 << 20))
            host, port = url.removeprefix("http://").split(":")
            for _ in range(5):
                reader, writer = await asyncio.open_connection(host, int(port))
                writer.write(f"GET /blobs/{ref.sha256} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                assert await reader.readexactly(100_000)
                writer.transport.abort()
            address = f"{url}/blobs/{ref.sha256}"
            async with aiohttp.ClientSession() as http, http.get(address) as answer:
                assert len(await answer.read()) == 32 << 20
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

    run(main())


def test_full_disk_is_our_own_fault_and_ends_the_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with holder(tmp_path / "a") as (good, url):
            ref = good.put_bytes(BIG)
            store, heard = BlobStore(tmp_path / "b", ROOM), Heard()

            def no_room(*_: object) -> int:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            async with BlobClient(store) as client:
                with monkeypatch.context() as patched:
                    patched.setattr(os, "pwrite", no_room)
                    with pytest.raises(Unavailable) as caught:
                        await client.fetch(ref, [url], timeout_s=30, on_given_up=heard)
                assert caught.value.code == "disk_full"
                assert not heard.given_up
            assert list((tmp_path / "b" / "drafts").iterdir()) == []
            # Control: with room again, the same holder serves.
            async with BlobClient(store) as client:
                assert (await client.fetch(ref, [url], timeout_s=30)).read_bytes() == BIG

    run(main())


def test_wrong_list_of_small_chunks_costs_a_try_and_no_more(tmp_path: Path) -> None:
    async def main() -> None:
        async with holder(tmp_path / "a") as (good, url):
            ref = good.put_bytes(BIG)
            for right in (True, False):
                parts = [BIG[start : start + FINE] for start in range(0, len(BIG), FINE)]
                digests = b"".join(hashlib.sha256(part).digest() for part in parts)
                fine = FineList(chunk_bytes=FINE, digests=digests if right else digests[::-1])
                store = BlobStore(tmp_path / str(right), ROOM)
                async with BlobClient(store, rules=FetchRules(stall_s=2)) as client:
                    path = await client.fetch(ref, [url], timeout_s=30, fine=fine)
                assert path.read_bytes() == BIG
                # Whoever asks this node may have no fine list.
                assert ref.chunks_sha256 is not None
                assert store.has(ref.chunks_sha256)

    run(main())
