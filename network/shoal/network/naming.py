"""Host names in addresses, resolved before libp2p, whose TCP dialler knows only numbers."""

from __future__ import annotations

import asyncio
import socket
from typing import Final

from shoal.protocol.errors import Clock, Expired, Unavailable

_FAMILIES: Final = {
    "dns": socket.AF_UNSPEC,
    "dns4": socket.AF_INET,
    "dns6": socket.AF_INET6,
}
_WEBSOCKETS: Final = frozenset({"ws", "wss"})


async def resolve(address: str, *, timeout_s: float) -> str:
    """The address with its host name replaced by that name's first IP, if it has a name.

    A WebSocket's name stays: a proxy picks its server, and its certificate, by it.

    Raises:
        Unavailable: The name does not resolve.
        Expired: The connect clock ran out first.

    Example:
        ``/dns4/localhost/tcp/4001/p2p/12D3KooW…`` gives ``/ip4/127.0.0.1/tcp/4001/p2p/12D3KooW…``.
    """
    parts = address.split("/")
    family = _FAMILIES.get(parts[1]) if len(parts) > 2 and not parts[0] else None
    if family is None or not _WEBSOCKETS.isdisjoint(parts[3:]):
        return address
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout_s):
            found = await loop.getaddrinfo(parts[2], None, family=family, type=socket.SOCK_STREAM)
    except TimeoutError:
        raise Expired(
            f"The name {parts[2]!r} did not resolve within {timeout_s:g} s.", clock=Clock.CONNECT
        ) from None
    except (OSError, UnicodeError) as error:
        raise Unavailable(
            f"The name {parts[2][:253]!r} does not resolve; check its spelling and your network.",
            code="name_unknown",
        ) from error
    kind = "ip6" if found[0][0] is socket.AF_INET6 else "ip4"
    return "/".join(["", kind, str(found[0][4][0]), *parts[3:]])
