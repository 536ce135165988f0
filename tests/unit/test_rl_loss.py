"""Losses agree with TRL in value and gradient, and nothing past a row's end can touch them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from shoal.protocol.learning import (
    AdvantageScale,
    CorrectionSpec,
    LossKind,
    LossSpec,
    OldPolicy,
    RatioBound,
)
from shoal.rl.loss import (
    LossSums,
    TokenLogprobs,
    counted_tokens,
    every_row_teaches,
    loss_divisor,
    loss_sums,
)

torch.set_num_threads(1)
GOLDEN = json.loads((Path(__file__).parents[1] / "vectors" / "trl_golden_losses.json").read_text())
CASES: list[dict[str, Any]] = GOLDEN["cases"]
PROXIMAL = CorrectionSpec(old_policy=OldPolicy.PROXIMAL)
TIS = PROXIMAL.model_copy(update={"sequence_bound": RatioBound.NONE})
UNCORRECTED = TIS.model_copy(update={"token_bound": RatioBound.NONE})
ROWS, MAX_TOKENS = len(GOLDEN["adv"]), int(GOLDEN["max_completion_length"])


def spec_of(case: dict[str, Any]) -> LossSpec:
    kind = LossKind(case["loss_type"])
    if case.get("level") == "sequence" and kind is LossKind.GRPO:
        kind = LossKind.GSPO
    low = case.get("eps", 0.2)
    spec = LossSpec(
        kind=kind,
        kl_beta=case.get("beta", 0.0),
        kl_bias_correction=case.get("bias", True),
        correction=TIS if "tis" in case else UNCORRECTED,
    )
    # One case is TRL's CISPO trap, which a spec refuses; it is copied past the check.
    high = case.get("eps_hi", low)
    clips = {"clip_low": low, "clip_high": high, "clip_delta": case.get("delta")}
    return spec.model_copy(update=clips)


def golden_mask() -> torch.Tensor:
    return torch.tensor(GOLDEN["mask"]).bool()


def golden_logprobs(spec: LossSpec) -> TokenLogprobs:
    return TokenLogprobs(
        current=torch.tensor(GOLDEN["new"], requires_grad=True),
        proximal=torch.tensor(GOLDEN["old"]),
        behaviour=torch.tensor(GOLDEN["sampling"]),
        reference=torch.tensor(GOLDEN["ref"]) if spec.kl_beta else None,
    )


def sums_of(
    spec: LossSpec, logprobs: TokenLogprobs, rows: slice = slice(None), cut: int = -1
) -> LossSums:
    """The loss over ``rows`` of the golden batch; row ``cut`` hit the length limit."""
    return loss_sums(
        spec,
        TokenLogprobs(
            current=logprobs.current[rows],
            proximal=logprobs.proximal[rows],
            behaviour=logprobs.behaviour[rows],
            reference=None if logprobs.reference is None else logprobs.reference[rows],
        ),
        torch.tensor(GOLDEN["adv"])[rows],
        golden_mask()[rows],
        (torch.arange(ROWS) == cut)[rows],
    )


def golden_divisor(spec: LossSpec) -> float:
    return loss_divisor(
        spec, num_tokens=int(golden_mask().sum()), num_rows=ROWS, max_tokens=MAX_TOKENS
    )


def plain_loss(case: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """TRL's loss written out token by token in double precision, and what it depends on."""
    new = torch.tensor(GOLDEN["new"], dtype=torch.float64, requires_grad=True)
    low, beta = case.get("eps", 0.2), case.get("beta", 0.0)
    high, kind = case.get("eps_hi", case.get("eps", 0.2)), case["loss_type"]
    rows = []
    for b in range(ROWS):
        advantage, length = GOLDEN["adv"][b], int(sum(GOLDEN["mask"][b]))
        log_ratios = [new[b, t] - GOLDEN["old"][b][t] for t in range(length)]
        if case.get("level") == "sequence":
            log_ratios = [sum(log_ratios) / length] * length
        terms = []
        for t, log_ratio in enumerate(log_ratios):
            ratio = torch.exp(log_ratio)
            if kind == "cispo":
                term = -min(float(ratio.detach()), high) * advantage * new[b, t]
            elif kind == "sapo":
                tau = 1.0 if advantage > 0 else 1.05
                term = -4 / tau / (1 + torch.exp(-tau * (ratio - 1))) * advantage
            else:
                bounded = torch.clamp(ratio, max=case.get("delta", math.inf))
                clipped = torch.clamp(ratio, 1 - low, 1 + high)
                term = -torch.minimum(bounded * advantage, clipped * advantage)
            if "tis" in case:
                term = term * min(math.exp(GOLDEN["old"][b][t] - GOLDEN["sampling"][b][t]), 2.0)
            if beta:
                gap = GOLDEN["ref"][b][t] - new[b, t]
                kl = torch.exp(gap) - gap - 1
                term = term + beta * (kl * ratio if case.get("bias", True) else kl)
            terms.append(term)
        rows.append(torch.stack(terms))
    if kind in ("grpo", "sapo"):
        return torch.stack([row.mean() for row in rows]).mean(), new
    if kind == "luspo":
        return torch.stack([row.sum() for row in rows]).mean(), new
    total = torch.cat(rows).sum()
    return total / (ROWS * MAX_TOKENS if kind == "dr_grpo" else sum(map(len, rows))), new


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(v) for v in c.values()))
def test_value_and_gradient_equal_trl(case: dict[str, Any]) -> None:
    spec = spec_of(case)
    logprobs = golden_logprobs(spec)
    loss = sums_of(spec, logprobs).loss / golden_divisor(spec)
    (gradient,) = torch.autograd.grad(loss, logprobs.current)
    plain, new = plain_loss(case)
    (plain_gradient,) = torch.autograd.grad(plain, new)
    assert plain.item() == pytest.approx(case["loss"], abs=1e-6)
    assert loss.item() == pytest.approx(case["loss"], abs=1e-6)
    assert torch.allclose(gradient.double(), plain_gradient, rtol=0, atol=1e-6)


