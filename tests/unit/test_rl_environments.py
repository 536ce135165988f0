"""Environments: same prompts everywhere, nothing held out is trained on, exact scores."""

from __future__ import annotations

import math

import pytest

from shoal.protocol.errors import InvalidRequest
from shoal.protocol.job import EnvSpec
from shoal.protocol.task import PromptRef
from shoal.rl import reasoning_gym_env
from shoal.rl.environments import Environment, Split, load_environment
from shoal.rl.reasoning_gym_env import ReasoningGym
from shoal.rl.reward import score_completions

CHAIN_SUM = EnvSpec(
    id="reasoning_gym:chain_sum",
    args={"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2},
)
ADDITION = EnvSpec(id="addition")


@pytest.fixture(params=[ADDITION, CHAIN_SUM], ids=["addition", "chain_sum"])
def env(request: pytest.FixtureRequest) -> Environment:
    return load_environment(request.param)


def test_addition_asks_and_answers() -> None:
    env = load_environment(ADDITION)
    assert env.prompt(Split.TRAIN, 0) == "10+10="
    assert env.answer(Split.TRAIN, 0) == "20"
    assert env.num_tasks(Split.TRAIN) + env.num_tasks(Split.EVAL) == 90 * 90
    assert 0.09 < env.num_tasks(Split.EVAL) / 8100 < 0.11


def test_addition_splits_share_no_question() -> None:
    env = load_environment(ADDITION)
    train, held_out = (
        {env.prompt(split, i) for i in range(env.num_tasks(split))} for split in Split
    )
    assert len(train) + len(held_out) == 8100
    assert not train & held_out


def test_gold_scores_one_and_gold_with_junk_scores_zero(env: Environment) -> None:
    for index in range(20):
        gold = env.answer(Split.EVAL, index)
        assert env.score(Split.EVAL, index, gold) == 1.0
        assert env.score(Split.EVAL, index, f" {gold}\n") == 1.0
        assert env.score(Split.EVAL, index, gold + "x") == 0.0
        assert env.score(Split.EVAL, index, "") == 0.0


def test_partial_credit_would_reward_junk_without_the_threshold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    env = load_environment(CHAIN_SUM)
    gold = env.answer(Split.TRAIN, 3)
    assert env.score(Split.TRAIN, 3, gold + "x") == 0.0
    monkeypatch.setattr(reasoning_gym_env, "_FULL_MARKS", 0.5)
    assert env.score(Split.TRAIN, 3, gold + "x") == 1.0


def test_same_spec_same_prompts_and_digest(env: Environment) -> None:
    twin = load_environment(ADDITION if env.id == "addition" else CHAIN_SUM)
    assert twin.digest() == env.digest()
    assert [twin.prompt(Split.EVAL, i) for i in reversed(range(9))] == [
        env.prompt(Split.EVAL, i) for i in reversed(range(9))
    ]


def test_digest_changes_with_arguments() -> None:
    other_seed = CHAIN_SUM.model_copy(update={"args": {**CHAIN_SUM.args, "seed": 1}})
    assert load_environment(other_seed).digest() != load_environment(CHAIN_SUM).digest()
    one_digit = EnvSpec(id="addition", args={"digits": 1})
    assert load_environment(one_digit).digest() != load_environment(ADDITION).digest()


def test_no_held_out_question_is_trained_on_even_where_questions_are_few() -> None:
    few = CHAIN_SUM.model_copy(
        update={"args": {**CHAIN_SUM.args, "min_digits": 1, "max_digits": 1}}
    )
    env = load_environment(few)
    train, held_out = ({env.prompt(split, i) for i in range(400)} for split in Split)
    assert len(held_out) < 60  # 200 questions exist: many indices share one
    assert not train & held_out


def test_a_split_without_questions_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    env = load_environment(CHAIN_SUM)
    assert isinstance(env, ReasoningGym)
    item = {"question": "always the same", "answer": "1"}
    assert not reasoning_gym_env.is_held_out(str(item["question"]))
    monkeypatch.setattr(type(env._dataset), "__getitem__", lambda self, index: item)
    assert env.prompt(Split.TRAIN, 0) == "always the same"
    with pytest.raises(InvalidRequest, match="too few different questions"):
        env.prompt(Split.EVAL, 0)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (EnvSpec(id="adition"), "nearest name is 'addition'"),
        (EnvSpec(id="reasoning_gym:chain_sums"), "nearest name is 'chain_sum'"),
        (EnvSpec(id="reasoning_gym"), "no environment 'reasoning_gym'"),
        (EnvSpec(id="reasoning_gym:countdown"), "runs the completion as Python"),
        (EnvSpec(id="reasoning_gym:ransom_note"), "different items in different processes"),
        (EnvSpec(id="addition", args={"digit": 2}), "nearest name is 'digits'"),
        (EnvSpec(id="addition", args={"digits": 4}), "from 1 to 3"),
        (EnvSpec(id="addition", args={"digits": True}), "from 1 to 3"),
        (EnvSpec(id="reasoning_gym:chain_sum", args={"size": 3}), "no argument 'size'"),
        (EnvSpec(id="reasoning_gym:chain_sum", args={"seed": -1}), "from 0 to"),
        (EnvSpec(id="reasoning_gym:chain_sum", args={"max_terms": 10**6}), "to 10000"),
        (EnvSpec(id="reasoning_gym:chain_sum", args={"min_digits": "a"}), "'min_digits'"),
        (EnvSpec(id="reasoning_gym:chain_sum", args={"min_digits": 9}), "max_digits must be"),
    ],
)
def test_bad_specs_name_what_is_wrong(spec: EnvSpec, expected: str) -> None:
    with pytest.raises(InvalidRequest, match=expected):
        load_environment(spec)


