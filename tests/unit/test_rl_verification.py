"""Each check passes honest work, stops its cheat, and is the only one that does.

Every cheat is sent twice: once as it is, which the check named must refuse, and once with
that check switched off, which must then be accepted; so each check is shown to be needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from learning_fixtures import TOLERANCE, Lab, spread_rewards, stir, write_base

from shoal.models.policy import Policy
from shoal.protocol.errors import InvalidRequest
from shoal.protocol.learning import CodecSpec
from shoal.protocol.result import CheckName, Result
from shoal.protocol.task import EvaluateTask, GradientTask, RolloutTask
from shoal.rl import verification
from shoal.rl.batch import EvaluatePayload, GradientPayload, RolloutPayload, RowLimits
from shoal.rl.checklist import Checklist
from shoal.rl.environments import Split
from shoal.rl.evaluation import run_evaluate
from shoal.rl.gradient import encode_slice, make_groups, run_gradient
from shoal.rl.local import blob_of
from shoal.rl.rollout import encode_prompts, run_rollout

Cheat = Callable[[RolloutPayload], RolloutPayload]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab.open(write_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def task(lab: Lab) -> RolloutTask:
    return lab.plan.rollout(0, lab.version(), lab.plan.prompts(0), range(4))


@pytest.fixture(scope="module")
def honest(lab: Lab, task: RolloutTask) -> RolloutPayload:
    data = run_rollout(lab.policy, task, lab.environments)
    return RolloutPayload.decode(data, limits_of(lab, 4))


@pytest.fixture(scope="module")
def evaluate_task(lab: Lab) -> EvaluateTask:
    prompts = lab.plan.held_out()
    return lab.plan.evaluation(lab.version(), prompts, range(len(prompts)))


@pytest.fixture(scope="module")
def gradient_task(
    lab: Lab, task: RolloutTask, honest: RolloutPayload
) -> tuple[GradientTask, bytes]:
    prompts = encode_prompts(lab.policy, lab.environments, task.prompts, Split.TRAIN)
    groups = make_groups(honest, prompts, spread_rewards(16), 4, lab.plan.spec.loss)
    data = encode_slice(groups).encode()
    version = lab.version()
    return lab.plan.gradient(0, version, blob_of(data), num_rows=16, num_groups=4), data


def limits_of(lab: Lab, group_size: int) -> RowLimits:
    prompts = 4 if group_size > 1 else 8
    return RowLimits(
        num_prompts=prompts,
        num_rows=prompts * group_size,
        max_tokens=5,
        vocab_size=lab.policy.vocab_size,
    )


def verify(
    lab: Lab,
    task: RolloutTask,
    payload: RolloutPayload,
    change: dict[str, object] | None = None,
    *,
    audit: bool = True,
) -> verification.RolloutVerification:
    data = payload.encode()
    result = lab.result(task, data, payload.num_tokens).model_copy(update=change or {})
    return verification.verify_rollout(
        lab.policy, task, result, data, lab.environments, audit=audit, tolerance=TOLERANCE
    )


def failed(checked: object) -> CheckName | None:
    checks = checked.checks  # type: ignore[attr-defined]
    return next((check.name for check in checks if not check.passed), None)


def switch_off(monkeypatch: pytest.MonkeyPatch, name: CheckName) -> None:
    """The checklist as it is, but one check always passes."""
    record = Checklist.record

    def lenient(self: Checklist, at: CheckName, passed: bool, detail: str) -> None:
        record(self, at, passed or at is name, detail)

    monkeypatch.setattr(Checklist, "record", lenient)


def test_honest_work_passes_every_check(
    lab: Lab, task: RolloutTask, honest: RolloutPayload
) -> None:
    checked = verify(lab, task, honest)
    assert checked.accepted
    assert [check.name for check in checked.checks] == [
        CheckName.FORM,
        CheckName.DIGEST,
        CheckName.POLICY,
        CheckName.PROMPTS,
        CheckName.TERMINATION,
        CheckName.REWARDS,
        CheckName.LOGPROBS,
    ]
    assert CheckName.LOGPROBS not in {
        check.name for check in verify(lab, task, honest, audit=False).checks
    }


def easier_prompts(payload: RolloutPayload) -> RolloutPayload:
    return replace(payload, prompts_sha256=(b"\x01" * 32, *payload.prompts_sha256[1:]))


def cut_short(payload: RolloutPayload) -> RolloutPayload:
    """The first row that runs to its full length, stopped early."""
    row = next(n for n, ended in enumerate(payload.finished) if not ended)
    tokens, logprobs = list(payload.token_ids), list(payload.logprobs)
    tokens[row], logprobs[row] = tokens[row][:-1], logprobs[row][:-1]
    return replace(payload, token_ids=tuple(tokens), logprobs=tuple(logprobs))


def false_flag(payload: RolloutPayload) -> RolloutPayload:
    return replace(payload, finished=~payload.finished)


def shifted_logprobs(payload: RolloutPayload) -> RolloutPayload:
    return replace(payload, logprobs=tuple(row - np.float32(1e-3) for row in payload.logprobs))


def rewritten_tokens(payload: RolloutPayload) -> RolloutPayload:
    tokens = tuple(np.where(row > 2, 3 + (row - 2) % 10, row) for row in payload.token_ids)
    return replace(payload, token_ids=tuple(t.astype(np.int32) for t in tokens))


@pytest.mark.parametrize(
    ("cheat", "check"),
    [
        (easier_prompts, CheckName.PROMPTS),
        (cut_short, CheckName.TERMINATION),
        (false_flag, CheckName.TERMINATION),
        (shifted_logprobs, CheckName.LOGPROBS),
        (rewritten_tokens, CheckName.LOGPROBS),
    ],
)
def test_a_cheat_is_refused_by_its_check_alone(
    lab: Lab,
    task: RolloutTask,
    honest: RolloutPayload,
    monkeypatch: pytest.MonkeyPatch,
    cheat: Cheat,
    check: CheckName,
) -> None:
    refused = verify(lab, task, cheat(honest))
    assert failed(refused) is check
    assert refused.payload is None
    assert refused.rewards is None
    switch_off(monkeypatch, check)
    assert verify(lab, task, cheat(honest)).accepted


def test_unaudited_logprobs_are_taken_on_trust(
    lab: Lab, task: RolloutTask, honest: RolloutPayload
) -> None:
    assert verify(lab, task, shifted_logprobs(honest), audit=False).accepted


def test_what_follows_an_end_token_is_refused(
    lab: Lab, task: RolloutTask, honest: RolloutPayload
) -> None:
    (eos,) = lab.policy.eos_ids
    row = next(n for n, tokens in enumerate(honest.token_ids) if len(tokens) > 1)
    tokens = list(honest.token_ids)
    tokens[row] = tokens[row].copy()
    tokens[row][0] = eos
    checked = verify(lab, task, replace(honest, token_ids=tuple(tokens)))
    assert failed(checked) is CheckName.TERMINATION


@pytest.mark.parametrize(
    ("change", "check"),
    [
        ({"task_id": "task_11111111"}, CheckName.FORM),
        ({"num_units": 5}, CheckName.FORM),
        ({"num_tokens": 1}, CheckName.FORM),
        ({"dtype": "bfloat16"}, CheckName.FORM),
        ({"task_sha256": "0" * 64}, CheckName.DIGEST),
        ({"payload": blob_of(b"other")}, CheckName.DIGEST),
        ({"policy_sha256": "0" * 64}, CheckName.POLICY),
    ],
)
def test_a_result_that_contradicts_its_task_is_refused(
    lab: Lab,
    task: RolloutTask,
    honest: RolloutPayload,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, object],
    check: CheckName,
) -> None:
    assert failed(verify(lab, task, honest, change)) is check
    switch_off(monkeypatch, check)
    assert verify(lab, task, honest, change).accepted


def test_claimed_rewards_earn_nothing(lab: Lab, task: RolloutTask, honest: RolloutPayload) -> None:
    boast = replace(honest, rewards=np.ones(16, dtype=np.float32))
    checked = verify(lab, task, boast)
    assert checked.rewards is not None
    assert checked.rewards.tolist() == honest.rewards.tolist()
    assert checked.rewards.tolist() != boast.rewards.tolist()
    (reported,) = [c for c in checked.checks if c.name is CheckName.REWARDS]
    assert "16 of 16 claims differ" in reported.detail


def test_another_versions_samples_are_refused(lab: Lab) -> None:
    """A worker that samples from version 0 and claims version 1."""
    stale = Policy.load(lab.folder, lab.policy.lora, seed=0)
    stir(stale, scale=0.09)
    stale_lab = Lab(lab.folder, stale, lab.environments, lab.plan)
    claimed = lab.plan.rollout(0, lab.version(), lab.plan.prompts(0), range(4))
    really = claimed.model_copy(update={"policy": stale_lab.version(0)})
    payload = RolloutPayload.decode(run_rollout(stale, really, lab.environments), limits_of(lab, 4))
    assert failed(verify(lab, claimed, payload)) is CheckName.LOGPROBS
    assert verify(lab, claimed, payload, audit=False).accepted


def test_an_audit_needs_the_committed_version(
    lab: Lab, task: RolloutTask, honest: RolloutPayload
) -> None:
    other = Lab(
        lab.folder,
        Policy.load(lab.folder, lab.policy.lora, seed=0),
        lab.environments,
        lab.plan,
    )
    with pytest.raises(InvalidRequest, match="load that adapter"):
        verify(other, task, honest)


def test_a_policy_that_gives_no_numbers_judges_nobody(
    lab: Lab, task: RolloutTask, evaluate_task: EvaluateTask, honest: RolloutPayload
) -> None:
    data = run_evaluate(lab.policy, evaluate_task, lab.environments)
    evaluation = EvaluatePayload.decode(data, limits_of(lab, 1))
    parameter = next(iter(lab.policy.trainable().values()))
    kept = parameter.detach().clone()
    with torch.no_grad():
        parameter.fill_(math.nan)
    version = {"policy": lab.version()}
    try:
        with pytest.raises(InvalidRequest, match="gives no numbers"):
            verify(lab, task.model_copy(update=version), honest)
        with pytest.raises(InvalidRequest, match="gives no numbers"):
            check_evaluation(lab, evaluate_task.model_copy(update=version), evaluation)
    finally:
        with torch.no_grad():
            parameter.copy_(kept)


def check_evaluation(
    lab: Lab, task: EvaluateTask, payload: EvaluatePayload, *, audit: bool = True
) -> verification.EvaluateVerification:
    data = payload.encode()
    result = lab.result(task, data, payload.num_tokens)
    return verification.verify_evaluate(
        lab.policy, task, result, data, lab.environments, audit=audit, tolerance=TOLERANCE
    )


def test_honest_evaluation_passes_and_invented_answers_do_not(
    lab: Lab, evaluate_task: EvaluateTask
) -> None:
    data = run_evaluate(lab.policy, evaluate_task, lab.environments)
    payload = EvaluatePayload.decode(data, limits_of(lab, 1))
    assert check_evaluation(lab, evaluate_task, payload).accepted

    (eos,) = lab.policy.eos_ids
    environment = lab.environments[0]
    gold = [
        [*lab.policy.encode_prompt(environment.answer(Split.EVAL, ref.index)), eos]
        for ref in evaluate_task.prompts
    ]
    invented = replace(
        payload,
        token_ids=tuple(np.array(row, dtype=np.int32) for row in gold),
        finished=np.ones(len(gold), dtype=np.bool_),
        rewards=np.ones(len(gold), dtype=np.float32),
    )
    assert failed(check_evaluation(lab, evaluate_task, invented)) is CheckName.LOGPROBS
    trusted = check_evaluation(lab, evaluate_task, invented, audit=False)
    assert trusted.rewards is not None
    assert trusted.rewards.mean() == 1.0


def check_gradient(
    lab: Lab, work: tuple[GradientTask, bytes], payload: GradientPayload, *, audit: bool = True
) -> verification.GradientVerification:
    task, rows = work
    data = payload.encode()
    tokens = sum(len(t) for t in _rows_of(lab, work))
    result: Result = lab.result(task, data, tokens)
    return verification.verify_gradient(lab.policy, task, result, data, rows, audit=audit)


def _rows_of(lab: Lab, work: tuple[GradientTask, bytes]) -> tuple[np.ndarray, ...]:
    from shoal.rl.batch import GradientSlice

    return GradientSlice.decode(
        work[1], num_rows=16, num_prompts=4, vocab_size=lab.policy.vocab_size
    ).token_ids


def scaled(payload: GradientPayload, factor: float) -> GradientPayload:
    gradients = {n: (a * factor).astype(np.float32) for n, a in payload.gradients.items()}
    return GradientPayload.pack(gradients, payload.stats, CodecSpec())[0]


@pytest.mark.parametrize("factor", [-1.0, 1.001, 0.5])
def test_a_false_gradient_is_refused_on_audit_only(
    lab: Lab, gradient_task: tuple[GradientTask, bytes], factor: float
) -> None:
    data = run_gradient(lab.policy, *gradient_task).payload
    payload = GradientPayload.decode(data, lab.policy.shapes(), CodecSpec())
    assert check_gradient(lab, gradient_task, payload).accepted
    false = scaled(payload, factor)
    assert failed(check_gradient(lab, gradient_task, false)) is CheckName.GRADIENT
    assert check_gradient(lab, gradient_task, false, audit=False).accepted


@pytest.mark.parametrize("factor", [0.0, 1e9])
def test_an_empty_or_absurd_gradient_is_refused_without_audit(
    lab: Lab,
    gradient_task: tuple[GradientTask, bytes],
    monkeypatch: pytest.MonkeyPatch,
    factor: float,
) -> None:
    data = run_gradient(lab.policy, *gradient_task).payload
    false = scaled(GradientPayload.decode(data, lab.policy.shapes(), CodecSpec()), factor)
    assert failed(check_gradient(lab, gradient_task, false, audit=False)) is CheckName.GRADIENT
    switch_off(monkeypatch, CheckName.GRADIENT)
    assert check_gradient(lab, gradient_task, false, audit=False).accepted


def test_false_statistics_are_refused_on_audit(
    lab: Lab, gradient_task: tuple[GradientTask, bytes]
) -> None:
    data = run_gradient(lab.policy, *gradient_task).payload
    payload = GradientPayload.decode(data, lab.policy.shapes(), CodecSpec())
    boast = replace(payload, stats=replace(payload.stats, entropy_sum=1e6))
    assert failed(check_gradient(lab, gradient_task, boast)) is CheckName.GRADIENT
    assert check_gradient(lab, gradient_task, boast, audit=False).accepted
