"""vLLM as a sampling engine, drawing the tokens that the task's uniforms select.

vLLM samples with generators of its own, which no verifier can replay.  A logits processor of
its second model runner sees every row's logits before temperature is applied: it selects the
token by the rule of `shoal.models.sampling`, notes its log-probability at the sampling
temperature, and leaves vLLM nothing else to choose.  For that the engine runs in this process
and on one device.  Without such a processor nothing is sampled: there is no unseeded mode.

In its own process vLLM gives its memory back only with the process, so a process has one
engine, of one base.  Adapters come and go; each call samples with the one of the moment.

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
from shoal.protocol.errors import InvalidRequest, InvariantBroken, Unavailable

LEAST_MAX_RANK = 64
"""An engine is built for adapters of this rank at least, so that jobs of usual ranks share it."""
_ROW, _PROMPT_LENGTH = "shoal_row", "shoal_prompt_length"


def require_vllm() -> None:
    """An installed vLLM is imported, and can be told which token to draw; takes seconds.

    Raises:
        InvalidRequest: it is not installed, or too old.
    """
    _processor_class()


class VllmEngine:
    """Samples with vLLM from a base in a folder and the adapter of the moment.

    Args:
        folder: The base.
        rank: The largest rank that adapters are known to have; there is room for larger ones.
        eos_ids: The tokens that end a completion.
        adapter_sha256: Gives the digest of the adapter as it is now.
        write_adapter: Writes it as a stock PEFT folder; called where the digest is a new one.
        dtype: In what vLLM computes.
        memory_share: Share of the device's memory that vLLM takes.

    Raises:
        InvalidRequest: vLLM is not installed, or too old to be told which token to draw.
        Unavailable: it does not start on this machine with this base.
    """

    name = "vllm"

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        eos_ids: frozenset[int],
        adapter_sha256: Callable[[], str],
        write_adapter: Callable[[Path], None],
        dtype: str = "float32",
        memory_share: float = 0.8,
    ) -> None:
        self.dtype = dtype
        self._eos_ids = sorted(eos_ids)
        self._adapter_sha256 = adapter_sha256
        self._write_adapter = write_adapter
        self._loaded: tuple[str, Any] = ("", None)
        self._num_loaded = 0
        self._book = DrawBook(self._eos_ids[0])
        # All that vLLM allows above the least are powers of two.
        self.max_rank = max(LEAST_MAX_RANK, 1 << (rank - 1).bit_length())
        processor, llm = _seeded_processor(self._book), _vllm().LLM
        self._adapters = Path(tempfile.mkdtemp(prefix="shoal-vllm-"))
        weakref.finalize(self, shutil.rmtree, self._adapters, ignore_errors=True)
        try:
            self._llm = llm(
                model=str(folder),
                dtype=dtype,
                enable_lora=True,
                max_lora_rank=self.max_rank,
                logits_processors=[processor],
                gpu_memory_utilization=memory_share,
                enable_prefix_caching=True,
                trust_remote_code=False,
            )
        except Exception as error:  # of whatever kind, by device and version
            raise Unavailable(
                f"vLLM does not start with this base: {type(error).__name__}: "
                f"{str(error)[:300]}; set engine to auto.",
                code="vllm_failed",
            ) from error
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
            Exception: whatever ``on_progress`` raises.
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
        self._book.open(uniforms_bt, temperature, on_progress)
        outputs = self._llm.generate(
            [{"prompt_token_ids": [int(token) for token in prompt]} for prompt in prompts],
            parameters,
            use_tqdm=False,
            lora_request=self._adapter(),
        )
        if self._book.broken_off is not None:
            raise self._book.broken_off
        token_ids = [np.array(o.outputs[0].token_ids, dtype=np.int32) for o in outputs]
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
    """Which token each row must draw at each position, and what was noted of it.

    Args:
        end_token: What rows draw once the call is broken off.

    Attributes:
        broken_off: What ``on_progress`` raised.
    """

    def __init__(self, end_token: int) -> None:
        self.broken_off: Exception | None = None
        self._end_token = end_token
        self._uniforms_bt: UniformTable | None = None
        self._temperature = 1.0
        self._on_progress: OnProgress | None = None
        self._num_tokens = 0
        self._noted: list[tuple[NDArray[np.int64], torch.Tensor]] = []

    def open(
        self,
        uniforms_bt: UniformTable | None,
        temperature: float,
        on_progress: OnProgress | None = None,
    ) -> None:
        """A call begins; nothing is noted yet."""
        self.broken_off = None
        self._uniforms_bt, self._temperature = uniforms_bt, temperature
        self._on_progress, self._num_tokens, self._noted = on_progress, 0, []

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
        self._tell(len(row_n))
        # Raising here would leave requests inside vLLM, so every row ends itself instead.
        return chosen_n if self.broken_off is None else torch.full_like(chosen_n, self._end_token)

    def _tell(self, num_tokens: int) -> None:
        self._num_tokens += num_tokens
        if self._on_progress is None or self.broken_off is not None:
            return
        try:
            self._on_progress(self._num_tokens)
        except Exception as error:  # raised by `VllmEngine.generate`, once vLLM is done
            self.broken_off = error

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

    class SeededProcessor(_processor_class()):  # type: ignore[misc]
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


def _processor_class() -> Any:
    """The class vLLM's own logits processors are made of.

    Raises:
        InvalidRequest: vLLM is not installed, or too old to have one.
    """
    # Read by vLLM when it is first imported or an engine is built.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")
    try:
        from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor
    except ImportError:
        raise InvalidRequest(
            "vLLM is missing or too old to be told which token to draw; install it with "
            '`pip install "shoal[vllm]"`, or set engine to auto.',
            code="no_vllm",
        ) from None
    return LogitsProcessor


def _vllm() -> Any:
    import vllm

    return vllm


def _lora_request(name: str, number: int, path: str) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, number, path)
