"""Losses and advantages agree with TRL, and add up over slices."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from shoal.protocol.learning import AdvantageScale, LossSpec
from shoal.rl.advantage import group_advantages
from shoal.rl.loss import loss_sums

GOLDEN = json.loads((Path(__file__).parents[1] / "vectors" / "trl_dapo_losses.json").read_text())


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    new = torch.tensor(GOLDEN["new"], requires_grad=True)
    mask = torch.tensor(GOLDEN["mask"]).bool()
    return new, torch.tensor(GOLDEN["old"]), torch.tensor(GOLDEN["adv"]), mask


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"high {c.get('eps_hi', 0.2)}")
def test_dapo_equals_trl(case: dict[str, float]) -> None:
    new, old, advantages, mask = tensors()
    spec = LossSpec(clip_low=0.2, clip_high=case.get("eps_hi", 0.2))
    sums = loss_sums(spec, new, old, advantages, mask)
    assert float(sums.loss.detach() / sums.num_tokens) == pytest.approx(case["loss"], abs=1e-6)


def test_slices_add_up_in_value_and_gradient() -> None:
    new, old, advantages, mask = tensors()
    whole = loss_sums(LossSpec(), new, old, advantages, mask)
    (whole_grad,) = torch.autograd.grad(whole.loss, new)
    parts = [slice(0, 2), slice(2, 3), slice(3, 6)]
    sums = [loss_sums(LossSpec(), new[p], old[p], advantages[p], mask[p]) for p in parts]
    (parts_grad,) = torch.autograd.grad(torch.stack([s.loss for s in sums]).sum(), new)
    assert torch.allclose(whole_grad, parts_grad, atol=1e-7)


def test_what_stands_past_the_end_cannot_poison_the_sum() -> None:
    new, old, advantages, mask = tensors()
    clean = loss_sums(LossSpec(), new, old, advantages, mask)
    with torch.no_grad():
        new[~mask] = 1e4
    poisoned = loss_sums(LossSpec(), new, old, advantages, mask)
    (grad,) = torch.autograd.grad(poisoned.loss, new)
    assert float(poisoned.loss.detach()) == float(clean.loss.detach())
    assert torch.isfinite(grad).all()
    assert not grad[~mask].any()


def test_clipped_tokens_are_counted_and_have_no_gradient() -> None:
    new = torch.tensor([[0.0, -2.0]], requires_grad=True)
    old = torch.tensor([[-1.0, -2.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    sums = loss_sums(LossSpec(), new, old, torch.tensor([1.0]), mask)
    (grad,) = torch.autograd.grad(sums.loss, new)
    assert (int(sums.clipped_high), int(sums.clipped_low)) == (1, 0)
    assert grad.tolist() == [[0.0, -1.0]]


def test_advantages_use_bessels_correction() -> None:
    rewards = np.array([1, 0, 0, 0], dtype=np.float32)
    expected = (rewards - 0.25) / (0.5 + 1e-4)
    got = group_advantages(rewards, 4, AdvantageScale.GROUP_STD)
    assert np.allclose(got, expected)
    assert np.allclose(group_advantages(rewards, 4, AdvantageScale.NONE), rewards - 0.25)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
def test_a_group_without_spread_teaches_nothing(value: float) -> None:
    rewards = np.full(8, value, dtype=np.float32)
    for scale in AdvantageScale:
        assert not group_advantages(rewards, 8, scale).any()
