"""Gradients of slices add up, updates follow their schedule, and a job resumes exactly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from learning_fixtures import Lab, graded_groups, make_spec, write_base

from shoal.models.policy import Policy
from shoal.protocol.errors import InvalidRequest, InvariantBroken, Unavailable
from shoal.protocol.learning import CodecSpec, GradientSpec, LossSpec, OptimizerSpec
from shoal.protocol.task import GradientTask
from shoal.rl import codec
from shoal.rl import differentiate as differentiate_module
from shoal.rl.aggregation import AdapterOptimizer
from shoal.rl.batch import GradientPayload
from shoal.rl.differentiate import SliceGradient, differentiate
from shoal.rl.gradient import (
    Group,
    batch_divisor,
    encode_slice,
    run_gradient,
    slice_groups,
)
from shoal.rl.local import blob_of, train_locally
from shoal.rl.schedule import scheduled_rate


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab.open(write_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def groups(lab: Lab) -> list[Group]:
    return graded_groups(lab)


def gradient_of(lab: Lab, groups: list[Group], **loss: object) -> SliceGradient:
    spec = LossSpec.model_validate(lab.plan.spec.loss.model_dump() | loss)
    return differentiate(lab.policy, spec, 1.0, encode_slice(groups))


def payload_of(lab: Lab, groups: list[Group]) -> GradientPayload:
    found = gradient_of(lab, groups)
    return GradientPayload.pack(found.gradients, found.stats, CodecSpec())[0]


def norm(found: SliceGradient) -> float:
    return float(np.linalg.norm(codec.flatten(found.gradients)))


def distance(a: SliceGradient, b: SliceGradient) -> float:
    return max(float(np.abs(a.gradients[n] - b.gradients[n]).max()) for n in a.gradients)


def optimizer_of(lab: Lab, policy: Policy, max_steps: int) -> AdapterOptimizer:
    return AdapterOptimizer(policy, lab.plan.spec.optimizer, max_steps, GradientSpec())


def test_slices_sum_to_the_single_process_gradient(lab: Lab, groups: list[Group]) -> None:
    whole = gradient_of(lab, groups)
    parts = [gradient_of(lab, part) for part in slice_groups(groups, 3)]
    assert len(parts) == 3
    total = parts[0] + parts[1] + parts[2]
    assert norm(whole) > 0
    assert distance(whole, total) <= 2e-6 * norm(whole)
    assert total.stats.num_tokens == whole.stats.num_tokens
    assert total.stats.loss_sum == pytest.approx(whole.stats.loss_sum, abs=1e-4)


def test_micro_batches_do_not_show(
    lab: Lab, groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = gradient_of(lab, groups)
    monkeypatch.setattr(differentiate_module, "MAX_ROWS", 3)
    assert distance(whole, gradient_of(lab, groups)) <= 2e-6 * norm(whole)
    monkeypatch.setattr(differentiate_module, "MAX_MICRO_BATCH_BYTES", 1)
    assert distance(whole, gradient_of(lab, groups)) <= 2e-6 * norm(whole)


class Memory:
    """A model whose pass fails above ``rows`` rows, as an allocator would."""

    def __init__(self, policy: Policy, rows: int, error: Exception) -> None:
        self.inner, self.rows, self.error = policy.logprobs_bt, rows, error
        self.sizes: list[int] = []

    def __call__(self, prompts: Any, completions: Any, temperature: float) -> Any:
        self.sizes.append(len(completions))
        if len(completions) > self.rows:
            raise self.error
        return self.inner(prompts, completions, temperature)


OUT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["python", "cuda", "cpu"])
def test_out_of_memory_halves_the_micro_batch_until_it_fits(
    lab: Lab, groups: list[Group], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    whole = gradient_of(lab, groups)
    memory = Memory(lab.policy, 4, error)
    monkeypatch.setattr(lab.policy, "logprobs_bt", memory)
    assert distance(whole, gradient_of(lab, groups)) <= 2e-6 * norm(whole)
    assert memory.sizes == [16, 8, 4, 4, 4, 4]
    memory.rows = 0
    with pytest.raises(Unavailable, match="does not fit") as refused:
        gradient_of(lab, groups)
    assert refused.value.code == "out_of_memory"


def test_other_failures_of_the_model_are_not_taken_for_memory(
    lab: Lab, groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory(lab.policy, 0, RuntimeError("shapes differ"))
    monkeypatch.setattr(lab.policy, "logprobs_bt", memory)
    with pytest.raises(RuntimeError, match="shapes differ"):
        gradient_of(lab, groups)


def test_a_gradient_that_is_not_finite_is_never_sent(
    lab: Lab, groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = [replace(groups[0], advantages=groups[0].advantages * np.float32(3e38)), *groups[1:]]
    rows = encode_slice(bad)
    data = rows.encode()
    task = lab.plan.gradient(0, lab.version(), blob_of(data), num_rows=16, num_groups=4)
    with np.errstate(over="ignore"), pytest.raises(InvalidRequest) as refused:
        run_gradient(lab.policy, task, data)
    assert refused.value.code == "not_finite"
    # The control: it is the gradient, not the advantages, that is out of range.
    assert run_gradient(lab.policy, *task_of(lab, groups)).payload


def task_of(
    lab: Lab, groups: list[Group], gradient: GradientSpec | None = None
) -> tuple[GradientTask, bytes]:
    rows = encode_slice(groups)
    data = rows.encode()
    task = lab.plan.gradient(
        0, lab.version(), blob_of(data), num_rows=rows.num_rows, num_groups=len(groups)
    )
    return task.model_copy(update={"gradient": gradient or GradientSpec()}), data


def test_rows_cut_off_leave_the_loss_if_it_masks_them(lab: Lab, groups: list[Group]) -> None:
    cut = [replace(g, truncated=np.array([True, False, False, False])) for g in groups]
    kept = [
        replace(
            g,
            token_ids=g.token_ids[1:],
            logprobs=g.logprobs[1:],
            advantages=g.advantages[1:],
            truncated=np.zeros(3, dtype=np.bool_),
        )
        for g in groups
    ]
    masked = gradient_of(lab, cut, mask_truncated=True)
    without = gradient_of(lab, kept)
    assert masked.stats.num_tokens == without.stats.num_tokens
    assert distance(masked, without) <= 2e-6 * norm(without)
    assert distance(masked, gradient_of(lab, cut)) > 1e-3 * norm(without)
    loss = LossSpec(mask_truncated=True)
    tokens = sum(len(row) for g in groups for row in g.token_ids[1:])
    assert batch_divisor(cut, loss, 5) == tokens
    assert batch_divisor(cut, LossSpec(), 5) == sum(g.num_tokens for g in groups)


def test_with_kl_rows_without_advantage_teach_too(lab: Lab, groups: list[Group]) -> None:
    flat = replace(groups[0], advantages=np.zeros(4, dtype=np.float32))
    assert norm(gradient_of(lab, [flat])) == 0
    pulled = gradient_of(lab, [flat], kl_beta=0.5)
    assert pulled.stats.kl_sum > 0
    assert norm(pulled) > 0
    # At the base itself there is nothing to be pulled back to.
    fresh = replace(lab, policy=Policy.load(lab.folder, lab.plan.spec.lora, seed=0))
    assert gradient_of(fresh, [flat], kl_beta=0.5).stats.kl_sum == pytest.approx(0, abs=1e-9)


def test_slices_have_like_token_counts_whatever_the_order(groups: list[Group]) -> None:
    def long(length: int) -> Group:
        row = np.ones(length, dtype=np.int32)
        return replace(
            groups[0], token_ids=(row,) * 4, logprobs=(np.zeros(length, dtype=np.float32),) * 4
        )

    batch = [long(length) for length in (40, 3, 3, 20, 9, 11, 17, 23, 5, 31, 2, 8)]
    parts = slice_groups(batch, 3)
    costs = [sum(g.num_tokens for g in part) for part in parts]
    assert sum(costs) == sum(g.num_tokens for g in batch)
    assert max(costs) <= 1.34 * sum(costs) / 3
    again = slice_groups(list(reversed(batch)), 3)
    assert sorted(costs) == sorted(sum(g.num_tokens for g in part) for part in again)
    assert [len(part) for part in slice_groups(batch[:2], 5)] == [1, 1]


def test_groups_without_spread_are_in_no_slice(groups: list[Group]) -> None:
    flat = replace(groups[0], teaching=np.zeros(4, dtype=np.bool_))
    parts = slice_groups([flat, *groups], 2)
    assert sum(len(part) for part in parts) == len(groups)
    assert all(group.teaches for part in parts for group in part)
    assert slice_groups([flat], 2) == []


def test_a_batch_in_which_nothing_teaches_is_an_update_of_earlier_momentum_alone(
    lab: Lab, groups: list[Group]
) -> None:
    policy = Policy.load(lab.folder, lab.plan.spec.lora, seed=0)
    optimizer = optimizer_of(lab, policy, 3)
    before = policy.adapter_bytes()
    stats = optimizer.apply([], 8.0)
    assert (stats.step, stats.grad_norm, stats.loss, stats.metrics) == (1, 0.0, 0.0, {})
    assert policy.adapter_bytes() == before
    optimizer.apply([payload_of(lab, groups)], 8.0)
    moved = policy.adapter_bytes()
    assert moved != before
    optimizer.apply([], 8.0)
    assert policy.adapter_bytes() != moved


def test_the_task_pins_the_loss_and_the_policy(lab: Lab, groups: list[Group]) -> None:
    rows = encode_slice(groups)
    data = rows.encode()
    task = lab.plan.gradient(0, lab.version(), blob_of(data), num_rows=16, num_groups=4)
    assert run_gradient(lab.policy, task, data).payload == payload_of(lab, groups).encode()
    with pytest.raises(InvalidRequest, match="loss"):
        run_gradient(lab.policy, task.model_copy(update={"loss_sha256": "0" * 64}), data)
    foreign = lab.version().model_copy(update={"adapter": blob_of(b"other")})
    with pytest.raises(InvalidRequest, match="load that adapter"):
        run_gradient(lab.policy, task.model_copy(update={"policy": foreign}), data)


def test_schedule_warms_up_and_decays() -> None:
    spec = OptimizerSpec(learning_rate=1.0, warmup_steps=4, final_lr_fraction=0.1)
    rates = [scheduled_rate(spec, step, 20) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)


def test_update_is_refused_without_tokens_or_with_foreign_arrays(
    lab: Lab, groups: list[Group]
) -> None:
    policy = Policy.load(lab.folder, lab.plan.spec.lora, seed=0)
    optimizer = optimizer_of(lab, policy, 3)
    payload = payload_of(lab, groups)
    before = policy.adapter_bytes()
    with pytest.raises(InvariantBroken):
        optimizer.apply([payload], 0)
    with pytest.raises(InvariantBroken):
        optimizer.apply([replace(payload, gradients={})], 1)
    name = next(iter(payload.gradients))
    bad = payload.gradients[name] * np.float32("nan")
    with pytest.raises(InvariantBroken, match="not finite"):
        optimizer.apply([replace(payload, gradients={**payload.gradients, name: bad})], 1)
    assert policy.adapter_bytes() == before
    optimizer.apply([payload], 1)
    assert policy.adapter_bytes() != before


@pytest.mark.parametrize("momentum", [None, 0.0, 0.8], ids=["adamw", "sgd", "nesterov"])
def test_resume_is_bit_equal(lab: Lab, groups: list[Group], momentum: float | None) -> None:
    spec, payload = lab.plan.spec, payload_of(lab, groups)
    gradient = GradientSpec()
    if momentum is not None:
        gradient = GradientSpec(local_steps=2, outer_learning_rate=1e-3, outer_momentum=momentum)
    straight = Policy.load(lab.folder, spec.lora, seed=0)
    optimizer = AdapterOptimizer(straight, spec.optimizer, 8, gradient)
    for _ in range(3):
        optimizer.apply([payload], 50)
    adapter, state = straight.adapter_bytes(), optimizer.state_bytes()
    optimizer.apply([payload], 50)

    resumed = Policy.load(lab.folder, spec.lora, seed=77)
    resumed.load_adapter(adapter)
    again = AdapterOptimizer(resumed, spec.optimizer, 8, gradient)
    again.load_state(state)
    assert again.state_bytes() == state
    again.apply([payload], 50)
    assert again.step == optimizer.step
    assert resumed.adapter_bytes() == straight.adapter_bytes()
    assert again.state_bytes() == optimizer.state_bytes()

    # The control: it is the state that makes them equal, where there is any.
    forgetful = Policy.load(lab.folder, spec.lora, seed=77)
    forgetful.load_adapter(adapter)
    AdapterOptimizer(forgetful, spec.optimizer, 8, gradient).apply([payload], 50)
    assert (forgetful.adapter_bytes() == straight.adapter_bytes()) == (momentum == 0)


def test_foreign_optimizer_state_is_refused(lab: Lab) -> None:
    policy = Policy.load(lab.folder, lab.plan.spec.lora, seed=0)
    optimizer = optimizer_of(lab, policy, 3)
    other = AdapterOptimizer(policy, lab.plan.spec.optimizer, 3, GradientSpec(local_steps=2))
    for foreign in (b"junk", other.state_bytes()):
        with pytest.raises(InvalidRequest, match="optimiser"):
            optimizer.load_state(foreign)


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_local_job_is_reproducible(lab: Lab, staleness: int) -> None:
    spec = make_spec(max_staleness=staleness, max_steps=2)
    first, again = train_locally(spec, lab.folder), train_locally(spec, lab.folder)
    assert first.adapter == again.adapter
    assert [s.update.step for s in first.steps] == [1, 2]
    assert train_locally(make_spec(seed=1, max_steps=2), lab.folder).adapter != first.adapter
