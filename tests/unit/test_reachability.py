"""Which addresses told by strangers are dialled: each class of trap, with its control."""

from __future__ import annotations

import pytest

from shoal.network.identity import NodeIdentity
from shoal.network.reachability import Scope, is_from, scope_of, strangers_rule

PEER = NodeIdentity(bytes(32)).peer_id
OTHER = NodeIdentity(bytes(31) + b"\1").peer_id


def at(place: str, peer: str = PEER) -> str:
    return f"{place}/p2p/{peer}"


@pytest.mark.parametrize(
    ("place", "scope"),
    [
        ("/ip4/8.8.8.8/tcp/4001", Scope.PUBLIC),
        ("/ip4/8.8.8.8/tcp/443/ws", Scope.PUBLIC),
        ("/ip6/2600::1/tcp/4001", Scope.PUBLIC),
        (f"/ip4/8.8.8.8/tcp/4001/p2p/{OTHER}/p2p-circuit", Scope.PUBLIC),
        ("/ip4/10.0.0.1/tcp/4001", Scope.PRIVATE),
        ("/ip4/172.31.0.1/tcp/4001", Scope.PRIVATE),
        ("/ip4/192.168.1.1/tcp/4001", Scope.PRIVATE),
        ("/ip4/100.64.0.1/tcp/4001", Scope.PRIVATE),
        ("/ip6/fd00::1/tcp/4001", Scope.PRIVATE),
        ("/ip4/127.0.0.1/tcp/4001", Scope.LOOPBACK),
        ("/ip6/::1/tcp/4001", Scope.LOOPBACK),
        ("/ip6/::ffff:10.0.0.1/tcp/4001", Scope.PRIVATE),
        ("/ip6/::ffff:127.0.0.1/tcp/4001", Scope.LOOPBACK),
    ],
)
def test_an_address_reaches_as_far_as_its_number_says(place: str, scope: Scope) -> None:
    assert scope_of(at(place)) is scope


@pytest.mark.parametrize(
    "place",
    [
        "/ip4/0.0.0.0/tcp/4001",
        "/ip4/169.254.169.254/tcp/80",
        "/ip6/fe80::1/tcp/4001",
        "/ip4/224.0.0.1/tcp/4001",
        "/ip4/255.255.255.255/tcp/4001",
        "/ip4/192.0.2.1/tcp/4001",
        "/ip6/64:ff9b::a00:1/tcp/4001",
        "/ip6/2002:a00:1::/tcp/4001",
        "/ip6/2001:0:4136:e378:8000:63bf:3fff:fdd2/tcp/4001",
        "/ip4/010.0.0.1/tcp/4001",
        "/ip4/134744072/tcp/4001",
        "/ip4/0x8.8.8.8/tcp/4001",
        "/ip6/8.8.8.8/tcp/4001",
        "/ip4/8.8.8.8/tcp/0",
        "/ip4/8.8.8.8/tcp/65536",
        "/ip4/8.8.8.8/udp/4001",
        "/dns4/example.org/tcp/4001",
        "",
    ],
)
def test_what_is_no_hosts_number_is_nobodys_address(place: str) -> None:
    assert scope_of(at(place)) is None


def test_a_node_on_the_internet_dials_no_private_network_for_a_stranger() -> None:
    rule = strangers_rule([at("/ip4/9.9.9.9/tcp/4001", OTHER)])
    assert rule(at("/ip4/8.8.8.8/tcp/4001"), PEER)
    assert not rule(at("/ip4/10.0.0.1/tcp/4001"), PEER)
    assert not rule(at("/ip4/127.0.0.1/tcp/22"), PEER)
    # The control: at home the same addresses are the point.
    at_home = strangers_rule([at("/ip4/192.168.0.7/tcp/4001", OTHER)])
    assert at_home(at("/ip4/10.0.0.1/tcp/4001"), PEER)
    assert not at_home(at("/ip4/127.0.0.1/tcp/22"), PEER)
    assert strangers_rule([at("/ip4/127.0.0.1/tcp/1")])(at("/ip4/127.0.0.1/tcp/22"), PEER)


def test_a_node_that_knows_nothing_of_itself_dials_the_internet_only() -> None:
    rule = strangers_rule(["/memory/1/p2p/x", at("/ip4/0.0.0.0/tcp/4001")])
    assert rule(at("/ip4/8.8.8.8/tcp/4001"), PEER)
    assert not rule(at("/ip4/192.168.0.1/tcp/4001"), PEER)


def test_an_address_must_name_the_peer_it_is_told_for() -> None:
    rule = strangers_rule([])
    assert rule(at("/ip4/8.8.8.8/tcp/4001", OTHER), OTHER)
    assert not rule(at("/ip4/8.8.8.8/tcp/4001", OTHER), PEER)


def test_a_peer_on_the_internet_claims_only_the_host_it_is_seen_at() -> None:
    assert is_from(at("/ip4/8.8.8.8/tcp/4001"), "8.8.8.8")
    assert is_from(at("/ip4/8.8.8.8/tcp/4001"), "::ffff:8.8.8.8")
    assert not is_from(at("/ip4/9.9.9.9/tcp/22"), "8.8.8.8")
    assert is_from(at("/ip4/192.168.0.2/tcp/4001"), "192.168.0.1")
    assert not is_from("/dns4/example.org/tcp/1", "no address")
