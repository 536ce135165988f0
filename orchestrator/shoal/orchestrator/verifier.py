"""Results become verdicts: checked, signed, written down, handed on or given back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Awaitable, Callable, Collection, Coroutine
from dataclasses import dataclass, replace

from sqlalchemy.orm import Session

from shoal.market.freshness import fresh_pay_down
from shoal.market.lease import LeaseRecord, judge
from shoal.market.reputation import Outcome
from shoal.market.settlement import PayEntry
from shoal.network.identity import public_key_of
from shoal.orchestrator.audits import Audits
from shoal.orchestrator.checks import check_result, payload_of
from shoal.orchestrator.context import Context
from shoal.orchestrator.dispatcher import Dispatcher
from shoal.orchestrator.evidence import EvidenceDesk
from shoal.orchestrator.jobs import Jobs
from shoal.orchestrator.journal import Journal
from shoal.orchestrator.learner import Learner
from shoal.orchestrator.leases import LiveLease, Submission, handed_in, printable
from shoal.orchestrator.roster import Member
from shoal.orchestrator.settler import Settler
from shoal.orchestrator.store.rows import insert_rows, update_row
from shoal.orchestrator.store.tables import LeaseRow, StatementRow
from shoal.orchestrator.track_record import TrackRecord
from shoal.orchestrator.workload import Delivery
from shoal.protocol.errors import InvariantBroken, PeerFault, ShoalError, Unavailable
from shoal.protocol.ids import Digest, LeaseId, PeerId
from shoal.protocol.result import Check, CheckName, Verdict
from shoal.protocol.signing import sign
from shoal.protocol.task import GradientTask
from shoal.provenance.dsse import Envelope
from shoal.provenance.dsse import verify as verify_envelope
from shoal.provenance.statement import (
    WORK_KINDS,
    StatementKind,
    require_same_work,
    verification_statement,
)
from shoal.rl.batch import GradientPayload, ResidualLink
from shoal.rl.codec import num_values
from shoal.rl.gradient_audit import ResidualEvidence
from shoal.rl.verification import Verification

_log = logging.getLogger(__name__)

NEWCOMER_AUDITS = 10
"""A provider's first results are all recomputed. Source: docs/architecture, "Trust"."""

_JOB_ENDED = "the job has ended"
"""No epoch is left to pay or state its results in."""
_MAX_AUDITED = 8
"""So many results may wait for their audits, with all that was decoded of them in memory."""


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """What the checks found; ``found`` is present when they ran.

    ``judged`` is false where they could not: then nobody is to blame.
    """

    checks: tuple[Check, ...]
    found: Verification | None = None
    judged: bool = True

    @property
    def passed(self) -> bool:
        is_whole = self.found is not None and self.found.accepted
        return is_whole and all(check.passed for check in self.checks)

    @property
    def payload(self) -> object | None:
        """What is delivered if all passed."""
        return None if self.found is None else payload_of(self.found)


@dataclass(frozen=True, kw_only=True)
class _Judgement:
    """All that a verdict says; ``envelope`` is the worker's statement, absent if it is none."""

    envelope: Envelope | None
    outcome: _Outcome
    audit: bool


