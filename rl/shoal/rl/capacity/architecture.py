"""The shape of a language model, read from its configuration: what it weighs, without loading it.

A model is its matrices.  From their sizes follow parameters, the adapter's size, arithmetic
per token and bytes of cache; nothing here needs the weights, or torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shoal.protocol.errors import InvalidRequest
from shoal.protocol.learning import LoraSpec

DENSE_TYPES = ("llama", "mistral", "qwen2", "qwen3")
MOE_TYPES = ("mixtral", "qwen3_moe", "deepseek_v3", "kimi_k2")
MODEL_TYPES = DENSE_TYPES + MOE_TYPES
_MAX_VALUE = 1 << 32
_STORED_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """One kind of weight matrix: ``copies`` of it in each of ``layers`` layers.

    ``active`` of the copies are used by a token.  ``adapted`` says whether LoRA on
    "all-linear" adapts it, with ``rank_factor`` times the job's rank.
    """

    name: str
    inputs: int
    outputs: int
    layers: int
    copies: int = 1
    active: int = 1
    adapted: bool = True
    rank_factor: int = 1
    bias: bool = False

    @property
    def num_parameters(self) -> int:
        """Values of all copies in all layers."""
        size = self.inputs * self.outputs + (self.outputs if self.bias else 0)
        return size * self.layers * self.copies

    @property
    def num_active(self) -> int:
        """Values that one token is multiplied with."""
        return self.inputs * self.outputs * self.layers * self.active

    def num_lora(self, rank: int) -> int:
        """Values of its A and B. Source: LoRA (arXiv 2106.09685) §4.1: r · (in + out)."""
        width = self.rank_factor * rank * (self.inputs + self.outputs)
        return width * self.layers * self.copies


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A causal language model of the Llama, Qwen, Mistral or DeepSeek kind.

    Args:
        model_type: As its configuration names it.
        kv_values: Values that one token leaves in the cache of one layer.
        num_heads: Of the queries.
        attention_width: Heads times the width of a head: what scores are computed over.
        mlp_width: Values between the two halves of the feed-forward block, for one token.
        other_parameters: Norms: what is neither a matrix, nor embedding, nor head.
        stored_value_bytes: Of one value in the model's files.
    """

    name: str
    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    kv_values: int
    num_heads: int
    attention_width: int
    mlp_width: int
    context_tokens: int
    tied_embeddings: bool
    other_parameters: int
    stored_value_bytes: int
    matrices: tuple[Matrix, ...]

    @property
    def embedding_parameters(self) -> int:
        """Values of the embedding, and of the head where it has its own."""
        return self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)

    @property
    def linear_parameters(self) -> int:
        """Values of all matrices between embedding and head."""
        return sum(matrix.num_parameters for matrix in self.matrices)

    @property
    def num_parameters(self) -> int:
        """Values of the whole model."""
        return self.linear_parameters + self.embedding_parameters + self.other_parameters

    @property
    def stored_bytes(self) -> int:
        """Bytes of the files a worker fetches once."""
        return self.num_parameters * self.stored_value_bytes

    @property
    def active_parameters(self) -> int:
        """Values one token is multiplied with, the head included and the embedding not."""
        return sum(m.num_active for m in self.matrices) + self.vocab_size * self.hidden_size

    @property
    def cache_values_per_token(self) -> int:
        """Values one token leaves in the key-value cache."""
        return self.kv_values * self.num_layers

    def adapted(self, lora: LoraSpec) -> tuple[Matrix, ...]:
        """The matrices ``lora`` adapts.

        Raises:
            InvalidRequest: it adapts none, or names a module the model does not have.
        """
        if lora.target_modules == "all-linear":
            return tuple(matrix for matrix in self.matrices if matrix.adapted)
        known = {matrix.name: matrix for matrix in self.matrices if matrix.adapted}
        wanted = lora.target_modules.split("|")
        found = tuple(known[name] for name in dict.fromkeys(wanted) if name in known)
        if not found:
            nearest = difflib.get_close_matches(wanted[0], known, n=1, cutoff=0.0)[0]
            raise InvalidRequest(
                f"lora.target_modules {lora.target_modules!r} names no module of {self.name}; "
                f"the nearest is {nearest!r}.",
                code="bad_lora",
            )
        return found

    def num_lora(self, lora: LoraSpec) -> int:
        """Values of the adapter."""
        return sum(matrix.num_lora(lora.r) for matrix in self.adapted(lora))

    def num_lora_arrays(self, lora: LoraSpec) -> int:
        """Arrays in the adapter's file: an A and a B for each matrix, experts stacked."""
        return sum(2 * matrix.layers for matrix in self.adapted(lora))


