"""A sealed market in memory: bidders who commit and show, an orchestrator that signs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from eth_account.signers.local import LocalAccount
from market_records import DOMAIN, JOB_ID, NOW_MS, account, bid, lot, peer

from shoal.market.certificate import Chainhead, Session, clear_and_certify
from shoal.market.clearing import Auction, Cleared, parcels_of
from shoal.market.fault import ReceiptedBid
from shoal.market.frozen import FrozenBook, OpenedBid, TermsTable
from shoal.market.replay import ClearingFile, clearing_file
from shoal.market.reserve import reserve_for
from shoal.market.seal import SealedEpoch
from shoal.protocol.certificate import BidderTerms, ClearingCertificate
from shoal.protocol.market import Bid, Lot
from shoal.protocol.merkle import MerkleTree, hex32, keccak, unhex
from shoal.protocol.sealing import BidReceipt, BidReveal, commitment_of
from shoal.protocol.signing import Domain, Signed, sign, signing_digest

EPOCH = 7
ORCHESTRATOR = account(99)
HEAD = Chainhead(block_hash="0x" + "b1" * 32, block_number=12)


def salt_of(number: int) -> str:
    """The same salt for the same number."""
    return hex32(keccak(b"salt %d" % number))


def opened(
    number: int, *, signed: bool = False, domain: Domain = DOMAIN, **changes: Any
) -> OpenedBid:
    """The bid of provider ``number``, shown; a made-up signature unless ``signed``."""
    record = bid_of(number, **changes)
    digest = signing_digest(record, domain)
    name = commitment_of(digest, unhex(salt_of(number)))
    holder = (
        sign(record, domain, account(number))
        if signed
        else Signed[Bid](record=record, signature="0x" + "00" * 65)
    )
    return OpenedBid(
        signed=holder, digest=digest, commitment=unhex(name), salt=unhex(salt_of(number))
    )


def bid_of(number: int, **changes: Any) -> Bid:
    """The rollout bid of provider ``number``, from a node of its own."""
    return bid(number, **changes).model_copy(update={"node": node(number)})


def node(number: int) -> str:
    """A peer id of its own for each of the first thousands of providers."""
    letters = "abcdefghijkmnopqrstuvwxyz"
    tail = "".join(letters[number // 25**place % 25] for place in range(4))
    return peer(number)[:-4] + tail


def terms(number: int, **changes: Any) -> BidderTerms:
    """A staked provider with a record long enough, and no handicap."""
    fields = {
        "account": account(number).address,
        "node": node(number),
        "handicap_micros": 0,
        "bound_units": 1_000,
        "num_receipts": 100,
        "staked": True,
    }
    return BidderTerms.model_validate(fields | changes)


def session_of(book: list[OpenedBid], table: list[BidderTerms]) -> Session:
    """The epoch in which exactly these bids were sealed and shown."""
    sealed = SealedEpoch.of(EPOCH, [entry.commitment for entry in book], sealed_at_ms=NOW_MS)
    return Session(
        seal=sealed.seal, book=FrozenBook(EPOCH, book), terms=TermsTable(table), head=HEAD
    )


def auction_of(auctioned: Lot, sizes: list[int] | None = None, **options: Any) -> Auction:
    """The lot, in tasks of one unit unless ``sizes`` says otherwise."""
    fields = {"posted_micros": auctioned.reserve_micros} | options
    parcels = parcels_of(sizes or [1] * auctioned.num_units)
    return Auction(lot=auctioned, parcels=parcels, **fields)


def clear(
    book: list[OpenedBid],
    table: list[BidderTerms],
    num_units: int = 16,
    sizes: list[int] | None = None,
    **options: Any,
) -> tuple[Cleared, ClearingCertificate]:
    """The lot of ``num_units`` cleared over ``book``; ``options`` are the auction's."""
    auctioned = lot(num_units)
    reserve = reserve_for(auctioned.reserve_micros)
    auction = auction_of(auctioned, sizes, **options)
    return clear_and_certify(auction, reserve, session_of(book, table), issued_at_ms=NOW_MS)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Where a clearing is published: the chain, who signs, for which job."""

    domain: Domain = DOMAIN
    orchestrator: LocalAccount = ORCHESTRATOR
    job_id: str = JOB_ID

    def published(
        self, num_bidders: int = 4, num_units: int = 16, left_out: tuple[int, ...] = ()
    ) -> ClearingFile:
        """A clearing of signed bids, honest but for the providers ``left_out``."""
        numbers = [n for n in range(1, num_bidders + 1) if n not in left_out]
        book = [self.bid(n) for n in numbers]
        session = session_of(book, [terms(n, handicap_micros=n % 3) for n in numbers])
        auctioned = lot(num_units, job_id=self.job_id)
        cleared, certificate = clear_and_certify(
            auction_of(auctioned),
            reserve_for(auctioned.reserve_micros),
            session,
            issued_at_ms=NOW_MS,
        )
        return clearing_file(
            sign(certificate, self.domain, self.orchestrator),
            sign(session.seal, self.domain, self.orchestrator),
            sorted(entry.commitment for entry in book),
            session,
            cleared.ladder.rungs(),
            domain=self.domain,
        )

    def bid(self, number: int) -> OpenedBid:
        """What provider ``number`` offers here."""
        return opened(number, signed=True, domain=self.domain, price_micros=90 + number)

    def receipted(self, number: int) -> ReceiptedBid:
        """What provider ``number`` holds of the bid that the orchestrator took."""
        entry = self.bid(number)
        receipt = BidReceipt(
            commitment=hex32(entry.commitment),
            epoch_from=entry.bid.epoch_from,
            epoch_to=entry.bid.epoch_to,
            received_at_ms=NOW_MS,
            seq=number,
        )
        return ReceiptedBid(
            receipt=sign(receipt, self.domain, self.orchestrator),
            reveal=BidReveal(signed=entry.signed, salt=salt_of(number)),
        )

    def resigned(self, file: ClearingFile, **changes: Any) -> ClearingFile:
        """``file`` with another certificate in the orchestrator's hand."""
        certificate = file.certificate.record.model_copy(update=changes)
        signed = sign(certificate, self.domain, self.orchestrator)
        return file.model_copy(update={"certificate": signed})

    def repriced(self, file: ClearingFile, place: int, pay_micros: int) -> ClearingFile:
        """``file`` with one rung paid otherwise, under a root that the orchestrator signed."""
        rungs = list(file.rungs)
        rungs[place] = rungs[place].model_copy(update={"pay_micros": pay_micros})
        root = MerkleTree([rung.leaf(len(rungs)) for rung in rungs]).root
        forged = self.resigned(file, allocation_root=hex32(root))
        return forged.model_copy(update={"rungs": tuple(rungs)})
