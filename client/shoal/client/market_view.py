"""How a replayed clearing reads, and the files it is read from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from shoal.market.fault import CourtProof, ReceiptedBid, dropped_bid
from shoal.market.replay import MAX_FILE_BYTES, ClearingFile, Difference, court_proofs, replay
from shoal.protocol.errors import InvalidRequest, NotFound
from shoal.protocol.money import format_dollars
from shoal.protocol.record import Record, first_fault

if TYPE_CHECKING:
    from rich.console import RenderableType

_R = TypeVar("_R", bound=Record)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a replay found: the first difference, if any, and what the court would accept."""

    file: ClearingFile
    difference: Difference | None
    proofs: tuple[CourtProof, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return self.difference is None and not self.proofs


def replay_files(clearing: Path, *, orchestrator: str | None, receipt: Path | None) -> Finding:
    """What a replay of the file ``clearing`` finds.

    Args:
        clearing: A `ClearingFile`, as the orchestrator serves it.
        orchestrator: The account that should have signed; absent takes whoever did.
        receipt: A `ReceiptedBid` that may have been dropped; absent asks nothing of it.

    Raises:
        NotFound: a file is missing.
        InvalidRequest: a file cannot be read or is not what it should be.
    """
    file = read_record(clearing, ClearingFile, "clearing file")
    held = None if receipt is None else read_record(receipt, ReceiptedBid, "receipt file")
    proofs = list(court_proofs(file))
    if held is not None and held.receipt.record.commitment not in file.commitments:
        proofs.append(dropped_bid(file.certificate, file.commitments, held, file.domain))
    return Finding(file=file, difference=replay(file, orchestrator), proofs=tuple(proofs))


def finding_json(finding: Finding) -> dict[str, Any]:
    """The finding for a program."""
    certificate = finding.file.certificate.record
    difference = finding.difference
    return {
        "type": "replay",
        "passed": finding.passed,
        "certificate_sha256": certificate.digest(),
        "signer": finding.file.certificate.signer(finding.file.domain),
        "lot_id": certificate.lot.lot_id,
        "job_id": certificate.lot.job_id,
        "epoch": certificate.epoch,
        "rule": certificate.rule.value,
        "clearing_price_micros": certificate.clearing_price_micros,
        "num_commitments": certificate.num_commitments,
        "num_revealed": certificate.num_revealed,
        "difference": None if difference is None else vars(difference),
        "proofs": [proof.to_json() for proof in finding.proofs],
    }


def finding_picture(finding: Finding) -> list[RenderableType]:
    """The finding as a terminal shows it."""
    from rich.text import Text

    certificate = finding.file.certificate.record
    silent = certificate.num_commitments - certificate.num_revealed
    lines: list[RenderableType] = [
        Text(f"certificate {certificate.digest()}"),
        Text(
            f"lot {certificate.lot.lot_id} of job {certificate.lot.job_id}, market epoch "
            f"{certificate.epoch}: {certificate.lot.num_units} units, {certificate.num_rungs} "
            f"eligible bids of {certificate.num_bidders} accounts, priced {certificate.rule.value}"
        ),
        Text(
            f"reserve ${format_dollars(certificate.lot.reserve_micros)} "
            f"({certificate.reserve.origin.value}), next unit "
            f"${format_dollars(certificate.clearing_price_micros)}; {silent} commitments "
            "without a bid that competes"
        ),
        "",
    ]
    if finding.difference is not None:
        lines.append(Text(f"FAIL  {finding.difference.sentence()}", style="bold red"))
    lines += [
        Text(f"FAIL  {proof.sentence} FaultCourt.{proof.function} takes it.", style="bold red")
        for proof in finding.proofs
    ]
    if finding.passed:
        lines.append(Text("PASS  every byte as recomputed", style="bold green"))
    return lines


def write_proofs(finding: Finding, path: Path) -> None:
    """``path`` holds the calls that the court accepts, as JSON.

    Raises:
        InvalidRequest: there are none, or the file cannot be written.
    """
    if not finding.proofs:
        raise InvalidRequest(
            "Nothing was found that the court takes, so there is no proof to write.",
            code="no_proof",
        )
    text = json.dumps([proof.to_json() for proof in finding.proofs], indent=2)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(f"The proof cannot be written to {path}: {error.strerror}.") from None


def read_record(path: Path, record: type[_R], what: str) -> _R:
    """The record in the file ``path``.

    Args:
        path: A JSON file.
        record: What it should hold.
        what: What a person calls it, for the sentence: "clearing file".

    Raises:
        NotFound: there is no such file.
        InvalidRequest: it cannot be read, is too large or holds something else.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise NotFound(f"There is no {what} at {path}; check the path.") from None
    except OSError as error:
        raise InvalidRequest(f"The {what} {path} cannot be read: {error.strerror}.") from None
    if len(data) > MAX_FILE_BYTES:
        raise InvalidRequest(
            f"The {what} {path} is larger than the {MAX_FILE_BYTES} bytes allowed.",
            code="oversize",
        )
    try:
        return record.model_validate_json(data)
    except ValidationError as error:
        raise InvalidRequest(
            f"{path} is not a {what}: {first_fault(error)}.", code="malformed"
        ) from None
