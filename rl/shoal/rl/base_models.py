"""Built-in base models: small, built in code and warmed by a little supervised training.

A built-in is named ``builtin:<recipe>``.  It is trained on its environment's training split
alone, so the held-out split stays unseen, and kept as a stock Hugging Face folder under the
digest of its recipe.
"""

from __future__ import annotations

import difflib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # the name torch itself documents
from pydantic import Field

from shoal.models.base import resolve_base
from shoal.models.forward import padded
from shoal.models.tiny import build_model, build_tokenizer, split_words
from shoal.protocol.errors import InvalidRequest
from shoal.protocol.job import EnvSpec
from shoal.protocol.record import Record
from shoal.rl.environments import Environment, Split, load_environment

BUILTIN_PREFIX = "builtin:"
_IGNORED = -100
_EXAMPLES = 8_192
_PROMPTS_READ = 64

OnStep = Callable[[int, int], None]
"""Called with (steps done, steps in all) while a built-in is being warmed."""


class WarmStart(Record):
    """How a built-in base is made; its digest names the cached folder."""

    version: int = Field(default=1, ge=1)
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
}


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
        tokenizer = build_tokenizer(_instruction_words(environment))
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


def _instruction_words(environment: Environment) -> list[str]:
    """The words that training prompts use."""
    count = min(environment.num_tasks(Split.TRAIN), _PROMPTS_READ)
    prompts = (environment.prompt(Split.TRAIN, index) for index in range(count))
    return sorted({word for prompt in prompts for word in split_words(prompt)})


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
