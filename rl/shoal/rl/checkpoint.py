"""Checkpoints: all that is needed to continue a job exactly where it stood.

A checkpoint is a folder: the weights of one policy version, the optimiser that made them, and
the older adapters under which work is still out.  Older adapters are links to the files of
the checkpoint before, so keeping them costs no bytes and no writing.  The best version so
far is kept beside the checkpoints, as an adapter without an optimiser::

    checkpoints/
      step-0000012/   checkpoint.json  adapter_model.safetensors  optimizer.safetensors
                      adapter-0000010.safetensors  adapter-0000011.safetensors
      best.json       best-0000008.safetensors
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from shoal.models.policy import ADAPTER_FILE
from shoal.protocol.canonical import sha256_hex
from shoal.protocol.errors import InvalidRequest, InvariantBroken, NotFound
from shoal.protocol.ids import Hex32, Sha256
from shoal.protocol.job import CheckpointSpec
from shoal.protocol.learning import MAX_STEPS
from shoal.protocol.record import Record

MANIFEST_FILE = "checkpoint.json"
OPTIMIZER_FILE = "optimizer.safetensors"
BEST_FILE = "best.json"
_log = logging.getLogger(__name__)

_ROLLING = 2
_FOLDER = re.compile(r"^step-(\d{7})$")
_BEST_ADAPTER = re.compile(r"^best-(\d{7})\.safetensors$")


class KeptAdapter(Record):
    """The adapter of one policy version.

    Writer: the orchestrator.  Reader: the orchestrator, when it resumes or releases.
    """

    job_id: Hex32
    base_sha256: Sha256
    version: int = Field(ge=0, le=MAX_STEPS)
    adapter_sha256: Sha256


class CheckpointManifest(Record):
    """What a checkpoint folder holds.

    Writer: the orchestrator.  Reader: the orchestrator, when it resumes.  ``older`` are
    adapters of earlier versions that work may still be done under.
    """

    current: KeptAdapter
    optimizer_sha256: Sha256
    older: tuple[KeptAdapter, ...] = ()

    @property
    def step(self) -> int:
        """The policy version of the weights: how many updates made them."""
        return self.current.version


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint in memory: policy version ``step`` and the optimiser that made it.

    ``older`` maps earlier versions to their adapters' bytes.
    """

    manifest: CheckpointManifest
    adapter: bytes
    optimizer: bytes
    older: Mapping[int, bytes]


def save_checkpoint(
    directory: Path,
    job_id: str,
    step: int,
    *,
    base_sha256: str,
    adapter: bytes,
    optimizer: bytes,
    older: Collection[int] = (),
) -> Path:
    """The folder of the new checkpoint, whole for every process from now on.

    A kill at any moment leaves either the whole checkpoint or none of it.  Nothing waits for
    the disk: see `sync_checkpoint`.

    Args:
        directory: Where the job's checkpoints are.
        job_id: The job.
        step: The policy version of ``adapter``.
        base_sha256: Content digest of the base the adapter is for.
        adapter: The weights.
        optimizer: The optimiser's state.
        older: Earlier versions whose adapters are kept too; the checkpoint of ``step − 1``
            holds them.

    Raises:
        InvariantBroken: the checkpoint before has not one of the ``older`` adapters.
    """
    directory.mkdir(parents=True, exist_ok=True)
    draft = directory / f".draft-{step:07d}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    (draft / ADAPTER_FILE).write_bytes(adapter)
    (draft / OPTIMIZER_FILE).write_bytes(optimizer)
    manifest = CheckpointManifest(
        current=KeptAdapter(
            job_id=job_id, base_sha256=base_sha256, version=step, adapter_sha256=sha256_hex(adapter)
        ),
        optimizer_sha256=sha256_hex(optimizer),
        older=_link_older(directory, draft, step, older),
    )
    (draft / MANIFEST_FILE).write_bytes(manifest.encode())
    folder = _folder(directory, step)
    # Only a resumed job saves a step twice, and then the newer is the true one.
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)
    return folder


def sync_checkpoint(folder: Path) -> None:
    """The checkpoint survives a power cut."""
    for path in (*sorted(folder.iterdir()), folder, folder.parent):
        _sync(path)


def prune_checkpoints(directory: Path, keep: CheckpointSpec) -> None:
    """Only the checkpoints that are still wanted are left.

    The two newest stay, so that a job resumes at the very version its records speak of, and
    so do the newest ``keep.keep_last`` of those at a multiple of ``keep.interval``.
    """
    folders = _folders(directory)
    spaced = [path for path in folders if is_spaced(_step_of(path), keep)]
    for old in set(folders) - set(folders[-_ROLLING:]) - set(spaced[-keep.keep_last :]):
        shutil.rmtree(old)


def is_spaced(step: int, keep: CheckpointSpec) -> bool:
    """Whether the checkpoint of ``step`` is one of those kept, and synced, for long."""
    return step % keep.interval == 0


