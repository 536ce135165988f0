"""A clearing recomputed: what agrees, what differs first, and what the court would take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from eth_abi.abi import decode as abi_decode
from market_records import DOMAIN, account
from sealed_market import ORCHESTRATOR, Stage, terms

from shoal.client.command import run
from shoal.contracts.artefact import artefact
from shoal.market.fault import CourtProof, dropped_bid, mispriced_bid, two_books
from shoal.market.replay import ClearingFile, court_proofs, replay
from shoal.protocol.certificate import ClearingRule
from shoal.protocol.errors import InvalidRequest
from shoal.protocol.merkle import keccak
from shoal.protocol.signing import sign

STAGE = Stage()


@pytest.fixture(scope="module")
def honest() -> ClearingFile:
    return STAGE.published()


def test_an_honest_clearing_is_recomputed_byte_for_byte(honest: ClearingFile) -> None:
    assert replay(honest) is None
    assert replay(honest, ORCHESTRATOR.address) is None
    assert court_proofs(honest) == ()
    assert replay(ClearingFile.model_validate_json(honest.encode())) is None
    thick = STAGE.published(num_bidders=30, num_units=40)
    assert thick.certificate.record.rule is ClearingRule.UNIFORM
    assert replay(thick) is None
    thin = STAGE.published(num_bidders=2)
    assert thin.certificate.record.rule is ClearingRule.POSTED
    assert replay(thin) is None


_FORGERIES: list[tuple[str, Callable[[ClearingFile], ClearingFile]]] = [
    ("seal.commit_root", lambda f: f.model_copy(update={"commitments": f.commitments[1:]})),
    (
        "reveals[0]",
        lambda f: f.model_copy(
            update={"reveals": (f.reveals[0].model_copy(update={"salt": "0x" + "7" * 64}),)}
        ),
    ),
    (
        "reveals[1].signature",
        lambda f: f.model_copy(
            update={
                "reveals": (
                    f.reveals[0],
                    f.reveals[1].model_copy(
                        update={"signed": sign(f.reveals[1].signed.record, DOMAIN, account(50))}
                    ),
                    *f.reveals[2:],
                )
            }
        ),
    ),
    (
        "certificate.reserve.reference_micros",
        lambda f: STAGE.resigned(
            f,
            reserve=f.certificate.record.reserve.model_copy(update={"reference_micros": 5}),
        ),
    ),
    ("certificate.reveal_root", lambda f: f.model_copy(update={"reveals": f.reveals[1:]})),
    (
        "certificate.handicap_root",
        lambda f: f.model_copy(update={"terms": (terms(1, handicap_micros=9), *f.terms[1:])}),
    ),
    (
        "certificate.terms_sha256",
        lambda f: f.model_copy(
            update={"terms": (f.terms[0].model_copy(update={"bound_units": 1}), *f.terms[1:])}
        ),
    ),
    (
        "certificate.seed_parts.salts_hash",
        lambda f: STAGE.resigned(
            f,
            seed_parts=f.certificate.record.seed_parts.model_copy(
                update={"salts_hash": "0x" + "5" * 64}
            ),
        ),
    ),
    ("certificate.seed", lambda f: STAGE.resigned(f, seed="0x" + "5" * 64)),
    ("certificate.code_sha256", lambda f: STAGE.resigned(f, code_sha256="5" * 64)),
    ("certificate.rule", lambda f: STAGE.resigned(f, rule=ClearingRule.UNIFORM)),
    ("certificate.clearing_price_micros", lambda f: STAGE.resigned(f, clearing_price_micros=1)),
    ("certificate.unfilled_units", lambda f: STAGE.resigned(f, unfilled_units=3)),
    ("certificate.refused_sha256", lambda f: STAGE.resigned(f, refused_sha256="5" * 64)),
    ("rungs[1].pay_micros", lambda f: STAGE.repriced(f, 1, 1)),
    ("rungs", lambda f: f.model_copy(update={"rungs": f.rungs[:-1]})),
    ("certificate.allocation_root", lambda f: STAGE.resigned(f, allocation_root="0x" + "5" * 64)),
    (
        "certificate.signature",
        lambda f: f.model_copy(
            update={"certificate": sign(f.certificate.record, DOMAIN, account(3))}
        ),
    ),
]


@pytest.mark.parametrize(("field", "forge"), _FORGERIES, ids=[name for name, _ in _FORGERIES])
def test_the_first_difference_is_named(
    honest: ClearingFile, field: str, forge: Callable[[ClearingFile], ClearingFile]
) -> None:
    difference = replay(forge(honest))
    assert difference is not None
    assert difference.field == field
    assert difference.expected != difference.found
    assert field in difference.sentence()


def test_a_clearing_signed_by_somebody_else_is_named(honest: ClearingFile) -> None:
    difference = replay(honest, account(1).address)
    assert difference is not None
    assert difference.field == "seal.signature"


def test_a_receipted_bid_that_was_left_out_is_proven(honest: ClearingFile) -> None:
    file = STAGE.published(left_out=(1,))
    assert replay(file) is None
    held = STAGE.receipted(1)
    proof = dropped_bid(file.certificate, file.commitments, held, DOMAIN)
    _require_abi(proof)
    assert proof.arguments[0][5] == bytes.fromhex(held.reveal.salt[2:])
    listed = (*file.commitments, held.receipt.record.commitment)
    assert dropped_bid(file.certificate, listed, held, DOMAIN) == proof
    with pytest.raises(InvalidRequest) as caught:
        dropped_bid(honest.certificate, honest.commitments, held, DOMAIN)
    assert caught.value.code == "not_dropped"
    with pytest.raises(InvalidRequest) as partial:
        dropped_bid(file.certificate, file.commitments[1:], held, DOMAIN)
    assert partial.value.code == "wrong_commitments"
    mixed = held.model_copy(update={"receipt": STAGE.receipted(2).receipt})
    with pytest.raises(InvalidRequest) as other:
        dropped_bid(file.certificate, file.commitments, mixed, DOMAIN)
    assert other.value.code == "commitment_mismatch"


def test_a_receipt_of_other_epochs_or_a_bid_above_the_reserve_proves_nothing() -> None:
    file = STAGE.published(left_out=(1,))
    held = STAGE.receipted(1)
    late = held.receipt.record.model_copy(update={"epoch_from": 8})
    with pytest.raises(InvalidRequest) as caught:
        dropped_bid(
            file.certificate,
            file.commitments,
            held.model_copy(update={"receipt": sign(late, DOMAIN, ORCHESTRATOR)}),
            DOMAIN,
        )
    assert caught.value.code == "not_dropped"
    dear = Stage().published(num_bidders=130, left_out=(120,))
    with pytest.raises(InvalidRequest) as above:
        dropped_bid(dear.certificate, dear.commitments, STAGE.receipted(120), DOMAIN)
    assert above.value.code == "not_dropped"


@pytest.mark.parametrize(("pay_micros", "function"), [(150, "priceAboveBid"), (1, "priceBelowBid")])
def test_a_mispriced_rung_is_proven(honest: ClearingFile, pay_micros: int, function: str) -> None:
    forged = STAGE.repriced(honest, 2, pay_micros)
    (proof,) = court_proofs(forged)
    assert proof.function == function
    _require_abi(proof)
    bids = {reveal.signed.record.price_micros: reveal.signed.record for reveal in honest.reveals}
    bid = bids[honest.rungs[2].price_micros]
    with pytest.raises(InvalidRequest) as kept:
        mispriced_bid(honest.certificate, honest.rungs, 2, bid, DOMAIN)
    assert kept.value.code == "price_kept"
    with pytest.raises(InvalidRequest) as other:
        mispriced_bid(honest.certificate, honest.rungs, 1, bid, DOMAIN)
    assert other.value.code == "wrong_bid"
    # Rungs that are not under the signed root prove nothing.
    loose = forged.model_copy(update={"certificate": honest.certificate})
    assert court_proofs(loose) == ()
    with pytest.raises(InvalidRequest) as wrong:
        mispriced_bid(honest.certificate, forged.rungs, 2, bid, DOMAIN)
    assert wrong.value.code == "wrong_ladder"


def test_under_a_uniform_price_pay_above_the_bid_is_no_fault() -> None:
    thick = STAGE.published(num_bidders=30, num_units=40)
    assert any(rung.pay_micros > rung.price_micros for rung in thick.rungs)
    assert court_proofs(thick) == ()


def test_two_books_of_one_epoch_are_proven(honest: ClearingFile) -> None:
    other = STAGE.published(left_out=(2,))
    forged = honest.model_copy(update={"seal": other.seal})
    (proof,) = court_proofs(forged)
    assert proof.function == "twoBooks"
    _require_abi(proof)
    with pytest.raises(InvalidRequest) as caught:
        two_books(honest.certificate, honest.seal)
    assert caught.value.code == "same_book"


def _require_abi(proof: CourtProof) -> None:
    """The call is one of the compiled court's, and decodes to what was meant."""
    abi = artefact("FaultCourt").abi
    (entry,) = [item for item in abi if item.get("name") == proof.function]
    types = [_canonical(item) for item in entry["inputs"]]
    assert types == list(proof.types)
    data = proof.calldata()
    assert data[:4] == keccak(f"{proof.function}({','.join(types)})".encode())[:4]
    decoded = abi_decode(types, data[4:])
    assert _lower(decoded) == _lower(proof.arguments)
    assert json.loads(json.dumps(proof.to_json()))["calldata"] == "0x" + data.hex()


