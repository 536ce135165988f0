"""Built-in bases are stock folders, made once, from training prompts alone."""

from __future__ import annotations

import itertools
import tomllib
from pathlib import Path

import pytest
from learning_fixtures import write_base

from shoal.models.base import load_model, load_tokenizer
from shoal.models.tiny import build_tokenizer, split_words
from shoal.protocol.errors import InvalidRequest
from shoal.protocol.job import EnvSpec
from shoal.rl.addition import Addition
from shoal.rl.base_models import (
    RECIPES,
    WarmStart,
    build_base,
    fetch_base,
    instruction_pieces,
)
from shoal.rl.environments import Split, load_environment

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPE = WarmStart(environment=EnvSpec(id="addition"), steps=2, batch_size=8)


def test_a_base_is_built_once_and_loads_as_any_other(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    folder = build_base(RECIPE, tmp_path, lambda done, total: steps.append((done, total)))
    assert steps == [(1, 2), (2, 2)]
    assert build_base(RECIPE, tmp_path, lambda *_: pytest.fail("built again")) == folder
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert load_model(folder).config.model_type == "llama"
    assert load_tokenizer(folder)("47+38=")["input_ids"]


def test_equal_recipes_give_equal_weights(tmp_path: Path) -> None:
    first, again = build_base(RECIPE, tmp_path / "a"), build_base(RECIPE, tmp_path / "b")
    weights = "model.safetensors"
    assert (first / weights).read_bytes() == (again / weights).read_bytes()
    other = build_base(RECIPE.model_copy(update={"seed": 1}), tmp_path / "a")
    assert other != first
    assert (other / weights).read_bytes() != (first / weights).read_bytes()


def test_held_out_prompts_are_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[Split] = set()
    prompt = Addition.prompt

    def watched(self: Addition, split: Split, index: int) -> str:
        read.add(split)
        return prompt(self, split, index)

    monkeypatch.setattr(Addition, "prompt", watched)
    build_base(RECIPE, tmp_path)
    assert read == {Split.TRAIN}


def test_an_unknown_builtin_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="builtin:tiny-addition") as refused:
        fetch_base("builtin:tiny-additon", tmp_path, allow_local=False)
    assert refused.value.code == "unreachable_model"
    assert "tiny-addition" in RECIPES


def test_other_names_are_resolved_as_paths(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "mine")
    assert fetch_base(str(folder), tmp_path, allow_local=True) == folder


def test_pieces_are_single_tokens_and_the_rest_is_spelled() -> None:
    text = "State the answer: 12 + 34 =\n"
    assert split_words(text) == ["State ", "the ", "answer: "]
    tokenizer = build_tokenizer(["State the ", "State ", "answer: ", "\n"])
    tokens = tokenizer(text)["input_ids"]
    assert len(tokens) == 3 + len("12 + 34 =")
    assert tokenizer.decode(tokens) == text


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_base_reads_every_prompt_and_answer_of_its_task(name: str) -> None:
    environment = load_environment(RECIPES[name].environment)
    tokenizer = build_tokenizer(instruction_pieces(environment))
    for split, index in itertools.product(Split, range(0, 500, 7)):
        for text in (environment.prompt(split, index), environment.answer(split, index)):
            tokens = tokenizer(text)["input_ids"]
            assert tokenizer.decode(tokens) == text
            assert len(tokens) <= 40


@pytest.mark.parametrize("name", ["gcd", "leg_counting", "spell_backward"])
def test_an_example_s_base_was_warmed_on_the_example_s_task(name: str) -> None:
    job = tomllib.loads((EXAMPLES / f"{name}.toml").read_text())
    (environment,) = job["env"]
    recipe = RECIPES[job["model"].removeprefix("builtin:")]
    assert recipe.environment == EnvSpec(**environment)
    # An answer and its end fit the limit, so nothing right is cut off.
    tokenizer = build_tokenizer(instruction_pieces(load_environment(recipe.environment)))
    answers = [load_environment(recipe.environment).answer(Split.EVAL, i) for i in range(200)]
    longest = max(len(tokenizer(answer)["input_ids"]) for answer in answers)
    assert longest + 1 <= job["sampling"]["max_tokens"]


def test_what_a_prompt_asks_about_is_spelled() -> None:
    environment = load_environment(RECIPES["tiny-spell-backward"].environment)
    instruction, *characters = instruction_pieces(environment)
    assert instruction == "Spell this word backward (example: sun -> nus): "
    assert all(len(character) == 1 for character in characters)
    assert instruction_pieces(load_environment(EnvSpec(id="addition"))) == []
