"""What the market did for a job since its last update, and whether the job is well."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import bindparam, func, select
from sqlalchemy.orm import Session

from shoal.market.lease import LeaseState
from shoal.orchestrator.context import Context
from shoal.orchestrator.evaluations import Evaluations
from shoal.orchestrator.journal import Journal
from shoal.orchestrator.store.tables import EventRow, LeaseRow
from shoal.protocol.job import JobSpec
from shoal.protocol.market import TaskKind
from shoal.protocol.node import FailureCause
from shoal.protocol.result import CheckName
from shoal.rl.health import HealthChange, HealthWatch

EVENT = "health"
_WRONG_WEIGHTS = tuple(f"{name.value}:" for name in (CheckName.POLICY, CheckName.LOGPROBS))
_GRADER_FAILED = "could not be judged: The grader of "
"""How the verifier words a grader's failure, which is no fault of the worker's."""
_LIVE = tuple(state.value for state in LeaseState if not state.is_final)
_WRITTEN_AFTER_MS = 1_000
"""What happens is written down a moment after the time it carries; by then it certainly is."""

# Built once, and each answered by an index: an update must not cost more the longer its job lasts.
_LEASES = (
    select(
        LeaseRow.kind,
        LeaseRow.state,
        LeaseRow.account,
        func.count(),
        func.sum(LeaseRow.num_units),
        func.sum(LeaseRow.pay_micros),
    )
    .where(LeaseRow.job_id == bindparam("job_id"))
    .group_by(LeaseRow.kind, LeaseRow.state, LeaseRow.account)
)
_LIVE_LEASES = _LEASES.where(LeaseRow.ended_ms.is_(None))
_ENDED_LEASES = _LEASES.where(
    LeaseRow.ended_ms >= bindparam("since_ms"), LeaseRow.ended_ms < bindparam("until_ms")
)
_FAILURES = select(EventRow.type, EventRow.data).where(
    EventRow.job_id == bindparam("job_id"),
    EventRow.type.in_(("lease_failed", "result_rejected")),
    EventRow.at_ms >= bindparam("since_ms"),
    EventRow.at_ms < bindparam("until_ms"),
)


@dataclass(frozen=True, kw_only=True)
class _Tally:
    """Leases of one kind, state and account: how many, their units and their pay."""

    kind: str
    state: str
    account: str
    num_leases: int
    num_units: int
    pay_micros: int


class JobHealth:
    """Turns a job's updates into diagnoses, each an event when it begins and when it ends.

    Args:
        context: The orchestrator's surroundings.
        journal: Where the events go.
        job_id: Which job.
        spec: The job's.
        evaluations: The job's.
    """

    def __init__(
        self,
        context: Context,
        journal: Journal,
        job_id: str,
        spec: JobSpec,
        evaluations: Evaluations,
    ) -> None:
        self._context = context
        self._journal = journal
        self._job_id = job_id
        self._evaluations = evaluations
        self._watch = HealthWatch(spec.max_staleness)
        self._counted_ms = context.time.now_ms()
        self._spent_micros: int | None = None

    async def market_metrics(self) -> dict[str, float]:
        """``market/*`` since the last call: what was paid, refused and is under way.

        Each lease counts once, a second after its end.
        """
        since_ms = self._counted_ms
        until_ms = max(since_ms, self._context.time.now_ms() - _WRITTEN_AFTER_MS)
        tallies, causes = await self._context.database.run(
            lambda session: self._read(session, since_ms, until_ms)
        )
        self._counted_ms = until_ms
        accepted = [t for t in tallies if t.state == LeaseState.ACCEPTED.value]
        live = [t for t in tallies if t.state in _LIVE]
        rejected = _leases([t for t in tallies if t.state == LeaseState.REJECTED.value])
        judged = _leases(accepted) + rejected
        self._spent_micros = (self._spent_micros or 0) + sum(t.pay_micros for t in accepted)
        return {
            "market/spent": float(self._spent_micros),
            "market/tasks_inflight": float(_leases(live)),
            "market/tasks_rejected": float(rejected),
            "market/results_judged": float(judged),
            "market/verify_fail_rate": rejected / judged if judged else 0.0,
            "market/providers_active": float(len({t.account for t in (*accepted, *live)})),
            **_unit_price(accepted),
            **{f"market/{cause}": float(count) for cause, count in causes.items()},
        }

    async def see(self, metrics: Mapping[str, float]) -> None:
        """Takes in an update; what begins or ends to be wrong is on record."""
        for version, held_out in self._evaluations.reported_since():
            self._watch.see_evaluation(version, held_out)
        for change in self._watch.see_update(metrics):
            await self._journal.event(self._job_id, EVENT, _facts(change, metrics))

    def _read(
        self, session: Session, since_ms: int, until_ms: int
    ) -> tuple[list[_Tally], Counter[str]]:
        """Leases live now or ended in the stretch of time, and the causes of those that failed."""
        if self._spent_micros is None:
            self._spent_micros = session.scalar(
                select(func.coalesce(func.sum(LeaseRow.pay_micros), 0)).where(
                    LeaseRow.job_id == self._job_id, LeaseRow.ended_ms < since_ms
                )
            )
        stretch = {"job_id": self._job_id, "since_ms": since_ms, "until_ms": until_ms}
        leases = [
            *session.execute(_LIVE_LEASES, {"job_id": self._job_id}),
            *session.execute(_ENDED_LEASES, stretch),
        ]
        events = session.execute(_FAILURES, stretch)
        tallies = [
            _Tally(
                kind=kind,
                state=state,
                account=account,
                num_leases=int(num_leases),
                num_units=int(num_units),
                pay_micros=int(pay_micros),
            )
            for kind, state, account, num_leases, num_units, pay_micros in leases
        ]
        return tallies, Counter(_cause(type_, json.loads(data)) for type_, data in events)


def _leases(tallies: Sequence[_Tally]) -> int:
    return sum(tally.num_leases for tally in tallies)


def _unit_price(accepted: Sequence[_Tally]) -> dict[str, float]:
    """What an accepted group of rollouts cost on average, in micros; empty if there was none."""
    rollouts = [tally for tally in accepted if tally.kind == TaskKind.ROLLOUT.value]
    units = sum(tally.num_units for tally in rollouts)
    if not units:
        return {}
    return {"market/unit_price": sum(tally.pay_micros for tally in rollouts) / units}


def _cause(event_type: str, data: Mapping[str, str]) -> str:
    """What a failed or rejected lease counts as."""
    if event_type == "lease_failed":
        return f"failed/{data['cause']}"
    if _GRADER_FAILED in data["reason"]:
        return f"failed/{FailureCause.ENVIRONMENT.value}"
    wrong = data["reason"].startswith(_WRONG_WEIGHTS)
    return "rejected_wrong_weights" if wrong else "rejected_otherwise"


def _facts(change: HealthChange, metrics: Mapping[str, float]) -> dict[str, object]:
    diagnosis = change.diagnosis
    return {
        "code": diagnosis.code.value,
        "active": change.active,
        "finding": diagnosis.finding,
        "remedy": diagnosis.remedy,
        "policy_version": int(metrics.get("step", 0)),
    }
