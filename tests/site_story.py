"""Tasks to share among parts, what they need, and how two payloads compare."""

from __future__ import annotations

from typing import Any

import numpy as np
import safetensors.numpy
from learning_fixtures import Lab, spread_rewards
from numpy.typing import NDArray

from shoal.protocol.learning import GradientSpec
from shoal.protocol.task import EvaluateTask, GradientTask, RolloutTask
from shoal.rl.batch import RolloutPayload, RowLimits
from shoal.rl.environments import Split
from shoal.rl.gradient import encode_slice, make_groups
from shoal.rl.local import blob_of
from shoal.rl.rollout import encode_prompts, run_rollout
from shoal.worker.ports import TaskInput

MAX_LOGPROB_ERROR = 1e-5
MAX_GRADIENT_ERROR = 2e-6
"""Of the largest value: what adding fp32 numbers in another order leaves."""


def rollout_task(lab: Lab) -> RolloutTask:
    prompts = lab.plan.prompts(0)
    return lab.plan.rollout(0, lab.version(), prompts, range(len(prompts)))


def evaluate_task(lab: Lab, temperature: float) -> EvaluateTask:
    prompts = lab.plan.held_out()
    task = lab.plan.evaluation(lab.version(), prompts, range(len(prompts)))
    return task.model_copy(update={"temperature": temperature, "samples_per_prompt": 2})


def gradient_task(lab: Lab, spec: GradientSpec) -> tuple[GradientTask, bytes]:
    """A gradient over rollouts of the lab's own, and its slice."""
    task = rollout_task(lab)
    num_prompts, num_rows = len(task.prompts), len(task.prompts) * task.group_size
    payload = RolloutPayload.decode(
        run_rollout(lab.policy, task, lab.environments),
        RowLimits(
            num_prompts=num_prompts,
            num_rows=num_rows,
            max_tokens=task.sampling.max_tokens,
            vocab_size=lab.policy.vocab_size,
        ),
    )
    prompts = encode_prompts(lab.policy, lab.environments, task.prompts, Split.TRAIN)
    groups = make_groups(
        payload, prompts, spread_rewards(num_rows), task.group_size, lab.plan.spec.loss
    )
    data = encode_slice(groups).encode()
    gradient = lab.plan.gradient(
        0, lab.version(), blob_of(data), num_rows=num_rows, num_groups=num_prompts
    )
    return gradient.model_copy(update={"gradient": spec}), data


def inputs_of(lab: Lab, data: bytes | None = None, residual: bytes | None = None) -> TaskInput:
    return TaskInput(
        base_folder=lab.folder,
        base_sha256=lab.plan.base.content_digest(),
        adapter=lab.policy.adapter_bytes(),
        batch_slice=data,
        residual=residual,
    )


def assert_same_rows(one: bytes, other: bytes) -> None:
    """Both hold the same draws, with log-probabilities equal within rounding."""
    ours, theirs = safetensors.numpy.load(one), safetensors.numpy.load(other)
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {"logprobs"}:
        assert np.array_equal(ours[name], theirs[name]), name
    if "logprobs" in ours:
        assert np.abs(ours["logprobs"] - theirs["logprobs"]).max() <= MAX_LOGPROB_ERROR


def assert_same_gradient(one: bytes, other: bytes) -> None:
    """Both are fp32 gradients equal within rounding, over the same tokens."""
    ours, theirs = safetensors.numpy.load(one), safetensors.numpy.load(other)
    assert ours.keys() == theirs.keys()
    assert relative(ours["gradient.values"], theirs["gradient.values"]) <= MAX_GRADIENT_ERROR
    np.testing.assert_allclose(ours["stats"], theirs["stats"], rtol=1e-4, atol=1e-4)


def relative(one: NDArray[Any], other: NDArray[Any]) -> float:
    """The largest difference over the largest value."""
    return float(np.abs(one - other).max() / np.abs(other).max())
