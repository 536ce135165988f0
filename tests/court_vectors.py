"""Writes `contracts/solidity/test/Vectors.sol`: what Python says the court's records hash to.

Run as ``python tests/court_vectors.py`` after a change of a record; a test holds the file
equal to what this module gives, and the forge tests hold the contracts equal to the file.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from market_records import DOMAIN, JOB_ID, NOW_MS, account, bid, lease, peer

from shoal.market.seal import SealedEpoch
from shoal.protocol.canonical import sha256_hex
from shoal.protocol.certificate import (
    ClearingCertificate,
    ClearingRule,
    Parcels,
    ReserveOrigin,
    ReserveTerms,
    Rung,
    SeedParts,
)
from shoal.protocol.market import Lot, LotClass, TaskKind
from shoal.protocol.merkle import MerkleTree, keccak, unhex
from shoal.protocol.result import Check, CheckName, Receipt, Verdict
from shoal.protocol.sealing import BidReceipt, commitment_of
from shoal.protocol.signing import SignableRecord, sign, signing_digest
from shoal.provenance.log import EpochLog, replay_head
from shoal.provenance.statement import StatementKind, verification_statement

PATH = Path(__file__).parents[1] / "contracts" / "solidity" / "test" / "Vectors.sol"
SIGNER = account(7)
_SALT = bytes(range(32))
_BID = bid(node=3, job_id=JOB_ID, epoch_from=5, epoch_to=9, price_micros=2**53 - 2, nonce=2**53 - 1)
_RECEIPT = Receipt(
    lease_id="lease_0123456789",
    lease_epoch=2,
    job_id=JOB_ID,
    result_sha256="9" * 64,
    account=account(3).address,
    node=peer(3),
)


def vectors() -> str:
    """The whole Solidity file."""
    commitment = commitment_of(signing_digest(_BID, DOMAIN), _SALT)
    receipt = BidReceipt(
        commitment=commitment, epoch_from=5, epoch_to=9, received_at_ms=NOW_MS, seq=2**53 - 1
    )
    book = SealedEpoch.of(7, [keccak(bytes([i])) for i in range(11)], sealed_at_ms=NOW_MS)
    rungs = [_rung(place) for place in range(5)]
    ladder = MerkleTree([rung.leaf(len(rungs)) for rung in rungs])
    certificate = _certificate("0x" + ladder.root.hex(), book.seal.commit_root)
    functions = [
        _record("receipt", "Receipt", _RECEIPT),
        _record("bid", "Bid", _BID),
        _record("bidReceipt", "BidReceipt", receipt),
        _record("seal", "BookSeal", book.seal),
        _record("certificate", "ClearingCertificate", certificate),
        _sealed_bid(commitment),
        _gap(book, commitment),
        _place_on_ladder(rungs, ladder),
        _logged_verdicts(),
    ]
    return _HEAD + "\n".join(functions) + "}\n"


def _rung(place: int) -> Rung:
    return Rung(
        rung=place,
        bid_digest="0x" + keccak(bytes([place, 1])).hex(),
        account=account(place + 1).address,
        node=peer(place + 1),
        price_micros=100 + place,
        handicap_micros=7,
        pay_micros=2**53 - 1 - place,
        num_units=3,
        room_units=4,
    )


def _certificate(allocation_root: str, commit_root: str) -> ClearingCertificate:
    lot = Lot(
        lot_id="lot_0123456789",
        job_id=JOB_ID,
        epoch=7,
        lot_class=LotClass(
            kind=TaskKind.ROLLOUT,
            environment_sha256="1" * 64,
            policy_sha256="2" * 64,
            token_bucket=64,
        ),
        num_units=16,
        reserve_micros=200,
    )
    return ClearingCertificate(
        lot=lot,
        epoch=7,
        parcels=(Parcels(num_units=4, count=4),),
        num_commitments=11,
        reveal_root="0x" + "3" * 64,
        num_revealed=9,
        handicap_root="0x" + "4" * 64,
        terms_sha256="5" * 64,
        reserve=ReserveTerms(
            requester_max_micros=200, origin=ReserveOrigin.REQUESTER, reserve_micros=200
        ),
        seed_parts=SeedParts(
            commit_root=commit_root,
            salts_hash="0x" + "6" * 64,
            block_hash="0x" + "7" * 64,
            block_number=12,
        ),
        seed="0x" + "8" * 64,
        code_sha256="9" * 64,
        num_bidders=9,
        rule=ClearingRule.UNIFORM,
        clearing_price_micros=180,
        allocation_root=allocation_root,
        num_rungs=5,
        unfilled_units=0,
        refused_sha256="a" * 64,
        num_refused=0,
        issued_at_ms=NOW_MS,
    )


def _record(name: str, kind: str, record: SignableRecord) -> str:
    """A function that returns the record as its struct, its digest and a signature."""
    message = record.eip712_message()
    fields = ", ".join(_literal(message[field], type_) for field, type_ in record.eip712_fields)
    digest = signing_digest(record, DOMAIN)
    signature = sign(record, DOMAIN, SIGNER).signature
    returns = f"{kind} memory record, bytes32 digest, bytes memory signature"
    body = [
        f"record = {kind}({fields});",
        f"digest = {_literal(digest, 'bytes32')};",
        f'signature = hex"{signature[2:]}";',
    ]
    return _function(name, returns, body)


def _sealed_bid(commitment: str) -> str:
    body = [
        f"salt = {_literal(_SALT, 'bytes32')};",
        f"commitment = {_literal(unhex(commitment), 'bytes32')};",
    ]
    return _function("sealedBid", "bytes32 salt, bytes32 commitment", body)


def _gap(book: SealedEpoch, commitment: str) -> str:
    proofs = book.gap(commitment)
    count = book.seal.num_commitments
    body = [
        f"root = {_literal(unhex(book.seal.commit_root), 'bytes32')};",
        f"neighbours = new Neighbour[]({len(proofs)});",
    ]
    for place, proof in enumerate(proofs):
        into = f"neighbours[{place}]"
        name = _literal(unhex(proof.commitment), "bytes32")
        body.append(
            f"({into}.index, {into}.count, {into}.commitment) = ({proof.index}, {count}, {name});"
        )
        body += _path(f"{into}.proof", [unhex(sibling) for sibling in proof.path])
    return _function("gap", "Neighbour[] memory neighbours, bytes32 root", body)


def _place_on_ladder(rungs: Sequence[Rung], tree: MerkleTree) -> str:
    rung = rungs[2]
    fields = (
        (rung.rung, "uint256"),
        (len(rungs), "uint256"),
        (unhex(rung.bid_digest), "bytes32"),
        (rung.account, "address"),
        (rung.price_micros, "uint96"),
        (rung.handicap_micros, "uint96"),
        (rung.pay_micros, "uint96"),
        (rung.num_units, "uint32"),
    )
    body = [
        f"rung = Rung({', '.join(_literal(value, kind) for value, kind in fields)});",
        f"root = {_literal(tree.root, 'bytes32')};",
        *_path("proof", tree.proof(2)),
    ]
    return _function("rungOnLadder", "Rung memory rung, bytes32[] memory proof, bytes32 root", body)


def _logged_verdicts() -> str:
    """Two epochs of a log; the wanted verdict is leaf 1 of the first."""
    payloads = [_verdict(pay) for pay in (0, 450)]
    first = EpochLog(JOB_ID, 1)
    for payload in payloads:
        first.append(StatementKind.VERIFICATION, sha256_hex(payload), SIGNER.address)
    second = EpochLog(JOB_ID, 2)
    second.append(StatementKind.VERIFICATION, sha256_hex(payloads[0]), SIGNER.address)
    text, logs = payloads[1], (first, second)
    head = replay_head([(log.root, len(log)) for log in logs])
    task_at, pay_at = text.index(b'"task_id":'), text.index(b'"pay_micros":')
    body = [
        "verdict.epoch = 1;",
        "verdict.seq = 1;",
        f'verdict.payload = hex"{text.hex()}";',
        f"verdict.taskAt = {task_at};",
        f"verdict.payAt = {pay_at};",
        *_path("verdict.proof", first.proof(1)),
        f"verdict.anchor.root = {_literal(first.root, 'bytes32')};",
        f"verdict.anchor.leaves = {len(first)};",
        *_path("verdict.anchor.laterRoots", [second.root]),
        "verdict.anchor.laterLeaves = new uint64[](1);",
        f"verdict.anchor.laterLeaves[0] = {len(second)};",
        f"task = {_literal(keccak(lease().task_id.encode()), 'bytes32')};",
        f"head = {_literal(head, 'bytes32')};",
    ]
    returns = "LoggedVerdict memory verdict, bytes32 task, bytes32 head"
    return _function("loggedVerdict", returns, body)


def _verdict(pay_micros: int) -> bytes:
    # A detail that imitates the two keys: inside a string their quotes are escaped.
    check = Check(name=CheckName.FORM, passed=True, detail='"task_id":"x","pay_micros":9')
    done = lease()
    verdict = Verdict(
        lease_id=done.lease_id,
        lease_epoch=done.lease_epoch,
        job_id=done.job_id,
        result_sha256="9" * 64,
        accepted=pay_micros > 0,
        num_units=done.num_units,
        pay_micros=pay_micros,
        audited=False,
        checks=(check,),
    )
    return verification_statement(verdict, done, work_sha256="a" * 64)


def _path(into: str, siblings: Sequence[bytes]) -> list[str]:
    lines = [f"{into} = new bytes32[]({len(siblings)});"]
    return lines + [
        f"{into}[{i}] = {_literal(sibling, 'bytes32')};" for i, sibling in enumerate(siblings)
    ]


def _function(name: str, returns: str, body: Sequence[str]) -> str:
    lines = "".join(f"        {line}\n" for line in body)
    return f"    function {name}() internal pure returns ({returns}) {{\n{lines}    }}\n"


def _literal(value: object, kind: str) -> str:
    if isinstance(value, bytes):
        return f"0x{value.hex()}"
    if kind == "address":
        # As bytes, since a literal address must carry its checksum.
        return f'address(bytes20(hex"{str(value)[2:].lower()}"))'
    return f'"{value}"' if kind == "string" else str(value)


_HEAD = f"""// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {{LoggedVerdict, Neighbour}} from "../src/Evidence.sol";
import {{
    Bid,
    BidReceipt,
    BookSeal,
    ClearingCertificate,
    Receipt,
    Rung
}} from "../src/MarketRecords.sol";

/// @title Records, digests and trees as the Python side makes them.
/// @dev Written by tests/court_vectors.py; a test holds the two equal.
library Vectors {{
    uint256 internal constant CHAIN_ID = {DOMAIN.chain_id};
    address internal constant ESCROW = {_literal(DOMAIN.escrow, "address")};
    address internal constant SIGNER = {_literal(SIGNER.address, "address")};
    bytes32 internal constant JOB_ID = {_literal(unhex(JOB_ID), "bytes32")};

"""

if __name__ == "__main__":
    PATH.write_text(vectors(), encoding="utf-8")
    sys.stdout.write(f"written {PATH}\n")
