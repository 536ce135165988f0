"""What Shoal mends in the library's Noise: reads of the socket that need not be."""

from __future__ import annotations

import asyncio
import random

import pytest
import trio
from libp2p.io.exceptions import IncompleteReadError
from libp2p.io.trio import TrioTCPStream
from libp2p.security.noise.io import NoisePacketReadWriter
from libp2p_strangers import ECHO, WAIT_S, fresh, started

from shoal.network.libp2p_noise import Packets

BODY = random.Random(7).randbytes(1 << 20)


class Wire:
    """A connection that brings what it was given in pieces of `piece_bytes` at most."""

    def __init__(self, data: bytes, piece_bytes: int) -> None:
        self._left = data
        self._piece_bytes = piece_bytes
        self.num_reads = 0

    async def read(self, n: int | None = None) -> bytes:
        """The next piece."""
        self.num_reads += 1
        size = min(self._piece_bytes, len(self._left) if n is None else n)
        data, self._left = self._left[:size], self._left[size:]
        return data


def packets_of(data: bytes, piece_bytes: int, count: int) -> list[bytes]:
    async def main() -> list[bytes]:
        packets = Packets(Wire(data, piece_bytes))  # type: ignore[arg-type]
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
