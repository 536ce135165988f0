"""Clearing certificates: what an auction decided, in a form anyone can recompute.

A certificate holds roots and figures only; with the sealed book, the bids shown and the
bidders' terms it can be recomputed byte for byte.  Its EIP-712 form is what `FaultCourt`
reads on chain.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, ClassVar

from pydantic import Field, model_validator

from shoal.protocol.ids import Address, Hex32, Name, PeerIdStr, Sha256
from shoal.protocol.market import MAX_UNITS, Lot
from shoal.protocol.merkle import hash_leaf, unhex, word
from shoal.protocol.money import MicrosField
from shoal.protocol.record import MAX_INT, Record
from shoal.protocol.signing import SignableRecord

MAX_PARCEL_SIZES = 4_096


class ClearingRule(StrEnum):
    """How the units of a lot are priced.

    ``POSTED``: everyone who asks no more is paid the posted adjusted price less its handicap.
    ``PAY_AS_BID``: each is paid its own bid.  ``UNIFORM``: each is paid the clearing price
    less its handicap, and never less than its bid.
    """

    POSTED = "posted"
    PAY_AS_BID = "pay_as_bid"
    UNIFORM = "uniform"

    @property
    def number(self) -> int:
        """The rule as the chain knows it (``uint8``)."""
        return _RULE_NUMBERS[self]


_RULE_NUMBERS = {ClearingRule.POSTED: 0, ClearingRule.PAY_AS_BID: 1, ClearingRule.UNIFORM: 2}


class BidderTerms(Record):
    """What receipts and stake say of one bidder, for the lots of one class.

    Writer: the orchestrator, from receipts and the chain; nothing in it is declared by the
    bidder.  Reader: the auction; whoever replays it.

    ``handicap_micros`` is what its past costs per unit beyond its price; ``bound_units`` how
    many units in flight the account's free stake backs; ``num_receipts`` how many of its
    results of the last thirty days were judged, enough of which end its time as a newcomer.
    """

    account: Address
    node: PeerIdStr
    handicap_micros: MicrosField
    bound_units: int = Field(ge=0, le=MAX_UNITS)
    num_receipts: int = Field(ge=0, le=MAX_INT)
    staked: bool

    def packed(self) -> bytes:
        """The row as bytes, each field of fixed length or preceded by its length."""
        node = self.node.encode()
        numbers = (self.handicap_micros, self.bound_units, self.num_receipts, int(self.staked))
        packed = b"".join(number.to_bytes(8, "big") for number in numbers)
        return unhex(self.account) + len(node).to_bytes(2, "big") + node + packed


class ReserveOrigin(StrEnum):
    """What set a lot's reserve: the requester's own maximum, or the reference price."""

    REQUESTER = "requester"
    REFERENCE = "reference"


class ReserveTerms(Record):
    """Where a reserve comes from, so that anyone can work it out again.

    Writer: the orchestrator.  Reader: whoever replays a clearing.

    ``reference_micros`` is the unit's cost on a centralised GPU, rounded down; absent where
    the table of prices has no GPU for the class.  ``gpu`` and ``units_per_1000_gpu_hours``
    say what it was worked out from.  ``num_raises`` counts how often the reserve was raised
    because the work failed.
    """

    requester_max_micros: MicrosField
    reference_micros: MicrosField | None = None
    gpu: Name | None = None
    units_per_1000_gpu_hours: int | None = Field(default=None, ge=1, le=MAX_INT)
    origin: ReserveOrigin
    num_raises: int = Field(default=0, ge=0, le=MAX_UNITS)
    reserve_micros: MicrosField


class Parcels(Record):
    """``count`` tasks of ``num_units`` units each; a task's units stay together."""

    num_units: int = Field(ge=1, le=MAX_UNITS)
    count: int = Field(ge=1, le=MAX_UNITS)


class SeedParts(Record):
    """What a seed was made of, chosen by no single party.

    ``salts_hash`` is the keccak of the salts shown, in the order of their commitments, so it
    was fixed by all bidders when they committed.  ``block_hash`` is that of the last block of
    the chain whose time is not after the seal's.
    """

    commit_root: Hex32
    salts_hash: Hex32
    block_hash: Hex32
    block_number: int = Field(ge=0, le=MAX_INT)


class Rung(Record):
    """One eligible bid of a lot, in its place on the ladder.

    Writer: the auction.  Reader: the dispatcher, which gives each parcel to the first rung
    that has room; providers; the court, as a leaf of the allocation root.

    ``num_units`` were won, or are kept in reserve if ``standby``; 0 means that the bid was
    outbid.  ``pay_micros`` is paid for each accepted unit; ``room_units`` is the most the bid
    may hold at once.
    """

    rung: int = Field(ge=0, le=MAX_UNITS)
    bid_digest: Hex32
    account: Address
    node: PeerIdStr
    price_micros: MicrosField
    handicap_micros: MicrosField
    pay_micros: MicrosField
    num_units: int = Field(ge=0, le=MAX_UNITS)
    room_units: int = Field(ge=0, le=MAX_UNITS)
    standby: bool = False

    def leaf(self, count: int) -> bytes:
        """The rung as a leaf of an allocation root over ``count`` rungs."""
        return allocation_leaf(self, count)


