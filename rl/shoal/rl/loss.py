"""Policy losses as sums over tokens, so that slices of a batch add up exactly.

Axes: ``b`` row (completion), ``t`` position in the completion.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shoal.protocol.learning import LossKind, LossSpec


@dataclass(frozen=True, kw_only=True)
class LossSums:
    """The loss sum, differentiable, and what was counted on the way."""

    loss: torch.Tensor
    num_tokens: torch.Tensor
    clipped_low: torch.Tensor
    clipped_high: torch.Tensor
    log_ratio: torch.Tensor


def loss_sums(
    spec: LossSpec,
    logprobs_bt: torch.Tensor,
    old_logprobs_bt: torch.Tensor,
    advantages_b: torch.Tensor,
    mask_bt: torch.Tensor,
) -> LossSums:
    """The loss of ``spec`` summed over the tokens ``mask_bt`` marks.

    ``old_logprobs_bt`` are the behaviour log-probabilities the tokens were drawn with, so
    the ratio also corrects for a sampler some versions old.
    """
    match spec.kind:
        case LossKind.DAPO:
            return _dapo(spec, logprobs_bt, old_logprobs_bt, advantages_b, mask_bt)
        case _:
            raise NotImplementedError(spec.kind)


def _dapo(
    spec: LossSpec,
    logprobs_bt: torch.Tensor,
    old_logprobs_bt: torch.Tensor,
    advantages_b: torch.Tensor,
    mask_bt: torch.Tensor,
) -> LossSums:
    """Σ −min(r·Â, clip(r, 1 − ε_low, 1 + ε_high)·Â).

    Source: DAPO, arXiv 2503.14476, eq. 8 before the division by the token count.
    """
    # Masked before exp: whatever stands past a row's end must not become 0 · inf.
    log_ratio_bt = (logprobs_bt - old_logprobs_bt).masked_fill(~mask_bt, 0.0)
    ratio_bt = log_ratio_bt.exp()
    advantages_b1 = advantages_b.unsqueeze(1)
    low, high = 1.0 - spec.clip_low, 1.0 + spec.clip_high
    gain_bt = torch.min(ratio_bt * advantages_b1, ratio_bt.clamp(low, high) * advantages_b1)
    return LossSums(
        loss=-(gain_bt * mask_bt).sum(),
        num_tokens=mask_bt.sum(),
        clipped_low=((ratio_bt < low) & (advantages_b1 < 0) & mask_bt).sum(),
        clipped_high=((ratio_bt > high) & (advantages_b1 > 0) & mask_bt).sum(),
        log_ratio=log_ratio_bt.sum(),
    )
