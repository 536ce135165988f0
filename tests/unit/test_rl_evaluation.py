"""Held-out evaluation: greedy or by seeded draws, and what an audit of the draws finds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from learning_fixtures import TOLERANCE, Lab, write_base

from shoal.models.sampling import completion_numbers, draw_uniforms_bt
from shoal.protocol.errors import InvalidRequest
from shoal.protocol.job import EnvSpec
from shoal.protocol.result import CheckName
from shoal.protocol.task import EvaluateTask
from shoal.rl.batch import EvaluatePayload, RowLimits
from shoal.rl.environments import Split, load_environment
from shoal.rl.evaluation import evaluation_uniforms, run_evaluate
from shoal.rl.reward import score_completions
from shoal.rl.rollout import decode_completions
from shoal.rl.verification import EvaluateVerification, verify_evaluate

SAMPLES = 3


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab.open(write_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def greedy(lab: Lab) -> EvaluateTask:
    prompts = lab.plan.held_out()
    return lab.plan.evaluation(lab.version(), prompts, range(len(prompts)))


@pytest.fixture(scope="module")
def sampled(greedy: EvaluateTask) -> EvaluateTask:
    return greedy.model_copy(update={"temperature": 0.8, "samples_per_prompt": SAMPLES})


def payload_of(lab: Lab, task: EvaluateTask, data: bytes) -> EvaluatePayload:
    limits = RowLimits(
        num_prompts=len(task.prompts),
        num_rows=len(task.prompts) * task.samples_per_prompt,
        max_tokens=task.max_tokens,
        vocab_size=lab.policy.vocab_size,
    )
    return EvaluatePayload.decode(data, limits)


def verdict(
    lab: Lab, task: EvaluateTask, payload: EvaluatePayload, *, audit: bool = True
) -> EvaluateVerification:
    data = payload.encode()
    result = lab.result(task, data, payload.num_tokens)
    return verify_evaluate(
        lab.policy, task, result, data, lab.environments, audit=audit, tolerance=TOLERANCE
    )


def test_each_prompt_is_completed_as_often_as_asked(lab: Lab, sampled: EvaluateTask) -> None:
    payload = payload_of(lab, sampled, run_evaluate(lab.policy, sampled, lab.environments))
    texts = decode_completions(lab.policy, payload.token_ids)
    assert len(texts) == SAMPLES * len(sampled.prompts)
    assert len(set(texts)) > len(sampled.prompts), "the samples of a prompt are draws of their own"
    due = score_completions(lab.environments, sampled.prompts, SAMPLES, texts, Split.EVAL)
    assert payload.rewards.tolist() == due


def test_a_slot_draws_the_same_in_any_task(lab: Lab, sampled: EvaluateTask) -> None:
    whole = payload_of(lab, sampled, run_evaluate(lab.policy, sampled, lab.environments))
    part = sampled.model_copy(update={"prompts": sampled.prompts[5:7], "slots": (5, 6)})
    alone = payload_of(lab, part, run_evaluate(lab.policy, part, lab.environments))
    for ours, theirs in zip(alone.token_ids, whole.token_ids[5 * SAMPLES :], strict=False):
        assert np.array_equal(ours, theirs)
    assert completion_numbers((5, 6), SAMPLES) == list(range(15, 21))


@pytest.mark.parametrize("env_id", ["addition", "reasoning_gym:chain_sum"])
def test_a_prompt_that_does_not_fit_is_named_with_its_limit(
    lab: Lab, greedy: EvaluateTask, env_id: str
) -> None:
    environments = [load_environment(EnvSpec(id=env_id))]
    task = greedy.model_copy(update={"max_tokens": 254})
    named = rf"eval prompt {task.prompts[0].index} of environment '{env_id}' has \d+ tokens"
    with pytest.raises(InvalidRequest, match=rf"{named}.*context of 256") as refused:
        run_evaluate(lab.policy, task, environments)
    assert refused.value.code == "context_exceeded"


def test_an_empty_prompt_is_named(
    lab: Lab, greedy: EvaluateTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lab.environments[0], "prompt", lambda split, index: "")
    with pytest.raises(InvalidRequest, match=r"eval prompt \d+ of environment 'addition' is empty"):
        run_evaluate(lab.policy, greedy, lab.environments)


def test_greedy_needs_no_draws_and_samples_have_those_the_audit_derives(
    greedy: EvaluateTask, sampled: EvaluateTask
) -> None:
    assert evaluation_uniforms(greedy) is None
    uniforms_bt = evaluation_uniforms(sampled)
    assert uniforms_bt is not None
    numbers = completion_numbers(sampled.slots, SAMPLES)
    due_bt = draw_uniforms_bt(sampled.seed, numbers, sampled.max_tokens)
    for position in range(sampled.max_tokens):
        place = np.full(len(numbers), position)
        assert np.array_equal(uniforms_bt[np.arange(len(numbers)), place], due_bt[:, position])


def test_an_honest_sampled_evaluation_passes_its_audit(lab: Lab, sampled: EvaluateTask) -> None:
    payload = payload_of(lab, sampled, run_evaluate(lab.policy, sampled, lab.environments))
    found = verdict(lab, sampled, payload)
    assert found.accepted, found.checks
    assert found.checks[-1].name is CheckName.LOGPROBS


@pytest.mark.parametrize(
    "change",
    [{"seed": 99}, {"temperature": 1.3}, {"slots": tuple(range(8, 16))}],
    ids=["another seed", "another temperature", "other slots"],
)
def test_draws_made_otherwise_fail_the_audit(
    lab: Lab, sampled: EvaluateTask, change: dict[str, object]
) -> None:
    other = sampled.model_copy(update=change)
    payload = payload_of(lab, other, run_evaluate(lab.policy, other, lab.environments))
    found = verdict(lab, sampled, payload)
    assert not found.accepted
    assert found.checks[-1].name is CheckName.LOGPROBS
    assert verdict(lab, sampled, payload, audit=False).accepted, "nothing else would notice"


def test_picking_the_best_of_several_draws_fails_the_audit(lab: Lab, sampled: EvaluateTask) -> None:
    payload = payload_of(lab, sampled, run_evaluate(lab.policy, sampled, lab.environments))
    rows = list(payload.token_ids)
    different = next(
        place
        for place in range(0, len(rows), SAMPLES)
        if not np.array_equal(rows[place], rows[place + 1])
    )
    rows[different] = rows[different + 1]
    finished = payload.finished.copy()
    finished[different] = finished[different + 1]
    picked = replace(payload, token_ids=tuple(rows), finished=finished)
    found = verdict(lab, sampled, picked)
    assert not found.accepted
    assert found.checks[-1].name is CheckName.LOGPROBS
    assert verdict(lab, sampled, picked, audit=False).accepted
