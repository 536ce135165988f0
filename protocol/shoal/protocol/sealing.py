"""Sealed bidding: what is said before anyone's price is known.

A bidder commits to a signed bid and gets a receipt; at the market epoch's boundary the
orchestrator seals the book, and only then do bidders show their bids::

    BidCommitment ─▶ BidReceipt          /shoal/bid/2         worker → orchestrator
    BidCancel     ─▶ BidCancelReply      /shoal/bid-cancel/1  worker → orchestrator
    SealNotice    ─▶ Reveals             /shoal/reveal/1      orchestrator → worker

A *market epoch* is one stretch of the orchestrator's auctions, counted across all jobs.  A
bid, its commitment and its receipt name the same range of them, both ends included.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, model_validator

from shoal.protocol.ids import Address, Hex32, PeerIdStr
from shoal.protocol.market import MAX_UNITS, Bid
from shoal.protocol.merkle import hash_leaf, hex32, keccak, unhex, word
from shoal.protocol.merkle import verify as verify_path
from shoal.protocol.record import MAX_INT, Record
from shoal.protocol.signing import Domain, SignableRecord, Signed, signing_digest

MAX_COMMITMENTS_PER_NODE = 64
MAX_PATH = 64
"""Merkle siblings a proof may have; a tree of 2⁶⁴ leaves needs no more."""


class BidCommitment(Record):
    """A bid, sealed: nothing but its hash and the epochs it stands for.

    Writer: the worker's bidder, over its own connection.  Reader: the orchestrator, which
    answers with a `BidReceipt`.  The range is the bid's own; a bid that is later shown with
    another range does not match its commitment.
    """

    commitment: Hex32
    epoch_from: int = Field(ge=0, le=MAX_UNITS)
    epoch_to: int = Field(ge=0, le=MAX_UNITS)

    @model_validator(mode="after")
    def _range_is_forward(self) -> BidCommitment:
        if self.epoch_to < self.epoch_from:
            raise ValueError("epoch_to is before epoch_from")
        return self


class BidReceipt(SignableRecord):
    """The orchestrator's word that a commitment stands in every epoch of its range.

    Writer: the orchestrator, signed.  Reader: the bidder, who with it can prove on chain that
    a seal left its commitment out.  ``epoch_from`` is the first epoch not yet sealed when the
    commitment came, if that is later than the bid's own; ``seq`` counts the orchestrator's
    receipts.
    """

    commitment: Hex32
    epoch_from: int = Field(ge=0, le=MAX_UNITS)
    epoch_to: int = Field(ge=0, le=MAX_UNITS)
    received_at_ms: int = Field(ge=0, le=MAX_INT)
    seq: int = Field(ge=0, le=MAX_INT)

    eip712_fields: ClassVar[tuple[tuple[str, str], ...]] = (
        ("commitment", "bytes32"),
        ("epochFrom", "uint32"),
        ("epochTo", "uint32"),
        ("receivedAtMs", "uint64"),
        ("seq", "uint64"),
    )

    def eip712_message(self) -> dict[str, Any]:
        """The fields the orchestrator signs."""
        return {
            "commitment": unhex(self.commitment),
            "epochFrom": self.epoch_from,
            "epochTo": self.epoch_to,
            "receivedAtMs": self.received_at_ms,
            "seq": self.seq,
        }

    def covers(self, epoch: int) -> bool:
        """Whether a seal of ``epoch`` must hold the commitment."""
        return self.epoch_from <= epoch <= self.epoch_to


class BidCancel(SignableRecord):
    """A commitment withdrawn: from ``from_epoch`` on it is neither shown nor cleared.

    Writer: the bid's account, signed.  Reader: the orchestrator.  It takes effect only if it
    arrives before the commit root of ``from_epoch`` is made.  The commitment keeps its leaf in
    the roots that its receipt covers, so a withdrawn bid can never pass for a dropped one.
    """

    commitment: Hex32
    from_epoch: int = Field(ge=0, le=MAX_UNITS)

    eip712_fields: ClassVar[tuple[tuple[str, str], ...]] = (
        ("commitment", "bytes32"),
        ("fromEpoch", "uint32"),
    )

    def eip712_message(self) -> dict[str, Any]:
        """The fields the bidder signs."""
        return {"commitment": unhex(self.commitment), "fromEpoch": self.from_epoch}


class BidCancelReply(Record):
    """Writer: orchestrator.  Says from which epoch on the commitment is not asked for."""

    commitment: Hex32
    from_epoch: int = Field(ge=0, le=MAX_UNITS)


class BookSeal(SignableRecord):
    """The book of one market epoch, closed.

    Writer: the orchestrator, signed, before it sees any price that was not shown already.
    Reader: bidders, who find their commitments in it; whoever replays a clearing; the court.

    ``commit_root`` is the root over `commit_leaf` of every commitment whose receipt covers
    ``epoch``, in ascending order; 32 zero bytes when there is none.
    """

    epoch: int = Field(ge=0, le=MAX_UNITS)
    commit_root: Hex32
    num_commitments: int = Field(ge=0, le=MAX_UNITS)
    sealed_at_ms: int = Field(ge=0, le=MAX_INT)

    eip712_fields: ClassVar[tuple[tuple[str, str], ...]] = (
        ("epoch", "uint32"),
        ("commitRoot", "bytes32"),
        ("numCommitments", "uint32"),
        ("sealedAtMs", "uint64"),
    )

    def eip712_message(self) -> dict[str, Any]:
        """The fields the orchestrator signs."""
        return {
            "epoch": self.epoch,
            "commitRoot": unhex(self.commit_root),
            "numCommitments": self.num_commitments,
            "sealedAtMs": self.sealed_at_ms,
        }


class CommitProof(Record):
    """Where one commitment lies in a seal.

    Writer: the orchestrator.  Reader: the bidder; as a neighbour of a gap, the court.
    """

    index: int = Field(ge=0, le=MAX_UNITS)
    commitment: Hex32
    path: tuple[Hex32, ...] = Field(max_length=MAX_PATH)

    def holds(self, seal: BookSeal) -> bool:
        """Whether the commitment is leaf ``index`` of the sealed book."""
        leaf = commit_leaf(self.index, seal.num_commitments, unhex(self.commitment))
        inside = self.index < seal.num_commitments
        return inside and verify_path(unhex(seal.commit_root), leaf, [unhex(p) for p in self.path])


class SealNotice(Record):
    """A sealed book, and where the reader's own commitments lie in it.

    Writer: the orchestrator, to each bidder.  Reader: the bidder, which checks every one of
    its receipts that covers the epoch against ``proofs`` and answers with `Reveals`.
    ``wanted`` are the commitments whose bids the orchestrator has not been shown yet.
    """

    seal: Signed[BookSeal]
    proofs: tuple[CommitProof, ...] = Field(max_length=MAX_COMMITMENTS_PER_NODE)
    wanted: tuple[Hex32, ...] = Field(max_length=MAX_COMMITMENTS_PER_NODE)


class BidReveal(Record):
    """A bid, opened.  Writer: the bidder, after the seal.  Reader: the auction, replays."""

    signed: Signed[Bid]
    salt: Hex32

    def commitment(self, domain: Domain) -> str:
        """The commitment that this opens."""
        return commitment_of(signing_digest(self.signed.record, domain), unhex(self.salt))


class StandingCommitment(Record):
    """A commitment as the orchestrator keeps it.

    Writer: the orchestrator's book, to the store.  Reader: itself, after a restart: a receipted
    commitment that a later root left out would be a provable fault.

    ``bid_from`` is the first epoch of the bid's own range; ``cancelled_from`` is present once
    the bid was withdrawn, ``opened`` once it was shown.
    """

    node: PeerIdStr
    account: Address
    receipt: BidReceipt
    bid_from: int = Field(ge=0, le=MAX_UNITS)
    cancelled_from: int | None = Field(default=None, ge=0, le=MAX_UNITS)
    opened: BidReveal | None = None


class Reveals(Record):
    """Writer: the bidder.  Reader: the orchestrator.  What is not shown does not compete."""

    reveals: tuple[BidReveal, ...] = Field(max_length=MAX_COMMITMENTS_PER_NODE)


def commitment_of(bid_digest: bytes, salt: bytes) -> str:
    """``keccak256(abi.encode(bid digest, salt))``, the sealed form of a bid.

    Args:
        bid_digest: What the bid's account signs (`signing_digest`).
        salt: 32 bytes drawn for this bid alone; without them the price could be guessed.
    """
    return hex32(keccak(bid_digest + salt))


def commit_leaf(index: int, count: int, commitment: bytes) -> bytes:
    """The leaf of one commitment: ``abi.encode(index, count, commitment)``, hashed twice.

    With the index and the count in the leaf, two neighbours prove that nothing lies between
    them, and the first and the last that nothing lies outside.
    """
    return hash_leaf(word(index) + word(count) + commitment)