def load_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in ``folder``, its digests checked.

    Raises:
        NotFound: there is no checkpoint there.
        InvalidRequest: a file differs from what the manifest says.
    """
    try:
        manifest = CheckpointManifest.model_validate_json((folder / MANIFEST_FILE).read_bytes())
    except FileNotFoundError:
        raise NotFound(f"{folder} holds no whole checkpoint: {MANIFEST_FILE} is missing.") from None
    except ValidationError:
        raise InvalidRequest(
            f"{folder / MANIFEST_FILE} is not a checkpoint manifest; resume from another.",
            code="bad_checkpoint",
        ) from None
    return Checkpoint(
        manifest=manifest,
        adapter=_read(folder / ADAPTER_FILE, manifest.current.adapter_sha256),
        optimizer=_read(folder / OPTIMIZER_FILE, manifest.optimizer_sha256),
        older={
            kept.version: _read(folder / _older_name(kept.version), kept.adapter_sha256)
            for kept in manifest.older
        },
    )


def newest_checkpoint(
    directory: Path, at_most: int, *, job_id: str, base_sha256: str
) -> Checkpoint | None:
    """The newest whole checkpoint of a step of ``at_most``, if there is one.

    Raises:
        InvalidRequest: it is of another job or for another base.
    """
    for folder in reversed(_folders(directory)):
        if _step_of(folder) <= at_most:
            try:
                checkpoint = load_checkpoint(folder)
            except (NotFound, InvalidRequest) as error:
                _log.warning("checkpoint_skipped", extra={"reason": error.message})
                continue
            _require_own(checkpoint.manifest.current, folder, job_id, base_sha256)
            return checkpoint
    return None


def keep_best(directory: Path, kept: KeptAdapter, adapter: bytes) -> None:
    """``adapter`` is the best version's from now on, through a power cut too."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / _best_name(kept.version)
    _write_durably(path, adapter)
    draft = directory / f".{BEST_FILE}"
    _write_durably(draft, kept.encode())
    draft.replace(directory / BEST_FILE)
    _sync(directory)
    for old in directory.iterdir():
        if _BEST_ADAPTER.match(old.name) and old != path:
            old.unlink()


def load_best(
    directory: Path, *, job_id: str, base_sha256: str
) -> tuple[KeptAdapter, bytes] | None:
    """The best version and its adapter, or None when no version has been evaluated yet.

    Raises:
        NotFound, InvalidRequest: it is damaged, of another job or for another base.
    """
    try:
        kept = KeptAdapter.model_validate_json((directory / BEST_FILE).read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:
        raise InvalidRequest(
            f"{directory / BEST_FILE} is not what was written there; delete it to release the "
            "last version instead.",
            code="bad_checkpoint",
        ) from None
    _require_own(kept, directory, job_id, base_sha256)
    return kept, _read(directory / _best_name(kept.version), kept.adapter_sha256)


def _link_older(
    directory: Path, draft: Path, step: int, versions: Collection[int]
) -> tuple[KeptAdapter, ...]:
    """The adapters of ``versions``, linked into ``draft`` from the checkpoint before."""
    if not versions:
        return ()
    before = _folder(directory, step - 1)
    manifest = CheckpointManifest.model_validate_json((before / MANIFEST_FILE).read_bytes())
    there = {kept.version: (kept, before / _older_name(kept.version)) for kept in manifest.older}
    there[manifest.step] = manifest.current, before / ADAPTER_FILE
    linked = []
    for version in sorted(versions):
        if version not in there:
            raise InvariantBroken(f"{before} does not hold the adapter of version {version}.")
        kept, path = there[version]
        _link(path, draft / _older_name(version))
        linked.append(kept)
    return tuple(linked)


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:
        # Not every file system has hard links.
        shutil.copyfile(source, target)


def _require_own(kept: KeptAdapter, where: Path, job_id: str, base_sha256: str) -> None:
    if kept.job_id != job_id:
        raise InvalidRequest(
            f"{where} is of job {kept.job_id}, not of {job_id}; give each job its own folder.",
            code="wrong_job",
        )
    if kept.base_sha256 != base_sha256:
        raise InvalidRequest(
            f"{where} holds an adapter for base {kept.base_sha256[:12]}, and the job's base is "
            f"{base_sha256[:12]}; bring back the base the job began with.",
            code="wrong_base",
        )


def _read(path: Path, sha256: str) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise NotFound(
            f"{path.parent} holds no whole checkpoint: {path.name} is missing."
        ) from None
    if sha256_hex(data) != sha256:
        raise InvalidRequest(
            f"{path} is not what the manifest says; resume from another checkpoint.",
            code="bad_checkpoint",
        )
    return data


def _folder(directory: Path, step: int) -> Path:
    return directory / f"step-{step:07d}"


def _older_name(version: int) -> str:
    return f"adapter-{version:07d}.safetensors"


def _best_name(version: int) -> str:
    return f"best-{version:07d}.safetensors"


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _folders(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if _FOLDER.match(path.name))


def _write_durably(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
