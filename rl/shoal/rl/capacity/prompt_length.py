"""How long a job's prompts are, read from its environments without a tokenizer."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from shoal.protocol.job import JobSpec
from shoal.rl.environments import Split, load_environment

CHARACTERS_PER_TOKEN = 4.0
"""Of English text with a vocabulary of some hundred thousand: a rule of thumb."""
_PROMPTS_READ = 64
_WORD = re.compile(r"[A-Za-z]{2}")


@dataclass(frozen=True, kw_only=True)
class PromptLength:
    """Tokens of a prompt: the mean by the environments' weights, and the longest."""

    mean: float
    longest: int


def prompt_length(spec: JobSpec) -> PromptLength:
    """How long the prompts of ``spec`` are, from the first few of each environment.

    Raises:
        InvalidRequest: an environment is not known or refuses its arguments.
    """
    weight = sum(env.weight for env in spec.environments)
    mean, longest = 0.0, 1
    for env in spec.environments:
        environment = load_environment(env)
        count = min(environment.num_tasks(Split.TRAIN), _PROMPTS_READ)
        prompts = [environment.prompt(Split.TRAIN, index) for index in range(count)]
        builtin = spec.model.startswith("builtin:")
        lengths = _builtin_lengths(prompts) if builtin else [_estimate(text) for text in prompts]
        mean += env.weight / weight * sum(lengths) / count
        longest = max(longest, *lengths)
    return PromptLength(mean=mean, longest=longest)


def _builtin_lengths(prompts: Sequence[str]) -> list[int]:
    """Single characters, but words that all prompts begin or end with are one token."""
    start = _shared_start(prompts).rstrip(string.digits + "-")
    end = _shared_start([prompt[len(start) :][::-1] for prompt in prompts])
    saved = sum(len(piece) - 1 for piece in (start, end) if _WORD.search(piece))
    return [len(prompt) - saved for prompt in prompts]


def _shared_start(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return "".join(character for character, _ in shared)


def _estimate(text: str) -> int:
    return max(1, round(len(text) / CHARACTERS_PER_TOKEN))
