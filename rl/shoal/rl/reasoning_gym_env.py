"""Environments from reasoning-gym: procedural tasks with exact graders, made offline.

An item is a pure function of dataset, configuration, seed and index.  Which split an item
belongs to is decided by its question, so no held-out question can be trained on, however
few different questions a configuration has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import sys
import zlib
from functools import lru_cache
from importlib.metadata import version
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError
from reasoning_gym.factory import DATASETS

from shoal.protocol.canonical import digest_of
from shoal.protocol.errors import InvalidRequest
from shoal.protocol.ids import Digest
from shoal.protocol.job import EnvSpec
from shoal.rl.environments import (
    Split,
    bad_argument,
    check_index,
    grader_failed,
    unknown_argument,
)

_RULE_VERSION = 1
_NUM_TASKS = 1 << 20
_MAX_ATTEMPTS = 256
"""Candidates tried for one index; a split of one in ten is missed by all of them with
probability 0.9²⁵⁶ ≈ 2e-12 where questions are plentiful."""
_HELD_OUT_ONE_IN = 10
_FULL_MARKS = 0.99
"""Graders give part of the credit to an answer with junk around it (the gold and one
character more scores up to 0.97), which a policy learns to exploit; only this counts."""
_MAX_COMPLETION_CHARS = 65_536
_MAX_SEED = 1 << 31
_MAX_INT = 10_000
_CACHED_ITEMS = 4_096

_EVALUATES = "its grader runs the completion as Python, so a stranger's text would run as code"
_IMPURE = "it makes different items in different processes, so nobody could check a reward"
_FRAGILE = "its grader fails on text it does not expect, which any sampled completion may be"
_EAGER = "it makes all of its items before the first"
_REFUSED: dict[str, str] = {
    "binary_matrix": _EVALUATES,
    "countdown": _EVALUATES,
    "intermediate_integration": _EVALUATES,
    "n_queens": _EVALUATES,
    "polynomial_multiplication": _EVALUATES,
    "puzzle24": _EVALUATES,
    "simple_integration": _EVALUATES,
    "spiral_matrix": _EVALUATES,
    "string_insertion": _EVALUATES,
    "isomorphic_strings": _IMPURE,
    "knight_swap": _IMPURE,
    "list_functions": _IMPURE,
    "ransom_note": _IMPURE,
    "boxnet": _FRAGILE,
    "coin_flip": _FRAGILE,
    "game_of_life": _FRAGILE,
    "prime_factorization": _FRAGILE,
    "acre": _EAGER,
    "gsm_symbolic": _EAGER,
    "word_ladder": _EAGER,
    "composite": "its configuration is nested, which a job file cannot hold; name its parts as "
    "environments of their own",
}


class ReasoningGym:
    """One dataset of reasoning-gym under one configuration.

    Args:
        env_id: ``reasoning_gym:<dataset>``.
        config: The dataset's configuration object, with its seed set.
    """

    def __init__(self, env_id: str, config: Any) -> None:
        self._id = env_id
        self._config = config
        self._dataset = DATASETS[env_id.partition(":")[2]][0](config=config)
        self._item = lru_cache(maxsize=_CACHED_ITEMS)(self._find_item)

    @classmethod
    def load(cls, spec: EnvSpec, dataset: str) -> ReasoningGym:
        """The environment ``spec`` names.

        Raises:
            InvalidRequest: the dataset is unknown or refused, or an argument does not fit.
        """
        if dataset not in DATASETS:
            nearest = difflib.get_close_matches(dataset, available(), n=1, cutoff=0.0)[0]
            raise InvalidRequest(
                f"reasoning-gym {version('reasoning_gym')} has no dataset {dataset!r}; "
                f"the nearest name is {nearest!r}.",
                code="unknown_environment",
                environment=spec.id,
            )
        if dataset in _REFUSED:
            raise InvalidRequest(
                f"The dataset {dataset!r} of reasoning-gym cannot be used: {_REFUSED[dataset]}.",
                code="refused_environment",
                environment=spec.id,
            )
        return cls(spec.id, _configure(spec, DATASETS[dataset][1]))

    @property
    def id(self) -> str:
        """The name a job file gives this environment."""
        return self._id

    def digest(self) -> Digest:
        """Digest of the dataset, reasoning-gym's version, every setting and the split rule."""
        return digest_of(
            {
                "environment": self._id,
                "rule": _RULE_VERSION,
                "reasoning_gym": version("reasoning_gym"),
                "config": repr(self._config),
            }
        )

    def num_tasks(self, split: Split) -> int:
        """How many indices ``split`` has; where questions are few, several indices share one."""
        return _NUM_TASKS

    def prompt(self, split: Split, index: int) -> str:
        """The item's question."""
        return str(self._item(split, index)["question"])

    def answer(self, split: Split, index: int) -> str:
        """The item's own answer.

        Raises:
            InvalidRequest: the dataset accepts many answers and names none.
        """
        answer = self._item(split, index)["answer"]
        if not isinstance(answer, str):
            raise InvalidRequest(
                f"Environment {self._id!r} accepts many answers and names none; "
                "use it without a warm start.",
                code="no_gold_answer",
                environment=self._id,
            )
        return answer

    def score(self, split: Split, index: int, completion: str) -> float:
        """1 where the dataset's grader gives full marks, else 0.

        Raises:
            InvalidRequest: the grader failed.
        """
        item = self._item(split, index)
        if len(completion) > _MAX_COMPLETION_CHARS:
            return 0.0
        try:
            with contextlib.redirect_stdout(sys.stderr):
                marks = float(self._dataset.score_answer(completion.strip(), item))
        except Exception as error:
            raise grader_failed(self, split, index, type(error).__name__) from error
        if math.isnan(marks):
            raise grader_failed(self, split, index, "no number")
        return float(marks >= _FULL_MARKS)

    def _find_item(self, split: Split, index: int) -> dict[str, Any]:
        """The first candidate for ``index`` whose question is in ``split``.

        Attempts are a stride apart, so different indices never share a candidate.
        """
        check_index(self, split, index)
        for attempt in range(_MAX_ATTEMPTS):
            # Some datasets print while they work; standard output belongs to the command.
            with contextlib.redirect_stdout(sys.stderr):
                item: dict[str, Any] = self._dataset[index + attempt * _NUM_TASKS]
            if is_held_out(str(item["question"])) is (split is Split.EVAL):
                return item
        raise InvalidRequest(
            f"Environment {self._id!r} with these arguments has too few different questions to "
            f"have any in its {split.value} split; widen its arguments.",
            code="too_few_questions",
            environment=self._id,
        )


