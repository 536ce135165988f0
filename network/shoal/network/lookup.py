"""One walk through the table of providers: from the nodes known to those nearest a key."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Final

from shoal.network.kademlia import RoutingTable, nearest
from shoal.network.port import Network
from shoal.network.reachability import AddressRule
from shoal.protocol.discovery import (
    FIND_PROTOCOL,
    MAX_FIND_BYTES,
    Contact,
    FindReply,
    FindRequest,
)
from shoal.protocol.errors import ShoalError
from shoal.protocol.ids import PeerId

ALPHA: Final = 3
"""Nodes asked at once. Source: Kademlia (2002), section 2.3."""

REPLICAS: Final = 8
"""How many nodes keep a record, and so how many of the nearest a walk asks before it ends."""

MAX_DIALS: Final = 16
"""Nodes one walk may connect to: what strangers name costs a bounded number of dials."""

_CONNECT_TIMEOUT_S: Final = 2.0
_REPLY_TIMEOUT_S: Final = 3.0


class Lookup:
    """Asks ever nearer nodes for a key's providers; closes the connections it opened.

    Args:
        network: This node.
        table: What is known; nodes that answer enter it, nodes that fail leave it.
        key: What is looked up.
        start: Nodes to ask first, beside those in the table.
        may_dial: Which addresses told by others are dialled.
        own: This node's own addresses, told to those asked.
    """

    def __init__(
        self,
        network: Network,
        table: RoutingTable,
        key: str,
        *,
        start: Iterable[Contact],
        may_dial: AddressRule,
        own: tuple[str, ...],
    ) -> None:
        self._network = network
        self._table = table
        self._key = key
        self._may_dial = may_dial
        self._request = FindRequest(key=key, addresses=own).encode()
        self._known = {contact.peer: contact for contact in (*table.closest(key), *start)}
        self._asked: set[str] = {network.peer_id}
        self._opened: set[PeerId] = set()
        self._dials_left = MAX_DIALS
        self.found: dict[str, Contact] = {}
        self.answered: dict[str, Contact] = {}

    async def run(self, enough: int) -> None:
        """`found` holds `enough` providers, or nobody nearer is left to ask."""
        while len(self.found) < enough:
            near = nearest(self._known.values(), self._key, REPLICAS)
            todo = [contact for contact in near if contact.peer not in self._asked][:ALPHA]
            if not todo:
                return
            await asyncio.gather(*(self._ask(contact) for contact in todo))

    async def send(self, contact: Contact, protocol: str, payload: bytes) -> bytes | None:
        """The node's reply; None when it can not be reached or refuses."""
        try:
            if PeerId(contact.peer) not in self._network.peers():
                await self._connect(contact)
            return await self._network.request(
                PeerId(contact.peer), protocol, payload, timeout_s=_REPLY_TIMEOUT_S
            )
        except ShoalError:
            return None

    async def close(self, kept: Iterable[str]) -> None:
        """The connections this walk opened are closed, but for those to `kept` peers."""
        for peer in self._opened.difference(map(PeerId, kept)):
            try:
                await self._network.disconnect(peer)
            except ShoalError:
                return

    async def _ask(self, contact: Contact) -> None:
        self._asked.add(contact.peer)
        raw = await self.send(contact, FIND_PROTOCOL, self._request)
        reply = None if raw is None else _decode(raw)
        if reply is None:
            self._known.pop(contact.peer, None)
            self._table.remove(contact.peer)
            return
        self._table.add(contact)
        self.answered[contact.peer] = contact
        for told in map(self._checked, reply.closer):
            if told is not None and told.peer != self._network.peer_id:
                self._known.setdefault(told.peer, told)
        for told in map(self._checked, reply.providers):
            if told is not None:
                self.found.setdefault(told.peer, told)

    def _checked(self, told: Contact) -> Contact | None:
        """The contact with only the addresses that may be dialled; None without any."""
        usable = tuple(a for a in told.addresses if self._may_dial(a, told.peer))
        return Contact(peer=told.peer, addresses=usable) if usable else None

    async def _connect(self, contact: Contact) -> None:
        for number, address in enumerate(contact.addresses, start=1):
            if self._dials_left <= 0:
                break
            self._dials_left -= 1
            try:
                await self._network.connect(address, timeout_s=_CONNECT_TIMEOUT_S)
            except ShoalError:
                if number == len(contact.addresses):
                    raise
                continue
            self._opened.add(PeerId(contact.peer))
            return


def _decode(raw: bytes) -> FindReply | None:
    try:
        return FindReply.decode(raw, max_bytes=MAX_FIND_BYTES)
    except ShoalError:
        return None
