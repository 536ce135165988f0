"""The planner's figures against the libraries, the engine's limits, and published numbers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learning_fixtures import make_spec, write_base

from shoal.models import engine, scoring
from shoal.models.policy import Policy
from shoal.protocol.errors import InvalidRequest, NotFound
from shoal.protocol.job import EnvSpec, SamplingSpec, TaskSizes
from shoal.protocol.learning import CodecKind, CodecSpec, GradientSpec, LoraSpec
from shoal.rl import differentiate
from shoal.rl.base_models import RECIPES
from shoal.rl.batch import EvaluatePayload, GradientSlice, RolloutPayload
from shoal.rl.capacity import footprint
from shoal.rl.capacity.architecture import shape_from_config
from shoal.rl.capacity.fitting import fit_role
from shoal.rl.capacity.footprint import (
    GIB,
    BaseFormat,
    Role,
    Setup,
    base_bytes,
    footprint_of,
)
from shoal.rl.capacity.known_models import CONFIGS, find_shape
from shoal.rl.capacity.prompt_length import prompt_length
from shoal.rl.capacity.volume import Expectation, num_evaluations, volume_of

MIB = 1 << 20
DENSE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": DENSE | {"tie_word_embeddings": True},
    "mistral": DENSE | {"head_dim": 16},
    "qwen2": DENSE | {"tie_word_embeddings": True},
    "qwen3": DENSE | {"head_dim": 16},
    "mixtral": DENSE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": DENSE
    | {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "deepseek_v3": DENSE
    | {
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 24,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 12,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_group": 1,
        "topk_group": 1,
    },
}


def setup_of(model: str, prompt_tokens: int = 100, **changes: object) -> Setup:
    base = changes.pop("base", BaseFormat.FP32)
    assert isinstance(base, BaseFormat)
    changes.setdefault("lora", LoraSpec(r=16))
    return Setup(
        shape=find_shape(model),
        spec=make_spec(**changes),
        prompt_tokens=prompt_tokens,
        base=base,
    )


# --- the model ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAMILIES)
def test_parameters_adapter_and_cache_are_those_of_the_libraries(kind: str) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(CONFIG_MAPPING[kind](**FAMILIES[kind]))
    shape = shape_from_config({"model_type": kind, **FAMILIES[kind]}, kind)
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())

    with torch.inference_mode():
        cache = model(input_ids=torch.zeros(1, 3, dtype=torch.long), use_cache=True)
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.past_key_values.layers)
    assert shape.cache_values_per_token * 3 == held

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(
            model,
            LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"),
            autocast_adapter_dtype=False,
        )
    arrays = [p.numel() for p in adapted.parameters() if p.requires_grad]
    lora = LoraSpec(r=3)
    assert (shape.num_lora(lora), shape.num_lora_arrays(lora)) == (sum(arrays), len(arrays))


@pytest.mark.parametrize(
    ("model", "total", "active"),
    [
        ("1B", 1.24e9, 1.24e9),
        ("3B", 3.21e9, 3.21e9),
        ("8B", 8.03e9, 7.5e9),
        ("70B", 70.6e9, 69.5e9),
        ("1T", 1.03e12, 32e9),
        ("Qwen/Qwen3-30B-A3B", 30.5e9, 3.3e9),
        ("Qwen/QwQ-32B", 32.8e9, 32e9),
    ],
)
def test_known_models_have_their_published_sizes(model: str, total: float, active: float) -> None:
    """Source: the models' own cards."""
    shape = find_shape(model)
    assert shape.num_parameters == pytest.approx(total, rel=0.005)
    assert shape.active_parameters == pytest.approx(active, rel=0.1)


@pytest.mark.parametrize(
    ("model", "adapter", "smaller"),
    [("1B", 11.3e6, 110), ("3B", 24.3e6, 132), ("8B", 42e6, 192), ("70B", 207e6, 341)],
)
def test_rank_16_adapters_have_the_published_sizes(
    model: str, adapter: float, smaller: float
) -> None:
    """Source: LoRA parameters as PEFT prints them; the ratio is that of the broadcasts."""
    shape = find_shape(model)
    assert shape.num_lora(LoraSpec(r=16)) == pytest.approx(adapter, rel=0.005)
    ratio = shape.num_parameters / shape.num_lora(LoraSpec(r=16))
    assert ratio == pytest.approx(smaller, rel=0.01)


