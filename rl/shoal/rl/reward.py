"""Rewards of completions, recomputed by whoever needs to know them."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.protocol.errors import InvalidRequest
from shoal.protocol.task import PromptRef
from shoal.rl.environments import Environment, Split


def score_completions(
    environments: Sequence[Environment],
    prompts: Sequence[PromptRef],
    group_size: int,
    texts: Sequence[str],
    split: Split,
) -> list[float]:
    """The reward of each completion, in order.

    Args:
        environments: The job's environments, in the job's order.
        prompts: One prompt for each group.
        group_size: Completions for each prompt.
        texts: The completions; ``texts[p · group_size + g]`` answers ``prompts[p]``.
        split: Which split the indices are of.

    Raises:
        InvalidRequest: the counts do not match, a prompt does not exist, or a grader failed.
    """
    if len(texts) != len(prompts) * group_size:
        raise InvalidRequest(
            f"{len(prompts)} prompts with {group_size} completions each make "
            f"{len(prompts) * group_size} completions; {len(texts)} were given.",
            code="wrong_completion_count",
        )
    return [
        environment_of(environments, prompt).score(split, prompt.index, text)
        for number, prompt in enumerate(prompts)
        for text in texts[number * group_size : (number + 1) * group_size]
    ]


def environment_of(environments: Sequence[Environment], prompt: PromptRef) -> Environment:
    """The environment ``prompt`` is of.

    Raises:
        InvalidRequest: the job has no environment of that number.
    """
    if prompt.environment >= len(environments):
        raise InvalidRequest(
            f"A prompt names environment {prompt.environment}; the job's environments are "
            f"numbered 0 to {len(environments) - 1}.",
            code="invalid_prompt",
        )
    return environments[prompt.environment]
