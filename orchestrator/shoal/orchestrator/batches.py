"""Batches of verified rollouts, on their way from workers to the learner."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from shoal.rl.gradient import Group


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One prompt's verified group, its rewards, and the policy version that sampled it."""

    group: Group
    rewards: tuple[float, ...]
    policy_version: int


@dataclass(kw_only=True)
class Batch:
    """The groups of one policy update; ``complete`` is set when none is missing.

    ``statements`` are the digests of the workers' statements the groups came with.
    """

    number: int
    num_groups: int
    groups: dict[int, Scored] = field(default_factory=dict)
    statements: list[str] = field(default_factory=list)
    complete: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, slots: Sequence[int], scored: Sequence[Scored], statement_sha256: str) -> None:
        """Puts the groups of one delivery in their slots; the last one completes the batch."""
        self.groups |= dict(zip(slots, scored, strict=True))
        self.statements.append(statement_sha256)
        if len(self.groups) == self.num_groups:
            self.complete.set()

    @property
    def num_tokens(self) -> int:
        """Completion tokens of the whole batch: what the summed gradient is divided by."""
        return sum(scored.group.num_tokens for scored in self.groups.values())

    def teaching(self) -> list[Group]:
        """The groups with a gradient, in slot order; the others are not sent out."""
        return [s.group for _, s in sorted(self.groups.items()) if s.group.teaches]

    def metrics(self, policy_version: int) -> dict[str, float]:
        """Reward figures under TRL's names; ``reward_std`` is over the batch."""
        rewards = [reward for scored in self.groups.values() for reward in scored.rewards]
        lengths = [len(row) for s in self.groups.values() for row in s.group.token_ids]
        staleness = [policy_version - scored.policy_version for scored in self.groups.values()]
        return {
            "reward": statistics.fmean(rewards),
            "reward_std": statistics.pstdev(rewards),
            "frac_reward_zero_std": 1 - len(self.teaching()) / self.num_groups,
            "completions/mean_length": statistics.fmean(lengths),
            "completions/min_length": float(min(lengths)),
            "completions/max_length": float(max(lengths)),
            "num_tokens": float(self.num_tokens),
            "sample/staleness_mean": statistics.fmean(staleness),
            "sample/staleness_max": float(max(staleness)),
        }
