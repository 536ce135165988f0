"""What a provider's own evidence proves against an orchestrator, and how the court hears of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from shoal.client.market_view import read_record
from shoal.market.fault import BidDrop, CourtProof, ReceiptedBid, dropped_bid, two_books
from shoal.market.replay import ClearingFile
from shoal.protocol.canonical import parse_json
from shoal.protocol.errors import InvalidRequest, NotFound, ShoalError
from shoal.protocol.record import first_fault

if TYPE_CHECKING:
    from shoal.contracts.court import CourtCase
    from shoal.contracts.gateway import ChainGateway

_MAX_EVIDENCE_BYTES = 64 << 20
_MAX_LINE_BYTES = 64 << 10


@dataclass(frozen=True, kw_only=True)
class Accusation:
    """What the court would take: one or more calls about one certificate."""

    file: ClearingFile
    proofs: tuple[CourtProof, ...]


def accuse(evidence: Path, certificate: Path) -> Accusation:
    """What the worker's evidence proves of the certificate.

    Args:
        evidence: A worker's ``drops.jsonl``, or its ``bids.jsonl`` where the orchestrator
            did not even show it the seal.
        certificate: A `ClearingFile`, as the orchestrator serves it.

    Raises:
        NotFound: a file is missing.
        InvalidRequest: a file cannot be read or is not what it should be, or proves nothing;
            the sentence says why.
    """
    file = read_record(certificate, ClearingFile, "clearing file")
    epoch = file.certificate.record.epoch
    proofs: dict[str, CourtProof] = {}
    refusal: InvalidRequest | None = None
    for drop in _read_evidence(evidence):
        bid = drop.bid if isinstance(drop, BidDrop) else drop
        if not bid.receipt.record.covers(epoch):
            continue
        try:
            proof = dropped_bid(file.certificate, file.commitments, bid, file.domain)
        except InvalidRequest as error:
            refusal = error
        else:
            proofs[bid.receipt.record.commitment] = proof
        if isinstance(drop, BidDrop) and _is_other_book(drop, file):
            proofs["two books"] = two_books(file.certificate, drop.seal)
    if not proofs:
        raise refusal or InvalidRequest(
            f"No bid in {evidence} has a receipt for market epoch {epoch}, that of the "
            "certificate; get the certificate of a lot of the epoch that the drop names.",
            code="not_dropped",
        )
    return Accusation(file=file, proofs=tuple(proofs.values()))


async def require_court(gateway: ChainGateway, accusation: Accusation) -> None:
    """Passes only if ``gateway`` leads to the court that the signed evidence can be heard in.

    Raises:
        InvalidRequest: the evidence was signed for another chain or escrow, or the escrow
            names another court.
        Unavailable: the chain does not answer.
    """
    domain, there = accusation.file.domain, gateway.deployment
    if (domain.chain_id, domain.escrow.lower()) != (there.chain_id, there.job_escrow.lower()):
        raise InvalidRequest(
            f"The certificate is signed for escrow {domain.escrow} on chain {domain.chain_id} and "
            f"not for {there.job_escrow} on chain {there.chain_id}; name a node and the contracts "
            "of its own chain.",
            code="wrong_chain",
        )
    court = await gateway.escrow.court()
    if court.lower() != gateway.court.address.lower():
        raise InvalidRequest(
            f"The escrow {domain.escrow} is judged by the court at {court}, not by "
            f"{gateway.court.address}; give the right addresses with --deployment.",
            code="wrong_court",
        )


async def send_proofs(gateway: ChainGateway, accusation: Accusation) -> list[CourtCase]:
    """Every proof has been upheld by the court, from the gateway's account.

    Raises:
        InvalidRequest: see `require_court`.
        ChainRejected: the court refuses one; earlier ones stand.
        Unavailable: the chain does not answer.
    """
    await require_court(gateway, accusation)
    return [await gateway.court.prove(proof.calldata()) for proof in accusation.proofs]


def _is_other_book(drop: BidDrop, file: ClearingFile) -> bool:
    """Whether the seal that the worker was shown is of another book than was cleared."""
    seal, certificate = drop.seal.record, file.certificate.record
    if seal.epoch != certificate.epoch or seal.commit_root == certificate.seed_parts.commit_root:
        return False
    try:
        return drop.seal.signer(file.domain) == file.certificate.signer(file.domain)
    except ShoalError:
        return False


def _read_evidence(path: Path) -> Iterator[BidDrop | ReceiptedBid]:
    try:
        if path.stat().st_size > _MAX_EVIDENCE_BYTES:
            raise InvalidRequest(
                f"The evidence {path} is larger than the {_MAX_EVIDENCE_BYTES} bytes allowed; cut "
                "out the lines of the epoch in question.",
                code="oversize",
            )
        with path.open("rb") as file:
            number = 0
            while line := file.readline(_MAX_LINE_BYTES + 1):
                number += 1
                yield _parse(line, f"Line {number} of {path}")
    except FileNotFoundError:
        raise NotFound(
            f"There is no evidence at {path}; a worker keeps it in evidence/drops.jsonl of its "
            "data folder."
        ) from None
    except OSError as error:
        raise InvalidRequest(f"The evidence {path} cannot be read: {error.strerror}.") from None


def _parse(line: bytes, where: str) -> BidDrop | ReceiptedBid:
    if len(line) > _MAX_LINE_BYTES:
        raise InvalidRequest(
            f"{where} is longer than the {_MAX_LINE_BYTES} bytes allowed.", code="oversize"
        )
    try:
        named = parse_json(line)
        record = BidDrop if isinstance(named, dict) and "bid" in named else ReceiptedBid
        return record.model_validate_json(line)
    except ValidationError as error:
        fault = first_fault(error)
    except ValueError:
        fault = "it is no JSON"
    raise InvalidRequest(f"{where} is not a worker's note of a bid: {fault}.", code="malformed")
