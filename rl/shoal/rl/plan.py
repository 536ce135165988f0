"""The plan of a job: which tasks each batch and each evaluation consists of.

Everything but the task ids follows from the job, so the plan can be re-derived.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.protocol.blob import BlobRef
from shoal.protocol.ids import new_id
from shoal.protocol.job import JobSpec
from shoal.protocol.policy import BaseModelRef, PolicyVersion
from shoal.protocol.task import EvaluateTask, GradientTask, PromptRef, RolloutTask
from shoal.rl.prompts import batch_seed, draw_prompts, eval_prompts, eval_seed
from shoal.rl.schedule import scheduled_rate


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What stays the same for all tasks of a job.

    ``train_sizes`` and ``eval_sizes`` are the number of prompts of each environment.
    """

    job_id: str
    spec: JobSpec
    base: BaseModelRef
    train_sizes: Sequence[int]
    eval_sizes: Sequence[int]

    def prompts(self, batch: int) -> tuple[PromptRef, ...]:
        """The prompts of ``batch``, one for each of its slots."""
        spec = self.spec
        return draw_prompts(
            self.job_id, batch, spec.groups_per_batch, spec.environments, self.train_sizes
        )

    def rollout(
        self,
        batch: int,
        version: PolicyVersion,
        prompts: Sequence[PromptRef],
        slots: Sequence[int],
    ) -> RolloutTask:
        """The task that samples these slots of ``batch``, whose prompts are given."""
        spec = self.spec
        return RolloutTask(
            task_id=new_id("task"),
            job_id=self.job_id,
            batch=batch,
            base=self.base,
            policy=version,
            lora=spec.lora,
            environments=spec.environments,
            prompts=tuple(prompts[slot] for slot in slots),
            slots=tuple(slots),
            group_size=spec.rollouts_per_example,
            sampling=spec.sampling,
            seed=batch_seed(self.job_id, batch),
        )

    def gradient(
        self,
        batch: int,
        version: PolicyVersion,
        slice_blob: BlobRef,
        *,
        num_rows: int,
        num_groups: int,
    ) -> GradientTask:
        """The task that differentiates one slice of ``batch`` at ``version``."""
        return GradientTask(
            task_id=new_id("task"),
            job_id=self.job_id,
            batch=batch,
            base=self.base,
            policy=version,
            lora=self.spec.lora,
            loss=self.spec.loss,
            loss_sha256=self.spec.loss.digest(),
            gradient=self.spec.gradient,
            optimizer=self.spec.optimizer,
            learning_rate=scheduled_rate(self.spec.optimizer, batch, self.spec.max_steps),
            temperature=self.spec.sampling.temperature,
            slice=slice_blob,
            num_rows=num_rows,
            num_groups=num_groups,
        )

    def held_out(self) -> tuple[PromptRef, ...]:
        """The job's held-out prompts: the same for every version."""
        return eval_prompts(
            self.job_id,
            self.spec.environments,
            self.eval_sizes,
            self.spec.evaluation.num_examples,
        )

    def evaluation(
        self, version: PolicyVersion, prompts: Sequence[PromptRef], slots: Sequence[int]
    ) -> EvaluateTask:
        """The task that evaluates ``version`` on the held-out prompts in ``slots``."""
        return EvaluateTask(
            task_id=new_id("task"),
            job_id=self.job_id,
            base=self.base,
            policy=version,
            lora=self.spec.lora,
            environments=self.spec.environments,
            prompts=tuple(prompts[slot] for slot in slots),
            slots=tuple(slots),
            samples_per_prompt=self.spec.evaluation.samples_per_example,
            temperature=self.spec.evaluation.temperature,
            max_tokens=self.spec.sampling.max_tokens,
            seed=eval_seed(self.job_id),
        )


def sampling_version(batch: int, max_staleness: int) -> int:
    """The oldest policy version that may sample ``batch``, and the first that exists in time.

    Batch ``b`` is applied to version ``b``; sampled under ``b − max_staleness`` it never
    waits for an update that has not been made.
    """
    return max(0, batch - max_staleness)
