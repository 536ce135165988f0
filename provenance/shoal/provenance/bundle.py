"""The provenance bundle: everything an offline check of one model needs, in one file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from shoal.protocol.errors import InvalidRequest
from shoal.protocol.ids import Address, Hex32, Sha256
from shoal.protocol.job import Job
from shoal.protocol.market import MAX_UNITS, Payout
from shoal.protocol.money import MicrosField
from shoal.protocol.node import BoundNode, ContractAddresses
from shoal.protocol.policy import BaseModelRef
from shoal.protocol.record import Record, first_fault
from shoal.protocol.signing import Domain, Signed
from shoal.provenance.dsse import Envelope
from shoal.provenance.statement import StatementKind

BUNDLE_FILE = "bundle.json"
MAX_BUNDLE_BYTES = 512 << 20
MAX_STATEMENTS = 4_000_000
MAX_EPOCHS = 1_000_000


class LoggedStatement(Record):
    """A statement and its place in the log: leaf ``seq`` of epoch ``epoch``."""

    kind: StatementKind
    contributor: Address
    epoch: int = Field(ge=1, le=MAX_UNITS)
    seq: int = Field(ge=0, le=MAX_UNITS)
    envelope: Envelope


class BundleEpoch(Record):
    """One posted epoch, as ``JobEscrow.post`` was given it.

    ``cumulative_micros`` is the sum of the leaves under ``pay_root``.  The payouts of each
    epoch are not stored: they follow from the verdicts logged up to it.  ``tx_hash`` and
    ``block_number`` say where to look on the chain; nothing offline depends on them.
    """

    number: int = Field(ge=1, le=MAX_UNITS)
    pay_root: Hex32
    provenance_root: Hex32
    num_statements: int = Field(ge=0, le=MAX_UNITS)
    cumulative_micros: MicrosField
    tx_hash: Hex32 | None = None
    block_number: int | None = Field(default=None, ge=0)


class ReleasedFile(Record):
    """A released file; ``path`` has no directories."""

    path: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$")
    sha256: Sha256
    size_bytes: int = Field(ge=0)


class Bundle(Record):
    """Who contributed what to a model, and what each was paid.

    Writer: the orchestrator's publisher.  Reader: anyone, with `shoal.provenance.verifier`.

    ``statements`` are in log order (epoch, then seq), all of them, so that every epoch's root
    recomputes without a proof for each.  ``payouts`` are those of the last epoch.  ``head``
    is the log's head after the last epoch.  ``nodes`` binds every node key that signed,
    including the orchestrator's.  ``files`` are those of the release statement.
    """

    schema_version: int = Field(default=1, ge=1, le=1)
    domain: Domain
    contracts: ContractAddresses
    orchestrator: Address
    job_id: Hex32
    job: Signed[Job]
    base: BaseModelRef
    nodes: tuple[BoundNode, ...] = Field(max_length=100_000)
    statements: tuple[LoggedStatement, ...] = Field(max_length=MAX_STATEMENTS)
    epochs: tuple[BundleEpoch, ...] = Field(max_length=MAX_EPOCHS)
    payouts: tuple[Payout, ...] = Field(max_length=1_000_000)
    head: Hex32
    files: tuple[ReleasedFile, ...] = Field(default=(), max_length=512)

    def to_json(self) -> dict[str, Any]:
        """The bundle as plain JSON data."""
        return self.model_dump(mode="json", by_alias=True)


def released_files(files: Mapping[str, Path]) -> tuple[ReleasedFile, ...]:
    """Each file's name, digest and size, in name order."""
    return tuple(
        ReleasedFile(
            path=name, sha256=hash_file(files[name]), size_bytes=files[name].stat().st_size
        )
        for name in sorted(files)
    )


def hash_file(path: Path) -> str:
    """SHA-256 of the file's bytes, lower-case hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bundle(bundle: Bundle, path: Path) -> None:
    """The bundle is at ``path``, whole or not at all."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.new")
    draft.write_text(bundle.model_dump_json(by_alias=True, indent=1))
    draft.replace(path)


def read_bundle(path: Path, *, max_bytes: int = MAX_BUNDLE_BYTES) -> Bundle:
    """The bundle at ``path``.

    Raises:
        InvalidRequest: there is none, it is larger than ``max_bytes``, or it is not exactly
            a bundle.
    """
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise InvalidRequest(
            f"The bundle {path} cannot be read: {error.strerror}.", code="no_bundle"
        ) from None
    if len(data) > max_bytes:
        raise InvalidRequest(
            f"The bundle {path} is larger than the {max_bytes} bytes allowed.", code="oversize"
        )
    try:
        return Bundle.model_validate_json(data)
    except ValidationError as error:
        raise InvalidRequest(
            f"{path} is not a provenance bundle: {first_fault(error)}.", code="bad_bundle"
        ) from None
