"""Policy losses as sums over rows, so that slices of a batch add up exactly.

A loss is a token term (or one term for the row), summed over a row's tokens, divided by the
row's length or not, summed over the rows, and divided once for the whole batch:

==========  ================  ==========  =====================  ==========================
kind        ratio             row         divisor of the batch   Source
==========  ================  ==========  =====================  ==========================
grpo        token             mean        rows                   arXiv 2402.03300 eq. 3
dapo        token             sum         tokens                 arXiv 2503.14476 eq. 8
dr_grpo     token             sum         rows × max_tokens      arXiv 2503.20783
bnpo        token             sum         tokens                 TRL ``loss_type="bnpo"``
gspo        sequence          mean        rows                   arXiv 2507.18071 eq. 5, 7
cispo       token, no grad    sum         tokens                 arXiv 2506.13585 eq. 4, 5
sapo        token, soft gate  mean        rows                   arXiv 2511.20347
luspo       sequence          sum         rows                   arXiv 2602.05261
==========  ================  ==========  =====================  ==========================

A batch here is the whole batch of an update, however many slices it is cut into; so BNPO,
DAPO's mean over the batch at hand, equals DAPO.

Axes: ``b`` row (completion), ``t`` position in the completion, ``1`` one value for the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shoal.protocol.learning import LossKind, LossSpec, OldPolicy, SequenceStatistic
from shoal.rl.batch import NO_MINIMUM, GradientStats
from shoal.rl.correction import Correction, correct, log_ratio, sequence_log_ratio

SEQUENCE_KINDS = frozenset({LossKind.GSPO, LossKind.LUSPO})
ROW_MEAN_KINDS = frozenset({LossKind.GRPO, LossKind.SAPO, LossKind.GSPO})


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities of the drawn tokens, each (b, t); past a row's end anything may stand.

    ``current`` is the policy being updated and alone has a gradient; ``proximal`` the policy
    at the start of the update; ``behaviour`` the policy that drew the tokens; ``reference``
    the base, present exactly when the loss has a KL term.
    """

    current: torch.Tensor
    proximal: torch.Tensor
    behaviour: torch.Tensor
    reference: torch.Tensor | None


@dataclass(frozen=True, kw_only=True)
class LossSums:
    """The loss sum, differentiable; what was counted; the tokens that counted, (b, t)."""

    loss: torch.Tensor
    stats: GradientStats
    mask_bt: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class _Ratio:
    """π_θ/π_old by token, (b, t), or by row, (b, 1), and where the clip took the gradient."""

    value: torch.Tensor
    clipped_low: torch.Tensor
    clipped_high: torch.Tensor


def loss_sums(
    spec: LossSpec,
    logprobs: TokenLogprobs,
    advantages_b: torch.Tensor,
    mask_bt: torch.Tensor,
    truncated_b: torch.Tensor,
) -> LossSums:
    """The loss of ``spec`` summed over the rows, before `loss_divisor` divides it.

    ``mask_bt`` marks the tokens of each row; ``truncated_b`` the rows cut at the length limit,
    which leave the loss if the spec masks them.
    """
    if spec.mask_truncated:
        mask_bt = mask_bt & ~truncated_b.unsqueeze(1)
    advantages_b1 = advantages_b.unsqueeze(1)
    old_bt = logprobs.proximal
    if spec.correction.old_policy is OldPolicy.BEHAVIOUR:
        old_bt = logprobs.behaviour
    log_ratio_bt = log_ratio(logprobs.current, old_bt, mask_bt)
    ratio = _ratio(spec, log_ratio_bt, advantages_b1, mask_bt)
    correction = correct(spec.correction, logprobs.proximal, logprobs.behaviour, mask_bt)
    current_bt = logprobs.current.masked_fill(~mask_bt, 0.0)
    terms_bt = correction.weight_bt * _policy_term(spec, ratio.value, current_bt, advantages_b1)
    kl_bt = None
    if logprobs.reference is not None and spec.kl_beta > 0:
        weight = ratio.value if spec.kl_bias_correction else None
        kl_bt = k3_kl(logprobs.current, logprobs.reference, mask_bt, weight)
        terms_bt = terms_bt + spec.kl_beta * kl_bt
    row_sums_b1 = (terms_bt * mask_bt).sum(dim=1, keepdim=True)
    if spec.kind in ROW_MEAN_KINDS:
        row_sums_b1 = row_sums_b1 / mask_bt.sum(dim=1, keepdim=True).clamp(min=1)
    loss = row_sums_b1.sum()
    with torch.no_grad():
        stats = _stats(loss, ratio, correction, kl_bt, mask_bt)
    return LossSums(loss=loss, stats=stats, mask_bt=mask_bt)


