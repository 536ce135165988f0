"""Leases: offered to winners, kept alive by heartbeats, taken back when a clock runs out.

The transitions are `shoal.market.lease`'s; this module holds the live records, writes each
change down, and returns the units of a failed lease to their workload.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import logging
import secrets
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sqlalchemy import update
from sqlalchemy.orm import Session

from shoal.market import lease as leases
from shoal.market.lease import LeaseRecord, LeaseState
from shoal.market.reauction import FAILURES_BEFORE_RAISE, raise_reserve_up
from shoal.orchestrator.context import Context
from shoal.orchestrator.roster import Member, Roster
from shoal.orchestrator.settler import Settler
from shoal.orchestrator.store.tables import LeaseRow
from shoal.orchestrator.workload import Workload
from shoal.protocol.errors import (
    InvalidRequest,
    InvariantBroken,
    NotFound,
    PeerFault,
    ShoalError,
    Unauthorised,
    Unavailable,
)
from shoal.protocol.ids import LeaseId, PeerId, new_id
from shoal.protocol.market import Award, Lease, TaskKind
from shoal.protocol.node import (
    LEASE_PROTOCOL,
    Heartbeat,
    LeaseOffer,
    LeaseReply,
    ResultMessage,
    ResultReply,
)
from shoal.protocol.signing import Signed, sign
from shoal.protocol.task import Task

_log = logging.getLogger(__name__)

_OFFER_TIMEOUT_S = 10.0
_MAX_REMEMBERED = 10_000


@dataclass(kw_only=True)
class LiveLease:
    """A lease that has not ended, with what is needed to judge or re-lease it.

    ``upload_sha256`` is the one payload its token may store, absent before the first upload.
    """

    record: LeaseRecord
    signed: Signed[Lease]
    task: Task
    units: tuple[int, ...]
    workload: Workload
    upload_token: str
    max_result_bytes: int
    upload_sha256: str | None = None

    @property
    def lease(self) -> Lease:
        """The lease as signed."""
        return self.record.lease


@dataclass(frozen=True, kw_only=True, order=True)
class Submission:
    """A result that arrived in time, waiting for its verdict.

    What the learner waits for is judged first, then what came first.
    """

    order: tuple[int, ...]
    live: LiveLease = field(compare=False)
    message: ResultMessage = field(compare=False)
    member: Member = field(compare=False)


class Dispatcher:
    """Grants awards as leases and follows each to its end."""

    def __init__(self, context: Context, roster: Roster, settler: Settler) -> None:
        self._context = context
        self._roster = roster
        self._settler = settler
        self._live: dict[LeaseId, LiveLease] = {}
        self._ended: OrderedDict[str, LeaseRecord] = OrderedDict()
        self._offers: set[asyncio.Task[None]] = set()
        self._fewer = asyncio.Event()
        self.submissions: asyncio.PriorityQueue[Submission] = asyncio.PriorityQueue()
        self._arrivals = itertools.count()
        self.on_capacity: Callable[[], None] = lambda: None
        """Called when units may be auctioned again."""
        self.on_failure: Callable[[str], None] = lambda node: None
        """Called with a node that refused a lease it bid for, or let one run out."""

    def in_flight(self) -> Mapping[tuple[str, TaskKind], int]:
        """Units each node holds of each kind; a submitted result no longer counts."""
        held: Counter[tuple[str, TaskKind]] = Counter()
        for live in self._live.values():
            if live.record.state.is_open:
                held[live.lease.node, live.lease.kind] += live.lease.num_units
        return held

    def live_leases(self, job_id: str) -> list[LiveLease]:
        """The job's leases that have not ended."""
        return [live for live in self._live.values() if live.lease.job_id == job_id]

    async def grant(self, workload: Workload, award: Award) -> None:
        """Offers one lease for the award's units; whatever fails, none of them is lost.

        Raises:
            OverBudget: the job's free money does not cover it.
            Unavailable: the task's bytes or the lease could not be stored.
        """
        lease_id = LeaseId(new_id("lease"))
        ledger = self._settler.ledger(workload.lot.job_id)
        ledger.hold(lease_id, award.num_units * award.unit_price_micros)
        units = workload.take(award.num_units)
        try:
            live = await self._issue(lease_id, workload, award, units)
        except BaseException:
            if self._live.pop(lease_id, None) is not None:
                self._wake_drained()
            ledger.release(lease_id)
            workload.give_back(units, failed=False)
            raise
        # A clock or the end of the job may have taken it back while it was written down.
        if live.record.state is LeaseState.OFFERED:
            offer = asyncio.create_task(self._offer(live))
            self._offers.add(offer)
            offer.add_done_callback(self._offers.discard)

    async def _issue(
        self, lease_id: LeaseId, workload: Workload, award: Award, units: tuple[int, ...]
    ) -> LiveLease:
        task = await workload.build_task(units)
        if workload.closed:
            raise Unavailable(f"Lot {workload.lot.lot_id} is withdrawn.", code="lot_withdrawn")
        lease = self._lease(lease_id, workload, award, task, units)
        live = LiveLease(
            record=leases.offer(lease),
            signed=sign(lease, self._context.domain, self._context.account),
            task=task,
            units=units,
            workload=workload,
            upload_token=secrets.token_hex(16),
            max_result_bytes=workload.max_result_bytes(len(units)),
        )
        self._live[lease_id] = live
        try:
            await self._context.database.run(lambda session: session.add(_row(live)))
        except Unavailable:
            # Ended meanwhile: its units are waiting again already.
            if live.record.state is LeaseState.OFFERED:
                raise
        return live

    def _lease(
        self,
        lease_id: LeaseId,
        workload: Workload,
        award: Award,
        task: Task,
        units: tuple[int, ...],
    ) -> Lease:
        config = self._context.config
        now_ms = self._context.time.now_ms()
        member = self._roster.find(award.node)
        samples = list(member.recent_unit_ms.get(workload.kind.value, ())) if member else []
        p90_ms = leases.p90_up(samples) if samples else 0
        allowed_ms = leases.deadline_after_ms(p90_ms, len(units), config.lease_floor_ms)
        # A slow provider must not be able to stretch its own deadlines for ever.
        allowed_ms = min(allowed_ms, config.lease_ceiling_ms)
        return Lease(
            lease_id=lease_id,
            lease_epoch=max(workload.attempts[unit] for unit in units),
            lot_id=workload.lot.lot_id,
            job_id=workload.lot.job_id,
            task_id=task.task_id,
            task_sha256=task.digest(),
            kind=workload.kind,
            account=award.account,
            node=award.node,
            num_units=len(units),
            unit_price_micros=award.unit_price_micros,
            issued_at_ms=now_ms,
            start_by_ms=now_ms + config.start_timeout_ms,
            deadline_ms=now_ms + allowed_ms,
            heartbeat_ms=config.heartbeat_ms,
        )

    async def _offer(self, live: LiveLease) -> None:
        offer = LeaseOffer(
            lease=live.signed,
            task=live.task,
            upload_token=live.upload_token,
            max_result_bytes=live.max_result_bytes,
        )
        node = PeerId(live.lease.node)
        try:
            raw = await self._context.network.request(
                node, LEASE_PROTOCOL, offer.encode(), timeout_s=_OFFER_TIMEOUT_S
            )
            reply = LeaseReply.decode(raw)
            if reply.refusal is not None:
                await self._refused(live, reply.refusal)
                return
            self._change(
                live,
                leases.start(
                    live.record,
                    node=node,
                    lease_epoch=live.lease.lease_epoch,
                    now_ms=self._context.time.now_ms(),
                ),
            )
        except ShoalError as error:
            # The result may even have come first; only an offer still open is lost.
            if live.record.state is LeaseState.OFFERED:
                await self._refused(live, error.message)

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
        self.on_failure(live.lease.node)
        await self.end(live, record, failed=False)

    def _change(self, live: LiveLease, record: LeaseRecord) -> None:
        live.record = record

    async def end(self, live: LiveLease, record: LeaseRecord, *, failed: bool) -> None:
        """The lease is over without a paid result: money freed, units wait again."""
        # All in one step, before anything is awaited: nobody sees half an ending.
        self._change(live, record)
        self._forget(live)
        self._settler.ledger(live.lease.job_id).release(live.lease.lease_id)
        self._take_back(live, record, failed=failed)
        self.on_capacity()
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
            await self._context.database.run(lambda session: _store(session, record))
        except Unavailable as error:
            # Only the picture suffers: at the next start the row is swept with the others.
            _log.warning("lease_end_not_stored", extra={"reason": error.message})

    def _take_back(self, live: LiveLease, record: LeaseRecord, *, failed: bool) -> None:
        workload = live.workload
        workload.give_back(live.units, failed=failed)
        if failed and workload.failures >= FAILURES_BEFORE_RAISE:
            reserve = raise_reserve_up(workload.lot.reserve_micros, workload.max_reserve_micros)
            workload.lot = workload.lot.model_copy(update={"reserve_micros": reserve})
        if max(workload.attempts[unit] for unit in live.units) >= self._context.config.max_attempts:
            workload.abandon(
                InvalidRequest(
                    f"Work of lot {workload.lot.lot_id} failed {self._context.config.max_attempts} "
                    f"times, last because: {record.reason}; read the job's events, mend the job "
                    "and submit it again.",
                    code="attempts_exhausted",
                )
            )

    async def authorise_upload(self, token: str, digest: str, size_bytes: int) -> None:
        """Passes if ``token`` belongs to a live lease whose result may be this large.

        Raises:
            Unauthorised: no live lease has this token, or it was used for another payload.
            InvalidRequest: the result is larger than the lease allows.
        """
        for live in self._live.values():
            if hmac.compare_digest(live.upload_token, token):
                if size_bytes > live.max_result_bytes:
                    raise InvalidRequest(
                        f"A result of {size_bytes} bytes is larger than the "
                        f"{live.max_result_bytes} its lease allows.",
                        code="oversize",
                    )
                # One result for one lease: else a token would fill the disk.
                if live.upload_sha256 not in (None, digest):
                    raise Unauthorised(
                        "This upload token was used for another payload.", code="token_used"
                    )
                live.upload_sha256 = digest
                return
        raise Unauthorised("No live lease has this upload token.", code="bad_token")

    async def submit(self, peer: PeerId, message: ResultMessage) -> ResultReply:
        """Takes a result under its lease; the same result again is acknowledged again.

        Raises:
            NotFound: no such lease is known.
            Expired: the lease ended before (its clock is named).
            PeerFault: the result is not this lease's holder's, or differs from an earlier one.
            InvalidRequest: the payload was never uploaded, or is larger than allowed.
        """
        result, member = message.result, self._roster.member(peer)
        live = self._live.get(LeaseId(result.lease_id))
        digest = result.digest()
        known = self._ended.get(result.lease_id) if live is None else live.record
        if known is None:
            raise NotFound(
                f"Lease {result.lease_id} is over or unknown; drop the work.", code="no_lease"
            )
        record = leases.submit(
            known,
            node=peer,
            lease_epoch=result.lease_epoch,
            result_sha256=digest,
            now_ms=self._context.time.now_ms(),
        )
        if live is not None and record is not known:
            self._check_payload(live, message)
            self._check_receipt(live, message, digest)
            # Queued before it is stored: what is acknowledged later is always judged.
            self._change(live, record)
            self.submissions.put_nowait(
                Submission(
                    order=(*live.workload.order(), next(self._arrivals)),
                    live=live,
                    message=message,
                    member=member,
                )
            )
            self.on_capacity()
            await self._context.database.run(lambda session: _store(session, record, message))
        return ResultReply(lease_id=result.lease_id, result_sha256=digest)

    def _check_payload(self, live: LiveLease, message: ResultMessage) -> None:
        sha256, blobs = message.result.payload.sha256, self._context.blobs
        if not blobs.has(sha256):
            raise InvalidRequest(
                f"The payload {sha256} of lease {live.lease.lease_id} was not uploaded; upload "
                "it, then send the result.",
                code="payload_missing",
            )
        # The store also holds whole models, which nobody may make us read as a result.
        size_bytes = blobs.size_of(sha256)
        if size_bytes > live.max_result_bytes:
            raise InvalidRequest(
                f"The payload of lease {live.lease.lease_id} has {size_bytes} bytes and "
                f"{live.max_result_bytes} are allowed.",
                code="oversize",
            )

    def _check_receipt(self, live: LiveLease, message: ResultMessage, digest: str) -> None:
        message.receipt.require_signer(self._context.domain, live.lease.account)
        receipt = message.receipt.record
        said = (receipt.lease_id, receipt.lease_epoch, receipt.job_id, receipt.node)
        due = (live.lease.lease_id, live.lease.lease_epoch, live.lease.job_id, live.lease.node)
        if said != due or receipt.result_sha256 != digest:
            raise PeerFault(
                f"The receipt for lease {live.lease.lease_id} speaks of another lease or result.",
                code="receipt_mismatch",
                evidence=digest,
            )

    def heartbeat(self, peer: PeerId, beat: Heartbeat) -> tuple[str, ...]:
        """Notes the node's progress; returns the leases it must drop."""
        member = self._roster.member(peer)
        member.last_seen_ms = self._context.time.now_ms()
        revoked = []
        for progress in beat.leases:
            live = self._live.get(LeaseId(progress.lease_id))
            if live is None:
                revoked.append(progress.lease_id)
                continue
            if not live.record.state.is_open:
                continue
            try:
                self._change(
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
        return tuple(revoked)

    async def reap(self) -> None:
        """Ends every lease whose clock has run out."""
        now_ms = self._context.time.now_ms()
        for live in list(self._live.values()):
            record = leases.expire_if_due(live.record, now_ms=now_ms)
            if record is not live.record:
                # Else a node that takes leases and stays silent would win the units again.
                self.on_failure(live.lease.node)
                await self.end(live, record, failed=True)

    async def revoke_job(self, job_id: str, reason: str) -> None:
        """Takes back every open lease of the job."""
        for live in self.live_leases(job_id):
            if live.record.state.is_open:
                record = leases.revoke(
                    live.record, reason=reason, now_ms=self._context.time.now_ms()
                )
                await self.end(live, record, failed=False)

    def conclude(self, live: LiveLease, record: LeaseRecord) -> None:
        """An accepted lease is over; the verifier has already written it down."""
        if record.state is not LeaseState.ACCEPTED:
            raise InvariantBroken(f"Lease {live.lease.lease_id} is concluded as {record.state}.")
        self._change(live, record)
        self._forget(live)

    def _forget(self, live: LiveLease) -> None:
        """The lease is live no more; its record stays known, to answer late messages."""
        self._live.pop(LeaseId(live.lease.lease_id), None)
        self._ended[live.lease.lease_id] = live.record
        while len(self._ended) > _MAX_REMEMBERED:
            self._ended.popitem(last=False)
        self._wake_drained()

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

    async def close(self) -> None:
        """Waits for offers under way to end."""
        for offer in list(self._offers):
            offer.cancel()
        await asyncio.gather(*self._offers, return_exceptions=True)


def printable(text: str) -> str:
    """``text`` without NUL, which Postgres cannot store: strangers write reasons too."""
    return text.replace("\0", " ")


def _row(live: LiveLease) -> LeaseRow:
    lease = live.lease
    return LeaseRow(
        lease_id=lease.lease_id,
        lease_epoch=lease.lease_epoch,
        lot_id=lease.lot_id,
        job_id=lease.job_id,
        task_id=lease.task_id,
        kind=lease.kind.value,
        account=lease.account,
        node=lease.node,
        num_units=lease.num_units,
        unit_price_micros=lease.unit_price_micros,
        state=live.record.state.value,
        record=live.signed.encode().decode(),
        issued_ms=lease.issued_at_ms,
    )


def _store(session: Session, record: LeaseRecord, message: ResultMessage | None = None) -> None:
    values: dict[str, object] = {
        "state": record.state.value,
        "reason": record.reason or "",
        "ended_ms": record.ended_at_ms,
    }
    if message is not None:
        values["result"] = message.result.encode().decode()
        values["receipt"] = message.receipt.encode().decode()
    session.execute(
        update(LeaseRow).where(LeaseRow.lease_id == record.lease.lease_id).values(**values)
    )
