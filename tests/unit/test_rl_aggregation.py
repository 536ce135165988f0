"""An update changes the policy's weights to the bit as torch's own optimisers would."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from learning_fixtures import Lab, write_base

from shoal.models.policy import Policy
from shoal.protocol.errors import InvariantBroken
from shoal.protocol.learning import CodecSpec, GradientSpec, OptimizerSpec
from shoal.rl import aggregation
from shoal.rl.aggregation import AdapterOptimizer
from shoal.rl.batch import Floats, GradientPayload, GradientStats

SPEC = OptimizerSpec(learning_rate=1e-2, max_grad_norm=0.5, weight_decay=0.1, warmup_steps=0)
STEPS = 4
DIVISOR = 3.0


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab.open(write_base(tmp_path_factory.mktemp("base")))


def fresh(lab: Lab) -> Policy:
    return Policy.load(lab.folder, lab.plan.spec.lora, seed=0)


def payload_of(policy: Policy, seed: int, num_tokens: float = 5.0) -> GradientPayload:
    draw = np.random.default_rng(seed)
    arrays: dict[str, Floats] = {
        name: draw.standard_normal(shape).astype(np.float32)
        for name, shape in policy.shapes().items()
    }
    stats = GradientStats(num_tokens=num_tokens)
    return GradientPayload.pack(arrays, stats, CodecSpec(), None)[0]


def set_gradients(policy: Policy, payloads: list[GradientPayload], divisor: float) -> None:
    """One array after the other, as a trainer without a flat vector would."""
    for name, parameter in policy.trainable().items():
        total = np.sum([payload.gradients[name] for payload in payloads], axis=0, dtype=np.float64)
        parameter.grad = torch.from_numpy((total / divisor).astype(np.float32))


def test_updates_equal_adamw_over_separate_arrays_to_the_bit(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aggregation, "_SUMMED_VALUES", 100)
    ours, theirs = fresh(lab), fresh(lab)
    optimizer = AdapterOptimizer(ours, SPEC, STEPS, GradientSpec())
    parameters = list(theirs.trainable().values())
    reference = torch.optim.AdamW(
        parameters, betas=(SPEC.beta1, SPEC.beta2), weight_decay=SPEC.weight_decay, foreach=False
    )
    for step in range(STEPS):
        payloads = [payload_of(ours, 2 * step), payload_of(ours, 2 * step + 1)]
        stats = optimizer.apply(payloads, DIVISOR)
        set_gradients(theirs, payloads, DIVISOR)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, SPEC.max_grad_norm))
        reference.param_groups[0]["lr"] = stats.learning_rate
        reference.step()
        assert stats.grad_norm == norm > SPEC.max_grad_norm
        assert ours.adapter_bytes() == theirs.adapter_bytes()


def test_outer_updates_equal_sgd_over_separate_arrays_to_the_bit(lab: Lab) -> None:
    ours, theirs = fresh(lab), fresh(lab)
    spec = GradientSpec(local_steps=2, outer_learning_rate=0.7, outer_momentum=0.9)
    optimizer = AdapterOptimizer(ours, SPEC, STEPS, spec)
    parameters = list(theirs.trainable().values())
    reference = torch.optim.SGD(parameters, lr=0.7, momentum=0.9, nesterov=True, foreach=False)
    for step in range(STEPS):
        payload = payload_of(ours, step, num_tokens=1.0)
        optimizer.apply([payload], DIVISOR)
        set_gradients(theirs, [payload], 1.0)
        reference.step()
        assert ours.adapter_bytes() == theirs.adapter_bytes()


def test_an_update_starts_from_the_weights_the_policy_holds(lab: Lab) -> None:
    untouched, reset = fresh(lab), fresh(lab)
    before, payload = untouched.adapter_bytes(), payload_of(untouched, 0)
    moves = []
    for policy in (untouched, reset):
        optimizer = AdapterOptimizer(policy, SPEC, STEPS, GradientSpec())
        optimizer.apply([payload], DIVISOR)
        moves.append(optimizer)
    reset.load_adapter(before)
    for optimizer in moves:
        optimizer.apply([payload], DIVISOR)
    # The same moments, from other weights.
    assert moves[0].state_bytes() == moves[1].state_bytes()
    assert reset.adapter_bytes() not in (before, untouched.adapter_bytes())


def test_many_gradients_are_added_without_a_copy_of_each(lab: Lab) -> None:
    policy = fresh(lab)
    optimizer = AdapterOptimizer(policy, OptimizerSpec(), 10, GradientSpec())
    payloads = [payload_of(policy, seed) for seed in range(16)]
    num_bytes = 4 * sum(optimizer._sizes)
    tracemalloc.start()
    try:
        optimizer._mean_n(payloads, 3.0)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The mean itself, what says of each value that it is finite, and a part in double precision.
    assert peak_bytes < 2 * num_bytes + 1_000_000 < 16 * num_bytes


def test_a_gradient_that_is_not_finite_moves_nothing_and_is_named(lab: Lab) -> None:
    policy = fresh(lab)
    before, payload = policy.adapter_bytes(), payload_of(policy, 0)
    name = sorted(payload.gradients)[-1]
    payload.gradients[name][0, 0] = np.nan
    optimizer = AdapterOptimizer(policy, SPEC, STEPS, GradientSpec())
    with pytest.raises(InvariantBroken, match="not finite in") as caught:
        optimizer.apply([payload_of(policy, 1), payload], DIVISOR)
    assert name in caught.value.message
    assert policy.adapter_bytes() == before
    assert optimizer.step == 0
