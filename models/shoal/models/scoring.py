"""Log-probabilities of given completions, differentiable, in little memory.

Axes: ``b`` row (completion), ``t`` position in the completion, ``k`` state that predicts,
``m`` token of a distinct completion, ``v`` vocabulary; ``n``, ``s``, ``l`` as in
`shoal.models.packing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from shoal.models.forward import Tokens, completion_logits_btv, padded
from shoal.models.llama import LlamaForward, LlamaWeights, attention
from shoal.models.packing import Pack, pack_rows

MAX_LOGITS = 1 << 24
"""Logits held at once (64 MiB in fp32); beyond, they are computed again on the way back."""
MAX_MERGED_BYTES = 1 << 24
"""Models up to this size are differentiated through weights with the adapter added: one more
product for each weight, but far fewer operations.  Measured against the model's own pass: 0.5
of its time at 2 MiB, 0.9 at 13 MiB, 1.2 at 52 MiB (`benchmarks/rl/README.md`)."""


def completion_logprobs_bt(
    model: Any,
    forward: LlamaForward | None,
    prompts: Sequence[Tokens],
    completions: Sequence[Tokens],
    temperature: float,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each token, and the entropy where it was drawn; fp32, ``(b, t)``.

    The log-probabilities are differentiable in whatever of ``model`` is; the entropies are
    not.  Both are over the whole vocabulary at ``temperature``, and mean nothing past a
    completion's end.  ``forward`` is the model's short pass, taken where it pays; it runs
    rows with equal prompt and completion once.
    """
    if forward is None or forward.merged_bytes > MAX_MERGED_BYTES:
        logits_btv = completion_logits_btv(model, prompts, completions, device)
        logprobs_btv = torch.log_softmax(logits_btv / temperature, dim=-1)
        ids_bt = padded(completions, logprobs_btv.shape[1]).to(device)
        return logprobs_btv.gather(2, ids_bt.unsqueeze(2)).squeeze(2), _entropy(logprobs_btv)
    pack = pack_rows(prompts, completions, device)
    weights = forward.weights()
    hidden_nd = forward.hidden_nd(weights, pack.ids_n, pack.positions_n, _Attention(pack))
    head = _Head(forward, weights, temperature)
    logprobs_m, entropy_m = head.scored(hidden_nd.index_select(0, pack.state_k), pack)
    return pack.to_rows(logprobs_m), pack.to_rows(entropy_m)


@dataclass(frozen=True)
class _Head:
    """From states to the figures of the tokens they predict, in parts of bounded memory."""

    forward: LlamaForward
    weights: LlamaWeights
    temperature: float

    def scored(self, hidden_kd: torch.Tensor, pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of each token of ``pack``, and the entropy of its state."""
        step = max(1, MAX_LOGITS // self.forward.shape.vocab_size)
        if len(hidden_kd) <= step:
            return self._part(hidden_kd, pack.state_m, pack.target_m)
        order_m = torch.argsort(pack.state_m, stable=True)
        state_m, target_m = pack.state_m[order_m], pack.target_m[order_m]
        firsts = list(range(0, len(hidden_kd), step))
        bounds = torch.tensor([*firsts, len(hidden_kd)], device=state_m.device)
        edges = torch.searchsorted(state_m, bounds).tolist()
        parts = [
            checkpoint(
                self._part,
                hidden_kd[first : first + step],
                state_m[start:stop] - first,
                target_m[start:stop],
                use_reentrant=False,
            )
            for first, start, stop in zip(firsts, edges[:-1], edges[1:], strict=True)
        ]
        back_m = torch.argsort(order_m)
        logprobs_m, entropy_m = (torch.cat(column) for column in zip(*parts, strict=True))
        return logprobs_m[back_m], entropy_m[back_m]

    def _part(
        self, hidden_kd: torch.Tensor, state_m: torch.Tensor, target_m: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits_kv = self.forward.logits_nv(self.weights, hidden_kd)
        logprobs_kv = torch.log_softmax(logits_kv / self.temperature, dim=-1)
        return logprobs_kv[state_m, target_m], _entropy(logprobs_kv)[state_m]


class _Attention:
    """Attention inside the sequences of a pack."""

    def __init__(self, pack: Pack) -> None:
        self._flat_table = pack.table_sl.flatten()
        self._shape = pack.table_sl.shape
        self._place_n = pack.place_n
        self._mask = pack.mask_s1ll

    def __call__(
        self, layer: int, q_nhe: torch.Tensor, k_nhe: torch.Tensor, v_nhe: torch.Tensor
    ) -> torch.Tensor:
        q, k, v = (
            x_nhe.index_select(0, self._flat_table)
            .view(*self._shape, *x_nhe.shape[1:])
            .transpose(1, 2)
            for x_nhe in (q_nhe, k_nhe, v_nhe)
        )
        read_shle = attention(q, k, v, mask=self._mask, is_causal=self._mask is None)
        return read_shle.transpose(1, 2).flatten(0, 1).index_select(0, self._place_n)


def _entropy(logprobs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return -(logprobs.exp() * logprobs).sum(dim=-1)
