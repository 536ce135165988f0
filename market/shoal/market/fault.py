"""Proofs of the orchestrator's faults, in the form `FaultCourt` takes them.

Each proof is one call of the court: the records that the orchestrator signed and the Merkle
paths between them.  The court believes nobody; what it recomputes here is what it accepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eth_abi.abi import encode as abi_encode

from shoal.market.seal import SealedEpoch
from shoal.protocol.certificate import ClearingCertificate, ClearingRule, Rung
from shoal.protocol.errors import InvalidRequest
from shoal.protocol.market import ANY_JOB, Bid
from shoal.protocol.merkle import MerkleTree, hex32, keccak, unhex
from shoal.protocol.record import Record
from shoal.protocol.sealing import BidReceipt, BidReveal, BookSeal, CommitProof
from shoal.protocol.signing import Domain, SignableRecord, Signed, signing_digest

_RUNG = "(uint256,uint256,bytes32,address,uint96,uint96,uint96,uint32)"
_NEIGHBOUR = "(uint256,uint256,bytes32,bytes32[])"
_SELECTOR_BYTES = 4


class ReceiptedBid(Record):
    """What a bidder holds of one sealed bid: the receipt, the bid and its salt.

    Writer: the worker, to its own disk.  Reader: whoever proves that the bid was dropped.
    """

    receipt: Signed[BidReceipt]
    reveal: BidReveal


class BidDrop(Record):
    """A sealed bid, and a seal that leaves it out though its receipt covers the epoch.

    Writer: the worker, to its own disk.  Reader: whoever proves it, once a lot of the epoch
    is certified.
    """

    bid: ReceiptedBid
    seal: Signed[BookSeal]


@dataclass(frozen=True, kw_only=True)
class CourtProof:
    """One call of the court.

    ``arguments`` are nested tuples in the order of the contract's structs; ``sentence`` says
    what the call proves.
    """

    function: str
    types: tuple[str, ...]
    arguments: tuple[Any, ...]
    sentence: str

    def calldata(self) -> bytes:
        """The call as a transaction carries it: selector and ABI-encoded arguments."""
        selector = keccak(f"{self.function}({','.join(self.types)})".encode())[:_SELECTOR_BYTES]
        return selector + abi_encode(self.types, self.arguments)

    def to_json(self) -> dict[str, Any]:
        """The call for a program or a person to send."""
        return {
            "function": self.function,
            "types": list(self.types),
            "arguments": _plain(self.arguments),
            "calldata": "0x" + self.calldata().hex(),
            "sentence": self.sentence,
        }


def dropped_bid(
    certificate: Signed[ClearingCertificate],
    commitments: Sequence[str],
    held: ReceiptedBid,
    domain: Domain,
) -> CourtProof:
    """The proof that a receipted bid is not in the book a lot was cleared on.

    Args:
        certificate: Of a lot of the bid's job, in an epoch that the receipt covers.
        commitments: Every commitment of the epoch's book, as the orchestrator published them.
        held: The bidder's own evidence.
        domain: Where the signatures count.

    Raises:
        InvalidRequest: the evidence does not show that; the sentence says what is missing.
    """
    record, receipt = certificate.record, held.receipt.record
    bid = held.reveal.signed.record
    if held.reveal.commitment(domain) != receipt.commitment:
        raise InvalidRequest(
            "The bid and salt do not open the receipt's commitment; give the ones it was made of.",
            code="commitment_mismatch",
        )
    bid_stands = bid.job_id in (record.lot.job_id, ANY_JOB)
    if not (receipt.covers(record.epoch) and bid_stands and _within(bid, record.epoch)):
        raise InvalidRequest(
            f"The receipt covers market epochs {receipt.epoch_from} to {receipt.epoch_to} and the "
            f"bid job {bid.job_id}; the certificate is of epoch {record.epoch} and job "
            f"{record.lot.job_id}.",
            code="not_dropped",
        )
    if bid.price_micros > record.lot.reserve_micros:
        raise InvalidRequest(
            f"The bid asks {bid.price_micros} micros and the reserve was "
            f"{record.lot.reserve_micros}; it would have won nothing.",
            code="not_dropped",
        )
    book = _sealed_book(record, commitments, receipt.commitment)
    count = book.seal.num_commitments
    neighbours = tuple(_neighbour(proof, count) for proof in book.gap(receipt.commitment))
    return _call(
        "droppedBid",
        [
            _signed_parts(certificate),
            _signed_parts(held.receipt),
            [(_type(Bid), _values(bid)), ("bytes32", unhex(held.reveal.salt))],
            [(f"{_NEIGHBOUR}[]", neighbours)],
        ],
        f"Commitment {receipt.commitment} was receipted for market epochs {receipt.epoch_from} to "
        f"{receipt.epoch_to} and is not in the book of epoch {record.epoch}.",
    )


def _sealed_book(
    record: ClearingCertificate, commitments: Sequence[str], missing: str
) -> SealedEpoch:
    """The book under the certificate's commit root: the list given, or that without ``missing``.

    An orchestrator that sealed a book without a commitment may list it nevertheless.
    """
    listed = [unhex(name) for name in commitments]
    for names in (listed, [name for name in listed if name != unhex(missing)]):
        book = SealedEpoch.of(record.epoch, names, sealed_at_ms=0)
        if book.seal.commit_root == record.seed_parts.commit_root:
            return book
    raise InvalidRequest(
        "The commitments given are not those under the certificate's commit root; get the "
        "list the orchestrator serves with the certificate.",
        code="wrong_commitments",
    )


def mispriced_bid(
    certificate: Signed[ClearingCertificate],
    rungs: Sequence[Rung],
    place: int,
    bid: Bid,
    domain: Domain,
) -> CourtProof:
    """The proof that a certificate pays a bid less than it asked, or more under pay-as-bid.

    Args:
        certificate: What the orchestrator signed.
        rungs: Its whole ladder, as published.
        place: Which rung is wrong.
        bid: The bid it names.
        domain: Where the signatures count.

    Raises:
        InvalidRequest: the rung names another bid, its price is right, or the ladder is not
            the certificate's.
    """
    record, rung = certificate.record, rungs[place]
    if digest_of_bid(bid, domain) != rung.bid_digest:
        raise InvalidRequest(
            f"Rung {place} names bid {rung.bid_digest}, which is not the one given.",
            code="wrong_bid",
        )
    if not is_mispriced(rung, bid, record.rule):
        raise InvalidRequest(
            f"Rung {place} pays {rung.pay_micros} micros for a bid of {bid.price_micros}, as its "
            "rule has it.",
            code="price_kept",
        )
    tree = MerkleTree([item.leaf(len(rungs)) for item in rungs])
    if hex32(tree.root) != record.allocation_root:
        raise InvalidRequest(
            "The rungs given are not those under the certificate's allocation root; get the "
            "ladder the orchestrator serves with the certificate.",
            code="wrong_ladder",
        )
    leaf = (
        rung.rung,
        len(rungs),
        unhex(rung.bid_digest),
        rung.account,
        rung.price_micros,
        rung.handicap_micros,
        rung.pay_micros,
        rung.num_units,
    )
    return _call(
        "priceBelowBid" if rung.pay_micros < bid.price_micros else "priceAboveBid",
        [
            _signed_parts(certificate),
            [(_RUNG, leaf), ("bytes32[]", tuple(tree.proof(place))), (_type(Bid), _values(bid))],
        ],
        f"Rung {place} pays {rung.pay_micros} micros for a bid of {bid.price_micros}.",
    )


def is_mispriced(rung: Rung, bid: Bid, rule: ClearingRule) -> bool:
    """Whether a rung pays its bid less than it asked, or more where each is paid its own."""
    above = rung.pay_micros > bid.price_micros and rule is ClearingRule.PAY_AS_BID
    return above or rung.pay_micros < bid.price_micros


def two_books(certificate: Signed[ClearingCertificate], seal: Signed[BookSeal]) -> CourtProof:
    """The proof that one book was sealed for an epoch and another one cleared.

    Raises:
        InvalidRequest: they are of different epochs, or the same book.
    """
    record, other = certificate.record, seal.record
    if record.epoch != other.epoch or record.seed_parts.commit_root == other.commit_root:
        raise InvalidRequest(
            f"The certificate of market epoch {record.epoch} and the seal of epoch {other.epoch} "
            "do not contradict each other.",
            code="same_book",
        )
    parts = [*_signed_parts(certificate), *_signed_parts(seal)]
    return CourtProof(
        function="twoBooks",
        types=tuple(kind for kind, _ in parts),
        arguments=tuple(value for _, value in parts),
        sentence=f"Market epoch {record.epoch} was sealed as {other.commit_root} and cleared as "
        f"{record.seed_parts.commit_root}.",
    )


def digest_of_bid(bid: Bid, domain: Domain) -> str:
    """The digest by which rungs name ``bid``."""
    return hex32(signing_digest(bid, domain))


_Part = tuple[str, Any]


def _call(function: str, groups: Sequence[Sequence[_Part]], sentence: str) -> CourtProof:
    """A call whose one argument is a struct of all parts."""
    parts = [part for group in groups for part in group]
    kind = f"({','.join(kind for kind, _ in parts)})"
    values = tuple(value for _, value in parts)
    return CourtProof(function=function, types=(kind,), arguments=(values,), sentence=sentence)


def _signed_parts(signed: Signed[Any]) -> list[_Part]:
    record = signed.record
    return [(_type(type(record)), _values(record)), ("bytes", unhex(signed.signature))]


def _type(record: type[SignableRecord]) -> str:
    return f"({','.join(solidity for _, solidity in record.eip712_fields)})"


def _values(record: SignableRecord) -> tuple[Any, ...]:
    message = record.eip712_message()
    return tuple(message[name] for name, _ in record.eip712_fields)


def _neighbour(proof: CommitProof, count: int) -> tuple[Any, ...]:
    path = tuple(unhex(sibling) for sibling in proof.path)
    return (proof.index, count, unhex(proof.commitment), path)


def _within(bid: Bid, epoch: int) -> bool:
    return bid.epoch_from <= epoch <= bid.epoch_to


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return "0x" + value.hex()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    # An amount may be above what a JSON reader keeps exactly.
    return str(value) if isinstance(value, int) and value >= 1 << 53 else value