def test_all_fifteen_cases_cover_every_kind() -> None:
    assert len(CASES) == 15
    assert {spec_of(case).kind for case in CASES} == set(LossKind)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(v) for v in c.values()))
def test_what_stands_past_the_end_cannot_poison_the_sum(case: dict[str, Any]) -> None:
    spec = spec_of(case).model_copy(update={"kl_beta": 0.1, "correction": PROXIMAL})
    clean = golden_logprobs(spec)
    garbage = [math.nan, math.inf, -math.inf, 1e4]
    for value in garbage:
        poisoned = golden_logprobs(spec)
        with torch.no_grad():
            for tensor in vars(poisoned).values():
                tensor[~golden_mask()] = value
        sums = sums_of(spec, poisoned)
        (gradient,) = torch.autograd.grad(sums.loss, poisoned.current)
        expected = sums_of(spec, clean)
        assert sums.loss.item() == expected.loss.item()
        assert sums.stats == expected.stats
        assert torch.isfinite(gradient).all()
        assert not gradient[~golden_mask()].any()


@pytest.mark.parametrize("kind", LossKind)
@pytest.mark.parametrize("gap", [-500.0, 500.0])
def test_extreme_log_ratios_stay_finite(kind: LossKind, gap: float) -> None:
    old_policies = (OldPolicy.PROXIMAL, OldPolicy.BEHAVIOUR)
    for spec in (
        LossSpec(kind=kind, kl_beta=0.1, correction=CorrectionSpec(old_policy=old))
        for old in old_policies
    ):
        current = torch.full((2, 3), -600.0 + min(gap, 0.0), requires_grad=True)
        far = torch.full((2, 3), -600.0 + min(gap, 0.0) - gap)
        sums = loss_sums(
            spec,
            TokenLogprobs(current=current, proximal=far, behaviour=far + gap, reference=far),
            torch.tensor([1.0, -1.0]),
            torch.ones(2, 3, dtype=torch.bool),
            torch.zeros(2, dtype=torch.bool),
        )
        (gradient,) = torch.autograd.grad(sums.loss, current)
        assert torch.isfinite(gradient).all()
        assert all(math.isfinite(value) for value in vars(sums.stats).values())


