"""From a job's next step to workloads the market can sell."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from shoal.orchestrator.context import Context
from shoal.orchestrator.journal import Journal
from shoal.orchestrator.learner import Learner
from shoal.orchestrator.workload import Delivery, Workload
from shoal.protocol.canonical import digest_of
from shoal.protocol.errors import ShoalError
from shoal.protocol.ids import new_id
from shoal.protocol.market import Lot, LotClass, TaskKind
from shoal.protocol.policy import PolicyVersion
from shoal.protocol.task import EvaluateTask, GradientTask, PromptRef, RolloutTask
from shoal.rl.batch import HEADER_ALLOWANCE_BYTES
from shoal.rl.environments import Split
from shoal.rl.gradient import Group, encode_slice
from shoal.rl.plan import Plan

Deliver = Callable[[Delivery], Awaitable[None]]

# Per token: an int32 id and a float32 log-probability; per row: length, flag, reward; per
# prompt: its digest.
_BYTES_PER_TOKEN = 8
_BYTES_PER_ROW = 16
_BYTES_PER_PROMPT = 32


class Planner:
    """Makes the workloads of one job."""

    def __init__(
        self,
        context: Context,
        journal: Journal,
        learner: Learner,
        halt: Callable[[ShoalError], None],
    ) -> None:
        self._context = context
        self._journal = journal
        self._learner = learner
        self._halt = halt
        self.job_id = learner.job.job_id()
        self._environments_sha256 = digest_of(
            [environment.digest() for environment in learner.environments]
        )
        self._plan = Plan(
            job_id=self.job_id,
            spec=learner.spec,
            base=learner.base,
            train_sizes=[env.num_tasks(Split.TRAIN) for env in learner.environments],
            eval_sizes=[env.num_tasks(Split.EVAL) for env in learner.environments],
        )

    def rollouts(self, batch: int, policy: PolicyVersion, deliver: Deliver) -> Workload:
        """The rollouts of a batch: one unit for each of its groups."""
        prompts = self._plan.prompts(batch)

        async def build(slots: Sequence[int]) -> RolloutTask:
            return self._plan.rollout(batch, policy, prompts, slots)

        spec = self._learner.spec
        rows = spec.rollouts_per_example
        return self._workload(
            TaskKind.ROLLOUT,
            policy,
            spec.groups_per_batch,
            build,
            deliver,
            lambda units: self._rows_bytes(units, units * rows),
        )

    def gradients(
        self, batch: int, policy: PolicyVersion, groups: Sequence[Group], deliver: Deliver
    ) -> Workload:
        """The gradient of a batch: one unit for each group that teaches."""

        async def build(units: Sequence[int]) -> GradientTask:
            rows = encode_slice([groups[unit] for unit in units])
            return self._plan.gradient(
                batch,
                policy,
                self._context.blobs.put_bytes(rows.encode()),
                num_rows=rows.num_rows,
                num_groups=len(units),
            )

        arrays = self._learner.policy.shapes()
        size = policy.adapter.size_bytes + HEADER_ALLOWANCE_BYTES + 256 * len(arrays)
        return self._workload(
            TaskKind.GRADIENT, policy, len(groups), build, deliver, lambda units: size
        )

    def evaluation(
        self, policy: PolicyVersion, prompts: Sequence[PromptRef], deliver: Deliver
    ) -> Workload:
        """The evaluation of a version: one unit for each held-out prompt."""

        async def build(units: Sequence[int]) -> EvaluateTask:
            return self._plan.evaluation(policy, prompts, units)

        return self._workload(
            TaskKind.EVALUATE,
            policy,
            len(prompts),
            build,
            deliver,
            lambda units: self._rows_bytes(units, units),
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
        num_units: int,
        build: Callable[[Sequence[int]], Awaitable[RolloutTask | GradientTask | EvaluateTask]],
        deliver: Deliver,
        max_result_bytes: Callable[[int], int],
    ) -> Workload:
        spec = self._learner.spec
        reserve = {
            TaskKind.ROLLOUT: spec.budget.max_rollout_micros,
            TaskKind.GRADIENT: spec.budget.max_gradient_micros,
            TaskKind.EVALUATE: spec.budget.max_evaluate_micros,
        }[kind]
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
            num_units=num_units,
            reserve_micros=reserve,
        )
        return Workload(
            lot=lot,
            max_reserve_micros=reserve,
            build_task=build,
            deliver=deliver,
            abandon=self._halt,
            max_result_bytes=max_result_bytes,
            verify=spec.verify,
            waiting=list(range(num_units)),
        )
