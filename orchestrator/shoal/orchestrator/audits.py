"""Audits: results are recomputed beside all else, and a newcomer's gradient ahead of its result.

What a newcomer hands in is recomputed in any case, and what its gradient has to be follows from
the task alone.  So that is computed while the worker computes it, and only compared with what
comes: nobody waits for the same gradient twice.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from shoal.models.policy import Policy
from shoal.orchestrator.context import Context
from shoal.orchestrator.learner import Learner
from shoal.orchestrator.leases import LiveLease
from shoal.protocol.errors import InvariantBroken
from shoal.protocol.task import EvaluateTask, GradientTask, RolloutTask, Task
from shoal.rl import verification
from shoal.rl.differentiate import SliceGradient
from shoal.rl.gradient_audit import ResidualEvidence
from shoal.rl.verification import (
    EvaluateVerification,
    GradientVerification,
    RolloutVerification,
    Verification,
)

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class _Ahead:
    """A gradient that is being recomputed, or was, before its result came."""

    live: LiveLease
    due: asyncio.Task[SliceGradient | None]


class _EndedError(Exception):
    """The lease is over: its gradient is of no use any more."""


class Audits:
    """Recomputes in the audit thread; only that thread touches the weights of an auditor."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._line = asyncio.Lock()
        self._ahead: _Ahead | None = None

    async def audit(
        self, learner: Learner, live: LiveLease, found: Verification, evidence: ResidualEvidence
    ) -> Verification:
        """``found``, which passed all else, and whether it is what recomputing it gives."""
        tolerance = learner.spec.verify.logprob_tolerance
        match live.task, found:
            case GradientTask() as slice_task, GradientVerification() as gradient:
                return await self._audit_gradient(learner, live, slice_task, gradient, evidence)
            case RolloutTask() as task, RolloutVerification() as rollout:
                return await self._in_line(
                    lambda: verification.audit_rollout(
                        self._auditor(learner, task), task, rollout, tolerance=tolerance
                    )
                )
            case EvaluateTask() as exam, EvaluateVerification() as answers:
                return await self._in_line(
                    lambda: verification.audit_evaluation(
                        self._auditor(learner, exam), exam, answers, tolerance=tolerance
                    )
                )
        raise InvariantBroken(f"Lease {live.lease.lease_id} was verified as of another kind.")

    async def _in_line(self, work: Callable[[], _T]) -> _T:
        """``work()`` in the audit thread, one at a time.

        The learner waits for gradients, so there is never more than one ahead of those.
        """
        async with self._line:
            return await self._context.audited(work)

    async def _audit_gradient(
        self,
        learner: Learner,
        live: LiveLease,
        task: GradientTask,
        found: GradientVerification,
        evidence: ResidualEvidence,
    ) -> GradientVerification:
        honest = await self._foreseen(live)
        if honest is not None:
            # Comparing needs no weights, and what runs in the audit thread is not waited for.
            return await self._context.checked(
                lambda: verification.audit_gradient(learner.policy, task, found, evidence, honest)
            )
        return await self._context.audited(
            lambda: verification.audit_gradient(self._auditor(learner, task), task, found, evidence)
        )

    def _auditor(self, learner: Learner, task: Task) -> Policy:
        """The job's second policy, with the weights that the task was leased under."""
        learner.auditor.load_adapter(self._context.blobs.read(task.policy.adapter.sha256))
        return learner.auditor

    def foresee(self, learner: Learner, live: LiveLease) -> None:
        """The gradient of the lease is recomputed from now on, unless another's is or waits.

        Call it only for a result that will be audited in any case.
        """
        self.forget_ended()
        if self._ahead is None and isinstance(live.task, GradientTask):
            due = asyncio.create_task(self._recompute(learner, live, live.task))
            self._ahead = _Ahead(live=live, due=due)

    def forget_ended(self) -> None:
        """What was recomputed for a lease that ended without an audit is dropped."""
        if self._ahead is not None and self._ahead.live.record.state.is_final:
            self._ahead = None

    async def _foreseen(self, live: LiveLease) -> SliceGradient | None:
        """What was recomputed ahead of the lease's result, waited for; None if nothing was."""
        ahead = self._ahead
        if ahead is None or ahead.live is not live:
            return None
        try:
            return await ahead.due
        finally:
            if self._ahead is ahead:
                self._ahead = None

    async def _recompute(
        self, learner: Learner, live: LiveLease, task: GradientTask
    ) -> SliceGradient | None:
        def go_on(num_tokens: int) -> None:
            if live.record.state.is_final:
                raise _EndedError

        def work() -> SliceGradient:
            go_on(0)
            rows = self._context.blobs.read(task.slice.sha256)
            return verification.due_gradient(self._auditor(learner, task), task, rows, go_on)

        try:
            return await self._context.audited(work)
        except _EndedError:
            return None
        except Exception:
            # The audit itself then recomputes, as it does of who is no newcomer.
            _log.exception("recomputing_ahead_failed", extra={"lease_id": live.lease.lease_id})
            return None

    def close(self) -> None:
        """Nothing is recomputed ahead any more."""
        if self._ahead is not None:
            self._ahead.due.cancel()
