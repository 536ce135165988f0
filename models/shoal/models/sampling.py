"""Seeded sampling: one uniform number per token, and the token it selects.

Axes: ``b`` row, ``t`` position in the completion, ``v`` token of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

Uniforms = NDArray[np.float64]


def draw_uniforms_bt(seed: int, completions: Sequence[int], num_tokens: int) -> Uniforms:
    """The uniforms in [0, 1) that select the tokens of ``completions``, shape ``(rows, tokens)``.

    A row depends on ``seed`` and the completion's number alone, and an earlier position never
    on a later one, so that any party re-derives any token's uniform without the others.

    Source: Philox 4×64 (Salmon et al., SC 2011), key ``(seed, completion)``, counter 0.
    """
    uniforms_bt = np.empty((len(completions), num_tokens), dtype=np.float64)
    for row, completion in enumerate(completions):
        key = np.array([seed, completion], dtype=np.uint64)
        uniforms_bt[row] = np.random.Generator(np.random.Philox(key=key)).random(num_tokens)
    return uniforms_bt


def completion_numbers(slots: Sequence[int], group_size: int) -> list[int]:
    """The number of each completion of the prompts in ``slots``, in row order."""
    return [slot * group_size + place for slot in slots for place in range(group_size)]


def select_tokens_b(logprobs_bv: torch.Tensor, uniforms_b: torch.Tensor) -> torch.Tensor:
    """The token each uniform selects by the inverse of the cumulative distribution.

    The sum runs in double precision over token ids in ascending order; a token of
    probability zero is never selected.
    """
    cumulative_bv = logprobs_bv.double().exp_().cumsum(dim=-1)
    targets_b1 = uniforms_b.unsqueeze(1) * cumulative_bv[:, -1:]
    selected_b1 = torch.searchsorted(cumulative_bv, targets_b1, right=True)
    return selected_b1.squeeze(1).clamp_(max=logprobs_bv.shape[-1] - 1)
