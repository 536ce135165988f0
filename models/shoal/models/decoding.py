"""Decoding sessions: what runs one more token for each of several sequences.

A session holds *nodes*: sequences already run, each with its keys and values.  Its caller
says which node each next one continues, so nodes split where completions part and vanish
where they end.

Axes: ``n`` node, ``p`` admitted prompt, ``t`` position, ``h`` head, ``e`` within a head,
``v`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from shoal.models.forward import Prefill, Tokens, extend, prefill
from shoal.models.llama import LlamaForward, LlamaWeights, attention

Ints = NDArray[np.int64]
PREFILL_TOKENS = 1 << 14
"""Prompt tokens run in one pass."""
_GROWTH = 8
"""Positions a cache has beyond its prompts at first; it doubles from there."""


class DecodeSession(Protocol):
    """One generation's nodes, numbered from 0."""

    @property
    def can_join(self) -> bool:
        """Whether prompts may be admitted while nodes are running."""
        ...

    def admit(self, prompts: Sequence[Tokens]) -> torch.Tensor:
        """The prompts are the last nodes; returns their next-token logits, fp32 ``(p, v)``."""
        ...

    def advance(self, parent_n: Ints, token_n: Ints) -> torch.Tensor:
        """Node ``n`` is now what ``parent_n[n]`` was, and ``token_n[n]``; returns the logits.

        A parent that stays keeps its number for one of its children, unless the number is
        beyond the new count.
        """
        ...

    def clear(self) -> None:
        """No node is left."""
        ...


