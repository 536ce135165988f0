"""The market's clock: standing bids in, awards out, each time either side changes."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import defaultdict
from collections.abc import Coroutine, Mapping

from shoal.market.auction import RejectReason, clear
from shoal.market.book import BidBook, StandingBid
from shoal.market.fairness import FairShares
from shoal.orchestrator.context import Context
from shoal.orchestrator.dispatcher import Dispatcher
from shoal.orchestrator.leases import LiveLease
from shoal.orchestrator.roster import Roster
from shoal.orchestrator.setbacks import Setbacks
from shoal.orchestrator.store.tables import BidRow, LotRow
from shoal.orchestrator.workload import Workload
from shoal.protocol.errors import InvariantBroken, OverBudget, ShoalError, Unauthorised, Unavailable
from shoal.protocol.ids import PeerId
from shoal.protocol.market import Award, Bid, BidReceipt, Lot, TaskKind
from shoal.protocol.node import LOTS_TOPIC, IdleReason
from shoal.protocol.record import Record
from shoal.protocol.signing import Signed, sign

_log = logging.getLogger(__name__)

_SEED_BYTES = 32
_PARCELS_PASSED_OVER = 64
_LEASES_WHEN_SHARED = 2
"""Leases a node holds while several jobs want workers: one to compute, one to fetch ahead.

