"""On random batches our losses are those of the installed TRL, in value and in gradient."""

from __future__ import annotations

import collections
import importlib
import types
import warnings
from typing import Any

import pytest
import torch

from shoal.protocol.learning import CorrectionSpec, LossKind, LossSpec, OldPolicy, RatioBound
from shoal.rl.loss import TokenLogprobs, counted_tokens, loss_divisor, loss_sums

pytestmark = pytest.mark.slow
torch.set_num_threads(1)
ROWS, WIDTH, MAX_TOKENS, SEEDS = 16, 24, 32, 20


@pytest.fixture(scope="module")
def trainer_class() -> Any:
    pytest.importorskip("trl", reason="TRL is a peer to compare with, not a dependency")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("trl.trainer.grpo_trainer").GRPOTrainer


class Alone:
    """The accelerator of one process."""

    num_processes = 1

    def gather(self, value: torch.Tensor) -> torch.Tensor:
        return value

    def reduce(self, value: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        return value


class Batch:
    """Random log-probabilities around one policy, some further off, some rows cut."""

    def __init__(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, WIDTH + 1, (ROWS, 1), generator=draw)
        self.mask = torch.arange(WIDTH) < lengths
        base = -torch.rand(ROWS, WIDTH, generator=draw) * 3 - 0.7
        noise = torch.randn(4, ROWS, WIDTH, generator=draw) * 0.3
        self.current, self.proximal, self.behaviour, self.reference = (base + noise).clamp(max=0)
        self.advantages = torch.randn(ROWS, generator=draw)
        self.truncated = torch.rand(ROWS, generator=draw) < 0.3


def trl_loss(
    trainer_class: Any, spec: LossSpec, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """TRL's own ``_compute_loss`` over the batch, its model's forward pass replaced."""
    current = batch.current.clone().requires_grad_()
    mask = batch.mask & ~batch.truncated.unsqueeze(1) if spec.mask_truncated else batch.mask
    sequence = spec.kind in (LossKind.GSPO, LossKind.LUSPO)
    corrected = spec.correction.token_bound is not RatioBound.NONE
    arguments = types.SimpleNamespace(
        use_bias_correction_kl=spec.kl_bias_correction,
        delta=spec.clip_delta,
        sapo_temperature_pos=spec.sapo_temperature_positive,
        sapo_temperature_neg=spec.sapo_temperature_negative,
        steps_per_generation=1,
    )
    trainer = types.SimpleNamespace(
        args=arguments,
        model=types.SimpleNamespace(training=True),
        accelerator=Alone(),
        beta=spec.kl_beta,
        loss_type="grpo" if spec.kind is LossKind.GSPO else spec.kind.value,
        importance_sampling_level="sequence" if sequence else "token",
        epsilon_low=spec.clip_low,
        epsilon_high=spec.clip_high,
        max_completion_length=MAX_TOKENS,
        current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        use_vllm=corrected,
        vllm_importance_sampling_correction=corrected,
        _metrics={"train": collections.defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            current,
            torch.zeros_like(current),
            None,
        ),
    )
    inputs = {
        "prompt_ids": torch.zeros(ROWS, 1, dtype=torch.long),
        "prompt_mask": torch.ones(ROWS, 1, dtype=torch.long),
        "completion_ids": torch.zeros(ROWS, WIDTH, dtype=torch.long),
        "completion_mask": mask.long(),
        "advantages": batch.advantages,
        "old_per_token_logps": batch.proximal,
        "ref_per_token_logps": batch.reference,
        "num_items_in_batch": mask.sum(),
        "importance_sampling_ratio": trl_ratio(spec.correction, batch, mask),
    }
    loss = trainer_class._compute_loss(trainer, trainer.model, inputs)
    (gradient,) = torch.autograd.grad(loss, current)
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
    return loss.detach(), gradient, metrics


def trl_ratio(correction: CorrectionSpec, batch: Batch, mask: torch.Tensor) -> torch.Tensor:
    """What TRL's ``_generate_and_score_completions`` makes of the two log-probabilities."""
    ratio = torch.exp((batch.proximal - batch.behaviour) * mask)
    low, high = correction.token_min, correction.token_max
    if correction.token_bound is RatioBound.TRUNCATE:
        return ratio.clamp(low, high)
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)


def our_loss(spec: LossSpec, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    current = batch.current.clone().requires_grad_()
    logprobs = TokenLogprobs(
        current=current,
        proximal=batch.proximal,
        behaviour=batch.behaviour,
        reference=batch.reference if spec.kl_beta else None,
    )
    sums = loss_sums(spec, logprobs, batch.advantages, batch.mask, batch.truncated)
    lengths, cut = batch.mask.sum(dim=1).tolist(), batch.truncated.tolist()
    loss = sums.loss / loss_divisor(
        spec,
        num_tokens=counted_tokens(spec, lengths, cut),
        num_rows=ROWS,
        max_tokens=MAX_TOKENS,
    )
    (gradient,) = torch.autograd.grad(loss, current)
    return loss.detach(), gradient, sums.stats.metrics()


TIS = CorrectionSpec(old_policy=OldPolicy.PROXIMAL, token_max=1.3, sequence_bound=RatioBound.NONE)
MIS = TIS.model_copy(update={"token_bound": RatioBound.MASK, "token_min": 0.7, "token_max": 1.4})
NOTHING = TIS.model_copy(update={"token_bound": RatioBound.NONE})


@pytest.mark.parametrize("correction", [NOTHING, TIS, MIS], ids=["none", "tis", "mis"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("mask_truncated", [False, True])
@pytest.mark.parametrize("kind", LossKind)
def test_loss_is_trls(
    trainer_class: Any,
    kind: LossKind,
    mask_truncated: bool,
    beta: float,
    correction: CorrectionSpec,
) -> None:
    clipped = kind not in (LossKind.CISPO, LossKind.SAPO)
    for seed in range(SEEDS):
        spec = LossSpec(
            kind=kind,
            mask_truncated=mask_truncated,
            kl_beta=beta,
            kl_bias_correction=seed % 2 == 0,
            clip_delta=1.5 if clipped and seed % 3 == 0 else None,
            correction=correction,
        )
        batch = Batch(seed)
        loss, gradient, metrics = our_loss(spec, batch)
        trl, trl_gradient, trl_metrics = trl_loss(trainer_class, spec, batch)
        # LUSPO sums whole rows: its values are tens, where the others' are below one.
        scale = max(1.0, abs(trl.item()))
        assert loss.item() == pytest.approx(trl.item(), abs=1e-6 * scale)
        assert torch.allclose(gradient, trl_gradient, rtol=1e-5, atol=1e-6)
        if clipped and not mask_truncated:
            for name in ("low_mean", "high_mean", "region_mean", "low_min", "high_max"):
                name = f"clip_ratio/{name}"
                assert metrics[name] == pytest.approx(trl_metrics[name], abs=1e-6), name
        if beta:
            assert metrics["kl"] == pytest.approx(trl_metrics["kl"], abs=1e-6)
