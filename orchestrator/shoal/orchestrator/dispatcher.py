"""Leases: offered to winners, kept alive by heartbeats, taken back when a clock runs out.

The transitions are `shoal.market.lease`'s; this module holds the live records, writes each
change down, and returns the units of a failed lease to their workload.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections import Counter
from collections.abc import Callable, Mapping

from sqlalchemy import update
from sqlalchemy.orm import Session

from shoal.market import lease as leases
from shoal.market.lease import LeaseRecord, LeaseState
from shoal.orchestrator.context import Context
from shoal.orchestrator.handin import require_payload, require_receipt
from shoal.orchestrator.hearing import Hearing
from shoal.orchestrator.leases import (
    LeaseTable,
    LiveLease,
    Submission,
    lease_row,
    printable,
    store_end,
)
from shoal.orchestrator.offers import ANSWER_WITHIN_MS, Offers
from shoal.orchestrator.outlooks import Outlooks
from shoal.orchestrator.placement import Parcel
from shoal.orchestrator.roster import Roster
from shoal.orchestrator.setbacks import Setbacks
from shoal.orchestrator.settler import Settler
from shoal.orchestrator.store.rows import insert_missing, insert_rows
from shoal.orchestrator.store.tables import LeaseRow
from shoal.orchestrator.terms import Times, make_lease
from shoal.orchestrator.track_record import TrackRecord
from shoal.orchestrator.workload import Workload
from shoal.protocol.errors import (
    InvalidRequest,
    InvariantBroken,
    NotFound,
    ShoalError,
    Unauthorised,
    Unavailable,
)
from shoal.protocol.ids import LeaseId, PeerId, new_id
from shoal.protocol.market import Award, TaskKind
from shoal.protocol.node import (
    FailureCause,
    FailureReply,
    Heartbeat,
    LeaseFailure,
    ResultMessage,
    ResultReply,
)
from shoal.protocol.signing import sign

_log = logging.getLogger(__name__)

_UNKNOWN_UNIT_MS = 1_000
"""What a unit is taken to cost while none of its job and kind has been accepted."""


class Dispatcher:
    """Grants awards as leases and follows each to its end."""

    def __init__(
        self,
        context: Context,
        roster: Roster,
        settler: Settler,
        setbacks: Setbacks,
        record: TrackRecord,
    ) -> None:
        self._context = context
        self._roster = roster
        self._settler = settler
        self._setbacks = setbacks
        self._record = record
        self._hearing = Hearing(context.config.heartbeat_ms)
        self._table = LeaseTable()
        record.backed_micros = self._table.backed_micros
        self.outlooks = Outlooks(context, self._table)
        """What is to be expected of nodes and leases."""
        self.pace = self.outlooks.pace
        self.offers = Offers(context, roster, self._hearing, self._table, self.end)
        """Leases on their way to their nodes."""
        self._fewer = asyncio.Event()
        self.submissions: asyncio.PriorityQueue[Submission] = asyncio.PriorityQueue()
        self._arrivals = itertools.count()
        self.on_capacity: Callable[[str], None] = lambda node: None
        """Called with a node that may take more units, whose lease may have left some waiting."""
        self.on_served: Callable[[LiveLease, int], None] = lambda live, spent_ms: None
        """Called with an accepted lease and the worker time it took."""

    def in_flight(self) -> Mapping[tuple[str, TaskKind], int]:
        """Units each node holds of each kind; a submitted result no longer counts."""
        return self._table.in_flight

    def num_open(self, node: str) -> int:
        """How many leases the node holds without a result yet."""
        return self._table.num_open(node)

    def states(self) -> Counter[LeaseState]:
        """How many leases that have not ended are in each state."""
        return Counter(live.record.state for live in self._table)

    def live_leases(self, job_id: str) -> list[LiveLease]:
        """The job's leases that have not ended."""
        return self._table.of_job(job_id)

    async def grant(self, workload: Workload, parcel: Parcel, award: Award) -> LiveLease:
        """Offers a lease for the waiting parcel; whatever fails, it is not lost.

        Raises:
            OverBudget: the job's free money does not cover it.
            Unavailable: the task's bytes or the lease could not be stored.
        """
        ledger = self._settler.ledger(workload.lot.job_id)
        lease_id = LeaseId(new_id("lease"))
        ledger.hold(lease_id, len(parcel) * award.unit_price_micros)
        workload.take(parcel)
        try:
            live = await self._issue(lease_id, workload, award, parcel)
        except BaseException:
            self._drop(lease_id)
            ledger.release(lease_id)
            workload.give_back(parcel, failed=False)
            raise
        self.offers.send(live)
        return live

    async def grant_again(self, slow: LiveLease, award: Award) -> LiveLease:
        """Offers the parcel of ``slow`` to another node too; the first valid result wins.

        Raises:
            OverBudget: the job's free money does not cover it.
            Unavailable: the task's bytes or the lease could not be stored.
        """
        workload, parcel = slow.workload, slow.units
        ledger = self._settler.ledger(workload.lot.job_id)
        lease_id = LeaseId(new_id("lease"))
        ledger.hold(lease_id, len(parcel) * award.unit_price_micros)
        # Its lease epoch is above that of the slow lease, which stays valid beside it.
        workload.attempts.update(parcel)
        try:
            live = await self._issue(lease_id, workload, award, parcel, rival=slow)
        except BaseException:
            self._drop(lease_id)
            ledger.release(lease_id)
            workload.attempts.subtract(parcel)
            raise
        self.offers.send(live)
        return live

    def _drop(self, lease_id: LeaseId) -> None:
        """A lease that could not be written down was never given."""
        live = self._table.find(lease_id)
        if live is not None:
            self._part(live)
            self._table.remove(live)
            self._wake_drained()

    async def _issue(
        self,
        lease_id: LeaseId,
        workload: Workload,
        award: Award,
        units: Parcel,
        rival: LiveLease | None = None,
    ) -> LiveLease:
        task = await workload.build_task(units)
        if workload.closed or (rival is not None and not rival.may_rival):
            raise Unavailable(f"Lot {workload.lot.lot_id} is withdrawn.", code="lot_withdrawn")
        backlog_ms = self.outlooks.backlog_ms(award.node)
        lease = make_lease(
            self._context.config,
            self.pace,
            award.model_copy(update={"num_units": len(units)}),
            workload.lot,
            task,
            lease_id=lease_id,
            attempt=max(workload.attempts[unit] for unit in units),
            times=Times(now_ms=self._context.time.now_ms(), backlog_ms=backlog_ms),
        )
        live = LiveLease(
            record=leases.offer(lease, answer_within_ms=ANSWER_WITHIN_MS),
            signed=sign(lease, self._context.domain, self._context.account),
            task=task,
            units=units,
            workload=workload,
            upload_token=secrets.token_hex(16),
            max_result_bytes=workload.max_result_bytes(len(units)),
            expected_ms=self._expected_unit_ms(workload) * len(units),
            backing_micros=self._record.backing_micros(workload, len(units)),
            backlog_ms=backlog_ms,
            rival=rival,
        )
        if rival is not None:
            rival.rival = live
        self._table.add(live)
        unwritten = list(workload.unwritten)

        def write(session: Session) -> None:
            insert_missing(session, *unwritten)
            insert_rows(session, lease_row(live))

        try:
            await self._context.database.run(write)
            del workload.unwritten[: len(unwritten)]
        except Unavailable:
            # Ended meanwhile: its units are waiting again already.
            if live.record.state is LeaseState.OFFERED:
                raise
        return live

    def _expected_unit_ms(self, workload: Workload) -> int:
        median = self.pace.median_unit_ms(workload.lot.job_id, workload.kind)
        return _UNKNOWN_UNIT_MS if median is None else median

    async def end(self, live: LiveLease, record: LeaseRecord, *, failed: bool) -> None:
        """The lease is over without a paid result: money freed, units wait again."""
        # All in one step, before anything is awaited: nobody sees half an ending.
        self._table.change(live, record)
        self._forget(live)
        self._settler.ledger(live.lease.job_id).release(live.lease.lease_id)
        # The verifier notes what it judged, in the transaction of the verdict.
        is_judged = record.state is LeaseState.REJECTED
        outcome = None if is_judged else self._record.note(live, record)
        self._take_back(live, record, failed=failed)
        self.on_capacity(live.lease.node)
        self._context.network.meters.count("leases_ended", state=record.state.value)
        _log.info(
            "lease_ended",
            extra={
                "job_id": live.lease.job_id,
                "lease_id": live.lease.lease_id,
                "worker": live.lease.node,
                "state": record.state.value,
                "reason": record.reason or "",
            },
        )
        try:
            await self._context.database.run(lambda session: store_end(session, live, outcome))
            if record.state in (LeaseState.FAILED, LeaseState.EXPIRED):
                await self._setbacks.tell(live, record)
        except Unavailable as error:
            # Only the picture suffers: at the next start the row is swept with the others.
            _log.warning("lease_end_not_stored", extra={"reason": error.message})

    def _take_back(self, live: LiveLease, record: LeaseRecord, *, failed: bool) -> None:
        workload = live.workload
        impossible = self._setbacks.weigh(live, record) if failed else None
        is_shared = self._part(live)
        if not is_shared:
            workload.give_back(live.units, failed=failed)
        if failed and workload.placement is not None:
            workload.placement.note_failure(live.units, live.lease)
        if impossible is not None:
            workload.abandon(impossible)
        # Another lease of the parcel may still deliver it, or has.
        elif (not is_shared and live.units in workload.undelivered) and (
            max(workload.attempts[unit] for unit in live.units) >= self._context.config.max_attempts
        ):
            workload.abandon(
                InvalidRequest(
                    f"Work of lot {workload.lot.lot_id} failed {self._context.config.max_attempts} "
                    f"times, last because: {record.reason}; read the job's events, mend the job "
                    "and submit it again.",
                    code="attempts_exhausted",
                )
            )

    def _part(self, live: LiveLease) -> bool:
        """The lease has no rival any more; whether it had one that still works on its parcel."""
        rival, live.rival = live.rival, None
        if rival is None:
            return False
        rival.rival = None
        return not rival.record.state.is_final

    async def fail(self, peer: PeerId, failure: LeaseFailure) -> FailureReply:
        """The holder gives its lease back; the units are anybody's at once.

        Raises:
            NotFound: no such lease is known.
            Expired: the lease ended before (its clock is named).
            PeerFault: another node than the holder speaks.
            InvalidRequest: the lease has a result, or was refused or revoked.
        """
        live = self._table.find(failure.lease_id)
        known = self._table.ended(failure.lease_id) if live is None else live.record
        if known is None:
            raise _no_lease(failure.lease_id)
        record = leases.fail(
            known,
            node=peer,
            lease_epoch=failure.lease_epoch,
            cause=failure.cause,
            reason=printable(f"{failure.cause.value}: {failure.detail}")[:500],
            now_ms=self._context.time.now_ms(),
        )
        if live is not None and record is not known:
            # A worker that leaves in good order has not failed at the work, and gets no more.
            is_leaving = failure.cause is FailureCause.STOPPING
            if is_leaving:
                self._roster.member(peer).leaving = True
            await self.end(live, record, failed=not is_leaving)
        return FailureReply(lease_id=failure.lease_id)

    async def authorise_upload(self, token: str, digest: str, size_bytes: int) -> None:
        """Passes if ``token`` belongs to a live lease whose result may be this large.

        Raises:
            Unauthorised: no live lease has this token, or it was used for another payload.
            InvalidRequest: the result is larger than the lease allows.
        """
        live = self._table.by_token(token)
        if live is None:
            raise Unauthorised("No live lease has this upload token.", code="bad_token")
        if size_bytes > live.max_result_bytes:
            raise InvalidRequest(
                f"A result of {size_bytes} bytes is larger than the "
                f"{live.max_result_bytes} its lease allows.",
                code="oversize",
            )
        # One result for one lease: else a token would fill the disk.
        if live.upload_sha256 not in (None, digest):
            raise Unauthorised("This upload token was used for another payload.", code="token_used")
        live.upload_sha256 = digest

    def submit(self, peer: PeerId, message: ResultMessage) -> ResultReply:
        """Takes a result under its lease; the same result again is acknowledged again.

        Raises:
            NotFound: no such lease is known.
            Expired: the lease ended before (its clock is named).
            PeerFault: the result is not this lease's holder's, or differs from an earlier one.
            InvalidRequest: the payload was never uploaded, or is larger than allowed.
        """
        result, member = message.result, self._roster.member(peer)
        live = self._table.find(result.lease_id)
        digest = result.digest()
        known = self._table.ended(result.lease_id) if live is None else live.record
        if known is None:
            raise _no_lease(result.lease_id)
        record = leases.submit(
            known,
            node=peer,
            lease_epoch=result.lease_epoch,
            result_sha256=digest,
            now_ms=self._context.time.now_ms(),
        )
        if live is not None and record is not known:
            require_payload(self._context.blobs, live, message)
            require_receipt(self._context.domain, live, message, digest)
            # Stored with its verdict: a lease that a restart finds without one is taken back.
            live.message = message
            self._table.change(live, record)
            self.submissions.put_nowait(
                Submission(
                    order=(*live.workload.order(), next(self._arrivals)),
                    live=live,
                    message=message,
                    member=member,
                )
            )
            self.on_capacity(peer)
        return ResultReply(lease_id=result.lease_id, result_sha256=digest)

    def heartbeat(self, peer: PeerId, beat: Heartbeat) -> tuple[str, ...]:
        """Notes the node's progress; returns the leases it must drop."""
        member = self._roster.member(peer)
        member.last_seen_ms = self._context.time.now_ms()
        self._hearing.heard(peer, member.last_seen_ms)
        revoked = []
        for progress in beat.leases:
            live = self._table.find(progress.lease_id)
            if live is None:
                revoked.append(progress.lease_id)
                continue
            if not live.record.state.is_open:
                continue
            try:
                self._table.change(
                    live,
                    leases.heartbeat(
                        live.record,
                        node=peer,
                        lease_epoch=progress.lease_epoch,
                        progress=progress.progress,
                        now_ms=member.last_seen_ms,
                    ),
                )
            except ShoalError as error:
                _log.warning(
                    "heartbeat_refused", extra={"lease_id": progress.lease_id, "reason": str(error)}
                )
                revoked.append(progress.lease_id)
        self._table.told(peer)
        return tuple(revoked)

    async def reap(self) -> None:
        """Ends every lease whose clock has run out, and notes which ones straggle."""
        now_ms = self._context.time.now_ms()
        deaf_ms = self._hearing.take_deaf_ms(now_ms)
        for live in self._table:
            excused = leases.excuse(live.record, silent_ms=deaf_ms, now_ms=now_ms)
            if excused is not live.record:
                self._table.change(live, excused)
            record = leases.expire_if_due(live.record, now_ms=now_ms)
            if record is not live.record:
                await self.end(live, record, failed=True)

        self.outlooks.look()

    async def revoke_job(self, job_id: str, reason: str) -> None:
        """Takes back every open lease of the job."""
        for live in self.live_leases(job_id):
            if live.record.state.is_open:
                record = leases.revoke(
                    live.record, reason=reason, now_ms=self._context.time.now_ms()
                )
                await self.end(live, record, failed=False)

    def conclude(self, live: LiveLease, record: LeaseRecord, *, unit_ms: int) -> None:
        """An accepted lease is over; the verifier has already written it down."""
        if record.state is not LeaseState.ACCEPTED:
            raise InvariantBroken(f"Lease {live.lease.lease_id} is concluded as {record.state}.")
        self._table.change(live, record)
        self._forget(live)
        self.outlooks.note(live, unit_ms=unit_ms)
        self.on_served(live, unit_ms * len(live.units))

    async def call_off_rival(self, live: LiveLease) -> None:
        """Nobody works any more on the parcel that the accepted ``live`` delivered."""
        rival = live.rival
        if rival is not None and not rival.record.state.is_final:
            if rival.record.state.is_open:
                self.outlooks.note_outrun(rival)
            record = leases.outrun(rival.record, now_ms=self._context.time.now_ms())
            await self.end(rival, record, failed=False)

    def _forget(self, live: LiveLease) -> None:
        """The lease is live no more; its record stays known, to answer late messages."""
        self._table.remove(live)
        self._wake_drained()

    def forget_job(self, job_id: str) -> None:
        """The job is over: how long its units took is of no use any more."""
        self.pace.forget(job_id)

    def _wake_drained(self) -> None:
        self._fewer.set()
        self._fewer = asyncio.Event()

    async def drained(self, job_id: str) -> None:
        """Waits until no lease of the job is live."""
        while self.live_leases(job_id):
            await self._fewer.wait()

    async def sweep(self) -> None:
        """No lease of an earlier process is open in the database; call before any is granted."""
        unfinished = [state.value for state in LeaseState if not state.is_final]
        values = {
            "state": LeaseState.REVOKED.value,
            "reason": "the orchestrator was restarted",
            "ended_ms": self._context.time.now_ms(),
        }
        await self._context.database.run(
            lambda session: (
                session.execute(
                    update(LeaseRow).where(LeaseRow.state.in_(unfinished)).values(**values)
                )
                and None
            )
        )


def _no_lease(lease_id: str) -> NotFound:
    return NotFound(f"Lease {lease_id} is over or unknown; drop the work.", code="no_lease")
