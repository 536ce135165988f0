"""Evaluation: complete held-out prompts greedily."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shoal.models.engine import OnProgress
from shoal.models.policy import Policy
from shoal.protocol.task import EvaluateTask
from shoal.rl.batch import EvaluatePayload, prompt_sha256
from shoal.rl.environments import Environment, Split
from shoal.rl.reward import score_completions
from shoal.rl.rollout import decode_completions, encode_prompts, require_version


def run_evaluate(
    policy: Policy,
    task: EvaluateTask,
    environments: Sequence[Environment],
    on_progress: OnProgress | None = None,
) -> bytes:
    """The encoded `EvaluatePayload` of ``task``: the most likely token at each position.

    Raises:
        InvalidRequest: ``policy`` does not hold the task's adapter, or a prompt does not fit.
    """
    require_version(policy, task.policy)
    prompts = encode_prompts(policy, environments, task.prompts, Split.EVAL)
    drawn = policy.engine.generate(
        prompts,
        max_tokens=task.max_tokens,
        temperature=1.0,
        uniforms_bt=None,
        on_progress=on_progress,
    )
    texts = decode_completions(policy, drawn.token_ids)
    rewards = score_completions(environments, task.prompts, 1, texts, Split.EVAL)
    return EvaluatePayload(
        prompts_sha256=tuple(prompt_sha256(prompt) for prompt in prompts),
        token_ids=tuple(drawn.token_ids),
        finished=drawn.finished,
        rewards=np.array(rewards, dtype=np.float32),
    ).encode()
