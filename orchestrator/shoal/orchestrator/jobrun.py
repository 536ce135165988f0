"""One job from its first rollout to its release.

The loop of a job: issue rollouts as far ahead as the staleness bound allows, wait for the
batch of the current version, have its gradient computed, update, publish the new version.
Rollouts of the next batch run while the gradient of this one does.

Admission counts what was *issued*: batch ``b`` may be issued under version ``v`` once
``b ≤ v + max_staleness``, so no rollout is ever older than the bound when it is applied.

Source: AReaL (arXiv 2505.24298) §5.1, staleness-aware admission.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shoal.orchestrator.auctioneer import Auctioneer
from shoal.orchestrator.batches import Batch, Scored
from shoal.orchestrator.context import Context
from shoal.orchestrator.evaluations import Evaluations
from shoal.orchestrator.journal import Journal
from shoal.orchestrator.learner import Learner
from shoal.orchestrator.planner import Planner
from shoal.orchestrator.store.tables import JobRow, PolicyRow, StatementRow
from shoal.orchestrator.workload import Delivery
from shoal.protocol.canonical import digest_of
from shoal.protocol.errors import InvariantBroken, ShoalError
from shoal.protocol.node import POLICIES_TOPIC
from shoal.protocol.policy import PolicyVersion
from shoal.provenance.statement import (
    StatementKind,
    UpdatePredicate,
    environment_statement,
    update_statement,
)
from shoal.rl.aggregation import UpdateStats
from shoal.rl.batch import GradientPayload
from shoal.rl.environments import Split
from shoal.rl.gradient import make_groups
from shoal.rl.verification import RolloutVerification


class GradientSum:
    """The gradient of one batch, slice by slice; ``complete`` is set when none is missing."""

    def __init__(self, num_units: int) -> None:
        self.complete = asyncio.Event()
        self._missing = set(range(num_units))
        self._slices: dict[int, Delivery] = {}
        if not num_units:
            self.complete.set()

    async def take(self, delivery: Delivery) -> None:
        """Keeps one accepted slice."""
        self._slices[delivery.units[0]] = delivery
        self._missing.difference_update(delivery.units)
        if not self._missing:
            self.complete.set()

    def payloads(self) -> list[GradientPayload]:
        """The slices in unit order, so that the sum does not depend on who answered first."""
        return [_gradient_payload(self._slices[first]) for first in sorted(self._slices)]

    def statements(self) -> tuple[str, ...]:
        """The digests of the workers' statements, in the same order."""
        return tuple(self._slices[first].statement_sha256 for first in sorted(self._slices))


