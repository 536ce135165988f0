"""A libp2p host with only what Shoal trusts in it, and py-libp2p 0.8.1's traps disarmed.

Everything that depends on that version's private parts stands in this module; the library
is pinned exactly and the contract tests cover each of them.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from typing import Final

import libp2p.network.swarm as swarm_module
import trio
from libp2p import new_host
from libp2p.abc import IHost, IMultiselectCommunicator
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.custom_types import StreamHandlerFn, TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.config import ConnectionConfig
from libp2p.network.swarm import Swarm
from libp2p.peer.peerinfo import PeerInfo, info_from_p2p_addr
from libp2p.protocol_muxer.exceptions import MultiselectCommunicatorError
from libp2p.protocol_muxer.multiselect import DEFAULT_NEGOTIATE_TIMEOUT, Multiselect
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pubsub import Pubsub
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_ID
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX_ID
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.transport.tcp.tcp import TCP
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from shoal.network.identity import NodeIdentity
from shoal.network.libp2p_noise import mend_noise
from shoal.network.libp2p_websocket import WebSocketTransport
from shoal.network.libp2p_yamux import mend_yamux
from shoal.network.port import MAX_TOPIC_MESSAGE_BYTES, Limits
from shoal.protocol.errors import InvalidRequest

_HANDSHAKE_TIMEOUT_S: Final = 10.0
_GOSSIP_PROTOCOL: Final = TProtocol("/meshsub/1.1.0")
_GOSSIP_MESSAGES_PER_S: Final = 50.0
_MAX_ADDRESS_CHARS: Final = 512
_MAX_PROTOCOLS_NAMED: Final = 16

# Warnings of the library tell of ordinary churn (a stranger hung up) and flood stderr.
logging.getLogger("libp2p").setLevel(logging.CRITICAL)

# The dialler waits this long for its first attempt to *fail* before it looks whether it
# succeeded, so the library's 250 ms are added to every dial.
swarm_module._HAPPY_EYEBALLS_DELAY = 0.01
mend_yamux()
mend_noise()


class _NeverDials(AutoConnector):
    """Stands where the library dials every peer it has heard of until half its room is full.

    Who is connected is Shoal's decision, and a worker must not be made to dial strangers.
    """

    async def maybe_connect(self) -> None:
        """Nobody is dialled."""

    async def run_background_task(self, nursery: trio.Nursery) -> None:
        """Nothing runs."""


def build_host(
    identity: NodeIdentity, limits: Limits, *, announce: Sequence[Multiaddr] = ()
) -> IHost:
    """A host over TCP and WebSocket that speaks Noise and Yamux only.

    The library's own default also offers TLS, secio and *plaintext*, so the security
    options are always named here. `announce` is given out in place of the bound addresses.
    """
    keys = create_new_key_pair(identity.secret_seed())
    noise = NoiseTransport(keys, noise_privkey=create_noise_key_pair().private_key)
    host = new_host(
        key_pair=keys,
        transports=[TCP(), WebSocketTransport(_HANDSHAKE_TIMEOUT_S)],
        announce_addrs=list(announce) or None,
        sec_opt={NOISE_ID: noise},
        muxer_opt={TProtocol(YAMUX_ID): Yamux},
        disable_identify_address_discovery=True,
        connection_config=ConnectionConfig(
            max_connections=limits.max_connections,
            max_connections_per_peer=limits.max_connections_per_peer,
            min_connections=0,
            low_watermark=0,
            high_watermark=limits.max_connections,
            inbound_upgrade_timeout=_HANDSHAKE_TIMEOUT_S,
            outbound_upgrade_timeout=_HANDSHAKE_TIMEOUT_S,
        ),
    )
    swarm = swarm_of(host)
    swarm.auto_connector = _NeverDials(swarm)
    # Dials are retried by their callers, who know their deadline.
    swarm.retry_config.max_retries = 0
    # The default manager refuses peers by process memory, by rate and by a circuit breaker,
    # none of which says so to anyone; Shoal's own caps are in `Limits`.
    swarm.set_resource_manager(None)
    if not isinstance(host, BasicHost):
        raise TypeError(f"expected a BasicHost, found {type(host).__name__}")
    host.multiselect = _ShortNegotiation(dict(host.multiselect.handlers))
    return host


def swarm_of(host: IHost) -> Swarm:
    """The host's swarm, by its concrete type."""
    network = host.get_network()
    if not isinstance(network, Swarm):
        raise TypeError(f"expected a Swarm, found {type(network).__name__}")
    return network


def build_gossip(host: IHost) -> tuple[Pubsub, GossipSub]:
    """A signed gossip router, sized for announcements rather than for bulk."""
    router = GossipSub(
        protocols=[_GOSSIP_PROTOCOL],
        degree=6,
        degree_low=4,
        degree_high=12,
        # The library's default of 120 s leaves a new peer outside the mesh for two minutes.
        heartbeat_interval=1,
        # Its default of 10 loses messages silently at modest rates.
        max_messages_per_topic_per_second=_GOSSIP_MESSAGES_PER_S,
    )
    pubsub = Pubsub(
        host,
        router,
        strict_signing=True,
        cache_size=1024,
        # Otherwise a bad message sent again and again would count once for five minutes.
        validation_cache_ttl=0,
        max_inbound_rpc_size=4 * MAX_TOPIC_MESSAGE_BYTES,
        max_subscriptions_per_peer=64,
    )
    return pubsub, router


