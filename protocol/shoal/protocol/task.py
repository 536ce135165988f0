"""Tasks: exactly what a lease's holder is to compute.

Writer: the orchestrator's planner.  Reader: the worker's executor, and the verifier, which
recomputes from the same record.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from shoal.protocol.blob import BlobRef
from shoal.protocol.ids import Hex32, Sha256, ShortId
from shoal.protocol.job import MAX_PROMPTS, EnvSpec, SamplingSpec
from shoal.protocol.learning import GradientSpec, LoraSpec, LossSpec, OptimizerSpec
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
    picks the easy ones.  ``seed`` is the batch's and fixes every random draw: completion
    ``g`` of the prompt in slot ``s`` takes the uniforms of row ``s · group_size + g``.  An
    absent ``lora`` means that the policy version holds every weight.
    """

    kind: Literal[TaskKind.ROLLOUT] = TaskKind.ROLLOUT
    task_id: ShortId
    job_id: Hex32
    batch: int = Field(ge=0, le=MAX_INT)
    base: BaseModelRef
    policy: PolicyVersion
    lora: LoraSpec | None
    environments: tuple[EnvSpec, ...] = Field(min_length=1, max_length=64)
    prompts: tuple[PromptRef, ...] = Field(min_length=1, max_length=MAX_PROMPTS)
    slots: tuple[int, ...] = Field(min_length=1, max_length=MAX_PROMPTS)
    group_size: int = Field(ge=1, le=1024)
    sampling: SamplingSpec
    seed: int = Field(ge=0, le=MAX_INT)


class EvaluateTask(Record):
    """Complete held-out prompts: greedily at temperature 0, else drawn as rollouts are.

    Row ``s · samples_per_prompt + g`` of ``seed``'s uniforms draws completion ``g`` of the
    prompt in slot ``s``.
    """

    kind: Literal[TaskKind.EVALUATE] = TaskKind.EVALUATE
    task_id: ShortId
    job_id: Hex32
    base: BaseModelRef
    policy: PolicyVersion
    lora: LoraSpec | None
    environments: tuple[EnvSpec, ...] = Field(min_length=1, max_length=64)
    prompts: tuple[PromptRef, ...] = Field(min_length=1, max_length=MAX_PROMPTS)
    slots: tuple[int, ...] = Field(min_length=1, max_length=MAX_PROMPTS)
    samples_per_prompt: int = Field(ge=1, le=1024)
    temperature: float = Field(ge=0, le=10)
    max_tokens: int = Field(ge=1, le=MAX_INT)
    seed: int = Field(ge=0, le=MAX_INT)


class GradientTask(Record):
    """Differentiate the loss *sum* over one slice of a verified batch.

    ``slice`` is a safetensors blob (`shoal.rl.batch` fixes its arrays).  Sums, not means:
    the orchestrator adds the slices of a batch and divides once.  ``gradient`` says how many
    local steps are taken and how the answer is encoded; ``optimizer`` and ``learning_rate``
    (this update's, of its schedule) are those of the local steps.  ``max_tokens`` is the length
    limit the rows were sampled under, which some losses divide by.
    """

    kind: Literal[TaskKind.GRADIENT] = TaskKind.GRADIENT
    task_id: ShortId
    job_id: Hex32
    batch: int = Field(ge=0, le=MAX_INT)
    base: BaseModelRef
    policy: PolicyVersion
    lora: LoraSpec | None
    loss: LossSpec
    loss_sha256: Sha256
    gradient: GradientSpec
    optimizer: OptimizerSpec
    learning_rate: float = Field(gt=0, le=1)
    temperature: float = Field(gt=0, le=10)
    max_tokens: int = Field(ge=1, le=MAX_INT)
    slice: BlobRef
    num_rows: int = Field(ge=1, le=MAX_INT)
    num_groups: int = Field(ge=1, le=MAX_INT)


Task = Annotated[RolloutTask | GradientTask | EvaluateTask, Field(discriminator="kind")]
