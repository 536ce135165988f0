"""How much memory each part of a job takes, by role, without loading anything.

The memory model is M = N_linear·b_w/8 + N_embedding·b_e/8 + N_trained·s + A(rows, tokens,
vocabulary), with b bits of a base's weights, s bytes of state of a trained value, and A what
is alive while tokens are sampled or differentiated.
Source: QLoRA, arXiv 2305.14314 §2 and appendix G, for the parts; constants as noted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from shoal.protocol.job import JobSpec
from shoal.protocol.learning import GradientSpec
from shoal.rl.capacity.architecture import DENSE_TYPES, ModelShape

GIB = 1 << 30
FP32_BYTES = 4
USABLE_SHARE = 0.9
"""The part of a device's memory one program can count on; the rest is the driver's and lost
between blocks.  Source: vLLM's default ``gpu_memory_utilization``."""
RUNTIME_BYTES = 416 << 20
"""Python with torch, transformers and peft imported, before any weight is loaded."""

SAMPLING_MAX_ROWS = 512
SAMPLING_MAX_LOGITS = 1 << 24
SAMPLING_MAX_CACHE_BYTES = 1 << 30
SAMPLING_MAX_MERGED_BYTES = 4 << 30
"""What the engine runs at once, and up to which size it copies the weights with the adapter
added: the limits of `shoal.models.engine`."""
GRADIENT_MAX_ROWS = 256
GRADIENT_MAX_MICRO_BATCH_BYTES = 2 << 30
GRADIENT_MAX_MERGED_BYTES = 1 << 24
"""The same for a micro-batch: `shoal.rl.differentiate` and `shoal.models.scoring`."""

_SAMPLING_LOGIT_COPIES = 5
"""Logits at a step: raw, at temperature, normalised, and the double-precision sums."""
_GRADIENT_LOGIT_COPIES = 4
"""Logits, their log-softmax, and the gradients of both."""
_HIDDEN_KEPT = 9
_MLP_KEPT = 4
"""Vectors of a layer that differentiation keeps for each token: what goes into and comes out
of two norms, queries, keys and values (repeated for their queries), what attention reads,
twice; gate, its activation, up and their product."""
_LIMIT_HIDDEN = 8
"""The engine's own count of the former, by which it cuts micro-batches."""


class Role(StrEnum):
    """Who holds the memory."""

    ROLLOUT = "rollout"
    GRADIENT = "gradient"
    LEARNER = "learner"


class BaseFormat(StrEnum):
    """How a base's weights lie in memory."""

    FP32 = "fp32"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"
    TERNARY = "ternary"


AVAILABLE = frozenset({BaseFormat.FP32})
"""What workers load today."""

_BITS: dict[BaseFormat, tuple[float, float]] = {
    BaseFormat.FP32: (32, 32),
    BaseFormat.BF16: (16, 16),
    BaseFormat.INT8: (8 + 32 / 128, 16),
    BaseFormat.INT4: (4 + 32 / 32, 8),
    BaseFormat.TERNARY: (2.0625, 16),
}
"""Bits of a value of the linear layers, and of embedding and head.

Source: int4 with an fp32 scale per 32 values and int8 embeddings, Llama 3.2's quantised
models; ternary, llama.cpp's TQ2_0 (66 bytes for 256 values).
"""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A job on a model: what a footprint is computed from.

    Args:
        prompt_tokens: Of the longest prompt that is to be expected.
    """

    shape: ModelShape
    spec: JobSpec
    prompt_tokens: int
    base: BaseFormat = BaseFormat.FP32

    @property
    def trained_values(self) -> int:
        """Values that are trained and travel."""
        if self.spec.lora is None:
            return self.shape.num_parameters
        return self.shape.num_lora(self.spec.lora)

    @property
    def trained_arrays(self) -> int:
        """Arrays they come in."""
        if self.spec.lora is None:
            return sum(matrix.layers for matrix in self.shape.matrices) + 2
        return self.shape.num_lora_arrays(self.spec.lora)

    @property
    def row_cache_bytes(self) -> int:
        """Keys and values of the longest row."""
        length = self.prompt_tokens + self.spec.sampling.max_tokens
        return length * self.shape.cache_values_per_token * FP32_BYTES

    @property
    def can_sample(self) -> bool:
        """Whether workers hold the keys and values of at least one row."""
        return self.row_cache_bytes <= SAMPLING_MAX_CACHE_BYTES

    @property
    def sampled_rows(self) -> int:
        """Completions a rollout task samples at once; one in any case."""
        rows = self.spec.tasks.rollout * self.spec.rollouts_per_example
        logits = max(1, SAMPLING_MAX_LOGITS // self.shape.vocab_size)
        cache = max(1, SAMPLING_MAX_CACHE_BYTES // self.row_cache_bytes)
        return min(rows, self.spec.batch_size, SAMPLING_MAX_ROWS, logits, cache)

    @property
    def differentiated_rows(self) -> int:
        """Completions a gradient task differentiates at once; one in any case.

        The engine counts attention scores and a prompt for each row, to be on the safe side.
        """
        shape, width = self.shape, self.spec.sampling.max_tokens
        tokens = self.prompt_tokens + width
        kept = tokens * (_LIMIT_HIDDEN * shape.hidden_size + _MLP_KEPT * shape.mlp_width)
        layers = shape.num_layers * (kept + shape.num_heads * tokens * width)
        row_bytes = FP32_BYTES * (layers + _GRADIENT_LOGIT_COPIES * width * shape.vocab_size)
        cap = max(1, GRADIENT_MAX_MICRO_BATCH_BYTES // row_bytes)
        rows = self.spec.tasks.gradient * self.spec.rollouts_per_example
        return min(rows, self.spec.batch_size, GRADIENT_MAX_ROWS, cap)

    def merged_bytes(self, limit_bytes: int) -> int:
        """A copy of the linear weights with the adapter added, where one is made."""
        size = self.shape.linear_parameters * FP32_BYTES
        plain = self.base is BaseFormat.FP32 and self.shape.model_type in DENSE_TYPES
        return size if plain and self.spec.lora is not None and size <= limit_bytes else 0


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a role keeps in memory at its peak: bytes by part."""

    role: Role
    parts: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


