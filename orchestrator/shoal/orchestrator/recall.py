"""Work that was accepted before a restart is taken from the records, not bought again."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shoal.market.lease import LeaseState
from shoal.orchestrator.checks import check_result, payload_of
from shoal.orchestrator.context import Context
from shoal.orchestrator.learner import Learner
from shoal.orchestrator.placement import Parcel
from shoal.orchestrator.store.tables import LeaseRow
from shoal.orchestrator.workload import Delivery, Market, Workload
from shoal.protocol.canonical import sha256_hex
from shoal.protocol.errors import ShoalError
from shoal.protocol.market import Lease
from shoal.protocol.result import Result
from shoal.protocol.signing import Signed
from shoal.protocol.task import Task
from shoal.provenance.statement import work_statement
from shoal.rl.gradient_audit import ResidualEvidence
from shoal.rl.plan import task_stem

_log = logging.getLogger(__name__)


class Recall:
    """Opens a job's workloads; what of them is on record as accepted is delivered first.

    ``active`` from a restart until the first update that is not on record: what is opened later
    is new.
    """

    def __init__(self, context: Context, market: Market, learner: Learner) -> None:
        self._context = context
        self._market = market
        self._learner = learner
        self.active = False

    async def open(self, workload: Workload) -> None:
        """What is not on record is on the market; the rest is delivered."""
        if self.active:
            await self._deliver_recorded(workload)
        if workload.undelivered:
            await self._market.open(workload)

    async def _deliver_recorded(self, workload: Workload) -> None:
        planned: dict[str, tuple[Parcel, Task]] = {}
        for parcel in list(workload.waiting):
            task = await workload.build_task(parcel)
            planned[task_stem(task.task_id)] = parcel, task
        job_id = workload.lot.job_id
        rows = await self._context.database.run(
            lambda session: _accepted(session, job_id, planned.keys())
        )
        for row in rows:
            parcel, task = planned[task_stem(row.task_id)]
            named = task.model_copy(update={"task_id": row.task_id})
            read = functools.partial(self._read, row, named, parcel)
            delivery = await self._context.checked(read)
            if delivery is not None:
                await workload.accept(delivery)

    def _read(self, row: LeaseRow, task: Task, parcel: Parcel) -> Delivery | None:
        """The delivery on record, or None when its bytes are gone or are not this task's."""
        if row.result is None:
            _log.warning("not_recalled", extra={"task_id": row.task_id, "reason": "no result"})
            return None
        result = Result.model_validate_json(row.result)
        lease = Signed[Lease].model_validate_json(row.record)
        if result.task_sha256 != task.digest():
            return None
        try:
            payload = self._payload(task, result)
        except ShoalError as error:
            _log.warning("not_recalled", extra={"task_id": row.task_id, "reason": error.message})
            return None
        if payload is None:
            return None
        return Delivery(
            units=parcel,
            task=task,
            lease=lease,
            result=result,
            payload=payload,
            statement_sha256=sha256_hex(work_statement(lease.record, task, result)),
        )

    def _payload(self, task: Task, result: Result) -> object | None:
        """What the verifier handed on when it accepted the result."""
        accepted = ResidualEvidence(spendable=None)
        blobs = self._context.blobs
        return payload_of(check_result(self._learner, blobs, task, result, accepted))


def _accepted(session: Session, job_id: str, stems: Collection[str]) -> list[LeaseRow]:
    """The job's accepted leases of tasks with these stems."""
    length = max(map(len, stems), default=0)
    return list(
        session.scalars(
            select(LeaseRow).where(
                LeaseRow.job_id == job_id,
                LeaseRow.state == LeaseState.ACCEPTED.value,
                func.substr(LeaseRow.task_id, 1, length).in_(list(stems)),
            )
        )
    )
