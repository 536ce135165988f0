"""One job from its first rollout to its release.

Rollouts, the spreading of weights, gradients, updates and evaluations all run at once; the
loop below only holds their order.  Batch ``b`` is applied to version ``b`` and sampled under
version ``max(0, b − max_staleness)``, from the moment that version exists.  Which version
samples which prompt, and how a batch is cut into tasks, follows from the job alone, so the
same job gives the same weights however many workers share it, whichever of them fail, and
wherever it is interrupted.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from shoal.orchestrator.auctioneer import Auctioneer
from shoal.orchestrator.batches import Batch, GradientSum
from shoal.orchestrator.context import Context
from shoal.orchestrator.deltas import PolicyDeltas
from shoal.orchestrator.evaluations import Evaluations
from shoal.orchestrator.health import JobHealth
from shoal.orchestrator.journal import Journal
from shoal.orchestrator.learner import Learner
from shoal.orchestrator.planner import Planner
from shoal.orchestrator.recall import Recall
from shoal.orchestrator.sampler import BatchSampler
from shoal.orchestrator.slices import Slicer
from shoal.orchestrator.versions import VersionRecords, Versions
from shoal.protocol.canonical import digest_of
from shoal.protocol.errors import InvariantBroken, Unavailable
from shoal.protocol.policy import PolicyVersion
from shoal.provenance.statement import (
    StatementKind,
    UpdatePredicate,
    environment_statement,
)
from shoal.rl.aggregation import UpdateStats
from shoal.rl.environments import Split, metric_names

_HEAD_START_S = 0.05
"""For how long at most nothing else is offered while a batch's gradient is: the learner waits for
it, and clearing and offering rollouts costs as much of the event loop as that does."""


class JobRun:
    """Drives one job; `run` returns when its last version is evaluated."""

    def __init__(
        self,
        context: Context,
        journal: Journal,
        auctioneer: Auctioneer,
        deltas: PolicyDeltas,
        learner: Learner,
    ) -> None:
        self._context = context
        self._journal = journal
        self._auctioneer = auctioneer
        self._deltas = deltas
        self.learner = learner
        self.job_id = learner.job_id
        self._halted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._planner = Planner(
            context, journal, learner, self.halt, self._kept, lambda: self._is_kept
        )
        self._market = Recall(context, auctioneer, learner)
        self.evaluations = Evaluations(
            context, journal, self._market, self._planner, learner.spec, self._keep_best
        )
        self._health = JobHealth(context, journal, self.job_id, learner.spec, self.evaluations)
        self._versions = Versions(learner.spec, context.blobs)
        self._records = VersionRecords(context, journal, self.job_id)
        self._slicer = Slicer(context.blobs, learner.spec.tasks.gradient)
        self._sampler = BatchSampler(
            learner.spec,
            self._planner,
            self._market,
            self._versions,
            lambda: self.selling,
            self._slicer.begin,
        )
        self._keeping: asyncio.Task[Path] | None = None
        self._tidying: asyncio.Task[None] | None = None
        self.reserves = {
            kind: terms.reserve_micros for kind, terms in self._planner.reserves.items()
        }
        """The most that a unit of each kind costs while none has failed, in micros."""
        self.reward_recent: float | None = None
        self.selling = True

    @property
    def policy(self) -> PolicyVersion | None:
        """The newest published version; None before the first."""
        return self._versions.newest

    def halt(self, error: Exception) -> None:
        """Ends the run with ``error`` at its next wait."""
        if not self._halted.done():
            self._halted.set_exception(error)
            # Looked at, so that a run which ended first does not complain of it.
            self._halted.exception()

    def let_go(self) -> None:
        """The job is over: its policy versions may be dropped to make room."""
        self._versions.let_go()

    async def restore(self) -> None:
        """The run stands where the records say the job stood.

        That is: weights, optimiser, the versions that work is still out under, the next batch
        to issue, the evaluations.  A power cut may have spoiled the newest
        checkpoint; then the job goes on from an older one, which is told.

        Raises:
            InvalidRequest: the checkpoints are gone, or are those of another job or base.
        """
        recorded = await self._records.newest()
        kept = await self._context.computed(
            lambda: self.learner.resume(recorded or 0, self._context.blobs)
        )
        for policy in kept:
            self._versions.add(policy)
        version = self._current().version
        self._sampler.begin(version)
        if recorded is None:
            await self._records.begin(self._current())
        else:
            self._market.active = True
            facts = {"policy_version": version, "recorded_version": recorded}
            await self._journal.event(self.job_id, "job_resumed", facts)
        due = [v for v in range(version + 1) if self._versions.is_evaluated(v)]
        await self.evaluations.restore(self.job_id, due)

    async def run(self) -> str:
        """The job's updates are all applied and its last version is evaluated.

        Returns:
            Why it stopped before its last update; empty when it did not.

        Raises:
            ShoalError: what halted it: money, exhausted attempts, a cancelled job.
        """
        try:
            reason = await self._run()
            await self._tidied()
        finally:
            # However the run ended, nothing of it goes on behind its back.
            await self._slicer.close()
            if self._tidying is not None:
                await asyncio.wait((self._tidying,))
        return reason

    async def _run(self) -> str:
        version, last = self._current().version, self.learner.spec.max_steps
        if version == 0:
            # Stated twice where the process stopped in between; the same words do no harm.
            await self._state_environments()
            await self._context.computed(lambda: self.learner.checkpoint(0))
        await self._resume_evaluations()
        stopped = await self._early_stop(version)
        while version < last and not stopped:
            await self._step(version)
            version += 1
            if self._versions.is_evaluated(version):
                await self.evaluations.start(self._current())
            stopped = await self._early_stop(version)
        if stopped and not self.evaluations.has_begun(version):
            await self.evaluations.start(self._current())
        await self._unless_halted(self.evaluations.finish())
        return stopped

    async def _early_stop(self, version: int) -> str:
        """Why the job stops at ``version``; empty when it goes on.

        Decided by the evaluations of versions older than any that still samples, which are
        waited for: so the job stops at the same version whoever evaluates, and however fast.
        """
        rules = self.learner.spec.evaluation
        if rules.patience is None and rules.target is None:
            return ""
        through = version - self.learner.spec.max_staleness - 1
        await self._unless_halted(self.evaluations.finish(through))
        return self.evaluations.standings.stop_reason(through) or ""

    async def _resume_evaluations(self) -> None:
        for version in self._versions.numbers():
            due = self._versions.is_evaluated(version)
            if due and not self.evaluations.is_reported(version):
                await self.evaluations.start(self._versions.get(version))

    async def _keep_best(self, version: int) -> None:
        policy = self._versions.get(version)
        await self._to_disk(
            lambda: self.learner.keep_best(policy, self._context.blobs.read(policy.adapter.sha256))
        )

    def _current(self) -> PolicyVersion:
        if self.policy is None:
            raise InvariantBroken(f"Job {self.job_id} has no published policy.")
        return self.policy

    async def _unless_halted(self, work: Awaitable[object]) -> None:
        waiting = asyncio.ensure_future(work)
        try:
            await asyncio.wait((waiting, self._halted), return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not waiting.done():
                waiting.cancel()
        if self._halted.done():
            self._halted.result()
        await waiting

    async def _to_disk(self, work: Callable[[], None]) -> None:
        """``work``, which waits for the disk, beside the compute thread."""
        await asyncio.get_running_loop().run_in_executor(None, work)

    async def _step(self, version: int) -> None:
        """The batch of ``version`` is applied: the next version is published."""
        started = time.monotonic()
        gradient = await self._next_gradient(version)
        waited_s = time.monotonic() - started
        batch = self._sampler.take(version)
        market = await self._health.market_metrics()
        names = metric_names(self.learner.spec.environments)
        metrics = batch.metrics(version, names) | market
        await self._unless_halted(_wait(gradient.complete))
        await self._tidied()
        stats, policy = await self._context.computed(
            lambda: (
                self.learner.update(gradient.payloads(), batch.all_groups()),
                self.learner.publish(version + 1, self._context.blobs),
            )
        )
        facts = _update_facts(policy, self._current(), batch, gradient, self.learner)
        metrics |= _update_metrics(stats)
        metrics |= {
            "step_time": time.monotonic() - started,
            "time/wait_for_batch": waited_s,
        }
        await self._publish(policy, facts, metrics)
        self.reward_recent = metrics["reward"]

    async def _keep(
        self,
        policy: PolicyVersion,
        facts: UpdatePredicate | None,
        metrics: dict[str, float],
        older: Sequence[int],
    ) -> Path:
        """``policy`` is restored from the folder returned after a kill, and is on record.

        ``facts`` say how it was made; None where that was stated before.
        """
        folder = await self._context.computed(
            lambda: self.learner.checkpoint(policy.version, older)
        )
        if facts is not None:
            await self._records.add(policy, facts, metrics)
        self._auctioneer.announcer.policy(policy)
        return folder

    @property
    def _is_kept(self) -> bool:
        """Whether `_kept` returns, or raises, at once."""
        return self._keeping is None or self._keeping.done()

    async def _kept(self) -> None:
        """Before anything done under it is judged: the newest version survives a kill.

        Its work is out by then.  A kill before loses both, and nobody was paid for it.

        Raises:
            Unavailable: it could not be kept.
        """
        keeping = self._keeping
        if keeping is not None:
            await asyncio.wait((keeping,))
            if keeping.exception() is not None:
                raise Unavailable(
                    f"The newest policy version of job {self.job_id} could not be kept; the job "
                    "stops for it.",
                    code="not_kept",
                )

    async def _tidy(
        self, policy: PolicyVersion, metrics: dict[str, float], keeping: asyncio.Task[Path]
    ) -> None:
        """What follows an update and holds nothing up: health, and the disk."""
        folder = await keeping
        await self._health.see(metrics)
        await self._to_disk(lambda: self.learner.secure(folder, policy, self._context.blobs))

    def _halt_if_failed(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception):
            self.halt(error)

    async def _tidied(self) -> None:
        if self._tidying is not None:
            tidying, self._tidying = self._tidying, None
            await tidying

    async def _next_gradient(self, version: int) -> GradientSum:
        """The gradient of the version's batch is on the market, and so is the next batch.

        The learner waits for the gradient, so it is offered first if its batch is complete
        already, and gets a head start; workers then sample the next batch while it is computed
        and the update is made.
        """
        if not self._sampler.is_complete(version):
            await self._sampler.issue(version)
        batch = self._sampler.batch(version)
        await self._unless_halted(_wait(batch.complete))
        gradient = await self._offer_gradient(batch)
        await self._sampler.issue(version)
        return gradient

    async def _offer_gradient(self, batch: Batch) -> GradientSum:
        slices = await self._slicer.of(batch)
        gradient = GradientSum(num_slices=len(slices))
        if slices:
            workload = self._planner.gradients(batch.number, self._current(), slices, gradient.take)
            await self._market.open(workload)
            if workload.undelivered:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_HEAD_START_S):
                        await workload.handed_out.wait()
        else:
            await self._journal.event(
                self.job_id,
                "batch_without_spread",
                {
                    "batch": batch.number,
                    "reason": "all completions of each prompt got the same reward, so there is "
                    "nothing to compare; only earlier momentum moves the weights. Make the "
                    "prompts easier or harder, or raise rollouts_per_example.",
                },
            )
        return gradient

    async def _publish(
        self, policy: PolicyVersion, facts: UpdatePredicate, metrics: dict[str, float]
    ) -> None:
        """``policy`` is worked under at once; nothing of that is judged before `_keep` is done."""
        recorded = await self._records.has(policy)
        older = self._versions.wanted(policy.version, self.evaluations.pending())
        self._keeping = asyncio.create_task(
            self._keep(policy, None if recorded else facts, metrics, older),
            name=f"keep version {policy.version}",
        )
        self._tidying = asyncio.create_task(
            self._tidy(policy, metrics, self._keeping), name=f"tidy version {policy.version}"
        )
        self._tidying.add_done_callback(self._halt_if_failed)
        self._deltas.follow(self._current(), policy)
        self._versions.add(policy)
        # Under a version that was not on record nothing was ever accepted.
        self._market.active = recorded
        self._versions.drop_unwanted(policy.version, self.evaluations.pending())

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


def _update_metrics(stats: UpdateStats) -> dict[str, float]:
    return {
        "step": float(stats.step),
        "learning_rate": stats.learning_rate,
        "grad_norm": stats.grad_norm,
        "loss": stats.loss,
        **stats.metrics,
    }


def _update_facts(
    policy: PolicyVersion,
    parent: PolicyVersion,
    batch: Batch,
    gradient: GradientSum,
    learner: Learner,
) -> UpdatePredicate:
    return UpdatePredicate(
        job_id=parent.job_id,
        batch=batch.number,
        parent=parent,
        policy=policy,
        rollouts=tuple(batch.statements),
        gradients=gradient.statements(),
        num_tokens=batch.num_tokens,
        optimizer_sha256=digest_of(learner.spec.optimizer.to_json()),
    )


async def _wait(event: asyncio.Event) -> None:
    await event.wait()
