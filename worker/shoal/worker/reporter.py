"""Keeps the worker's status file true: one look a second, written when something changed."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Final, Protocol

from shoal.network.port import Network
from shoal.protocol.clock import TimeSource
from shoal.protocol.market import TaskKind
from shoal.protocol.node import IdleDetail, IdleReason, LeaseProgress, OpenJob
from shoal.protocol.result import Verdict
from shoal.worker.config import WorkerConfig
from shoal.worker.earnings import Collector
from shoal.worker.events import log_event, log_failure
from shoal.worker.evidence import EvidenceBook
from shoal.worker.executor import Assignment
from shoal.worker.session import Credentials, Session
from shoal.worker.status import (
    Asked,
    BaseFetch,
    HeldLease,
    Judgement,
    Pay,
    Stage,
    StatusFile,
    WorkerStatus,
)

_PAUSE_S: Final = 1.0
_RECENT: Final = 10
_MAX_TEXT: Final = 500
_BLOB_METER: Final = "blob_bytes"


class Watched(Protocol):
    """A worker, seen by who tells what it is doing."""

    @property
    def session(self) -> Session:
        """How things stand with the orchestrator."""
        ...

    @property
    def idle_reason(self) -> IdleReason | None:
        """Why it earns nothing just now."""
        ...

    @property
    def idle_detail(self) -> IdleDetail | None:
        """The figures behind that."""
        ...

    @property
    def open_jobs(self) -> tuple[OpenJob, ...]:
        """What could be worked for."""
        ...

    @property
    def collector(self) -> Collector | None:
        """Who claims, once there is a chain."""
        ...

    def fetching(self) -> tuple[BaseFetch, ...]:
        """The bases on their way."""
        ...

    def assignments(self) -> tuple[Assignment, ...]:
        """The leases held."""
        ...

    def progress(self) -> tuple[LeaseProgress, ...]:
        """How far each has come."""
        ...


class Reporter:
    """Writes what a worker is doing.

    Args:
        config: The worker's settings.
        watched: The worker.
        credentials: Whose it is.
        network: Its node, whose meters say what was given to others.
        book: Its own books.
        time: The wall clock.
        monotonic_s: The machine's monotonic clock.
    """

    def __init__(
        self,
        config: WorkerConfig,
        watched: Watched,
        credentials: Credentials,
        network: Network,
        book: EvidenceBook,
        time: TimeSource,
        monotonic_s: Callable[[], float],
    ) -> None:
        self._config = config
        self._watched = watched
        self._credentials = credentials
        self._network = network
        self._book = book
        self._time = time
        self._monotonic_s = monotonic_s
        self._file = StatusFile(config.folder)
        self._started_ms = time.now_ms()
        self._verdicts: deque[Judgement] = deque(maxlen=_RECENT)
        self._accepted = self._rejected = 0
        self._idle: tuple[IdleReason | None, int | None] = (None, None)
        self._written: WorkerStatus | None = None
        self._is_ours = False
        self._troubled = False
        self.cache_bytes: Callable[[], int] = lambda: 0
        """How much of the disk the blobs take."""

    def note_verdict(self, verdict: Verdict) -> None:
        """The verdict is among the last."""
        if verdict.accepted:
            self._accepted += 1
        else:
            self._rejected += 1
        self._verdicts.appendleft(
            Judgement(
                at_ms=self._time.now_ms(),
                lease_id=verdict.lease_id,
                job_id=verdict.job_id,
                accepted=verdict.accepted,
                pay_micros=verdict.pay_micros,
                reason=verdict.reason()[:_MAX_TEXT],
            )
        )

    async def run(self) -> None:
        """The file is true, give or take a second, until cancelled."""
        self._is_ours = self._file.claim()
        if not self._is_ours:
            log_event("status_not_kept", folder=str(self._config.folder))
        while True:
            self.refresh()
            await asyncio.sleep(_PAUSE_S)

    def refresh(self) -> None:
        """The file says how things are now, if it is ours."""
        if not self._is_ours:
            return
        status = self.status()
        if self._written is not None and _same(status, self._written):
            return
        try:
            self._file.write(status)
        except OSError as error:
            # A full disk must not end the work; it is told once.
            if not self._troubled:
                log_failure("status_not_written", error)
            self._troubled = True
        else:
            self._written, self._troubled = status, False

    def close(self, ended: str) -> None:
        """The last words are written, and the file is nobody's."""
        if self._is_ours:
            try:
                self._file.write(
                    self.status().model_copy(update={"leases": (), "ended": ended[:_MAX_TEXT]})
                )
            except OSError as error:
                log_failure("status_not_written", error)
            self._file.release()
            self._is_ours = False

    def status(self) -> WorkerStatus:
        """How things are now."""
        watched, session = self._watched, self._watched.session
        now_ms = self._time.now_ms()
        if watched.idle_reason is not self._idle[0]:
            self._idle = (watched.idle_reason, now_ms)
        return WorkerStatus(
            pid=os.getpid(),
            started_ms=self._started_ms,
            at_ms=now_ms,
            name=self._config.name,
            node=self._credentials.node,
            account=self._credentials.address,
            session=session.state,
            session_since_ms=session.since_ms,
            address=session.address,
            last_error=None if session.last_error is None else session.last_error[:_MAX_TEXT],
            retry_at_ms=session.retry_at_ms,
            round_trip_ms=session.round_trip_ms,
            num_joins=session.num_joins,
            leases=tuple(self._leases(now_ms)),
            verdicts=tuple(self._verdicts),
            pay=self._pay(),
            num_jobs=len(watched.open_jobs),
            fetching=watched.fetching(),
            asked=asked(self._config, watched.open_jobs),
            idle=watched.idle_reason,
            idle_detail=watched.idle_detail,
            idle_since_ms=self._idle[1],
            cache_bytes=self.cache_bytes(),
            cache_limit_bytes=self._config.cache_bytes + self._config.max_base_bytes,
            uploaded_bytes=self._uploaded_bytes(),
        )

    def _leases(self, now_ms: int) -> Iterable[HeldLease]:
        steps = {progress.lease_id: progress.progress for progress in self._watched.progress()}
        now_s = self._monotonic_s()
        for assignment in self._watched.assignments():
            lease = assignment.lease
            yield HeldLease(
                lease_id=lease.lease_id,
                job_id=lease.job_id,
                kind=lease.kind,
                num_units=lease.num_units,
                pay_micros=lease.num_units * lease.unit_price_micros,
                stage=_stage(assignment),
                steps=steps.get(lease.lease_id, 0),
                came_ms=now_ms - round(1_000 * (now_s - assignment.received_s)),
                ends_ms=now_ms + round(1_000 * (assignment.deadline_s - now_s)),
            )

    def _pay(self) -> Pay:
        collector = self._watched.collector
        return Pay(
            accepted=self._accepted,
            rejected=self._rejected,
            earned_micros=self._book.earned_micros,
            claimed_micros=0 if collector is None else collector.paid_micros,
            claimable_micros=None if collector is None else collector.owed_micros,
        )

    def _uploaded_bytes(self) -> int:
        return round(
            sum(
                sample.value
                for sample in self._network.meters.snapshot()
                if sample.name == _BLOB_METER and ("direction", "out") in sample.labels
            )
        )


def asked(config: WorkerConfig, jobs: Iterable[OpenJob]) -> tuple[Asked, ...]:
    """The floor of each kind that is worked on, beside the best that any job pays."""
    best: dict[TaskKind, int] = {}
    for job in jobs:
        for kind, micros in job.reserve_micros.items():
            best[kind] = max(best.get(kind, 0), micros)
    return tuple(
        Asked(kind=kind, floor_micros=config.price.micros(kind), best_micros=best.get(kind))
        for kind in TaskKind
        if config.capacity.units(kind)
    )


def _stage(assignment: Assignment) -> Stage:
    if assignment.computed:
        return Stage.HANDING_IN
    if assignment.running:
        return Stage.COMPUTING
    return Stage.FETCHING if assignment.inputs is None else Stage.WAITING


def _same(one: WorkerStatus, other: WorkerStatus) -> bool:
    """Whether nothing but time has passed."""
    return _timeless(one) == _timeless(other)


def _timeless(status: WorkerStatus) -> Mapping[str, object]:
    leases = [lease.model_copy(update={"came_ms": 0, "ends_ms": 0}) for lease in status.leases]
    return {**dict(status), "at_ms": 0, "leases": leases}
