"""A tiny untrained base, tasks over it, and honest results, for the learning tests."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from shoal.models.base import describe_base
from shoal.models.policy import Policy
from shoal.models.tiny import build_model, build_tokenizer
from shoal.protocol.job import BudgetSpec, EnvSpec, EvalSpec, JobSpec, SamplingSpec
from shoal.protocol.learning import LoraSpec, OptimizerSpec
from shoal.protocol.policy import PolicyVersion
from shoal.protocol.result import Result
from shoal.protocol.task import EvaluateTask, GradientTask, RolloutTask
from shoal.rl.batch import RolloutPayload, RowLimits
from shoal.rl.environments import Environment, Split, load_environment
from shoal.rl.gradient import Group, make_groups
from shoal.rl.local import blob_of, blob_of_file
from shoal.rl.plan import Plan
from shoal.rl.rollout import encode_prompts, run_rollout

torch.set_num_threads(1)
JOB_ID = "0x" + "a" * 64
TOLERANCE = 1e-4


def make_spec(**changes: object) -> JobSpec:
    fields: dict[str, object] = {
        "name": "test",
        "model": "builtin:tiny-addition",
        "max_steps": 3,
        "batch_size": 16,
        "rollouts_per_example": 4,
        "optimizer": OptimizerSpec(learning_rate=1e-2, warmup_steps=1),
        "lora": LoraSpec(r=4, alpha=8),
        "sampling": SamplingSpec(max_tokens=5),
        "environments": (EnvSpec(id="addition"),),
        "evaluation": EvalSpec(num_examples=8),
        "budget": BudgetSpec(
            max_total_micros=1,
            max_rollout_micros=1,
            max_gradient_micros=1,
            max_evaluate_micros=1,
        ),
    }
    return JobSpec.model_validate({**fields, **changes})


def write_base(folder: Path) -> Path:
    tokenizer = build_tokenizer()
    build_model(0, len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def stir(policy: Policy, seed: int = 1, scale: float = 0.1) -> None:
    """Gives the adapter weights that change the policy, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


@dataclasses.dataclass
class Lab:
    """A policy with a stirred adapter, the plan of a job, and the records around a result."""

    folder: Path
    policy: Policy
    environments: list[Environment]
    plan: Plan

    @classmethod
    def open(cls, folder: Path) -> Lab:
        spec = make_spec()
        policy = Policy.load(folder, spec.lora, seed=0)
        stir(policy)
        environments = [load_environment(env) for env in spec.environments]
        plan = Plan(
            job_id=JOB_ID,
            spec=spec,
            base=describe_base(spec.model, folder, blob_of_file),
            train_sizes=[env.num_tasks(Split.TRAIN) for env in environments],
            eval_sizes=[env.num_tasks(Split.EVAL) for env in environments],
        )
        return cls(folder, policy, environments, plan)

    @cached_property
    def auditor(self) -> Policy:
        """Another policy over the same base: its weights change while ``policy`` is in use."""
        return Policy.load(self.folder, self.plan.spec.lora, seed=0)

    def version(self, number: int = 1) -> PolicyVersion:
        return PolicyVersion(
            job_id=JOB_ID,
            version=number,
            base_sha256=self.plan.base.content_digest(),
            adapter=blob_of(self.policy.adapter_bytes()),
        )

    def result(
        self, task: RolloutTask | GradientTask | EvaluateTask, data: bytes, num_tokens: int
    ) -> Result:
        units = task.num_groups if isinstance(task, GradientTask) else len(task.prompts)
        return Result(
            lease_id="lease_00000000",
            lease_epoch=1,
            task_id=task.task_id,
            task_sha256=task.digest(),
            kind=task.kind,
            policy_sha256=task.policy.policy_sha256(),
            payload=blob_of(data),
            num_units=units,
            num_tokens=num_tokens,
            compute_ms=1,
            engine="transformers",
            dtype="float32",
        )


def spread_rewards(num_rows: int) -> NDArray[np.float32]:
    """Rewards that differ inside every group."""
    return np.array([float(row % 3 == 0) for row in range(num_rows)], dtype=np.float32)


def graded_groups(lab: Lab) -> list[Group]:
    """The groups of a rollout of four prompts, with rewards that differ inside each."""
    task = lab.plan.rollout(0, lab.version(), lab.plan.prompts(0), range(4))
    prompts = encode_prompts(lab.policy, lab.environments, task.prompts, Split.TRAIN)
    limits = RowLimits(num_prompts=4, num_rows=16, max_tokens=5, vocab_size=lab.policy.vocab_size)
    payload = RolloutPayload.decode(run_rollout(lab.policy, task, lab.environments), limits)
    return make_groups(payload, prompts, spread_rewards(16), 4, lab.plan.spec.loss)