def test_an_old_policy_is_the_one_the_spec_names() -> None:
    ratios = {}
    for old in OldPolicy:
        spec = LossSpec(correction=CorrectionSpec(old_policy=old))
        logprobs = TokenLogprobs(
            current=torch.tensor([[-1.0]], requires_grad=True),
            proximal=torch.tensor([[-1.0]]),
            behaviour=torch.tensor([[-1.0 - math.log(1.5)]]),
            reference=None,
        )
        one = torch.ones(1, 1, dtype=torch.bool)
        sums = loss_sums(spec, logprobs, torch.tensor([1.0]), one, torch.tensor([False]))
        (gradient,) = torch.autograd.grad(sums.loss, logprobs.current)
        ratios[old] = -gradient.item()
    # Behaviour: the ratio 1.5 is beyond the clip.  Proximal: ratio 1, weighted by 1.5.
    assert ratios == {
        OldPolicy.BEHAVIOUR: 0.0,
        OldPolicy.PROXIMAL: pytest.approx(1.5),
    }


def test_clipped_tokens_are_counted_and_have_no_gradient() -> None:
    current = torch.tensor([[0.0, -2.0], [-3.0, -2.0]], requires_grad=True)
    old = torch.tensor([[-1.0, -2.0], [-1.0, -2.0]])
    sums = loss_sums(
        LossSpec(correction=UNCORRECTED),
        TokenLogprobs(current=current, proximal=old, behaviour=old, reference=None),
        torch.tensor([1.0, -1.0]),
        torch.ones(2, 2, dtype=torch.bool),
        torch.zeros(2, dtype=torch.bool),
    )
    (gradient,) = torch.autograd.grad(sums.loss, current)
    assert gradient.tolist() == [[0.0, -1.0], [0.0, 1.0]]
    assert (sums.stats.clipped_high, sums.stats.clipped_low) == (1.0, 1.0)
    assert (sums.stats.num_tokens, sums.stats.live_tokens) == (4.0, 2.0)
    metrics = sums.stats.metrics()
    assert metrics["clip_ratio/high_mean"] == metrics["clip_ratio/low_mean"] == 0.25
    assert metrics["clip_ratio/region_mean"] == 0.5
    assert (metrics["clip_ratio/low_min"], metrics["clip_ratio/high_max"]) == (0.0, 0.5)


def test_a_clipped_cispo_token_keeps_its_gradient() -> None:
    current = torch.tensor([[0.0]], requires_grad=True)
    old = torch.tensor([[-3.0]])
    spec = LossSpec(kind=LossKind.CISPO, correction=UNCORRECTED)
    one = torch.ones(1, 1, dtype=torch.bool)
    sums = loss_sums(
        spec,
        TokenLogprobs(current=current, proximal=old, behaviour=old, reference=None),
        torch.tensor([1.0]),
        one,
        torch.tensor([False]),
    )
    (gradient,) = torch.autograd.grad(sums.loss, current)
    assert gradient.item() == -5.0
    assert sums.stats.clipped_high == 1.0


def test_two_sided_clipping_bounds_negative_advantages() -> None:
    gradients = {}
    for delta in (None, 4.0):
        current = torch.tensor([[0.0]], requires_grad=True)
        old = torch.tensor([[-3.0]])
        sums = loss_sums(
            LossSpec(clip_delta=delta, correction=UNCORRECTED),
            TokenLogprobs(current=current, proximal=old, behaviour=old, reference=None),
            torch.tensor([-1.0]),
            torch.ones(1, 1, dtype=torch.bool),
            torch.tensor([False]),
        )
        (gradient,) = torch.autograd.grad(sums.loss, current)
        gradients[delta] = gradient.item()
    assert gradients == {None: pytest.approx(math.exp(3.0)), 4.0: 0.0}


@pytest.mark.parametrize("kind", LossKind)
def test_the_overlong_mask_takes_truncated_rows_out(kind: LossKind) -> None:
    spec = LossSpec(kind=kind, mask_truncated=True, kl_beta=0.1)
    logprobs = golden_logprobs(spec)
    masked = sums_of(spec, logprobs, cut=0)
    (gradient,) = torch.autograd.grad(masked.loss, logprobs.current)
    rest = sums_of(spec, logprobs, rows=slice(1, None))
    assert masked.loss.item() == pytest.approx(rest.loss.item(), abs=1e-6)
    assert not gradient[0].any()
    assert gradient[1].any()
    assert not masked.mask_bt[0].any()
    kept = sums_of(spec.model_copy(update={"mask_truncated": False}), logprobs, cut=0)
    assert kept.loss.item() != masked.loss.item()


