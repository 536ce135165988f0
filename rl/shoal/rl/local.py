"""A whole job in one process: the same tasks, gradients and updates, and nothing else.

What the market adds (auction, network, chain, verification) is measured against this.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
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
from shoal.rl.environments import Environment, Split, load_environment
from shoal.rl.evaluation import run_evaluate
from shoal.rl.gradient import Group, encode_slice, make_groups, run_gradient, slice_groups
from shoal.rl.plan import Plan, sampling_version
from shoal.rl.rollout import encode_prompts, run_rollout

_HASH_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class LocalStep:
    """One update of a local run."""

    update: UpdateStats
    reward: float
    share_zero_spread: float
    wall_s: float


@dataclass(frozen=True, kw_only=True)
class LocalRun:
    """A finished local run; rewards are held-out and greedy.

    ``wall_s`` and ``cpu_s`` cover updates and evaluations, at the versions at which the
    market's job has them.
    """

    reward_before: float
    reward_after: float
    steps: tuple[LocalStep, ...]
    wall_s: float
    cpu_s: float
    adapter: bytes


def train_locally(
    spec: JobSpec, folder: Path, on_step: Callable[[LocalStep], None] | None = None
) -> LocalRun:
    """Trains ``spec`` from the base in ``folder`` to its last version."""
    return _LocalJob(spec, folder).run(on_step)


class _LocalJob:
    def __init__(self, spec: JobSpec, folder: Path) -> None:
        self.spec = spec
        self.policy = Policy.load(folder, spec.lora, seed=spec.seed)
        self.environments: list[Environment] = [load_environment(e) for e in spec.environments]
        self.plan = Plan(
            job_id="0x" + spec.digest(),
            spec=spec,
            base=describe_base(spec.model, folder, blob_of_file),
            train_sizes=[env.num_tasks(Split.TRAIN) for env in self.environments],
            eval_sizes=[env.num_tasks(Split.EVAL) for env in self.environments],
        )
        self.optimizer = AdapterOptimizer(self.policy, spec.optimizer, spec.max_steps)
        self.adapters = [self.policy.adapter_bytes()]

    def run(self, on_step: Callable[[LocalStep], None] | None) -> LocalRun:
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        spec, steps = self.spec, []
        evaluations = {0: self.evaluate()}
        for batch in range(spec.max_steps):
            steps.append(self.step(batch))
            if on_step:
                on_step(steps[-1])
            version = batch + 1
            if version % spec.evaluation.interval == 0 or version == spec.max_steps:
                evaluations[version] = self.evaluate()
        return LocalRun(
            reward_before=evaluations[0],
            reward_after=evaluations[spec.max_steps],
            steps=tuple(steps),
            wall_s=time.perf_counter() - wall_s,
            cpu_s=time.process_time() - cpu_s,
            adapter=self.adapters[-1],
        )

    def step(self, batch: int) -> LocalStep:
        started_s = time.perf_counter()
        groups, reward = self.sample(batch)
        gradients = self.differentiate(batch, groups)
        self.policy.load_adapter(self.adapters[batch])
        update = self.optimizer.apply(gradients, sum(group.num_tokens for group in groups))
        self.adapters.append(self.policy.adapter_bytes())
        return LocalStep(
            update=update,
            reward=reward,
            share_zero_spread=1.0 - sum(g.teaches for g in groups) / len(groups),
            wall_s=time.perf_counter() - started_s,
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

    def differentiate(self, batch: int, groups: Sequence[Group]) -> list[GradientPayload]:
        version = self.version(batch)
        payloads = []
        for part in slice_groups(groups, 1):
            rows = encode_slice(part)
            data = rows.encode()
            task = self.plan.gradient(
                batch, version, blob_of(data), num_rows=rows.num_rows, num_groups=len(part)
            )
            payloads.append(
                GradientPayload.decode(run_gradient(self.policy, task, data), self.policy.shapes())
            )
        return payloads

    def evaluate(self) -> float:
        """Held-out greedy reward of the newest version."""
        version = self.version(len(self.adapters) - 1)
        prompts = self.plan.held_out()
        task = self.plan.evaluation(version, prompts, range(len(prompts)))
        limits = RowLimits(
            num_prompts=len(task.prompts),
            num_rows=len(task.prompts),
            max_tokens=task.max_tokens,
            vocab_size=self.policy.vocab_size,
        )
        data = run_evaluate(self.policy, task, self.environments)
        return float(np.mean(EvaluatePayload.decode(data, limits).rewards))

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
