"""Scores and their gradients are those of the model's own pass, however they are packed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from learning_fixtures import Lab, write_base

from shoal.models import packing, scoring
from shoal.models.forward import Tokens, row_mask
from shoal.models.policy import Policy
from shoal.models.scoring import completion_logprobs_bt

PROMPTS: list[Tokens] = [[5, 6, 7], [5, 6, 7], [8, 9], [5, 6, 7], [8, 9], [10]]
COMPLETIONS: list[Tokens] = [[11, 12, 1], [11, 12, 1], [13], [11, 14, 15, 1], [16, 1], [9, 9, 9]]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab.open(write_base(tmp_path_factory.mktemp("base")))


def score(
    policy: Policy, *, short: bool, temperature: float = 0.8
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probabilities and entropies where there is a token, and a gradient through them."""
    logprobs_bt, entropy_bt = completion_logprobs_bt(
        policy.model,
        policy._forward if short else None,
        PROMPTS,
        COMPLETIONS,
        temperature,
        policy.device,
    )
    mask_bt = row_mask(COMPLETIONS, 4)
    weights_bt = torch.arange(24.0).view(6, 4) - 9.0
    value = (logprobs_bt * weights_bt * mask_bt).sum()
    parameters = policy.trainable()
    gradients = torch.autograd.grad(value, list(parameters.values()))
    return (
        logprobs_bt.detach()[mask_bt],
        entropy_bt[mask_bt],
        dict(zip(parameters, gradients, strict=True)),
    )


def assert_equal_scores(
    one: tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]],
    other: tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]],
) -> None:
    assert float((one[0] - other[0]).abs().max()) <= 1e-5
    assert float((one[1] - other[1]).abs().max()) <= 1e-5
    norm = sum(float(g.square().sum()) for g in other[2].values()) ** 0.5
    gap = sum(float((one[2][n] - g).square().sum()) for n, g in other[2].items()) ** 0.5
    assert norm > 0
    assert gap <= 1e-5 * norm


def test_the_short_pass_scores_as_the_model(lab: Lab) -> None:
    assert_equal_scores(score(lab.policy, short=True), score(lab.policy, short=False))


def test_full_fine_tuning_scores_as_the_model(lab: Lab) -> None:
    policy = Policy.load(lab.folder, None, seed=0)
    assert_equal_scores(score(policy, short=True), score(policy, short=False))


def test_the_model_s_pass_scores_as_an_unpadded_one(lab: Lab) -> None:
    logprobs_m, entropy_m, _ = score(lab.policy, short=False, temperature=1.0)
    found_m, found_entropy_m = [], []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        row = torch.tensor([[*prompt, *completion]])
        with torch.inference_mode():
            logits_tv = lab.policy.model(input_ids=row).logits[0, len(prompt) - 1 : -1]
        all_tv = torch.log_softmax(logits_tv, dim=-1)
        found_m.append(all_tv.gather(1, torch.tensor(completion)[:, None])[:, 0])
        found_entropy_m.append(-(all_tv.exp() * all_tv).sum(1))
    assert float((torch.cat(found_m) - logprobs_m).abs().max()) <= 1e-5
    assert float((torch.cat(found_entropy_m) - entropy_m).abs().max()) <= 1e-5


@pytest.mark.parametrize("shared_length", [0, 7, 8, 1000])
def test_where_sequences_are_cut_does_not_show(
    lab: Lab, shared_length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = score(lab.policy, short=True)
    monkeypatch.setattr(packing, "SHARED_LENGTH", shared_length)
    assert_equal_scores(score(lab.policy, short=True), whole)


@pytest.mark.parametrize("num_states", [1, 3, 4])
def test_heads_run_in_parts_do_not_show(
    lab: Lab, num_states: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = score(lab.policy, short=True)
    monkeypatch.setattr(scoring, "MAX_LOGITS", num_states * lab.policy.vocab_size)
    assert_equal_scores(score(lab.policy, short=True), whole)


def test_equal_rows_stand_in_a_pack_once() -> None:
    pack = packing.pack_rows(PROMPTS, COMPLETIONS, torch.device("cpu"))
    prompt_tokens = 3 + 2 + 1
    # Each distinct completion without its last token: [11, 12], [], [11, 14, 15], [16], [9, 9].
    assert len(pack.ids_n) == prompt_tokens + 2 + 0 + 3 + 1 + 2
    assert pack.row_to_distinct.tolist() == [0, 0, 1, 2, 3, 4]
    assert pack.target_m.tolist() == [11, 12, 1, 13, 11, 14, 15, 1, 16, 1, 9, 9, 9]


def test_completions_of_one_prompt_do_not_see_one_another(lab: Lab) -> None:
    alone_bt, _ = lab.policy.logprobs_bt(PROMPTS[:1], COMPLETIONS[:1], 1.0)
    company_bt, _ = lab.policy.logprobs_bt(PROMPTS, COMPLETIONS, 1.0)
    changed: list[Tokens] = [COMPLETIONS[0], *([17, 18, 19] for _ in COMPLETIONS[1:])]
    other_bt, _ = lab.policy.logprobs_bt(PROMPTS, changed, 1.0)
    for rows_bt in (company_bt, other_bt):
        assert float((rows_bt[0, :3] - alone_bt[0]).detach().abs().max()) <= 1e-5


def test_scores_are_bit_equal_when_computed_again(lab: Lab) -> None:
    first, again = score(lab.policy, short=True), score(lab.policy, short=True)
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(g, again[2][name]) for name, g in first[2].items())


def test_without_its_adapter_the_policy_scores_as_the_base(lab: Lab) -> None:
    base = Policy.load(lab.folder, lab.policy.lora, seed=0)
    ours_bt, _ = lab.policy.logprobs_bt(PROMPTS, COMPLETIONS, 1.0)
    base_bt, _ = base.logprobs_bt(PROMPTS, COMPLETIONS, 1.0)
    with lab.policy.reference():
        reference_bt, _ = lab.policy.logprobs_bt(PROMPTS, COMPLETIONS, 1.0)
    mask_bt = row_mask(COMPLETIONS, 4)
    assert np.allclose(reference_bt[mask_bt].detach(), base_bt[mask_bt].detach(), atol=1e-6)
    assert not np.allclose(ours_bt[mask_bt].detach(), base_bt[mask_bt].detach(), atol=1e-2)
