"""The market's clock: lots are cleared over the epoch's book, and their ladders handed out."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Coroutine, Mapping, Sequence

from shoal.market.clearing import Refusal
from shoal.market.fairness import FairShares
from shoal.orchestrator.announcer import Announcer
from shoal.orchestrator.clearings import Clearings
from shoal.orchestrator.context import Context
from shoal.orchestrator.dispatcher import Dispatcher
from shoal.orchestrator.idleness import Nearness
from shoal.orchestrator.leases import LiveLease
from shoal.orchestrator.placement import Parcel, Placement
from shoal.orchestrator.roster import Roster
from shoal.orchestrator.sealer import Sealer
from shoal.orchestrator.setbacks import Setbacks
from shoal.orchestrator.store.rows import insert_missing
from shoal.orchestrator.store.tables import LotRow
from shoal.orchestrator.track_record import TrackRecord
from shoal.orchestrator.workload import Workload
from shoal.protocol.certificate import Rung
from shoal.protocol.errors import InvariantBroken, OverBudget, Unavailable
from shoal.protocol.market import TaskKind
from shoal.protocol.node import IdleDetail, IdleReason

_log = logging.getLogger(__name__)

_PARCELS_PASSED_OVER = 64
_LEASES_WHEN_SHARED = 2
"""Leases a node holds while several jobs want workers: one to compute, one to fetch ahead.

