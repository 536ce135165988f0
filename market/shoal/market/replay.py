"""A clearing recomputed, by anyone, from what was published of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pydantic import Field

from shoal.market.certificate import Chainhead, Session, clear_and_certify
from shoal.market.clearing import Auction
from shoal.market.fault import (
    CourtProof,
    digest_of_bid,
    is_mispriced,
    mispriced_bid,
    two_books,
)
from shoal.market.frozen import FrozenBook, OpenedBid, TermsTable
from shoal.market.reserve import worked_out_again
from shoal.market.seal import SealedEpoch
from shoal.protocol.certificate import BidderTerms, ClearingCertificate, Rung
from shoal.protocol.errors import ShoalError
from shoal.protocol.ids import Hex32
from shoal.protocol.merkle import MerkleTree, hex32, unhex
from shoal.protocol.record import Record
from shoal.protocol.sealing import BidReveal, BookSeal
from shoal.protocol.signing import Domain, Signed, signing_digest

MAX_FILE_BYTES = 256 << 20
MAX_BIDS = 200_000


class ClearingFile(Record):
    """Everything one certificate can be recomputed from.

    Writer: the orchestrator, which serves it beside the certificate.  Reader: `replay`.

    ``commitments`` are all of the sealed book, ``reveals`` the bids that were shown and
    competed, ``terms`` what receipts and stake said of their bidders, ``rungs`` the ladder.
    ``provider_cap_permille`` is absent where no account's share was capped.
    """

    domain: Domain
    certificate: Signed[ClearingCertificate]
    seal: Signed[BookSeal]
    commitments: tuple[Hex32, ...] = Field(max_length=MAX_BIDS)
    reveals: tuple[BidReveal, ...] = Field(max_length=MAX_BIDS)
    terms: tuple[BidderTerms, ...] = Field(max_length=MAX_BIDS)
    rungs: tuple[Rung, ...] = Field(max_length=MAX_BIDS)
    provider_cap_permille: int | None = Field(default=None, ge=1, le=1_000)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Where a published clearing is not what its own bids make it.

    ``field`` is a path in the file, such as ``certificate.rule`` or ``rungs[3].pay_micros``.
    """

    field: str
    expected: str
    found: str

    def sentence(self) -> str:
        """The difference in words."""
        return f"{self.field} should be {self.expected} and is {self.found}."


def replay(file: ClearingFile, orchestrator: str | None = None) -> Difference | None:
    """The first thing in ``file`` that is not as recomputed; none if every byte agrees.

    The order is that of the auction: who signed, the sealed book, the bids shown, the figures
    of the certificate in the order of its fields, the ladder rung by rung.

    Args:
        file: What was published.
        orchestrator: The account whose word it should be; absent takes whoever signed.
    """
    return next(_differences(file, orchestrator), None)


def court_proofs(file: ClearingFile) -> tuple[CourtProof, ...]:
    """Every fault in ``file`` that the court accepts as it stands.

    Other differences cost the orchestrator its word, and no stake: a court on chain cannot
    afford to clear a lot again.
    """
    certificate, seal = file.certificate.record, file.seal.record
    proofs: list[CourtProof] = []
    if certificate.epoch == seal.epoch and certificate.seed_parts.commit_root != seal.commit_root:
        proofs.append(two_books(file.certificate, file.seal))
    tree = MerkleTree([rung.leaf(len(file.rungs)) for rung in file.rungs])
    if hex32(tree.root) != certificate.allocation_root:
        # What was published is not what was signed, so nothing in it proves anything.
        return tuple(proofs)
    bids = {
        digest_of_bid(reveal.signed.record, file.domain): reveal.signed.record
        for reveal in file.reveals
    }
    for place, rung in enumerate(file.rungs):
        bid = bids.get(rung.bid_digest)
        if bid is not None and is_mispriced(rung, bid, certificate.rule):
            proofs.append(mispriced_bid(file.certificate, file.rungs, place, bid, file.domain))
    return tuple(proofs)


def clearing_file(
    signed: Signed[ClearingCertificate],
    seal: Signed[BookSeal],
    commitments: Sequence[bytes],
    session: Session,
    rungs: tuple[Rung, ...],
    *,
    domain: Domain,
    provider_cap_permille: int | None = None,
) -> ClearingFile:
    """The file to publish with a certificate."""
    return ClearingFile(
        domain=domain,
        certificate=signed,
        seal=seal,
        commitments=tuple("0x" + item.hex() for item in commitments),
        reveals=tuple(
            BidReveal(signed=entry.signed, salt="0x" + entry.salt.hex())
            for entry in session.book.opened
        ),
        terms=session.terms.rows,
        rungs=rungs,
        provider_cap_permille=provider_cap_permille,
    )


