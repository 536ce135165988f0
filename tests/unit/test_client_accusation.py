"""`shoal market fault`: what a worker's notes prove, and every reason why they prove nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from market_records import DOMAIN, account
from sealed_market import ORCHESTRATOR, Stage

from shoal.client.accusation import accuse
from shoal.client.command import run
from shoal.market.fault import dropped_bid
from shoal.market.replay import ClearingFile
from shoal.protocol.keystore import store_account
from shoal.protocol.sealing import BookSeal
from shoal.protocol.signing import Signed, sign
from shoal.worker.evidence import EvidenceBook

STAGE = Stage()
LEFT_OUT = 1


@pytest.fixture(scope="module")
def short() -> ClearingFile:
    """A clearing of a book that one receipted bid is missing from."""
    return STAGE.published(left_out=(LEFT_OUT,))


def noted(folder: Path, seal: Signed[BookSeal], *numbers: int) -> Path:
    """The worker's notes of bids that the seal lacks."""
    book = EvidenceBook(folder / "evidence")
    for number in numbers:
        book.keep_bid(STAGE.receipted(number))
        book.keep_drop(STAGE.receipted(number), seal)
    return folder / "evidence" / "drops.jsonl"


def published(folder: Path, file: ClearingFile) -> Path:
    path = folder / "clearing.json"
    path.write_bytes(file.encode())
    return path


def options(evidence: Path, certificate: Path) -> list[str]:
    return ["market", "fault", "--evidence", str(evidence), "--certificate", str(certificate)]


@pytest.mark.parametrize("name", ["drops.jsonl", "bids.jsonl"])
def test_the_proof_is_written_as_the_court_takes_it(
    short: ClearingFile, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    # The second note is of a bid that the book holds: it is passed over.
    evidence = noted(tmp_path, short.seal, LEFT_OUT, 2, LEFT_OUT)
    assert run(options(evidence.with_name(name), published(tmp_path, short))) == 0
    (line,) = capsys.readouterr().out.splitlines()
    due = dropped_bid(short.certificate, short.commitments, STAGE.receipted(LEFT_OUT), DOMAIN)
    assert json.loads(line) == due.to_json()


def test_a_seal_of_another_book_is_proven_too(short: ClearingFile, tmp_path: Path) -> None:
    shown = STAGE.published(left_out=(3,))
    evidence = noted(tmp_path, shown.seal, LEFT_OUT)
    found = accuse(evidence, published(tmp_path, short)).proofs
    assert [proof.function for proof in found] == ["droppedBid", "twoBooks"]
    # Negative control: a seal that the orchestrator did not sign contradicts nothing.
    forged = sign(shown.seal.record, DOMAIN, account(5))
    other = noted(tmp_path / "other", forged, LEFT_OUT)
    found = accuse(other, published(tmp_path, short)).proofs
    assert [proof.function for proof in found] == ["droppedBid"]


def test_an_honest_book_is_no_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    honest = STAGE.published()
    evidence = noted(tmp_path, honest.seal, LEFT_OUT)
    assert run(options(evidence, published(tmp_path, honest))) == 3
    said = capsys.readouterr()
    assert said.out == ""
    assert "it was not dropped" in said.err


def test_bad_input_is_one_sentence(
    short: ClearingFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, certificate = noted(tmp_path, short.seal, LEFT_OUT), published(tmp_path, short)
    late = STAGE.receipted(LEFT_OUT).receipt.record.model_copy(update={"epoch_from": 9})
    held = STAGE.receipted(LEFT_OUT).model_copy(
        update={"receipt": sign(late, DOMAIN, ORCHESTRATOR)}
    )
    bad = {
        "text": (b"certainly\n", "is no JSON"),
        "list": (b"[1]\n", "is not a worker's note"),
        "fields": (b'{"bid": 5}\n', "is not a worker's note"),
        "bytes": (b"\xff\n", "is no JSON"),
        "nested": (b"[" * 50_000, "is no JSON"),
        "long": (b"[" * (1 << 17), "is longer than"),
        "empty": (b"", "has a receipt for market epoch 7"),
        "late": (held.encode() + b"\n", "has a receipt for market epoch 7"),
    }
    cases = [(tmp_path / "none", certificate, "no evidence at")]
    cases += [(tmp_path, certificate, "cannot be read")]
    cases += [(good, tmp_path / "none", "no clearing file at")]
    cases += [(good, good, "is not a clearing file")]
    for name, (data, sentence) in bad.items():
        path = tmp_path / name
        path.write_bytes(data)
        cases.append((path, certificate, sentence))
    for evidence, file, sentence in cases:
        assert run(options(evidence, file)) != 0
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("shoal: ")
        assert said.err.count("\n") == 1
        assert sentence in said.err, said.err


def test_sending_needs_a_key_and_a_way_to_the_court(
    short: ClearingFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*options(noted(tmp_path, short.seal, 1), published(tmp_path, short)), "--send"]
    key, nothing = tmp_path / "account.json", tmp_path / "nothing"
    store_account(key, account(1))
    for more, sentence in (
        ([], "name the provider's keystore with --key"),
        (["--key", str(nothing)], "no key file at"),
        (["--key", str(key), "--deployment", str(nothing)], "names no chain node"),
        (
            ["--key", str(key), "--deployment", str(nothing), "--rpc-url", "http://127.0.0.1:1"],
            "cannot be read",
        ),
        (["--key", str(key), "--url", "orchestrator"], "not the address of an orchestrator"),
    ):
        assert run([*arguments, *more]) != 0
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.count("\n") == 1
        assert sentence in said.err, said.err
