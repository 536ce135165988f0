"""Checkpoints: whole or absent, kept as long as promised, never taken for another job's."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.protocol.canonical import sha256_hex
from shoal.protocol.errors import InvalidRequest, InvariantBroken, NotFound
from shoal.protocol.job import CheckpointSpec
from shoal.rl.checkpoint import (
    KeptAdapter,
    keep_best,
    load_best,
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    sync_checkpoint,
)

JOB, BASE = "0x" + "a" * 64, "b" * 64


def save(folder: Path, step: int, older: tuple[int, ...] = ()) -> Path:
    return save_checkpoint(
        folder,
        JOB,
        step,
        base_sha256=BASE,
        adapter=f"adapter {step}".encode(),
        optimizer=f"optimizer {step}".encode(),
        older=older,
    )


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def test_a_checkpoint_holds_the_weights_the_optimiser_and_older_adapters(tmp_path: Path) -> None:
    save(tmp_path, 0)
    save(tmp_path, 1, (0,))
    save(tmp_path, 2, (0, 1))
    folder = save(tmp_path, 3, (1, 2))
    sync_checkpoint(folder)
    saved = load_checkpoint(folder)
    assert (saved.manifest.step, saved.adapter, saved.optimizer) == (
        3,
        b"adapter 3",
        b"optimizer 3",
    )
    assert saved.older == {1: b"adapter 1", 2: b"adapter 2"}


def test_older_adapters_cost_no_second_copy_and_outlive_the_checkpoint_they_came_from(
    tmp_path: Path,
) -> None:
    first = save(tmp_path, 0)
    second = save(tmp_path, 1, (0,))
    linked = second / "adapter-0000000.safetensors"
    assert linked.samefile(first / "adapter_model.safetensors")
    save(tmp_path, 2, (0, 1))
    prune_checkpoints(tmp_path, CheckpointSpec(interval=100, keep_last=1))
    save(tmp_path, 3, (0, 2))
    prune_checkpoints(tmp_path, CheckpointSpec(interval=100, keep_last=1))
    assert load_checkpoint(tmp_path / "step-0000003").older[0] == b"adapter 0"


def test_without_hard_links_older_adapters_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    save(tmp_path, 0)
    monkeypatch.setattr(Path, "hardlink_to", refuse)
    assert load_checkpoint(save(tmp_path, 1, (0,))).older == {0: b"adapter 0"}


def test_an_older_adapter_that_is_nowhere_is_a_defect(tmp_path: Path) -> None:
    save(tmp_path, 4)
    with pytest.raises(InvariantBroken, match="version 2"):
        save(tmp_path, 5, (2,))
    assert steps(tmp_path) == [4]


def test_the_two_newest_stay_and_the_last_of_those_at_the_interval(tmp_path: Path) -> None:
    keep = CheckpointSpec(interval=3, keep_last=2)
    for step in range(12):
        save(tmp_path, step)
        prune_checkpoints(tmp_path, keep)
    assert steps(tmp_path) == [6, 9, 10, 11]


def test_a_crash_while_writing_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    save(tmp_path, 1)
    draft = tmp_path / ".draft-0000002"
    draft.mkdir()
    (draft / "adapter_model.safetensors").write_bytes(b"half")
    found = newest_checkpoint(tmp_path, 9, job_id=JOB, base_sha256=BASE)
    assert found is not None
    assert found.manifest.step == 1
    assert load_checkpoint(save(tmp_path, 2)).adapter == b"adapter 2"


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "optimizer.safetensors", "adapter-0000001.safetensors"]
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1)
    folder = save(tmp_path, 2, (1,))
    (folder / name).unlink()
    (folder / name).write_bytes(b"x")
    with pytest.raises(InvalidRequest, match="manifest"):
        load_checkpoint(folder)
    found = newest_checkpoint(tmp_path, 2, job_id=JOB, base_sha256=BASE)
    assert found is not None
    assert found.manifest.step == 1
    (folder / name).unlink()
    with pytest.raises(NotFound, match=name):
        load_checkpoint(folder)
    assert newest_checkpoint(tmp_path, 0, job_id=JOB, base_sha256=BASE) is None
    assert newest_checkpoint(tmp_path / "none", 2, job_id=JOB, base_sha256=BASE) is None


@pytest.mark.parametrize("junk", [b"", b"{}", b"junk", b"\xff"])
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, junk: bytes) -> None:
    folder = save(tmp_path, 1)
    (folder / "checkpoint.json").write_bytes(junk)
    with pytest.raises(InvalidRequest) as caught:
        load_checkpoint(folder)
    assert caught.value.code == "bad_checkpoint"


@pytest.mark.parametrize(
    ("job", "base", "code"),
    [("0x" + "c" * 64, BASE, "wrong_job"), (JOB, "d" * 64, "wrong_base")],
)
def test_weights_of_another_job_or_for_another_base_are_refused(
    tmp_path: Path, job: str, base: str, code: str
) -> None:
    save(tmp_path, 1)
    keep(tmp_path, 1)
    with pytest.raises(InvalidRequest) as caught:
        newest_checkpoint(tmp_path, 1, job_id=job, base_sha256=base)
    assert caught.value.code == code
    with pytest.raises(InvalidRequest) as caught:
        load_best(tmp_path, job_id=job, base_sha256=base)
    assert caught.value.code == code
    assert newest_checkpoint(tmp_path, 1, job_id=JOB, base_sha256=BASE) is not None


def keep(folder: Path, version: int) -> None:
    adapter = f"adapter {version}".encode()
    kept = KeptAdapter(
        job_id=JOB, base_sha256=BASE, version=version, adapter_sha256=sha256_hex(adapter)
    )
    keep_best(folder, kept, adapter)


def test_the_best_version_is_kept_whatever_becomes_of_the_checkpoints(tmp_path: Path) -> None:
    assert load_best(tmp_path, job_id=JOB, base_sha256=BASE) is None
    save(tmp_path, 7)
    keep(tmp_path, 3)
    keep(tmp_path, 5)
    prune_checkpoints(tmp_path, CheckpointSpec(interval=100, keep_last=1))
    found = load_best(tmp_path, job_id=JOB, base_sha256=BASE)
    assert found is not None
    assert (found[0].version, found[1]) == (5, b"adapter 5")
    assert [path.name for path in tmp_path.glob("best-*")] == ["best-0000005.safetensors"]
    (tmp_path / "best-0000005.safetensors").write_bytes(b"x")
    with pytest.raises(InvalidRequest):
        load_best(tmp_path, job_id=JOB, base_sha256=BASE)
    (tmp_path / "best.json").write_bytes(b"junk")
    with pytest.raises(InvalidRequest, match="delete it"):
        load_best(tmp_path, job_id=JOB, base_sha256=BASE)
