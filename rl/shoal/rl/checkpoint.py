"""Checkpoints: all that is needed to continue a job exactly where it stood."""

from __future__ import annotations

import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from shoal.models.policy import ADAPTER_FILE
from shoal.protocol.canonical import sha256_hex
from shoal.protocol.errors import InvalidRequest, NotFound
from shoal.protocol.ids import Hex32, Sha256
from shoal.protocol.job import CheckpointSpec
from shoal.protocol.record import Record

MANIFEST_FILE = "checkpoint.json"
OPTIMIZER_FILE = "optimizer.safetensors"
_log = logging.getLogger(__name__)

_ROLLING = 2
_FOLDER = re.compile(r"^step-(\d{7})$")


class CheckpointManifest(Record):
    """What a checkpoint folder holds.

    Writer: the orchestrator.  Reader: the orchestrator, when it resumes.
    """

    job_id: Hex32
    step: int = Field(ge=0)
    adapter_sha256: Sha256
    optimizer_sha256: Sha256


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint in memory: policy version ``step`` and the optimiser that made it."""

    manifest: CheckpointManifest
    adapter: bytes
    optimizer: bytes


def save_checkpoint(
    directory: Path,
    job_id: str,
    step: int,
    *,
    adapter: bytes,
    optimizer: bytes,
    keep: CheckpointSpec,
) -> Path:
    """The folder of the new checkpoint, complete on disk.

    The two newest stay, so that a job resumes at the very version its records speak of, and
    so do the newest ``keep.keep_last`` of those at a multiple of ``keep.interval``.  Only the
    latter are waited for until the disk has them: the others outlive the process, and a
    power cut that spoils one is seen by its digest.

    A crash at any moment leaves either the whole checkpoint or none of it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    manifest = CheckpointManifest(
        job_id=job_id,
        step=step,
        adapter_sha256=sha256_hex(adapter),
        optimizer_sha256=sha256_hex(optimizer),
    )
    draft = directory / f".draft-{step:07d}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    durable = step % keep.interval == 0
    _write(draft / ADAPTER_FILE, adapter, durable)
    _write(draft / OPTIMIZER_FILE, optimizer, durable)
    _write(draft / MANIFEST_FILE, manifest.encode(), durable)
    folder = directory / f"step-{step:07d}"
    # Only a resumed job saves a step twice, and then the newer is the true one.
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)
    if durable:
        _sync_directory(directory)
    folders = _folders(directory)
    spaced = [path for path in folders if _step_of(path) % keep.interval == 0]
    for old in set(folders) - set(folders[-_ROLLING:]) - set(spaced[-keep.keep_last :]):
        shutil.rmtree(old)
    return folder


def load_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in ``folder``, its digests checked.

    Raises:
        NotFound: there is no checkpoint there.
        InvalidRequest: a file differs from what the manifest says.
    """
    try:
        manifest = CheckpointManifest.model_validate_json((folder / MANIFEST_FILE).read_bytes())
        adapter = (folder / ADAPTER_FILE).read_bytes()
        optimizer = (folder / OPTIMIZER_FILE).read_bytes()
    except FileNotFoundError as error:
        raise NotFound(
            f"{folder} holds no whole checkpoint: {error.filename} is missing."
        ) from None
    except ValidationError:
        raise InvalidRequest(
            f"{folder / MANIFEST_FILE} is not a checkpoint manifest; resume from another.",
            code="bad_checkpoint",
        ) from None
    for name, data, due in (
        (ADAPTER_FILE, adapter, manifest.adapter_sha256),
        (OPTIMIZER_FILE, optimizer, manifest.optimizer_sha256),
    ):
        if sha256_hex(data) != due:
            raise InvalidRequest(
                f"{folder / name} is not what the manifest says; resume from another checkpoint.",
                code="bad_checkpoint",
            )
    return Checkpoint(manifest=manifest, adapter=adapter, optimizer=optimizer)


def newest_checkpoint(directory: Path, at_most: int) -> Checkpoint | None:
    """The newest whole checkpoint of a step of ``at_most``, if there is one."""
    for folder in reversed(_folders(directory)):
        if _step_of(folder) <= at_most:
            try:
                return load_checkpoint(folder)
            except (NotFound, InvalidRequest) as error:
                _log.warning("checkpoint_skipped", extra={"reason": error.message})
    return None


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _folders(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if _FOLDER.match(path.name))


def _write(path: Path, data: bytes, durable: bool) -> None:
    with path.open("wb") as file:
        file.write(data)
        if durable:
            file.flush()
            os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
