"""What is published of a clearing: everything that anyone needs to recompute it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session as DatabaseSession

from shoal.market.certificate import Chainhead, Session, clear_and_certify
from shoal.market.clearing import Auction, Cleared
from shoal.market.frozen import FrozenBook, OpenedBid, TermsTable
from shoal.market.replay import ClearingFile, clearing_file
from shoal.orchestrator.context import Context
from shoal.orchestrator.store.tables import CertificateRow, CommitmentRow, SealRow
from shoal.protocol.certificate import BidderTerms, ClearingCertificate
from shoal.protocol.errors import InvariantBroken, NotFound
from shoal.protocol.merkle import unhex
from shoal.protocol.sealing import BidReveal, BookSeal, StandingCommitment
from shoal.protocol.signing import Domain, Signed, signing_digest

_MAX_PAGE = 100


@dataclass(frozen=True, kw_only=True)
class Recleared:
    """A stored certificate with its sealed book, and what that book clears to again."""

    certificate: Signed[ClearingCertificate]
    seal: Signed[BookSeal]
    commitments: tuple[bytes, ...]
    market: Session
    cleared: Cleared


async def published_clearing(context: Context, sha256: str) -> ClearingFile:
    """The clearing of that certificate, with the sealed book and the terms it was made of.

    Raises:
        NotFound: no such certificate was ever signed here.
    """
    found = await recleared(context, sha256)
    return clearing_file(
        found.certificate,
        found.seal,
        found.commitments,
        found.market,
        found.cleared.ladder.rungs(),
        domain=context.domain,
    )


async def recleared(context: Context, sha256: str) -> Recleared:
    """The clearing of that certificate, worked out again from the stored book.

    Raises:
        NotFound: no such certificate was ever signed here.
    """
    stored = await context.database.run(lambda session: _stored(session, sha256))
    # Beside the database's thread, in which leases wait to be written.
    return await asyncio.to_thread(_cleared_again, stored, context.domain)


async def listed_certificates(
    context: Context, job_id: str, *, before_ms: int | None, limit: int
) -> list[dict[str, object]]:
    """The job's certificates, the newest first: their names and what they decided."""

    def query(session: DatabaseSession) -> list[CertificateRow]:
        rows = select(CertificateRow).where(CertificateRow.job_id == job_id)
        if before_ms is not None:
            rows = rows.where(CertificateRow.issued_ms < before_ms)
        ordered = rows.order_by(CertificateRow.issued_ms.desc())
        return list(session.scalars(ordered.limit(min(limit, _MAX_PAGE))))

    return [_listed(row) for row in await context.database.run(query)]


def _listed(row: CertificateRow) -> dict[str, object]:
    record = Signed[ClearingCertificate].decode(row.certificate.encode()).record
    return {
        "sha256": row.sha256,
        "lot_id": row.lot_id,
        "kind": record.lot.lot_class.kind.value,
        "epoch": row.epoch,
        "rule": record.rule.value,
        "num_units": record.lot.num_units,
        "num_bidders": record.num_bidders,
        "reserve_micros": record.lot.reserve_micros,
        "clearing_price_micros": record.clearing_price_micros,
        "issued_at_ms": row.issued_ms,
    }


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """The rows of one clearing; ``entries`` are all that may cover its epoch."""

    row: CertificateRow
    sealed: SealRow
    entries: list[str]


def _stored(session: DatabaseSession, sha256: str) -> _Stored:
    row = session.get(CertificateRow, sha256)
    if row is None:
        raise NotFound(
            f"No clearing certificate {sha256} was signed here; list the job's certificates for "
            "their digests.",
            code="no_such_certificate",
        )
    entries = select(CommitmentRow.entry).where(CommitmentRow.epoch_to >= row.epoch)
    return _Stored(
        row=row,
        sealed=session.get_one(SealRow, row.epoch),
        entries=list(session.scalars(entries)),
    )


def _cleared_again(stored: _Stored, domain: Domain) -> Recleared:
    row, sealed = stored.row, stored.sealed
    certificate = Signed[ClearingCertificate].decode(row.certificate.encode())
    record = certificate.record
    seal = Signed[BookSeal].decode(sealed.seal.encode())
    entries = _covering(stored.entries, row.epoch)
    market = Session(
        seal=seal.record,
        book=FrozenBook(row.epoch, _competing(sealed, entries, domain)),
        terms=TermsTable(BidderTerms.model_validate(item) for item in json.loads(row.terms)),
        head=Chainhead(block_hash=sealed.block_hash, block_number=sealed.block_number),
    )
    posted = record.posted_price_micros
    auction = Auction(
        lot=record.lot,
        parcels=record.parcels,
        posted_micros=record.lot.reserve_micros if posted is None else posted,
    )
    cleared, again = clear_and_certify(
        auction, record.reserve, market, issued_at_ms=record.issued_at_ms
    )
    if again != record:
        raise InvariantBroken(f"Certificate {row.sha256} is not what its stored book clears to.")
    return Recleared(
        certificate=certificate,
        seal=seal,
        commitments=tuple(sorted(unhex(name) for name in entries)),
        market=market,
        cleared=cleared,
    )


def _covering(entries: list[str], epoch: int) -> dict[str, StandingCommitment]:
    """Every commitment of ``entries`` whose receipt covers the epoch."""
    found = (StandingCommitment.decode(entry.encode()) for entry in entries)
    return {entry.receipt.commitment: entry for entry in found if entry.receipt.covers(epoch)}


def _competing(
    sealed: SealRow, entries: Mapping[str, StandingCommitment], domain: Domain
) -> list[OpenedBid]:
    opened = []
    for name in json.loads(sealed.competing or "[]"):
        reveal = entries[name].opened
        if reveal is None:
            raise InvariantBroken(f"Commitment {name} competed and no bid is stored for it.")
        opened.append(_opened(reveal, name, domain))
    return opened


def _opened(reveal: BidReveal, commitment: str, domain: Domain) -> OpenedBid:
    return OpenedBid(
        signed=reveal.signed,
        digest=signing_digest(reveal.signed.record, domain),
        commitment=unhex(commitment),
        salt=unhex(reveal.salt),
    )
