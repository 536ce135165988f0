"""Strangers who send what no honest node does, over real sockets; each message one of a seed's.

`Attack` is one stranger after another: whoever is dropped or banned comes back under a new name.
"""

from __future__ import annotations

import functools
import random
import struct
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import trio
from libp2p import new_host
from libp2p.abc import IHost, INetStream
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo, info_from_p2p_addr
from libp2p.pubsub.pb import rpc_pb2
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_ID
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX_ID
from libp2p.stream_muxer.yamux.yamux import Yamux
from malformed import Malformer
from multiaddr import Multiaddr
from wire_samples import announcements, exchanges

from shoal.protocol.announcement import LOTS_TOPIC

WAIT_S = 1.0
PER_CONNECTION = 40
_REFUSED = (BaseLibp2pError, trio.TooSlowError, trio.BrokenResourceError, OSError, EOFError)
_HEADER = struct.Struct(">QB")
_LIBRARY_PROTOCOLS = ("/ipfs/id/1.0.0", "/ipfs/id/push/1.0.0", "/ipfs/ping/1.0.0")
_GOSSIP_PROTOCOLS = ("/meshsub/1.1.0", "/meshsub/1.0.0", "/floodsub/1.0.0")

Deed = Callable[["Stranger", bytes], Awaitable[None]]


class Stranger:
    """One libp2p host connected to its target, and the stream it misuses."""

    def __init__(self, host: IHost, target: ID, draw: random.Random) -> None:
        self.host = host
        self.target = target
        self.draw = draw

    async def stream(self, *protocols: str) -> INetStream:
        """A stream of the first protocol the target agrees to."""
        return await self.host.new_stream(self.target, [TProtocol(name) for name in protocols])

    @property
    def is_connected(self) -> bool:
        """Whether the target has not hung up."""
        return bool(self.host.get_network().get_connections(self.target))

    @property
    def muxed(self) -> Any:
        """The connection under the streams."""
        return self.host.get_network().get_connections(self.target)[0].muxed_conn


def body_of(protocol: str) -> Deed:
    """Whole frames with malformed bodies, several on one stream, and each answer read."""

    async def deed(stranger: Stranger, message: bytes) -> None:
        stream = await stranger.stream(protocol)
        for _ in range(2):  # the second is a replay
            await stream.write(_HEADER.pack(len(message), 0) + message)
            await _read_frame(stream)
        await stream.close()

    return deed


def frame_of(protocol: str) -> Deed:
    """Broken frames: no header, a length of 2^63, a body cut short, a stream left half open."""

    async def deed(stranger: Stranger, message: bytes) -> None:
        stream = await stranger.stream(protocol)
        length = stranger.draw.choice((2**63, 2**64 - 1, len(message) + 1, 0, 9 << 20))
        status = stranger.draw.choice((0, 0, 1, 2, 255))
        head = _HEADER.pack(length, status)
        await stream.write(stranger.draw.choice((message, head + message, head[:4])) or b"\0")
        match stranger.draw.randrange(4):
            case 0:
                await stream.reset()
            case 1:
                await stream.close()
            case 2:
                with trio.move_on_after(0.05):
                    await stream.read(64)
                await stream.reset()
            case _:
                pass  # left half open

    return deed


async def negotiation(stranger: Stranger, message: bytes) -> None:
    """Garbage, or protocols nobody serves, where a stream's protocol is agreed on."""
    stream = await stranger.muxed.open_stream()
    name = stranger.draw.choice((b"/shoal/none/1", message[:900], b"ls", b"/multistream/9.0.0"))
    line = name + b"\n"
    await stream.write(stranger.draw.choice((message, _varint(len(line)) + line)) or b"\0")
    await stream.reset()


async def library_stream(stranger: Stranger, message: bytes) -> None:
    """Garbage where the library itself reads: identify, its push, its pings."""
    stream = await stranger.stream(stranger.draw.choice(_LIBRARY_PROTOCOLS))
    await stream.write(_varint(len(message)) + message)
    await stream.reset()


async def gossip(stranger: Stranger, message: bytes) -> None:
    """Malformed gossip: broken envelopes, and whole ones with stolen names and bad contents."""
    stream = await stranger.stream(*_GOSSIP_PROTOCOLS)
    envelope = _envelope(stranger, message) if stranger.draw.random() < 0.7 else message
    length = stranger.draw.choice((len(envelope), len(envelope), 2**40))
    await stream.write(_varint(length) + envelope)
    await stream.close()


