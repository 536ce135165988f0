"""Leaves and signed types have the form that the contracts check."""

from __future__ import annotations

import pytest
from eth_abi.abi import encode as abi_encode
from market_records import DOMAIN, NOW_MS, bid
from sealed_market import Stage, node

from shoal.protocol.certificate import Rung, allocation_leaf, handicap_leaf, reveal_leaf
from shoal.protocol.errors import PeerFault
from shoal.protocol.market import Lot
from shoal.protocol.merkle import hash_leaf, keccak, unhex
from shoal.protocol.sealing import (
    BidReceipt,
    BookSeal,
    commit_leaf,
    commitment_of,
)
from shoal.protocol.signing import SignableRecord, signing_digest

SALT = b"\x33" * 32


def test_leaves_are_those_of_abi_encode() -> None:
    rung = Rung(
        rung=3,
        bid_digest="0x" + "ab" * 32,
        account="0x" + "Cd" * 20,
        node=node(1),
        price_micros=90,
        handicap_micros=4,
        pay_micros=95,
        num_units=7,
        room_units=8,
    )
    types = ["uint256", "uint256", "bytes32", "address", "uint96", "uint96", "uint96", "uint32"]
    values = [3, 9, b"\xab" * 32, "0x" + "cd" * 20, 90, 4, 95, 7]
    assert allocation_leaf(rung, 9) == rung.leaf(9) == hash_leaf(abi_encode(types, values))
    committed = abi_encode(["uint256", "uint256", "bytes32"], [2, 5, SALT])
    assert commit_leaf(2, 5, SALT) == hash_leaf(committed)
    shown = abi_encode(["uint256", "uint256", "bytes32", "bytes32"], [2, 5, b"\x44" * 32, SALT])
    assert reveal_leaf(2, 5, b"\x44" * 32, SALT) == hash_leaf(shown)
    for name in (node(2), node(2)[:32], node(2) * 2):
        encoded = abi_encode(["address", "string", "uint96"], ["0x" + "cd" * 20, name, 6])
        assert handicap_leaf("0x" + "cd" * 20, name, 6) == hash_leaf(encoded)


def test_a_commitment_is_the_hash_of_the_signing_digest_and_the_salt() -> None:
    digest = signing_digest(bid(), DOMAIN)
    expected = keccak(abi_encode(["bytes32", "bytes32"], [digest, SALT]))
    assert unhex(commitment_of(digest, SALT)) == expected


@pytest.mark.parametrize(
    ("record", "type_string"),
    [
        (
            BidReceipt,
            "bytes32 commitment,uint32 epochFrom,uint32 epochTo,uint64 receivedAtMs,uint64 seq",
        ),
        (
            BookSeal,
            "uint32 epoch,bytes32 commitRoot,uint32 numCommitments,uint64 sealedAtMs",
        ),
    ],
)
def test_signed_types_are_those_of_the_court(
    record: type[SignableRecord], type_string: str
) -> None:
    assert ",".join(f"{kind} {name}" for name, kind in record.eip712_fields) == type_string


def test_a_certificate_signs_its_own_digest_and_the_lots() -> None:
    certificate = Stage().published().certificate.record
    message = certificate.eip712_message()
    assert message["certificateDigest"] == bytes.fromhex(certificate.digest())
    assert message["lotDigest"] == bytes.fromhex(certificate.lot.digest())
    later = certificate.model_copy(update={"issued_at_ms": NOW_MS + 1})
    assert signing_digest(later, DOMAIN) != signing_digest(certificate, DOMAIN)


def test_a_lots_pay_never_rises_with_age() -> None:
    fields = Stage().published().certificate.record.lot.to_json()
    fine = fields | {"freshness_permille": [1_000, 900, 900]}
    assert Lot.decode(_json(fine)).freshness_permille == (1_000, 900, 900)
    for wrong in ([900, 1_000], [], [1_001], [-1]):
        with pytest.raises(PeerFault):
            Lot.decode(_json(fields | {"freshness_permille": wrong}))


def _json(fields: dict[str, object]) -> bytes:
    import json

    return json.dumps(fields).encode()
