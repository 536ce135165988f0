"""The provider's own books: bid receipts, receipts and verdicts, kept on its disk."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, TypeVar

from shoal.market.fault import BidDrop, ReceiptedBid
from shoal.protocol.canonical import parse_json
from shoal.protocol.certificate import ClearingCertificate
from shoal.protocol.result import Receipt, Verdict
from shoal.protocol.sealing import BookSeal
from shoal.protocol.signing import Signed
from shoal.worker.events import log_event

_T = TypeVar("_T")

_MAX_PENDING: Final = 4096
_MAX_LINE_BYTES: Final = 4 << 20
_MAX_CERTIFICATES_BYTES: Final = 32 << 20
"""Of certificates heard by gossip; as many again of the time before are kept."""


class EvidenceBook:
    """What a provider needs to prove what it bid, did and was told.

    What keeps something raises OSError where the disk does not take it; then nothing was kept.

    Args:
        directory: Holds ``bids.jsonl``, ``drops.jsonl``, ``receipts.jsonl``, ``verdicts.jsonl``,
            ``certificates.jsonl`` and ``jobs.json``.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for path in directory.glob("*.jsonl"):
            _drop_torn_line(path)
        self._directory = directory
        self._receipts: dict[str, Signed[Receipt]] = {}
        self._judged: set[tuple[str, int]] = set()
        self.earned_micros = 0
        """Pay of every accepted result whose verdict is here."""
        for lease, pay_micros in _lines(directory / "verdicts.jsonl", _judgement):
            self._judged.add(lease)
            self.earned_micros += pay_micros
        self._jobs = _read_jobs(directory)

    def keep_bid(self, bid: ReceiptedBid) -> None:
        """The bid, its salt and the orchestrator's receipt for the commitment are on disk."""
        self._append("bids.jsonl", bid.to_json())

    def keep_drop(self, bid: ReceiptedBid, seal: Signed[BookSeal]) -> None:
        """A seal that leaves out a bid it must hold is on disk, with what proves it."""
        self._append("drops.jsonl", BidDrop(bid=bid, seal=seal).to_json())

    def keep_certificate(self, certificate: Signed[ClearingCertificate]) -> None:
        """The certificate, as everybody heard it, is on disk; the oldest make room.

        It is the provider's own copy of how a lot was cleared: two that differ, of one lot and
        epoch, prove that different bidders were told different things.
        """
        path = self._directory / "certificates.jsonl"
        if path.exists() and path.stat().st_size > _MAX_CERTIFICATES_BYTES:
            os.replace(path, self._directory / "certificates.old.jsonl")
        self._append(path.name, certificate.to_json())

    def keep_receipt(self, receipt: Signed[Receipt]) -> None:
        """The receipt is on disk, and its job among those that may owe something."""
        while len(self._receipts) >= _MAX_PENDING:
            del self._receipts[next(iter(self._receipts))]
        self._receipts[receipt.record.lease_id] = receipt
        is_first = receipt.record.job_id not in self._jobs
        # First: what is owed is known also where the disk is full.
        self._jobs.setdefault(receipt.record.job_id, False)
        self._append("receipts.jsonl", receipt.to_json())
        if is_first:
            self._write_jobs()

    def keep_verdict(self, verdict: Signed[Verdict]) -> bool:
        """The verdict is on disk beside its receipt; False when it already was."""
        record = verdict.record
        if (record.lease_id, record.lease_epoch) in self._judged:
            return False
        receipt = self._receipts.get(record.lease_id)
        line = {
            "verdict": verdict.to_json(),
            "receipt": None if receipt is None else receipt.to_json(),
        }
        self._append("verdicts.jsonl", line)
        self._receipts.pop(record.lease_id, None)
        self._judged.add((record.lease_id, record.lease_epoch))
        self.earned_micros += record.pay_micros if record.accepted else 0
        return True

    def open_jobs(self) -> tuple[str, ...]:
        """The jobs that may still owe this account something."""
        return tuple(job_id for job_id, settled in self._jobs.items() if not settled)

    def settle_job(self, job_id: str) -> None:
        """The job has paid everything it ever will."""
        self._jobs[job_id] = True
        self._write_jobs()

    def _append(self, name: str, line: dict[str, Any]) -> None:
        rest = memoryview(f"{json.dumps(line, separators=(',', ':'))}\n".encode())
        # Not buffered: what a full disk did not take must not be tried again on closing.
        with (self._directory / name).open("ab", buffering=0) as file:
            end = file.tell()
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                # The next line must not go on from half of this one.
                file.truncate(end)
                raise

    def _write_jobs(self) -> None:
        path = self._directory / "jobs.json"
        draft = path.with_suffix(".new")
        draft.write_text(json.dumps(self._jobs, indent=1))
        os.replace(draft, path)


def _drop_torn_line(path: Path) -> None:
    """The file ends with a whole line; what a crash cut short is gone.

    A cut verdict is no loss: it was never acknowledged, so the orchestrator sends it again.
    """
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - _MAX_LINE_BYTES))
        tail = file.read()
        if not tail.endswith(b"\n"):
            file.truncate(end - len(tail) + tail.rfind(b"\n") + 1)


def _judgement(line: Any) -> tuple[tuple[str, int], int]:
    """The lease and epoch that a line of ``verdicts.jsonl`` judges, and what it pays."""
    record = line["verdict"]["record"]
    pay_micros = int(record["pay_micros"]) if record["accepted"] else 0
    return (str(record["lease_id"]), int(record["lease_epoch"])), pay_micros


def _lines(path: Path, read: Callable[[Any], _T]) -> Iterable[_T]:
    """What ``read`` makes of the lines of the file; a damaged one costs itself alone."""
    if path.exists():
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield read(parse_json(line))
                except (ValueError, KeyError, TypeError):
                    log_event("line_damaged", logging.WARNING, path=str(path), line=number)


def _read_jobs(directory: Path) -> dict[str, bool]:
    """The jobs worked for, and whether each is settled; by the receipts where that is lost."""
    path = directory / "jobs.json"
    try:
        return {job_id: bool(settled) for job_id, settled in parse_json(path.read_bytes()).items()}
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError):
        log_event("jobs_damaged", logging.WARNING, path=str(path))
        worked = _lines(directory / "receipts.jsonl", lambda line: str(line["record"]["job_id"]))
        return dict.fromkeys(worked, False)
