"""The way out: each of the orchestrator's addresses, by API, TCP and libp2p, and its blobs."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Final

from shoal.network.port import Network
from shoal.protocol.errors import InvalidRequest, ShoalError
from shoal.protocol.node import HelloReply
from shoal.worker.doctor.report import Finding, Level, fail, ok, warn
from shoal.worker.session import Link, greet
from shoal.worker.ways import find_addresses

_TCP_S: Final = 4.0
_HANDSHAKE_S: Final = 3.5
_GREETING_S: Final = 2.5
_GREET_ALL_S: Final = 2.0
"""No further address is greeted after so long: with the last one it is 8 s at most."""
_MAX_ADDRESSES: Final = 8
_NOWHERE: Final = "0" * 64
_NOT_FOUND: Final = 404


@dataclass(kw_only=True)
class Way:
    """What was found on the way to the orchestrator.

    Attributes:
        link: The connection, while there is one.
        greeting: What the orchestrator said, once it did.
        round_trip_ms: Of the greeting.
        findings: A line for each address.
    """

    link: Link
    greeting: HelloReply | None = None
    round_trip_ms: float = 0.0
    findings: list[Finding] = field(default_factory=list)


async def look_for_orchestrator(way: Way, network: Network, wanted: Sequence[str]) -> None:
    """Every address has been tried, as far as time allowed; one that answered is connected.

    All are knocked at together; those that open are greeted one after the other, since a node
    has one connection to a peer.
    """
    names = await asyncio.gather(*(look_up(name) for name in wanted))
    way.findings += [finding for findings, _ in names for finding in findings]
    addresses = list(dict.fromkeys(address for _, found in names for address in found))
    addresses = addresses[:_MAX_ADDRESSES]
    knocks = await asyncio.gather(*(_knock_at(address) for address in addresses))
    begun, kept = perf_counter(), None
    for address, knocked in zip(addresses, knocks, strict=True):
        if isinstance(knocked, Finding):
            way.findings.append(knocked)
        elif perf_counter() - begun > _GREET_ALL_S:
            mend = f"shoal worker doctor {address}"
            way.findings.append(warn("reach", _what(address), f"TCP in {knocked}, no time", mend))
        else:
            finding = await _greet_at(way, network, address, knocked)
            way.findings.append(finding)
            if finding.level is not Level.FAIL:
                kept = address
    if kept is not None:
        # One way in is enough: what else does not work is only a pity.
        way.findings = [_softened(finding) for finding in way.findings]
        if way.link.peer is None:
            await way.link.dial(kept)


async def look_up(name: str) -> tuple[list[Finding], tuple[str, ...]]:
    """The libp2p addresses behind what the provider wrote down, and how its API answered."""
    begun = perf_counter()
    try:
        addresses = await find_addresses(name, timeout_s=_TCP_S)
    except ShoalError as error:
        mend = "check the address, and that a firewall lets this machine out"
        return [fail("api", f"API {name}", error.message, mend)], ()
    if name.startswith("/"):
        return [], addresses
    took = _took(begun)
    names = f"{len(addresses)} address{'' if len(addresses) == 1 else 'es'}"
    return [ok("api", f"API {name}", f"answers in {took}, names {names}")], addresses


async def _knock_at(address: str) -> str | Finding:
    """How long a TCP connection took, or why there is none."""
    begun = perf_counter()
    try:
        await knock(*tcp_target(address))
    except InvalidRequest as error:
        mend = "copy one from the orchestrator's start-up line"
        return fail("reach", _what(address), error.message, mend)
    except OSError as error:
        return fail("reach", _what(address), *why_not(error))
    return _took(begun)


async def _greet_at(way: Way, network: Network, address: str, tcp: str) -> Finding:
    what = _what(address)
    if way.link.peer is not None:
        # A second dial to a connected peer would try nothing.
        await network.disconnect(way.link.peer)
        await way.link.close()
    try:
        begun = perf_counter()
        async with asyncio.timeout(_HANDSHAKE_S):
            await way.link.dial(address)
        handshake = _took(begun)
        begun = perf_counter()
        async with asyncio.timeout(_GREETING_S):
            way.greeting = await greet(way.link)
        way.round_trip_ms = 1_000 * (perf_counter() - begun)
    except TimeoutError:
        mend = "something answers TCP there but not libp2p: a proxy, or another program's port"
        return fail("reach", what, f"TCP in {tcp}, then silence", mend)
    except ShoalError as error:
        return fail("reach", what, f"TCP in {tcp}, then: {error.message}", _mend_of(error))
    greeted = f"{way.round_trip_ms:.0f} ms"
    return ok("reach", what, f"TCP in {tcp}, handshake in {handshake}, greeting in {greeted}")


async def look_at_blobs(greeting: HelloReply) -> list[Finding]:
    """Whether bytes can be fetched from where the greeting says."""
    bases = [url for url in greeting.blob_urls if not url.startswith("/")]
    findings = list(await asyncio.gather(*(_try_blobs(url) for url in bases)))
    others = len(bases) < len(greeting.blob_urls)
    if others or any(finding.level is Level.OK for finding in findings):
        return [_softened(finding) for finding in findings]
    return findings


async def _try_blobs(url: str) -> Finding:
    # Loaded here: `shoal worker --help` talks no HTTP.
    import aiohttp

    what = f"blobs {url}"
    begun = perf_counter()
    try:
        async with (
            aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=_TCP_S), trust_env=False
            ) as session,
            session.get(f"{url.rstrip('/')}/blobs/{_NOWHERE}", allow_redirects=False) as answer,
        ):
            status = answer.status
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        mend = "a firewall may block that port; the orchestrator's blob_port must be open"
        return fail("blobs", what, f"no answer ({type(error).__name__})", mend)
    if status != _NOT_FOUND:
        mend = "another program answers there: tell the orchestrator's operator"
        return fail("blobs", what, f"HTTP status {status} for a blob that is not", mend)
    return ok("blobs", what, f"answers in {_took(begun)}")


def tcp_target(address: str) -> tuple[str, int]:
    """Host and port that a libp2p address dials.

    Raises:
        InvalidRequest: it names no TCP port, or no host.

    Example:
        >>> tcp_target("/dns4/market.example.org/tcp/443/tls/ws/p2p/12D3KooW")
        ('market.example.org', 443)
    """
    parts = address.split("/")
    hosts = {"ip4", "ip6", "dns", "dns4", "dns6"}
    if len(parts) >= 5 and parts[1] in hosts and parts[3] == "tcp" and parts[4].isdecimal():
        return parts[2], int(parts[4])
    raise InvalidRequest(
        f"The address {address[:200]!r} names no host and TCP port.", code="bad_address"
    )


async def knock(host: str, port: int) -> None:
    """A TCP connection to ``port`` was possible, and is closed again.

    Raises:
        OSError: it was not; `TimeoutError` is one of them.
    """
    async with asyncio.timeout(_TCP_S):
        _, writer = await asyncio.open_connection(host, port)
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


def why_not(error: OSError) -> tuple[str, str]:
    """Why nothing could be reached, and the mend."""
    if isinstance(error, socket.gaierror):
        return "its name is not known", "check the name, and this machine's DNS"
    if isinstance(error, TimeoutError):
        return (
            f"no answer within {_TCP_S:g} s",
            "a firewall drops it, here or there: let TCP to that port out, or ask the "
            "orchestrator's operator for an address on port 443",
        )
    if isinstance(error, ConnectionRefusedError):
        return "refused", "nothing listens there: check port and address, or wait for the restart"
    return error.strerror or str(error), "check this machine's network"


def _mend_of(error: ShoalError) -> str:
    if error.code == "stale_version":
        return "install the matching release of Shoal"
    return "check the peer id at the address's end, and that the orchestrator runs"


def _softened(finding: Finding) -> Finding:
    if finding.level is not Level.FAIL:
        return finding
    return warn(finding.check, finding.what, finding.measured, finding.mend)


def _what(address: str) -> str:
    return f"reach {shortened(address)}"


def shortened(address: str) -> str:
    """``address`` with its peer id cut to what tells it apart."""
    head, slash, peer = address.rpartition("/p2p/")
    return f"{head}/p2p/…{peer[-6:]}" if slash and len(peer) > 8 else address


def _took(begun: float) -> str:
    return f"{1_000 * (perf_counter() - begun):.0f} ms"
