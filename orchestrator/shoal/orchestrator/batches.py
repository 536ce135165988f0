"""Batches of verified rollouts and their gradients, on their way from workers to the learner."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from shoal.orchestrator.placement import Parcel
from shoal.orchestrator.workload import Delivery
from shoal.protocol.errors import InvariantBroken
from shoal.protocol.learning import AdvantageScale
from shoal.rl.advantage import group_advantages
from shoal.rl.batch import GradientPayload
from shoal.rl.gradient import Group
from shoal.rl.sample_metrics import SampledBatch, sample_metrics


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One prompt's verified group, its rewards, and the oldest version that sampled any of it.

    ``environment`` is the number of the prompt's environment in the job.
    """

    group: Group
    environment: int
    rewards: tuple[float, ...]
    policy_version: int

    @property
    def has_spread(self) -> bool:
        """Whether the rewards differ, so that comparing them says something."""
        return min(self.rewards) != max(self.rewards)


@dataclass(kw_only=True)
class Batch:
    """The groups of one policy update; ``complete`` is set when none is missing.

    A group belongs to a place in the batch.  With dynamic sampling a place is drawn again,
    under the next of its slots, while its group has no spread; ``num_redrawn`` counts these.
    ``statements`` are the digests of the workers' statements the groups came with.
    """

    number: int
    num_groups: int
    advantage_scale: AdvantageScale = AdvantageScale.GROUP_STD
    groups: dict[int, Scored] = field(default_factory=dict)
    num_redrawn: int = 0
    statements: list[str] = field(default_factory=list)
    complete: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, slots: Sequence[int], scored: Sequence[Scored], statement_sha256: str) -> None:
        """Puts the groups of one delivery in their places; the last one completes the batch."""
        for slot, group in zip(slots, scored, strict=True):
            self.groups[slot % self.num_groups] = group
        self.statements.append(statement_sha256)
        if len(self.groups) == self.num_groups:
            # In the order of places, so that nothing depends on who was first.
            self.groups = dict(sorted(self.groups.items()))
            if self.advantage_scale is AdvantageScale.BATCH_STD:
                self._scale_by_batch()
            self.complete.set()

    def _scale_by_batch(self) -> None:
        """Every advantage is over the spread of the whole batch, known only now."""
        size = len(self.groups[0].rewards)
        rewards_b = np.array([s.rewards for s in self.groups.values()], dtype=np.float32)
        advantages_b = group_advantages(rewards_b.reshape(-1), size, self.advantage_scale)
        for place, scored in self.groups.items():
            advantages = advantages_b[place * size : (place + 1) * size]
            group = dataclasses.replace(scored.group, advantages=advantages)
            self.groups[place] = dataclasses.replace(scored, group=group)

    @property
    def num_tokens(self) -> int:
        """Completion tokens of the whole batch."""
        return sum(scored.group.num_tokens for scored in self.groups.values())

    def all_groups(self) -> list[Group]:
        """Every group, in the order of places."""
        return [scored.group for scored in self.groups.values()]

    def teaching(self) -> list[Group]:
        """The groups with a gradient, in order; the others are not sent out."""
        return [group for group in self.all_groups() if group.teaches]

    def metrics(self, policy_version: int, environments: Sequence[str]) -> dict[str, float]:
        """The batch's figures when applied to ``policy_version``; environments by name."""
        scored = self.groups.values()
        sampled = SampledBatch(
            environments_p=np.array([s.environment for s in scored]),
            rewards_pg=np.array([s.rewards for s in scored], dtype=np.float64),
            lengths_b=np.array([len(row) for s in scored for row in s.group.token_ids]),
            truncated_b=np.concatenate([s.group.truncated for s in scored]),
            staleness_p=policy_version - np.array([s.policy_version for s in scored]),
        )
        figures = sample_metrics(sampled, environments)
        return figures | {"sample/redrawn_groups": float(self.num_redrawn)}


class GradientSum:
    """The gradient of one batch, slice by slice; ``complete`` is set when none is missing."""

    def __init__(self, num_slices: int) -> None:
        self.complete = asyncio.Event()
        self._num_slices = num_slices
        self._slices: dict[Parcel, Delivery] = {}
        if not num_slices:
            self.complete.set()

    async def take(self, delivery: Delivery) -> None:
        """Keeps one accepted slice."""
        self._slices[delivery.units] = delivery
        if len(self._slices) == self._num_slices:
            self.complete.set()

    def payloads(self) -> list[GradientPayload]:
        """The slices in order, so that the sum does not depend on who answered first."""
        return [_gradient_payload(delivery) for _, delivery in sorted(self._slices.items())]

    def statements(self) -> tuple[str, ...]:
        """The digests of the workers' statements, in the same order."""
        return tuple(delivery.statement_sha256 for _, delivery in sorted(self._slices.items()))


def _gradient_payload(delivery: Delivery) -> GradientPayload:
    if not isinstance(delivery.payload, GradientPayload):
        raise InvariantBroken("A gradient was delivered without its payload.")
    return delivery.payload
