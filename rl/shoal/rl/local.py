"""A whole job in one process: the same tasks, gradients and updates, and nothing else.

What the market adds (auction, network, chain, verification) is measured against this.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shoal.models.base import describe_base
from shoal.models.policy import Policy
from shoal.protocol.blob import BlobRef
from shoal.protocol.canonical import sha256_hex
from shoal.protocol.job import JobSpec
from shoal.protocol.policy import PolicyVersion
from shoal.rl.aggregation import AdapterOptimizer, UpdateStats
from shoal.rl.batch import EvaluatePayload, GradientPayload, RolloutPayload, RowLimits
from shoal.rl.confidence import HeldOutScore, score_held_out
from shoal.rl.environments import Environment, Split, load_environment
from shoal.rl.evaluation import run_evaluate
from shoal.rl.gradient import (
    Group,
    batch_divisor,
    encode_slice,
    make_groups,
    run_gradient,
    slice_groups,
)
from shoal.rl.plan import Plan, sampling_version
from shoal.rl.rollout import encode_prompts, run_rollout

_HASH_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """What one update took: CPU seconds by part, tokens, and bytes all contributors sent.

    ``gradient_tokens`` are those of rows with a gradient.
    """

    rollout_cpu_s: float
    gradient_cpu_s: float
    update_cpu_s: float
    rollout_tokens: int
    gradient_tokens: int
    upload_bytes: int


@dataclass(frozen=True, kw_only=True)
class LocalStep:
    """One update of a local run."""

    update: UpdateStats
    reward: float
    share_zero_spread: float
    wall_s: float
    cost: StepCost


@dataclass(frozen=True, kw_only=True)
class LocalRun:
    """A finished local run; rewards are held-out, ``evaluations`` by policy version.

    ``scores`` are the same evaluations with their intervals.

    ``wall_s`` and ``cpu_s`` cover updates and evaluations, at the versions at which the
    market's job has them.
    """

    reward_before: float
    reward_after: float
    evaluations: Mapping[int, float]
    scores: Mapping[int, HeldOutScore]
    steps: tuple[LocalStep, ...]
    wall_s: float
    cpu_s: float
    adapter: bytes


def train_locally(
    spec: JobSpec,
    folder: Path,
    on_step: Callable[[LocalStep], None] | None = None,
    *,
    contributors: int = 1,
) -> LocalRun:
    """Trains ``spec`` from the base in ``folder`` to its last version.

    Each batch is cut into one slice for each of the ``contributors``, who keep their own
    residuals of error feedback.
    """
    return _LocalJob(spec, folder, contributors).run(on_step)


class _LocalJob:
    def __init__(self, spec: JobSpec, folder: Path, contributors: int) -> None:
        self.spec = spec
        self.residuals: list[bytes | None] = [None] * contributors
        self.policy = Policy.load(folder, spec.lora, seed=spec.seed)
        self.environments: list[Environment] = [load_environment(e) for e in spec.environments]
        self.plan = Plan(
            job_id="0x" + spec.digest(),
            spec=spec,
            base=describe_base(spec.model, folder, blob_of_file),
            train_sizes=[env.num_tasks(Split.TRAIN) for env in self.environments],
            eval_sizes=[env.num_tasks(Split.EVAL) for env in self.environments],
        )
        self.optimizer = AdapterOptimizer(
            self.policy, spec.optimizer, spec.max_steps, spec.gradient
        )
        self.adapters = [self.policy.adapter_bytes()]

    def run(self, on_step: Callable[[LocalStep], None] | None) -> LocalRun:
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        spec, steps = self.spec, []
        scores = {0: self.evaluate()}
        for batch in range(spec.max_steps):
            steps.append(self.step(batch))
            if on_step:
                on_step(steps[-1])
            version = batch + 1
            if version % spec.evaluation.interval == 0 or version == spec.max_steps:
                scores[version] = self.evaluate()
        return LocalRun(
            reward_before=scores[0].average.value,
            reward_after=scores[spec.max_steps].average.value,
            evaluations={version: score.average.value for version, score in scores.items()},
            scores=scores,
            steps=tuple(steps),
            wall_s=time.perf_counter() - wall_s,
            cpu_s=time.process_time() - cpu_s,
            adapter=self.adapters[-1],
        )

    def step(self, batch: int) -> LocalStep:
        started_s = time.perf_counter()
        cpu_s = [time.process_time()]
        groups, reward = self.sample(batch)
        cpu_s.append(time.process_time())
        gradients, upload_bytes = self.differentiate(batch, groups)
        cpu_s.append(time.process_time())
        self.policy.load_adapter(self.adapters[batch])
        divisor = batch_divisor(groups, self.spec.loss, self.spec.sampling.max_tokens)
        update = self.optimizer.apply(gradients, divisor)
        self.adapters.append(self.policy.adapter_bytes())
        cpu_s.append(time.process_time())
        return LocalStep(
            update=update,
            reward=reward,
            share_zero_spread=1.0 - sum(g.teaches for g in groups) / len(groups),
            wall_s=time.perf_counter() - started_s,
            cost=StepCost(
                rollout_cpu_s=cpu_s[1] - cpu_s[0],
                gradient_cpu_s=cpu_s[2] - cpu_s[1],
                update_cpu_s=cpu_s[3] - cpu_s[2],
                rollout_tokens=sum(group.num_tokens for group in groups),
                gradient_tokens=sum(group.num_teaching_tokens for group in groups),
                upload_bytes=upload_bytes,
            ),
        )

    def sample(self, batch: int) -> tuple[list[Group], float]:
        """The batch's groups, and its mean reward."""
        version = self.version(sampling_version(batch, self.spec.max_staleness))
        task = self.plan.rollout(
            batch, version, self.plan.prompts(batch), range(self.spec.groups_per_batch)
        )
        prompts = encode_prompts(self.policy, self.environments, task.prompts, Split.TRAIN)
        payload = RolloutPayload.decode(
            run_rollout(self.policy, task, self.environments),
            RowLimits(
                num_prompts=len(task.prompts),
                num_rows=len(task.prompts) * task.group_size,
                max_tokens=task.sampling.max_tokens,
                vocab_size=self.policy.vocab_size,
            ),
        )
        groups = make_groups(payload, prompts, payload.rewards, task.group_size, self.spec.loss)
        return groups, float(np.mean(payload.rewards))

    def differentiate(
        self, batch: int, groups: Sequence[Group]
    ) -> tuple[list[GradientPayload], int]:
        """The contributors' gradients, and the bytes they take on the way."""
        version = self.version(batch)
        payloads, size_bytes = [], 0
        for contributor, part in enumerate(slice_groups(groups, len(self.residuals))):
            rows = encode_slice(part)
            data = rows.encode()
            task = self.plan.gradient(
                batch, version, blob_of(data), num_rows=rows.num_rows, num_groups=len(part)
            )
            output = run_gradient(self.policy, task, data, residual=self.residuals[contributor])
            self.residuals[contributor] = output.residual
            size_bytes += len(output.payload)
            payloads.append(
                GradientPayload.decode(
                    output.payload, self.policy.shapes(), self.spec.gradient.codec
                )
            )
        return payloads, size_bytes

    def evaluate(self) -> HeldOutScore:
        """Held-out avg@k of the newest version."""
        version = self.version(len(self.adapters) - 1)
        prompts = self.plan.held_out()
        task = self.plan.evaluation(version, prompts, range(len(prompts)))
        limits = RowLimits(
            num_prompts=len(task.prompts),
            num_rows=len(task.prompts) * task.samples_per_prompt,
            max_tokens=task.max_tokens,
            vocab_size=self.policy.vocab_size,
        )
        data = run_evaluate(self.policy, task, self.environments)
        rewards = EvaluatePayload.decode(data, limits).rewards
        return score_held_out(rewards.reshape(len(task.prompts), -1).tolist())

    def version(self, number: int) -> PolicyVersion:
        """Version ``number``, loaded into the policy."""
        self.policy.load_adapter(self.adapters[number])
        return PolicyVersion(
            job_id=self.plan.job_id,
            version=number,
            base_sha256=self.plan.base.content_digest(),
            adapter=blob_of(self.adapters[number]),
        )


def blob_of(data: bytes) -> BlobRef:
    """The reference to ``data``, which stays where it is."""
    return BlobRef(sha256=sha256_hex(data), size_bytes=len(data))


def blob_of_file(path: Path) -> BlobRef:
    """The reference to a file that stays where it is."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return BlobRef(sha256=digest.hexdigest(), size_bytes=path.stat().st_size)