async def mux_frames(stranger: Stranger, message: bytes) -> None:
    """Garbage inside the encrypted session, where Yamux frames are due."""
    header = struct.pack(
        ">BBHII",
        stranger.draw.choice((0, 0, 7)),
        stranger.draw.randrange(5),
        stranger.draw.getrandbits(4),
        stranger.draw.getrandbits(32),
        stranger.draw.choice((0, len(message), 2**32 - 1)),
    )
    await stranger.muxed.secured_conn.write(header + message)


def deeds() -> dict[str, tuple[Deed, tuple[bytes, ...]]]:
    """Everything a connected stranger may do, with the honest messages it distorts."""
    made: dict[str, tuple[Deed, tuple[bytes, ...]]] = {}
    for protocol, exchange in exchanges().items():
        made[protocol] = body_of(protocol), exchange.request.valid
        made[f"{protocol} frames"] = frame_of(protocol), exchange.request.valid
    made["/shoal/ping/1"] = body_of("/shoal/ping/1"), (b"12345678",)
    made["/shoal/ping/1 frames"] = frame_of("/shoal/ping/1"), (b"12345678",)
    made["negotiation"] = negotiation, (b"\x13/multistream/1.0.0\n",)
    made["identify"] = library_stream, (b"\x0a\x24\x08\x01\x12\x20" + bytes(32),)
    made["gossip"] = gossip, announcements()[LOTS_TOPIC].valid
    made["yamux"] = mux_frames, (bytes(12),)
    return made


class Attack:
    """Strangers, one after another, against one address.

    Args:
        address: The target, ending in its peer id.
        seed: Chooses every message.
        pace_s: Pause between two messages.
        gives_up: A stranger who is turned away at the door, as where its address is banned, has
            one message less to send.
    """

    def __init__(
        self, address: str, seed: int, *, pace_s: float = 0.0, gives_up: bool = False
    ) -> None:
        self._target = info_from_p2p_addr(Multiaddr(address))
        self._draw = random.Random(seed)
        self._pace_s = pace_s
        self._gives_up = gives_up
        # Half of the strangers share one name.
        self._shared = create_new_key_pair()
        self.sent: Counter[str] = Counter()
        self.num_strangers = 0
        self._kinds = {
            name: (deed, iter(Malformer(valid, self._draw.getrandbits(32))))
            for name, (deed, valid) in deeds().items()
        }

    def run(self, count: int) -> None:
        """`count` messages of each kind were sent; blocks, in a trio loop of its own."""
        trio.run(self._all, count)

    async def _all(self, count: int) -> None:
        left = dict.fromkeys(self._kinds, count)
        while left:
            keys = self._shared if self._draw.random() < 0.5 else create_new_key_pair()
            try:
                async with connected(self._target, keys) as host:
                    stranger = Stranger(host, self._target.peer_id, self._draw)
                    self.num_strangers += 1
                    await self._misbehave(stranger, left)
            except Exception:
                # The library's own end of a misused connection fails in many ways; it is the
                # target that is on trial.
                if self._gives_up:
                    left[self._draw.choice(list(left))] -= 1
                await trio.sleep(0.01)
            left = {name: number for name, number in left.items() if number > 0}

    async def _misbehave(self, stranger: Stranger, left: dict[str, int]) -> None:
        """A share of what is left, until the target hangs up."""
        for _ in range(PER_CONNECTION):
            names = [name for name, number in left.items() if number > 0]
            if not names or not stranger.is_connected:
                return
            name = self._draw.choice(names)
            deed, messages = self._kinds[name]
            left[name] -= 1
            self.sent[name] += 1
            try:
                with trio.fail_after(WAIT_S):
                    await deed(stranger, next(messages))
            except trio.TooSlowError:
                return  # its connection is stuck in what it sent; the target's pings end it
            except _REFUSED:
                if not stranger.is_connected:
                    return
            if self._pace_s:
                await trio.sleep(self._pace_s)


