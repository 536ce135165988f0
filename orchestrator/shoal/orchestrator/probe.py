"""Answers workers that look whether they could work here: clock, speed, and a dial-back.

Strangers may ask, so what one address and all of them together can take is capped, and only
the asker's own address is ever dialled.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from math import ceil
from time import monotonic
from typing import Final

from shoal.network.port import Network
from shoal.protocol.clock import TimeSource
from shoal.protocol.errors import InvalidRequest, Unavailable
from shoal.protocol.ids import PeerId
from shoal.protocol.probe import (
    MAX_PROBE_BYTES,
    PROBE_PROTOCOL,
    TOKEN_BYTES,
    DialBack,
    ProbeReply,
    ProbeRequest,
    pack_probe,
    unpack_probe,
)

_DIAL_TIMEOUT_S: Final = 3.0
_MAX_ADDRESSES: Final = 4_096
_LOWEST_FREE_PORT: Final = 1_024
_WEB_PORTS: Final = frozenset({80, 443})


@dataclass(frozen=True, kw_only=True)
class ProbeLimits:
    """What probes may cost.

    Attributes:
        bytes_of_one: Filling, in and out, for one address at once.
        bytes_per_s_of_one: How fast that comes back.
        bytes_of_all: Filling for all addresses together at once.
        bytes_per_s_of_all: How fast that comes back.
        dials_of_one: Dial-backs for one address at once.
        dials_per_s_of_one: How fast they come back.
        dials_of_all: Dial-backs for all addresses together at once.
        dials_per_s_of_all: How fast they come back.
    """

    bytes_of_one: int = 24 << 20
    bytes_per_s_of_one: float = 128 << 10
    bytes_of_all: int = 96 << 20
    bytes_per_s_of_all: float = 1 << 20
    dials_of_one: int = 6
    dials_per_s_of_one: float = 0.1
    dials_of_all: int = 60
    dials_per_s_of_all: float = 2.0


class Allowance:
    """How much each key may take: ``most`` at once, and ``per_s`` after that.

    Args:
        most: What a key that took nothing for long may take.
        per_s: How fast what was taken comes back.
        monotonic_s: The machine's monotonic clock.

    Example:
        >>> allowance = Allowance(10, 1.0, lambda: 0.0)
        >>> allowance.wait_s("a", 8), allowance.wait_s("a", 8)
        (0.0, 6.0)
    """

    def __init__(self, most: float, per_s: float, monotonic_s: Callable[[], float]) -> None:
        self._most = most
        self._per_s = per_s
        self._monotonic_s = monotonic_s
        self._taken: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, key: str, amount: float) -> float:
        """0 when ``amount`` was granted to ``key``; else how long until it can be."""
        now_s = self._monotonic_s()
        taken, at_s = self._taken.pop(key, (0.0, now_s))
        taken = max(0.0, taken - (now_s - at_s) * self._per_s)
        missing = taken + amount - self._most
        self._taken[key] = (taken if missing > 0 else taken + amount, now_s)
        while len(self._taken) > _MAX_ADDRESSES:
            self._taken.popitem(last=False)
        return max(0.0, missing / self._per_s)


class ProbeDesk:
    """Serves `PROBE_PROTOCOL`.

    Args:
        network: The orchestrator's node, which says where askers are seen.
        time: The orchestrator's clock.
        limits: What probes may cost.
        monotonic_s: The machine's monotonic clock.
    """

    def __init__(
        self,
        network: Network,
        time: TimeSource,
        limits: ProbeLimits | None = None,
        monotonic_s: Callable[[], float] = monotonic,
    ) -> None:
        limits = limits or ProbeLimits()
        self._network = network
        self._time = time
        self._bytes_of_one = Allowance(limits.bytes_of_one, limits.bytes_per_s_of_one, monotonic_s)
        self._bytes_of_all = Allowance(limits.bytes_of_all, limits.bytes_per_s_of_all, monotonic_s)
        self._dials_of_one = Allowance(limits.dials_of_one, limits.dials_per_s_of_one, monotonic_s)
        self._dials_of_all = Allowance(limits.dials_of_all, limits.dials_per_s_of_all, monotonic_s)

    def serve(self) -> None:
        """The node answers probes."""
        self._network.serve(PROBE_PROTOCOL, self._answer, max_request_bytes=MAX_PROBE_BYTES)

    async def _answer(self, peer: PeerId, message: bytes) -> bytes:
        request, received_bytes = unpack_probe(ProbeRequest, message)
        seen = self._network.observed(peer)
        # By address where there is one: a peer id costs a stranger nothing.
        key = peer if seen is None else _home_of(seen[0])
        cost = len(message) + request.download_bytes
        self._charge(self._bytes_of_one, self._bytes_of_all, key, cost)
        reached = None
        if request.dial_back is not None:
            reached = await self._dial_back(request.dial_back, key, seen)
        reply = ProbeReply(
            now_ms=self._time.now_ms(),
            observed=None if seen is None else _multiaddr(*seen),
            received_bytes=received_bytes,
            reached=reached,
        )
        return pack_probe(reply, request.download_bytes)

    async def _dial_back(
        self, wanted: DialBack, key: str, seen: tuple[str, int] | None
    ) -> bool | None:
        if seen is None:
            return None
        if wanted.port < _LOWEST_FREE_PORT and wanted.port not in _WEB_PORTS:
            raise InvalidRequest(
                f"Port {wanted.port} belongs to a system service and is not dialled; listen on "
                f"one from {_LOWEST_FREE_PORT} on, or on 80 or 443.",
                code="port_not_dialled",
            )
        self._charge(self._dials_of_one, self._dials_of_all, key, 1)
        return await reaches(seen[0], wanted.port, wanted.token)

    def _charge(self, of_one: Allowance, of_all: Allowance, key: str, amount: float) -> None:
        wait_s = of_one.wait_s(key, amount) or of_all.wait_s("", amount)
        if wait_s:
            raise Unavailable(
                f"This orchestrator answers only so many probes; try again in {ceil(wait_s)} s.",
                code="overloaded",
                retry_after_s=min(ceil(wait_s), 3_600),
            )


async def reaches(host: str, port: int, token: str) -> bool:
    """Whether who listens at ``host`` and ``port`` sends ``token``; nothing is sent to it."""
    writer = None
    try:
        async with asyncio.timeout(_DIAL_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, port)
            said = await reader.readexactly(2 * TOKEN_BYTES)
        return hmac.compare_digest(said, token.encode())
    except (OSError, TimeoutError, asyncio.IncompleteReadError):
        return False
    finally:
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(1):
                    await writer.wait_closed()


def _home_of(host: str) -> str:
    """``host``, or of an IPv6 address the network of 64 bits that one home is given whole."""
    address = ip_address(host.partition("%")[0])
    return str(ip_network((address, 64), strict=False)) if address.version == 6 else host


def _multiaddr(host: str, port: int) -> str:
    return f"/{'ip6' if ':' in host else 'ip4'}/{host}/tcp/{port}"
