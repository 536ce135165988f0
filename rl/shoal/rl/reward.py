"""Rewards of completions, recomputed by whoever needs to know them."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.protocol.errors import InvalidRequest, ShoalError
from shoal.protocol.task import PromptRef
from shoal.rl.environments import Environment, Split, grader_failed


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
    rewards: list[float] = []
    for number, prompt in enumerate(prompts):
        environment = environment_of(environments, prompt)
        group = texts[number * group_size : (number + 1) * group_size]
        # A grader gives equal answers equal rewards: an audit could not recompute others.
        scores = {
            text: _score(environment, split, prompt.index, text) for text in dict.fromkeys(group)
        }
        rewards += [scores[text] for text in group]
    return rewards


def _score(environment: Environment, split: Split, index: int, text: str) -> float:
    """The reward, which is a number from 0 to 1 whatever the grader does.

    A grader's failure is never a reward of 0: that would teach, and pay for, the wrong thing.
    """
    try:
        reward = environment.score(split, index, text)
    except ShoalError:
        raise
    except Exception as error:
        raise grader_failed(environment, split, index, type(error).__name__) from error
    if not 0.0 <= reward <= 1.0:
        raise grader_failed(environment, split, index, f"the reward {reward!r}")
    return reward


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