def shape_from_config(config: Mapping[str, Any], name: str) -> ModelShape:
    """The shape a Hugging Face ``config.json`` describes; ``name`` stands in complaints.

    Raises:
        InvalidRequest: a field is missing or no whole number, or the type is not known.
    """
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise InvalidRequest(
            f"The planner knows no model type {kind!r} (in {name}); it knows "
            f"{', '.join(MODEL_TYPES)}.",
            code="unknown_architecture",
        )
    fields = _Fields(config, name)
    attention, kv_values, width, norms = (
        _latent_attention(fields)
        if kind in ("deepseek_v3", "kimi_k2")
        else _attention(fields, kind)
    )
    blocks, mlp_width = _dense_mlp(fields) if kind in DENSE_TYPES else _experts(fields, kind)
    layers, hidden = fields.number("num_hidden_layers"), fields.number("hidden_size")
    return ModelShape(
        name=name,
        model_type=kind,
        vocab_size=fields.number("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        kv_values=kv_values,
        num_heads=fields.number("num_attention_heads"),
        attention_width=width,
        mlp_width=mlp_width,
        context_tokens=fields.number("max_position_embeddings", 1 << 20),
        tied_embeddings=config.get("tie_word_embeddings") is True,
        other_parameters=(2 * hidden + norms) * layers + hidden,
        stored_value_bytes=_STORED_BYTES.get(
            str(config.get("dtype") or config.get("torch_dtype")), 2
        ),
        matrices=(*attention, *blocks),
    )


class _Fields:
    """Whole numbers of a configuration somebody else wrote."""

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        self._config = config
        self._name = name

    def number(self, key: str, default: int | None = None) -> int:
        value = self._config.get(key)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _MAX_VALUE:
            raise InvalidRequest(
                f"{key} in {self._name} is {value!r}; it should be a whole number.",
                code="bad_config",
            )
        return value

    def positive(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if value == 0:
            raise InvalidRequest(f"{key} in {self._name} is 0.", code="bad_config")
        return value


def _attention(fields: _Fields, kind: str) -> tuple[tuple[Matrix, ...], int, int, int]:
    """Grouped-query attention: matrices, cache values per layer, width, values of its norms."""
    hidden, layers = fields.positive("hidden_size"), fields.positive("num_hidden_layers")
    heads = fields.positive("num_attention_heads")
    kv_heads = fields.positive("num_key_value_heads", heads)
    head = fields.positive("head_dim", hidden // heads)
    bias = kind == "qwen2"
    sizes = {
        "q_proj": (hidden, heads * head, bias),
        "k_proj": (hidden, kv_heads * head, bias),
        "v_proj": (hidden, kv_heads * head, bias),
        "o_proj": (heads * head, hidden, False),
    }
    matrices = tuple(
        Matrix(name=name, inputs=inputs, outputs=outputs, layers=layers, bias=biased)
        for name, (inputs, outputs, biased) in sizes.items()
    )
    norms = 2 * head if kind in ("qwen3", "qwen3_moe") else 0
    return matrices, 2 * kv_heads * head, heads * head, norms


def _latent_attention(fields: _Fields) -> tuple[tuple[Matrix, ...], int, int, int]:
    """Multi-head latent attention: the cache holds what keys and values are made from.

    Source: DeepSeek-V2, arXiv 2405.04434 §2.1.2.
    """
    hidden, layers = fields.positive("hidden_size"), fields.positive("num_hidden_layers")
    heads = fields.positive("num_attention_heads")
    q_rank, kv_rank = fields.positive("q_lora_rank"), fields.positive("kv_lora_rank")
    rope, nope = fields.positive("qk_rope_head_dim"), fields.positive("qk_nope_head_dim")
    value = fields.positive("v_head_dim")
    sizes = {
        "q_a_proj": (hidden, q_rank),
        "q_b_proj": (q_rank, heads * (rope + nope)),
        "kv_a_proj_with_mqa": (hidden, kv_rank + rope),
        "kv_b_proj": (kv_rank, heads * (nope + value)),
        "o_proj": (heads * value, hidden),
    }
    matrices = tuple(
        Matrix(name=name, inputs=inputs, outputs=outputs, layers=layers)
        for name, (inputs, outputs) in sizes.items()
    )
    return matrices, kv_rank + rope, heads * (rope + nope), q_rank + kv_rank


def _dense_mlp(fields: _Fields) -> tuple[tuple[Matrix, ...], int]:
    inner = fields.positive("intermediate_size")
    hidden, layers = fields.positive("hidden_size"), fields.positive("num_hidden_layers")
    return _gated(hidden, inner, layers, adapted=True), inner


def _gated(hidden: int, inner: int, layers: int, *, adapted: bool) -> tuple[Matrix, ...]:
    return tuple(
        Matrix(name=name, inputs=inputs, outputs=outputs, layers=layers, adapted=adapted)
        for name, inputs, outputs in (
            ("gate_proj", hidden, inner),
            ("up_proj", hidden, inner),
            ("down_proj", inner, hidden),
        )
    )


def _experts(fields: _Fields, kind: str) -> tuple[tuple[Matrix, ...], int]:
    """Mixture of experts, as transformers 5 stores it: gate and up fused, experts stacked.

    PEFT adapts router and experts (gate and up with twice the rank, having been two), but
    neither a shared expert nor the dense layers that come first.
    """
    hidden, layers = fields.positive("hidden_size"), fields.positive("num_hidden_layers")
    inner = fields.positive("intermediate_size" if kind == "mixtral" else "moe_intermediate_size")
    key = {"mixtral": "num_local_experts", "qwen3_moe": "num_experts"}.get(kind, "n_routed_experts")
    experts, active = fields.positive(key), fields.positive("num_experts_per_tok")
    dense = fields.number("first_k_dense_replace", 0) if kind not in ("mixtral", "qwen3_moe") else 0
    shared = inner * fields.number("n_shared_experts", 0)
    sparse = layers - dense
    if sparse < 1 or active > experts:
        raise InvalidRequest(
            f"The experts of the {kind} configuration do not add up: {dense} of {layers} layers "
            f"dense, {active} of {experts} experts active.",
            code="bad_config",
        )
    blocks: tuple[Matrix, ...] = (
        Matrix(name="gate", inputs=hidden, outputs=experts, layers=sparse),
        Matrix(
            name="gate_up_proj",
            inputs=hidden,
            outputs=2 * inner,
            layers=sparse,
            copies=experts,
            active=active,
            rank_factor=2,
        ),
        Matrix(
            name="down_proj",
            inputs=inner,
            outputs=hidden,
            layers=sparse,
            copies=experts,
            active=active,
        ),
    )
    if shared:
        blocks += _gated(hidden, shared, sparse, adapted=False)
    if dense:
        blocks += _gated(hidden, fields.positive("intermediate_size"), dense, adapted=False)
    return blocks, inner * active + shared
