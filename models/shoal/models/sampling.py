"""Seeded sampling: one uniform number per token, and the token it selects.

Axes: ``n`` distribution, ``g`` draw from one distribution, ``b`` row, ``t`` position in the
completion, ``v`` token of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

Uniforms = NDArray[np.float64]
_BLOCK = 64
"""Positions drawn at once; a multiple of the four doubles that one Philox counter gives."""


class UniformTable(Protocol):
    """Uniforms by row and position: an array of them, or `SeededUniforms`."""

    def __getitem__(self, key: tuple[NDArray[np.int64], NDArray[np.int64]], /) -> Any:
        """The uniform of each (row, position) pair."""
        ...


class SeededUniforms:
    """The uniforms in [0, 1) that select the tokens of ``completions``, drawn when asked for.

    A completion's uniforms depend on ``seed`` and its number alone, and position ``t`` needs
    no earlier draw, so that any party re-derives any token's uniform without the others.  A
    row holds one block of positions at a time: asking for growing positions is cheap.

    Source: Philox 4×64 (Salmon et al., SC 2011), key ``(seed, completion)``; position ``t``
    is double ``t`` of the stream that starts at counter 0.
    """

    def __init__(self, seed: int, completions: Sequence[int], num_tokens: int) -> None:
        self._completions = list(completions)
        width = min(-(-num_tokens // 4) * 4, _BLOCK)
        self._philox = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64))
        self._generator = np.random.Generator(self._philox)
        self._state: Any = self._philox.state
        self._first_b = np.full(len(self._completions), -1, dtype=np.int64)
        self._block_bt = np.empty((len(self._completions), width), dtype=np.float64)

    def __getitem__(self, key: tuple[NDArray[np.int64], NDArray[np.int64]], /) -> Uniforms:
        """The uniform of each (row, position) pair."""
        rows_n, positions_n = key
        width = self._block_bt.shape[1]
        first_n = positions_n - positions_n % width
        chosen_n: Uniforms = self._block_bt[rows_n, positions_n - first_n]
        for place in np.flatnonzero(self._first_b[rows_n] != first_n).tolist():
            row, first = int(rows_n[place]), int(first_n[place])
            self._draw(row, first)
            chosen_n[place] = self._block_bt[row, positions_n[place] - first]
        return chosen_n

    def _draw(self, row: int, first: int) -> None:
        """Row ``row`` holds the positions from ``first`` on."""
        # Setting a generator's state is four times quicker than building a generator.
        self._state["state"]["key"][1] = self._completions[row]
        self._state["state"]["counter"][:] = (first // 4, 0, 0, 0)
        self._state["buffer_pos"] = 4
        self._philox.state = self._state
        self._generator.random(out=self._block_bt[row])
        self._first_b[row] = first


def draw_uniforms_bt(seed: int, completions: Sequence[int], num_tokens: int) -> Uniforms:
    """All uniforms of ``completions`` at once, shape ``(rows, tokens)``; see `SeededUniforms`."""
    uniforms_bt = np.empty((len(completions), num_tokens), dtype=np.float64)
    for row, completion in enumerate(completions):
        key = np.array([seed, completion], dtype=np.uint64)
        uniforms_bt[row] = np.random.Generator(np.random.Philox(key=key)).random(num_tokens)
    return uniforms_bt


def completion_numbers(slots: Sequence[int], group_size: int) -> list[int]:
    """The number of each completion of the prompts in ``slots``, in row order."""
    return [slot * group_size + place for slot in slots for place in range(group_size)]


def select_tokens_b(logprobs_bv: torch.Tensor, uniforms_b: torch.Tensor) -> torch.Tensor:
    """`select_tokens_ng` with one draw from each distribution."""
    return select_tokens_ng(logprobs_bv, uniforms_b.unsqueeze(1)).squeeze(1)


def select_tokens_ng(logprobs_nv: torch.Tensor, uniforms_ng: torch.Tensor) -> torch.Tensor:
    """The token each uniform selects by the inverse of the cumulative distribution.

    This is the rule that sampler and verifier share: fp32 log-probabilities, their fp32
    exponentials summed in double precision over token ids in ascending order; the token is
    the first whose sum exceeds the uniform times the whole sum.  A token of probability zero
    is never selected.  Runs on the CPU where the device has no double precision.
    """
    device = logprobs_nv.device
    if device.type == "mps":
        logprobs_nv = logprobs_nv.cpu()
    cumulative_nv = logprobs_nv.exp().cumsum(dim=-1, dtype=torch.float64)
    targets_ng = uniforms_ng.to(cumulative_nv.device) * cumulative_nv[:, -1:]
    selected_ng = torch.searchsorted(cumulative_nv, targets_ng, right=True)
    return selected_ng.clamp_(max=logprobs_nv.shape[-1] - 1).to(device)
