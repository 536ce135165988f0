"""The provider's books: restarted, and on a disk that fills up or is damaged."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from worker_double import JOB_ID
from worker_records import receipt, verdict

from shoal.protocol.result import Verdict
from shoal.protocol.signing import Signed
from shoal.worker.evidence import EvidenceBook


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Takes half of each write and then nothing more."""
    honest = Path.open

    def opened(path: Path, *args: Any, **options: Any) -> Any:
        file = honest(path, *args, **options)
        write = file.write
        written: list[bool] = []

        def half(data: bytes) -> int:
            if written:
                raise OSError(errno.ENOSPC, "No space left on device")
            written.append(True)
            return int(write(data[: len(data) // 2]))

        class Filling:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

            def __getattr__(self, name: str) -> Any:
                return half if name == "write" else getattr(file, name)

        return Filling()

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opened)
        yield


def test_the_books_survive_a_restart_and_a_line_cut_short(tmp_path: Path) -> None:
    book = EvidenceBook(tmp_path)
    book.keep_receipt(receipt())
    assert book.keep_verdict(verdict())
    assert not book.keep_verdict(verdict())
    with (tmp_path / "verdicts.jsonl").open("a") as file:
        file.write('{"verdict": {"rec')
    again = EvidenceBook(tmp_path)
    assert not again.keep_verdict(verdict())
    assert again.open_jobs() == (JOB_ID,)
    kept = json.loads((tmp_path / "verdicts.jsonl").read_text().splitlines()[0])
    assert Signed[Verdict].model_validate_json(json.dumps(kept["verdict"])) == verdict()
    assert kept["receipt"]["record"]["lease_id"] == "lease_00000000"
    assert again.keep_verdict(verdict("lease_00000002"))
    assert not EvidenceBook(tmp_path).keep_verdict(verdict("lease_00000002"))


def test_what_a_full_disk_did_not_take_leaves_no_half_and_is_kept_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = EvidenceBook(tmp_path)
    book.keep_receipt(receipt())
    with full_disk(monkeypatch), pytest.raises(OSError, match="No space left"):
        book.keep_verdict(verdict())
    assert (tmp_path / "verdicts.jsonl").read_bytes() == b""
    assert book.earned_micros == 0
    assert book.keep_verdict(verdict())
    again = EvidenceBook(tmp_path)
    assert not again.keep_verdict(verdict())
    kept = json.loads((tmp_path / "verdicts.jsonl").read_text())
    assert kept["receipt"]["record"]["lease_id"] == "lease_00000000"


def test_a_job_whose_receipt_found_no_room_is_still_known_to_owe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = EvidenceBook(tmp_path)
    with full_disk(monkeypatch), pytest.raises(OSError, match="No space left"):
        book.keep_receipt(receipt())
    assert book.open_jobs() == (JOB_ID,)


@pytest.mark.parametrize("jobs", ["{", "[]", "1"])
def test_damaged_books_cost_what_was_damaged_and_no_more(tmp_path: Path, jobs: str) -> None:
    book = EvidenceBook(tmp_path)
    book.keep_receipt(receipt())
    assert book.keep_verdict(verdict())
    path = tmp_path / "verdicts.jsonl"
    whole = path.read_text()
    path.write_text('{"verdict": {"rec' + whole + '{"b":1}\n[]\n' + whole)
    (tmp_path / "jobs.json").write_text(jobs)
    again = EvidenceBook(tmp_path)
    assert not again.keep_verdict(verdict())
    assert again.earned_micros == book.earned_micros
    assert again.open_jobs() == (JOB_ID,)
