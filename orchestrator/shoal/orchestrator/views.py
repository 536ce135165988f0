"""What the API shows of jobs and workers, read from the database and the live parts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar, cast

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shoal.orchestrator.auctioneer import Auctioneer
from shoal.orchestrator.context import Context
from shoal.orchestrator.jobs import Jobs
from shoal.orchestrator.metrics import Vitals
from shoal.orchestrator.roster import Roster
from shoal.orchestrator.store.tables import EpochRow, EventRow, JobRow, LeaseRow, NodeRow, PolicyRow
from shoal.protocol.errors import NotFound, ShoalError
from shoal.protocol.job import Job, JobState
from shoal.protocol.market import TaskKind
from shoal.protocol.policy import BaseModelRef, PolicyVersion
from shoal.protocol.signing import Signed

_COUNTED = ("accepted", "rejected", "expired", "refused", "failed", "revoked")


_CHAIN_AGE_MS = 2_000
_CHAIN_AGE_RUNNING_MS = 10_000
"""How old what the chain says may be; older while the job runs and nobody waits for it."""
_RECENT_UPDATES = 20
"""What is left is foretold from these; a follower asks twice a second, so not from all."""
_MAX_CHAIN_READS = 10_000

_T = TypeVar("_T")


class Views:
    """Read-only answers for requesters, providers and readers."""

    def __init__(
        self,
        context: Context,
        jobs: Jobs,
        roster: Roster,
        auctioneer: Auctioneer,
        vitals: Vitals,
    ) -> None:
        self._context = context
        self._jobs = jobs
        self._roster = roster
        self._auctioneer = auctioneer
        self.vitals = vitals
        self._chain_reads: dict[str, tuple[int, object]] = {}

    async def jobs(self) -> list[dict[str, Any]]:
        """All jobs, newest first, without their workers."""
        rows = await self._context.database.run(
            lambda session: session.scalars(
                select(JobRow).order_by(JobRow.created_ms.desc()).limit(1000)
            ).all()
        )
        return [_summary(row) for row in rows]

    async def job(self, job_id: str) -> dict[str, Any]:
        """Everything about one job.

        Raises:
            NotFound: there is none with this id.
        """
        view = await self._context.database.run(lambda session: self._job(session, job_id))
        view["escrow"] = await self._escrow(job_id)
        run = self._jobs.find(job_id)
        if run is not None and run.reward_recent is not None:
            view["reward_recent"] = run.reward_recent
        for worker in view["workers"]:
            worker["claimed_micros"] = await self._claimed(job_id, worker["account"])
        return view

    def _job(self, session: Session, job_id: str) -> dict[str, Any]:
        row = session.get(JobRow, job_id)
        if row is None:
            raise NotFound(f"There is no job {job_id}; `shoal jobs` lists them.", code="no_job")
        view = _summary(row)
        tasks, workers = self._work(session, job_id)
        epochs = session.scalars(
            select(EpochRow).where(EpochRow.job_id == job_id).order_by(EpochRow.epoch)
        ).all()
        updates = _events(session, job_id, "update", newest=_RECENT_UPDATES)
        view |= {
            "tasks": tasks,
            "workers": workers,
            "spent_micros": sum(worker["earned_micros"] for worker in workers),
            "committed_micros": epochs[-1].cumulative_micros if epochs else 0,
            "failures": _failures(session, job_id),
            "evaluations": _events(session, job_id, "evaluation"),
            "health": wrong_now(session, job_id),
            "reward_recent": updates[-1]["reward"] if updates else None,
            "eta_s": _eta_s(row, view["max_steps"], updates),
            "epochs": [_epoch(epoch) for epoch in epochs],
            "model": _model(session, row),
        }
        return view

    def _work(self, session: Session, job_id: str) -> tuple[dict[str, int], list[dict[str, Any]]]:
        counts = session.execute(
            select(
                LeaseRow.node,
                LeaseRow.kind,
                LeaseRow.state,
                func.count(),
                func.sum(LeaseRow.num_units),
                func.sum(LeaseRow.pay_micros),
            )
            .where(LeaseRow.job_id == job_id)
            .group_by(LeaseRow.node, LeaseRow.kind, LeaseRow.state)
        ).all()
        tasks = {kind.value: 0 for kind in TaskKind}
        workers: dict[str, dict[str, Any]] = {}
        for node, kind, state, num_leases, num_units, pay in counts:
            if node not in workers:
                workers[node] = self._worker(session, node)
            worker = workers[node]
            tally = worker["tasks"].setdefault(kind, {"leased": 0, **dict.fromkeys(_COUNTED, 0)})
            tally["leased"] += num_leases
            if state in _COUNTED:
                tally[state] += num_leases
            if state == "accepted":
                tasks[kind] += num_leases
                worker["accepted_units"] += int(num_units)
                worker["earned_micros"] += int(pay)
        return tasks, sorted(workers.values(), key=lambda worker: worker["name"])

    def _worker(self, session: Session, node: str) -> dict[str, Any]:
        row = session.get_one(NodeRow, node)
        member = self._roster.find(node)
        return {
            "node": node,
            "account": row.account,
            "name": row.name,
            "device": row.device,
            "connected": member is not None and self._roster.is_here(member),
            "tasks": {},
            "accepted_units": 0,
            "earned_micros": 0,
            "price_micros": self._auctioneer.prices(node),
        }

    async def workers(self) -> list[dict[str, Any]]:
        """Every node that joined since this process started."""
        in_flight = self._auctioneer.in_flight()
        return [
            {
                "node": member.node,
                "account": member.account,
                "name": member.name,
                "device": member.device,
                "connected": self._roster.is_here(member),
                "last_seen_ms": member.last_seen_ms,
                "units_in_flight": {
                    kind.value: in_flight.get((member.node, kind), 0) for kind in TaskKind
                },
                "price_micros": self._auctioneer.prices(member.node),
                "failures": dict(member.failures),
            }
            for member in self._roster.members()
        ]

    async def _escrow(self, job_id: str) -> dict[str, Any] | None:
        try:
            escrow = await self._recent(
                job_id, f"escrow {job_id}", lambda: self._context.chain.escrow.job(job_id)
            )
        except ShoalError:
            # A job whose escrow is not open yet has none to show.
            return None
        return {
            "funded_micros": escrow.funded_micros,
            "committed_micros": escrow.committed_micros,
            "claimed_micros": escrow.claimed_micros,
            "refunded_micros": escrow.refunded_micros,
            "closed": escrow.closed,
        }

    async def _claimed(self, job_id: str, account: str) -> int:
        return await self._recent(
            job_id,
            f"claimed {job_id} {account}",
            lambda: self._context.chain.escrow.claimed(job_id, account),
        )

    async def _recent(self, job_id: str, key: str, read: Callable[[], Awaitable[_T]]) -> _T:
        """What ``read`` gives, a little old perhaps: followers poll several times a second."""
        now_ms = self._context.time.now_ms()
        read_at_ms, value = self._chain_reads.get(key, (0, None))
        is_running = self._jobs.find(job_id) is not None
        age_ms = _CHAIN_AGE_RUNNING_MS if is_running else _CHAIN_AGE_MS
        if value is None or now_ms - read_at_ms > age_ms:
            if len(self._chain_reads) >= _MAX_CHAIN_READS:
                self._chain_reads.clear()
            value = await read()
            self._chain_reads[key] = (now_ms, value)
        return cast("_T", value)


def _summary(row: JobRow) -> dict[str, Any]:
    job = Signed[Job].model_validate_json(row.record).record
    return {
        "job_id": row.job_id,
        "name": job.spec.name,
        "requester": job.requester,
        "model_name": job.spec.model,
        "state": row.state,
        "reason": row.reason,
        "policy_version": row.policy_version,
        "max_steps": job.spec.max_steps,
        "created_ms": row.created_ms,
        "started_ms": row.started_ms,
        "finished_ms": row.finished_ms,
        "budget_micros": job.spec.budget.max_total_micros,
        "funded_micros": row.funded_micros,
    }


def _events(
    session: Session, job_id: str, type_: str, *, newest: int | None = None, after: int = 0
) -> list[dict[str, Any]]:
    """The job's events of the type above the number ``after``, or the ``newest`` so many.

    The oldest is the first.
    """
    rows = session.scalars(
        select(EventRow.data)
        .where(EventRow.job_id == job_id, EventRow.type == type_, EventRow.seq > after)
        .order_by(EventRow.seq.desc())
        .limit(newest)
    ).all()
    return [json.loads(row) for row in reversed(rows)]


def wrong_now(session: Session, job_id: str) -> list[dict[str, Any]]:
    """The diagnoses that began since the job last went on, and have not ended.

    Who stopped could not tell what ended meanwhile; what still holds is found again.
    """
    resumed = select(func.max(EventRow.seq)).where(
        EventRow.job_id == job_id, EventRow.type == "job_resumed"
    )
    changes = _events(session, job_id, "health", after=session.scalar(resumed) or 0)
    last = {change["code"]: change for change in changes}
    return [change for change in last.values() if change["active"]]


def _failures(session: Session, job_id: str) -> dict[str, int]:
    """How many leases of the job failed, by cause."""
    return dict(Counter(event["cause"] for event in _events(session, job_id, "lease_failed")))


def _eta_s(row: JobRow, max_steps: int, updates: Sequence[dict[str, Any]]) -> float | None:
    if row.state != JobState.RUNNING.value or not updates:
        return None
    recent = [float(update["step_time"]) for update in updates]
    return (max_steps - row.policy_version) * sum(recent) / len(recent)


def _epoch(row: EpochRow) -> dict[str, Any]:
    return {
        "epoch": row.epoch,
        "pay_root": row.pay_root,
        "prov_root": row.prov_root,
        "cumulative_micros": row.cumulative_micros,
        "num_tasks": row.num_tasks,
        "num_statements": row.num_statements,
        "tx_hash": row.tx_hash,
        "block_number": row.block_number,
        "gas_used": row.gas_used,
    }


def _model(session: Session, row: JobRow) -> dict[str, Any]:
    policy = session.get(PolicyRow, (row.job_id, row.policy_version))
    record = PolicyVersion.model_validate_json(policy.record) if policy else None
    base = BaseModelRef.model_validate_json(row.base)
    return {
        "adapter_sha256": record.adapter.sha256 if record else None,
        "base_sha256": base.content_digest(),
        "ready": row.state in (JobState.COMPLETE.value, JobState.PAUSED.value),
    }
