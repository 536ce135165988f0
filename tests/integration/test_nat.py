"""Workers behind NATs reach each other: by a punched hole, by the relay, or not at all.

Real nodes in network namespaces, each a process of its own; `netlab` builds the network.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, fields

import pytest
from nat_child import Child
from netlab import Host, Nat, NetLab, require

CHUNK = 4 << 20
# What two connections' handshakes and pings may cost the relay, far below one chunk.
SMALL = 256 << 10
PATIENCE_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Country:
    """A relay, and workers at home."""

    relay: Child
    alice: Child
    neighbour: Child
    bob: Child
    symmetric: Child
    cautious: Child


@pytest.fixture(scope="module")
def country(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Country]:
    require()
    folder = tmp_path_factory.mktemp("nat")
    with NetLab() as lab:

        def child(host: Host, *argv: str) -> Child:
            return Child(host, folder / host.name, *argv)

        relay = child(lab.host("relay"), "relay")
        street = lab.lan("street")
        at_relay = relay.address
        country = Country(
            relay=relay,
            alice=child(street.host("alice"), "worker", at_relay, "punch"),
            neighbour=child(street.host("neighbour"), "worker", at_relay, "punch"),
            bob=child(lab.natted("bob"), "worker", at_relay, "punch"),
            symmetric=child(
                lab.natted("symmetric", kind=Nat.SYMMETRIC), "worker", at_relay, "punch"
            ),
            cautious=child(lab.natted("cautious"), "worker", at_relay),
        )
        # All are up before the first hole, which wants both sides awake at once.
        for field in fields(country):
            assert getattr(country, field.name).peer_id
        yield country


def reach(asker: Child, asked: Child, wanted: str) -> None:
    """The asker has reached the asked in the wanted way, at once or after a while."""
    deadline = time.monotonic() + PATIENCE_S
    found = None
    while found != wanted and time.monotonic() < deadline:
        # Before the asked has its place at the relay, there is no way to it.
        answer = asker.tell("reach", asked.peer_id)
        assert answer in ({"ok": "direct"}, {"ok": "relayed"}, {"error": "not_reachable"})
        found = answer.get("ok")
    assert found == wanted


def carried(country: Country) -> float:
    return float(country.relay.get("meter", "relay_bytes"))


@pytest.mark.parametrize("asked", ["bob", "neighbour"])
def test_a_hole_is_punched_and_the_relay_carries_nothing_more(country: Country, asked: str) -> None:
    asker, holder = country.alice, getattr(country, asked)
    reach(asker, holder, "direct")
    blob = holder.get("add", asked, 3 * CHUNK // len(asked))
    before = carried(country)
    assert asker.get("fetch", blob, holder.source) == blob[1]
    assert carried(country) - before < SMALL
    assert asker.get("meter", "holes") >= 1


@pytest.mark.parametrize("asked", ["symmetric", "cautious"])
def test_without_a_hole_the_relay_carries_the_chunks(country: Country, asked: str) -> None:
    asker, holder = country.bob, getattr(country, asked)
    reach(asker, holder, "relayed")
    blob = holder.get("add", asked, 2 * CHUNK // len(asked))
    before = carried(country)
    assert asker.get("fetch", blob, holder.source) == blob[1]
    assert carried(country) - before >= blob[1]


def test_a_blob_is_fetched_by_the_peers_name_alone(country: Country) -> None:
    blob = country.bob.get("add", "by name", CHUNK // 4)
    assert country.symmetric.get("fetch", blob, country.bob.source) == blob[1]


def test_a_guest_gets_blobs_and_nothing_else(country: Country) -> None:
    for asked in (country.bob, country.symmetric):
        asker = country.alice if asked is country.bob else country.bob
        assert asker.tell("reach", asked.peer_id)["ok"] in {"direct", "relayed"}
        for one, other in ((asker, asked), (asked, asker)):
            assert one.tell("ask", other.peer_id, "/test/own/1") == {"error": "unknown_protocol"}
        # Whom the worker dialled itself is no guest.
        answer = country.relay.get("ask", asked.peer_id, "/test/own/1")
        assert answer == "for the orchestrator only"