class JobRun:
    """Drives one job; `run` returns when its last version is evaluated."""

    def __init__(
        self,
        context: Context,
        journal: Journal,
        auctioneer: Auctioneer,
        learner: Learner,
    ) -> None:
        self._context = context
        self._journal = journal
        self._auctioneer = auctioneer
        self.learner = learner
        self.job_id = learner.job.job_id()
        self._halted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._planner = Planner(context, journal, learner, self.halt)
        self.evaluations = Evaluations(context, journal, auctioneer, self._planner)
        self._batches: dict[int, Batch] = {}
        self._next_batch = 0
        self._pinned: deque[str] = deque()
        self.policy: PolicyVersion | None = None
        self.last_update_sha256: str | None = None
        self.reward_recent: float | None = None
        self.selling = True

    def halt(self, error: ShoalError) -> None:
        """Ends the run with ``error`` at its next wait."""
        if not self._halted.done():
            self._halted.set_exception(error)
            # Looked at, so that a run which ended first does not complain of it.
            self._halted.exception()

    async def restore(self) -> None:
        """The run stands where the records say the job stood: weights, optimiser, last update."""
        recorded = await self._context.database.run(self._recorded_version)
        version = await self._context.computed(lambda: self.learner.resume(recorded or 0))
        await self._publish(version)

    async def run(self) -> None:
        """The job's updates are all applied and its last version is evaluated.

        Raises:
            ShoalError: what halted it: money, exhausted attempts, a cancelled job.
        """
        spec = self.learner.spec
        version = self._current().version
        if version == 0:
            # Stated twice where the process stopped in between; the same words do no harm.
            await self._state_environments()
            await self._context.computed(lambda: self.learner.checkpoint(0))
        if version % spec.evaluation.interval == 0 or version == spec.max_steps:
            await self.evaluations.start(self._current())
        self._next_batch = version
        while version < spec.max_steps:
            await self._step(version)
            version += 1
            if version % spec.evaluation.interval == 0 or version == spec.max_steps:
                await self.evaluations.start(self._current())
        await self._unless_halted(self.evaluations.finish())

    def _recorded_version(self, session: Session) -> int | None:
        """The last version on record, and which statement made it; None for a new job."""
        last = session.scalar(
            select(StatementRow.payload_sha256)
            .where(
                StatementRow.job_id == self.job_id,
                StatementRow.kind == StatementKind.UPDATE.value,
            )
            .order_by(StatementRow.seq.desc())
            .limit(1)
        )
        self.last_update_sha256 = last
        return session.scalar(
            select(func.max(PolicyRow.version)).where(PolicyRow.job_id == self.job_id)
        )

    def _current(self) -> PolicyVersion:
        if self.policy is None:
            raise InvariantBroken(f"Job {self.job_id} has no published policy.")
        return self.policy

    async def _unless_halted(self, work: Awaitable[None]) -> None:
        waiting = asyncio.ensure_future(work)
        try:
            await asyncio.wait((waiting, self._halted), return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not waiting.done():
                waiting.cancel()
        if self._halted.done():
            self._halted.result()
        await waiting

    async def _issue_rollouts(self, version: int) -> None:
        spec = self.learner.spec
        limit = min(spec.max_steps, version + spec.max_staleness + 1)
        while self._next_batch < limit:
            batch = Batch(number=self._next_batch, num_groups=spec.groups_per_batch)
            self._batches[batch.number] = batch
            self._next_batch += 1
            policy = self._current()
            await self._auctioneer.open(
                self._planner.rollouts(batch.number, policy, self._take_rollouts(batch, policy))
            )

    def _take_rollouts(
        self, batch: Batch, policy: PolicyVersion
    ) -> Callable[[Delivery], Awaitable[None]]:
        spec = self.learner.spec

        async def take(delivery: Delivery) -> None:
            verified = delivery.payload
            if not isinstance(verified, RolloutVerification):
                raise InvariantBroken("A rollout was delivered without its verification.")
            payload, rewards_b = verified.payload, verified.rewards
            if payload is None or rewards_b is None:
                raise InvariantBroken("An unverified rollout was delivered.")
            size = spec.rollouts_per_example
            groups = make_groups(payload, verified.prompts, rewards_b, size, spec.loss)
            rewards = rewards_b.reshape(-1, size).tolist()
            scored = [
                Scored(group=group, rewards=tuple(row), policy_version=policy.version)
                for group, row in zip(groups, rewards, strict=True)
            ]
            batch.add(delivery.units, scored, delivery.statement_sha256)

        return take

    async def _step(self, version: int) -> None:
        started = time.monotonic()
        gradient = await self._next_gradient(version)
        waited_s = time.monotonic() - started
        batch = self._batches.pop(version)
        await self._unless_halted(_wait(gradient.complete))
        stats = await self._context.computed(
            lambda: self.learner.update(gradient.payloads(), batch.num_tokens)
        )
        await self._context.computed(lambda: self.learner.checkpoint(version + 1))
        facts = _update_facts(self._current(), batch, gradient, self.learner)
        await self._publish(version + 1, facts)
        await self._report(batch, stats, time.monotonic() - started, waited_s)

    async def _next_gradient(self, version: int) -> GradientSum:
        """The gradient of the version's batch is on the market, and so is the next batch.

        The learner waits for the gradient, so it is offered first if its batch is complete
        already; workers then sample the next batch while the update is made.
        """
        batch = self._batches.get(version)
        if batch is None or not batch.complete.is_set():
            await self._issue_rollouts(version)
            batch = self._batches[version]
            await self._unless_halted(_wait(batch.complete))
        gradient = await self._offer_gradient(batch)
        await self._issue_rollouts(version)
        return gradient

    async def _offer_gradient(self, batch: Batch) -> GradientSum:
        groups = batch.teaching()
        gradient = GradientSum(num_units=len(groups))
        if groups:
            await self._auctioneer.open(
                self._planner.gradients(batch.number, self._current(), groups, gradient.take)
            )
        return gradient

    async def _publish(self, version: int, facts: UpdatePredicate | None = None) -> None:
        policy = await self._context.computed(
            lambda: self.learner.publish(version, self._context.blobs)
        )
        rows: list[StatementRow] = []
        if facts is not None:
            predicate = facts.model_copy(update={"policy": policy})
            row = self._journal.state(
                self.job_id, StatementKind.UPDATE, update_statement(predicate)
            )
            self.last_update_sha256 = row.payload_sha256
            rows.append(row)

        def write(session: Session) -> None:
            session.add_all(rows)
            session.merge(
                PolicyRow(
                    job_id=self.job_id,
                    version=version,
                    record=policy.encode().decode(),
                    created_ms=self._context.time.now_ms(),
                )
            )
            session.get_one(JobRow, self.job_id).policy_version = version

        await self._context.database.run(write)
        self.policy = policy
        self._pinned.append(policy.adapter.sha256)
        # Older versions are read by stragglers only; they go first where room is short.
        if len(self._pinned) > self.learner.spec.max_staleness + 2:
            self._context.blobs.unpin(self._pinned.popleft())
        await self._auctioneer.announce(POLICIES_TOPIC, policy)

    async def _state_environments(self) -> None:
        rows = [
            self._journal.state(
                self.job_id,
                StatementKind.ENVIRONMENT,
                environment_statement(
                    self.job_id,
                    spec,
                    environment.digest(),
                    num_train_tasks=environment.num_tasks(Split.TRAIN),
                    num_eval_tasks=environment.num_tasks(Split.EVAL),
                ),
            )
            for spec, environment in zip(
                self.learner.spec.environments, self.learner.environments, strict=True
            )
        ]
        await self._context.database.run(lambda session: session.add_all(rows))

    async def _report(
        self, batch: Batch, stats: UpdateStats, step_s: float, waited_s: float
    ) -> None:
        metrics = batch.metrics(batch.number) | {
            "step": float(stats.step),
            "learning_rate": stats.learning_rate,
            "grad_norm": stats.grad_norm,
            "loss": stats.loss,
            "entropy": stats.entropy,
            "clip_ratio/low_mean": stats.clip_fraction_low,
            "clip_ratio/high_mean": stats.clip_fraction_high,
            "kl": stats.approx_kl,
            "step_time": step_s,
            "time/wait_for_batch": waited_s,
        }
        self.reward_recent = metrics["reward"]
        await self._journal.event(self.job_id, "update", metrics)


def _update_facts(
    parent: PolicyVersion, batch: Batch, gradient: GradientSum, learner: Learner
) -> UpdatePredicate:
    # ``policy`` is replaced once the new weights have a digest.
    return UpdatePredicate(
        job_id=parent.job_id,
        batch=batch.number,
        parent=parent,
        policy=parent,
        rollouts=tuple(batch.statements),
        gradients=gradient.statements(),
        num_tokens=batch.num_tokens,
        optimizer_sha256=digest_of(learner.spec.optimizer.to_json()),
    )


def _gradient_payload(delivery: Delivery) -> GradientPayload:
    if not isinstance(delivery.payload, GradientPayload):
        raise InvariantBroken("A gradient was delivered without its payload.")
    return delivery.payload


async def _wait(event: asyncio.Event) -> None:
    await event.wait()
