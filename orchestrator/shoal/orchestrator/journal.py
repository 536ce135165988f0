"""What happened, written down: events for the requester, statements for provenance."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shoal.orchestrator.context import Context
from shoal.orchestrator.store.rows import insert_rows
from shoal.orchestrator.store.tables import EventRow, JobRow, StatementRow
from shoal.protocol.canonical import sha256_hex
from shoal.protocol.job import JobState
from shoal.provenance.dsse import Envelope
from shoal.provenance.dsse import sign as sign_envelope
from shoal.provenance.statement import StatementKind

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Event:
    """One event of a job, as stored."""

    seq: int
    at_ms: int
    type: str
    data: dict[str, Any]


class _GoesOnError(Exception):
    """Takes back a transaction that would have ended a job."""


class Journal:
    """Appends events and statements; wakes whoever follows a job."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._changed: dict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._ended: dict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._next_seq: dict[str, int] = {}
        self._open_epoch: dict[str, int] = {}

    async def event(
        self,
        job_id: str,
        type_: str,
        data: Mapping[str, object],
        *,
        also: Callable[[Session], None] = lambda session: None,
    ) -> None:
        """Records that ``type_`` happened to the job, and wakes its followers.

        ``also`` writes, in the same transaction, the change that the event tells of.
        """
        row = EventRow(
            job_id=job_id,
            at_ms=self._context.time.now_ms(),
            type=type_,
            data=json.dumps(data, sort_keys=True),
        )

        def write(session: Session) -> None:
            also(session)
            # The event may refer to a row written just now, and only a flush orders the two.
            session.flush()
            insert_rows(session, row)

        await self._context.database.run(write)
        _log.info(type_, extra={"job_id": job_id, "data": dict(data)})
        self.wake(job_id)

    async def finish(
        self,
        job_id: str,
        state: JobState,
        reason: str,
        *,
        unless: Callable[[JobRow], bool] = lambda row: False,
    ) -> bool:
        """The job is at its end, ``state``, and whoever waits for that is woken.

        Returns:
            False, and nothing happened, where ``unless`` holds of the job as it is on record.
        """
        finished_ms = self._context.time.now_ms()

        def write(session: Session) -> None:
            row = session.get_one(JobRow, job_id)
            if unless(row):
                raise _GoesOnError
            row.state, row.reason, row.finished_ms = state.value, reason, finished_ms

        try:
            # One transaction: a follower that sees the end also finds the event that tells of it.
            await self.event(job_id, f"job_{state.value}", {"reason": reason}, also=write)
        except _GoesOnError:
            return False
        self._ended.pop(job_id, asyncio.Event()).set()
        return True

    def end_of(self, job_id: str) -> asyncio.Event:
        """Set as soon as the job is at its end; ask before reading whether it is."""
        return self._ended[job_id]

    def dismiss(self) -> None:
        """Nobody waits for a job's end any more: this process is at its own."""
        while self._ended:
            self._ended.popitem()[1].set()

    async def events(self, job_id: str, after: int, limit: int = 1000) -> list[Event]:
        """The job's events with a sequence number above ``after``, oldest first."""

        def read(session: Session) -> list[Event]:
            rows = session.scalars(
                select(EventRow)
                .where(EventRow.job_id == job_id, EventRow.seq > after)
                .order_by(EventRow.seq)
                .limit(limit)
            )
            return [
                Event(seq=row.seq, at_ms=row.at_ms, type=row.type, data=json.loads(row.data))
                for row in rows
            ]

        return await self._context.database.run(read)

    def next_change(self, job_id: str) -> asyncio.Event:
        """Set as soon as anything more happens to the job; ask before reading what did."""
        return self._changed[job_id]

    def wake(self, job_id: str) -> None:
        """Whoever follows the job looks for new events."""
        self._changed.pop(job_id, asyncio.Event()).set()

    async def adopt(self, job_id: str) -> None:
        """Learns where the job's statement log stands; call once before `state`."""

        def read(session: Session) -> tuple[int, int]:
            last, stated = session.execute(
                select(func.max(StatementRow.seq), func.max(StatementRow.epoch)).where(
                    StatementRow.job_id == job_id
                )
            ).one()
            unclosed = session.get_one(JobRow, job_id).epoch
            return (0 if last is None else last + 1), max(unclosed, stated or 1)

        self._next_seq[job_id], self._open_epoch[job_id] = await self._context.database.run(read)

    def open_epoch(self, job_id: str) -> int:
        """The epoch that statements and pay recorded now belong to."""
        return self._open_epoch[job_id]

    def turn_epoch(self, job_id: str) -> int:
        """Closes the open epoch to newcomers and returns its number."""
        closed = self._open_epoch[job_id]
        self._open_epoch[job_id] = closed + 1
        return closed

    def state(self, job_id: str, kind: StatementKind, statement: bytes) -> StatementRow:
        """A row for a statement the orchestrator's node signs.

        The caller adds the row to the transaction that makes the stated fact true, and hands
        that to the database before it waits for anything: an epoch that turned in between
        would be closed without the row.
        """
        envelope = sign_envelope(
            statement,
            key_id=self._context.identity.peer_id,
            sign=self._context.identity.sign,
        )
        return self.statement_row(job_id, kind, envelope, self._context.account.address)

    def statement_row(
        self, job_id: str, kind: StatementKind, envelope: Envelope, contributor: str
    ) -> StatementRow:
        """A row for an envelope already signed, by us or by a worker's node."""
        seq = self._next_seq[job_id]
        self._next_seq[job_id] = seq + 1
        return StatementRow(
            job_id=job_id,
            seq=seq,
            epoch=self._open_epoch[job_id],
            kind=kind.value,
            contributor=contributor,
            envelope=envelope.to_text(),
            payload_sha256=sha256_hex(envelope.payload_bytes()),
        )
