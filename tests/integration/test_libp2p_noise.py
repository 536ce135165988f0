"""What Shoal mends in the library's Noise: reads, writes and copies that need not be."""

from __future__ import annotations

import asyncio
import math
import random
import tracemalloc
from collections.abc import Sequence
from typing import Any, cast

import pytest
import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import IncompleteReadError
from libp2p.io.trio import TrioTCPStream
from libp2p.peer.id import ID
from libp2p.security.noise.io import (
    MAX_PLAINTEXT_LENGTH,
    NoisePacketReadWriter,
    NoiseTransportReadWriter,
)
from libp2p.security.secure_session import SecureSession
from libp2p_strangers import ECHO, WAIT_S, fresh, started

from shoal.network import libp2p_noise, libp2p_websocket
from shoal.network.libp2p_noise import Packets

BODY = random.Random(7).randbytes(1 << 20)


class Wire:
    """A connection that brings what it was given in pieces of `piece_bytes` at most."""

    def __init__(self, data: bytes, piece_bytes: int) -> None:
        self._left = data
        self._piece_bytes = piece_bytes
        self.asked: list[int | None] = []

    async def read(self, n: int | None = None) -> bytes:
        """The next piece."""
        self.asked.append(n)
        size = min(self._piece_bytes, len(self._left) if n is None else n)
        data, self._left = self._left[:size], self._left[size:]
        return data


def packets_of(data: bytes, piece_bytes: int, count: int) -> list[bytes]:
    async def main() -> list[bytes]:
        packets = Packets(cast(ReadWriteCloser, Wire(data, piece_bytes)))
        return [await packets.read_msg() for _ in range(count)]

    return trio.run(main)


@pytest.mark.parametrize("piece_bytes", [1, 2, 3, 100, 65_537, 1 << 20])
def test_packets_come_whole_however_the_wire_cuts_them(piece_bytes: int) -> None:
    sent = [b"", b"x", BODY[:5000], BODY[:65_535], b"y" * 17, BODY[:300]]
    data = b"".join(len(packet).to_bytes(2, "big") + packet for packet in sent)
    assert packets_of(data, piece_bytes, len(sent)) == sent


@pytest.mark.parametrize(("data", "received"), [(b"", 0), (b"\0", 1), (b"\0\5abc", 5)])
def test_an_end_inside_a_packet_is_told_from_one_between_two(data: bytes, received: int) -> None:
    with pytest.raises(IncompleteReadError) as caught:
        packets_of(data, 65_537, 1)
    assert caught.value.received_bytes == received
    assert caught.value.is_clean_close == (received == 0)


async def _socket_reads(monkeypatch: pytest.MonkeyPatch) -> int:
    """Reads of both sockets while 8 bodies of 1 MiB are echoed."""
    count = 0
    read = TrioTCPStream.read

    async def counting(stream: TrioTCPStream, n: int | None = None) -> bytes:
        nonlocal count
        count += 1
        return await read(stream, n)

    server, client = fresh(), fresh(None)
    async with started(server, client):
        peer = await client.connect(server.addresses[0], timeout_s=WAIT_S)
        with monkeypatch.context() as patched:
            patched.setattr(TrioTCPStream, "read", counting)
            for _ in range(8):
                assert await client.request(peer, ECHO, BODY, timeout_s=WAIT_S) == BODY
    return count


def test_a_socket_is_read_less_than_packet_by_packet(monkeypatch: pytest.MonkeyPatch) -> None:
    mended = asyncio.run(_socket_reads(monkeypatch))
    monkeypatch.setattr(Packets, "read_msg", NoisePacketReadWriter.read_msg)
    # The control: the library's own way.
    assert mended < asyncio.run(_socket_reads(monkeypatch))


