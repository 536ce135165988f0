"""The market's clock: standing bids in, awards out, each time either side changes."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Mapping

from shoal.market.auction import RejectReason, clear, split_award
from shoal.market.book import BidBook
from shoal.orchestrator.context import Context
from shoal.orchestrator.dispatcher import Dispatcher
from shoal.orchestrator.roster import Roster
from shoal.orchestrator.store.tables import BidRow, LotRow
from shoal.orchestrator.workload import Workload
from shoal.protocol.errors import InvariantBroken, OverBudget, ShoalError, Unauthorised, Unavailable
from shoal.protocol.ids import PeerId
from shoal.protocol.market import Bid, BidReceipt, TaskKind
from shoal.protocol.node import LOTS_TOPIC, IdleReason
from shoal.protocol.record import Record
from shoal.protocol.signing import Signed, sign

_log = logging.getLogger(__name__)

_SUSPENSION_MS = 10_000
_SEED_BYTES = 32


class Auctioneer:
    """Holds the book and the open workloads, and clears one against the other."""

    def __init__(self, context: Context, roster: Roster, dispatcher: Dispatcher) -> None:
        self._context = context
        self._roster = roster
        self._dispatcher = dispatcher
        self._book = BidBook(context.domain)
        self._open: list[Workload] = []
        self._changed = asyncio.Event()
        self._suspended_until_ms: dict[str, int] = {}
        self._idle: dict[str, RejectReason] = {}
        dispatcher.on_capacity = self.poke
        dispatcher.on_failure = self.suspend

    def poke(self) -> None:
        """Asks for another clearing."""
        self._changed.set()

    async def bid(self, peer: PeerId, signed: Signed[Bid]) -> Signed[BidReceipt]:
        """Puts the bid in the book and gives a signed receipt for it.

        Raises:
            Unauthorised: the bidder has not joined, or bids for another node or account.
            InvalidRequest, PeerFault: the bid breaks a rule of the book, which is named.
        """
        member = self._roster.member(peer)
        bid = signed.record
        if bid.node != peer or bid.account.lower() != member.account.lower():
            raise Unauthorised(
                f"The bid is for node {bid.node} of account {bid.account}, but this connection "
                f"is node {peer} of account {member.account}; bid for yourself.",
                code="wrong_node",
            )
        now_ms = self._context.time.now_ms()
        standing = self._book.add(signed, now_ms=now_ms)
        row = BidRow(
            bid_sha256=standing.sha256,
            account=bid.account,
            node=bid.node,
            nonce=bid.nonce,
            record=signed.encode().decode(),
            received_ms=now_ms,
        )
        await self._context.database.run(lambda session: session.merge(row) and None)
        self.poke()
        receipt = BidReceipt(bid_sha256=standing.sha256, received_at_ms=now_ms)
        return sign(receipt, self._context.domain, self._context.account)

    def suspend(self, node: str) -> None:
        """Keeps ``node`` out of auctions for a while: it refused, was silent or was rejected."""
        self._suspended_until_ms[node] = self._context.time.now_ms() + _SUSPENSION_MS

    def node_lost(self, node: str) -> None:
        """Takes the node's bids off the book; it bids again when it is back."""
        self._book.remove_node(node)

    def idle_reason(self, node: str, has_jobs: bool) -> IdleReason:
        """Why the node holds no lease, in a word."""
        if any(
            held for (holder, _), held in self._dispatcher.in_flight().items() if holder == node
        ):
            return IdleReason.WORKING
        if not has_jobs:
            return IdleReason.NO_JOBS
        match self._idle.get(node):
            case RejectReason.ABOVE_RESERVE:
                return IdleReason.ABOVE_RESERVE
            case RejectReason.OUTBID:
                return IdleReason.OUTBID
            case _:
                return IdleReason.STARTING

    def in_flight(self) -> Mapping[tuple[str, TaskKind], int]:
        """Units each node holds of each kind."""
        return self._dispatcher.in_flight()

    def prices(self, node: str) -> dict[str, int]:
        """What the node asks for a unit of each kind, in micros."""
        return {
            standing.bid.kind.value: standing.bid.price_micros
            for standing in self._book.of_node(node)
        }

    async def open(self, workload: Workload) -> None:
        """Offers the workload's units to the market."""
        row = LotRow(
            lot_id=workload.lot.lot_id,
            job_id=workload.lot.job_id,
            record=workload.lot.encode().decode(),
            opened_ms=self._context.time.now_ms(),
        )
        await self._context.database.run(lambda session: session.add(row))
        self._open.append(workload)
        self.poke()
        await self.announce(LOTS_TOPIC, workload.lot)

    async def announce(self, topic: str, record: Record) -> None:
        """Gossips ``record`` to whoever listens; nothing depends on its arrival."""
        try:
            await self._context.network.publish(topic, record.encode())
        except ShoalError as error:
            _log.warning("not_announced", extra={"topic": topic, "reason": error.message})

    def withdraw(self, job_id: str) -> None:
        """Offers nothing of the job any more."""
        for workload in self._open:
            workload.closed = workload.closed or workload.lot.job_id == job_id
        self._open = [workload for workload in self._open if workload.lot.job_id != job_id]
        self._book.remove_job(job_id)

    async def run(self) -> None:
        """Runs for ever: clears whenever a bid, a lot or capacity appears."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            self._book.remove_expired(self._context.time.now_ms())
            self._open = [workload for workload in self._open if workload.undelivered]
            for workload in sorted(self._open, key=Workload.order):
                if workload.waiting and not workload.closed:
                    await self._clear_safely(workload)

    async def _clear_safely(self, workload: Workload) -> None:
        """Clears the workload; what goes wrong costs its own job at most."""
        try:
            await self._clear(workload)
        except OverBudget as error:
            # Money held by running leases may come back; with none there is no more to come.
            if not self._dispatcher.live_leases(workload.lot.job_id):
                workload.abandon(error)
        except Unavailable as error:
            _log.warning(
                "clearing_waits", extra={"lot_id": workload.lot.lot_id, "reason": error.message}
            )
        except Exception:
            _log.exception("clearing_failed", extra={"lot_id": workload.lot.lot_id})
            workload.abandon(
                InvariantBroken(
                    f"Lot {workload.lot.lot_id} could not be handed out, by a defect of the "
                    "orchestrator; its log has the details."
                )
            )

    async def _clear(self, workload: Workload) -> None:
        now_ms = self._context.time.now_ms()
        lot = workload.lot.model_copy(update={"num_units": len(workload.waiting)})
        book = [
            standing
            for standing in self._book.standing(
                lot.job_id, lot.epoch, lot.lot_class.kind, now_ms=now_ms
            )
            if self._may_work(standing.bid.node, now_ms)
        ]
        clearing = clear(
            lot,
            book,
            in_flight=self._dispatcher.in_flight(),
            seed=secrets.token_bytes(_SEED_BYTES),
            now_ms=now_ms,
        )
        self._idle |= {rejection.node: rejection.reason for rejection in clearing.rejected}
        for award in clearing.awards:
            self._idle.pop(award.node, None)
        for award in clearing.awards:
            for part in split_award(award, self._context.config.max_units_per_lease):
                # The job may end while an earlier part is written down.
                if workload.closed:
                    return
                await self._dispatcher.grant(workload, part)

    def _may_work(self, node: str, now_ms: int) -> bool:
        member = self._roster.find(node)
        suspended = self._suspended_until_ms.get(node, 0) > now_ms
        return member is not None and member.connected and not suspended