def base_bytes(shape: ModelShape, base: BaseFormat) -> int:
    """Bytes of the frozen base; a quantised one keeps a head of its own."""
    linear_bits, embedding_bits = _BITS[base]
    tables = 2 if base is BaseFormat.INT4 else 1 if shape.tied_embeddings else 2
    embedding = tables * shape.vocab_size * shape.hidden_size
    bits = shape.linear_parameters * linear_bits + embedding * embedding_bits
    return int(bits / 8) + shape.other_parameters * FP32_BYTES


def rollout_footprint(setup: Setup) -> Footprint:
    """A worker that samples; memory of the longest completions."""
    shape, rows = setup.shape, setup.sampled_rows
    prompts = -(-rows // setup.spec.rollouts_per_example)
    merged = setup.merged_bytes(SAMPLING_MAX_MERGED_BYTES)
    return Footprint(
        role=Role.ROLLOUT,
        parts={
            **_weights(setup),
            **({"merged weights": merged} if merged else {}),
            "key-value cache": rows * setup.row_cache_bytes,
            "logits": rows * shape.vocab_size * FP32_BYTES * _SAMPLING_LOGIT_COPIES,
            "activations": prompts * setup.prompt_tokens * _width(shape) * FP32_BYTES,
        },
    )


def gradient_footprint(setup: Setup) -> Footprint:
    """A worker that differentiates; memory of one micro-batch of the longest completions."""
    shape, spec, rows = setup.shape, setup.spec, setup.differentiated_rows
    scored = rows * spec.sampling.max_tokens
    # A group's prompt is run once.
    tokens = scored + -(-rows // spec.rollouts_per_example) * setup.prompt_tokens
    kept = _HIDDEN_KEPT * shape.hidden_size + _MLP_KEPT * shape.mlp_width
    # The weights with the adapter added have a gradient of their own.
    merged = 2 * setup.merged_bytes(GRADIENT_MAX_MERGED_BYTES)
    return Footprint(
        role=Role.GRADIENT,
        parts={
            **_weights(setup),
            **({"merged weights": merged} if merged else {}),
            "gradient": setup.trained_values * FP32_BYTES,
            **_worker_state(setup.trained_values, spec.gradient),
            "activations": tokens * shape.num_layers * kept * FP32_BYTES,
            "logits": scored * shape.vocab_size * _GRADIENT_LOGIT_COPIES * FP32_BYTES,
        },
    )


def learner_footprint(setup: Setup) -> Footprint:
    """The orchestrator's part: it verifies, adds up and updates."""
    shape, spec, trained = setup.shape, setup.spec, setup.trained_values
    slices = -(-spec.groups_per_batch // spec.tasks.gradient)
    rows = setup.differentiated_rows
    tokens = rows * (spec.sampling.max_tokens + setup.prompt_tokens)
    return Footprint(
        role=Role.LEARNER,
        parts={
            **_weights(setup),
            # Slices as they came, and their sum in double precision.
            "gradients": trained * (slices * FP32_BYTES + 8),
            "optimiser": trained * 2 * FP32_BYTES,
            "kept versions": trained * FP32_BYTES * (spec.max_staleness + 1),
            "verification": tokens * _width(shape) * FP32_BYTES
            + rows * spec.sampling.max_tokens * shape.vocab_size * FP32_BYTES * 2,
        },
    )


def footprint_of(role: Role, setup: Setup) -> Footprint:
    """The footprint of ``role``."""
    match role:
        case Role.ROLLOUT:
            return rollout_footprint(setup)
        case Role.GRADIENT:
            return gradient_footprint(setup)
        case Role.LEARNER:
            return learner_footprint(setup)


def _width(shape: ModelShape) -> int:
    """Values of one layer alive for a token that nobody differentiates."""
    return 4 * shape.hidden_size + 2 * shape.mlp_width + 2 * shape.attention_width


def _weights(setup: Setup) -> dict[str, int]:
    """What every role holds first; without an adapter the weights themselves are trained."""
    parts = {"program": RUNTIME_BYTES, "base": base_bytes(setup.shape, setup.base)}
    if setup.spec.lora is not None:
        parts["adapter"] = setup.trained_values * FP32_BYTES
    return parts


def _worker_state(trained: int, gradient: GradientSpec) -> dict[str, int]:
    """Adam's moments and the weights at the start, for local steps; the residual."""
    parts = {}
    if gradient.local_steps > 1:
        parts["local optimiser"] = trained * 3 * FP32_BYTES
    if gradient.codec.error_feedback > 0:
        parts["error feedback"] = trained * FP32_BYTES
    return parts
