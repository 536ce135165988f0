"""Built-in base models: small, built in code and warmed by a little supervised training.

A built-in is named ``builtin:<recipe>``.  It is trained on its environment's training split
alone, so the held-out split stays unseen, and kept as a stock Hugging Face folder under the
digest of its recipe.
"""

from __future__ import annotations

import difflib
import itertools
import os
import shutil
import string
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # the name torch itself documents
from pydantic import Field

from shoal.models.base import resolve_base
from shoal.models.forward import padded
from shoal.models.tiny import CHARACTERS, build_model, build_tokenizer, split_words
from shoal.protocol.errors import InvalidRequest
from shoal.protocol.job import EnvSpec
from shoal.protocol.record import Record
from shoal.rl.environments import Environment, Split, load_environment

BUILTIN_PREFIX = "builtin:"
_IGNORED = -100
_EXAMPLES = 8_192
_PROMPTS_READ = 512
_COMMON = 64
"""A word is a token if one prompt in as many has it; a rarer one is spelled."""

OnStep = Callable[[int, int], None]
"""Called with (steps done, steps in all) while a built-in is being warmed."""


class WarmStart(Record):
    """How a built-in base is made; its digest names the cached folder."""

    version: int = Field(default=2, ge=1)
    environment: EnvSpec
    seed: int = 0
    steps: int = Field(ge=1)
    batch_size: int = Field(default=128, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    warmup_steps: int = Field(default=20, ge=0)


RECIPES: dict[str, WarmStart] = {
    "tiny-addition": WarmStart(environment=EnvSpec(id="addition"), steps=170),
    "tiny-chain-sum": WarmStart(
        environment=EnvSpec(
            id="reasoning_gym:chain_sum",
            args={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
        ),
        steps=210,
    ),
    "tiny-gcd": WarmStart(
        environment=EnvSpec(
            id="reasoning_gym:gcd",
            args={"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 99},
        ),
        steps=50,
    ),
    "tiny-leg-counting": WarmStart(
        environment=EnvSpec(
            id="reasoning_gym:leg_counting",
            args={"min_animals": 1, "max_animals": 2, "min_instances": 1, "max_instances": 5},
        ),
        steps=50,
    ),
    "tiny-spell-backward": WarmStart(
        environment=EnvSpec(
            id="reasoning_gym:spell_backward", args={"min_word_len": 3, "max_word_len": 5}
        ),
        steps=130,
    ),
}
"""Each stops early: what a base cannot do yet is what its job is there to teach."""


def fetch_base(
    name: str, cache_dir: Path, *, allow_local: bool, on_step: OnStep | None = None
) -> Path:
    """The folder of the base ``name``: built in, local, or from the model hub.

    Raises:
        InvalidRequest: code ``unreachable_model``; see `shoal.models.base.resolve_base`.
    """
    if not name.startswith(BUILTIN_PREFIX):
        return resolve_base(name, cache_dir, allow_local=allow_local)
    recipe = RECIPES.get(name.removeprefix(BUILTIN_PREFIX))
    if recipe is None:
        known = [BUILTIN_PREFIX + key for key in RECIPES]
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise InvalidRequest(
            f"There is no built-in model {name!r}; the nearest name is {nearest!r}.",
            code="unreachable_model",
            model=name,
        )
    return build_base(recipe, cache_dir, on_step)


def build_base(recipe: WarmStart, cache_dir: Path, on_step: OnStep | None = None) -> Path:
    """The folder of ``recipe``, trained now unless ``cache_dir`` already has it."""
    folder = cache_dir / f"builtin-{recipe.digest()[:16]}"
    if folder.is_dir():
        return folder
    cache_dir.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix="builtin-draft-", dir=cache_dir))
    try:
        environment = load_environment(recipe.environment)
        tokenizer = build_tokenizer(instruction_pieces(environment))
        model = build_model(recipe.seed, len(tokenizer))
        warm(model, tokenizer, environment, recipe, on_step)
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        _publish(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def warm(
    model: Any,
    tokenizer: Any,
    environment: Environment,
    recipe: WarmStart,
    on_step: OnStep | None = None,
) -> None:
    """Trains ``model`` to complete training prompts with their answers, for ``recipe.steps``."""
    ids_bt, labels_bt = _examples(tokenizer, environment, recipe.seed)
    random = np.random.Generator(np.random.Philox(key=recipe.seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, foreach=False)
    model.train()
    for step in range(recipe.steps):
        rows = torch.from_numpy(random.integers(len(ids_bt), size=recipe.batch_size))
        logits = model(input_ids=ids_bt[rows]).logits[:, :-1]
        loss = F.cross_entropy(
            logits.flatten(0, 1), labels_bt[rows, 1:].flatten(), ignore_index=_IGNORED
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = _rate(recipe, step)
        optimizer.step()
        if on_step:
            on_step(step + 1, recipe.steps)
    model.eval()


def instruction_pieces(environment: Environment) -> list[str]:
    """What training prompts repeat, to be one token each, and the characters a base lacks.

    That is how every prompt begins and ends, and the words common in between; what a prompt
    asks about stays in single characters.
    """
    size = environment.num_tasks(Split.TRAIN)
    indices = range(0, size, -(-size // _PROMPTS_READ))
    prompts = [environment.prompt(Split.TRAIN, index) for index in indices]
    start = _common_start(prompts).rstrip(string.digits + "-")
    end = _common_start([prompt[len(start) :][::-1] for prompt in prompts])[::-1]
    middles = [prompt[len(start) : len(prompt) - len(end)] for prompt in prompts]
    counts = Counter(word for middle in middles for word in set(split_words(middle)))
    common = [word for word, count in counts.items() if count * _COMMON >= len(prompts)]
    answers = [environment.answer(Split.TRAIN, index) for index in indices]
    characters = set().union(*prompts, *answers) - set(CHARACTERS)
    ends = {piece for piece in (start, end) if split_words(piece)}
    return [*sorted(ends), *sorted(common), *sorted(characters)]


def _common_start(texts: Sequence[str]) -> str:
    # Whatever the first and the last in order share, those between share too.
    pairs = zip(min(texts), max(texts), strict=False)
    return "".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _rate(recipe: WarmStart, step: int) -> float:
    """Linear warm-up, then linear decay to a tenth: the accuracy reached varies less."""
    rising = min(1.0, (step + 1) / max(recipe.warmup_steps, 1))
    return recipe.learning_rate * min(rising, 1.0 - 0.9 * step / recipe.steps)


def _examples(
    tokenizer: Any, environment: Environment, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Training examples, right-padded, and their labels: the answer's tokens and the end."""
    size = environment.num_tasks(Split.TRAIN)
    random = np.random.Generator(np.random.Philox(key=seed + 1))
    count = min(size, _EXAMPLES)
    indices = random.permutation(size) if size <= _EXAMPLES else random.integers(size, size=count)
    prompts = tokenizer([environment.prompt(Split.TRAIN, i) for i in indices.tolist()])["input_ids"]
    answers = tokenizer([environment.answer(Split.TRAIN, i) for i in indices.tolist()])["input_ids"]
    end = [tokenizer.eos_token_id]
    pairs = list(zip(prompts, answers, strict=True))
    rows = [[*prompt, *answer, *end] for prompt, answer in pairs]
    labels = [[_IGNORED] * len(prompt) + [*answer, *end] for prompt, answer in pairs]
    width = max(map(len, rows))
    labels = [row + [_IGNORED] * (width - len(row)) for row in labels]
    return padded(rows, width), torch.tensor(labels)


def _publish(draft: Path, folder: Path) -> None:
    """Moves the finished folder into place; another process may have been faster."""
    os.chmod(draft, 0o755)
    try:
        draft.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
