"""Held-out evaluations of policy versions, sold to workers like any other work."""

from __future__ import annotations

import asyncio
import statistics
from dataclasses import dataclass, field

from shoal.orchestrator.auctioneer import Auctioneer
from shoal.orchestrator.context import Context
from shoal.orchestrator.journal import Journal
from shoal.orchestrator.planner import Planner
from shoal.orchestrator.workload import Delivery
from shoal.protocol.errors import InvariantBroken
from shoal.protocol.policy import PolicyVersion
from shoal.rl.verification import EvaluateVerification


@dataclass(kw_only=True)
class Evaluation:
    """One version's held-out rewards, by unit, as they arrive."""

    policy: PolicyVersion
    num_examples: int
    rewards: dict[int, float] = field(default_factory=dict)
    statements: list[str] = field(default_factory=list)
    complete: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def accuracy(self) -> float:
        """Mean greedy reward over the held-out prompts."""
        return statistics.fmean(self.rewards.values())


class Evaluations:
    """All evaluations of one job; they run beside the updates and hold nothing up."""

    def __init__(
        self, context: Context, journal: Journal, auctioneer: Auctioneer, planner: Planner
    ) -> None:
        self._context = context
        self._journal = journal
        self._auctioneer = auctioneer
        self._planner = planner
        self.all: list[Evaluation] = []

    async def start(self, policy: PolicyVersion) -> None:
        """The version's evaluation is on the market."""
        prompts = self._planner.held_out()
        evaluation = Evaluation(policy=policy, num_examples=len(prompts))
        self.all.append(evaluation)

        async def take(delivery: Delivery) -> None:
            verified = delivery.payload
            if not isinstance(verified, EvaluateVerification) or verified.rewards is None:
                raise InvariantBroken("An evaluation was delivered without its verification.")
            rewards = [float(reward) for reward in verified.rewards]
            evaluation.rewards |= dict(zip(delivery.units, rewards, strict=True))
            evaluation.statements.append(delivery.statement_sha256)
            if len(evaluation.rewards) == evaluation.num_examples:
                await self._finished(evaluation)

        await self._auctioneer.open(self._planner.evaluation(policy, prompts, take))

    async def _finished(self, evaluation: Evaluation) -> None:
        await self._journal.event(
            evaluation.policy.job_id,
            "evaluation",
            {
                "policy_version": evaluation.policy.version,
                "accuracy": evaluation.accuracy,
                "num_examples": evaluation.num_examples,
            },
        )
        evaluation.complete.set()

    async def finish(self) -> None:
        """Waits until every evaluation under way is complete."""
        for evaluation in self.all:
            await evaluation.complete.wait()
