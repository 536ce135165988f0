"""Which addresses that strangers tell are worth dialling, and which would be a trap.

Whoever names an address decides where others connect, so a named address inside the
listener's own machine or network would turn every node into a scanner of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from enum import IntEnum
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Final

from shoal.network.egress import is_public

_FORM: Final = re.compile(
    r"/(?P<kind>ip4|ip6)/(?P<host>[0-9a-fA-F.:]{2,45})/tcp/(?P<port>[1-9][0-9]{0,4})(?:/ws)?"
    r"(?:/p2p/[1-9A-HJ-NP-Za-km-z]{30,100}/p2p-circuit)?"
    r"/p2p/(?P<peer>[1-9A-HJ-NP-Za-km-z]{30,100})"
)
_MAX_CHARS: Final = 300
_MAX_PORT: Final = 65_535

# Source: RFC 1918, RFC 6598 (shared by a carrier's customers), RFC 4193.
_SITES: Final = {
    4: tuple(
        ip_network(block)
        for block in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10")
    ),
    6: (ip_network("fc00::/7"),),
}

AddressRule = Callable[[str, str], bool]
"""Whether an address, told by a stranger, may be kept and dialled for a peer."""


class Scope(IntEnum):
    """How far an address reaches: the whole Internet, one site's network, one machine."""

    PUBLIC = 3
    PRIVATE = 2
    LOOPBACK = 1


def scope_of(address: str) -> Scope | None:
    """How far the address reaches.

    None when it is malformed, is a name rather than a number, or never reaches one host
    (unspecified, multicast, link-local with the cloud's metadata services, reserved).

    Example:
        >>> peer = "12D3KooWGzxzKZYveHXtpG6AsrUJBcWxHBFS2HsEoGTxrMLvKXtf"
        >>> scope_of(f"/ip4/10.1.2.3/tcp/4001/p2p/{peer}").name
        'PRIVATE'
    """
    match = _FORM.fullmatch(address) if len(address) <= _MAX_CHARS else None
    if match is None or int(match["port"]) > _MAX_PORT:
        return None
    try:
        host = ip_address(match["host"])
    except ValueError:
        return None
    if host.version != int(match["kind"][-1]):
        return None
    return _scope_of_host(host)


def is_from(address: str, observed_host: str) -> bool:
    """Whether a peer seen at ``observed_host`` may claim ``address`` as its own.

    A peer on the Internet may claim only the host its connection comes from: otherwise it
    could have everybody dial a victim's.  Within a site one host has many numbers.
    """
    match = _FORM.fullmatch(address) if len(address) <= _MAX_CHARS else None
    try:
        observed = ip_address(observed_host)
        claimed = None if match is None else ip_address(match["host"])
    except ValueError:
        return False
    if isinstance(observed, IPv6Address) and observed.ipv4_mapped is not None:
        observed = observed.ipv4_mapped
    return claimed == observed or _scope_of_host(observed) is not Scope.PUBLIC


def strangers_rule(own: Iterable[str]) -> AddressRule:
    """The rule for a node that is itself known by the addresses ``own``.

    An address is taken when it reaches at least as far as the nearest of the node's own: a
    node on the Internet dials no private network that a stranger names, and one that only
    ever met others at home takes addresses at home too.
    """
    scopes = [scope for address in own if (scope := scope_of(address)) is not None]
    least = min(scopes, default=Scope.PUBLIC)

    def may_dial(address: str, peer: str) -> bool:
        scope = scope_of(address)
        return scope is not None and scope >= least and address.endswith(f"/p2p/{peer}")

    return may_dial


def _scope_of_host(host: IPv4Address | IPv6Address) -> Scope | None:
    if isinstance(host, IPv6Address) and host.ipv4_mapped is not None:
        return _scope_of_host(host.ipv4_mapped)
    if host.is_loopback:
        return Scope.LOOPBACK
    if any(host in network for network in _SITES[host.version]):
        return Scope.PRIVATE
    return Scope.PUBLIC if is_public(str(host)) else None
