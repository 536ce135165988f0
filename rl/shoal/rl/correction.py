"""Off-policy correction: what a token's loss is weighted by, and which tokens are dropped.

Three policies: *behaviour* μ drew the tokens, *proximal* π_prox stands at the start of the
update, *current* π_θ is differentiated.  Everything here is about π_prox/μ and has no gradient.
Tests on ratios are made in log space, where nothing overflows.

Axes: ``b`` row (completion), ``t`` position in the completion, ``1`` one value for the row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from shoal.protocol.learning import CorrectionSpec, OldPolicy, RatioBound, SequenceStatistic

MAX_LOG_RATIO = 20.0
"""Log-ratios are cut here before ``exp``: e²⁰ is far outside every bound and finite in fp32.

Source: verl, ``SAFETY_BOUND`` of its rollout correction.
"""


@dataclass(frozen=True, kw_only=True)
class Correction:
    """What π_prox/μ does to each token.

    ``weight_bt`` multiplies the token's loss; ``kept_bt`` is false where a mask dropped the
    token, whose weight is then 0; ``ratio_bt`` is the untouched π_prox/μ.
    """

    weight_bt: torch.Tensor
    kept_bt: torch.Tensor
    ratio_bt: torch.Tensor


def log_ratio(
    numerator_bt: torch.Tensor, denominator_bt: torch.Tensor, mask_bt: torch.Tensor
) -> torch.Tensor:
    """The difference of log-probabilities, 0 outside the mask, cut to ±`MAX_LOG_RATIO`.

    Replaced before any ``exp``: what stands past a row's end must not become 0 · inf.
    """
    difference_bt = (numerator_bt - denominator_bt).masked_fill(~mask_bt, 0.0)
    return difference_bt.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def sequence_log_ratio(
    log_ratio_bt: torch.Tensor, mask_bt: torch.Tensor, statistic: SequenceStatistic
) -> torch.Tensor:
    """One log-ratio for each row, (b, 1): its tokens' mean (geometric mean) or sum (product).

    Source: the mean is GSPO's, arXiv 2507.18071 eq. 7; the sum is the exact ratio of the
    sequence, which leaves any bounds on long completions however small the mismatch is.
    """
    total_b1 = log_ratio_bt.sum(dim=1, keepdim=True)
    if statistic is SequenceStatistic.SUM:
        return total_b1
    return total_b1 / mask_bt.sum(dim=1, keepdim=True).clamp(min=1)


def truncated_weights(log_ratio_bt: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """The ratios, cut to ``[low, high]`` (TIS).

    Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training"; IMPALA's ρ̄, arXiv 1802.01561 §4.1.
    """
    return log_ratio_bt.clamp(max=MAX_LOG_RATIO).exp().clamp(low, high)


def masked_weights(log_ratio_bt: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """The ratios, 0 where they leave ``[low, high]`` (MIS).

    Source: IcePop, Ling Team 2025, "Every step evolves", arXiv 2510.18855 §3.2.
    """
    kept_bt = within(log_ratio_bt, low, high)
    return log_ratio_bt.masked_fill(~kept_bt, -torch.inf).clamp(max=MAX_LOG_RATIO).exp()


def within(log_ratio_bt: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Where the ratio lies in ``[low, high]``."""
    log_low = math.log(low) if low > 0 else -math.inf
    return (log_ratio_bt >= log_low) & (log_ratio_bt <= math.log(high))


def correct(
    spec: CorrectionSpec,
    proximal_bt: torch.Tensor,
    behaviour_bt: torch.Tensor,
    mask_bt: torch.Tensor,
) -> Correction:
    """The weights and masks ``spec`` asks for.

    Source: decoupled PPO, arXiv 2110.00641 eq. 3 (the weight π_prox/μ); geometric-mean sequence
    mask, Liu, Li et al. 2025, "When speed kills stability", part 3.
    """
    log_ratio_bt = log_ratio(proximal_bt, behaviour_bt, mask_bt)
    log_ratio_b1 = sequence_log_ratio(log_ratio_bt, mask_bt, spec.sequence_statistic)
    kept_bt = torch.ones_like(mask_bt)
    if spec.token_bound is RatioBound.MASK:
        kept_bt = within(log_ratio_bt, spec.token_min, spec.token_max)
    if spec.sequence_bound is RatioBound.MASK:
        kept_bt = kept_bt & within(log_ratio_b1, spec.sequence_min, spec.sequence_max)
    weight_bt = _weights(spec, log_ratio_bt, log_ratio_b1).expand_as(log_ratio_bt)
    return Correction(
        weight_bt=weight_bt.masked_fill(~kept_bt, 0.0),
        kept_bt=kept_bt,
        ratio_bt=log_ratio_bt.exp(),
    )


def _weights(
    spec: CorrectionSpec, log_ratio_bt: torch.Tensor, log_ratio_b1: torch.Tensor
) -> torch.Tensor:
    """The token's ratio, else its sequence's, else 1: (b, t) or (b, 1)."""
    if spec.old_policy is OldPolicy.PROXIMAL:
        if spec.token_bound is not RatioBound.NONE:
            return _bounded(spec.token_bound, log_ratio_bt, spec.token_min, spec.token_max)
        if spec.sequence_bound is not RatioBound.NONE:
            bounds = (spec.sequence_min, spec.sequence_max)
            return _bounded(spec.sequence_bound, log_ratio_b1, *bounds)
    return torch.ones_like(log_ratio_b1)


def _bounded(bound: RatioBound, log_ratio: torch.Tensor, low: float, high: float) -> torch.Tensor:
    if bound is RatioBound.TRUNCATE:
        return truncated_weights(log_ratio, low, high)
    return masked_weights(log_ratio, low, high)