@pytest.mark.parametrize("name", RECIPES)
def test_builtin_models_are_as_listed(name: str) -> None:
    from shoal.models.tiny import build_model, build_tokenizer
    from shoal.rl.base_models import instruction_pieces
    from shoal.rl.environments import load_environment

    pieces = instruction_pieces(load_environment(RECIPES[name].environment))
    model = build_model(0, len(build_tokenizer(pieces)))
    shape = find_shape(f"builtin:{name}")
    # The vocabulary follows the environment's words, and with it the last few per cent.
    assert shape.num_parameters == pytest.approx(
        sum(p.numel() for p in model.parameters()), rel=0.02
    )
    assert model.config.max_position_embeddings == shape.context_tokens


def test_every_known_configuration_is_read() -> None:
    builtins = {name.removeprefix("builtin:") for name in CONFIGS if name.startswith("builtin:")}
    assert builtins >= set(RECIPES)
    assert all(find_shape(name).num_parameters > 0 for name in CONFIGS)


def test_a_configuration_on_disk_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **DENSE}))
    assert find_shape(str(tmp_path)) == find_shape(str(tmp_path / "config.json"))
    wrapped = tmp_path / "wrapped.json"
    wrapped.write_text(json.dumps({"text_config": {"model_type": "llama", **DENSE}}))
    assert find_shape(str(wrapped)).num_parameters == find_shape(str(tmp_path)).num_parameters


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("{", "is not JSON; give the config.json"),
        ("[]", "holds no table of settings"),
        ('{"model_type": "mamba"}', "knows no model type 'mamba'"),
        ('{"model_type": ["llama"]}', "knows no model type"),
        ('{"model_type": "llama"}', "hidden_size in .* is None; it should be a whole number"),
        (
            json.dumps({"model_type": "llama", **DENSE, "hidden_size": 1e9}),
            "hidden_size in .* is 1000000000.0",
        ),
        (
            json.dumps({"model_type": "llama", **DENSE, "num_hidden_layers": 10**30}),
            "num_hidden_layers in .* is 1000",
        ),
        (json.dumps({"model_type": "llama", **DENSE, "num_attention_heads": 0}), "is 0"),
        (
            json.dumps({"model_type": "mixtral", **FAMILIES["mixtral"], "num_experts_per_tok": 9}),
            "9 of 4 experts active",
        ),
    ],
)
def test_a_bad_configuration_is_one_sentence(tmp_path: Path, config: str, expected: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(config)
    with pytest.raises(InvalidRequest, match=expected):
        find_shape(str(path))


def test_an_unknown_model_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"does not know the model 'Llama-3\.1-8B'.*3\.1-8B'"):
        find_shape("Llama-3.1-8B")
    with pytest.raises(NotFound, match="no model configuration at"):
        find_shape(str(tmp_path / "absent.json"))
    (tmp_path / "big.json").write_bytes(b" " * (1 << 21))
    with pytest.raises(InvalidRequest, match="larger than"):
        find_shape(str(tmp_path / "big.json"))


def test_target_modules_are_counted_or_named_wrong() -> None:
    shape = find_shape("8B")
    some = shape.num_lora(LoraSpec(r=16, target_modules="q_proj|v_proj"))
    assert some == 16 * 32 * (4096 + 4096 + 4096 + 1024)
    with pytest.raises(InvalidRequest, match=r"names no module of .*; the nearest is 'q_proj'"):
        shape.num_lora(LoraSpec(target_modules="q_prj"))


# --- memory -------------------------------------------------------------------------------


def test_the_limits_are_the_engines_own() -> None:
    assert footprint.SAMPLING_MAX_ROWS == engine.MAX_ROWS
    assert footprint.SAMPLING_MAX_LOGITS == engine.MAX_LOGITS
    assert footprint.SAMPLING_MAX_CACHE_BYTES == engine.MAX_CACHE_BYTES
    assert footprint.SAMPLING_MAX_MERGED_BYTES == engine.MAX_MERGED_BYTES
    assert footprint.GRADIENT_MAX_ROWS == differentiate.MAX_ROWS
    assert footprint.GRADIENT_MAX_MICRO_BATCH_BYTES == differentiate.MAX_MICRO_BATCH_BYTES
    assert footprint.GRADIENT_MAX_MERGED_BYTES == scoring.MAX_MERGED_BYTES


