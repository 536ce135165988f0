"""Envelopes, statements and the log's arithmetic."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from eth_abi.abi import encode as abi_encode
from eth_utils.crypto import keccak
from market_records import account, node_key
from provenance_story import ENVIRONMENT, JOB_ID, Story, peer_of

from shoal.protocol.canonical import canonical_bytes, sha256_hex
from shoal.protocol.errors import InvalidRequest, PeerFault
from shoal.protocol.merkle import EMPTY_ROOT, verify
from shoal.provenance import dsse, statement
from shoal.provenance.dsse import Envelope
from shoal.provenance.log import EMPTY_HEAD, EpochLog, leaf, next_head, replay_head
from shoal.provenance.statement import DatasetPredicate, StatementKind, WorkPredicate

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "provenance.json").read_text())


def sealed(payload: bytes = b'{"a":1}') -> Envelope:
    key = node_key(1)
    return dsse.sign(payload, key_id=peer_of(key), sign=key.sign)


def public(number: int = 1) -> bytes:
    return node_key(number).public_key().public_bytes_raw()


def test_an_envelope_is_dsse() -> None:
    envelope = sealed()
    data = json.loads(envelope.to_text())
    assert set(data) == {"payload", "payloadType", "signatures"}
    signature = base64.b64decode(data["signatures"][0]["sig"])
    message = b'DSSEv1 28 application/vnd.in-toto+json 7 {"a":1}'
    node_key(1).public_key().verify(signature, message)
    assert dsse.verify(Envelope.from_text(envelope.to_text()), public()) == b'{"a":1}'


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"payload": "eyJhIjoyfQ=="}, "bad_signature"),
        ({"payload": "eyJhIjoxfR=="}, "malformed"),
        ({"payload": "ey\nJhIjoxfQ=="}, "malformed"),
        ({"payload": "ü"}, "malformed"),
        ({"payload_type": "text/plain"}, "wrong_payload_type"),
    ],
)
def test_a_changed_envelope_is_refused(change: dict[str, str], code: str) -> None:
    with pytest.raises(PeerFault) as caught:
        dsse.verify(sealed().model_copy(update=change), public())
    assert caught.value.code == code


def test_another_key_or_a_short_one_does_not_verify() -> None:
    for key in (public(2), b"", bytes(31)):
        with pytest.raises(PeerFault):
            dsse.verify(sealed(), key)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "x" * 300_000,
        '{"payload":"","payloadType":"x","signatures":[]}',
        '{"payload":5,"payloadType":"x","signatures":[{"keyid":"","sig":""}]}',
        "\ud800",
    ],
)
def test_a_malformed_envelope_is_a_typed_error(text: str) -> None:
    with pytest.raises(PeerFault):
        Envelope.from_text(text)


def test_an_oversized_payload_is_not_signed() -> None:
    with pytest.raises(InvalidRequest):
        sealed(b"x" * (dsse.MAX_PAYLOAD_BYTES + 1))
    largest = sealed(b"x" * dsse.MAX_PAYLOAD_BYTES)
    assert len(largest.to_text()) < dsse.MAX_ENVELOPE_BYTES
    assert Envelope.from_text(largest.to_text()) == largest


def test_both_sides_build_the_same_statement() -> None:
    story = Story()
    task = story.rollout(0)
    lease, result = story.deliver(task, 1)
    payload = statement.work_statement(lease, task, result)
    statement.require_same_work(payload, lease, task, result)
    read = statement.decode(payload)
    assert read.kind is StatementKind.ROLLOUT_BATCH
    assert isinstance(read.predicate, WorkPredicate)
    assert (read.predicate.lease, read.predicate.result) == (lease, result)
    assert read.job_id == JOB_ID
    boast = result.model_copy(update={"num_tokens": 41})
    with pytest.raises(PeerFault) as caught:
        statement.require_same_work(payload, lease, task, boast)
    assert caught.value.code == "statement_mismatch"


def test_each_kind_of_work_has_its_own_predicate_type() -> None:
    story = Story()
    for task, name in (
        (story.rollout(0), "rollout-batch"),
        (story.gradient(0), "gradient-batch"),
        (story.evaluate(0), "evaluation"),
    ):
        lease, result = story.deliver(task, 1)
        data = json.loads(statement.work_statement(lease, task, result))
        assert data["_type"] == "https://in-toto.io/Statement/v1"
        assert data["predicateType"] == f"https://shoal.dev/provenance/{name}/v1"
        assert data["subject"][0]["digest"]["sha256"] == result.payload.sha256


def _good() -> dict[str, object]:
    payload = statement.environment_statement(JOB_ID, ENVIRONMENT, "6" * 64)
    data: dict[str, object] = json.loads(payload)
    return data


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xff",
        b"[]",
        b"NaN",
        b'{"a":1,"a":1}',
        b"[" * 100_000,
        json.dumps(_good()).encode(),
        canonical_bytes(_good() | {"extra": 1}),
        canonical_bytes(_good() | {"_type": "https://in-toto.io/Statement/v0.1"}),
        canonical_bytes(_good() | {"predicateType": "https://shoal.dev/provenance/gift/v1"}),
        canonical_bytes(_good() | {"predicate": {}}),
        canonical_bytes(_good() | {"subject": []}),
    ],
)
def test_what_is_not_exactly_a_statement_is_a_typed_error(payload: bytes) -> None:
    with pytest.raises(PeerFault):
        statement.decode(payload)
    assert statement.decode(canonical_bytes(_good())).kind is StatementKind.ENVIRONMENT


def test_a_statement_cannot_be_built_wrong() -> None:
    data = DatasetPredicate(job_id=JOB_ID, name="pairs", num_rows=2**60)
    with pytest.raises(InvalidRequest) as caught:
        statement.encode(StatementKind.DATASET, {"pairs": "1" * 64}, data)
    assert caught.value.code == "number_too_large"
    with pytest.raises(InvalidRequest, match="cannot carry"):
        statement.encode(StatementKind.UPDATE, {"pairs": "1" * 64}, data)
    with pytest.raises(InvalidRequest, match="subjects"):
        statement.encode(StatementKind.DATASET, {}, data)


def test_the_leaf_is_the_published_one() -> None:
    for vector in VECTORS["leaves"]:
        arguments = dict(vector)
        expected = arguments.pop("leaf")
        kind = StatementKind(arguments.pop("kind"))
        found = leaf(
            kind, arguments.pop("payload_sha256"), arguments.pop("contributor"), **arguments
        )
        assert "0x" + found.hex() == expected
    by_hand = keccak(
        keccak(
            abi_encode(
                ["string", "bytes32", "address", "bytes32", "uint64", "uint64"],
                ["update", b"\1" * 32, account(1).address, b"\2" * 32, 3, 4],
            )
        )
    )
    found = leaf(
        StatementKind.UPDATE,
        "01" * 32,
        account(1).address,
        job_id="0x" + "02" * 32,
        epoch=3,
        seq=4,
    )
    assert found == by_hand


def test_heads_chain_like_the_contract() -> None:
    anchors = [(b"\1" * 32, 3), (EMPTY_ROOT, 0)]
    first = keccak(EMPTY_HEAD + b"\1" * 32 + (3).to_bytes(32, "big"))
    assert next_head(EMPTY_HEAD, b"\1" * 32, 3) == first
    assert replay_head(anchors) == keccak(first + EMPTY_ROOT + bytes(32))
    assert replay_head([]) == EMPTY_HEAD
    head = replay_head((bytes.fromhex(a["root"][2:]), a["leaves"]) for a in VECTORS["anchors"])
    assert "0x" + head.hex() == VECTORS["head"]


def test_an_epoch_proves_each_statement() -> None:
    log = EpochLog(JOB_ID, 1)
    assert log.root == EMPTY_ROOT
    seqs = [
        log.append(StatementKind.UPDATE, sha256_hex(bytes([n])), account(1).address)
        for n in range(5)
    ]
    assert seqs == list(range(5))
    for seq in seqs:
        assert verify(log.root, log.leaves[seq], log.proof(seq))
        assert not verify(log.root, log.leaves[seq - 1], log.proof(seq))
