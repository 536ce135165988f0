"""Distances, buckets and records: who is near, who is kept, who lapses."""

from __future__ import annotations

import random
from functools import cache

from shoal.network.identity import NodeIdentity
from shoal.network.kademlia import (
    BUCKET_SIZE,
    MAX_KEYS,
    MAX_KEYS_PER_PEER,
    MAX_PROVIDERS_PER_KEY,
    ProviderRecords,
    RoutingTable,
    nearest,
    place_of,
)
from shoal.protocol.discovery import Contact

KEY = "ab" * 32
TTL_MS = 1_000


@cache
def contact(number: int) -> Contact:
    peer = NodeIdentity(number.to_bytes(32, "big")).peer_id
    return Contact(peer=peer, addresses=(f"/ip4/8.8.8.8/tcp/4001/p2p/{peer}",))


def key_of(number: int) -> str:
    return f"{number:064x}"


def test_nearest_are_those_of_least_xor() -> None:
    contacts = [contact(number) for number in range(1, 60)]
    got = nearest(contacts, KEY, 5)
    distances = [place_of(c.peer) ^ int(KEY, 16) for c in got]
    assert distances == sorted(place_of(c.peer) ^ int(KEY, 16) for c in contacts)[:5]


def test_a_full_bucket_takes_nobody_until_one_fails() -> None:
    own = contact(0)
    table = RoutingTable(own.peer)
    far = [
        c
        for c in map(contact, range(1, 90))
        if (place_of(c.peer) ^ place_of(own.peer)).bit_length() == 256
    ]
    assert len(far) > BUCKET_SIZE
    assert [table.add(c) for c in far] == [True] * BUCKET_SIZE + [False] * (len(far) - BUCKET_SIZE)
    assert len(table) == BUCKET_SIZE
    table.remove(far[0].peer)
    assert far[0] not in table.closest(KEY)
    assert table.add(far[-1])


def test_neither_the_node_itself_nor_one_without_address_enters_the_table() -> None:
    table = RoutingTable(contact(0).peer)
    assert not table.add(contact(0))
    assert not table.add(Contact(peer=contact(1).peer, addresses=()))
    assert len(table) == 0


def test_a_nodes_newer_addresses_replace_the_older() -> None:
    table = RoutingTable(contact(0).peer)
    table.add(contact(1))
    moved = Contact(peer=contact(1).peer, addresses=("/ip4/9.9.9.9/tcp/1/p2p/x",))
    table.add(moved)
    assert table.closest(KEY) == [moved]


def test_a_record_lapses_unless_it_is_renewed() -> None:
    records = ProviderRecords(TTL_MS, random.Random(1))
    records.put(KEY, contact(1), 0)
    records.put(KEY, contact(2), 0)
    records.put(KEY, contact(1), 500)
    assert len(records.get(KEY, 10, TTL_MS - 1)) == 2
    assert records.get(KEY, 10, TTL_MS) == [contact(1)]
    assert records.get(KEY, 10, TTL_MS + 500) == []
    assert len(records) == 0


def test_a_withdrawn_record_is_gone_and_makes_room() -> None:
    records = ProviderRecords(TTL_MS, random.Random(1))
    records.put(KEY, contact(1), 0)
    records.remove(KEY, contact(1).peer)
    records.remove(KEY, contact(1).peer)
    assert records.get(KEY, 10, 0) == []
    assert len(records) == 0


def test_a_key_and_a_peer_have_bounded_room() -> None:
    records = ProviderRecords(TTL_MS, random.Random(1))
    for number in range(MAX_PROVIDERS_PER_KEY):
        assert records.put(KEY, contact(number), 0)
    assert not records.put(KEY, contact(1_000), 0)
    assert records.put(KEY, contact(0), 1)

    for number in range(MAX_KEYS_PER_PEER):
        assert records.put(key_of(number), contact(2_000), 0)
    assert not records.put(key_of(9_999), contact(2_000), 0)
    assert records.put(key_of(0), contact(2_000), 0)


def test_all_keys_together_have_bounded_room_that_lapsed_ones_give_back() -> None:
    records = ProviderRecords(TTL_MS, random.Random(1))
    for number in range(MAX_KEYS):
        records.put(key_of(number), contact(number // MAX_KEYS_PER_PEER), 0)
    assert len(records) == MAX_KEYS
    assert not records.put(key_of(MAX_KEYS), contact(500), TTL_MS - 1)
    assert records.put(key_of(MAX_KEYS), contact(500), TTL_MS)
    assert len(records) == 1


def test_of_many_providers_each_is_told_in_its_turn() -> None:
    records = ProviderRecords(TTL_MS, random.Random(1))
    for number in range(32):
        records.put(KEY, contact(number), 0)
    told = {c.peer for _ in range(40) for c in records.get(KEY, 4, 0)}
    assert len(told) == 32