def parse_listen(addresses: Sequence[str]) -> list[Multiaddr]:
    """The listen addresses, once each is known to be TCP or WebSocket on an IP of its own port.

    Raises:
        InvalidRequest: One is not, names a port twice, or its port is taken.
    """
    found: list[Multiaddr] = []
    ports: set[tuple[str, str]] = set()
    for address in addresses:
        parsed = _parse(address)
        names = [protocol.name for protocol in parsed.protocols()]
        if names[2:] in (["tls", "ws"], ["wss"]):
            raise InvalidRequest(
                f"A node cannot listen on {address!r}: it holds no TLS certificate; listen on "
                "/ws behind a TLS proxy and announce the proxy's address.",
                code="no_certificate",
            )
        if names[:1] not in (["ip4"], ["ip6"]) or names[1:] not in (["tcp"], ["tcp", "ws"]):
            raise InvalidRequest(
                f"The listen address {address!r} is not of the form /ip4/127.0.0.1/tcp/4001 or "
                "/ip4/127.0.0.1/tcp/4002/ws; name an IP address and a TCP port."
            )
        port = str(parsed.value_for_protocol("tcp"))
        place = (str(parsed.value_for_protocol(names[0])), port)
        if port != "0" and place in ports:
            raise InvalidRequest(
                f"The listen address {address!r} names port {port} a second time; give TCP and "
                "WebSocket a port each."
            )
        ports.add(place)
        _probe_port(parsed, names[0], address)
        found.append(parsed)
    return found


def parse_announce(addresses: Sequence[str]) -> list[Multiaddr]:
    """The addresses to give out, once each is known to be dialable by others.

    Raises:
        InvalidRequest: One is malformed or names no TCP port.
    """
    found = [_parse(address) for address in addresses]
    for address, parsed in zip(addresses, found, strict=True):
        if not any(protocol.name == "tcp" for protocol in parsed.protocols()):
            raise InvalidRequest(
                f"The announced address {address!r} names no TCP port; write it like "
                "/dns4/orchestrator.example.org/tcp/443/tls/ws."
            )
    return found


def parse_peer(address: str) -> PeerInfo:
    """Who to dial and where.

    Raises:
        InvalidRequest: The address is malformed or does not end in ``/p2p/<peer_id>``.
    """
    parsed = _parse(address)
    try:
        return info_from_p2p_addr(parsed)
    except Exception as error:  # the library raises several unrelated classes here
        raise InvalidRequest(
            f"The address {address!r} does not end in /p2p/ and a peer id; "
            "copy it whole from the node's start-up line."
        ) from error


def _parse(address: str) -> Multiaddr:
    if len(address) > _MAX_ADDRESS_CHARS:
        raise InvalidRequest(
            f"An address of {len(address)} characters is over the limit of {_MAX_ADDRESS_CHARS}."
        )
    try:
        return Multiaddr(address)
    except (MultiaddrError, ValueError, UnicodeError) as error:
        raise InvalidRequest(
            f"{address!r} is not a network address; write it like /ip4/127.0.0.1/tcp/4001."
        ) from error


def _probe_port(parsed: Multiaddr, family: str, address: str) -> None:
    """Binds and releases the port without SO_REUSEPORT.

    The library listens with SO_REUSEPORT, so two nodes of one user would share a port and
    each receive half of the other's connections.
    """
    host, port = parsed.value_for_protocol(family), int(str(parsed.value_for_protocol("tcp")))
    kind = socket.AF_INET6 if family == "ip6" else socket.AF_INET
    with socket.socket(kind, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InvalidRequest(
                f"Cannot listen on {address}: {(error.strerror or str(error)).lower()}; "
                "stop what holds it or choose another port.",
                code="address_unavailable",
            ) from error


class _ShortNegotiation(Multiselect):
    """Protocol negotiation that ends a stream on which nothing we serve is asked for.

    The library answers "not available" for as long as a stranger goes on naming protocols.
    """

    async def negotiate(
        self,
        communicator: IMultiselectCommunicator,
        negotiate_timeout: int = DEFAULT_NEGOTIATE_TIMEOUT,
    ) -> tuple[TProtocol | None, StreamHandlerFn | None]:
        return await super().negotiate(_Counted(communicator), negotiate_timeout)


class _Counted(IMultiselectCommunicator):
    def __init__(self, inner: IMultiselectCommunicator) -> None:
        self._inner = inner
        self._reads_left = _MAX_PROTOCOLS_NAMED + 1

    async def write(self, msg_str: str) -> None:
        await self._inner.write(msg_str)

    async def read(self) -> str:
        self._reads_left -= 1
        if self._reads_left < 0:
            raise MultiselectCommunicatorError("too many protocols were named")
        return await self._inner.read()
