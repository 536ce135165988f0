"""Evaluation: complete held-out prompts, greedily or by seeded draws."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shoal.models.engine import OnProgress
from shoal.models.policy import Policy
from shoal.models.sampling import SeededUniforms, completion_numbers
from shoal.protocol.task import EvaluateTask
from shoal.rl.batch import EvaluatePayload, prompt_sha256
from shoal.rl.environments import Environment, Split
from shoal.rl.reward import score_completions
from shoal.rl.rollout import decode_completions, encode_prompts, require_room, require_version


def run_evaluate(
    policy: Policy,
    task: EvaluateTask,
    environments: Sequence[Environment],
    on_progress: OnProgress | None = None,
) -> bytes:
    """The encoded `EvaluatePayload` of ``task``: ``samples_per_prompt`` rows for each prompt.

    Raises:
        InvalidRequest: ``policy`` does not hold the task's adapter, a prompt does not fit, or
            a grader failed.
    """
    require_version(policy, task.policy)
    prompts = encode_prompts(policy, environments, task.prompts, Split.EVAL)
    require_room(policy, environments, task.prompts, prompts, Split.EVAL, task.max_tokens)
    drawn = policy.engine.generate(
        [prompt for prompt in prompts for _ in range(task.samples_per_prompt)],
        max_tokens=task.max_tokens,
        temperature=sampling_temperature(task),
        uniforms_bt=evaluation_uniforms(task),
        on_progress=on_progress,
    )
    texts = decode_completions(policy, drawn.token_ids)
    rewards = score_completions(
        environments, task.prompts, task.samples_per_prompt, texts, Split.EVAL
    )
    return EvaluatePayload(
        prompts_sha256=tuple(prompt_sha256(prompt) for prompt in prompts),
        token_ids=tuple(drawn.token_ids),
        finished=drawn.finished,
        rewards=np.array(rewards, dtype=np.float32),
    ).encode()


def sampling_temperature(task: EvaluateTask) -> float:
    """What logits are divided by; greedy choice does not depend on it."""
    return task.temperature or 1.0


def evaluation_uniforms(task: EvaluateTask) -> SeededUniforms | None:
    """The uniforms that select the task's tokens; None where the most likely one is taken."""
    if task.temperature == 0:
        return None
    completions = completion_numbers(task.slots, task.samples_per_prompt)
    return SeededUniforms(task.seed, completions, task.max_tokens)
