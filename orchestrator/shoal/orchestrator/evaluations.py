"""Held-out evaluations of policy versions, sold to workers like any other work."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from shoal.orchestrator.context import Context
from shoal.orchestrator.journal import Journal
from shoal.orchestrator.planner import Planner
from shoal.orchestrator.store.tables import EventRow
from shoal.orchestrator.workload import Delivery, Market
from shoal.protocol.errors import InvariantBroken
from shoal.protocol.job import JobSpec
from shoal.protocol.policy import PolicyVersion
from shoal.protocol.task import PromptRef
from shoal.rl.confidence import Estimate, HeldOutScore, Interval, score_held_out
from shoal.rl.early_stop import Standings
from shoal.rl.environments import metric_names
from shoal.rl.verification import EvaluateVerification

EVENT = "evaluation"


@dataclass(kw_only=True)
class Evaluation:
    """One version's held-out rewards, by unit, as they arrive: one for each sample."""

    policy: PolicyVersion
    prompts: Sequence[PromptRef]
    rewards: dict[int, list[float]] = field(default_factory=dict)
    statements: list[str] = field(default_factory=list)
    complete: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def num_examples(self) -> int:
        """Held-out prompts."""
        return len(self.prompts)

    @property
    def accuracy(self) -> float:
        """avg@k over all prompts."""
        return self.score().average.value

    def score(self) -> HeldOutScore:
        """avg@k and pass@k over all prompts."""
        return score_held_out([self.rewards[unit] for unit in range(self.num_examples)])

    def metrics(self, names: Sequence[str]) -> dict[str, float]:
        """The figures of each environment, by its name, and over all under ``eval``."""
        figures = self.score().metrics("eval")
        for number, name in enumerate(names):
            rewards = [
                self.rewards[unit]
                for unit, prompt in enumerate(self.prompts)
                if prompt.environment == number
            ]
            if rewards:
                figures |= score_held_out(rewards).metrics(f"eval/{name}")
        return figures


class Evaluations:
    """All evaluations of one job; they run beside the updates and hold nothing up.

    Args:
        context: The orchestrator's surroundings.
        journal: Told of each result.
        market: Where the work is sold.
        planner: Of the job.
        spec: The job's.
        keep_best: Awaited with the number of each new best version.
    """

    def __init__(
        self,
        context: Context,
        journal: Journal,
        market: Market,
        planner: Planner,
        spec: JobSpec,
        keep_best: Callable[[int], Awaitable[None]],
    ) -> None:
        self._context = context
        self._journal = journal
        self._market = market
        self._planner = planner
        self._names = metric_names(spec.environments)
        self._keep_best = keep_best
        self._reported: dict[int, Estimate] = {}
        self._statements: dict[int, tuple[str, ...]] = {}
        self._expected: set[int] = set()
        self._unread = 0
        self.standings = Standings(rules=spec.evaluation)
        self.all: list[Evaluation] = []

    @property
    def stop_requested(self) -> str | None:
        """Why the job should stop now, by its own rules; None while it should go on."""
        return self.standings.stop_requested

    async def restore(self, job_id: str, due: Iterable[int]) -> None:
        """What was reported before this process began counts again; call before `start`.

        ``due`` are the versions whose evaluation had begun; those not reported are judged, in
        their turn, when they have been started again.
        """

        def read(session: Session) -> list[dict[str, Any]]:
            rows = session.scalars(
                select(EventRow.data)
                .where(EventRow.job_id == job_id, EventRow.type == EVENT)
                .order_by(EventRow.seq)
            )
            return [json.loads(row) for row in rows]

        recorded = await self._context.database.run(read)
        for version in sorted({*due, *map(_version_of, recorded)}):
            self._expect(version)
        for data in recorded:
            interval = Interval(low=data["accuracy_low"], high=data["accuracy_high"])
            estimate = Estimate(value=data["accuracy"], interval=interval)
            self._reported[_version_of(data)] = estimate
            self._statements[_version_of(data)] = tuple(data["statements"])
            self.standings.record(_version_of(data), estimate.value)

    def _expect(self, version: int) -> None:
        if version not in self._expected:
            self._expected.add(version)
            self.standings.expect(version)

    def reported(self) -> dict[int, Estimate]:
        """avg@k of each version on record."""
        return dict(sorted(self._reported.items()))

    def statements(self, version: int) -> tuple[str, ...]:
        """The digests of the workers' statements behind the version's result."""
        return self._statements.get(version, ())

    def pending(self) -> list[int]:
        """The versions whose evaluation is under way, in order."""
        return sorted(e.policy.version for e in self.all if not e.complete.is_set())

    def is_reported(self, version: int) -> bool:
        """Whether the version's result is on record."""
        return version in self._reported

    def reported_since(self) -> list[tuple[int, Estimate]]:
        """Versions and results that came in since this was last asked, in order of arrival."""
        fresh = list(self._reported.items())[self._unread :]
        self._unread = len(self._reported)
        return fresh

    async def start(self, policy: PolicyVersion) -> None:
        """The version's evaluation is on the market."""
        prompts = self._planner.held_out()
        evaluation = Evaluation(policy=policy, prompts=prompts)
        self.all.append(evaluation)
        self._expect(policy.version)

        async def take(delivery: Delivery) -> None:
            verified = delivery.payload
            if not isinstance(verified, EvaluateVerification) or verified.rewards is None:
                raise InvariantBroken("An evaluation was delivered without its verification.")
            rows: list[list[float]] = verified.rewards.reshape(len(delivery.units), -1).tolist()
            evaluation.rewards |= dict(zip(delivery.units, rows, strict=True))
            evaluation.statements.append(delivery.statement_sha256)
            if len(evaluation.rewards) == evaluation.num_examples:
                await self._finished(evaluation)

        await self._market.open(self._planner.evaluation(policy, prompts, take))

    async def _finished(self, evaluation: Evaluation) -> None:
        version = evaluation.policy.version
        if not self.is_reported(version):
            await self._report(evaluation, evaluation.score())
        evaluation.complete.set()

    async def _report(self, evaluation: Evaluation, score: HeldOutScore) -> None:
        version, average = evaluation.policy.version, score.average
        # Noted before the first wait, so that no second delivery reports it again.
        self._reported[version] = average
        self._statements[version] = tuple(evaluation.statements)
        if (
            self.standings.record(version, average.value)
            and self.standings.best_version is not None
        ):
            await self._keep_best(self.standings.best_version)
        await self._journal.event(
            evaluation.policy.job_id,
            EVENT,
            {
                "policy_version": version,
                "accuracy": average.value,
                "accuracy_low": average.interval.low,
                "accuracy_high": average.interval.high,
                "num_examples": score.num_prompts,
                "num_samples": score.num_samples,
                "statements": evaluation.statements,
                **evaluation.metrics(self._names),
            },
        )

    async def finish(self, through: int | None = None) -> None:
        """Waits until every evaluation under way, of versions up to ``through``, is complete."""
        for evaluation in self.all:
            if through is None or evaluation.policy.version <= through:
                await evaluation.complete.wait()

    def has_begun(self, version: int) -> bool:
        """Whether the version's evaluation is reported or under way."""
        return version in self._expected


def _version_of(data: dict[str, Any]) -> int:
    return int(data["policy_version"])