class Verifier:
    """Judges submissions one after the other, the most urgent first.

    What is audited waits for its verdict beside the others; further results of the same worker
    wait for that verdict, since it decides how often they are audited.
    """

    def __init__(
        self,
        context: Context,
        journal: Journal,
        settler: Settler,
        dispatcher: Dispatcher,
        record: TrackRecord,
        jobs: Jobs,
    ) -> None:
        self._context = context
        self._journal = journal
        self._settler = settler
        self._dispatcher = dispatcher
        self._record = record
        self._jobs = jobs
        self._audits = Audits(context)
        dispatcher.offers.on_taken = self._foresee
        self._draw: Callable[[], float] = secrets.SystemRandom().random
        self.evidence_desk = EvidenceDesk(context)
        self._evidence: dict[str, ResidualEvidence] = {}
        self._judged: dict[str, _Judgement] = {}
        """By lease: what is known of a result that waited beside the others."""
        self._held: dict[str, list[Submission]] = {}
        """By node one of whose results waits so: what else it handed in meanwhile."""
        self._room = asyncio.Semaphore(_MAX_AUDITED)
        self._beside: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Runs for ever: judges each submission."""
        try:
            while True:
                await self._take(await self._dispatcher.submissions.get())
        finally:
            for task in self._beside:
                task.cancel()
            self._audits.close()

    def _foresee(self, live: LiveLease, member: Member) -> None:
        """A newcomer's gradient is audited in any case: that may begin before it comes."""
        run = self._jobs.find(live.lease.job_id)
        if run is not None and member.audited < NEWCOMER_AUDITS:
            self._audits.foresee(run.learner, live)

    async def _take(self, submission: Submission) -> None:
        live, member = submission.live, submission.member
        judged = self._judged.pop(live.lease.lease_id, None)
        if judged is not None:
            for held in self._held.pop(live.lease.node):
                self._dispatcher.submissions.put_nowait(held)
        elif live.lease.node in self._held:
            self._held[live.lease.node].append(submission)
            return
        self._audits.forget_ended()
        evidence = self._evidence.pop(live.lease.lease_id, None)
        # Another worker's result for the same units may have been accepted meanwhile.
        if live.record.state.is_final:
            return
        if self._jobs.find(live.lease.job_id) is None:
            await self._dismiss(live, _JOB_ENDED)
        elif judged is not None:
            await self._conclude(submission, judged)
        elif evidence is not None:
            # Only now: another gradient may have continued from it while bytes were on their way.
            known = replace(evidence, spendable=self._spendable(live))
            await self._judge(submission, audit=True, evidence=known)
        elif not self.audits(member, live.workload.verify.spot_check_rate):
            known = ResidualEvidence(spendable=self._spendable(live))
            await self._judge(submission, audit=False, evidence=known)
        elif isinstance(live.task, GradientTask) and live.task.gradient.codec.error_feedback:
            # The others are judged while the worker sends what it committed to.
            self._do_beside(self._collect(submission))
        else:
            await self._judge(submission, audit=True, evidence=ResidualEvidence())

    def _do_beside(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)

    def _hold(self, live: LiveLease) -> None:
        """What the lease's node hands in from now on waits until the lease is judged again."""
        self._held[live.lease.node] = []

    def _spendable(self, live: LiveLease) -> Collection[Digest]:
        return self.evidence_desk.spendable(live.lease.job_id, live.lease.node)

    async def _collect(self, submission: Submission) -> None:
        """The submission waits for its verdict again, with what its worker was asked for."""
        live, found = submission.live, ResidualEvidence()
        try:
            link, size_bytes = await self._context.checked(lambda: self._link(submission))
            if link is not None:
                found = await self.evidence_desk.collect(live, link, size_bytes)
        except Exception:
            _log.exception("evidence_failed", extra={"lease_id": live.lease.lease_id})
        self._evidence[live.lease.lease_id] = found
        self._dispatcher.submissions.put_nowait(submission)

    def _link(self, submission: Submission) -> tuple[ResidualLink | None, int]:
        """The residuals a gradient names, and their size; None if it is not even well formed."""
        live = submission.live
        shapes = self._jobs.learner(live.lease.job_id).policy.shapes()
        if not isinstance(live.task, GradientTask):
            return None, 0
        data = self._context.blobs.read(submission.message.result.payload.sha256)
        try:
            payload = GradientPayload.decode(data, shapes, live.task.gradient.codec)
        except PeerFault:
            return None, 0
        return payload.residual, 4 * num_values(shapes)

    async def _dismiss(self, live: LiveLease, reason: str) -> None:
        """The result is of no use to its job any more, and nobody is to blame."""
        now_ms = self._context.time.now_ms()
        record = judge(live.record, accepted=False, reason=reason, now_ms=now_ms)
        await self._dispatcher.end(live, record, failed=False)

    async def _judge(
        self, submission: Submission, *, audit: bool, evidence: ResidualEvidence
    ) -> None:
        """The verdict, or first an audit beside those of others if all else is in order."""
        live, learner = submission.live, self._jobs.learner(submission.live.lease.job_id)
        envelope, fault = self._open_statement(submission)
        if fault is None:
            result, blobs = submission.message.result, self._context.blobs
            checks = self._context.checked(
                lambda: check_result(learner, blobs, live.task, result, evidence)
            )
            outcome = await self._checked(live, checks)
        else:
            outcome = _Outcome(checks=(fault,))
        judgement = _Judgement(envelope=envelope, outcome=outcome, audit=audit)
        if audit and outcome.passed:
            await self._room.acquire()
            self._hold(live)
            self._do_beside(self._audit(submission, learner, judgement, evidence))
        else:
            await self._conclude(submission, judgement)

    async def _audit(
        self,
        submission: Submission,
        learner: Learner,
        judgement: _Judgement,
        evidence: ResidualEvidence,
    ) -> None:
        """The submission waits for its verdict again, with what recomputing it gave."""
        live, found = submission.live, judgement.outcome.found
        if found is None:
            raise InvariantBroken(f"Lease {live.lease.lease_id} is audited and was never checked.")
        outcome = await self._checked(live, self._audits.audit(learner, live, found, evidence))
        self._judge_again(submission, replace(judgement, outcome=outcome))
        self._room.release()

    async def _until_kept(self, submission: Submission, judgement: _Judgement) -> None:
        """The submission waits for its verdict again, once its policy version is kept or lost."""
        with contextlib.suppress(Unavailable):
            await submission.live.workload.restorable()
        self._judge_again(submission, judgement)

    def _judge_again(self, submission: Submission, judgement: _Judgement) -> None:
        self._judged[submission.live.lease.lease_id] = judgement
        self._dispatcher.submissions.put_nowait(submission)

    async def _conclude(self, submission: Submission, judgement: _Judgement) -> None:
        live, member, outcome = submission.live, submission.member, judgement.outcome
        if not live.workload.is_restorable():
            # Beside the others, which may be of other jobs.
            self._hold(live)
            self._do_beside(self._until_kept(submission, judgement))
            return
        try:
            # Work under a version that a kill would lose could never be explained again.
            await live.workload.restorable()
        except Unavailable as error:
            await self._dismiss(live, printable(error.message))
            return
        if live.record.state.is_final:
            return
        if self._jobs.find(live.lease.job_id) is None:
            await self._dismiss(live, _JOB_ENDED)
            return
        verdict = self._verdict(live, submission, judgement)
        member.audited += judgement.audit
        rows = self._statements(live, judgement.envelope if outcome.passed else None, verdict)
        record = judge(
            live.record,
            accepted=verdict.accepted,
            reason="accepted" if verdict.accepted else printable(verdict.reason()),
            now_ms=self._context.time.now_ms(),
        )
        noted = self._record.note(live, record, blameless=not outcome.judged)
        await self._write_down(live, verdict, rows, noted)
        member.undelivered[LeaseId(live.lease.lease_id)] = sign(
            verdict, self._context.domain, self._context.account
        )
        self._count(verdict)
        if verdict.accepted:
            await self._accept(record, member, submission, outcome, rows[0].payload_sha256)
        else:
            await self._reject(live, record, member, verdict, blame=outcome.judged)

    def _count(self, verdict: Verdict) -> None:
        failed = next((check.name.value for check in verdict.checks if not check.passed), "")
        outcome = "accepted" if verdict.accepted else "rejected"
        self._context.network.meters.count("verdicts", verdict=outcome, failed_check=failed)
        if verdict.accepted:
            # One that is rejected is counted where it ends, with all that fail.
            self._context.network.meters.count("leases_ended", state=outcome)

    async def _checked(self, live: LiveLease, work: Awaitable[Verification]) -> _Outcome:
        """The checks' outcome; one result that breaks a check must not stop the others."""
        try:
            found = await work
            return _Outcome(checks=found.checks, found=found)
        except Exception as error:
            _log.exception("check_failed", extra={"lease_id": live.lease.lease_id})
            detail = f"{type(error).__name__}; the orchestrator's log has the details"
            if isinstance(error, ShoalError):
                detail = error.message
        check = Check(
            name=CheckName.FORM, passed=False, detail=f"could not be judged: {detail}"[:500]
        )
        return _Outcome(checks=(check,), judged=False)

    def audits(self, member: Member, spot_check_rate: float) -> bool:
        """Whether this result is recomputed, drawn only now that it is committed.

        The rate is ``max(spot-check rate, 1 ÷ consecutive valid results)``, and 1 for a
        newcomer's first results.
        """
        if member.audited < NEWCOMER_AUDITS:
            return True
        return self._draw() < max(spot_check_rate, 1 / max(1, member.consecutive_valid))

    def _open_statement(self, submission: Submission) -> tuple[Envelope | None, Check | None]:
        live, message = submission.live, submission.message
        try:
            envelope = Envelope.from_text(message.statement)
            key = public_key_of(PeerId(live.lease.node))
            payload = verify_envelope(envelope, key)
            require_same_work(payload, live.lease, live.task, message.result)
        except PeerFault as error:
            return None, Check(name=CheckName.FORM, passed=False, detail=error.message[:500])
        except Exception as error:
            _log.exception("statement_failed", extra={"lease_id": live.lease.lease_id})
            detail = f"the statement cannot be read ({type(error).__name__})"
            return None, Check(name=CheckName.FORM, passed=False, detail=detail)
        return envelope, None

    def _verdict(self, live: LiveLease, submission: Submission, judgement: _Judgement) -> Verdict:
        lease = live.lease
        accepted = judgement.outcome.passed
        return Verdict(
            lease_id=lease.lease_id,
            lease_epoch=lease.lease_epoch,
            job_id=lease.job_id,
            result_sha256=submission.message.result.digest(),
            accepted=accepted,
            num_units=lease.num_units if accepted else 0,
            pay_micros=self._pay(live) if accepted else 0,
            audited=judgement.audit,
            checks=judgement.outcome.checks,
        )

    def _pay(self, live: LiveLease) -> int:
        """What the units are worth now: less for a policy that has been overtaken."""
        lease, lot = live.lease, live.workload.lot
        newest = self._jobs.policy_version(lease.job_id)
        # Work that an update overtook on its way is paid as the oldest that is issued.
        lag = min(max(0, newest - live.task.policy.version), len(lot.freshness_permille) - 1)
        return fresh_pay_down(lot, lease.num_units, lease.unit_price_micros, lag=lag)

    def _statements(
        self, live: LiveLease, envelope: Envelope | None, verdict: Verdict
    ) -> list[StatementRow]:
        lease = live.lease
        rows = []
        if envelope is not None:
            rows.append(
                self._journal.statement_row(
                    lease.job_id, WORK_KINDS[lease.kind], envelope, lease.account
                )
            )
        work_sha256 = rows[0].payload_sha256 if rows else None
        statement = verification_statement(verdict, lease, work_sha256=work_sha256)
        rows.append(self._journal.state(lease.job_id, StatementKind.VERIFICATION, statement))
        return rows

    async def _write_down(
        self, live: LiveLease, verdict: Verdict, rows: list[StatementRow], noted: Outcome | None
    ) -> None:
        lease = live.lease
        values = handed_in(live) | {
            "verdict": verdict.encode().decode(),
            "audited": verdict.audited,
            "state": "accepted" if verdict.accepted else "rejected",
            "reason": "" if verdict.accepted else printable(verdict.reason()),
            "ended_ms": self._context.time.now_ms(),
            "pay_micros": verdict.pay_micros,
            "outcome": None if noted is None else noted.encode().decode(),
        }
        if verdict.accepted:
            # Same synchronous step as the statements' epoch: pay and record stay together.
            values["settlement_epoch"] = self._journal.open_epoch(lease.job_id)
            self._settler.ledger(lease.job_id).accept(
                PayEntry(
                    task_id=lease.task_id,
                    lease_id=lease.lease_id,
                    account=lease.account,
                    pay_micros=verdict.pay_micros,
                    claim_id=live.claim_id,
                )
            )

        def write(session: Session) -> None:
            update_row(session, LeaseRow, lease.lease_id, values)
            insert_rows(session, *rows)

        await self._context.database.run(write)

    async def _accept(
        self,
        record: LeaseRecord,
        member: Member,
        submission: Submission,
        outcome: _Outcome,
        statement_sha256: str,
    ) -> None:
        member.consecutive_valid += 1
        live, result = submission.live, submission.message.result
        # The worker's own word, but never more than the time it held the lease.
        held_ms = max(0, live.record.heard_at_ms - live.lease.issued_at_ms)
        unit_ms = min(result.compute_ms, held_ms) // live.lease.num_units + 1
        self._dispatcher.conclude(live, record, unit_ms=unit_ms)
        if isinstance(outcome.payload, GradientPayload) and outcome.payload.residual is not None:
            self.evidence_desk.retain(self._jobs.running_ids())
            self.evidence_desk.accept(live.lease.job_id, live.lease.node, outcome.payload.residual)
        delivery = Delivery(
            units=live.units,
            task=live.task,
            lease=live.signed,
            result=result,
            payload=outcome.payload,
            statement_sha256=statement_sha256,
        )
        try:
            await live.workload.accept(delivery)
        except Exception:
            # Paid and written down already: only the job that wanted it cannot go on.
            _log.exception("delivery_failed", extra={"lease_id": live.lease.lease_id})
            live.workload.abandon(
                InvariantBroken(
                    f"The accepted result of lease {live.lease.lease_id} could not be used, by a "
                    "defect of the orchestrator; its log has the details."
                )
            )
        await self._dispatcher.call_off_rival(live)

    async def _reject(
        self,
        live: LiveLease,
        record: LeaseRecord,
        member: Member,
        verdict: Verdict,
        *,
        blame: bool,
    ) -> None:
        if blame:
            member.consecutive_valid = 0
            member.audited = 0
        await self._dispatcher.end(live, record, failed=True)
        await self._journal.event(
            live.lease.job_id,
            "result_rejected",
            {
                "lease_id": live.lease.lease_id,
                "account": live.lease.account,
                "node": live.lease.node,
                "reason": verdict.reason(),
            },
        )
