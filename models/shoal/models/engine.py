"""Sampling engines; the default one is a batched key-value-cache loop over a Hugging Face model.

Axes: ``b`` row, ``t`` position in the completion, ``v`` token of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from shoal.models.forward import Tokens, distinct_prompts, extend, prefill
from shoal.models.sampling import Uniforms, select_tokens_b

OnProgress = Callable[[int], None]
"""Called with the number of completion tokens produced so far."""

MAX_ROWS = 256
MAX_LOGITS = 1 << 24
"""Logits held at once (64 MiB in fp32): with a large vocabulary fewer rows run together."""
COMPACT_BELOW = 0.75
"""Finished rows are dropped from the cache once fewer than this share is still running;
each compaction copies the cache, so dropping them one by one would cost more than it saves."""


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
    """Draws completions."""

    name: str

    def generate(
        self,
        prompts: Sequence[Tokens],
        *,
        max_tokens: int,
        temperature: float,
        uniforms_bt: Uniforms | None,
        on_progress: OnProgress | None = None,
    ) -> Completions:
        """One completion per row of ``prompts``; equal prompts may be repeated.

        ``uniforms_bt`` selects each token; None takes the most likely token (greedy).
        """
        ...


class TransformersEngine:
    """The default engine: any causal language model of ``transformers``, on any device."""

    name = "transformers"

    def __init__(self, model: Any, eos_ids: frozenset[int], device: torch.device) -> None:
        self._model = model
        self._device = device
        self._eos_e = torch.tensor(sorted(eos_ids), dtype=torch.long, device=device)
        self._max_rows = max(1, min(MAX_ROWS, MAX_LOGITS // int(model.config.vocab_size)))

    def generate(
        self,
        prompts: Sequence[Tokens],
        *,
        max_tokens: int,
        temperature: float,
        uniforms_bt: Uniforms | None,
        on_progress: OnProgress | None = None,
    ) -> Completions:
        """One completion per row of ``prompts``, in micro-batches of bounded memory."""
        token_ids: list[NDArray[np.int32]] = []
        logprobs: list[NDArray[np.float32]] = []
        num_tokens = 0
        for start in range(0, len(prompts), self._max_rows):
            rows = slice(start, start + self._max_rows)
            chosen = None if uniforms_bt is None else uniforms_bt[rows]
            with torch.inference_mode():
                ids_bt, logprobs_bt = self._decode(prompts[rows], max_tokens, temperature, chosen)
            for length, row, row_logprobs in zip(
                self._lengths(ids_bt), ids_bt.cpu().numpy(), logprobs_bt.cpu().numpy(), strict=True
            ):
                token_ids.append(row[:length].astype(np.int32))
                logprobs.append(row_logprobs[:length].copy())
                num_tokens += length
            if on_progress:
                on_progress(num_tokens)
        return Completions(
            token_ids=token_ids,
            logprobs=logprobs,
            finished=np.array([int(row[-1]) in self._eos for row in token_ids], dtype=np.bool_),
        )

    @property
    def _eos(self) -> frozenset[int]:
        return frozenset(self._eos_e.tolist())

    def _lengths(self, ids_bt: torch.Tensor) -> list[int]:
        """Tokens of each row up to and including its first end token."""
        ended_bt = torch.isin(ids_bt, self._eos_e)
        first_b = torch.where(ended_bt.any(1), ended_bt.int().argmax(1) + 1, ids_bt.shape[1])
        return [int(length) for length in first_b]

    def _decode(
        self,
        prompts: Sequence[Tokens],
        max_tokens: int,
        temperature: float,
        uniforms_bt: Uniforms | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and log-probabilities, both ``(rows, tokens)``.

        What follows an end token carries no meaning.
        """
        distinct, row_to_prompt = distinct_prompts(prompts)
        rows_b = torch.tensor(row_to_prompt, device=self._device)
        state = prefill(self._model, distinct, self._device).repeat(rows_b)
        ids_bt = torch.zeros(len(prompts), max_tokens, dtype=torch.long, device=self._device)
        logprobs_bt = torch.zeros(len(prompts), max_tokens, device=self._device)
        active_b = torch.arange(len(prompts), device=self._device)
        running_b = torch.ones(len(prompts), dtype=torch.bool, device=self._device)
        for step in range(max_tokens):
            logprobs_bv = torch.log_softmax(state.logits_pv / temperature, dim=-1)
            if uniforms_bt is None:
                next_b = logprobs_bv.argmax(dim=-1)
            else:
                column = torch.from_numpy(uniforms_bt[:, step].copy()).to(self._device)
                next_b = select_tokens_b(logprobs_bv, column[active_b])
            ids_bt[active_b, step] = next_b
            logprobs_bt[active_b, step] = logprobs_bv.gather(1, next_b.unsqueeze(1)).squeeze(1)
            running_b = running_b & ~torch.isin(next_b, self._eos_e)
            num_running = int(running_b.sum())
            if num_running == 0 or step + 1 == max_tokens:
                return ids_bt[:, : step + 1], logprobs_bt[:, : step + 1]
            if num_running < COMPACT_BELOW * len(running_b):
                kept_b = running_b.nonzero().squeeze(1)
                state, next_b = state.repeat(kept_b), next_b[kept_b]
                active_b, running_b = active_b[kept_b], running_b[kept_b]
            state = extend(self._model, state, next_b)
        return ids_bt, logprobs_bt
