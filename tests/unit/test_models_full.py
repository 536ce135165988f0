"""Full fine-tuning: every weight is trained and travels once, and the release is a plain model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from learning_fixtures import make_spec, stir, write_base

from shoal.models.policy import Policy
from shoal.models.tiny import build_tokenizer
from shoal.protocol.errors import PeerFault
from shoal.protocol.learning import CodecSpec, GradientSpec, LossSpec, OptimizerSpec
from shoal.rl.aggregation import AdapterOptimizer
from shoal.rl.batch import GradientPayload, GradientSlice
from shoal.rl.differentiate import differentiate
from shoal.rl.local import train_locally

PROMPTS = [[5, 6, 7], [5, 6, 7], [8, 9]]
COMPLETIONS = [[10, 11, 1], [12, 1], [13, 14]]


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose head is its embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tied")
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def logprobs(policy: Policy) -> torch.Tensor:
    with torch.no_grad():
        logprobs_bt, _ = policy.logprobs_bt(PROMPTS, COMPLETIONS, 1.0)
    return torch.cat([row[: len(c)] for row, c in zip(logprobs_bt, COMPLETIONS, strict=True)])


def rows() -> GradientSlice:
    return GradientSlice(
        prompts=(np.array([5, 6, 7], dtype=np.int32), np.array([8, 9], dtype=np.int32)),
        prompt_of_row=np.array([0, 0, 1], dtype=np.int32),
        token_ids=tuple(np.array(row, dtype=np.int32) for row in COMPLETIONS),
        logprobs=tuple(np.full(len(row), -4.0, dtype=np.float32) for row in COMPLETIONS),
        advantages=np.array([1.0, -1.0, 0.5], dtype=np.float32),
        truncated=np.zeros(3, dtype=np.bool_),
    )


def test_every_weight_travels_and_a_shared_one_once(tied: Path) -> None:
    policy = Policy.load(tied, None, seed=0)
    shapes = policy.shapes()
    assert "model.embed_tokens.weight" in shapes
    assert "lm_head.weight" not in shapes
    assert sum(int(np.prod(s)) for s in shapes.values()) == sum(
        p.numel() for p in policy.model.parameters()
    )
    assert policy.model.lm_head.weight is policy.trainable()["model.embed_tokens.weight"]
    # Version 0 is the base itself, whatever the seed.
    assert policy.adapter_bytes() == Policy.load(tied, None, seed=9).adapter_bytes()


def test_weights_load_symmetrically_and_strangers_are_refused(tied: Path) -> None:
    policy, other = Policy.load(tied, None, seed=0), Policy.load(tied, None, seed=0)
    stir(policy)
    assert not torch.allclose(logprobs(policy), logprobs(other))
    other.load_adapter(policy.adapter_bytes())
    assert torch.equal(logprobs(policy), logprobs(other))
    assert other.adapter_sha256() == policy.adapter_sha256()
    arrays = safetensors.numpy.load(policy.adapter_bytes())
    before = other.adapter_bytes()
    for bad in (arrays | {"lm_head.weight": arrays["model.embed_tokens.weight"]}, {}):
        with pytest.raises(PeerFault, match="missing or unknown"):
            other.load_adapter(safetensors.numpy.save(bad))
    assert other.adapter_bytes() == before


def test_the_release_is_a_plain_model(tied: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = Policy.load(tied, None, seed=0)
    stir(policy)
    policy.save_folder(tmp_path / "release", "builtin:tied", "0" * 64, "# A card\n")
    names = {path.name for path in (tmp_path / "release").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert "adapter_config.json" not in names
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "release", local_files_only=True)
    ids = torch.tensor([PROMPTS[0] + COMPLETIONS[0]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, policy.model(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "release", local_files_only=True)
    assert tokenizer("47+38=")["input_ids"] == policy.encode_prompt("47+38=")
    # It is itself a base to go on from.
    again = Policy.load(tmp_path / "release", None, seed=0)
    assert again.adapter_bytes() == policy.adapter_bytes()


def test_the_gradient_of_a_shared_weight_is_that_of_both_uses(tied: Path) -> None:
    policy = Policy.load(tied, None, seed=0)
    ends = np.cumsum([len(row) for row in COMPLETIONS])[:-1]
    drawn = tuple(np.split(logprobs(policy).numpy(), ends))
    found = differentiate(policy, LossSpec(), 1.0, replace(rows(), logprobs=drawn))
    assert set(found.gradients) == set(policy.shapes())
    # The model's own pass, row by row; on policy the loss has the slope of -Â·log π.
    loss = torch.zeros(())
    for prompt, row, advantage in zip(PROMPTS, COMPLETIONS, (1.0, -1.0, 0.5), strict=True):
        logits_tv = policy.model(torch.tensor([prompt + row])).logits[0, len(prompt) - 1 : -1]
        logprobs_t = torch.log_softmax(logits_tv, dim=-1).gather(1, torch.tensor(row)[:, None])
        loss = loss - advantage * logprobs_t.sum()
    loss.backward()  # type: ignore[no-untyped-call]
    for name, parameter in policy.model.named_parameters():
        assert parameter.grad is not None
        assert np.allclose(found.gradients[name], parameter.grad.numpy(), atol=1e-5)
    embedding = found.gradients["model.embed_tokens.weight"]
    # Token 14 is only ever predicted and token 8 only read; 60 only shares in the softmax.
    norms = np.linalg.norm(embedding, axis=1)
    assert min(norms[14], norms[8]) > norms[60] > 0


def test_the_reference_of_a_kl_term_is_the_untrained_base(tied: Path) -> None:
    policy = Policy.load(tied, None, seed=0)
    base = logprobs(policy)
    loss = LossSpec(kl_beta=0.5)
    assert differentiate(policy, loss, 1.0, rows()).stats.kl_sum == pytest.approx(0, abs=1e-6)
    stir(policy)
    trained = logprobs(policy)
    assert not torch.allclose(trained, base)
    with policy.reference():
        assert torch.allclose(logprobs(policy), base, atol=1e-5)
    assert torch.equal(logprobs(policy), trained)
    assert differentiate(policy, loss, 1.0, rows()).stats.kl_sum > 0


def test_updates_and_local_steps_train_every_weight(tied: Path) -> None:
    policy = Policy.load(tied, None, seed=0)
    before = policy.arrays()
    found = differentiate(policy, LossSpec(), 1.0, rows())
    payload, _ = GradientPayload.pack(found.gradients, found.stats, CodecSpec())
    optimizer = AdapterOptimizer(policy, OptimizerSpec(warmup_steps=0), 3, GradientSpec())
    optimizer.apply([payload], 7)
    moved = {name for name, array in policy.arrays().items() if (array != before[name]).any()}
    assert moved == set(before)
    assert policy.model.lm_head.weight is policy.trainable()["model.embed_tokens.weight"]


def test_a_whole_job_without_lora_is_reproducible(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base")
    spec = make_spec(lora=None, max_steps=1, loss=LossSpec(kl_beta=0.01))
    first, again = train_locally(spec, folder), train_locally(spec, folder)
    assert first.adapter == again.adapter
    assert len(first.adapter) > 4 * 600_000