def test_the_overlong_mask_and_the_divisor_are_trls() -> None:
    lengths, cut = [5, 3, 4], [True, False, False]
    for kind in LossKind:
        spec = LossSpec(kind=kind, mask_truncated=True)
        tokens = counted_tokens(spec, lengths, cut)
        assert tokens == 7
        divisor = loss_divisor(spec, num_tokens=tokens, num_rows=3, max_tokens=8)
        by_rows = {LossKind.DR_GRPO: 24.0} | dict.fromkeys(
            (LossKind.GRPO, LossKind.SAPO, LossKind.GSPO, LossKind.LUSPO), 3.0
        )
        assert divisor == by_rows.get(kind, 7.0)
    assert counted_tokens(LossSpec(), lengths, cut) == 12
    everything_cut = loss_divisor(LossSpec(), num_tokens=0, num_rows=3, max_tokens=8)
    assert everything_cut == 1.0


def test_a_batch_without_tokens_has_no_loss_and_no_metrics() -> None:
    spec = LossSpec(mask_truncated=True)
    logprobs = golden_logprobs(spec)
    sums = loss_sums(
        spec,
        logprobs,
        torch.tensor(GOLDEN["adv"]),
        golden_mask(),
        torch.ones(ROWS, dtype=torch.bool),
    )
    (gradient,) = torch.autograd.grad(sums.loss, logprobs.current)
    assert sums.loss.item() == 0.0
    assert not gradient.any()
    assert sums.stats.metrics() == {}
    assert all(math.isfinite(value) for value in vars(sums.stats).values())
    whole = sums_of(LossSpec(), logprobs).stats
    assert (sums.stats + whole).metrics() == whole.metrics()


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_only_a_kl_term_teaches_rows_without_advantage(beta: float) -> None:
    spec = LossSpec(kl_beta=beta)
    logprobs = golden_logprobs(spec)
    sums = loss_sums(
        spec, logprobs, torch.zeros(ROWS), golden_mask(), torch.zeros(ROWS, dtype=torch.bool)
    )
    (gradient,) = torch.autograd.grad(sums.loss, logprobs.current)
    assert bool(gradient.any()) == every_row_teaches(spec) == (beta > 0)


def test_kl_is_reported_exactly_when_the_loss_has_it() -> None:
    with_kl, without = LossSpec(kl_beta=0.1, kl_bias_correction=False), LossSpec()
    stats = sums_of(with_kl, golden_logprobs(with_kl)).stats
    mask = golden_mask()
    gap = (torch.tensor(GOLDEN["ref"]) - torch.tensor(GOLDEN["new"]))[mask].double()
    expected = (gap.exp() - gap - 1).mean().item()
    assert stats.metrics()["kl"] == pytest.approx(expected, rel=1e-5)
    assert "kl" not in sums_of(without, golden_logprobs(without)).stats.metrics()


@pytest.mark.parametrize(
    ("fields", "trap"),
    [
        ({"kind": LossKind.CISPO, "clip_high": 0.2}, "largest ratio"),
        ({"clip_delta": 1.25}, "inside the clip"),
        ({"kind": LossKind.SAPO, "clip_delta": 4.0}, "clip_delta"),
    ],
)
def test_traps_are_refused_by_name(fields: dict[str, Any], trap: str) -> None:
    with pytest.raises(ValidationError, match=trap):
        LossSpec.model_validate(fields)


def test_each_kind_has_its_usual_values_and_keeps_what_is_said() -> None:
    assert LossSpec(kind=LossKind.CISPO).clip_high == 5.0
    assert LossSpec(kind=LossKind.GSPO).clip_low == 3e-4
    assert LossSpec(kind=LossKind.DR_GRPO).advantage_scale is AdvantageScale.NONE
    said = LossSpec(kind=LossKind.DR_GRPO, advantage_scale=AdvantageScale.BATCH_STD, clip_low=0.1)
    assert (said.advantage_scale, said.clip_low) == (AdvantageScale.BATCH_STD, 0.1)
    assert said.digest() != LossSpec(kind=LossKind.DR_GRPO).digest()
