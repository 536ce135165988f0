"""The terms of a lease: what it is for, what it pays, and how long it may take."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.market.pace import Pace
from shoal.orchestrator.config import OrchestratorConfig
from shoal.protocol.ids import LeaseId
from shoal.protocol.market import Award, Lease, Lot
from shoal.protocol.task import Task


@dataclass(frozen=True, kw_only=True)
class Times:
    """When a lease is made, and how long its node is busy with what it holds already."""

    now_ms: int
    backlog_ms: int


def make_lease(
    config: OrchestratorConfig,
    pace: Pace,
    award: Award,
    lot: Lot,
    task: Task,
    *,
    lease_id: LeaseId,
    attempt: int,
    times: Times,
) -> Lease:
    """The lease of ``task`` for the award; ``attempt`` is its fencing number.

    Its time follows the pace of the node, or of the others while it has none, and lies
    between the configured floor and ceiling: a slow provider must not be able to stretch its
    own deadlines for ever.
    """
    kind = lot.lot_class.kind
    allowed_ms = pace.allowance_ms(
        lot.job_id,
        kind,
        award.node,
        award.num_units,
        backlog_ms=times.backlog_ms,
        first_ms=config.first_lease_ms,
    )
    allowed_ms = min(max(allowed_ms, config.lease_floor_ms), config.lease_ceiling_ms)
    return Lease(
        lease_id=lease_id,
        lease_epoch=attempt,
        lot_id=lot.lot_id,
        certificate_sha256=award.certificate_sha256,
        rung=award.rung,
        job_id=lot.job_id,
        task_id=task.task_id,
        task_sha256=task.digest(),
        kind=kind,
        account=award.account,
        node=award.node,
        num_units=award.num_units,
        unit_price_micros=award.unit_price_micros,
        issued_at_ms=times.now_ms,
        start_by_ms=times.now_ms + config.start_timeout_ms,
        deadline_ms=times.now_ms + allowed_ms,
        heartbeat_ms=config.heartbeat_ms,
    )
