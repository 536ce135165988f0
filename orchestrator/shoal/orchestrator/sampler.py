"""The rollouts of a job: which batch is issued when, and what becomes of what comes back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from shoal.orchestrator.batches import Batch, Scored
from shoal.orchestrator.planner import Planner
from shoal.orchestrator.versions import Versions
from shoal.orchestrator.workload import Delivery, Market
from shoal.protocol.errors import InvariantBroken
from shoal.protocol.job import JobSpec
from shoal.protocol.policy import PolicyVersion
from shoal.protocol.task import PromptRef, RolloutTask, Task
from shoal.rl.gradient import make_groups
from shoal.rl.plan import admitted_batches, sampling_version
from shoal.rl.verification import RolloutVerification


class BatchSampler:
    """Issues batches as far ahead as the staleness bound allows, and fills them.

    Admission counts what was *issued*, and a batch's policy version follows from its number;
    so on a resume nothing but the version decides what is out.

    Args:
        spec: The job's.
        planner: Of the job.
        market: Where rollouts are sold.
        versions: The policy versions at hand.
        selling: Whether the job still buys anything.
        on_issue: Told of each batch before any of it can come back.
    """

    def __init__(
        self,
        spec: JobSpec,
        planner: Planner,
        market: Market,
        versions: Versions,
        selling: Callable[[], bool],
        on_issue: Callable[[Batch], None],
    ) -> None:
        self._spec = spec
        self._planner = planner
        self._market = market
        self._versions = versions
        self._selling = selling
        self._on_issue = on_issue
        self._batches: dict[int, Batch] = {}
        self._next_batch = 0

    def begin(self, version: int) -> None:
        """The first batch to issue is that of ``version``; those before it are applied."""
        self._next_batch = version

    async def issue(self, version: int) -> None:
        """Every batch that may be sampled once ``version`` exists is on the market."""
        spec = self._spec
        while self._next_batch < admitted_batches(version, spec):
            batch = Batch(
                number=self._next_batch,
                num_groups=spec.groups_per_batch,
                advantage_scale=spec.loss.advantage_scale,
            )
            self._batches[batch.number] = batch
            self._next_batch += 1
            self._on_issue(batch)
            policy = self._versions.get(sampling_version(batch.number, spec.max_staleness))
            await self._open(batch, policy, range(spec.groups_per_batch))

    def is_complete(self, number: int) -> bool:
        """Whether all groups of batch ``number`` are in."""
        batch = self._batches.get(number)
        return batch is not None and batch.complete.is_set()

    def batch(self, number: int) -> Batch:
        """Batch ``number``, which has been issued and not been taken."""
        return self._batches[number]

    def take(self, number: int) -> Batch:
        """Batch ``number``, which nobody needs from here any more."""
        return self._batches.pop(number)

    async def _open(self, batch: Batch, policy: PolicyVersion, slots: Sequence[int]) -> None:
        deliver = self._deliver(batch, policy)
        await self._market.open(self._planner.rollouts(batch.number, policy, slots, deliver))

    def _deliver(
        self, batch: Batch, policy: PolicyVersion
    ) -> Callable[[Delivery], Awaitable[None]]:
        async def take(delivery: Delivery) -> None:
            scored = self._scored(delivery, policy.version)
            again = self._without_spread(delivery.units, scored)
            kept = [n for n, slot in enumerate(delivery.units) if slot not in again]
            batch.num_redrawn += len(again)
            batch.add(
                [delivery.units[n] for n in kept],
                [scored[n] for n in kept],
                delivery.statement_sha256,
            )
            # Drawn again at once, parcel by parcel: nobody waits for the rest of the batch.
            if again and self._selling():
                await self._open(batch, policy, list(again.values()))

        return take

    def _without_spread(self, slots: Sequence[int], scored: Sequence[Scored]) -> dict[int, int]:
        """The slots to be drawn again, and as which; none after the last round."""
        found = {}
        for slot, group in zip(slots, scored, strict=True):
            following = self._planner.redrawn(slot)
            if following is not None and not group.has_spread:
                found[slot] = following
        return found

    def _scored(self, delivery: Delivery, version: int) -> list[Scored]:
        """The groups of a delivered rollout, with the verifier's rewards."""
        spec, verified = self._spec, delivery.payload
        if not isinstance(verified, RolloutVerification):
            raise InvariantBroken("A rollout was delivered without its verification.")
        payload, rewards_b = verified.payload, verified.rewards
        if payload is None or rewards_b is None:
            raise InvariantBroken("An unverified rollout was delivered.")
        size = spec.rollouts_per_example
        groups = make_groups(payload, verified.prompts, rewards_b, size, spec.loss)
        rewards = rewards_b.reshape(-1, size).tolist()
        return [
            Scored(
                group=group,
                environment=prompt.environment,
                rewards=tuple(row),
                policy_version=version,
            )
            for group, row, prompt in zip(groups, rewards, _prompts(delivery.task), strict=True)
        ]


def _prompts(task: Task) -> tuple[PromptRef, ...]:
    if not isinstance(task, RolloutTask):
        raise InvariantBroken("A rollout was delivered for a task of another kind.")
    return task.prompts