def loss_divisor(spec: LossSpec, *, num_tokens: int, num_rows: int, max_tokens: int) -> float:
    """What the loss sum of a whole batch is divided by, once.

    ``num_tokens`` are the batch's `counted_tokens` and ``num_rows`` all its rows, with those
    that teach nothing and those that a mask drops: else a drop would raise the learning rate.
    Rows cut at the length limit leave ``num_tokens`` when the spec masks them, and stay in
    ``num_rows``, as in TRL 1.16.
    """
    match spec.kind:
        case LossKind.DAPO | LossKind.BNPO | LossKind.CISPO:
            return float(max(num_tokens, 1))
        case LossKind.GRPO | LossKind.SAPO | LossKind.GSPO | LossKind.LUSPO:
            return float(max(num_rows, 1))
        case LossKind.DR_GRPO:
            return float(max(num_rows, 1) * max_tokens)


def counted_tokens(spec: LossSpec, lengths: Sequence[int], truncated: Sequence[bool]) -> int:
    """The tokens of rows of these lengths that the loss counts."""
    if not spec.mask_truncated:
        return sum(lengths)
    return sum(n for n, cut in zip(lengths, truncated, strict=True) if not cut)


def every_row_teaches(spec: LossSpec) -> bool:
    """Whether rows without advantage have a gradient too: those of a KL term do."""
    return spec.kl_beta > 0


def clipped_term(
    ratio: torch.Tensor,
    advantages: torch.Tensor,
    clip_low: float,
    clip_high: float,
    delta: float | None = None,
) -> torch.Tensor:
    """−min(min(r, δ)·Â, clip(r, 1 − ε_low, 1 + ε_high)·Â); without ``delta``, δ is infinite.

    Source: PPO, arXiv 1707.06347 eq. 7; decoupled clip, DAPO, arXiv 2503.14476 eq. 8;
    two-sided clip, INTELLECT-2, arXiv 2505.07291.
    """
    unclipped = ratio if delta is None else ratio.clamp(max=delta)
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return -torch.min(unclipped * advantages, clipped * advantages)


def cispo_term(
    ratio: torch.Tensor, logprobs: torch.Tensor, advantages: torch.Tensor, ratio_max: float
) -> torch.Tensor:
    """−sg[min(r, ε_max)]·Â·log π: a clipped token keeps its gradient, with a bounded weight.

    Source: CISPO, arXiv 2506.13585 eq. 4 and 5.
    """
    return -ratio.detach().clamp(max=ratio_max) * advantages * logprobs


def sapo_term(
    ratio: torch.Tensor,
    advantages: torch.Tensor,
    temperature_positive: float,
    temperature_negative: float,
) -> torch.Tensor:
    """−(4/τ)·σ(τ·(r − 1))·Â, τ by the sign of Â: a soft gate where others clip.

    Source: SAPO, arXiv 2511.20347.
    """
    tau = torch.where(advantages > 0, temperature_positive, temperature_negative)
    return -(torch.sigmoid(tau * (ratio - 1.0)) * 4.0 / tau) * advantages


def k3_kl(
    logprobs_bt: torch.Tensor,
    reference_bt: torch.Tensor,
    mask_bt: torch.Tensor,
    ratio: torch.Tensor | None,
) -> torch.Tensor:
    """The k3 estimate of KL(π_θ ‖ reference) at each token, (b, t).

    A ``ratio`` π_θ/π_old, by token or by row, weights it with its gradient, so that its
    expectation stays right where tokens came from the old policy.

    Source: Schulman 2020, "Approximating KL divergence"; GRPO, arXiv 2402.03300 eq. 4; bias
    correction, DeepSeek-V3.2, arXiv 2512.02556 §3.1 eq. 7.
    """
    difference_bt = log_ratio(reference_bt, logprobs_bt, mask_bt)
    kl_bt = difference_bt.exp() - difference_bt - 1.0
    return kl_bt if ratio is None else kl_bt * ratio