class LlamaSession:
    """Nodes in a preallocated cache; only what changes its number is copied."""

    @property
    def can_join(self) -> bool:
        """Always."""
        return True

    def __init__(
        self, forward: LlamaForward, device: torch.device, *, max_nodes: int, max_length: int
    ) -> None:
        self._forward = forward
        self._weights: LlamaWeights = forward.weights()
        self._device = device
        self._max_nodes = max_nodes
        self._max_length = max_length
        self._lengths_n = np.zeros(0, dtype=np.int64)
        shape = forward.shape
        self._cache = [
            torch.zeros(2, 0, 0, shape.num_kv_heads, shape.head_size, device=device)
            for _ in range(shape.num_layers)
        ]

    def admit(self, prompts: Sequence[Tokens]) -> torch.Tensor:
        """See `DecodeSession`."""
        widest = max(len(prompt) for prompt in prompts)
        step = max(1, PREFILL_TOKENS // widest)
        parts = [self._prefill(prompts[at : at + step]) for at in range(0, len(prompts), step)]
        return torch.cat(parts)

    def _prefill(self, prompts: Sequence[Tokens]) -> torch.Tensor:
        first, count = len(self._lengths_n), len(prompts)
        lengths_p = np.array([len(prompt) for prompt in prompts])
        width = int(lengths_p.max())
        self._renumber(np.arange(first), num_nodes=first + count, width=width)
        inside_pt = np.arange(width) < lengths_p[:, None]
        # Places past a prompt's end repeat token 0; nothing reads them.
        table_pt = np.where(inside_pt, (inside_pt.cumsum() - 1).reshape(inside_pt.shape), 0)
        source_n, place_n = (self._tensor(i) for i in (table_pt.ravel(), np.flatnonzero(inside_pt)))
        ids_n = self._tensor(np.concatenate([np.asarray(p, dtype=np.int64) for p in prompts]))
        positions_n = self._tensor(np.nonzero(inside_pt)[1])

        def attend(
            layer: int, q_nhe: torch.Tensor, k_nhe: torch.Tensor, v_nhe: torch.Tensor
        ) -> torch.Tensor:
            q, k, v = (
                x_nhe.index_select(0, source_n).view(count, width, *x_nhe.shape[1:])
                for x_nhe in (q_nhe, k_nhe, v_nhe)
            )
            self._cache[layer][0, first : first + count, :width] = k
            self._cache[layer][1, first : first + count, :width] = v
            read = attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
            return read.transpose(1, 2).flatten(0, 1).index_select(0, place_n)

        hidden_nd = self._forward.hidden_nd(self._weights, ids_n, positions_n, attend)
        self._lengths_n = np.concatenate([self._lengths_n, lengths_p])
        last_p = self._tensor(lengths_p.cumsum() - 1)
        return self._forward.logits_nv(self._weights, hidden_nd.index_select(0, last_p))

    def advance(self, parent_n: Ints, token_n: Ints) -> torch.Tensor:
        """See `DecodeSession`."""
        count, width = len(parent_n), int(self._lengths_n[parent_n].max()) + 1
        self._renumber(parent_n, num_nodes=count, width=width)
        lengths_n = self._tensor(self._lengths_n)
        rows_n = torch.arange(count, device=self._device)
        mask = self._mask(width)

        def attend(
            layer: int, q_nhe: torch.Tensor, k_nhe: torch.Tensor, v_nhe: torch.Tensor
        ) -> torch.Tensor:
            keys, values = self._cache[layer]
            keys[rows_n, lengths_n] = k_nhe
            values[rows_n, lengths_n] = v_nhe
            k, v = (x[:count, :width].transpose(1, 2) for x in (keys, values))
            return attention(q_nhe.unsqueeze(2), k, v, mask=mask).squeeze(2)

        tokens_n = self._tensor(token_n)
        hidden_nd = self._forward.hidden_nd(self._weights, tokens_n, lengths_n, attend)
        self._lengths_n = self._lengths_n + 1
        return self._forward.logits_nv(self._weights, hidden_nd)

    def clear(self) -> None:
        """See `DecodeSession`."""
        self._lengths_n = self._lengths_n[:0]

    def _mask(self, width: int) -> torch.Tensor | None:
        """Hides what a node has no position for; None where all are equally long."""
        if int(self._lengths_n.min()) + 1 == width:
            return None
        outside_nt = np.arange(width) > self._lengths_n[:, None]
        mask_nt = np.where(outside_nt, np.float32(-np.inf), np.float32(0))
        return torch.from_numpy(mask_nt).to(self._device)[:, None, None]

    def _renumber(self, parent_n: Ints, *, num_nodes: int, width: int) -> None:
        """Node ``n`` is what ``parent_n[n]`` was, with room for so many nodes and positions.

        In place, only nodes with a new number are copied; their sources all keep their own.
        """
        held_nodes, held_width = self._cache[0].shape[1:3]
        lengths_n = self._lengths_n[parent_n]
        used = int(lengths_n.max(initial=0))
        moved = np.flatnonzero(parent_n != np.arange(len(parent_n)))
        if num_nodes > held_nodes or width > held_width:
            most = self._max_nodes if num_nodes > held_nodes else num_nodes
            nodes = min(max(num_nodes, 2 * held_nodes), most)
            if width > held_width:
                held_width = min(max(width + _GROWTH, 2 * held_width), self._max_length)
            from_n = self._tensor(parent_n)
            for layer, old in enumerate(self._cache):
                # Zeros, not whatever was there: a masked NaN would still spread.
                new = old.new_zeros(2, nodes, held_width, *old.shape[3:])
                new[:, : len(parent_n), :used] = old[:, from_n, :used]
                self._cache[layer] = new
        elif len(moved):
            to_n, from_n = self._tensor(moved), self._tensor(parent_n[moved])
            for cache in self._cache:
                cache[:, to_n, :used] = cache[:, from_n, :used]
        self._lengths_n = lengths_n

    def _tensor(self, array: Ints) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)


class HubSession:
    """Nodes in the cache of any causal language model of ``transformers``."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._state: Prefill | None = None

    @property
    def can_join(self) -> bool:
        """Whether the model's cache is keys and values alone, which can be put together."""
        from transformers.cache_utils import DynamicLayer

        state = self._state
        return state is None or all(type(layer) is DynamicLayer for layer in state.cache.layers)

    def admit(self, prompts: Sequence[Tokens]) -> torch.Tensor:
        """See `DecodeSession`."""
        new = prefill(self._model, prompts, self._device)
        self._state = new if self._state is None else self._state.join(new)
        return new.logits_pv

    def advance(self, parent_n: Ints, token_n: Ints) -> torch.Tensor:
        """See `DecodeSession`."""
        assert self._state is not None
        if not np.array_equal(parent_n, np.arange(len(self._state.lengths_p))):
            self._state = self._state.repeat(torch.from_numpy(parent_n).to(self._device))
        next_n = torch.from_numpy(token_n).to(self._device)
        self._state = extend(self._model, self._state, next_n)
        return self._state.logits_pv

    def clear(self) -> None:
        """See `DecodeSession`."""
        self._state = None
