"""The default sampling engine: one loop over any causal language model, on any device.

Rows with an equal beginning are one *node* of the loop: a group's prompt is run once, and so
is every first part that its completions share.  Rows that end make room for rows that wait.

Axes: ``r`` running row, ``n`` node, ``g`` row within a node, ``v`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from shoal.models.decoding import DecodeSession, HubSession, Ints, LlamaSession
from shoal.models.forward import Tokens, distinct_prompts
from shoal.models.llama import LlamaForward
from shoal.models.sampling import UniformTable, select_tokens_ng
from shoal.protocol.errors import InvalidRequest

OnProgress = Callable[[int], None]
"""Called with the number of completion tokens produced so far."""

MAX_ROWS = 512
MAX_LOGITS = 1 << 24
"""Logits held at once (64 MiB in fp32): with a large vocabulary fewer rows run together."""
MAX_CACHE_BYTES = 1 << 30
"""Keys and values held at once, each row at its full length; more rows wait their turn."""
MAX_MERGED_BYTES = 4 << 30
"""Largest copy of a model's linear weights with the adapter added; beyond, none is made."""
_ADMIT_SHARE = 8
"""Waiting rows enter once one place in so many is free: a pass for one prompt costs nearly
as much as for several."""


@dataclass(frozen=True, kw_only=True)
class Completions:
    """What an engine drew, row by row.

    ``logprobs`` are natural logarithms at the sampling temperature over the whole
    vocabulary.  ``finished`` says whether the row ended itself with an end token (which is
    its last token) rather than by length.
    """

    token_ids: list[NDArray[np.int32]]
    logprobs: list[NDArray[np.float32]]
    finished: NDArray[np.bool_]


class SamplingEngine(Protocol):
    """Draws completions; ``name`` and ``dtype`` say how, and stand in every result."""

    name: str
    dtype: str

    def generate(
        self,
        prompts: Sequence[Tokens],
        *,
        max_tokens: int,
        temperature: float,
        uniforms_bt: UniformTable | None,
        on_progress: OnProgress | None = None,
    ) -> Completions:
        """One completion per row of ``prompts``; equal prompts may be repeated.

        ``uniforms_bt`` selects each token; None takes the most likely token (greedy).

        Raises:
            InvalidRequest: a prompt is empty or does not fit the model with ``max_tokens``.
        """
        ...