More would wait in the node's own queue, where the jobs' shares are no longer ours to keep.
"""

_IDLE_WORDS = {
    Refusal.ABOVE_RESERVE: IdleReason.ABOVE_RESERVE,
    Refusal.ABOVE_POSTED_PRICE: IdleReason.ABOVE_RESERVE,
    Refusal.TASK_TOO_LARGE: IdleReason.TASK_TOO_LARGE,
    Refusal.STAKE_TOO_SMALL: IdleReason.STAKE_TOO_SMALL,
    Refusal.UNSTAKED: IdleReason.STAKE_TOO_SMALL,
}
"""What a refusal is in a word, the nearest to a lease last."""


class Auctioneer:
    """Holds the open workloads, clears each once, and leases its parcels down the ladder.

    Jobs that want the same workers are served in proportion to their requesters' weights,
    which are the operator's; jobs of one requester share its weight.
    """

    def __init__(
        self,
        context: Context,
        roster: Roster,
        dispatcher: Dispatcher,
        setbacks: Setbacks,
        sealer: Sealer,
        record: TrackRecord,
    ) -> None:
        self._context = context
        self._roster = roster
        self._dispatcher = dispatcher
        self._setbacks = setbacks
        self._sealer = sealer
        self._record = record
        self.announcer = Announcer(context, lambda: roster.blob_urls)
        """Tells everybody of lots, certificates and, for the jobs, of policy versions."""
        self._open: list[Workload] = []
        self._owing: list[Workload] = []
        """Those no longer open whose lot or certificates are not on record yet."""
        self._shares = FairShares()
        self._clearings = Clearings(context, sealer, record, self._can_take)
        self._changed = asyncio.Event()
        self._with_room: defaultdict[TaskKind, dict[str, None]] = defaultdict(dict)
        """Nodes that may have room for a kind, in the order in which they came to have it."""
        dispatcher.on_capacity = self.room_at
        dispatcher.on_served = self._served
        sealer.on_market = self._new_book

    def poke(self) -> None:
        """Asks for another round."""
        self._changed.set()

    def room_at(self, node: str) -> None:
        """The node may have room again; asks for another round."""
        for kind in TaskKind:
            self._with_room[kind][node] = None
        self.poke()

    def _new_book(self) -> None:
        market = self._sealer.market
        for node in () if market is None else market.of_node:
            self.room_at(node)
        self.poke()

    def idle_reason(self, node: str, has_jobs: bool) -> IdleReason:
        """Why the node holds no lease, in a word."""
        if self._dispatcher.num_open(node):
            return IdleReason.WORKING
        if not has_jobs:
            return IdleReason.NO_JOBS
        if self._setbacks.is_paused(node):
            return IdleReason.PAUSED
        market = self._sealer.market
        bids = () if market is None else market.of_node.get(node, ())
        if not bids:
            return IdleReason.STARTING
        placed = [(w, w.placement) for w in self._open if w.placement and w.undelivered]
        within_reach = [w for w, placement in placed if node in placement.ladder.nodes]
        if within_reach:
            outlooks = self._dispatcher.outlooks
            is_late = all(outlooks.is_slow(workload, node) for workload in within_reach)
            return IdleReason.TOO_SLOW if is_late else IdleReason.OUTBID
        digests = {entry.digest for entry in bids}
        reasons = {
            placement.refused[digest]
            for _, placement in placed
            for digest in digests & placement.refused.keys()
        }
        for refusal, word in _IDLE_WORDS.items():
            if refusal in reasons:
                return word
        return IdleReason.NO_WORK

    def idle_detail(self, node: str, reason: IdleReason) -> IdleDetail | None:
        """The figures behind the reason, for whoever is told it."""
        market = self._sealer.market
        bids = () if market is None else market.of_node.get(node, ())
        standing = [(entry.bid, entry.digest) for entry in bids]
        nearness = Nearness(
            node,
            self._roster.find(node),
            standing,
            self._open,
            self._record,
            self._dispatcher.outlooks,
        )
        return nearness.detail(reason)

    def in_flight(self) -> Mapping[tuple[str, TaskKind], int]:
        """Units each node holds of each kind."""
        return self._dispatcher.in_flight()

    def prices(self, node: str) -> dict[str, int]:
        """What the node asks for a unit of each kind, in micros."""
        market = self._sealer.market
        bids = () if market is None else market.of_node.get(node, ())
        return {entry.bid.kind.value: entry.bid.price_micros for entry in bids}

    def reserves(self) -> dict[tuple[str, TaskKind], int]:
        """The most that a unit on the market may cost, of each job and kind that has any."""
        highest: dict[tuple[str, TaskKind], int] = {}
        for workload in self._open:
            key = (workload.lot.job_id, workload.kind)
            highest[key] = max(highest.get(key, 0), workload.reserve.reserve_micros)
        return highest

    def waiting(self) -> list[Workload]:
        """The lots of which something waits to be leased, the most urgent first."""
        waiting = [w for w in self._open if w.waiting and not w.closed]
        return sorted(waiting, key=Workload.order)

    async def open(self, workload: Workload) -> None:
        """Offers the workload's units to the market."""
        row = LotRow(
            lot_id=workload.lot.lot_id,
            job_id=workload.lot.job_id,
            record=workload.lot.encode().decode(),
            opened_ms=self._context.time.now_ms(),
        )
        workload.unwritten.append(row)
        self._open.append(workload)
        self._changed.set()
        self.announcer.lot(workload.lot)

    def withdraw(self, job_id: str) -> None:
        """Offers nothing of the job any more."""
        for workload in self._open:
            workload.closed = workload.closed or workload.lot.job_id == job_id
        self._sweep()
        self._clearings.forget(job_id)
        self._shares.forget(job_id)
        self._dispatcher.forget_job(job_id)

    def forget_job(self, job_id: str) -> None:
        """The job is over for good: its bids compete no more, and their nonces are forgotten."""
        self._sealer.forget_job(job_id)

    async def run(self) -> None:
        """Runs for ever: places whatever can be placed whenever something has changed."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            self._sweep()
            await self._share_out()
            outlooks = self._dispatcher.outlooks
            for behind in outlooks.stragglers():
                await self._safely(behind.workload, self._hedge(behind, sooner=True))
            for last in outlooks.tail():
                await self._safely(last.workload, self._hedge(last, sooner=False))
            for owing in [w for w in (*self._open, *self._owing) if w.owes_record]:
                await self._safely(owing, self._write_rest(owing))
            self._owing = [w for w in self._owing if w.owes_record]

    async def _write_rest(self, workload: Workload) -> bool:
        """The workload's lot and clearings are on record also where nobody got a lease of it.

        Only then is anybody told of a certificate: who hears of it may ask for it.
        """
        rows = list(workload.unwritten)
        if rows:
            await self._context.database.run(lambda session: insert_missing(session, *rows))
            del workload.unwritten[: len(rows)]
        for certificate in workload.untold:
            self.announcer.certificate(certificate)
        workload.untold.clear()
        return True

    def _sweep(self) -> None:
        for workload in self._open:
            if workload.closed or not workload.undelivered:
                self._setbacks.forget_lot(workload.lot.lot_id)
        self._owing += [w for w in self._open if w.owes_record and (w.closed or not w.undelivered)]
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
            took = await self._safely(workload, self._place(workload, one=len(waiting) > 1))
            if not took or not workload.waiting:
                waiting[job_id].pop(0)
                if not waiting[job_id]:
                    del waiting[job_id]

    async def _safely(self, workload: Workload, placing: Coroutine[None, None, bool]) -> bool:
        """Runs the placing; what goes wrong costs the workload's own job at most."""
        try:
            return await placing
        except OverBudget as error:
            # Money held by running leases may come back; with none there is no more to come.
            if not self._dispatcher.live_leases(workload.lot.job_id):
                workload.abandon(error)
        except Unavailable as error:
            _log.warning(
                "placing_waits", extra={"lot_id": workload.lot.lot_id, "reason": error.message}
            )
        except Exception:
            _log.exception("placing_failed", extra={"lot_id": workload.lot.lot_id})
            workload.abandon(
                InvariantBroken(
                    f"Lot {workload.lot.lot_id} could not be handed out, by a defect of the "
                    "orchestrator; its log has the details."
                )
            )
        return False

    async def _place(self, workload: Workload, *, one: bool) -> bool:
        """Leases what the workload's waiting parcels can get, or ``one``; whether any."""
        granted, passed_over = False, 0
        for parcel in list(workload.waiting):
            # The job may end, or another lease deliver the parcel, while one is written down.
            if workload.closed or parcel not in workload.waiting:
                continue
            placement = self._clearings.placement(workload, parcel)
            nodes = self._ready_nodes(workload)
            if placement is None or not nodes or passed_over >= _PARCELS_PASSED_OVER:
                break
            rung = self._next_rung(workload, placement, parcel, nodes)
            if rung is not None and not self._is_usual(workload, parcel, rung):
                timely = self._in_time(workload, placement, parcel, nodes)
                rung = self._next_rung(workload, placement, parcel, timely)
                if rung is None and parcel not in placement.failed:
                    # The next parcel would have to wait for somebody quicker too.
                    break
            if rung is None:
                passed_over += 1
                continue
            award = placement.award(rung, len(parcel))
            self._charge(await self._dispatcher.grant(workload, parcel, award))
            # The offer goes out before the next parcel, which may be less urgent, is thought of.
            await asyncio.sleep(0)
            granted = True
            if one:
                break
        return granted

    def _ready_nodes(self, workload: Workload) -> list[str]:
        """The nodes that have room for the workload's kind and may work on it now."""
        kind, lot_id = workload.kind, workload.lot.lot_id
        market, held = self._sealer.market, self._dispatcher.in_flight()
        shared = len({w.lot.job_id for w in self._open}) > 1
        room = self._with_room[kind]
        ready = []
        for node in list(room):
            bids = () if market is None else market.of_node.get(node, ())
            units = held.get((node, kind), 0)
            if not any(e.bid.kind is kind and e.bid.capacity > units for e in bids):
                # It is looked at again once it bids, or a lease of it ends.
                del room[node]
            elif shared and self._dispatcher.num_open(node) >= _LEASES_WHEN_SHARED:
                continue
            elif self._may_work(node, lot_id):
                ready.append(node)
        return ready

    def _may_work(self, node: str, lot_id: str) -> bool:
        member = self._roster.find(node)
        if member is None or member.leaving or not self._roster.is_here(member):
            return False
        return self._setbacks.may_work(node, member.account, lot_id)

    def _can_take(self, workload: Workload, node: str, num_units: int) -> bool:
        """Whether the node may be leased so many units of the workload now, and has room."""
        market, kind = self._sealer.market, workload.kind
        bids = () if market is None else market.of_node.get(node, ())
        capacity = max((e.bid.capacity for e in bids if e.bid.kind is kind), default=0)
        held = self._dispatcher.in_flight().get((node, kind), 0)
        return num_units <= capacity - held and self._may_work(node, workload.lot.lot_id)

    def _is_usual(self, workload: Workload, parcel: Parcel, rung: Rung) -> bool:
        return self._dispatcher.outlooks.is_usual(workload, parcel, rung.node)

    def _in_time(
        self, workload: Workload, placement: Placement, parcel: Parcel, nodes: Sequence[str]
    ) -> Sequence[str]:
        """Those of ``nodes`` who are quick enough for the parcel; see `Outlooks.in_time`."""
        able = [node for node in nodes if self._next_rung(workload, placement, parcel, [node])]
        able += [
            node
            for node in {*placement.ladder.nodes}.difference(able)
            if self._dispatcher.num_open(node)
            and self._may_work(node, workload.lot.lot_id)
            and placement.ladder.next_rung(parcel, len(parcel), nodes=[node], in_flight={})
        ]
        return self._dispatcher.outlooks.in_time(workload, parcel, nodes, able)

    def _next_rung(
        self, workload: Workload, placement: Placement, parcel: Parcel, nodes: Sequence[str]
    ) -> Rung | None:
        """The first rung of ``nodes`` with room, and stake, for the parcel."""
        num_units = len(parcel)
        held = self._dispatcher.in_flight()
        left = list(nodes)
        while left:
            rung = placement.ladder.next_rung(
                parcel,
                num_units,
                nodes=left,
                in_flight={node: held.get((node, workload.kind), 0) for node in left},
            )
            if rung is None:
                return None
            member = self._roster.find(rung.node)
            if member is not None and self._record.has_stake(member, workload, num_units):
                return rung
            left.remove(rung.node)
        return None

    async def _hedge(self, behind: LiveLease, *, sooner: bool) -> bool:
        """Leases the lease's parcel to another node too, if one has room for it.

        With ``sooner`` only to one that is expected to be done before.
        """
        workload = behind.workload
        if workload.closed or not behind.record.state.is_open:
            return False
        nodes = [node for node in self._ready_nodes(workload) if node != behind.lease.node]
        if sooner:
            nodes = self._dispatcher.outlooks.quicker(behind, nodes)
        placement = self._clearings.placement(workload, behind.units) if nodes else None
        if placement is None:
            return False
        rung = self._next_rung(workload, placement, behind.units, nodes)
        if rung is None:
            return False
        award = placement.award(rung, len(behind.units))
        self._charge(await self._dispatcher.grant_again(behind, award))
        return True

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