@pytest.mark.parametrize(
    ("model", "base", "mebibytes"),
    [
        ("1B", BaseFormat.BF16, 2358),
        ("3B", BaseFormat.BF16, 6129),
        ("1B", BaseFormat.INT4, 1083),
        ("3B", BaseFormat.INT4, 2435),
    ],
)
def test_bases_weigh_what_their_makers_say(model: str, base: BaseFormat, mebibytes: int) -> None:
    """Source: Llama 3.2's quantised models, README of ExecuTorch (bf16 and SpinQuant)."""
    assert base_bytes(find_shape(model), base) / MIB == pytest.approx(mebibytes, rel=0.005)


def test_an_8b_base_needs_about_16_gb_in_bf16_and_twice_that_in_fp32() -> None:
    shape = find_shape("8B")
    assert base_bytes(shape, BaseFormat.BF16) == pytest.approx(16.06e9, rel=0.001)
    assert base_bytes(shape, BaseFormat.FP32) == 4 * shape.num_parameters


def test_the_parts_of_a_footprint_follow_the_job() -> None:
    setup = setup_of("1B")
    parts = footprint_of(Role.ROLLOUT, setup).parts
    assert parts["key-value cache"] == 16 * 105 * 16_384 * 4
    assert parts["merged weights"] == setup.shape.linear_parameters * 4
    full = footprint_of(Role.GRADIENT, setup_of("1B", lora=None)).parts
    assert "adapter" not in full
    assert full["gradient"] == full["base"]
    codec = CodecSpec(kind=CodecKind.INT8, error_feedback=0.9)
    steps = setup_of("1B", gradient=GradientSpec(codec=codec, local_steps=4))
    parts = footprint_of(Role.GRADIENT, steps).parts
    assert parts["local optimiser"] == 3 * parts["adapter"]
    assert parts["error feedback"] == parts["adapter"]


def test_what_fits_has_no_remedy_and_what_does_not_has_one_that_fits() -> None:
    setup = setup_of("8B", sampling=SamplingSpec(max_tokens=512))
    for role in Role:
        assert fit_role(role, setup, 80 * GIB).fits
        assert not fit_role(role, setup, 80 * GIB).remedies
        poor = fit_role(role, setup, 12 * GIB)
        assert not poor.fits
        assert [remedy.available for remedy in poor.remedies] == [False, True]
        assert all(remedy.needs_bytes <= 12 * GIB for remedy in poor.remedies)
        assert "not available yet" in poor.remedies[0].sentence()
        assert "the model meta-llama/Llama-3.2-1B" in poor.remedies[1].change
    assert not fit_role(Role.ROLLOUT, setup, MIB).remedies


def test_a_smaller_task_is_tried_before_another_base() -> None:
    setup = setup_of(
        "1B",
        batch_size=512,
        rollouts_per_example=8,
        sampling=SamplingSpec(max_tokens=512),
    )
    needs = footprint_of(Role.ROLLOUT, setup).total_bytes
    (remedy,) = fit_role(Role.ROLLOUT, setup, needs - 500 * MIB).remedies
    assert remedy.available
    assert remedy.change.startswith("tasks.rollout = ")


def test_a_completion_beyond_the_engines_cache_does_not_run_at_all() -> None:
    setup = setup_of("70B", sampling=SamplingSpec(max_tokens=8192))
    fit = fit_role(Role.ROLLOUT, setup, 10_000 * GIB)
    assert not fit.fits
    assert "exceed what workers hold" in fit.sentence()
    assert fit.remedies[0].change.startswith("sampling.max_tokens = ")


# --- tokens and bytes ---------------------------------------------------------------------


def test_a_version_has_the_bytes_of_the_real_adapter(tmp_path: Path) -> None:
    policy = Policy.load(write_base(tmp_path), LoraSpec(r=16), seed=0)
    volume = volume_of(setup_of("builtin:tiny-addition"), _expected(4, 6))
    assert volume.version_bytes == pytest.approx(len(policy.adapter_bytes()), rel=0.01)