def _policy_term(
    spec: LossSpec, ratio: torch.Tensor, logprobs_bt: torch.Tensor, advantages_b1: torch.Tensor
) -> torch.Tensor:
    if spec.kind is LossKind.CISPO:
        return cispo_term(ratio, logprobs_bt, advantages_b1, spec.clip_high)
    if spec.kind is LossKind.SAPO:
        taus = (spec.sapo_temperature_positive, spec.sapo_temperature_negative)
        return sapo_term(ratio, advantages_b1, *taus)
    return clipped_term(ratio, advantages_b1, spec.clip_low, spec.clip_high, spec.clip_delta)


def _ratio(
    spec: LossSpec, log_ratio_bt: torch.Tensor, advantages_b1: torch.Tensor, mask_bt: torch.Tensor
) -> _Ratio:
    if spec.kind in SEQUENCE_KINDS:
        value = sequence_log_ratio(log_ratio_bt, mask_bt, SequenceStatistic.MEAN).exp()
    else:
        value = log_ratio_bt.exp()
    ratio = value.detach()
    never = torch.zeros_like(ratio, dtype=torch.bool)
    match spec.kind:
        case LossKind.SAPO:
            low, high = never, never
        case LossKind.CISPO:
            low, high = never, (ratio > spec.clip_high) & (advantages_b1 > 0)
        case _:
            low = (ratio < 1.0 - spec.clip_low) & (advantages_b1 < 0)
            high = (ratio > 1.0 + spec.clip_high) & (advantages_b1 > 0)
    return _Ratio(value=value, clipped_low=low, clipped_high=high)


def _stats(
    loss: torch.Tensor,
    ratio: _Ratio,
    correction: Correction,
    kl_bt: torch.Tensor | None,
    mask_bt: torch.Tensor,
) -> GradientStats:
    """Everything that is counted, brought from the device in one piece."""
    rows_b1 = mask_bt.any(dim=1, keepdim=True)
    # One clip decision for each token, or for each row that has tokens.
    decided = mask_bt if ratio.value.shape == mask_bt.shape else rows_b1
    low, high = ratio.clipped_low & decided, ratio.clipped_high & decided
    raw_bt, weight_bt = correction.ratio_bt, correction.weight_bt
    mismatch_bt = raw_bt - raw_bt.log() - 1.0
    values: dict[str, torch.Tensor] = {
        "loss_sum": loss,
        "num_tokens": mask_bt.sum(),
        "num_rows": rows_b1.sum(),
        "live_tokens": (mask_bt & (weight_bt > 0) & ~(low | high)).sum(),
        "num_clippable": decided.sum(),
        "clipped_low": low.sum(),
        "clipped_high": high.sum(),
        "clipped_low_min": _least(_row_means(low, decided), rows_b1),
        "clipped_high_max": _most(_row_means(high, decided), rows_b1),
        "mismatch_kl_sum": _total(mismatch_bt, mask_bt),
        "mismatch_kl_max": _most(mismatch_bt, mask_bt),
        "raw_ratio_sum": _total(raw_bt, mask_bt),
        "raw_ratio_min": _least(raw_bt, mask_bt),
        "raw_ratio_max": _most(raw_bt, mask_bt),
        "weight_sum": _total(weight_bt, mask_bt),
        "weight_min": _least(weight_bt, mask_bt),
        "weight_max": _most(weight_bt, mask_bt),
        "masked_tokens": (mask_bt & ~correction.kept_bt).sum(),
    }
    if kl_bt is not None:
        values |= {"kl_sum": _total(kl_bt, mask_bt), "kl_tokens": mask_bt.sum()}
    numbers = torch.stack([value.to(loss.dtype) for value in values.values()]).tolist()
    return GradientStats(**dict(zip(values, numbers, strict=True)))


def _row_means(flags: torch.Tensor, decided: torch.Tensor) -> torch.Tensor:
    counts_b1 = decided.sum(dim=1, keepdim=True).clamp(min=1)
    return flags.sum(dim=1, keepdim=True) / counts_b1


def _total(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (values * mask).sum()


def _most(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The largest value under the mask; none is below 0."""
    return values.masked_fill(~mask, 0.0).max()


def _least(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return values.masked_fill(~mask, NO_MINIMUM).min()
