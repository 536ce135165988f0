"""The worker's sealed bids: committed to by hash, shown once the market epoch's book is closed."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Final

from shoal.market.fault import ReceiptedBid
from shoal.protocol.errors import PeerFault
from shoal.protocol.market import Bid
from shoal.protocol.merkle import hex32
from shoal.protocol.sealing import (
    BidCommitment,
    BidReceipt,
    BidReveal,
    Reveals,
    SealNotice,
)
from shoal.protocol.signing import Signed
from shoal.worker.events import log_failure
from shoal.worker.evidence import EvidenceBook
from shoal.worker.offers import Parties

_SALT_BYTES: Final = 32


@dataclass(frozen=True, kw_only=True)
class SealedBid:
    """A bid with the salt that hides it, and what the orchestrator is told of it."""

    reveal: BidReveal
    commitment: BidCommitment


def seal_bid(signed: Signed[Bid], parties: Parties) -> SealedBid:
    """The bid behind a fresh salt; only its commitment is to leave this machine for now."""
    reveal = BidReveal(signed=signed, salt=hex32(secrets.token_bytes(_SALT_BYTES)))
    return SealedBid(
        reveal=reveal,
        commitment=BidCommitment(
            commitment=reveal.commitment(parties.domain),
            epoch_from=signed.record.epoch_from,
            epoch_to=signed.record.epoch_to,
        ),
    )


class SealedBids:
    """What this worker has a receipt for, until its epochs are over.

    Args:
        book: Where bids, salts and receipts are kept, and proof of one that was dropped.
    """

    def __init__(self, book: EvidenceBook) -> None:
        self._book = book
        self._held: dict[str, ReceiptedBid] = {}
        self._dropped: set[str] = set()

    def keep(self, sealed: SealedBid, receipt: Signed[BidReceipt], parties: Parties) -> None:
        """The commitment stands, by the orchestrator's own signed word.

        Raises:
            Unauthorised: somebody else signed the receipt.
            PeerFault: the receipt is for another commitment, or for other epochs.
        """
        receipt.require_signer(parties.domain, parties.orchestrator)
        said, given = sealed.commitment, receipt.record
        if given.commitment != said.commitment or given.epoch_to != said.epoch_to:
            raise PeerFault(
                "The orchestrator's receipt is for another bid than the one sent.",
                evidence=given.digest(),
                code="wrong_receipt",
            )
        held = ReceiptedBid(receipt=receipt, reveal=sealed.reveal)
        if said.commitment not in self._held:
            self._book.keep_bid(held)
        self._held[said.commitment] = held

    def open(self, notice: SealNotice, parties: Parties) -> Reveals:
        """The bids the orchestrator has not seen yet, of those that the seal holds.

        What it does not hold is not shown, or its price would be known before the book is
        closed.  A commitment that it leaves out though the receipt covers the epoch goes into
        the evidence book: `shoal market fault` makes of it what the court accepts.

        Raises:
            Unauthorised: the seal is not the orchestrator's.
        """
        notice.seal.require_signer(parties.domain, parties.orchestrator)
        seal = notice.seal.record
        sealed = {proof.commitment for proof in notice.proofs if proof.holds(seal)}
        for commitment, held in list(self._held.items()):
            receipt = held.receipt.record
            if receipt.epoch_to < seal.epoch:
                del self._held[commitment]
                self._dropped.discard(commitment)
            elif receipt.covers(seal.epoch) and commitment not in sealed | self._dropped:
                # Once is proof enough, and must not fill the disk.
                self._dropped.add(commitment)
                self._book.keep_drop(held, notice.seal)
                log_failure(
                    "bid_dropped",
                    PeerFault("A seal leaves out a bid it must hold.", evidence=seal.digest()),
                    commitment=commitment,
                    epoch=seal.epoch,
                )
        shown = (self._held.get(commitment) for commitment in notice.wanted if commitment in sealed)
        return Reveals(reveals=tuple(held.reveal for held in shown if held is not None))