def _canonical(item: dict[str, object]) -> str:
    kind = str(item["type"])
    if not kind.startswith("tuple"):
        return kind
    parts = item["components"]
    assert isinstance(parts, list)
    return f"({','.join(_canonical(part) for part in parts)}){kind[5:]}"


def _lower(value: object) -> object:
    if isinstance(value, (tuple, list)):
        return tuple(_lower(part) for part in value)
    return value.lower() if isinstance(value, str) else value


def test_the_command_says_pass_or_the_difference_and_writes_the_proof(
    honest: ClearingFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_bytes(honest.encode())
    bad.write_bytes(STAGE.repriced(honest, 0, 150).encode())
    assert run(["market", "replay", str(good)]) == 0
    assert "PASS" in capsys.readouterr().out
    assert run(["market", "replay", str(good), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["passed"], said["difference"], said["proofs"]) == (True, None, [])
    assert said["signer"] == ORCHESTRATOR.address
    proof = tmp_path / "proof.json"
    assert run(["market", "replay", str(bad), "--proof", str(proof)]) == 3
    text = capsys.readouterr().out
    assert "rungs[0].pay_micros should be 91 and is 150" in text.replace("\n", " ")
    (written,) = json.loads(proof.read_text())
    assert written["function"] == "priceAboveBid"
    assert run(["market", "replay", str(bad), "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["difference"]["field"] == "rungs[0].pay_micros"


def test_the_command_finds_a_receipted_bid_that_was_left_out(
    honest: ClearingFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short, receipt = tmp_path / "short.json", tmp_path / "receipt.json"
    short.write_bytes(STAGE.published(left_out=(1,)).encode())
    receipt.write_bytes(STAGE.receipted(1).encode())
    assert run(["market", "replay", str(short)]) == 0
    assert run(["market", "replay", str(short), "--receipt", str(receipt)]) == 3
    assert "droppedBid" in capsys.readouterr().out
    whole = tmp_path / "whole.json"
    whole.write_bytes(honest.encode())
    assert run(["market", "replay", str(whole), "--receipt", str(receipt)]) == 0


def test_bad_files_are_one_sentence(
    honest: ClearingFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file.json"
    torn = honest.encode()[:-9]
    ragged = json.loads(honest.encode())
    ragged["certificate"]["record"]["lot"]["num_units"] = 99
    cases = [(None, 3), (torn, 3), (json.dumps(ragged).encode(), 3), (b"[]", 3)]
    for data, code in cases:
        path.unlink(missing_ok=True)
        if data is not None:
            path.write_bytes(data)
        assert run(["market", "replay", str(path)]) == code
        error = capsys.readouterr().err
        assert error.startswith("shoal: ")
        assert error.count("\n") == 1
    path.write_bytes(honest.encode())
    assert run(["market", "replay", str(path), "--proof", str(tmp_path / "p.json")]) == 3
    assert "no proof to write" in capsys.readouterr().err
