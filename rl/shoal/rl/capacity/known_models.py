"""Public configurations, so that a plan can be made for a model nobody has downloaded yet.

Source: the ``config.json`` of each model on the Hugging Face hub, read November 2026; the
built-in models are those of `shoal.models.tiny`.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from shoal.protocol.canonical import parse_json
from shoal.protocol.errors import InvalidRequest, NotFound
from shoal.rl.capacity.architecture import ModelShape, shape_from_config

_MAX_CONFIG_BYTES = 1 << 20

_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "tie_word_embeddings",
)


def _dense(*values: str | int | bool) -> dict[str, Any]:
    return dict(zip(_FIELDS, values, strict=True))


_TINY = (128, 384, 3, 4, 4, 32, 256, False)
_BUILTINS = {
    "addition": 77,
    "chain-sum": 78,
    "gcd": 79,
    "leg-counting": 119,
    "spell-backward": 79,
}
"""Vocabularies of the built-in models: 77 characters, and what prompts have in common."""
_LLAMA3 = "meta-llama/Llama-3"

CONFIGS: dict[str, dict[str, Any]] = {
    **{
        f"builtin:tiny-{name}": _dense("llama", vocabulary, *_TINY) | {"dtype": "float32"}
        for name, vocabulary in _BUILTINS.items()
    },
    f"{_LLAMA3}.2-1B": _dense("llama", 128_256, 2048, 8192, 16, 32, 8, 64, 131_072, True),
    f"{_LLAMA3}.2-3B": _dense("llama", 128_256, 3072, 8192, 28, 24, 8, 128, 131_072, True),
    f"{_LLAMA3}.1-8B": _dense("llama", 128_256, 4096, 14_336, 32, 32, 8, 128, 131_072, False),
    f"{_LLAMA3}.1-70B": _dense("llama", 128_256, 8192, 28_672, 80, 64, 8, 128, 131_072, False),
    "meta-llama/Llama-2-7b-hf": _dense("llama", 32_000, 4096, 11_008, 32, 32, 32, 128, 4096, False),
    "mistralai/Mistral-7B-v0.3": _dense(
        "mistral", 32_768, 4096, 14_336, 32, 32, 8, 128, 32_768, False
    ),
    "Qwen/Qwen2.5-0.5B": _dense("qwen2", 151_936, 896, 4864, 24, 14, 2, 64, 32_768, True),
    "Qwen/Qwen2.5-1.5B": _dense("qwen2", 151_936, 1536, 8960, 28, 12, 2, 128, 131_072, True),
    "Qwen/Qwen2.5-7B": _dense("qwen2", 152_064, 3584, 18_944, 28, 28, 4, 128, 131_072, False),
    "Qwen/QwQ-32B": _dense("qwen2", 152_064, 5120, 27_648, 64, 40, 8, 128, 40_960, False),
    "Qwen/Qwen3-0.6B": _dense("qwen3", 151_936, 1024, 3072, 28, 16, 8, 128, 40_960, True),
    "Qwen/Qwen3-4B": _dense("qwen3", 151_936, 2560, 9728, 36, 32, 8, 128, 40_960, True),
    "Qwen/Qwen3-8B": _dense("qwen3", 151_936, 4096, 12_288, 36, 32, 8, 128, 40_960, False),
    "Qwen/Qwen3-30B-A3B": {
        **_dense("qwen3_moe", 151_936, 2048, 6144, 48, 32, 4, 128, 40_960, False),
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    },
    "moonshotai/Kimi-K2-Instruct": {
        **_dense("kimi_k2", 163_840, 7168, 18_432, 61, 64, 64, 112, 131_072, False),
        "moe_intermediate_size": 2048,
        "n_routed_experts": 384,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 1,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "dtype": "float8_e4m3fn",
    },
}

SIZES = {
    "1B": f"{_LLAMA3}.2-1B",
    "3B": f"{_LLAMA3}.2-3B",
    "8B": f"{_LLAMA3}.1-8B",
    "70B": f"{_LLAMA3}.1-70B",
    "1T": "moonshotai/Kimi-K2-Instruct",
}
"""Sizes by which a model may be asked for, and the model that stands for each."""


def find_shape(model: str) -> ModelShape:
    """The shape of ``model``: a size, a known name, a ``config.json`` or a folder with one.

    Raises:
        NotFound: it looks like a path and nothing is there.
        InvalidRequest: nobody knows that name, or the configuration cannot be read.
    """
    name = SIZES.get(model.upper(), model)
    if name in CONFIGS:
        return shape_from_config(CONFIGS[name], name)
    path = Path(model).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".json" or path.is_file():
        return shape_from_config(_read_config(path), str(path))
    known = [*SIZES, *CONFIGS]
    nearest = difflib.get_close_matches(model, known, n=1, cutoff=0.0)[0]
    raise InvalidRequest(
        f"The planner does not know the model {model!r}; the nearest it knows is {nearest!r}, "
        "and --model takes the path of any config.json.",
        code="unknown_model",
        model=model,
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        raise NotFound(f"There is no model configuration at {path}; check the path.") from None
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}.") from error
    if len(data) > _MAX_CONFIG_BYTES:
        raise InvalidRequest(f"{path} is larger than {_MAX_CONFIG_BYTES} bytes.")
    try:
        config = parse_json(data)
    except ValueError:
        raise InvalidRequest(
            f"{path} is not JSON; give the config.json of the model.", code="bad_config"
        ) from None
    if not isinstance(config, dict):
        raise InvalidRequest(f"{path} holds no table of settings.", code="bad_config")
    # Models that also see pictures keep the language model's settings apart.
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config
