"""Offers of leases: each is sent to its node, which takes it, refuses it, or says nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, Protocol

from shoal.market import lease as leases
from shoal.market.lease import LeaseRecord, LeaseState
from shoal.orchestrator.context import Context
from shoal.orchestrator.hearing import Hearing
from shoal.orchestrator.leases import LeaseTable, LiveLease, printable
from shoal.orchestrator.roster import Member, Roster
from shoal.protocol.errors import ShoalError, Unavailable
from shoal.protocol.ids import PeerId
from shoal.protocol.node import LEASE_PROTOCOL, LeaseOffer, LeaseReply

ANSWER_WITHIN_MS: Final = 10_000
"""How long a node may take to say whether it takes a lease: its offer clock."""
_OFFER_TIMEOUT_S = ANSWER_WITHIN_MS / 1_000


class EndLease(Protocol):
    """What ends a lease that brought no paid result."""

    async def __call__(self, live: LiveLease, record: LeaseRecord, *, failed: bool) -> None:
        """The lease is over as ``record`` says, by the node's fault or not."""


class Offers:
    """Asks nodes whether they take the leases that they won.

    Args:
        context: What every part of the orchestrator uses.
        roster: The nodes, and which of them are here.
        hearing: Whether it is we who hear nobody.
        table: The live leases.
        end: What is done with a lease that its node does not take.
    """

    def __init__(
        self,
        context: Context,
        roster: Roster,
        hearing: Hearing,
        table: LeaseTable,
        end: EndLease,
    ) -> None:
        self._context = context
        self._roster = roster
        self._hearing = hearing
        self._table = table
        self._end = end
        self._pending: set[asyncio.Task[None]] = set()
        self.on_taken: Callable[[LiveLease, Member], None] = lambda live, member: None
        """Called with a lease, and the node that has just taken it."""

    def __len__(self) -> int:
        """How many offers are on their way."""
        return len(self._pending)

    def send(self, live: LiveLease) -> None:
        """Offers the lease, unless it has ended already; does not wait for the answer."""
        # A clock or the end of the job may have taken it back while it was written down.
        if live.record.state is LeaseState.OFFERED:
            offer = asyncio.create_task(self._offer(live))
            self._pending.add(offer)
            offer.add_done_callback(self._pending.discard)

    async def close(self) -> None:
        """Gives up the offers under way."""
        for offer in list(self._pending):
            offer.cancel()
        await asyncio.gather(*self._pending, return_exceptions=True)

    async def _offer(self, live: LiveLease) -> None:
        offer = LeaseOffer(
            lease=live.signed,
            task=live.task,
            upload_token=live.upload_token,
            max_result_bytes=live.max_result_bytes,
            revoked=self._table.untold(live.lease.node),
        )
        node = PeerId(live.lease.node)
        try:
            reply = LeaseReply.decode(await self._offered(node, offer.encode()))
            if reply.refusal is not None:
                await self._refused(live, reply.refusal)
                return
            self._table.change(
                live,
                leases.take(
                    live.record,
                    node=node,
                    lease_epoch=live.lease.lease_epoch,
                    now_ms=self._context.time.now_ms(),
                ),
            )
            if not live.workload.waiting:
                live.workload.handed_out.set()
            member = self._roster.find(node)
            if member is not None:
                self.on_taken(live, member)
        except ShoalError as error:
            await self._unanswered(live, error.message)

    async def _offered(self, node: PeerId, offer: bytes) -> bytes:
        """The node's answer to an offer, which it answers alike however often it hears it."""
        network = self._context.network
        try:
            return await network.request(node, LEASE_PROTOCOL, offer, timeout_s=_OFFER_TIMEOUT_S)
        except Unavailable:
            # A node that came back has replaced its connection: the offer goes over the new one.
            if node not in network.peers():
                raise
            return await network.request(node, LEASE_PROTOCOL, offer, timeout_s=_OFFER_TIMEOUT_S)

    async def _unanswered(self, live: LiveLease, reason: str) -> None:
        """No word of the holder's: the offer clock ends it if it has run out, else we do at once.

        The first heartbeat or even the result may have come first; only an offer still open is
        lost.
        """
        if live.record.state is not LeaseState.OFFERED:
            return
        now_ms = self._context.time.now_ms()
        member = self._roster.find(live.lease.node)
        is_here = member is not None and self._roster.is_here(member)
        if self._hearing.is_deaf(now_ms) and not is_here:
            record = leases.revoke(live.record, reason=printable(reason)[:500], now_ms=now_ms)
            await self._end(live, record, failed=False)
            return
        record = leases.expire_if_due(live.record, now_ms=now_ms)
        if record is live.record:
            await self._refused(live, reason)
        else:
            await self._end(live, record, failed=True)

    async def _refused(self, live: LiveLease, reason: str) -> None:
        if not live.record.state.is_open:
            return
        record = leases.refuse(
            live.record,
            node=live.lease.node,
            lease_epoch=live.lease.lease_epoch,
            reason=printable(reason)[:500],
            now_ms=self._context.time.now_ms(),
        )
        await self._end(live, record, failed=False)
