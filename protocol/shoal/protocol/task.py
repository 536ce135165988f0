"""Tasks: exactly what a lease's holder is to compute.

Writer: the orchestrator's planner.  Reader: the worker's executor, and the verifier, which
recomputes from the same record.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from shoal.protocol.blob import BlobRef
from shoal.protocol.ids import Hex32, Sha256, ShortId
from shoal.protocol.job import MAX_PROMPTS, EnvSpec, LoraSpec, LossSpec, SamplingSpec
from shoal.protocol.market import TaskKind
from shoal.protocol.policy import BaseModelRef, PolicyVersion
from shoal.protocol.record import MAX_INT, Record


class PromptRef(Record):
    """One prompt: the job's environment number, and the index in its split."""

    environment: int = Field(ge=0, lt=64)
    index: int = Field(ge=0, le=MAX_INT)


class RolloutTask(Record):
    """Sample ``group_size`` completions for each prompt from a policy version.

    Prompts are named by index, drawn from a hash of job, batch and slot, so that nobody
    picks the easy ones.  ``seed`` fixes every random draw: completion ``g`` of prompt ``p``
    takes row ``p · group_size + g`` of the task's uniforms.
    """

    kind: Literal[TaskKind.ROLLOUT] = TaskKind.ROLLOUT
    task_id: ShortId
    job_id: Hex32
    batch: int = Field(ge=0, le=MAX_INT)
    base: BaseModelRef
    policy: PolicyVersion
    lora: LoraSpec
    environments: tuple[EnvSpec, ...] = Field(min_length=1, max_length=64)
    prompts: tuple[PromptRef, ...] = Field(min_length=1, max_length=MAX_PROMPTS)
    group_size: int = Field(ge=1, le=1024)
    sampling: SamplingSpec
    seed: int = Field(ge=0, le=MAX_INT)


class EvaluateTask(Record):
    """Complete held-out prompts greedily (the most likely token, once per prompt)."""

    kind: Literal[TaskKind.EVALUATE] = TaskKind.EVALUATE
    task_id: ShortId
    job_id: Hex32
    base: BaseModelRef
    policy: PolicyVersion
    lora: LoraSpec
    environments: tuple[EnvSpec, ...] = Field(min_length=1, max_length=64)
    prompts: tuple[PromptRef, ...] = Field(min_length=1, max_length=MAX_PROMPTS)
    max_tokens: int = Field(ge=1, le=MAX_INT)


class GradientTask(Record):
    """Differentiate the loss *sum* over one slice of a verified batch.

    ``slice`` is a safetensors blob (`shoal.rl.batch` fixes its arrays).  Sums, not means:
    the orchestrator adds the slices of a batch and divides once by the batch's token count.
    """

    kind: Literal[TaskKind.GRADIENT] = TaskKind.GRADIENT
    task_id: ShortId
    job_id: Hex32
    batch: int = Field(ge=0, le=MAX_INT)
    base: BaseModelRef
    policy: PolicyVersion
    lora: LoraSpec
    loss: LossSpec
    loss_sha256: Sha256
    temperature: float = Field(gt=0, le=10)
    slice: BlobRef
    num_rows: int = Field(ge=1, le=MAX_INT)
    num_groups: int = Field(ge=1, le=MAX_INT)


Task = Annotated[RolloutTask | GradientTask | EvaluateTask, Field(discriminator="kind")]