def _differences(file: ClearingFile, orchestrator: str | None) -> Iterator[Difference]:
    certificate, seal = file.certificate.record, file.seal.record
    yield from _signer_differences(file, orchestrator)
    sealed = SealedEpoch.of(
        seal.epoch, [unhex(name) for name in file.commitments], sealed_at_ms=seal.sealed_at_ms
    )
    yield from _field_differences("seal", sealed.seal, seal)
    opened = [_opened(reveal, file.domain) for reveal in file.reveals]
    yield from _reveal_differences(file, opened)
    reserve = worked_out_again(certificate.reserve)
    yield from _field_differences("certificate.reserve", reserve, certificate.reserve)
    session = Session(
        seal=seal,
        book=FrozenBook(seal.epoch, opened),
        terms=TermsTable(file.terms),
        head=Chainhead(
            block_hash=certificate.seed_parts.block_hash,
            block_number=certificate.seed_parts.block_number,
        ),
    )
    posted = certificate.posted_price_micros
    auction = Auction(
        lot=certificate.lot,
        parcels=certificate.parcels,
        posted_micros=certificate.lot.reserve_micros if posted is None else posted,
        provider_cap_permille=file.provider_cap_permille,
    )
    cleared, expected = clear_and_certify(
        auction, reserve, session, issued_at_ms=certificate.issued_at_ms
    )
    ladder = cleared.ladder.rungs()
    for difference in _field_differences("certificate", expected, certificate):
        if difference.field == "certificate.allocation_root":
            # A rung says more than a root.
            yield from _ladder_differences(ladder, file.rungs)
        yield difference
    yield from _ladder_differences(ladder, file.rungs)


def _signer_differences(file: ClearingFile, orchestrator: str | None) -> Iterator[Difference]:
    expected = orchestrator
    for name, signed in (("seal", file.seal), ("certificate", file.certificate)):
        try:
            signer = signed.signer(file.domain)
        except ShoalError as error:
            yield Difference(field=f"{name}.signature", expected="a signature", found=error.message)
            continue
        if expected is not None and signer.lower() != expected.lower():
            yield Difference(field=f"{name}.signature", expected=expected, found=signer)
        expected = expected or signer


def _opened(reveal: BidReveal, domain: Domain) -> OpenedBid:
    return OpenedBid(
        signed=reveal.signed,
        digest=signing_digest(reveal.signed.record, domain),
        commitment=unhex(reveal.commitment(domain)),
        salt=unhex(reveal.salt),
    )


def _reveal_differences(file: ClearingFile, opened: Sequence[OpenedBid]) -> Iterator[Difference]:
    sealed = {unhex(name) for name in file.commitments}
    for number, entry in enumerate(opened):
        where = f"reveals[{number}]"
        if entry.commitment not in sealed:
            found = "one that opens no commitment of the sealed book"
            yield Difference(field=where, expected="a sealed bid", found=found)
        try:
            entry.signed.require_signer(file.domain, entry.bid.account)
        except ShoalError as error:
            yield Difference(
                field=f"{where}.signature", expected=entry.bid.account, found=error.message
            )


def _field_differences(where: str, expected: Record, found: Record) -> Iterator[Difference]:
    if expected == found:
        return
    for name in type(expected).model_fields:
        mine, theirs = getattr(expected, name), getattr(found, name)
        if mine == theirs:
            continue
        if isinstance(mine, Record) and isinstance(theirs, Record):
            yield from _field_differences(f"{where}.{name}", mine, theirs)
        else:
            yield Difference(field=f"{where}.{name}", expected=str(mine), found=str(theirs))


def _ladder_differences(mine: Sequence[Rung], theirs: Sequence[Rung]) -> Iterator[Difference]:
    for number, (expected, found) in enumerate(zip(mine, theirs, strict=False)):
        yield from _field_differences(f"rungs[{number}]", expected, found)
    if len(mine) != len(theirs):
        yield Difference(field="rungs", expected=f"{len(mine)} rungs", found=f"{len(theirs)}")