def test_more_is_asked_of_the_socket_only_where_more_has_come() -> None:
    async def main(piece_bytes: int) -> list[int | None]:
        packet = BODY[:60_000]
        wire = Wire(10 * (len(packet).to_bytes(2, "big") + packet), piece_bytes)
        packets = Packets(cast(ReadWriteCloser, wire))
        assert [await packets.read_msg() for _ in range(10)] == 10 * [packet]
        return wire.asked

    quiet, busy = trio.run(main, 1000), trio.run(main, 1 << 20)
    assert set(quiet) == {65_537}
    assert set(busy) == {65_537, 4 * 65_537}
    assert len(busy) < 10


class Messages:
    """What a session reads from: a packet at a time, then nothing more."""

    def __init__(self, packets: Sequence[bytes]) -> None:
        self._left = list(packets)

    async def read_msg(self) -> bytes:
        """The next packet's plain bytes."""
        if not self._left:
            raise IncompleteReadError("the connection ended")
        return self._left.pop(0)


def _session(kind: type[SecureSession], packets: Sequence[bytes]) -> SecureSession:
    keys = create_new_key_pair()
    peer = ID.from_pubkey(keys.public_key)
    conn: Any = Messages(packets)
    return kind(
        local_peer=peer,
        local_private_key=keys.private_key,
        remote_peer=peer,
        remote_permanent_pubkey=keys.public_key,
        is_initiator=True,
        conn=conn,
    )


async def _what_a_session_gives(
    kind: type[SecureSession], packets: Sequence[bytes], reads: Sequence[int | None]
) -> list[object]:
    session = _session(kind, packets)
    given: list[object] = []
    for n in reads:
        try:
            given.append(await session.read(n))
        except Exception as error:
            given.append(type(error))
    return given


@pytest.mark.parametrize("seed", range(50))
def test_a_session_gives_what_the_librarys_gives(seed: int) -> None:
    rng = random.Random(seed)
    packets = [rng.randbytes(rng.choice((0, 1, 5, 100, 2000))) for _ in range(rng.randrange(9))]
    reads = [rng.choice((None, 0, 1, 3, 12, 700, 5000)) for _ in range(12)]
    given = trio.run(_what_a_session_gives, libp2p_noise._Session, packets, reads)
    assert given == trio.run(_what_a_session_gives, SecureSession, packets, reads)


def test_a_frame_in_tiny_packets_takes_little_more_room_than_its_bytes() -> None:
    size = 10_000
    session = _session(libp2p_noise._Session, [BODY[i : i + 2] for i in range(0, size, 2)])

    async def main() -> int:
        tracemalloc.start()
        try:
            assert await session.read(size) == BODY[:size]
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    # Kept apart until the end they would take a megabyte.
    assert trio.run(main) < 100_000


class Plain:
    """Stands for the cipher, which is not what is tested: it adds a tag of 16 bytes."""

    def encrypt(self, data: bytes) -> bytes:
        """The data and a tag."""
        assert isinstance(data, bytes)
        assert len(data) <= MAX_PLAINTEXT_LENGTH
        return data + bytes(16)


def _writes(kind: type[NoiseTransportReadWriter], size: int) -> list[bytes]:
    written: list[bytes] = []

    class Sink:
        async def write(self, data: bytes) -> None:
            written.append(bytes(data))

    sink: Any = Sink()
    trio.run(kind(sink, Plain()).write_msg, BODY[:size])
    return written


@pytest.mark.parametrize("size", [0, 1, 65_519, 65_520, 3 * 65_519, 300_000, 500_000])
def test_a_message_is_written_as_the_library_cuts_it(size: int) -> None:
    mended = _writes(libp2p_noise._BufferedNoise, size)
    assert b"".join(mended) == b"".join(_writes(NoiseTransportReadWriter, size))
    # Each write is one message of a WebSocket.
    assert max(map(len, mended)) <= libp2p_websocket._MAX_MESSAGE_BYTES
    assert len(mended) == max(1, math.ceil(size / (3 * MAX_PLAINTEXT_LENGTH)))
