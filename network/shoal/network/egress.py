"""Where a stranger's URL may make us connect to: public addresses over HTTP(S), and no others.

The name is resolved once, each address it gives is judged, and the connection is made to those
very addresses, so a name that answers differently the second time gains nothing.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from typing import Final

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from shoal.protocol.errors import InvalidRequest, Unauthorised

_MAX_URL_CHARS: Final = 2048
_SCHEMES: Final = frozenset({"http", "https"})
# What every resolver takes for an IPv4 address although it is not written as one: 127.1,
# 2130706433, 0x7f000001, 0177.0.0.1 (inet_aton(3)).
_LOOKS_NUMERIC: Final = re.compile(r"(0x[0-9a-f]*|[0-9]+)(\.(0x[0-9a-f]*|[0-9]+))*\.?")

# Source: IANA IPv4 and IPv6 Special-Purpose Address Registries, whatever is not globally
# reachable or embeds an IPv4 address; class D and E; and Azure's metadata host, which is the one
# cloud service of that kind on an address that looks public.
_REFUSED: Final = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "168.63.129.16/32",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
        "::/96",
        "::ffff:0:0/96",
        "64:ff9b::/96",
        "64:ff9b:1::/48",
        "100::/64",
        "2001::/23",
        "2001:db8::/32",
        "2002::/16",
        "3fff::/20",
        "5f00::/16",
        "fc00::/7",
        "fe80::/10",
        "fec0::/10",
        "ff00::/8",
    )
)


def is_public(address: str) -> bool:
    """True when the IP address is one that any host on the Internet may be asked at."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    return not any(parsed in network for network in _REFUSED if network.version == parsed.version)


def check_url(url: str, *, allow_private: bool) -> URL:
    """The URL, once it is known to be one that may be asked.

    Unless `allow_private`, a host written as an address must be public, and written in the one
    usual way; a name is judged when it is resolved (`PublicResolver`).

    Raises:
        InvalidRequest: It is no HTTP(S) URL, or carries a user name or a password.
        Unauthorised: It leads to an address that strangers may not send us to.
    """
    shown = url[:200]
    if len(url) > _MAX_URL_CHARS:
        raise InvalidRequest(f"A URL of {len(url)} characters is over {_MAX_URL_CHARS}.")
    try:
        parsed = URL(url)
        host, scheme, _port = parsed.host, parsed.scheme, parsed.port
    except ValueError as error:
        raise InvalidRequest(f"{shown!r} is not a URL; write it like https://host/path.") from error
    if scheme not in _SCHEMES or not host or parsed.query_string or parsed.fragment:
        raise InvalidRequest(
            f"{shown!r} is not the address of a blob holder; write it like https://host/path."
        )
    if parsed.user is not None or parsed.password is not None or "@" in parsed.authority:
        raise InvalidRequest("A holder's URL carries a user name or a password; leave it out.")
    if not allow_private:
        _check_host(host)
    return parsed


def _check_host(host: str) -> None:
    if ":" not in host and not _LOOKS_NUMERIC.fullmatch(host.lower()):
        return
    try:
        usual = str(ipaddress.ip_address(host)) == host.lower()
    except ValueError:
        usual = False
    if not usual or not is_public(host):
        raise _refused(host, host)


def _refused(host: str, address: str) -> Unauthorised:
    return Unauthorised(
        f"The holder {host[:100]} is at {address[:100]}, which is not a public address; only "
        "holders named by your own configuration may be.",
        code="private_address",
    )


class PublicResolver(AbstractResolver):
    """Resolves names for a connector, and refuses each that leads anywhere but the Internet.

    Args:
        resolver: What asks the system; aiohttp's own when absent.
    """

    def __init__(self, resolver: AbstractResolver | None = None) -> None:
        self._resolver = resolver or aiohttp.ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """The host's addresses, every one of them public.

        Raises:
            Unauthorised: One of them is not.
            OSError: The name is not known.
        """
        found = await self._resolver.resolve(host, port, family)
        for entry in found:
            if not is_public(entry["host"]):
                raise _refused(host, entry["host"])
        return found

    async def close(self) -> None:
        """The resolver beneath is closed."""
        await self._resolver.close()
