"""Kademlia's arithmetic: distances, the table of nodes, the records of who provides what.

Pure and bounded: no clock, no network. Source: P. Maymounkov, D. Mazières, "Kademlia: A
Peer-to-peer Information System Based on the XOR Metric" (2002), sections 2.1 to 2.4.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

from shoal.protocol.discovery import Contact

BUCKET_SIZE: Final = 20
"""Nodes kept at each distance: the paper's k."""

MAX_KEYS: Final = 8_192
MAX_PROVIDERS_PER_KEY: Final = 64
MAX_KEYS_PER_PEER: Final = 256
_KEY_BITS: Final = 256


@lru_cache(maxsize=4_096)
def place_of(peer: str) -> int:
    """Where a peer stands among the keys: the SHA-256 of its id, as a number."""
    return int.from_bytes(hashlib.sha256(peer.encode()).digest(), "big")


def nearest(contacts: Iterable[Contact], key: str, count: int) -> list[Contact]:
    """The `count` contacts nearest to the key, by XOR, nearest first."""
    target = int(key, 16)
    return sorted(contacts, key=lambda contact: place_of(contact.peer) ^ target)[:count]


class RoutingTable:
    """The nodes known, at most `BUCKET_SIZE` at each distance from our own place.

    A full bucket takes nobody new until one of its nodes fails: nodes that have lasted are
    the likeliest to last, and a flood of fresh ids cannot push them out (section 2.2).

    Args:
        own: This node's peer id.
    """

    def __init__(self, own: str) -> None:
        self._own = own
        self._buckets: dict[int, dict[str, Contact]] = {}

    def __len__(self) -> int:
        return sum(len(bucket) for bucket in self._buckets.values())

    def add(self, contact: Contact) -> bool:
        """The node is in the table, with these addresses; False when there is no room."""
        bucket = self._buckets.setdefault(self._index(contact.peer), {})
        if contact.peer == self._own or not contact.addresses:
            return False
        if contact.peer not in bucket and len(bucket) >= BUCKET_SIZE:
            return False
        bucket[contact.peer] = contact
        return True

    def remove(self, peer: str) -> None:
        """The node failed, and is no longer told to anybody."""
        self._buckets.get(self._index(peer), {}).pop(peer, None)

    def closest(self, key: str, count: int = BUCKET_SIZE) -> list[Contact]:
        """The nodes nearest to the key, nearest first."""
        known = (contact for bucket in self._buckets.values() for contact in bucket.values())
        return nearest(known, key, count)

    def _index(self, peer: str) -> int:
        """How many leading bits the peer's place shares with ours."""
        return _KEY_BITS - (place_of(peer) ^ place_of(self._own)).bit_length()


class ProviderRecords:
    """Who provides what, until each record lapses.

    Args:
        ttl_ms: How long a record lasts.
        rng: Which of many providers are told is drawn, so that nobody can crowd the others
            out of the answer by being first.
    """

    def __init__(self, ttl_ms: int, rng: random.Random) -> None:
        self._ttl_ms = ttl_ms
        self._rng = rng
        self._of_key: dict[str, dict[str, tuple[int, Contact]]] = {}
        self._num_of_peer: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._num_of_peer.total()

    def put(self, key: str, contact: Contact, now_ms: int) -> bool:
        """The record is kept; False when its provider or the key has its fill already."""
        self._drop_lapsed(key, now_ms)
        known = self._of_key.get(key, {})
        if contact.peer not in known:
            if self._num_of_peer[contact.peer] >= MAX_KEYS_PER_PEER:
                return False
            if len(known) >= MAX_PROVIDERS_PER_KEY:
                return False
            if not known and len(self._of_key) >= MAX_KEYS and not self._sweep(now_ms):
                return False
            self._num_of_peer[contact.peer] += 1
        self._of_key.setdefault(key, {})[contact.peer] = (now_ms + self._ttl_ms, contact)
        return True

    def remove(self, key: str, peer: str) -> None:
        """The peer no longer provides the key."""
        known = self._of_key.get(key, {})
        if known.pop(peer, None) is None:
            return
        self._num_of_peer[peer] -= 1
        if not self._num_of_peer[peer]:
            del self._num_of_peer[peer]
        if not known:
            del self._of_key[key]

    def get(self, key: str, count: int, now_ms: int) -> list[Contact]:
        """At most `count` of the key's providers, drawn at random."""
        self._drop_lapsed(key, now_ms)
        known = [contact for _, contact in self._of_key.get(key, {}).values()]
        return self._rng.sample(known, min(count, len(known)))

    def _drop_lapsed(self, key: str, now_ms: int) -> None:
        for peer, (lapses_ms, _) in list(self._of_key.get(key, {}).items()):
            if lapses_ms <= now_ms:
                self.remove(key, peer)

    def _sweep(self, now_ms: int) -> bool:
        """Drops what has lapsed of every key; whether there is room now."""
        for key in list(self._of_key):
            self._drop_lapsed(key, now_ms)
        return len(self._of_key) < MAX_KEYS
