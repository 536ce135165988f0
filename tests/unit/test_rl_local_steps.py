"""Local steps move as a trainer of their own would, leave no trace, and are averaged by tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from learning_fixtures import Lab, graded_groups, write_base

from shoal.models.policy import Policy
from shoal.protocol.errors import InvalidRequest
from shoal.protocol.learning import (
    CodecKind,
    CodecSpec,
    CorrectionSpec,
    GradientSpec,
    LossSpec,
    OldPolicy,
    OptimizerSpec,
)
from shoal.protocol.task import GradientTask
from shoal.rl import codec
from shoal.rl.aggregation import AdapterOptimizer
from shoal.rl.batch import GradientPayload
from shoal.rl.differentiate import SliceGradient, differentiate
from shoal.rl.gradient import Group, batch_divisor, encode_slice, run_gradient
from shoal.rl.local import blob_of
from shoal.rl.local_steps import take_local_steps

RATE = 1e-3


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab.open(write_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def groups(lab: Lab) -> list[Group]:
    return graded_groups(lab)


def task_of(lab: Lab, groups: list[Group], steps: int, **changes: object) -> GradientTask:
    rows = encode_slice(groups)
    task = lab.plan.gradient(
        0,
        lab.version(),
        blob_of(rows.encode()),
        num_rows=rows.num_rows,
        num_groups=len(groups),
    )
    update = {"gradient": GradientSpec(local_steps=steps), "learning_rate": RATE, **changes}
    return task.model_copy(update=update)


def moved(lab: Lab, groups: list[Group], steps: int, **changes: object) -> SliceGradient:
    return take_local_steps(
        lab.policy, task_of(lab, groups, steps, **changes), encode_slice(groups)
    )


def norm(found: SliceGradient) -> float:
    return float(np.linalg.norm(codec.flatten(found.gradients)))


def test_one_part_moves_as_one_adamw_step_would(lab: Lab, groups: list[Group]) -> None:
    # A slice of one prompt has one part, whatever the number of steps.
    one = groups[:1]
    found = moved(lab, one, 4)
    other = Policy.load(lab.folder, lab.plan.spec.lora, seed=0)
    other.load_adapter(lab.policy.adapter_bytes())
    gradient = differentiate(lab.policy, lab.plan.spec.loss, 1.0, encode_slice(one))
    payload, _ = GradientPayload.pack(gradient.gradients, gradient.stats, CodecSpec())
    spec = lab.plan.spec.optimizer.model_copy(update={"learning_rate": RATE, "warmup_steps": 0})
    optimizer = AdapterOptimizer(other, spec, 8, GradientSpec())
    optimizer.apply([payload], batch_divisor(one, lab.plan.spec.loss, 5))
    for name, parameter in lab.policy.trainable().items():
        due = (parameter - other.trainable()[name]).detach().numpy()
        assert np.allclose(found.gradients[name], due, atol=1e-9)


def test_the_policy_is_as_before(lab: Lab, groups: list[Group]) -> None:
    before = lab.policy.adapter_bytes()
    found = moved(lab, groups, 3)
    assert norm(found) > 0
    assert lab.policy.adapter_bytes() == before
    assert all(p.grad is None for p in lab.policy.trainable().values())


def test_a_step_that_fails_leaves_the_policy_as_before(
    lab: Lab, groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = lab.policy.adapter_bytes()
    calls = 0

    def interrupt(tokens: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt

    task = task_of(lab, groups, 4)
    with pytest.raises(KeyboardInterrupt):
        take_local_steps(lab.policy, task, encode_slice(groups), interrupt)
    assert calls == 2
    assert lab.policy.adapter_bytes() == before


def test_a_gradient_too_long_for_its_norm_is_not_finite_and_moves_nothing(
    lab: Lab, groups: list[Group]
) -> None:
    """Each value is finite, and the sum of their squares is not."""
    before = lab.policy.adapter_bytes()
    long = [replace(group, advantages=group.advantages * np.float32(1e26)) for group in groups]
    task = task_of(lab, groups, 2)
    with pytest.raises(InvalidRequest) as refused:
        take_local_steps(lab.policy, task, encode_slice(long))
    assert refused.value.code == "not_finite"
    assert "norm" in refused.value.message
    assert lab.policy.adapter_bytes() == before
    # The control: as they were they are differentiated.
    take_local_steps(lab.policy, task, encode_slice(groups))


def test_every_step_moves_further(lab: Lab, groups: list[Group]) -> None:
    lengths = [norm(moved(lab, groups, steps)) for steps in (1, 2, 4)]
    assert lengths == sorted(lengths)
    assert lengths[2] > 1.5 * lengths[0]


def test_later_steps_measure_from_the_version_the_task_names(lab: Lab, groups: list[Group]) -> None:
    """The proximal policy stays that of the start: later parts see ratios other than one."""
    proximal = CorrectionSpec(old_policy=OldPolicy.PROXIMAL)
    spec = LossSpec(clip_low=0.01, clip_high=0.01, correction=proximal)
    changes = {"loss": spec, "loss_sha256": spec.digest(), "learning_rate": 0.05}
    alone = moved(lab, groups, 1, **changes)
    stepped = moved(lab, groups, 4, **changes)
    assert alone.stats.clipped_low + alone.stats.clipped_high == 0
    assert stepped.stats.clipped_low + stepped.stats.clipped_high > 0
    # What the behaviour policy drew is compared with the start, which here drew it.
    assert stepped.stats.raw_ratio_max == pytest.approx(1, abs=1e-3)


def test_movements_are_averaged_by_tokens_and_followed(lab: Lab, groups: list[Group]) -> None:
    parts = [moved(lab, groups[:1], 2), moved(lab, groups[1:], 2)]
    payloads = [GradientPayload.pack(p.gradients, p.stats, CodecSpec())[0] for p in parts]
    weights = [p.stats.num_tokens for p in parts]
    assert weights[0] != weights[1]
    policy = Policy.load(lab.folder, lab.plan.spec.lora, seed=0)
    start = policy.arrays()
    spec = GradientSpec(local_steps=2, outer_learning_rate=0.7, outer_momentum=0.6)
    optimizer = AdapterOptimizer(policy, OptimizerSpec(), 9, spec)
    optimizer.apply(payloads, 123.0)
    optimizer.apply(payloads, 123.0)
    for name, array in policy.arrays().items():
        pairs = zip(weights, parts, strict=True)
        mean = sum(w * p.gradients[name].astype(np.float64) for w, p in pairs) / sum(weights)
        # Nesterov: the buffer is m, then m + μ·m; each step follows the mean plus μ buffers.
        due = start[name] - 0.7 * (mean * 1.6 + mean * (1 + 0.6 * 1.6))
        assert np.allclose(array, due, atol=1e-6)


def test_a_task_of_local_steps_is_answered_in_its_codec(lab: Lab, groups: list[Group]) -> None:
    spec = CodecSpec(kind=CodecKind.TOPK, chunk=256, keep=64, bits=3, error_feedback=0.9)
    task = task_of(lab, groups, 2, gradient=GradientSpec(codec=spec, local_steps=2))
    rows = encode_slice(groups)
    output = run_gradient(lab.policy, task, rows.encode())
    payload = GradientPayload.decode(output.payload, lab.policy.shapes(), spec)
    assert output.residual is not None
    left_n = codec.decode_residual(output.residual, codec.num_values(lab.policy.shapes()))
    whole_n = codec.flatten(moved(lab, groups, 2).gradients)
    assert np.allclose(codec.flatten(payload.gradients) + left_n, whole_n, atol=1e-7)
    again = run_gradient(lab.policy, task, rows.encode(), residual=output.residual)
    assert again.payload != output.payload


def test_a_slice_in_which_nothing_teaches_does_not_move(lab: Lab, groups: list[Group]) -> None:
    flat = [replace(g, advantages=np.zeros(4, dtype=np.float32)) for g in groups]
    found = moved(lab, flat, 3)
    assert norm(found) == 0
    assert found.stats.num_tokens == 0
    assert torch.is_grad_enabled()