class LoopEngine:
    """Batched decoding with keys and values kept, in fp32.

    Llama-type models run by `LlamaForward`, with the adapter added to a copy of the weights
    at the start of each `generate`, so that a new adapter is never missed; other models, and
    those whose copy would be too large, by their own forward pass.  ``name`` says which.

    Args:
        model: A causal language model of ``transformers``, with or without an adapter.
        forward: Its short forward pass, where there is one.
        eos_ids: The tokens that end a completion.
        device: Where the model is.
        max_rows: Rows run together.
        max_cache_bytes: Memory for keys and values.
    """

    def __init__(
        self,
        model: Any,
        forward: LlamaForward | None,
        eos_ids: frozenset[int],
        device: torch.device,
        *,
        max_rows: int = MAX_ROWS,
        max_cache_bytes: int = MAX_CACHE_BYTES,
    ) -> None:
        small = forward is not None and forward.merged_bytes <= MAX_MERGED_BYTES
        self._forward = forward if small else None
        self.dtype = "float32"
        self.name = "transformers" if self._forward is None else "shoal-llama"
        self._model = model
        self._eos_ids = np.array(sorted(eos_ids), dtype=np.int64)
        self._device = device
        self._max_rows = max(1, min(max_rows, MAX_LOGITS // int(model.config.vocab_size)))
        self._max_cache_bytes = max_cache_bytes

    def generate(
        self,
        prompts: Sequence[Tokens],
        *,
        max_tokens: int,
        temperature: float,
        uniforms_bt: UniformTable | None,
        on_progress: OnProgress | None = None,
    ) -> Completions:
        """See `SamplingEngine`."""
        require_context(prompts, max_tokens, self._model.config)
        if not prompts:
            return Completions(token_ids=[], logprobs=[], finished=np.zeros(0, dtype=np.bool_))
        longest = max(len(prompt) for prompt in prompts) + max_tokens
        room = self._room(longest)
        with torch.inference_mode():
            generation = _Generation(
                self._session(min(room, len(prompts)), longest),
                prompts,
                room=room,
                max_tokens=max_tokens,
                temperature=temperature,
                uniforms_bt=uniforms_bt,
                eos_ids=self._eos_ids,
            )
            while generation.step():
                if on_progress:
                    on_progress(generation.num_tokens)
        if on_progress:
            on_progress(generation.num_tokens)
        return generation.completions()

    def _session(self, max_nodes: int, max_length: int) -> DecodeSession:
        if self._forward is None:
            return HubSession(self._model, self._device)
        return LlamaSession(self._forward, self._device, max_nodes=max_nodes, max_length=max_length)

    def _room(self, num_positions: int) -> int:
        """Rows of ``num_positions`` that run together within the memory for the cache.

        Raises:
            InvalidRequest: not even one does.
        """
        row_bytes = num_positions * cache_bytes_per_token(self._model.config)
        if row_bytes > self._max_cache_bytes:
            raise InvalidRequest(
                f"One row of {num_positions} tokens needs {row_bytes >> 20} MiB of cache where "
                f"{self._max_cache_bytes >> 20} MiB are allowed; lower max_tokens.",
                code="row_too_large",
            )
        return min(self._max_rows, self._max_cache_bytes // row_bytes)


class _Generation:
    """The rows of one call: waiting, running, and what has been drawn."""

    def __init__(
        self,
        session: DecodeSession,
        prompts: Sequence[Tokens],
        *,
        room: int,
        max_tokens: int,
        temperature: float,
        uniforms_bt: UniformTable | None,
        eos_ids: Ints,
    ) -> None:
        self.num_tokens = 0
        self._session = session
        self._prompts = prompts
        self._room = room
        self._max_tokens = max_tokens
        self._temperature = temperature
        self._uniforms_bt = uniforms_bt
        self._eos_ids = eos_ids
        self._num_started = 0
        self._row_r = np.zeros(0, dtype=np.int64)
        self._node_r = np.zeros(0, dtype=np.int64)
        self._length_r = np.zeros(0, dtype=np.int64)
        self._logits_nv: torch.Tensor | None = None
        self._drawn: list[tuple[Ints, Ints, NDArray[np.float32]]] = []

    def step(self) -> bool:
        """Each running row has one token more; False when there was none left to run."""
        self._admit()
        if self._logits_nv is None:
            return False
        logprobs_nv = torch.log_softmax(self._logits_nv / self._temperature, dim=-1)
        token_r, logprob_r = self._select(logprobs_nv)
        self._drawn.append((self._row_r, token_r, logprob_r))
        self.num_tokens += len(token_r)
        self._length_r = self._length_r + 1
        runs_r = ~np.isin(token_r, self._eos_ids) & (self._length_r < self._max_tokens)
        self._branch(runs_r, token_r, int(logprobs_nv.shape[-1]))
        return True

    def completions(self) -> Completions:
        """What was drawn, in the order of the prompts."""
        row_m, token_m, logprob_m = map(np.concatenate, zip(*self._drawn, strict=True))
        order_m = np.argsort(row_m, kind="stable")
        token_m, logprob_m = token_m[order_m].astype(np.int32), logprob_m[order_m]
        ends = np.bincount(row_m, minlength=len(self._prompts)).cumsum()
        spans = [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        return Completions(
            token_ids=[token_m[span] for span in spans],
            logprobs=[logprob_m[span] for span in spans],
            finished=np.isin(token_m[ends - 1], self._eos_ids),
        )

    def _admit(self) -> None:
        """Waiting rows fill free places, if enough are free to pay for a pass."""
        free = min(self._room - len(self._row_r), len(self._prompts) - self._num_started)
        running = len(self._row_r) > 0
        enough = min(max(1, self._room // _ADMIT_SHARE), len(self._prompts) - self._num_started)
        if free <= 0 or (running and (free < enough or not self._session.can_join)):
            return
        row_r = np.arange(self._num_started, self._num_started + free)
        prompts, node_r = distinct_prompts([self._prompts[row] for row in row_r.tolist()])
        logits_pv = self._session.admit(prompts)
        first = 0 if self._logits_nv is None else len(self._logits_nv)
        old = [] if self._logits_nv is None else [self._logits_nv]
        self._logits_nv = torch.cat([*old, logits_pv])
        self._num_started += free
        self._row_r = np.concatenate([self._row_r, row_r])
        self._node_r = np.concatenate([self._node_r, first + np.array(node_r)])
        self._length_r = np.concatenate([self._length_r, np.zeros(free, dtype=np.int64)])

    def _select(self, logprobs_nv: torch.Tensor) -> tuple[Ints, NDArray[np.float32]]:
        """The next token of each running row, and its log-probability."""
        node_r = torch.from_numpy(self._node_r).to(logprobs_nv.device)
        if self._uniforms_bt is None:
            next_r = logprobs_nv.argmax(dim=-1)[node_r]
        else:
            uniform_r = self._uniforms_bt[self._row_r, self._length_r]
            place_r = _rank_within(self._node_r)
            uniforms_ng = np.zeros((len(logprobs_nv), int(place_r.max()) + 1))
            uniforms_ng[self._node_r, place_r] = uniform_r
            chosen_ng = select_tokens_ng(logprobs_nv, torch.from_numpy(uniforms_ng))
            next_r = chosen_ng[node_r, torch.from_numpy(place_r).to(node_r.device)]
        logprob_r = logprobs_nv[node_r, next_r]
        return next_r.cpu().numpy(), logprob_r.cpu().numpy()

    def _branch(self, runs_r: NDArray[np.bool_], token_r: Ints, vocab_size: int) -> None:
        """Ended rows are gone; rows that drew the same token from one node share the next."""
        self._row_r, self._length_r = self._row_r[runs_r], self._length_r[runs_r]
        if not len(self._row_r):
            self._session.clear()
            self._node_r, self._logits_nv = self._node_r[:0], None
            return
        keys, child_r = np.unique(
            self._node_r[runs_r] * vocab_size + token_r[runs_r], return_inverse=True
        )
        parent_c, token_c = np.divmod(keys, vocab_size)
        number_c = _numbered(parent_c)
        parent_n, token_n = np.empty_like(parent_c), np.empty_like(token_c)
        parent_n[number_c], token_n[number_c] = parent_c, token_c
        self._node_r = number_c[child_r]
        self._logits_nv = self._session.advance(parent_n, token_n)


def _rank_within(node_r: Ints) -> Ints:
    """Each row's place among the rows of its node."""
    order = np.argsort(node_r, kind="stable")
    starts = np.flatnonzero(np.diff(node_r[order], prepend=-1))
    counts = np.diff(starts, append=len(order))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order)) - np.repeat(starts, counts)
    return rank


def _numbered(parent_c: Ints) -> Ints:
    """Numbers for children, sorted by parent: the first child keeps its parent's if it can."""
    number_c = np.full(len(parent_c), -1, dtype=np.int64)
    keeps_c = (np.diff(parent_c, prepend=-1) != 0) & (parent_c < len(parent_c))
    number_c[keeps_c] = parent_c[keeps_c]
    free = np.setdiff1d(np.arange(len(parent_c)), parent_c[keeps_c])
    number_c[~keeps_c] = free
    return number_c


def cache_bytes_per_token(config: Any) -> int:
    """Bytes of keys and values that one token leaves in an fp32 cache."""
    heads = int(config.num_attention_heads)
    head_size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    return 2 * 4 * int(config.num_hidden_layers) * kv_heads * head_size


def require_context(prompts: Sequence[Tokens], max_tokens: int, config: Any) -> None:
    """Passes only if every prompt has a token and fits the context with ``max_tokens``.

    Raises:
        InvalidRequest: one does not; the message names it and the limit.
    """
    limit = getattr(config, "max_position_embeddings", None)
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise InvalidRequest(
                f"Prompt {number} is empty; every prompt needs at least one token.",
                code="empty_prompt",
            )
        if limit is not None and len(prompt) + max_tokens > limit:
            raise InvalidRequest(
                f"Prompt {number} has {len(prompt)} tokens, which with max_tokens {max_tokens} "
                f"exceeds the model's context of {limit}; shorten the prompt or lower max_tokens.",
                code="context_exceeded",
            )
