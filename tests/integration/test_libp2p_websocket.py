"""WebSocket beside TCP: the same encryption inside, TLS outside where a proxy adds it."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import os
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from libp2p_strangers import ECHO, LOCAL, WAIT_S, arrived, fresh, plaintext_dial, started

from shoal.network.identity import NodeIdentity
from shoal.network.libp2p_node import Libp2pNode
from shoal.protocol.errors import InvalidRequest, Unavailable

LOCAL_WS = f"{LOCAL}/ws"


def port_of(address: str) -> int:
    return int(address.split("/")[4])


def certificate(path: Path, name: str) -> tuple[Path, Path]:
    """A certificate for `name` that vouches for itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    names: list[x509.GeneralName] = [x509.DNSName(name)]
    with contextlib.suppress(ValueError):
        names = [x509.IPAddress(ipaddress.ip_address(name))]
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    certificate_path, key_path = path / f"{name}.crt", path / f"{name}.key"
    certificate_path.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    key_path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return certificate_path, key_path


@asynccontextmanager
async def tls_proxy(inner_port: int, files: tuple[Path, Path]) -> AsyncIterator[int]:
    """A proxy as stands on port 443: it ends TLS and passes the bytes on."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*files)
    tasks: set[asyncio.Task[None]] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", inner_port)
        try:
            await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))
        finally:
            for end in (writer, inner_writer):
                end.close()
                with contextlib.suppress(OSError):
                    await end.wait_closed()

    def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.ensure_future(carry(reader, writer)))

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
def trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path]]:
    """A certificate for localhost that this machine trusts."""
    files = certificate(tmp_path, "localhost")
    monkeypatch.setenv("SSL_CERT_FILE", str(files[0]))
    return iter([files])


def test_one_node_listens_on_tcp_and_websocket_at_once() -> None:
    async def run() -> None:
        server = fresh([LOCAL, LOCAL_WS])
        over_tcp, over_websocket = fresh(None), fresh(None)
        async with started(server, over_tcp, over_websocket):
            plain, websocket = sorted(server.addresses, key=len)
            assert f"/ws/p2p/{server.peer_id}" in websocket
            assert "/ws" not in plain
            for client, address in ((over_tcp, plain), (over_websocket, websocket)):
                peer = await client.connect(address, timeout_s=WAIT_S)
                assert await client.request(peer, ECHO, b"x", timeout_s=WAIT_S) == b"x"
            await arrived(server, over_websocket.peer_id)
            place = server.observed(over_websocket.peer_id)
            assert place is not None
            assert place[0] == "127.0.0.1"

    asyncio.run(run())


def test_announced_addresses_are_given_out_instead() -> None:
    async def run() -> None:
        public = "/dns4/market.example.org/tcp/443/tls/ws"
        node = Libp2pNode(NodeIdentity.generate(), LOCAL_WS, announce=[public])
        async with started(node):
            assert node.addresses == (f"{public}/p2p/{node.peer_id}",)

    asyncio.run(run())


def test_plaintext_is_refused_on_websocket_too() -> None:
    async def run() -> None:
        server = fresh(LOCAL_WS)
        async with started(server):
            dial = lambda: trio.run(plaintext_dial, server.addresses[0])  # noqa: E731
            assert not await asyncio.to_thread(dial)
            assert server.peers() == frozenset()
            async with asyncio.timeout(WAIT_S):
                # The caller hears of the refusal before it is counted.
                while not server.meters.value("connections_refused", cause="handshake"):  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
            assert server.meters.value("connections_refused", cause="handshake") == 1

    asyncio.run(run())


@pytest.mark.parametrize("suffix", ["tls/ws", "wss"])
def test_a_tls_proxy_in_front_is_dialled_by_its_name(
    trusted: Iterator[tuple[Path, Path]], suffix: str
) -> None:
    async def run() -> None:
        server, client = fresh(LOCAL_WS), fresh(None)
        async with (
            started(server, client),
            tls_proxy(port_of(server.addresses[0]), next(trusted)) as port,
        ):
            address = f"/dns4/localhost/tcp/{port}/{suffix}/p2p/{server.peer_id}"
            peer = await client.connect(address, timeout_s=WAIT_S)
            assert await client.request(peer, ECHO, b"x" * 100_000, timeout_s=WAIT_S)

    asyncio.run(run())


@pytest.mark.parametrize("name", ["elsewhere.example.org", "localhost"])
def test_a_certificate_that_is_not_trusted_is_refused(tmp_path: Path, name: str) -> None:
    """A self-signed one, for this name or another: the control of the test above."""

    async def run() -> None:
        server, client = fresh(LOCAL_WS), fresh(None)
        files = certificate(tmp_path, name)
        async with (
            started(server, client),
            tls_proxy(port_of(server.addresses[0]), files) as port,
        ):
            address = f"/dns4/localhost/tcp/{port}/tls/ws/p2p/{server.peer_id}"
            with pytest.raises(Unavailable, match="certificate is not trusted") as caught:
                await client.connect(address, timeout_s=WAIT_S)
            assert caught.value.code == "dial_failed"

    asyncio.run(run())


def test_what_is_no_websocket_is_told_apart() -> None:
    async def run() -> None:
        tcp_only, client = fresh(), fresh(None)
        async with started(tcp_only, client):
            address = tcp_only.addresses[0].replace("/p2p/", "/ws/p2p/")
            with pytest.raises(Unavailable) as caught:
                await client.connect(address, timeout_s=WAIT_S)
            assert caught.value.code == "dial_failed"
            # The node is as well as before.
            assert await client.connect(tcp_only.addresses[0], timeout_s=WAIT_S)

    asyncio.run(run())


def test_garbage_on_the_websocket_port_does_no_harm() -> None:
    async def run() -> None:
        server, client = fresh(LOCAL_WS), fresh(None)
        async with started(server, client):
            port = port_of(server.addresses[0])
            upgrade = (
                b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
            )
            huge_frame = upgrade + b"\x82\xff" + b"\x7f" + b"\xff" * 11
            for garbage in (
                b"GET / HTTP/1.1\r\n\r\n",
                b"GET /" + b"a" * 200_000,
                os.urandom(4096),
                upgrade + os.urandom(4096),
                huge_frame,
                b"",
            ):
                await asyncio.to_thread(_send, port, garbage)
            peer = await client.connect(server.addresses[0], timeout_s=WAIT_S)
            assert await client.request(peer, ECHO, b"x", timeout_s=WAIT_S) == b"x"

    asyncio.run(run())


def _send(port: int, data: bytes) -> None:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as sender:
        sender.sendall(data)


@pytest.mark.parametrize("listen", ["/ip4/127.0.0.1/tcp/0/tls/ws", "/ip4/127.0.0.1/tcp/0/wss"])
def test_listening_with_tls_says_that_a_proxy_is_needed(listen: str) -> None:
    with pytest.raises(InvalidRequest, match="behind a TLS proxy") as caught:
        asyncio.run(fresh(listen).start())
    assert caught.value.code == "no_certificate"


def test_one_port_for_both_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="a port each"):
        asyncio.run(fresh(["/ip4/127.0.0.1/tcp/4999", "/ip4/127.0.0.1/tcp/4999/ws"]).start())


def test_announcing_no_port_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="names no TCP port"):
        asyncio.run(Libp2pNode(NodeIdentity.generate(), announce=["/ip4/1.2.3.4"]).start())
