"""Teacher-forced log-probabilities over prompts that several completions share.

Each distinct prompt is run once; its keys and values are then repeated for its completions,
so a group of eight costs one prompt, forwards and backwards.  Prompts are padded on the
left and completions on the right, so all completions start at one column.

Axes: ``p`` distinct prompt, ``b`` row (completion), ``t`` position, ``v`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Tokens = Sequence[int] | NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Prefill:
    """Token sequences already run: their cache, mask, lengths and next-token logits."""

    cache: Any
    mask_pt: torch.Tensor
    lengths_p: torch.Tensor
    logits_pv: torch.Tensor

    def repeat(self, row_to_prompt: torch.Tensor) -> Prefill:
        """The rows numbered, each as often as it is named.  The cache is changed in place."""
        self.cache.batch_select_indices(row_to_prompt)
        return Prefill(
            cache=self.cache,
            mask_pt=self.mask_pt[row_to_prompt],
            lengths_p=self.lengths_p[row_to_prompt],
            logits_pv=self.logits_pv[row_to_prompt],
        )

    def join(self, other: Prefill) -> Prefill:
        """These rows, then those of ``other``.  The cache is changed in place."""
        width = max(self.mask_pt.shape[1], other.mask_pt.shape[1])
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            for name in ("keys", "values"):
                parts = (_left_padded(getattr(layer, name), width, 2) for layer in (mine, theirs))
                setattr(mine, name, torch.cat(list(parts)))
        masks = [_left_padded(state.mask_pt, width, 1) for state in (self, other)]
        return Prefill(
            cache=self.cache,
            mask_pt=torch.cat(masks),
            lengths_p=torch.cat([self.lengths_p, other.lengths_p]),
            logits_pv=torch.cat([self.logits_pv, other.logits_pv]),
        )


def _left_padded(values: torch.Tensor, width: int, axis: int) -> torch.Tensor:
    """``values`` with zeros before its first entry along ``axis``, ``width`` long there."""
    missing = list(values.shape)
    missing[axis] = width - values.shape[axis]
    return torch.cat([values.new_zeros(missing), values], dim=axis)


def distinct_prompts(prompts: Sequence[Tokens]) -> tuple[list[tuple[int, ...]], list[int]]:
    """The distinct prompts in order of first use, and for each row which one is its own."""
    numbers: dict[tuple[int, ...], int] = {}
    row_to_prompt = [
        numbers.setdefault(tuple(int(t) for t in prompt), len(numbers)) for prompt in prompts
    ]
    return list(numbers), row_to_prompt


def prefill(model: Any, prompts: Sequence[Tokens], device: torch.device) -> Prefill:
    """Runs non-empty ``prompts`` once each."""
    width = max(len(prompt) for prompt in prompts)
    ids_pt = torch.zeros(len(prompts), width, dtype=torch.long)
    mask_pt = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids_pt[row, width - len(prompt) :] = torch.as_tensor(prompt, dtype=torch.long)
        mask_pt[row, width - len(prompt) :] = 1
    ids_pt, mask_pt = ids_pt.to(device), mask_pt.to(device)
    positions_pt = (mask_pt.cumsum(dim=1) - 1).clamp_(min=0)
    output = model(
        input_ids=ids_pt,
        attention_mask=mask_pt,
        position_ids=positions_pt,
        use_cache=True,
        logits_to_keep=1,
    )
    return Prefill(
        cache=output.past_key_values,
        mask_pt=mask_pt,
        lengths_p=mask_pt.sum(dim=1),
        logits_pv=output.logits[:, -1].float(),
    )


def extend(model: Any, state: Prefill, next_b: torch.Tensor) -> Prefill:
    """``state`` after one more token per row.  The cache is changed in place."""
    mask_pt = torch.cat([state.mask_pt, torch.ones_like(next_b).unsqueeze(1)], dim=1)
    output = model(
        input_ids=next_b.unsqueeze(1),
        attention_mask=mask_pt,
        position_ids=state.lengths_p.unsqueeze(1),
        past_key_values=state.cache,
        use_cache=True,
    )
    return Prefill(
        cache=output.past_key_values,
        mask_pt=mask_pt,
        lengths_p=state.lengths_p + 1,
        logits_pv=output.logits[:, -1].float(),
    )


def completion_logits_btv(
    model: Any, prompts: Sequence[Tokens], completions: Sequence[Tokens], device: torch.device
) -> torch.Tensor:
    """Logits of every completion position, fp32, shape ``(rows, longest completion, vocabulary)``.

    Position ``t`` predicts token ``t`` of the completion; positions past a completion's end
    carry no meaning.
    """
    distinct, row_to_prompt = distinct_prompts(prompts)
    shared = prefill(model, distinct, device).repeat(torch.tensor(row_to_prompt, device=device))
    width = max(len(completion) for completion in completions)
    first_b1v = shared.logits_pv.unsqueeze(1)
    if width == 1:
        return first_b1v
    # The last token of a completion predicts nothing that is needed.
    ids_bt = padded(completions, width)[:, :-1].to(device)
    steps_t = torch.arange(width - 1, device=device)
    output = model(
        input_ids=ids_bt,
        attention_mask=torch.cat([shared.mask_pt, torch.ones_like(ids_bt)], dim=1),
        position_ids=shared.lengths_p.unsqueeze(1) + steps_t,
        past_key_values=shared.cache,
        use_cache=True,
    )
    return torch.cat([first_b1v, output.logits.float()], dim=1)


def padded(rows: Sequence[Tokens], width: int) -> torch.Tensor:
    """``rows`` as one integer tensor, zeros on the right."""
    flat = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
    ids_bt = torch.zeros(len(rows), width, dtype=torch.long)
    ids_bt[row_mask(rows, width)] = torch.from_numpy(flat)
    return ids_bt


def row_mask(rows: Sequence[Sized], width: int) -> torch.Tensor:
    """True where a row of ``rows``, padded on the right to ``width``, has an element."""
    lengths_b1 = torch.tensor([len(row) for row in rows]).unsqueeze(1)
    return torch.arange(width) < lengths_b1
