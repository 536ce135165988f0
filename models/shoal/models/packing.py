"""Prompts and completions packed for one pass without padding or repeated work.

Each distinct prompt, and each distinct completion of it, stands in the pack once.  The last
token of a completion predicts nothing that is needed and is left out.  For attention the
tokens are laid out again as *sequences*: a prompt, and after it as many of its completions as
keep the sequence short; a mask keeps completions from seeing one another.

Axes: ``n`` packed token, ``s`` sequence, ``l`` place in a sequence, ``m`` token of a distinct
completion, ``k`` state that predicts (a prompt's last token, or a completion's), ``b`` row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from shoal.models.forward import Tokens, distinct_prompts

Ints = NDArray[np.int64]
SHARED_LENGTH = 128
"""Completions share a sequence up to this length: attention is quadratic in it, and below it
costs less than running more sequences."""


@dataclass(frozen=True, kw_only=True)
class Pack:
    """A pack, and where everything in it comes from and goes to."""

    ids_n: torch.Tensor
    positions_n: torch.Tensor
    table_sl: torch.Tensor
    """The packed token at each place; places past a sequence's end repeat token 0."""
    mask_s1ll: torch.Tensor | None
    """Minus infinity where a place does not see another; None for plain causal order."""
    place_n: torch.Tensor
    """Each packed token's place in the flattened ``table_sl``."""
    state_k: torch.Tensor
    """The packed token that is each state."""
    state_m: torch.Tensor
    """The state that predicts each token."""
    target_m: torch.Tensor
    offsets_u: Ints
    """Where each distinct completion's tokens start in ``m``; one more entry than completions."""
    row_to_distinct: Ints

    def to_rows(self, values_m: torch.Tensor) -> torch.Tensor:
        """``values_m`` as ``(rows, longest completion)``, zeros past a row's end."""
        lengths_u = np.diff(self.offsets_u)
        width = int(lengths_u.max())
        columns = np.arange(width)
        index_ut = np.minimum(self.offsets_u[:-1, None] + columns, len(values_m) - 1)
        outside_ut = columns >= lengths_u[:, None]
        index_bt = torch.from_numpy(index_ut[self.row_to_distinct]).to(values_m.device)
        outside_bt = torch.from_numpy(outside_ut[self.row_to_distinct]).to(values_m.device)
        gathered_bt = values_m.index_select(0, index_bt.flatten()).view(index_bt.shape)
        return gathered_bt.masked_fill(outside_bt, 0.0)


def pack_rows(
    prompts: Sequence[Tokens], completions: Sequence[Tokens], device: torch.device
) -> Pack:
    """The pack of one completion per prompt, row by row; equal rows stand in it once."""
    distinct, prompt_b = distinct_prompts(prompts)
    numbers: dict[tuple[int, bytes], int] = {}
    kept: list[Ints] = []
    prompt_u: list[int] = []
    row_to_distinct = np.empty(len(prompts), dtype=np.int64)
    for row, (prompt, completion) in enumerate(zip(prompt_b, completions, strict=True)):
        tokens = np.asarray(completion, dtype=np.int64)
        number = numbers.setdefault((prompt, tokens.tobytes()), len(kept))
        if number == len(kept):
            kept.append(tokens)
            prompt_u.append(prompt)
        row_to_distinct[row] = number
    parts = [np.asarray(prompt, dtype=np.int64) for prompt in distinct]
    return _pack(parts, kept, np.array(prompt_u), row_to_distinct, device)


def _pack(
    prompts: list[Ints],
    completions: list[Ints],
    prompt_u: Ints,
    row_to_distinct: Ints,
    device: torch.device,
) -> Pack:
    length_p = np.array([len(prompt) for prompt in prompts])
    length_u = np.array([len(tokens) - 1 for tokens in completions])
    first_p = length_p.cumsum() - length_p
    num_prompt_tokens = int(length_p.sum())
    first_u = num_prompt_tokens + length_u.cumsum() - length_u
    layout = _Layout(length_p, first_p)
    for number, prompt in enumerate(prompt_u.tolist()):
        layout.add(prompt, int(first_u[number]), int(length_u[number]))
    table_sl, mask_s1ll, place_n = layout.tables(num_prompt_tokens + int(length_u.sum()))
    offsets_u = np.concatenate([[0], (length_u + 1).cumsum()])
    # State k ≥ p is completion token k − p; a completion's first token is predicted by its
    # prompt's state, each other by the token before it.
    state_m = np.arange(offsets_u[-1]) - np.repeat(np.arange(len(completions)), length_u + 1)
    state_m += len(prompts) - 1
    state_m[offsets_u[:-1]] = prompt_u
    states = np.concatenate([first_p + length_p - 1, np.arange(num_prompt_tokens, len(place_n))])
    ids = np.concatenate([*prompts, *(tokens[:-1] for tokens in completions)])
    positions = np.concatenate(
        [
            *(np.arange(length) for length in length_p),
            *(length_p[p] + np.arange(n) for p, n in zip(prompt_u, length_u, strict=True)),
        ]
    )

    def tensor(array: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return Pack(
        ids_n=tensor(ids),
        positions_n=tensor(positions),
        table_sl=tensor(table_sl),
        mask_s1ll=None if mask_s1ll is None else mask_s1ll.to(device),
        place_n=tensor(place_n),
        state_k=tensor(states),
        state_m=tensor(state_m),
        target_m=tensor(np.concatenate(completions)),
        offsets_u=offsets_u,
        row_to_distinct=row_to_distinct,
    )


@dataclass
class _Layout:
    """Sequences while they are filled."""

    length_p: Ints
    first_p: Ints
    _sequences: list[list[tuple[int, int]]] = field(default_factory=list)
    """Per sequence its spans of packed tokens (first, length); the first span is a prompt."""
    _lengths: list[int] = field(default_factory=list)
    _open: dict[int, int] = field(default_factory=dict)

    def add(self, prompt: int, first: int, length: int) -> None:
        """Puts a completion into its prompt's open sequence, or a new one."""
        number = self._open.get(prompt)
        if number is None or self._lengths[number] + length > SHARED_LENGTH:
            number = self._open[prompt] = len(self._sequences)
            self._sequences.append([(int(self.first_p[prompt]), int(self.length_p[prompt]))])
            self._lengths.append(int(self.length_p[prompt]))
        self._sequences[number].append((first, length))
        self._lengths[number] += length

    def tables(self, num_tokens: int) -> tuple[Ints, torch.Tensor | None, Ints]:
        """``table_sl``, ``mask_s1ll`` and ``place_n`` of the pack."""
        width = max(self._lengths)
        table_sl = np.zeros((len(self._sequences), width), dtype=np.int64)
        span_sl = np.full(table_sl.shape, -1, dtype=np.int64)
        for sequence, spans in enumerate(self._sequences):
            place = 0
            for span, (first, length) in enumerate(spans):
                table_sl[sequence, place : place + length] = np.arange(first, first + length)
                span_sl[sequence, place : place + length] = span
                place += length
        place_n = np.empty(num_tokens, dtype=np.int64)
        used = np.flatnonzero(span_sl >= 0)
        place_n[table_sl.ravel()[used]] = used
        if all(len(spans) == 2 for spans in self._sequences):
            return table_sl, None, place_n
        sees_sll = (span_sl[:, None, :] == 0) | (span_sl[:, :, None] == span_sl[:, None, :])
        sees_sll &= np.tri(width, dtype=np.bool_)
        mask_sll = np.where(sees_sll, np.float32(0), np.float32(-np.inf))
        return table_sl, torch.from_numpy(mask_sll).unsqueeze(1), place_n