class ClearingCertificate(SignableRecord):
    """The whole of what one auction decided.

    Writer: the orchestrator, signed by its account.  Reader: bidders, by gossip or HTTP;
    whoever replays it; the court.

    ``epoch`` is the market epoch whose sealed book was cleared.  ``handicap_root`` and
    ``terms_sha256`` commit to what receipts and stake say of each bidder; ``refused_sha256``
    to who was refused why.  ``posted_price_micros`` is present only under the posted rule,
    where it equals the clearing price.  ``code_sha256`` names the rule and its constants.
    """

    lot: Lot
    epoch: int = Field(ge=0, le=MAX_UNITS)
    parcels: tuple[Parcels, ...] = Field(min_length=1, max_length=MAX_PARCEL_SIZES)
    num_commitments: int = Field(ge=0, le=MAX_UNITS)
    reveal_root: Hex32
    num_revealed: int = Field(ge=0, le=MAX_UNITS)
    handicap_root: Hex32
    terms_sha256: Sha256
    reserve: ReserveTerms
    seed_parts: SeedParts
    seed: Hex32
    code_sha256: Sha256
    num_bidders: int = Field(ge=0, le=MAX_UNITS)
    rule: ClearingRule
    posted_price_micros: MicrosField | None = None
    clearing_price_micros: MicrosField
    allocation_root: Hex32
    num_rungs: int = Field(ge=0, le=MAX_UNITS)
    unfilled_units: int = Field(ge=0, le=MAX_UNITS)
    refused_sha256: Sha256
    num_refused: int = Field(ge=0, le=MAX_UNITS)
    issued_at_ms: int = Field(ge=0, le=MAX_INT)

    eip712_fields: ClassVar[tuple[tuple[str, str], ...]] = (
        ("certificateDigest", "bytes32"),
        ("lotDigest", "bytes32"),
        ("jobId", "bytes32"),
        ("epoch", "uint32"),
        ("commitRoot", "bytes32"),
        ("revealRoot", "bytes32"),
        ("handicapRoot", "bytes32"),
        ("allocationRoot", "bytes32"),
        ("numUnits", "uint32"),
        ("reserveMicros", "uint96"),
        ("clearingPriceMicros", "uint96"),
        ("rule", "uint8"),
    )

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> ClearingCertificate:
        if sum(p.num_units * p.count for p in self.parcels) != self.lot.num_units:
            raise ValueError("the parcels do not add up to the lot's units")
        if self.reserve.reserve_micros != self.lot.reserve_micros:
            raise ValueError("the lot's reserve is not the one worked out")
        return self

    def eip712_message(self) -> dict[str, Any]:
        """The fields the orchestrator signs; the digest covers all the others."""
        return {
            "certificateDigest": bytes.fromhex(self.digest()),
            "lotDigest": bytes.fromhex(self.lot.digest()),
            "jobId": unhex(self.lot.job_id),
            "epoch": self.epoch,
            "commitRoot": unhex(self.seed_parts.commit_root),
            "revealRoot": unhex(self.reveal_root),
            "handicapRoot": unhex(self.handicap_root),
            "allocationRoot": unhex(self.allocation_root),
            "numUnits": self.lot.num_units,
            "reserveMicros": self.lot.reserve_micros,
            "clearingPriceMicros": self.clearing_price_micros,
            "rule": self.rule.number,
        }


def allocation_leaf(rung: Rung, count: int) -> bytes:
    """The leaf `FaultCourt` checks, hashed twice.

    ``abi.encode(rung, count, bid digest, account, price, handicap, pay, units)``.
    """
    return hash_leaf(
        word(rung.rung)
        + word(count)
        + unhex(rung.bid_digest)
        + unhex(rung.account).rjust(32, b"\0")
        + word(rung.price_micros)
        + word(rung.handicap_micros)
        + word(rung.pay_micros)
        + word(rung.num_units)
    )


def handicap_leaf(account: str, node: str, handicap_micros: int) -> bytes:
    """``abi.encode(address account, string node, uint96 handicapMicros)``, hashed twice."""
    name = node.encode()
    padded = name.ljust(-(-len(name) // 32) * 32, b"\0")
    # The string's place: after the three words of the head.
    head = unhex(account).rjust(32, b"\0") + word(96) + word(handicap_micros)
    return hash_leaf(head + word(len(name)) + padded)


def reveal_leaf(index: int, count: int, bid_digest: bytes, salt: bytes) -> bytes:
    """``abi.encode(index, count, bid digest, salt)`` of a bid shown, hashed twice."""
    return hash_leaf(word(index) + word(count) + bid_digest + salt)
