"""Every sampling engine keeps the same contract, whatever runs inside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from learning_fixtures import Lab, stir, write_base

from shoal.models.engine import Completions, LoopEngine, SamplingEngine
from shoal.models.llama import LlamaForward
from shoal.models.policy import Policy
from shoal.models.sampling import SeededUniforms, draw_uniforms_bt, select_tokens_b
from shoal.models.tiny import MAX_POSITIONS
from shoal.models.vllm_engine import VllmEngine
from shoal.protocol.errors import InvalidRequest

SEED = 7
MAX_TOKENS = 12
TEXTS = ("47+38=", "1+2=", "123+456=")
AVAILABLE = {
    "cpu": True,
    "cuda": torch.cuda.is_available(),
    "mps": torch.backends.mps.is_available(),
}
Build = Callable[..., SamplingEngine]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab.open(write_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module", params=[name for name, there in AVAILABLE.items() if there])
def policy(lab: Lab, request: pytest.FixtureRequest) -> Policy:
    policy = Policy.load(lab.folder, lab.policy.lora, seed=0, device=request.param)
    policy.load_adapter(lab.policy.adapter_bytes())
    return policy


@pytest.fixture(params=["shoal-llama", "transformers", "vllm"])
def build(policy: Policy, lab: Lab, request: pytest.FixtureRequest) -> Build:
    """Makes an engine of the kind under test, over ``policy`` unless another is given."""
    if request.param == "vllm":
        pytest.importorskip("vllm", reason="vLLM is not installed; it needs shoal[vllm]")

    def make(over: Policy | None = None, **limits: int) -> SamplingEngine:
        over = over or policy
        if request.param == "vllm":
            return over_vllm(over, lab)
        forward = LlamaForward.of(over.model) if request.param == "shoal-llama" else None
        engine = LoopEngine(over.model, forward, over.eos_ids, over.device, **limits)
        assert engine.name == request.param
        return engine

    return make


def over_vllm(policy: Policy, lab: Lab) -> SamplingEngine:
    assert policy.lora is not None
    return VllmEngine(
        lab.folder,
        rank=policy.lora.r,
        eos_ids=policy.eos_ids,
        adapter_sha256=policy.adapter_sha256,
        write_adapter=lambda folder: policy.save_adapter(folder, "base", "0" * 64),
    )


@pytest.mark.parametrize("device", AVAILABLE)
def test_the_contract_runs_on_every_device_there_is(device: str, policy: Policy) -> None:
    if not AVAILABLE[device]:
        pytest.skip(f"no {device} device: the contract is not run on it here")
    assert policy.device.type in AVAILABLE


def grouped(policy: Policy, group_size: int = 4) -> list[list[int]]:
    return [policy.encode_prompt(text) for text in TEXTS for _ in range(group_size)]


def draw(
    engine: SamplingEngine,
    prompts: Sequence[list[int]],
    *,
    temperature: float = 1.0,
    max_tokens: int = MAX_TOKENS,
    numbers: Sequence[int] | None = None,
) -> Completions:
    numbers = range(len(prompts)) if numbers is None else numbers
    return engine.generate(
        prompts,
        max_tokens=max_tokens,
        temperature=temperature,
        uniforms_bt=SeededUniforms(SEED, numbers, max_tokens),
    )


def assert_same(one: Completions, other: Completions, tolerance: float = 1e-5) -> None:
    assert [row.tolist() for row in one.token_ids] == [row.tolist() for row in other.token_ids]
    for mine, theirs in zip(one.logprobs, other.logprobs, strict=True):
        assert np.abs(mine - theirs).max() <= tolerance
    assert one.finished.tolist() == other.finished.tolist()


def forced(
    policy: Policy, prompt: list[int], tokens: list[int], temperature: float
) -> torch.Tensor:
    """Log-probabilities over the vocabulary, one prompt, no padding, nothing kept: ``(t, v)``."""
    row = torch.tensor([[*prompt, *tokens]], device=policy.device)
    with torch.inference_mode():
        logits = policy.model(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.float() / temperature, dim=-1).cpu()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_a_fresh_forced_pass(
    build: Build, policy: Policy, temperature: float
) -> None:
    prompts = grouped(policy)
    drawn = draw(build(), prompts, temperature=temperature)
    for prompt, tokens, logprobs in zip(prompts, drawn.token_ids, drawn.logprobs, strict=True):
        all_tv = forced(policy, prompt, tokens.tolist(), temperature)
        ours_t = all_tv.gather(1, torch.from_numpy(tokens).long()[:, None])[:, 0].numpy()
        assert np.abs(ours_t - logprobs).max() <= 1e-5


def test_the_uniforms_alone_say_which_tokens_had_to_be_drawn(build: Build, policy: Policy) -> None:
    prompts = grouped(policy)
    drawn = draw(build(), prompts)
    uniforms_bt = draw_uniforms_bt(SEED, range(len(prompts)), MAX_TOKENS)
    for row, (prompt, tokens) in enumerate(zip(prompts, drawn.token_ids, strict=True)):
        all_tv = forced(policy, prompt, tokens.tolist(), 1.0)
        uniforms_t = torch.from_numpy(uniforms_bt[row, : len(tokens)])
        assert select_tokens_b(all_tv, uniforms_t).tolist() == tokens.tolist()
        # The control: another row's uniforms say something else.
        others_t = torch.from_numpy(uniforms_bt[row - 1, : len(tokens)])
        assert select_tokens_b(all_tv, others_t).tolist() != tokens.tolist()


def test_rows_end_at_their_first_end_token(build: Build, policy: Policy) -> None:
    prompts = grouped(policy, group_size=16)
    drawn = draw(build(), prompts, temperature=1.5, max_tokens=40)
    (eos,) = policy.eos_ids
    assert 0 < drawn.finished.sum() < len(prompts)
    for tokens, finished in zip(drawn.token_ids, drawn.finished, strict=True):
        assert eos not in tokens[:-1]
        assert finished == (tokens[-1] == eos)
        assert finished or len(tokens) == 40


@pytest.mark.parametrize("max_rows", [2, 7])
def test_waiting_rows_enter_and_change_nothing(build: Build, policy: Policy, max_rows: int) -> None:
    prompts = grouped(policy)
    few = draw(build(max_rows=max_rows), prompts, temperature=1.3)
    assert_same(few, draw(build(), prompts, temperature=1.3))


def test_the_cache_keeps_to_its_bytes(build: Build, policy: Policy) -> None:
    if build().name == "vllm":
        pytest.skip("vLLM bounds its cache itself")
    config = policy.model.config
    token_bytes = 8 * config.num_hidden_layers * config.hidden_size
    row_bytes = token_bytes * (max(len(text) for text in TEXTS) + MAX_TOKENS)
    prompts = grouped(policy)
    assert_same(draw(build(max_cache_bytes=2 * row_bytes), prompts), draw(build(), prompts))
    with pytest.raises(InvalidRequest, match="max_tokens") as refused:
        draw(build(max_cache_bytes=row_bytes - 1), prompts)
    assert refused.value.code == "row_too_large"


def test_a_row_alone_is_the_row_in_company(build: Build, policy: Policy) -> None:
    prompts = grouped(policy)
    together = draw(build(), prompts)
    for row in (0, 5, 11):
        alone = draw(build(), prompts[row : row + 1], numbers=[row])
        assert alone.token_ids[0].tolist() == together.token_ids[row].tolist()
        assert np.abs(alone.logprobs[0] - together.logprobs[row]).max() <= 1e-5


def test_what_was_drawn_before_leaves_no_trace(build: Build, policy: Policy) -> None:
    engine, prompts = build(), grouped(policy)
    first = draw(engine, prompts)
    draw(engine, prompts[::-1], temperature=1.7, numbers=range(100, 112))
    assert_same(draw(engine, prompts), first, tolerance=0.0)


def test_greedy_takes_the_likeliest_token(build: Build, policy: Policy) -> None:
    prompts = grouped(policy, group_size=1)
    drawn = build().generate(prompts, max_tokens=6, temperature=1.0, uniforms_bt=None)
    for prompt, tokens in zip(prompts, drawn.token_ids, strict=True):
        assert forced(policy, prompt, tokens.tolist(), 1.0).argmax(1).tolist() == tokens.tolist()


def test_a_new_adapter_is_sampled_at_once(build: Build, policy: Policy, lab: Lab) -> None:
    swapped = Policy.load(lab.folder, lab.policy.lora, seed=0, device=str(policy.device))
    swapped.load_adapter(lab.policy.adapter_bytes())
    engine, prompts = build(swapped), grouped(policy)
    before = draw(engine, prompts)
    stir(lab.policy, seed=9, scale=0.3)
    try:
        swapped.load_adapter(lab.policy.adapter_bytes())
    finally:
        lab.policy.load_adapter(policy.adapter_bytes())
    after = draw(engine, prompts)
    assert_same(after, draw(build(swapped), prompts), tolerance=0.0)
    # The control: an engine that kept its weights would have drawn what it drew before.
    assert [row.tolist() for row in after.token_ids] != [row.tolist() for row in before.token_ids]


def test_progress_is_told(build: Build, policy: Policy) -> None:
    told: list[int] = []
    drawn = build().generate(
        grouped(policy), max_tokens=4, temperature=1.0, uniforms_bt=None, on_progress=told.append
    )
    assert told == sorted(told)
    assert told[-1] == sum(map(len, drawn.token_ids))


def test_nothing_to_do_is_done(build: Build) -> None:
    drawn = build().generate([], max_tokens=4, temperature=1.0, uniforms_bt=None)
    assert drawn.token_ids == []
    assert drawn.finished.shape == (0,)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "code"),
    [
        ([], 4, "empty_prompt"),
        ([5] * (MAX_POSITIONS + 1), 4, "context_exceeded"),
        ([5, 6, 7], MAX_POSITIONS - 2, "context_exceeded"),
    ],
)
def test_a_prompt_that_cannot_be_completed_is_named(
    build: Build, prompt: list[int], max_tokens: int, code: str
) -> None:
    with pytest.raises(InvalidRequest, match="Prompt 1 ") as refused:
        build().generate([[5], prompt], max_tokens=max_tokens, temperature=1.0, uniforms_bt=None)
    assert refused.value.code == code
    if code == "context_exceeded":
        assert str(MAX_POSITIONS) in str(refused.value)


def test_a_row_may_fill_the_context(build: Build, policy: Policy) -> None:
    prompt = [5] * (MAX_POSITIONS - 3)
    drawn = draw(build(), [prompt], max_tokens=3)
    all_tv = forced(policy, prompt, drawn.token_ids[0].tolist(), 1.0)
    assert all_tv.shape[0] == len(drawn.token_ids[0]) <= 3


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3", "llama"])
def test_other_llama_types_run_as_their_own_pass(model_type: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    config = AutoConfig.for_model(
        model_type,
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
    )
    if model_type == "mistral":
        config.sliding_window = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = auto.from_config(config).eval()
    forward = LlamaForward.of(model)
    assert forward is not None
    fast, plain = (
        LoopEngine(model, pass_, frozenset({1}), torch.device("cpu"), max_rows=4)
        for pass_ in (forward, None)
    )
    prompts = [[5, 6, 7], [5, 6, 7], [8, 9], [10, 11, 12, 13, 14]]
    assert_same(draw(fast, prompts), draw(plain, prompts))


def test_an_unknown_architecture_runs_by_its_own_pass() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=50, n_positions=64, n_embd=32, n_layer=2, n_head=2, eos_token_id=1
    )
    build_model: Any = GPT2LMHeadModel
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = build_model(config).eval()
    assert LlamaForward.of(model) is None
    engine = LoopEngine(model, None, frozenset({1}), torch.device("cpu"), max_rows=2)
    assert engine.name == "transformers"
    assert len(draw(engine, [[5, 6], [7], [8, 9, 10]]).token_ids) == 3


def test_a_model_that_only_looks_like_llama_runs_by_its_own_pass(
    lab: Lab, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = Policy.load(lab.folder, lab.policy.lora, seed=0).model
    layer = odd.get_base_model().model.layers[0]
    plain = layer.mlp.forward
    monkeypatch.setattr(layer.mlp, "forward", lambda x: 1.5 * plain(x))
    assert LlamaForward.of(odd) is None
    assert "differs from the model's own" in caplog.text


def test_windowed_attention_is_not_taken_for_plain() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        sliding_window=32,
    )
    build_model: Any = MistralForCausalLM
    assert LlamaForward.of(build_model(config).eval()) is None


def test_uniforms_drawn_late_are_those_drawn_at_once() -> None:
    late = SeededUniforms(SEED, [3, 9, 4], 300)
    at_once_bt = draw_uniforms_bt(SEED, [3, 9, 4], 300)
    order = np.random.default_rng(0).permutation(900)
    rows, positions = np.divmod(order, 300)
    for part in np.split(np.arange(900), 90):
        assert np.array_equal(
            late[rows[part], positions[part]], at_once_bt[rows[part], positions[part]]
        )
