"""The plan of a job: which tasks each batch and each evaluation consists of.

Everything but the last digits of the task ids follows from the job, so the plan can be
re-derived, and work that was done before a restart is recognised.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from shoal.protocol.blob import BlobRef
from shoal.protocol.job import JobSpec
from shoal.protocol.policy import BaseModelRef, PolicyVersion
from shoal.protocol.task import EvaluateTask, GradientTask, PromptRef, RolloutTask
from shoal.rl.prompts import batch_seed, draw_prompts, eval_prompts, eval_seed
from shoal.rl.schedule import scheduled_rate

_UNNAMED = "task_00000000"
_STEM_DIGITS = 32
_Task = TypeVar("_Task", RolloutTask, GradientTask, EvaluateTask)


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
        """The prompts of ``batch``, one for each of its slots.

        The slots of a batch's first draw come first; those of each round of dynamic sampling
        follow, so slot ``s`` is drawn again as slot ``s + groups_per_batch``.
        """
        spec = self.spec
        num_slots = spec.groups_per_batch * (1 + spec.dynamic_sampling_rounds)
        return draw_prompts(self.job_id, batch, num_slots, spec.environments, self.train_sizes)

    def redrawn(self, slot: int) -> int | None:
        """The slot that replaces ``slot`` if its group has no spread; None after the last round."""
        spec = self.spec
        following = slot + spec.groups_per_batch
        last = spec.groups_per_batch * (1 + spec.dynamic_sampling_rounds)
        return following if following < last else None

    def rollout(
        self,
        batch: int,
        version: PolicyVersion,
        prompts: Sequence[PromptRef],
        slots: Sequence[int],
    ) -> RolloutTask:
        """The task that samples these slots of ``batch``, whose prompts are given."""
        spec = self.spec
        task = RolloutTask(
            task_id=_UNNAMED,
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
        return _named(task)

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
        task = GradientTask(
            task_id=_UNNAMED,
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
            max_tokens=self.spec.sampling.max_tokens,
            slice=slice_blob,
            num_rows=num_rows,
            num_groups=num_groups,
        )
        return _named(task)

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
        task = EvaluateTask(
            task_id=_UNNAMED,
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
        return _named(task)


def sampling_version(batch: int, max_staleness: int) -> int:
    """The policy version that samples ``batch``: the oldest that is allowed to.

    Batch ``b`` is applied to version ``b``, so its staleness is ``max_staleness``, or ``b``
    where there are no older versions yet.  It is issued as soon as this version exists.
    """
    return max(0, batch - max_staleness)


def admitted_batches(version: int, spec: JobSpec) -> int:
    """How many batches may have been issued, done or not, once ``version`` exists.

    What counts is work *issued*: a batch beyond this could only be applied later than the
    requester's ``max_staleness`` allows.

    Source: AReaL, arXiv 2505.24298 §5.1: ``(η + v + 1)·B − (accepted + running)`` samples may
    be issued, here in whole batches of ``B``.
    """
    return min(spec.max_steps, version + spec.max_staleness + 1)


def task_stem(task_id: str) -> str:
    """What the ids of all tasks with the same content share; see `Plan`."""
    return task_id[: len("task_") + _STEM_DIGITS]


def _named(task: _Task) -> _Task:
    """``task`` with its id: the digest of everything else, then eight digits of its own.

    So the same work, planned again after a restart, is recognised by the first part, while
    no two leases share an id.
    """
    stem = task.digest()[:_STEM_DIGITS]
    return task.model_copy(update={"task_id": f"task_{stem}{secrets.token_hex(4)}"})
