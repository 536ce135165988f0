"""Finding peers nobody told us of: a table of providers shared by all nodes that can be dialled.

It is Kademlia over the `Network` port's own requests, so that every cap, deadline and ban of
the port holds for it, and that it runs alike in memory and over libp2p. What it finds are
claims of strangers: addresses worth a try, never a reason to trust.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterable
from typing import Final
from weakref import WeakValueDictionary

from shoal.network.identity import public_key_of
from shoal.network.kademlia import ProviderRecords, RoutingTable, nearest, place_of
from shoal.network.lookup import REPLICAS, Lookup
from shoal.network.port import Network
from shoal.network.reachability import AddressRule, is_from, strangers_rule
from shoal.protocol.clock import TimeSource
from shoal.protocol.discovery import (
    FIND_PROTOCOL,
    MAX_ADDRESSES,
    MAX_CLOSER,
    MAX_PROVIDE_BYTES,
    MAX_PROVIDERS,
    PROVIDE_PROTOCOL,
    Contact,
    FindReply,
    FindRequest,
    ProvideReply,
    ProvideRequest,
)
from shoal.protocol.errors import InvalidRequest, ShoalError, Unavailable
from shoal.protocol.ids import PeerId

_log: Final = logging.getLogger(__name__)

TTL_S: Final = 1_800
"""How long a record lasts: providers here are machines that come and go, so not for days."""

PROVIDE_EVERY_S: Final = 600
"""How often a record is renewed: two renewals may be lost before it lapses."""

FORGIVE_MS: Final = 60_000
_JOIN_TIMEOUT_S: Final = 10.0
_PROVIDE_TIMEOUT_S: Final = 20.0
_MAX_FAILED: Final = 1_024
_FIRST_PAUSE_S: Final = 2.0


class Discovery:
    """This node's view of the table, and, where it can be dialled, its share of it.

    Args:
        network: This node.
        time: The wall clock.
        bootstrap: Addresses of nodes that are asked first, from the operator's configuration.
        rule: Which addresses told by others are dialled; absent follows from where this node
            and those it was configured with can be reached.
        rng: Draws which of many providers are told.

    Raises:
        InvalidRequest: a bootstrap address does not end in ``/p2p/<peer id>``.
    """

    def __init__(
        self,
        network: Network,
        *,
        time: TimeSource,
        bootstrap: Iterable[str] = (),
        rule: AddressRule | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._network = network
        self._time = time
        self._rule = rule
        self._table = RoutingTable(network.peer_id)
        self._records = ProviderRecords(TTL_S * 1000, rng or random.Random())
        self._trusted: dict[str, Contact] = {}
        self._provided: dict[str, None] = {}
        self._announcing: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._failed_until_ms: dict[str, int] = {}
        self._task: asyncio.Task[None] | None = None
        for address in bootstrap:
            self.introduce(address)

    async def start(self) -> None:
        """The network, which is started, answers for its share of the table if it listens."""
        if self._own():
            self._network.serve(FIND_PROTOCOL, self._on_find, max_request_bytes=MAX_PROVIDE_BYTES)
            self._network.serve(
                PROVIDE_PROTOCOL, self._on_provide, max_request_bytes=MAX_PROVIDE_BYTES
            )
        self._task = asyncio.create_task(self._keep(), name="discovery")

    async def stop(self) -> None:
        """Nothing is provided again; what others keep of us lapses by itself."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def introduce(self, address: str) -> None:
        """The node at ``address``, named by our own configuration or session, is asked first.

        Raises:
            InvalidRequest: the address does not end in ``/p2p/<peer id>``.
        """
        _, slash, peer = address.rpartition("/p2p/")
        if not slash or not address.startswith("/"):
            raise InvalidRequest(
                f"The address {address[:300]!r} does not end in /p2p/ and a peer id; "
                "copy it whole from the node's start-up line.",
                code="bad_bootstrap",
            )
        public_key_of(PeerId(peer))
        if peer == self._network.peer_id:
            return
        known = self._trusted.get(peer)
        before = () if known is None else known.addresses
        addresses = tuple(dict.fromkeys((address, *before)))[:MAX_ADDRESSES]
        self._trusted[peer] = Contact(peer=peer, addresses=addresses)

    def will_provide(self, key: str) -> None:
        """``key`` is provided once this is started and has joined the table, and from then on."""
        self._provided[key] = None

    async def provide(self, key: str) -> int:
        """This node provides ``key``, and says so again until it is withdrawn or stops.

        Returns:
            How many nodes keep the record; 0 when this node can not be dialled.
        """
        self._provided[key] = None
        return await self._announce(key, self._own())

    async def withdraw(self, key: str) -> None:
        """This node provides ``key`` no more; nodes out of reach forget it when it lapses."""
        if self._provided.pop(key, 0) is None:
            self._records.remove(key, self._network.peer_id)
            await self._announce(key, ())

    async def find_providers(
        self, key: str, *, timeout_s: float, limit: int = MAX_PROVIDERS
    ) -> tuple[Contact, ...]:
        """Peers that say they provide ``key``, with addresses that may be dialled.

        Nobody found, or nobody in time, is an empty answer.
        """
        lookup = self._lookup(key)
        try:
            async with asyncio.timeout(timeout_s):
                await lookup.run(limit)
        except TimeoutError:
            pass
        finally:
            await lookup.close(self._trusted)
        now_ms = self._time.now_ms()
        found = {c.peer: c for c in self._records.get(key, limit, now_ms)} | lookup.found
        return tuple(
            contact
            for contact in found.values()
            if contact.peer != self._network.peer_id
            and self._failed_until_ms.get(contact.peer, 0) <= now_ms
        )[:limit]

    def note_failed(self, peer: PeerId) -> None:
        """The peer did not serve what it was said to provide: it is not found for a minute."""
        while len(self._failed_until_ms) >= _MAX_FAILED:
            del self._failed_until_ms[next(iter(self._failed_until_ms))]
        self._failed_until_ms[peer] = self._time.now_ms() + FORGIVE_MS

    async def join(self) -> int:
        """The nodes nearest to this one are known; returns how many nodes answered."""
        lookup = self._lookup(f"{place_of(self._network.peer_id):064x}")
        try:
            async with asyncio.timeout(_JOIN_TIMEOUT_S):
                # More than anybody provides: the walk ends where nobody is nearer.
                await lookup.run(1 << 30)
        except TimeoutError:
            pass
        finally:
            await lookup.close(self._trusted)
        return len(lookup.answered)

    async def _keep(self) -> None:
        """The table is joined, and what is provided is provided again, for ever."""
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                answered = await self.join()
                for key in list(self._provided):
                    await self._announce(key, self._own())
            except ShoalError as error:
                _log.warning("discovery_waits", extra={"reason": error.message})
                answered = 0
            # With nobody to ask yet, the next try is sooner.
            pause_s = PROVIDE_EVERY_S if answered else min(2 * pause_s, PROVIDE_EVERY_S)
            await asyncio.sleep(pause_s)

    async def _announce(self, key: str, addresses: tuple[str, ...]) -> int:
        # One word about a key at a time: a record on its way must not arrive after its withdrawal.
        async with self._announcing.setdefault(key, asyncio.Lock()):
            if bool(addresses) is not (key in self._provided):
                return 0
            return await self._tell(key, addresses)

    async def _tell(self, key: str, addresses: tuple[str, ...]) -> int:
        own = Contact(peer=self._network.peer_id, addresses=addresses)
        if addresses:
            self._records.put(key, own, self._time.now_ms())
        lookup = self._lookup(key)
        payload = ProvideRequest(key=key, addresses=addresses).encode()
        replies: list[bytes | None] = []
        try:
            async with asyncio.timeout(_PROVIDE_TIMEOUT_S):
                await lookup.run(1 << 30)
                near = nearest(lookup.answered.values(), key, REPLICAS)
                replies = await asyncio.gather(
                    *(lookup.send(contact, PROVIDE_PROTOCOL, payload) for contact in near)
                )
        except TimeoutError:
            _log.info("provide_too_slow", extra={"key": key})
        finally:
            await lookup.close(self._trusted)
        return sum(reply is not None for reply in replies)

    def _lookup(self, key: str) -> Lookup:
        return Lookup(
            self._network,
            self._table,
            key,
            start=self._trusted.values(),
            may_dial=self._may_dial(),
            own=self._own(),
        )

    def _may_dial(self) -> AddressRule:
        if self._rule is not None:
            return self._rule
        configured = [address for c in self._trusted.values() for address in c.addresses]
        return strangers_rule((*self._network.addresses, *configured))

    def _own(self) -> tuple[str, ...]:
        may_dial = self._may_dial()
        peer = self._network.peer_id
        return tuple(a for a in self._network.addresses if may_dial(a, peer))[:MAX_ADDRESSES]

    async def _on_find(self, peer: PeerId, payload: bytes) -> bytes:
        request = FindRequest.decode(payload, max_bytes=MAX_PROVIDE_BYTES)
        self._meet(peer, request.addresses)
        closer = [c for c in self._table.closest(request.key, MAX_CLOSER + 1) if c.peer != peer]
        reply = FindReply(
            providers=tuple(
                self._records.get(request.key, MAX_PROVIDERS, self._time.now_ms()),
            ),
            closer=tuple(closer[:MAX_CLOSER]),
        )
        return reply.encode()

    async def _on_provide(self, peer: PeerId, payload: bytes) -> bytes:
        request = ProvideRequest.decode(payload, max_bytes=MAX_PROVIDE_BYTES)
        if not request.addresses:
            self._records.remove(request.key, peer)
            return ProvideReply(ttl_s=0).encode()
        usable = self._usable(peer, request.addresses)
        if not usable:
            raise InvalidRequest(
                "None of these addresses may be dialled by others; announce one that reaches "
                "this node from where they are.",
                code="unreachable_address",
            )
        if not self._records.put(
            request.key, Contact(peer=peer, addresses=usable), self._time.now_ms()
        ):
            raise Unavailable(
                "This node keeps as many records as it can; others keep the rest.",
                code="no_room",
                retry_after_s=PROVIDE_EVERY_S,
            )
        return ProvideReply(ttl_s=TTL_S).encode()

    def _meet(self, peer: PeerId, addresses: tuple[str, ...]) -> None:
        usable = self._usable(peer, addresses)
        if usable:
            self._table.add(Contact(peer=peer, addresses=usable))

    def _usable(self, peer: PeerId, addresses: tuple[str, ...]) -> tuple[str, ...]:
        may_dial, seen = self._may_dial(), self._network.observed(peer)
        return tuple(
            address
            for address in addresses
            if may_dial(address, peer) and (seen is None or is_from(address, seen[0]))
        )
