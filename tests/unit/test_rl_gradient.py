"""Gradients of slices add up, updates follow their schedule, and a job resumes exactly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from learning_fixtures import Lab, make_spec, spread_rewards, write_base

from shoal.models.policy import Policy
from shoal.protocol.errors import InvalidRequest, InvariantBroken, NotFound
from shoal.protocol.job import CheckpointSpec
from shoal.protocol.learning import OptimizerSpec
from shoal.rl import gradient as gradient_module
from shoal.rl.aggregation import AdapterOptimizer
from shoal.rl.batch import GradientPayload, GradientStats, RolloutPayload, RowLimits
from shoal.rl.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from shoal.rl.environments import Split
from shoal.rl.gradient import (
    Group,
    differentiate,
    encode_slice,
    make_groups,
    run_gradient,
    slice_groups,
)
from shoal.rl.local import blob_of, train_locally
from shoal.rl.rollout import encode_prompts, run_rollout
from shoal.rl.schedule import scheduled_rate


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab.open(write_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def groups(lab: Lab) -> list[Group]:
    task = lab.plan.rollout(0, lab.version(), lab.plan.prompts(0), range(4))
    prompts = encode_prompts(lab.policy, lab.environments, task.prompts, Split.TRAIN)
    limits = RowLimits(num_prompts=4, num_rows=16, max_tokens=5, vocab_size=lab.policy.vocab_size)
    payload = RolloutPayload.decode(run_rollout(lab.policy, task, lab.environments), limits)
    return make_groups(payload, prompts, spread_rewards(16), 4, lab.plan.spec.loss)


def gradient_of(lab: Lab, groups: list[Group]) -> GradientPayload:
    return differentiate(lab.policy, lab.plan.spec.loss, 1.0, encode_slice(groups))


def distance(a: GradientPayload, b: GradientPayload) -> float:
    return max(float(np.abs(a.gradients[n] - b.gradients[n]).max()) for n in a.gradients)


def test_slices_sum_to_the_single_process_gradient(lab: Lab, groups: list[Group]) -> None:
    whole = gradient_of(lab, groups)
    parts = [gradient_of(lab, part) for part in slice_groups(groups, 3)]
    assert len(parts) == 3
    total = GradientPayload(
        gradients={n: np.sum([p.gradients[n] for p in parts], axis=0) for n in whole.gradients},
        stats=sum((p.stats for p in parts), GradientStats()),
    )
    assert whole.norm() > 0
    assert distance(whole, total) <= 2e-6 * whole.norm()
    assert total.stats.num_tokens == whole.stats.num_tokens
    assert total.stats.loss_sum == pytest.approx(whole.stats.loss_sum, abs=1e-4)


def test_micro_batches_do_not_show(
    lab: Lab, groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = gradient_of(lab, groups)
    monkeypatch.setattr(gradient_module, "MAX_ROWS", 3)
    assert distance(whole, gradient_of(lab, groups)) <= 2e-6 * whole.norm()


def test_groups_without_spread_are_in_no_slice(groups: list[Group]) -> None:
    flat = Group(
        prompt=groups[0].prompt,
        token_ids=groups[0].token_ids,
        logprobs=groups[0].logprobs,
        advantages=np.zeros(4, dtype=np.float32),
    )
    parts = slice_groups([flat, *groups], 2)
    assert sum(len(part) for part in parts) == len(groups)
    assert all(group.teaches for part in parts for group in part)
    assert slice_groups([flat], 2) == []


def test_the_task_pins_the_loss_and_the_policy(lab: Lab, groups: list[Group]) -> None:
    rows = encode_slice(groups)
    data = rows.encode()
    task = lab.plan.gradient(0, lab.version(), blob_of(data), num_rows=16, num_groups=4)
    assert run_gradient(lab.policy, task, data) == gradient_of(lab, groups).encode()
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
    optimizer = AdapterOptimizer(policy, lab.plan.spec.optimizer, 3)
    payload = gradient_of(lab, groups)
    with pytest.raises(InvariantBroken):
        optimizer.apply([payload], 0)
    with pytest.raises(InvariantBroken):
        optimizer.apply([GradientPayload(gradients={}, stats=payload.stats)], 1)


def test_resume_is_bit_equal(lab: Lab, groups: list[Group], tmp_path: Path) -> None:
    payload = gradient_of(lab, groups)
    spec = lab.plan.spec
    straight = Policy.load(lab.folder, spec.lora, seed=0)
    optimizer = AdapterOptimizer(straight, spec.optimizer, 8)
    for step in range(1, 5):
        optimizer.apply([payload], 50)
        save_checkpoint(
            tmp_path,
            lab.plan.job_id,
            step,
            adapter=straight.adapter_bytes(),
            optimizer=optimizer.state_bytes(),
            keep=CheckpointSpec(interval=2, keep_last=1),
        )
    optimizer.apply([payload], 50)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0000003", "step-0000004"]
    older = newest_checkpoint(tmp_path, 3)
    assert older is not None
    assert older.manifest.step == 3
    saved = newest_checkpoint(tmp_path, 4)
    assert saved is not None
    assert saved.manifest.step == 4
    resumed = Policy.load(lab.folder, spec.lora, seed=77)
    resumed.load_adapter(saved.adapter)
    again = AdapterOptimizer(resumed, spec.optimizer, 8)
    again.load_state(saved.optimizer)
    again.apply([payload], 50)
    assert again.step == optimizer.step
    assert resumed.adapter_bytes() == straight.adapter_bytes()

    forgetful = Policy.load(lab.folder, spec.lora, seed=77)
    forgetful.load_adapter(saved.adapter)
    AdapterOptimizer(forgetful, spec.optimizer, 8).apply([payload], 50)
    assert forgetful.adapter_bytes() != straight.adapter_bytes()


def test_damaged_checkpoints_are_refused(lab: Lab, tmp_path: Path) -> None:
    folder = save_checkpoint(
        tmp_path, lab.plan.job_id, 1, adapter=b"a", optimizer=b"o", keep=CheckpointSpec()
    )
    (folder / "optimizer.safetensors").write_bytes(b"x")
    with pytest.raises(InvalidRequest, match="manifest"):
        load_checkpoint(folder)
    assert newest_checkpoint(tmp_path, 1) is None
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(NotFound, match="adapter_model"):
        load_checkpoint(folder)
    assert newest_checkpoint(tmp_path / "none", 1) is None


def test_foreign_optimizer_state_is_refused(lab: Lab) -> None:
    policy = Policy.load(lab.folder, lab.plan.spec.lora, seed=0)
    optimizer = AdapterOptimizer(policy, lab.plan.spec.optimizer, 3)
    with pytest.raises(InvalidRequest, match="optimiser"):
        optimizer.load_state(b"junk")


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_local_job_is_reproducible(lab: Lab, staleness: int) -> None:
    spec = make_spec(max_staleness=staleness, max_steps=2)
    first, again = train_locally(spec, lab.folder), train_locally(spec, lab.folder)
    assert first.adapter == again.adapter
    assert [s.update.step for s in first.steps] == [1, 2]
    assert train_locally(make_spec(seed=1, max_steps=2), lab.folder).adapter != first.adapter