@pytest.mark.parametrize("kind", CodecKind)
def test_a_gradient_has_the_bytes_of_its_codec(kind: CodecKind) -> None:
    spec = GradientSpec(codec=CodecSpec(kind=kind))
    volume = volume_of(setup_of("8B", gradient=spec), _expected(100, 50))
    bits = {CodecKind.FP32: 32, CodecKind.FP16: 16, CodecKind.INT8: 8, CodecKind.TOPK: 0.234}
    assert volume.gradient.up_bytes * 8 / 41_943_040 == pytest.approx(bits[kind], rel=0.02)


def test_payloads_have_the_predicted_bytes() -> None:
    setup = setup_of("1B", batch_size=64, rollouts_per_example=8)
    volume = volume_of(setup, _expected(tokens=20, prompt=30))
    tokens = tuple(np.arange(20, dtype=np.int32) for _ in range(64))
    logprobs = tuple(np.zeros(20, dtype=np.float32) for _ in range(64))
    rollout = RolloutPayload(
        prompts_sha256=(bytes(32),) * 8,
        token_ids=tokens,
        logprobs=logprobs,
        finished=np.ones(64, dtype=np.bool_),
        rewards=np.zeros(64, dtype=np.float32),
    )
    assert volume.rollout.up_bytes == pytest.approx(len(rollout.encode()), rel=0.05)
    rows = GradientSlice(
        prompts=tuple(np.zeros(30, dtype=np.int32) for _ in range(8)),
        prompt_of_row=np.repeat(np.arange(8, dtype=np.int32), 8),
        token_ids=tokens,
        logprobs=logprobs,
        advantages=np.zeros(64, dtype=np.float32),
        truncated=np.zeros(64, dtype=np.bool_),
    )
    assert volume.gradient.down_bytes == pytest.approx(len(rows.encode()), rel=0.05)
    scored = EvaluatePayload(
        prompts_sha256=(bytes(32),) * 8,
        token_ids=tokens[:8],
        finished=np.ones(8, dtype=np.bool_),
        rewards=np.zeros(8, dtype=np.float32),
    )
    assert volume.evaluate.up_bytes == pytest.approx(len(scored.encode()), abs=1024)


def test_tokens_of_a_job_are_counted_round_by_round() -> None:
    setup = setup_of(
        "1B",
        batch_size=64,
        rollouts_per_example=8,
        max_steps=10,
        tasks=TaskSizes(rollout=3, gradient=2),
    )
    volume = volume_of(setup, _expected(tokens=20, prompt=30, share=0.5))
    assert (volume.rollout.tasks, volume.rollout.units, volume.rollout.tokens) == (3, 8, 1280)
    assert (volume.gradient.tasks, volume.gradient.units, volume.gradient.tokens) == (2, 4, 640)
    assert volume.rollout.job_tokens == 12_800
    assert volume.evaluate.rounds == 2


@pytest.mark.parametrize(
    ("steps", "interval", "rounds"), [(10, 20, 2), (10, 5, 3), (10, 3, 5), (1, 1, 2)]
)
def test_evaluations_are_at_the_start_each_interval_and_the_end(
    steps: int, interval: int, rounds: int
) -> None:
    assert num_evaluations(steps, interval) == rounds


def test_a_broadcast_takes_as_long_as_intellect_2_reports() -> None:
    """Source: arXiv 2505.07291: 62 GB of a 32 B model in about 14 minutes at 590 Mb/s."""
    stored = find_shape("Qwen/QwQ-32B").stored_bytes
    assert stored == pytest.approx(62e9, rel=0.06)
    assert stored * 8e-6 / 590 / 60 == pytest.approx(14, rel=0.07)


def test_prompts_are_as_long_as_the_tokenizer_makes_them() -> None:
    addition = make_spec()
    assert (prompt_length(addition).mean, prompt_length(addition).longest) == (6.0, 6)
    sums = make_spec(
        model="builtin:tiny-chain-sum", environments=(RECIPES["tiny-chain-sum"].environment,)
    )
    assert 6 < prompt_length(sums).mean < 12
    with pytest.raises(InvalidRequest, match="nowhere"):
        prompt_length(make_spec(environments=(EnvSpec(id="nowhere"),)))


def _expected(tokens: float, prompt: float, share: float = 1.0) -> Expectation:
    return Expectation(prompt_tokens=prompt, completion_tokens=tokens, teaching_share=share)
