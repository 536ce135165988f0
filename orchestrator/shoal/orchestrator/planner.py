"""From a job's next step to workloads the market can sell."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from shoal.market.freshness import linear_freshness
from shoal.orchestrator.context import Context
from shoal.orchestrator.journal import Journal
from shoal.orchestrator.learner import Learner
from shoal.orchestrator.placement import Parcel
from shoal.orchestrator.reference import group_size, reserves_of
from shoal.orchestrator.slices import BatchSlice
from shoal.orchestrator.workload import Delivery, Workload, parcels_of, work_name
from shoal.protocol.canonical import digest_of
from shoal.protocol.errors import ShoalError
from shoal.protocol.ids import new_id
from shoal.protocol.market import Lot, LotClass, TaskKind
from shoal.protocol.policy import PolicyVersion
from shoal.protocol.task import EvaluateTask, GradientTask, PromptRef, RolloutTask, Task
from shoal.rl.batch import HEADER_ALLOWANCE_BYTES
from shoal.rl.environments import Split
from shoal.rl.plan import Plan

Deliver = Callable[[Delivery], Awaitable[None]]

# Per token: an int32 id and a float32 log-probability; per row: length, flag, reward; per
# prompt: its digest.
_BYTES_PER_TOKEN = 8
_BYTES_PER_ROW = 16
_BYTES_PER_PROMPT = 32


class Planner:
    """Makes the workloads of one job.

    Args:
        context: The orchestrator's surroundings.
        journal: Which epoch is open.
        learner: Of the job.
        halt: Told of what the job cannot go on after.
        kept: Awaited before any verdict on what was done under the newest version.
        is_kept: Whether that returns at once.
    """

    def __init__(
        self,
        context: Context,
        journal: Journal,
        learner: Learner,
        halt: Callable[[ShoalError], None],
        kept: Callable[[], Awaitable[None]],
        is_kept: Callable[[], bool],
    ) -> None:
        self._context = context
        self._journal = journal
        self._learner = learner
        self._halt = halt
        self._kept = kept
        self._is_kept = is_kept
        self.job_id = learner.job_id
        self._environments_sha256 = digest_of(
            [environment.digest() for environment in learner.environments]
        )
        self._base_sha256 = learner.base.content_digest()
        self.reserves = reserves_of(learner.spec, context.config.reference)
        """What a unit of each kind may cost while none has failed."""
        self._plan = Plan(
            job_id=self.job_id,
            spec=learner.spec,
            base=learner.base,
            train_sizes=[env.num_tasks(Split.TRAIN) for env in learner.environments],
            eval_sizes=[env.num_tasks(Split.EVAL) for env in learner.environments],
        )

    def rollouts(
        self, batch: int, policy: PolicyVersion, slots: Sequence[int], deliver: Deliver
    ) -> Workload:
        """Rollouts of a batch: one unit for the group of each of these slots."""
        prompts = self._plan.prompts(batch)

        async def build(parcel: Parcel) -> RolloutTask:
            return self._plan.rollout(batch, policy, prompts, parcel)

        spec = self._learner.spec
        return self._workload(
            TaskKind.ROLLOUT,
            policy,
            parcels_of(slots, spec.tasks.rollout),
            build,
            deliver,
            lambda units: self._rows_bytes(units, units * spec.rollouts_per_example),
        )

    def redrawn(self, slot: int) -> int | None:
        """The slot that is drawn when the group of ``slot`` has no spread, if any is."""
        return self._plan.redrawn(slot)

    def gradients(
        self, batch: int, policy: PolicyVersion, slices: Sequence[BatchSlice], deliver: Deliver
    ) -> Workload:
        """The gradient of a batch: one unit for each group, one parcel for each slice."""
        by_units = {part.units: part for part in slices}

        async def build(parcel: Parcel) -> GradientTask:
            part = by_units[parcel]
            blob = await part.at_hand(self._context.blobs)
            return self._plan.gradient(
                batch, policy, blob, num_rows=part.num_rows, num_groups=len(parcel)
            )

        arrays = self._learner.policy.shapes()
        size = policy.adapter.size_bytes + HEADER_ALLOWANCE_BYTES + 256 * len(arrays)
        return self._workload(
            TaskKind.GRADIENT, policy, list(by_units), build, deliver, lambda units: size
        )

    def evaluation(
        self, policy: PolicyVersion, prompts: Sequence[PromptRef], deliver: Deliver
    ) -> Workload:
        """The evaluation of a version: one unit for each held-out prompt."""

        async def build(parcel: Parcel) -> EvaluateTask:
            return self._plan.evaluation(policy, prompts, parcel)

        spec = self._learner.spec
        return self._workload(
            TaskKind.EVALUATE,
            policy,
            parcels_of(range(len(prompts)), spec.tasks.evaluate),
            build,
            deliver,
            lambda units: self._rows_bytes(units, units * spec.evaluation.samples_per_example),
        )

    def held_out(self) -> tuple[PromptRef, ...]:
        """The job's held-out prompts."""
        return self._plan.held_out()

    def _rows_bytes(self, prompts: int, rows: int) -> int:
        tokens = rows * self._learner.spec.sampling.max_tokens
        return (
            HEADER_ALLOWANCE_BYTES
            + tokens * _BYTES_PER_TOKEN
            + rows * _BYTES_PER_ROW
            + prompts * _BYTES_PER_PROMPT
        )

    def _workload(
        self,
        kind: TaskKind,
        policy: PolicyVersion,
        parcels: list[Parcel],
        build: Callable[[Parcel], Awaitable[Task]],
        deliver: Deliver,
        max_result_bytes: Callable[[int], int],
    ) -> Workload:
        spec = self._learner.spec

        # Only rollouts age: the others are made for the newest version.
        staleness = spec.max_staleness if kind is TaskKind.ROLLOUT else 0
        lot = Lot(
            lot_id=new_id("lot"),
            job_id=self.job_id,
            epoch=self._journal.open_epoch(self.job_id),
            lot_class=LotClass(
                kind=kind,
                environment_sha256=self._environments_sha256,
                policy_sha256=policy.policy_sha256(),
                token_bucket=spec.sampling.max_tokens,
            ),
            num_units=sum(len(parcel) for parcel in parcels),
            reserve_micros=self.reserves[kind].reserve_micros,
            freshness_permille=linear_freshness(staleness, spec.budget.stale_pay_permille),
        )
        return Workload(
            lot=lot,
            work=work_name(
                kind, self._base_sha256, spec.sampling.max_tokens, group_size(kind, spec)
            ),
            reserve=self.reserves[kind],
            build_task=build,
            deliver=deliver,
            abandon=self._halt,
            max_result_bytes=max_result_bytes,
            verify=spec.verify,
            waiting=parcels,
            restorable=self._kept,
            is_restorable=self._is_kept,
            requester=self._learner.job.requester,
            delay_micros_per_s=spec.budget.delay_micros_per_s,
        )
