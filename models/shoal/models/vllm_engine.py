"""vLLM as a sampling engine, drawing the tokens that the task's uniforms select.

vLLM samples with generators of its own, which no verifier can replay.  A logits processor of
its second model runner sees every row's logits before temperature is applied: it selects the
token by the rule of `shoal.models.sampling`, notes its log-probability at the sampling
temperature, and leaves vLLM nothing else to choose.  For that the engine runs in this process
and on one device.  Without such a processor nothing is sampled: there is no unseeded mode.

In fp32 the log-probabilities hold to the tolerance of the audits; vLLM's kernels in bf16 do
not, and ``dtype`` tells the verifier which was used.

Axes: ``n`` logits row, ``v`` vocabulary, ``m`` drawn token.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shoal.models.engine import Completions, OnProgress, require_context
from shoal.models.forward import Tokens
from shoal.models.sampling import UniformTable, select_tokens_b
from shoal.protocol.errors import InvalidRequest, InvariantBroken

_ROW, _PROMPT_LENGTH = "shoal_row", "shoal_prompt_length"


class VllmEngine:
    """Samples with vLLM from a base in a folder and the adapter of the moment.

    Args:
        folder: The base.
        max_lora_rank: The adapter's rank.
        eos_ids: The tokens that end a completion.
        adapter_sha256: Gives the digest of the adapter as it is now.
        write_adapter: Writes it as a stock PEFT folder; called where the digest is a new one.
        dtype: In what vLLM computes.
        memory_share: Share of the device's memory that vLLM takes.

    Raises:
        InvalidRequest: vLLM is not installed, or too old to be told which token to draw.
    """

    name = "vllm"

    def __init__(
        self,
        folder: Path,
        *,
        max_lora_rank: int,
        eos_ids: frozenset[int],
        adapter_sha256: Callable[[], str],
        write_adapter: Callable[[Path], None],
        dtype: str = "float32",
        memory_share: float = 0.8,
    ) -> None:
        # Read by vLLM when it is first imported or an engine is built.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")
        self.dtype = dtype
        self._eos_ids = sorted(eos_ids)
        self._adapter_sha256 = adapter_sha256
        self._write_adapter = write_adapter
        self._loaded: tuple[str, Any] = ("", None)
        self._num_loaded = 0
        self._book = DrawBook()
        processor, llm = _seeded_processor(self._book), _vllm().LLM
        self._adapters = Path(tempfile.mkdtemp(prefix="shoal-vllm-"))
        weakref.finalize(self, shutil.rmtree, self._adapters, ignore_errors=True)
        self._llm = llm(
            model=str(folder),
            dtype=dtype,
            enable_lora=True,
            max_lora_rank=max_lora_rank,
            logits_processors=[processor],
            gpu_memory_utilization=memory_share,
            enable_prefix_caching=True,
            trust_remote_code=False,
        )
        self._config = self._llm.llm_engine.model_config.hf_config

    def generate(
        self,
        prompts: Sequence[Tokens],
        *,
        max_tokens: int,
        temperature: float,
        uniforms_bt: UniformTable | None,
        on_progress: OnProgress | None = None,
    ) -> Completions:
        """See `SamplingEngine`; vLLM batches, shares prefixes and bounds its cache itself.

        Raises:
            InvalidRequest: a prompt is empty or does not fit the model with ``max_tokens``.
            InvariantBroken: vLLM drew another token than it was left.
        """
        require_context(prompts, max_tokens, self._config)
        if not prompts:
            return Completions(token_ids=[], logprobs=[], finished=np.zeros(0, dtype=np.bool_))
        parameters = [
            _vllm().SamplingParams(
                temperature=1.0,
                max_tokens=max_tokens,
                stop_token_ids=self._eos_ids,
                detokenize=False,
                extra_args={_ROW: row, _PROMPT_LENGTH: len(prompt)},
            )
            for row, prompt in enumerate(prompts)
        ]
        self._book.open(uniforms_bt, temperature)
        outputs = self._llm.generate(
            [{"prompt_token_ids": [int(token) for token in prompt]} for prompt in prompts],
            parameters,
            use_tqdm=False,
            lora_request=self._adapter(),
        )
        token_ids = [np.array(o.outputs[0].token_ids, dtype=np.int32) for o in outputs]
        if on_progress:
            on_progress(sum(map(len, token_ids)))
        return Completions(
            token_ids=token_ids,
            logprobs=self._book.logprobs(token_ids),
            finished=np.array([int(row[-1]) in self._eos_ids for row in token_ids], dtype=np.bool_),
        )

    def _adapter(self) -> Any:
        """The handle of the adapter as it is now; a new one where the weights changed."""
        digest = self._adapter_sha256()
        if digest != self._loaded[0]:
            self._num_loaded += 1
            folder = self._adapters / str(self._num_loaded)
            self._write_adapter(folder)
            request = _lora_request(str(self._num_loaded), self._num_loaded, str(folder))
            self._loaded = (digest, request)
        return self._loaded[1]


class DrawBook:
    """Which token each row must draw at each position, and what was noted of it."""

    def __init__(self) -> None:
        self._uniforms_bt: UniformTable | None = None
        self._temperature = 1.0
        self._noted: list[tuple[NDArray[np.int64], torch.Tensor]] = []

    def open(self, uniforms_bt: UniformTable | None, temperature: float) -> None:
        """A call begins; nothing is noted yet."""
        self._uniforms_bt, self._temperature, self._noted = uniforms_bt, temperature, []

    def choose(
        self,
        logits_nv: torch.Tensor,
        row_n: NDArray[np.int64],
        position_n: NDArray[np.int64],
    ) -> torch.Tensor:
        """The token each logits row must give; its log-probability is noted."""
        logprobs_nv = torch.log_softmax(logits_nv.float() / self._temperature, dim=-1)
        if self._uniforms_bt is None:
            chosen_n = logprobs_nv.argmax(dim=-1)
        else:
            uniforms_n = torch.from_numpy(self._uniforms_bt[row_n, position_n])
            chosen_n = select_tokens_b(logprobs_nv, uniforms_n)
        logprob_n = logprobs_nv.gather(1, chosen_n.unsqueeze(1)).squeeze(1)
        noted_3n = torch.stack([chosen_n.double(), logprob_n.double()])
        self._noted.append((np.stack([row_n, position_n]), noted_3n))
        return chosen_n

    def logprobs(self, token_ids: Sequence[NDArray[np.int32]]) -> list[NDArray[np.float32]]:
        """The noted log-probabilities of ``token_ids``, row by row.

        Raises:
            InvariantBroken: a token was never noted, or another was.
        """
        noted: dict[tuple[int, int], tuple[int, float]] = {}
        for places_2n, figures_2n in self._noted:
            chosen_n, logprob_n = figures_2n.cpu().numpy()
            for row, position, token, logprob in zip(
                *places_2n.tolist(), chosen_n.tolist(), logprob_n.tolist(), strict=True
            ):
                noted[row, position] = (int(token), logprob)
        found = []
        for row, tokens in enumerate(token_ids):
            figures = [noted.get((row, t), (-1, 0.0)) for t in range(len(tokens))]
            if [token for token, _ in figures] != tokens.tolist():
                raise InvariantBroken(
                    f"vLLM did not draw row {row} as it was told to; it must run in this process "
                    "with its second model runner (VLLM_ENABLE_V1_MULTIPROCESSING=0, "
                    "VLLM_USE_V2_MODEL_RUNNER=1).",
                    code="unseeded_sampling",
                )
            found.append(np.array([logprob for _, logprob in figures], dtype=np.float32))
        return found


def _seeded_processor(book: DrawBook) -> type:
    """A logits processor class that leaves each row the one token ``book`` chooses."""
    try:
        from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor
    except ImportError:
        raise InvalidRequest(
            "This vLLM is missing or too old to be told which token to draw; install "
            "shoal[vllm], or use the default engine.",
            code="no_vllm",
        ) from None

    class SeededProcessor(LogitsProcessor):  # type: ignore[misc]
        def __init__(self, vllm_config: Any, req_states: Any) -> None:
            self._places: dict[int, tuple[int, int]] = {}

        def add_request(self, req_idx: int, sampling_params: Any) -> bool:
            arguments = sampling_params.extra_args or {}
            self._places.pop(req_idx, None)
            if _ROW in arguments:
                self._places[req_idx] = (arguments[_ROW], arguments[_PROMPT_LENGTH])
            return _ROW in arguments

        def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
            slots, inputs = ctx.expanded_idx_mapping.tolist(), ctx.pos.tolist()
            # Rows still in their prompt, and vLLM's own warm-up, draw nothing that is kept.
            rows = [
                (number, row, position + 1 - length)
                for number, (slot, position) in enumerate(zip(slots, inputs, strict=True))
                for row, length in [self._places.get(slot, (0, position + 2))]
                if position + 1 >= length
            ]
            if not rows:
                return logits
            number_n, row_n, position_n = np.array(rows, dtype=np.int64).T
            index_n = torch.from_numpy(number_n).to(logits.device)
            chosen_n = book.choose(logits[index_n], row_n, position_n)
            logits[index_n] = float("-inf")
            logits[index_n, chosen_n] = 0.0
            return logits

    return SeededProcessor


def _vllm() -> Any:
    import vllm

    return vllm


def _lora_request(name: str, number: int, path: str) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, number, path)