def is_held_out(question: str) -> bool:
    """Whether the question belongs to the evaluation split."""
    return zlib.crc32(question.encode()) % _HELD_OUT_ONE_IN == 0


def available() -> list[str]:
    """The datasets that can be used, in alphabetical order."""
    return sorted(set(DATASETS) - set(_REFUSED))


def _configure(spec: EnvSpec, config_cls: Any) -> Any:
    """The dataset's configuration from the spec's arguments, each checked by its own type."""
    hints = get_type_hints(config_cls)
    names = sorted({field.name for field in dataclasses.fields(config_cls)} - {"size"})
    for name, value in spec.args.items():
        if name not in names:
            raise unknown_argument(spec.id, name, names)
        _check_argument(spec, name, hints[name], value)
    args: dict[str, Any] = {"seed": 0, **spec.args, "size": _NUM_TASKS * _MAX_ATTEMPTS}
    config = config_cls(**args)
    try:
        if hasattr(config, "validate"):  # two datasets' configurations accept anything
            config.validate()
    except (AssertionError, ValueError, TypeError) as error:
        raise InvalidRequest(
            f"The arguments of environment {spec.id!r} do not fit together: "
            f"{error or 'reasoning-gym gives no reason'}.",
            code="invalid_environment_argument",
            environment=spec.id,
        ) from error
    return config


def _check_argument(spec: EnvSpec, name: str, hint: Any, value: object) -> None:
    try:
        TypeAdapter(hint).validate_python(value, strict=True)
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"]
        raise bad_argument(
            spec.id, name, value, f"another value ({reason[:1].lower() + reason[1:]})"
        ) from None
    if not isinstance(value, int):
        return
    low, high = (0, _MAX_SEED) if name == "seed" else (-_MAX_INT, _MAX_INT)
    if not low <= value <= high:
        raise bad_argument(spec.id, name, value, f"a whole number from {low} to {high}")
