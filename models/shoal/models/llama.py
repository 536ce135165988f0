"""The forward pass of Llama-type models as one function over packed tokens.

Modules of ``transformers`` cost more than the arithmetic when a model or a batch is small.
Here a pass is a list of weights, one function, and an ``attend`` callable that knows which
tokens see which; sampling and differentiation pass different ones.  A LoRA adapter is added
to the weights before a pass, which then costs what the base's costs.  A model whose own pass
gives other figures on a probe is not run here (`LlamaForward.of`).

Axes: ``n`` packed token, ``d`` hidden, ``h`` head, ``e`` within a head, ``v`` vocabulary,
``p`` distinct prompt, ``b`` row (completion), ``t`` position; ``o``/``i`` a weight's
outputs and inputs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # the name torch itself documents

_log = logging.getLogger(__name__)

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""``attend(layer, q_nhe, k_nhe, v_nhe)`` is what each token reads, ``(n, h, e)``."""

MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
_ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})
"""Rotary embeddings whose angles depend on the position alone, not on the sequence's length."""
_PROBE_TOKENS = 16
_PROBE_TOLERANCE = 1e-4
"""Largest difference of log-probability between this pass and the model's own, on a probe."""


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Linear modules with one input, run as one: their weights lie below one another."""

    modules: tuple[Any, ...]

    def weight_oi(self) -> torch.Tensor:
        """The weights with their adapters added; differentiable in both."""
        weights = [_effective_weight(module) for module in self.modules]
        return weights[0] if len(weights) == 1 else torch.cat(weights)

    def bias_o(self) -> torch.Tensor | None:
        """The biases, or None where the modules have none."""
        biases = [_base_of(module).bias for module in self.modules]
        if biases[0] is None:
            return None
        return biases[0] if len(biases) == 1 else torch.cat(biases)

    @property
    def num_bytes(self) -> int:
        """Size of the weights."""
        weights = [_base_of(module).weight for module in self.modules]
        return sum(weight.numel() * weight.element_size() for weight in weights)


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One decoder layer, adapters added."""

    attention_norm_d: torch.Tensor
    qkv_od: torch.Tensor
    qkv_bias_o: torch.Tensor | None
    q_norm_e: torch.Tensor | None
    k_norm_e: torch.Tensor | None
    out_di: torch.Tensor
    out_bias_d: torch.Tensor | None
    mlp_norm_d: torch.Tensor
    gate_up_od: torch.Tensor
    gate_up_bias_o: torch.Tensor | None
    down_di: torch.Tensor
    down_bias_d: torch.Tensor | None


@dataclass(frozen=True, kw_only=True)
class LlamaWeights:
    """A whole model, adapters added."""

    embedding_vd: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm_d: torch.Tensor
    head_vd: torch.Tensor
    head_bias_v: torch.Tensor | None


