"""What gradient encodings left out, kept for the next gradient of the same job.

A residual is spent once.  It is lent to a gradient while that is computed and judged; if the
gradient is accepted the residual it left takes its place, and if it comes to nothing, however
it does, the lent one is free again.  So a lost lease loses no error feedback and an accepted
gradient is never fed back twice, whatever the order in which verdicts arrive.  A restart or a
new session starts from nothing, which costs a little learning and needs no agreement.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from shoal.protocol.canonical import sha256_hex
from shoal.protocol.task import GradientTask
from shoal.worker.ports import AnyTask, Engine, TaskInput, TaskOutput

MAX_BYTES: Final = 8 << 30
_MAX_LOANS: Final = 64


@dataclass(kw_only=True)
class _Loan:
    """A gradient under way: the residual it was given, and the one it leaves, by digest.

    ``stale`` once its session has ended: then neither becomes free.
    """

    job_id: str
    before: str | None
    after: str | None = None
    stale: bool = False


class ResidualBook:
    """The residuals of this worker, on disk; only digests are in memory.

    Its methods may be called from any thread.

    Args:
        directory: Holds one file for each residual; emptied at the start.
        max_bytes: Free residuals are dropped, the oldest first, to stay below.
    """

    def __init__(self, directory: Path, max_bytes: int = MAX_BYTES) -> None:
        shutil.rmtree(directory, ignore_errors=True)
        self._directory = directory
        self._max_bytes = max_bytes
        self._free: dict[str, deque[str]] = {}
        self._loans: OrderedDict[str, _Loan] = OrderedDict()
        self._tasks: dict[str, str] = {}
        self._sizes: dict[str, int] = {}
        self._lock = threading.Lock()

    def lend(self, task_sha256: str, job_id: str) -> bytes | None:
        """A free residual of the job for this task, or None; it is lent until the task is over."""
        with self._lock:
            self._end(task_sha256, accepted=False)
            while len(self._loans) >= _MAX_LOANS:
                self._end(next(iter(self._loans)), accepted=False)
            free = self._free.get(job_id)
            before = free.popleft() if free else None
            data = None if before is None else self._read(before)
            loan = _Loan(job_id=job_id, before=before if data is not None else None)
            self._loans[task_sha256] = loan
            return data

    def keep(self, task_sha256: str, residual: bytes) -> None:
        """What the task's encoding left is on disk, and not free before its verdict."""
        with self._lock:
            loan = self._loans.get(task_sha256)
            if loan is not None:
                loan.after = self._write(residual)
                self._make_room()

    def name_lease(self, lease_id: str, task_sha256: str) -> None:
        """The verdict on this lease will be the one on this task."""
        with self._lock:
            if task_sha256 in self._loans:
                self._tasks[lease_id] = task_sha256

    def judged(self, lease_id: str, *, accepted: bool) -> None:
        """The residual that is right after this verdict is free; the other is gone."""
        with self._lock:
            task_sha256 = self._tasks.pop(lease_id, None)
            if task_sha256 is not None:
                self._end(task_sha256, accepted=accepted)

    def give_back(self, task_sha256: str) -> None:
        """The task came to nothing: what it was lent is free again."""
        with self._lock:
            self._end(task_sha256, accepted=False)

    def find(self, lease_id: str, digest: str) -> bytes | None:
        """The residual before or after this lease's gradient, while its verdict is awaited."""
        with self._lock:
            loan = self._loans.get(self._tasks.get(lease_id, ""))
            if loan is None or digest not in (loan.before, loan.after):
                return None
            return self._read(digest)

    def retain(self, job_ids: Iterable[str]) -> None:
        """Free residuals of all other jobs are gone."""
        with self._lock:
            for job_id in self._free.keys() - set(job_ids):
                self._drop_free(job_id)

    def forget(self) -> None:
        """No residual is free: those of a session that has ended may not be known any more.

        Those under way are still shown when asked for, and gone once their gradient is over.
        """
        self.retain(())
        with self._lock:
            for loan in self._loans.values():
                loan.stale = True

    def _end(self, task_sha256: str, *, accepted: bool) -> None:
        loan = self._loans.pop(task_sha256, None)
        if loan is None:
            return
        self._tasks = {k: v for k, v in self._tasks.items() if v != task_sha256}
        right, wrong = (loan.after, loan.before) if accepted else (loan.before, loan.after)
        if right is not None and not loan.stale:
            self._free.setdefault(loan.job_id, deque()).append(right)
        for digest in (right, wrong):
            if digest is not None:
                self._remove(digest)

    def _drop_free(self, job_id: str) -> None:
        for digest in self._free.pop(job_id, ()):
            self._remove(digest)

    def _make_room(self) -> None:
        while sum(self._sizes.values()) > self._max_bytes:
            fullest = max(self._free, key=lambda job_id: len(self._free[job_id]), default=None)
            if fullest is None or not self._free[fullest]:
                return
            self._remove(self._free[fullest].popleft())

    def _write(self, residual: bytes) -> str:
        digest = sha256_hex(residual)
        self._directory.mkdir(parents=True, exist_ok=True)
        (self._directory / digest).write_bytes(residual)
        self._sizes[digest] = len(residual)
        return digest

    def _read(self, digest: str) -> bytes | None:
        with contextlib.suppress(OSError):
            data = (self._directory / digest).read_bytes()
            if sha256_hex(data) == digest:
                return data
        return None

    def _remove(self, digest: str) -> None:
        named = [d for loan in self._loans.values() for d in (loan.before, loan.after)]
        if digest not in named and not any(digest in free for free in self._free.values()):
            self._sizes.pop(digest, None)
            (self._directory / digest).unlink(missing_ok=True)


class FeedbackEngine:
    """An engine that gives each gradient with error feedback its residual, and keeps the next.

    Args:
        inner: What computes.
        book: Where residuals are kept.
    """

    def __init__(self, inner: Engine, book: ResidualBook) -> None:
        self._inner = inner
        self._book = book

    def prepare(self) -> None:
        """What is slow to load is loaded."""
        self._inner.prepare()

    def run(self, task: AnyTask, inputs: TaskInput, on_progress: Callable[[], None]) -> TaskOutput:
        """The task's output, as the inner engine computes it."""
        if not isinstance(task, GradientTask) or not task.gradient.codec.error_feedback:
            return self._inner.run(task, inputs, on_progress)
        key = task.digest()
        residual = self._book.lend(key, task.job_id)
        try:
            output = self._inner.run(task, replace(inputs, residual=residual), on_progress)
            if output.residual is not None:
                self._book.keep(key, output.residual)
        except BaseException:
            self._book.give_back(key)
            raise
        return output
