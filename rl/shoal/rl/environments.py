"""Environments: where prompts come from and how completions are scored.

Every party to a job loads the same environment from the same `EnvSpec` and gets the same
prompts and scores; ``digest`` says so in one word.  Indices name prompts, so a task never
carries text that its holder could change.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Protocol

from shoal.protocol.errors import InvalidRequest
from shoal.protocol.ids import Digest
from shoal.protocol.job import EnvSpec


class Split(StrEnum):
    """Which half of an environment a prompt is from; no question is in both."""

    TRAIN = "train"
    EVAL = "eval"


class Environment(Protocol):
    """Prompts by index, and the reward of a completion.

    Implementations are pure: the same split, index and completion give the same answer in
    every process.
    """

    @property
    def id(self) -> str:
        """The name a job file gives this environment."""
        ...

    def digest(self) -> Digest:
        """Digest of all that determines the prompts and the scores."""
        ...

    def num_tasks(self, split: Split) -> int:
        """How many prompts ``split`` has."""
        ...

    def prompt(self, split: Split, index: int) -> str:
        """The text of prompt ``index``; it goes to the tokenizer as it is."""
        ...

    def answer(self, split: Split, index: int) -> str:
        """A completion that scores 1."""
        ...

    def score(self, split: Split, index: int, completion: str) -> float:
        """The reward of ``completion``, in [0, 1].

        Raises:
            InvalidRequest: the grader failed; a failure is never a reward of 0.
        """
        ...


def load_environment(spec: EnvSpec) -> Environment:
    """The environment ``spec`` names, ready to use.

    Raises:
        InvalidRequest: no environment has this id, or an argument does not fit it.
    """
    family, _, variant = spec.id.partition(":")
    if family == "reasoning_gym" and variant:
        # Imported on use: reasoning-gym takes about a second to import.
        from shoal.rl.reasoning_gym_env import ReasoningGym

        return ReasoningGym.load(spec, variant)
    loader = _BUILTIN.get(spec.id)
    if loader is None:
        raise unknown_environment(spec.id, [*_BUILTIN, "reasoning_gym:chain_sum"])
    return loader(spec)


def metric_names(specs: Sequence[EnvSpec]) -> tuple[str, ...]:
    """What metrics call each environment of a job: its id, numbered where several share it."""
    shared = {env_id for env_id, count in Counter(spec.id for spec in specs).items() if count > 1}
    return tuple(
        f"{spec.id}#{number}" if spec.id in shared else spec.id for number, spec in enumerate(specs)
    )


def unknown_environment(env_id: str, known: list[str]) -> InvalidRequest:
    """The error for an id nobody has, naming the nearest one somebody has."""
    nearest = difflib.get_close_matches(env_id, known, n=1, cutoff=0.0)
    return InvalidRequest(
        f"There is no environment {env_id!r}; the nearest name is {nearest[0]!r}.",
        code="unknown_environment",
        environment=env_id,
    )


def unknown_argument(env_id: str, name: str, known: list[str]) -> InvalidRequest:
    """The error for an argument the environment does not take."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    hint = f"the nearest name is {nearest[0]!r}" if nearest else "it takes none"
    return InvalidRequest(
        f"Environment {env_id!r} takes no argument {name!r}; {hint}.",
        code="invalid_environment_argument",
        environment=env_id,
        argument=name,
    )


def bad_argument(env_id: str, name: str, value: object, wanted: str) -> InvalidRequest:
    """The error for an argument whose value does not fit."""
    return InvalidRequest(
        f"Argument {name!r} of environment {env_id!r} is {value!r}; give {wanted}.",
        code="invalid_environment_argument",
        environment=env_id,
        argument=name,
    )


def grader_failed(env: Environment, split: Split, index: int, what: str) -> InvalidRequest:
    """The error for a grader that came to no reward; ``what`` it gave instead."""
    return InvalidRequest(
        f"The grader of {env.id!r} failed on a completion of {split.value} prompt {index} with "
        f"{what}; use another environment.",
        code="grader_failed",
        environment=env.id,
        index=index,
    )


def check_index(env: Environment, split: Split, index: int) -> None:
    """Passes only for an index that ``split`` of ``env`` has.

    Raises:
        InvalidRequest: the index is outside the split.
    """
    size = env.num_tasks(split)
    if not 0 <= index < size:
        raise InvalidRequest(
            f"Environment {env.id!r} has no {split.value} prompt {index}; "
            f"its indices go from 0 to {size - 1}.",
            code="invalid_prompt_index",
            environment=env.id,
            index=index,
        )


def _load_addition(spec: EnvSpec) -> Environment:
    from shoal.rl.addition import Addition

    return Addition.load(spec)


_BUILTIN: dict[str, Callable[[EnvSpec], Environment]] = {"addition": _load_addition}