def test_index_outside_the_split_is_refused(env: Environment) -> None:
    for index in (-1, env.num_tasks(Split.EVAL)):
        with pytest.raises(InvalidRequest, match="has no eval prompt"):
            env.prompt(Split.EVAL, index)


def test_a_failing_grader_is_an_error_and_never_a_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    env = load_environment(CHAIN_SUM)
    assert isinstance(env, ReasoningGym)

    def fail(answer: str, entry: dict[str, object]) -> float:
        raise KeyError(answer)

    monkeypatch.setattr(env._dataset, "score_answer", fail)
    with pytest.raises(InvalidRequest, match="failed on a completion of train prompt 5"):
        env.score(Split.TRAIN, 5, "7")


@pytest.mark.parametrize("spec", [ADDITION, CHAIN_SUM], ids=["addition", "chain_sum"])
@pytest.mark.parametrize(
    ("outcome", "said"),
    [(RuntimeError("boom"), "RuntimeError"), (math.nan, "nan"), (7.0, "7.0"), (-1.0, "-1.0")],
)
def test_whatever_a_grader_does_wrong_is_an_error_and_never_a_reward(
    spec: EnvSpec, outcome: Exception | float, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = load_environment(spec)

    def grade(split: Split, index: int, completion: str) -> float:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(env, "score", grade)
    prompts = (PromptRef(environment=0, index=5),)
    with pytest.raises(InvalidRequest, match=rf"completion of train prompt 5 .*{said}") as refused:
        score_completions([env], prompts, 1, ["7"], Split.TRAIN)
    assert refused.value.code == "grader_failed"


def test_a_grader_of_reasoning_gym_without_a_number_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    env = load_environment(CHAIN_SUM)
    assert isinstance(env, ReasoningGym)
    for marks in (math.nan, None):
        monkeypatch.setattr(env._dataset, "score_answer", lambda answer, entry, m=marks: m)
        with pytest.raises(InvalidRequest) as refused:
            env.score(Split.TRAIN, 5, "7")
        assert refused.value.code == "grader_failed"


def test_an_empty_completion_scores_zero_and_fails_nothing(env: Environment) -> None:
    prompts = (PromptRef(environment=0, index=1),)
    assert score_completions([env], prompts, 2, ["", "  "], Split.EVAL) == [0.0, 0.0]


def test_rewards_follow_prompts_and_groups() -> None:
    environments = [load_environment(ADDITION), load_environment(CHAIN_SUM)]
    prompts = (PromptRef(environment=1, index=4), PromptRef(environment=0, index=7))
    gold = [environments[p.environment].answer(Split.TRAIN, p.index) for p in prompts]
    texts = [gold[0], "no", gold[1], gold[1]]
    assert score_completions(environments, prompts, 2, texts, Split.TRAIN) == [1, 0, 1, 1]
    with pytest.raises(InvalidRequest, match="3 were given"):
        score_completions(environments, prompts, 2, texts[:3], Split.TRAIN)
    stranger = (PromptRef(environment=2, index=0),)
    with pytest.raises(InvalidRequest, match="numbered 0 to 1"):
        score_completions(environments, stranger, 1, ["x"], Split.TRAIN)