@dataclass(frozen=True, kw_only=True)
class LlamaShape:
    """Head counts, sizes and limits of a model."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    norm_eps: float
    max_positions: int


class LlamaForward:
    """The forward pass of one model; weights are read anew for every `weights` call."""

    def __init__(self, model: Any) -> None:
        config, core = model.config, _core_of(model)
        heads = int(config.num_attention_heads)
        self.shape = LlamaShape(
            num_layers=len(core.layers),
            num_heads=heads,
            num_kv_heads=int(config.num_key_value_heads),
            head_size=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
            vocab_size=int(config.vocab_size),
            norm_eps=float(config.rms_norm_eps),
            max_positions=int(config.max_position_embeddings),
        )
        self._core = core
        self._head = _inner_of(model).lm_head
        self._rotary = core.rotary_emb
        self._projections = [
            (
                Projection(modules=(a.q_proj, a.k_proj, a.v_proj)),
                Projection(modules=(a.o_proj,)),
                Projection(modules=(m.gate_proj, m.up_proj)),
                Projection(modules=(m.down_proj,)),
            )
            for a, m in ((layer.self_attn, layer.mlp) for layer in core.layers)
        ]

    @classmethod
    def of(cls, model: Any) -> LlamaForward | None:
        """The pass of ``model``, or None where it is not known to equal the model's own."""
        if not _is_described(model):
            return None
        forward = cls(model)
        difference = forward._probe(model)
        if difference <= _PROBE_TOLERANCE:
            return forward
        _log.warning(
            "The short forward pass differs from the model's own; the model's own is used.",
            extra={"model_type": model.config.model_type, "difference": difference},
        )
        return None

    @property
    def merged_bytes(self) -> int:
        """Memory that the weights take once adapters are added."""
        return sum(part.num_bytes for layer in self._projections for part in layer)

    def weights(self) -> LlamaWeights:
        """The model's weights now, adapters added; differentiable where the model's are."""
        layers = tuple(
            self._layer(layer, parts)
            for layer, parts in zip(self._core.layers, self._projections, strict=True)
        )
        head = Projection(modules=(self._head,))
        return LlamaWeights(
            embedding_vd=self._core.embed_tokens.weight,
            layers=layers,
            norm_d=self._core.norm.weight,
            head_vd=head.weight_oi(),
            head_bias_v=head.bias_o(),
        )

    def hidden_nd(
        self,
        weights: LlamaWeights,
        ids_n: torch.Tensor,
        positions_n: torch.Tensor,
        attend: Attend,
    ) -> torch.Tensor:
        """The last hidden state of each token, normalised: what the head reads.

        Source: Llama 2, arXiv 2307.09288 §2.2 (RMSNorm, SwiGLU, rotary embeddings, grouped
        queries), and ``LlamaModel`` of transformers 5, which it equals.
        """
        shape = self.shape
        num_q, num_kv = shape.num_heads, shape.num_kv_heads
        cos_n1e, sin_n1e = self._rotation(positions_n)
        x_nd = F.embedding(ids_n, weights.embedding_vd)
        size = (x_nd.shape[-1],)
        for number, layer in enumerate(weights.layers):
            normed_nd = F.rms_norm(x_nd, size, layer.attention_norm_d, shape.norm_eps)
            qkv_nhe = F.linear(normed_nd, layer.qkv_od, layer.qkv_bias_o).view(
                len(ids_n), num_q + 2 * num_kv, shape.head_size
            )
            qk_nhe = self._normed_heads(layer, qkv_nhe[:, : num_q + num_kv])
            turned_nhe = qk_nhe.roll(shape.head_size // 2, dims=-1)
            qk_nhe = torch.addcmul(qk_nhe * cos_n1e, turned_nhe, sin_n1e)
            read_nhe = attend(number, qk_nhe[:, :num_q], qk_nhe[:, num_q:], qkv_nhe[:, -num_kv:])
            x_nd = x_nd + F.linear(read_nhe.flatten(1), layer.out_di, layer.out_bias_d)
            normed_nd = F.rms_norm(x_nd, size, layer.mlp_norm_d, shape.norm_eps)
            gate_no, up_no = F.linear(normed_nd, layer.gate_up_od, layer.gate_up_bias_o).chunk(2, 1)
            x_nd = x_nd + F.linear(F.silu(gate_no) * up_no, layer.down_di, layer.down_bias_d)
        return F.rms_norm(x_nd, size, weights.norm_d, shape.norm_eps)

    def logits_nv(self, weights: LlamaWeights, hidden_nd: torch.Tensor) -> torch.Tensor:
        """fp32 logits of hidden states."""
        return F.linear(hidden_nd, weights.head_vd, weights.head_bias_v).float()

    def _probe(self, model: Any) -> float:
        """Largest difference of a log-probability from the model's own, on a few tokens."""
        device = self._core.norm.weight.device
        ids_n = torch.arange(_PROBE_TOKENS, device=device) * 7919 % self.shape.vocab_size
        positions_n = torch.arange(_PROBE_TOKENS, device=device)

        def attend(
            _: int, q_nhe: torch.Tensor, k_nhe: torch.Tensor, v_nhe: torch.Tensor
        ) -> torch.Tensor:
            q, k, v = (x.unsqueeze(0).transpose(1, 2) for x in (q_nhe, k_nhe, v_nhe))
            return attention(q, k, v, is_causal=True).transpose(1, 2)[0]

        with torch.inference_mode():
            weights = self.weights()
            ours_nv = self.logits_nv(weights, self.hidden_nd(weights, ids_n, positions_n, attend))
            theirs_nv = model(input_ids=ids_n.unsqueeze(0), use_cache=False).logits[0].float()
            gap_nv = torch.log_softmax(ours_nv, dim=-1) - torch.log_softmax(theirs_nv, dim=-1)
            return float(gap_nv.abs().max())

    def _normed_heads(self, layer: LayerWeights, qk_nhe: torch.Tensor) -> torch.Tensor:
        if layer.q_norm_e is None or layer.k_norm_e is None:
            return qk_nhe
        num_q, size, eps = self.shape.num_heads, (self.shape.head_size,), self.shape.norm_eps
        q_nhe = F.rms_norm(qk_nhe[:, :num_q], size, layer.q_norm_e, eps)
        k_nhe = F.rms_norm(qk_nhe[:, num_q:], size, layer.k_norm_e, eps)
        return torch.cat([q_nhe, k_nhe], dim=1)

    def _rotation(self, positions_n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of each token's angles; the sine carries the rotation's sign."""
        cos_1ne, sin_1ne = self._rotary(self._core.norm.weight, positions_n.unsqueeze(0))
        half = self.shape.head_size // 2
        sin_ne = torch.cat([-sin_1ne[0, :, :half], sin_1ne[0, :, half:]], dim=1)
        return cos_1ne[0].unsqueeze(1), sin_ne.unsqueeze(1)

    def _layer(self, layer: Any, parts: tuple[Projection, ...]) -> LayerWeights:
        qkv, out, gate_up, down = parts
        attention = layer.self_attn
        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        return LayerWeights(
            attention_norm_d=layer.input_layernorm.weight,
            qkv_od=qkv.weight_oi(),
            qkv_bias_o=qkv.bias_o(),
            q_norm_e=None if q_norm is None else q_norm.weight,
            k_norm_e=None if k_norm is None else k_norm.weight,
            out_di=out.weight_oi(),
            out_bias_d=out.bias_o(),
            mlp_norm_d=layer.post_attention_layernorm.weight,
            gate_up_od=gate_up.weight_oi(),
            gate_up_bias_o=gate_up.bias_o(),
            down_di=down.weight_oi(),
            down_bias_d=down.bias_o(),
        )


def attention(
    q_bhte: torch.Tensor,
    k_bhte: torch.Tensor,
    v_bhte: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """Scaled dot-product attention; queries may have a multiple of the keys' heads."""
    return F.scaled_dot_product_attention(
        q_bhte,
        k_bhte,
        v_bhte,
        attn_mask=mask,
        is_causal=is_causal,
        enable_gqa=q_bhte.shape[1] != k_bhte.shape[1],
    )


def _effective_weight(module: Any) -> torch.Tensor:
    """``W + (α/r)·B·A`` of a PEFT layer, or the weight of a plain one.

    Source: LoRA, arXiv 2106.09685 §4.1.
    """
    weight_oi: torch.Tensor = _base_of(module).weight
    if not hasattr(module, "base_layer") or module.disable_adapters:
        return weight_oi
    (name,) = module.active_adapters
    a_ri, b_or = module.lora_A[name].weight, module.lora_B[name].weight
    return torch.addmm(weight_oi, b_or, a_ri, alpha=float(module.scaling[name]))


def _base_of(module: Any) -> Any:
    return getattr(module, "base_layer", module)


def _inner_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _core_of(model: Any) -> Any:
    return _inner_of(model).model


def _is_described(model: Any) -> bool:
    """Whether every part of ``model`` is of a form this module knows."""
    config = model.config
    if config.model_type not in MODEL_TYPES or config.hidden_act != "silu":
        return False
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        windowed = getattr(config, "sliding_window", None) is not None
    else:
        windowed = set(layer_types) != {"full_attention"}
    if rope_type not in _ROPE_TYPES or windowed:
        return False
    layers = _core_of(model).layers
    linears = [linear for layer in layers for linear in _linears_of(layer)]
    return all(_is_plain(linear) for linear in (*linears, _inner_of(model).lm_head))


def _linears_of(layer: Any) -> tuple[Any, ...]:
    a, m = layer.self_attn, layer.mlp
    return a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj


def _is_plain(module: Any) -> bool:
    """A dense linear module in fp32, bare or with one stock LoRA adapter."""
    base = _base_of(module)
    if type(base) is not torch.nn.Linear or base.weight.dtype != torch.float32:
        return False
    if module is base:
        return True
    dropout = module.lora_dropout.values()
    return (
        len(module.active_adapters) == 1
        and not module.merged
        and not module.lora_variant
        and all(isinstance(part, torch.nn.Identity) for part in dropout)
    )
