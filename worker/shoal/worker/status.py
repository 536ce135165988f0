"""What a worker is doing, kept in its folder for `shoal worker status`.

The worker holds a lock on the file's twin for as long as it lives, so that a reader knows a
running worker from the last words of one that is gone, however it went.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from enum import StrEnum
from pathlib import Path
from typing import Final

from pydantic import Field, ValidationError

from shoal.protocol.errors import InvalidRequest, NotFound
from shoal.protocol.ids import Address, Hex32, Name, PeerIdStr, ShortId
from shoal.protocol.market import TaskKind
from shoal.protocol.money import MicrosField
from shoal.protocol.node import IdleDetail, IdleReason
from shoal.protocol.record import MAX_INT, Record, first_fault
from shoal.worker.session import SessionState

STATUS_NAME: Final = "status.json"
_LOCK_NAME: Final = "status.lock"
_MAX_BYTES: Final = 4 << 20


class Stage(StrEnum):
    """Where a lease is on this machine."""

    FETCHING = "fetching"
    WAITING = "waiting"
    COMPUTING = "computing"
    HANDING_IN = "handing in"


class HeldLease(Record):
    """A lease that is held.

    ``steps`` are the steps this worker has done since it came, and ``ends_ms`` is when its time
    is over.
    """

    lease_id: ShortId
    job_id: Hex32
    kind: TaskKind
    num_units: int
    pay_micros: MicrosField
    stage: Stage
    steps: int
    came_ms: int
    ends_ms: int


class Judgement(Record):
    """A verdict, as it was heard."""

    at_ms: int
    lease_id: ShortId
    job_id: Hex32
    accepted: bool
    pay_micros: MicrosField
    reason: str


class Pay(Record):
    """What was earned.

    Attributes:
        accepted: Results accepted since the start.
        rejected: Results rejected since the start.
        earned_micros: Pay of all accepted results that this folder has verdicts of.
        claimed_micros: Claimed since the start.
        claimable_micros: What open jobs owed at the last look; absent before the first.
    """

    accepted: int = 0
    rejected: int = 0
    earned_micros: MicrosField = 0
    claimed_micros: MicrosField = 0
    claimable_micros: MicrosField | None = None


class Asked(Record):
    """What this worker asks for a unit of a kind, and the most that any open job pays."""

    kind: TaskKind
    floor_micros: MicrosField
    best_micros: MicrosField | None = None


class BaseFetch(Record):
    """A base on its way; ``size_bytes`` is absent until its files are known."""

    model: Name
    fetched_bytes: int = 0
    size_bytes: int | None = None


class WorkerStatus(Record):
    """One look at a worker.

    Writer: the worker, at most once a second.  Reader: `shoal worker status`.

    Attributes:
        pid: The process.
        started_ms: When it started.
        at_ms: When this was written; nothing changed since, while the worker runs.
        name: What the orchestrator calls the worker.
        node: Its node.
        account: Who is paid.
        session: How things stand with the orchestrator.
        session_since_ms: When that began.
        address: What is dialled, or over what it is connected.
        last_error: Why the latest try or session failed.
        retry_at_ms: When the next try begins.
        round_trip_ms: How long the last heartbeat took to be answered.
        num_joins: How often it has joined.
        leases: What is held.
        verdicts: The last ten, the newest first.
        pay: What was earned.
        num_jobs: Open jobs.
        fetching: Bases on their way.
        asked: Prices, beside what is paid.
        idle: Why it earns nothing just now; absent before the first heartbeat.
        idle_detail: The figures behind that.
        idle_since_ms: Since when.
        cache_bytes: Blobs on this disk.
        cache_limit_bytes: How many there may be.
        uploaded_bytes: Bytes of blobs sent since the start, to other workers and as results.
        ended: Why the worker ended; absent while it runs, and when it was killed.
    """

    pid: int
    started_ms: int = Field(ge=0, le=MAX_INT)
    at_ms: int = Field(ge=0, le=MAX_INT)
    name: Name
    node: PeerIdStr
    account: Address
    session: SessionState
    session_since_ms: int
    address: str | None = None
    last_error: str | None = None
    retry_at_ms: int | None = None
    round_trip_ms: int | None = None
    num_joins: int = 0
    leases: tuple[HeldLease, ...] = ()
    verdicts: tuple[Judgement, ...] = ()
    pay: Pay = Pay()
    num_jobs: int = 0
    fetching: tuple[BaseFetch, ...] = ()
    asked: tuple[Asked, ...] = ()
    idle: IdleReason | None = None
    idle_detail: IdleDetail | None = None
    idle_since_ms: int | None = None
    cache_bytes: int = 0
    cache_limit_bytes: int = 0
    uploaded_bytes: int = 0
    ended: str | None = None


class StatusFile:
    """Where a worker writes its status, and how a reader knows whether it still runs.

    Args:
        folder: The worker's own.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / STATUS_NAME
        self._lock_path = folder / _LOCK_NAME
        self._lock: int | None = None

    def claim(self) -> bool:
        """The file is this process's until it ends, however it ends; False if another has it."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not _locked(descriptor):
            os.close(descriptor)
            return False
        self._lock = descriptor
        return True

    def write(self, status: WorkerStatus) -> None:
        """Readers see ``status`` from now on, whole.

        Raises:
            OSError: the disk does not take it.
        """
        draft = self._path.with_suffix(".new")
        draft.write_bytes(status.encode())
        os.replace(draft, self._path)

    def release(self) -> None:
        """The file is nobody's."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def is_claimed(self) -> bool:
        """Whether a worker that runs has the file."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CLOEXEC)
            try:
                return not _locked(descriptor)
            finally:
                os.close(descriptor)
        return False

    def read(self) -> WorkerStatus:
        """What the worker said last.

        Raises:
            NotFound: no worker ever ran here.
            InvalidRequest: the file is damaged, or another version's.
        """
        try:
            data = self._path.read_bytes()[: _MAX_BYTES + 1]
            if len(data) > _MAX_BYTES:
                raise InvalidRequest(f"{self._path} is too large to be a status.", code="no_status")
            return WorkerStatus.model_validate_json(data)
        except FileNotFoundError:
            raise NotFound(
                f"No worker has run in {self._path.parent}; start one with `shoal worker join`, "
                "or name its folder with --data-dir.",
                code="never_run",
            ) from None
        except (OSError, ValidationError) as error:
            why = first_fault(error) if isinstance(error, ValidationError) else error.strerror
            raise InvalidRequest(
                f"{self._path} cannot be read: {why}; a worker of this version writes it anew.",
                code="no_status",
            ) from None


def _locked(descriptor: int) -> bool:
    """Whether the lock was free; if so it is taken, until the descriptor is closed."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