@asynccontextmanager
async def connected(target: PeerInfo, keys: KeyPair) -> Any:
    """A bare host with a connection to `target`; its sockets are closed at the end."""
    noise = NoiseTransport(keys, noise_privkey=create_noise_key_pair().private_key)
    host = new_host(
        key_pair=keys,
        sec_opt={NOISE_ID: noise},
        muxer_opt={TProtocol(YAMUX_ID): Yamux},
        disable_identify_address_discovery=True,
    )
    network: Any = host.get_network()
    network.retry_config.max_retries = 0
    async with host.run(listen_addrs=[]):
        with trio.fail_after(5):
            await host.connect(target)
        try:
            yield host
        finally:
            for connection in network.get_connections(target.peer_id):
                with trio.CancelScope(deadline=trio.current_time() + 1, shield=True):
                    await connection.muxed_conn.secured_conn.close()


def raw_messages(seed: int) -> Iterator[bytes]:
    """What a port may hear before any handshake: garbage, other protocols, nearly right."""
    valid = (
        b"\x13/multistream/1.0.0\n\x07/noise\n" + bytes(34),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
    )
    return iter(Malformer(valid, seed))


def http_messages(digest: str, seed: int) -> Iterator[bytes]:
    """Requests a blob server may hear: wrong digests, ranges, lengths, lines, bodies."""
    draw = random.Random(seed)
    valid = tuple(
        f"{line} HTTP/1.1\r\nHost: shoal\r\n{more}\r\n".encode() + body
        for line, more, body in (
            (f"GET /blobs/{digest}", "Range: bytes=0-9\r\n", b""),
            (f"GET /blobs/{'f' * 64}", "", b""),
            ("GET /blobs/../../etc/passwd", "", b""),
            (f"HEAD /blobs/{digest}", "Range: bytes=-1,5-2,9223372036854775808-\r\n", b""),
            (f"PUT /blobs/{digest}", "Content-Length: 9223372036854775808\r\n", b"x"),
            (f"PUT /blobs/{digest}", "Authorization: Bearer x\r\nContent-Length: 4\r\n", b"y"),
            (f"PUT /blobs/{digest}", "Transfer-Encoding: chunked\r\n", b"ffffffffffffffff\r\n"),
            (f"GET /blobs/{digest}", f"Range: bytes={'9' * 500}-\r\n", b""),
        )
    )
    messages = iter(Malformer(valid, seed))
    while True:
        yield draw.choice(valid) if draw.random() < 0.3 else next(messages)


def come_from(address: str) -> None:
    """From now on this process dials from `address`, one of this machine's own."""
    trio.open_tcp_stream = functools.partial(trio.open_tcp_stream, local_address=address)


async def pour_on(port: int, messages: Iterable[bytes], *, pace_s: float = 0.0) -> int:
    """How many messages were sent to the port, each on a socket of its own.

    One in sixteen sockets is left open and silent until the end.
    """
    open_ones: list[trio.SocketStream] = []
    sent = 0
    for message in messages:
        try:
            with trio.move_on_after(WAIT_S):
                socket = await trio.open_tcp_stream("127.0.0.1", port)
                await socket.send_all(message or b"\r")
                sent += 1
                if sent % 16 == 0:
                    open_ones.append(socket)
                    continue
                with trio.move_on_after(0.02):
                    await socket.receive_some(4096)
                await socket.aclose()
        except (OSError, trio.BrokenResourceError):
            continue
        if len(open_ones) > 64:
            await open_ones.pop(0).aclose()
        if pace_s:
            await trio.sleep(pace_s)
    for socket in open_ones:
        await socket.aclose()
    return sent


def _envelope(stranger: Stranger, message: bytes) -> bytes:
    draw = stranger.draw
    rpc = rpc_pb2.RPC()
    for _ in range(draw.choice((1, 1, 1, 200))):
        one = rpc.publish.add()
        one.data = message[:2000]
        one.from_id = draw.choice((stranger.host.get_id().to_bytes(), draw.randbytes(38), b""))
        one.seqno = draw.randbytes(8)
        one.topicIDs.append(draw.choice((LOTS_TOPIC, "nobody/hears/1")))
        one.signature = draw.randbytes(64)
    for number in range(draw.choice((0, 1, 300))):
        subscription = rpc.subscriptions.add()
        subscription.subscribe = True
        subscription.topicid = f"topic {number}"
    return rpc.SerializeToString()


async def _read_frame(stream: INetStream) -> None:
    header = b""
    while len(header) < _HEADER.size:
        part = await stream.read(_HEADER.size - len(header))
        if not part:
            raise EOFError
        header += part
    left, _ = _HEADER.unpack(header)
    while left:
        part = await stream.read(min(left, 1 << 16))
        if not part:
            raise EOFError
        left -= len(part)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])
