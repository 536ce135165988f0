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
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

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


@dataclass(frozen=True, kw_only=True)
class GradientSum:
    """The accepted slices of one batch, and the statements they came with."""

    payloads: tuple[GradientPayload, ...]
    statements: tuple[str, ...]


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
        self.policy: PolicyVersion | None = None
        self.last_update_sha256: str | None = None
        self.reward_recent: float | None = None
        self.selling = True

    def halt(self, error: ShoalError) -> None:
        """Ends the run with ``error`` at its next wait."""
        if not self._halted.done():
            self._halted.set_exception(error)

    async def run(self) -> None:
        """The job's updates are all applied and its last version is evaluated.

        Raises:
            ShoalError: what halted it: money, exhausted attempts, a cancelled job.
        """
        spec = self.learner.spec
        version = await self._context.computed(self.learner.resume)
        await self._publish(version)
        if version == 0:
            await self._state_environments()
            await self._context.computed(lambda: self.learner.checkpoint(0))
        await self.evaluations.start(self._current())
        self._next_batch = version
        while version < spec.max_steps:
            await self._issue_rollouts(version)
            await self._step(version)
            version += 1
            if version % spec.evaluation.interval == 0 or version == spec.max_steps:
                await self.evaluations.start(self._current())
        await self._unless_halted(self.evaluations.finish())

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
        batch = self._batches[version]
        await self._unless_halted(_wait(batch.complete))
        waited_s = time.monotonic() - started
        total = await self._gradient(batch)
        stats = await self._context.computed(
            lambda: self.learner.update(total.payloads, batch.num_tokens)
        )
        parent = self._current()
        await self._publish(version + 1, _update_facts(parent, batch, total, self.learner))
        del self._batches[version]
        spec = self.learner.spec
        if (version + 1) % spec.checkpoint.interval == 0 or version + 1 == spec.max_steps:
            await self._context.computed(lambda: self.learner.checkpoint(version + 1))
        await self._report(batch, stats, time.monotonic() - started, waited_s)

    async def _gradient(self, batch: Batch) -> GradientSum:
        groups = batch.teaching()
        done: dict[int, tuple[tuple[int, ...], Delivery]] = {}
        complete = asyncio.Event()
        missing = set(range(len(groups)))

        async def take(delivery: Delivery) -> None:
            done[delivery.units[0]] = (delivery.units, delivery)
            missing.difference_update(delivery.units)
            if not missing:
                complete.set()

        if groups:
            await self._auctioneer.open(
                self._planner.gradients(batch.number, self._current(), groups, take)
            )
            await self._unless_halted(_wait(complete))
        # Sorted by unit, so that the sum does not depend on who answered first.
        deliveries = [done[first][1] for first in sorted(done)]
        return GradientSum(
            payloads=tuple(_gradient_payload(delivery) for delivery in deliveries),
            statements=tuple(delivery.statement_sha256 for delivery in deliveries),
        )

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
    parent: PolicyVersion, batch: Batch, total: GradientSum, learner: Learner
) -> UpdatePredicate:
    # ``policy`` is replaced once the new weights have a digest.
    return UpdatePredicate(
        job_id=parent.job_id,
        batch=batch.number,
        parent=parent,
        policy=parent,
        rollouts=tuple(batch.statements),
        gradients=total.statements,
        num_tokens=batch.num_tokens,
        optimizer_sha256=digest_of(learner.spec.optimizer.to_json()),
    )


def _gradient_payload(delivery: Delivery) -> GradientPayload:
    if not isinstance(delivery.payload, GradientPayload):
        raise InvariantBroken("A gradient was delivered without its payload.")
    return delivery.payload


async def _wait(event: asyncio.Event) -> None:
    await event.wait()
