"""From a cleared lot to its certificate."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.market.clearing import Auction, Cleared, clear_lot, code_sha256, seed_of
from shoal.market.frozen import FrozenBook, TermsTable
from shoal.protocol.certificate import (
    ClearingCertificate,
    ClearingRule,
    ReserveTerms,
    SeedParts,
)
from shoal.protocol.merkle import hex32
from shoal.protocol.sealing import BookSeal


@dataclass(frozen=True, kw_only=True)
class Chainhead:
    """The last block of the chain whose time is not after the seal's."""

    block_hash: str
    block_number: int


@dataclass(frozen=True, kw_only=True)
class Session:
    """All that the lots of one market epoch and class share.

    Args:
        seal: The sealed book's root; ``book`` holds what was opened of it.
        terms: What receipts and stake say of the bidders of the lots' class.
    """

    seal: BookSeal
    book: FrozenBook
    terms: TermsTable
    head: Chainhead

    def seed_parts(self) -> SeedParts:
        """What the seeds of the epoch's lots are made of."""
        return SeedParts(
            commit_root=self.seal.commit_root,
            salts_hash=hex32(self.book.salts_hash),
            block_hash=self.head.block_hash,
            block_number=self.head.block_number,
        )


def clear_and_certify(
    auction: Auction, reserve: ReserveTerms, session: Session, *, issued_at_ms: int
) -> tuple[Cleared, ClearingCertificate]:
    """The lot is cleared; the certificate is for the orchestrator's account to sign.

    Raises:
        InvalidRequest: the parcels are not the lot.
    """
    parts = session.seed_parts()
    seed = seed_of(parts, auction.lot.lot_id)
    cleared = clear_lot(auction, session.book, session.terms, seed=seed, now_ms=issued_at_ms)
    posted = cleared.rule is ClearingRule.POSTED
    certificate = ClearingCertificate(
        lot=auction.lot,
        epoch=session.seal.epoch,
        parcels=auction.parcels,
        num_commitments=session.seal.num_commitments,
        reveal_root=session.book.reveal_root,
        num_revealed=len(session.book),
        handicap_root=session.terms.handicap_root,
        terms_sha256=session.terms.sha256,
        reserve=reserve,
        seed_parts=parts,
        seed=hex32(seed),
        code_sha256=code_sha256(auction.provider_cap_permille),
        num_bidders=cleared.num_bidders,
        rule=cleared.rule,
        posted_price_micros=cleared.clearing_price_micros if posted else None,
        clearing_price_micros=cleared.clearing_price_micros,
        allocation_root=hex32(cleared.ladder.tree().root),
        num_rungs=len(cleared.ladder),
        unfilled_units=cleared.unfilled_units,
        refused_sha256=cleared.refused_sha256(),
        num_refused=len(cleared.refused),
        issued_at_ms=issued_at_ms,
    )
    return cleared, certificate