More would wait in the node's own queue, where the jobs' shares are no longer ours to keep.
"""

_IDLE_WORDS = {
    RejectReason.ABOVE_RESERVE: IdleReason.ABOVE_RESERVE,
    RejectReason.TASK_TOO_LARGE: IdleReason.TASK_TOO_LARGE,
    RejectReason.OUTBID: IdleReason.OUTBID,
}


class Auctioneer:
    """Holds the book and the open workloads, and clears one against the other.

    Jobs that want the same workers are served in proportion to their requesters' weights,
    which are the operator's; jobs of one requester share its weight.
    """

    def __init__(
        self, context: Context, roster: Roster, dispatcher: Dispatcher, setbacks: Setbacks
    ) -> None:
        self._context = context
        self._roster = roster
        self._dispatcher = dispatcher
        self._setbacks = setbacks
        self._book = BidBook(context.domain)
        self._open: list[Workload] = []
        self._shares = FairShares()
        self._changed = asyncio.Event()
        self._with_room: defaultdict[TaskKind, dict[str, None]] = defaultdict(dict)
        """Nodes that may have room for a kind, in the order in which they came to have it."""
        dispatcher.on_capacity = self.room_at
        dispatcher.on_served = self._served

    def poke(self) -> None:
        """Asks for another clearing."""
        self._changed.set()

    def room_at(self, node: str) -> None:
        """The node may have room again; asks for another clearing."""
        for kind in TaskKind:
            self._with_room[kind][node] = None
        self.poke()

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
        self.room_at(peer)
        receipt = BidReceipt(bid_sha256=standing.sha256, received_at_ms=now_ms)
        return sign(receipt, self._context.domain, self._context.account)

    def suspend(self, node: str) -> None:
        """Keeps ``node`` out of auctions for a while: its result was rejected."""
        self._setbacks.strike(node)

    def node_lost(self, node: str) -> None:
        """Takes the node's bids off the book; it bids again when it is back."""
        self._book.remove_node(node)

    def idle_reason(self, node: str, has_jobs: bool) -> IdleReason:
        """Why the node holds no lease, in a word."""
        if self._dispatcher.num_open(node):
            return IdleReason.WORKING
        if not has_jobs:
            return IdleReason.NO_JOBS
        if self._setbacks.is_paused(node):
            return IdleReason.PAUSED
        bids = [standing.bid for standing in self._book.of_node(node)]
        if not bids:
            return IdleReason.STARTING
        reasons = {self._unfit(bid, workload) for bid in bids for workload in self._open}
        # The reason that is nearest to a lease: none but being outbid, then size, then price.
        for reason in (
            RejectReason.OUTBID,
            RejectReason.TASK_TOO_LARGE,
            RejectReason.ABOVE_RESERVE,
        ):
            if reason in reasons:
                return _IDLE_WORDS[reason]
        return IdleReason.NO_WORK

    @staticmethod
    def _unfit(bid: Bid, workload: Workload) -> RejectReason:
        """Why the bid has no lease of the workload."""
        lot = workload.lot
        if bid.kind is not workload.kind or not bid.covers(lot.job_id, lot.epoch):
            return RejectReason.NOT_COVERED
        if not workload.undelivered:
            return RejectReason.NOT_COVERED
        if bid.price_micros > lot.reserve_micros:
            return RejectReason.ABOVE_RESERVE
        smallest = min(workload.sizes(), default=0)
        return RejectReason.TASK_TOO_LARGE if bid.capacity < smallest else RejectReason.OUTBID

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
        self._sweep()
        self._book.remove_job(job_id)
        self._shares.forget(job_id)
        self._dispatcher.forget_job(job_id)

    async def run(self) -> None:
        """Runs for ever: clears whenever a bid, a lot or capacity appears."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            self._book.remove_expired(self._context.time.now_ms())
            self._sweep()
            await self._share_out()
            for slow in self._dispatcher.stragglers():
                await self._safely(slow.workload, self._hedge(slow))

    def _sweep(self) -> None:
        for workload in self._open:
            if workload.closed or not workload.undelivered:
                self._setbacks.forget_lot(workload.lot.lot_id)
        self._open = [w for w in self._open if w.undelivered and not w.closed]

    async def _share_out(self) -> None:
        """Every unit that somebody can take is leased, job by job in fair order."""
        waiting: dict[str, list[Workload]] = {}
        for workload in sorted(self._open, key=Workload.order):
            if workload.waiting:
                waiting.setdefault(workload.lot.job_id, []).append(workload)
        while waiting:
            job_id = self._shares.next_of(waiting)
            workload = waiting[job_id][0]
            # Alone on the market a job takes all it can; else the turn passes at each lease.
            took = await self._safely(workload, self._clear(workload, one=len(waiting) > 1))
            if not took or not workload.waiting:
                waiting[job_id].pop(0)
                if not waiting[job_id]:
                    del waiting[job_id]

    async def _safely(self, workload: Workload, clearing: Coroutine[None, None, bool]) -> bool:
        """Runs the clearing; what goes wrong costs the workload's own job at most."""
        try:
            return await clearing
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
        return False

    async def _clear(self, workload: Workload, *, one: bool) -> bool:
        """Leases what the workload's waiting parcels can get, or ``one``; whether any."""
        if workload.closed:
            return False
        granted = False
        candidates = self._candidates(workload.lot)
        # No more parcels can be awarded than there is room for units, and looking at all that
        # wait would make a large lot's every lease dear; some more are for those that fit nobody.
        room = sum(entry.bid.capacity for entry in candidates)
        sizes = workload.sizes(room + _PARCELS_PASSED_OVER) if candidates else []
        for award in self._auction(workload.lot, candidates, sizes):
            left = award.num_units
            # The job may end while an earlier lease is written down.
            while left and not workload.closed:
                part = award.model_copy(update={"num_units": left})
                live = await self._dispatcher.grant(workload, part)
                if live is None:
                    # Meanwhile another lease may have delivered a parcel this award was for.
                    break
                self._charge(live)
                granted = True
                if one:
                    return True
                left -= len(live.units)
        return granted

    async def _hedge(self, slow: LiveLease) -> bool:
        """Leases the slow lease's parcel to another node too, if one has room for it."""
        if slow.workload.closed or not slow.record.state.is_open:
            return False
        candidates = self._candidates(slow.workload.lot, besides=slow.lease.node)
        awards = self._auction(slow.workload.lot, candidates, [len(slow.units)])
        if not awards:
            return False
        self._charge(await self._dispatcher.grant_again(slow, awards[0]))
        return True

    def _auction(
        self, lot: Lot, candidates: list[StandingBid], sizes: list[int]
    ) -> tuple[Award, ...]:
        """Who of the candidates wins tasks of these sizes."""
        if not candidates or not sizes:
            return ()
        return clear(
            lot.model_copy(update={"num_units": sum(sizes)}),
            candidates,
            in_flight=self._dispatcher.in_flight(),
            seed=secrets.token_bytes(_SEED_BYTES),
            now_ms=self._context.time.now_ms(),
            task_sizes=sizes,
        ).awards

    def _candidates(self, lot: Lot, besides: str | None = None) -> list[StandingBid]:
        """The bids for the lot of the nodes that have room and may work, not ``besides``."""
        kind = lot.lot_class.kind
        in_flight = self._dispatcher.in_flight()
        shared = len({workload.lot.job_id for workload in self._open}) > 1
        room = self._with_room[kind]
        found = []
        for node in list(room):
            bids = [entry for entry in self._book.of_node(node) if entry.bid.kind is kind]
            held = in_flight.get((node, kind), 0)
            if not any(entry.bid.capacity > held for entry in bids):
                # It is looked at again once it bids, or a lease of it ends.
                del room[node]
                continue
            if shared and self._dispatcher.num_open(node) >= _LEASES_WHEN_SHARED:
                continue
            if node != besides and self._may_work(node, lot.lot_id):
                found += [entry for entry in bids if entry.bid.covers(lot.job_id, lot.epoch)]
        return found

    def _may_work(self, node: str, lot_id: str) -> bool:
        member = self._roster.find(node)
        if member is None or not member.connected or member.leaving:
            return False
        return self._setbacks.may_work(node, member.account, lot_id)

    def _charge(self, live: LiveLease) -> None:
        """The job has been given the time its new lease is expected to take."""
        weight = self._weight(live.workload)
        self._shares.charge(live.lease.job_id, live.expected_ms, weight=weight)

    def _served(self, live: LiveLease, spent_ms: int) -> None:
        difference_ms = spent_ms - live.expected_ms
        self._shares.correct(live.lease.job_id, difference_ms, weight=self._weight(live.workload))

    def _weight(self, workload: Workload) -> float:
        requester = workload.requester
        jobs = {w.lot.job_id for w in self._open if w.requester == requester}
        return self._context.config.weight_of(requester) / max(1, len(jobs))
