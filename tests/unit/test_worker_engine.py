"""The worker's engine: one base in memory for every job's adapter, and errors by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from learning_fixtures import Lab as School
from learning_fixtures import stir, write_base

from shoal.models.base import load_model, share_weights
from shoal.models.policy import Policy
from shoal.protocol.blob import BlobRef
from shoal.protocol.canonical import sha256_hex
from shoal.protocol.errors import PeerFault
from shoal.protocol.learning import LoraSpec
from shoal.protocol.task import RolloutTask
from shoal.worker.config import Device
from shoal.worker.engine import PolicyEngine
from shoal.worker.ports import TaskInput


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


def storage_bytes(*policies: Policy) -> int:
    """The memory of all weights, each storage once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for policy in policies
        for tensor in (*policy.model.parameters(), *policy.model.buffers())
    }
    return sum(storages.values())


def test_adapters_of_different_shapes_share_one_base(folder: Path) -> None:
    base = load_model(folder)
    wide, narrow = LoraSpec(r=8), LoraSpec(r=2, target_modules="q_proj|v_proj")
    policies = [Policy.load(folder, lora, seed=1, base=base) for lora in (wide, narrow, wide)]
    alone = [Policy.load(folder, lora, seed=1) for lora in (wide, narrow, wide)]
    adapters = sum(
        parameter.nbytes for policy in policies for parameter in policy.trainable().values()
    )
    base_bytes = storage_bytes(alone[0]) - sum(p.nbytes for p in alone[0].trainable().values())
    # The negative control: loaded one by one, the base is there three times.
    assert storage_bytes(*policies) == base_bytes + adapters
    assert storage_bytes(*alone) == 3 * base_bytes + adapters
    for shared, single in zip(policies, alone, strict=True):
        assert shared.adapter_bytes() == single.adapter_bytes()
        rows = ([[3, 4, 5]], [[6, 7]])
        assert (shared.logits_btv(*rows) == single.logits_btv(*rows)).all()


def test_what_one_policy_learns_the_others_do_not_see(folder: Path) -> None:
    base = load_model(folder)
    one, other = [Policy.load(folder, LoraSpec(r=4), seed=1, base=base) for _ in range(2)]
    rows = ([[3, 4, 5]], [[6, 7]])
    before = other.logits_btv(*rows)
    stir(one)
    assert (one.logits_btv(*rows) != before).any()
    assert (other.logits_btv(*rows) == before).all()


def test_shared_weights_are_the_same_tensors_and_the_modules_are_not(folder: Path) -> None:
    base = load_model(folder)
    copy = share_weights(base)
    assert copy is not base
    for (name, mine), (_, theirs) in zip(
        base.named_parameters(), copy.named_parameters(), strict=True
    ):
        assert mine is theirs, name


class Bench:
    """An engine and the tasks of jobs over one base."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.school = School.open(folder)
        self.engine = PolicyEngine(Device.CPU, 1)

    def task(self, adapter: bytes, lora: LoraSpec) -> RolloutTask:
        version = self.school.version().model_copy(
            update={"adapter": BlobRef(sha256=sha256_hex(adapter), size_bytes=len(adapter))}
        )
        plan = self.school.plan
        task = plan.rollout(0, version, plan.prompts(0), [0])
        return task.model_copy(update={"lora": lora})

    def inputs(self, adapter: bytes) -> TaskInput:
        return TaskInput(
            base_folder=self.folder,
            base_sha256=self.school.plan.base.content_digest(),
            adapter=adapter,
            batch_slice=None,
        )


def test_the_engine_loads_a_base_once_for_all_its_jobs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Path] = []

    def counted(path: Path) -> object:
        loaded.append(path)
        return load_model(path)

    bench = Bench(folder)
    work = []
    for rank in (2, 3):
        lora = LoraSpec(r=rank)
        adapter = Policy.load(folder, lora, seed=1).adapter_bytes()
        work.append((bench.task(adapter, lora), bench.inputs(adapter)))
    monkeypatch.setattr("shoal.models.base.load_model", counted)
    monkeypatch.setattr("shoal.models.policy.load_model", counted)
    for task, inputs in work * 2:
        bench.engine.run(task, inputs, lambda: None)
    assert loaded == [folder]


def test_an_adapter_of_another_shape_is_named(folder: Path) -> None:
    bench = Bench(folder)
    odd = Policy.load(folder, LoraSpec(r=3), seed=1).adapter_bytes()
    wrong = bench.task(odd, LoraSpec(r=4))
    with pytest.raises(PeerFault) as caught:
        bench.engine.run(wrong, bench.inputs(odd), lambda: None)
    assert caught.value.code == "wrong_adapter"
