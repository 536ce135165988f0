"""Rollouts: sample a group of completions for each prompt of a task."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shoal.models.engine import OnProgress
from shoal.models.policy import Policy
from shoal.models.sampling import SeededUniforms, completion_numbers
from shoal.protocol.errors import InvalidRequest
from shoal.protocol.policy import PolicyVersion
from shoal.protocol.task import PromptRef, RolloutTask
from shoal.rl.batch import Ints, RolloutPayload, prompt_sha256
from shoal.rl.environments import Environment, Split
from shoal.rl.reward import environment_of, score_completions

Prompts = list[list[int]]


def run_rollout(
    policy: Policy,
    task: RolloutTask,
    environments: Sequence[Environment],
    on_progress: OnProgress | None = None,
) -> bytes:
    """The encoded `RolloutPayload` of ``task``, sampled from ``policy``.

    Raises:
        InvalidRequest: ``policy`` does not hold the task's adapter, or a prompt does not fit.
    """
    require_version(policy, task.policy)
    prompts = encode_prompts(policy, environments, task.prompts, Split.TRAIN)
    max_tokens = task.sampling.max_tokens
    require_room(policy, environments, task.prompts, prompts, Split.TRAIN, max_tokens)
    rows = [prompt for prompt in prompts for _ in range(task.group_size)]
    drawn = policy.engine.generate(
        rows,
        max_tokens=task.sampling.max_tokens,
        temperature=task.sampling.temperature,
        uniforms_bt=SeededUniforms(
            task.seed, completion_numbers(task.slots, task.group_size), task.sampling.max_tokens
        ),
        on_progress=on_progress,
    )
    texts = decode_completions(policy, drawn.token_ids)
    rewards = score_completions(environments, task.prompts, task.group_size, texts, Split.TRAIN)
    return RolloutPayload(
        prompts_sha256=tuple(prompt_sha256(prompt) for prompt in prompts),
        token_ids=tuple(drawn.token_ids),
        logprobs=tuple(drawn.logprobs),
        finished=drawn.finished,
        rewards=np.array(rewards, dtype=np.float32),
    ).encode()


def encode_prompts(
    policy: Policy,
    environments: Sequence[Environment],
    prompts: Sequence[PromptRef],
    split: Split,
) -> Prompts:
    """The tokens of each prompt, from the environment's text.

    Raises:
        InvalidRequest: code ``empty_prompt`` when a prompt has no text; what the environment
            raises.
    """
    texts = [environment_of(environments, ref).prompt(split, ref.index) for ref in prompts]
    for ref, text in zip(prompts, texts, strict=True):
        if not text:
            raise InvalidRequest(
                f"{_name(environments, ref, split)} is empty; every prompt needs some text.",
                code="empty_prompt",
                index=ref.index,
            )
    return policy.encode_prompts(texts)


def require_room(
    policy: Policy,
    environments: Sequence[Environment],
    prompts: Sequence[PromptRef],
    rows: Prompts,
    split: Split,
    max_tokens: int,
) -> None:
    """Passes only if each prompt leaves room for ``max_tokens`` in the model's context.

    Raises:
        InvalidRequest: code ``context_exceeded``, naming environment, prompt and limit.
    """
    limit = getattr(policy.model.config, "max_position_embeddings", None)
    for ref, row in zip(prompts, rows, strict=True):
        if limit is not None and len(row) + max_tokens > limit:
            raise InvalidRequest(
                f"{_name(environments, ref, split)} has {len(row)} tokens, which with max_tokens "
                f"{max_tokens} exceeds the model's context of {limit}; lower sampling.max_tokens, "
                "make the environment's prompts shorter or take a base with a longer context.",
                code="context_exceeded",
                index=ref.index,
                limit=int(limit),
            )


def _name(environments: Sequence[Environment], ref: PromptRef, split: Split) -> str:
    environment = environment_of(environments, ref)
    return f"The {split.value} prompt {ref.index} of environment {environment.id!r}"


def decode_completions(policy: Policy, rows: Sequence[Ints]) -> list[str]:
    """The text each completion is scored on; equal completions are decoded once."""
    texts: dict[bytes, str] = {}
    for row in rows:
        key = row.tobytes()
        if key not in texts:
            texts[key] = policy.decode_completion(row.tolist())
    return [texts[row.tobytes()] for row in rows]


def require_version(policy: Policy, version: PolicyVersion) -> None:
    """Passes only if ``policy`` holds the adapter ``version`` names.

    Raises:
        InvalidRequest: it holds another; load the version's adapter first.
    """
    held = policy.adapter_sha256()
    if held != version.adapter.sha256:
        raise InvalidRequest(
            f"The policy holds adapter {held[:12]} where version {version.version} is "
            f"{version.adapter.sha256[:12]}; load that adapter first.",
            code="wrong_policy",
            policy_version=version.version,
        )
