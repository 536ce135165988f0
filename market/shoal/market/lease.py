"""The life of a lease, as pure transitions.

::

    OFFERED ──take──▶ TAKEN ──start──▶ RUNNING ──submit──▶ SUBMITTED ──judge──▶ ACCEPTED
       │                │                 │            │                        | REJECTED
       │                │                 │            └─outrun─▶ REVOKED
       └────────────────┴─────────────────┴─▶ EXPIRED (clock named) | REFUSED
                                              | FAILED (cause) | REVOKED

Three clocks, each with a name of its own: the *offer* clock until the holder answers, the
*start* clock until it is first heard of at work, the *heartbeat* clock for silence and for
standing still; and over all of them the deadline.  Who starts or submits without having said
that it takes the lease has taken it.

Each function returns a new record or raises; none reads a clock.  Whoever stores records
replaces the old one only if it is still the one the function was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from pydantic import Field

from shoal.protocol.errors import Clock, Expired, InvalidRequest, PeerFault
from shoal.protocol.ids import Sha256
from shoal.protocol.market import Lease
from shoal.protocol.node import FailureCause
from shoal.protocol.record import Record

MISSED_HEARTBEATS = 5
"""Three were too few: on a line that loses packets, TCP's pauses double with each loss in a row
(0.2, 0.4, 0.8, 1.6 s; RFC 6298 section 5.5), and a second node takes over what stands still sooner.
"""
DEFAULT_PROGRESS_WINDOW_MS = 60_000
DEADLINE_FACTOR = 3
"""A lease may last three times p90. Source: docs/architecture, "Market"."""


class LeaseState(StrEnum):
    """Where a lease is; the last five are final."""

    OFFERED = "offered"
    TAKEN = "taken"
    RUNNING = "running"
    SUBMITTED = "submitted"
    ACCEPTED = "accepted"
    REJECTED = "rejected"
    EXPIRED = "expired"
    REFUSED = "refused"
    FAILED = "failed"
    REVOKED = "revoked"

    @property
    def is_open(self) -> bool:
        """Whether the holder may still deliver a result."""
        return self in (LeaseState.OFFERED, LeaseState.TAKEN, LeaseState.RUNNING)

    @property
    def is_final(self) -> bool:
        """Whether nothing can change any more."""
        return not self.is_open and self is not LeaseState.SUBMITTED


class LeaseRecord(Record):
    """A lease and what has happened to it.

    Writer: the dispatcher, through the functions below.  Reader: the dispatcher, the reaper,
    settlement, the provider's page.

    ``answer_by_ms`` is when the offer lapses unanswered; absent, with its start clock.
    ``heard_at_ms`` is the last sign of life, ``progress_at_ms`` the last *rise* of
    ``progress``.  ``result_sha256`` is present from SUBMITTED on; ``clock`` only when
    EXPIRED; ``cause`` only when FAILED; ``reason`` once the lease ended without pay.
    """

    lease: Lease
    state: LeaseState
    answer_by_ms: int | None = Field(default=None, ge=0)
    heard_at_ms: int = Field(ge=0)
    progress: int = Field(default=0, ge=0)
    progress_at_ms: int = Field(ge=0)
    progress_window_ms: int = Field(default=DEFAULT_PROGRESS_WINDOW_MS, ge=1)
    result_sha256: Sha256 | None = None
    clock: Clock | None = None
    cause: FailureCause | None = None
    reason: str | None = None
    ended_at_ms: int | None = None


def offer(
    lease: Lease,
    *,
    progress_window_ms: int = DEFAULT_PROGRESS_WINDOW_MS,
    answer_within_ms: int | None = None,
) -> LeaseRecord:
    """The lease is offered; its clocks count from its issue."""
    answer_by_ms = None if answer_within_ms is None else lease.issued_at_ms + answer_within_ms
    return LeaseRecord(
        lease=lease,
        state=LeaseState.OFFERED,
        answer_by_ms=answer_by_ms,
        heard_at_ms=lease.issued_at_ms,
        progress_at_ms=lease.issued_at_ms,
        progress_window_ms=progress_window_ms,
    )


def take(record: LeaseRecord, *, node: str, lease_epoch: int, now_ms: int) -> LeaseRecord:
    """The holder has said that it will do the work; saying so again changes nothing.

    Raises:
        Expired: the offer clock or another has run out, or the lease was given on.
        PeerFault: another node than the holder speaks.
        InvalidRequest: the lease is over.
    """
    _require_holder(record, node, lease_epoch)
    _require_open(record)
    if record.state is not LeaseState.OFFERED:
        return record
    _require_time(record, now_ms)
    return record.model_copy(update={"state": LeaseState.TAKEN, "heard_at_ms": now_ms})


def start(record: LeaseRecord, *, node: str, lease_epoch: int, now_ms: int) -> LeaseRecord:
    """The holder is at work on the lease; a second start changes nothing.

    Raises:
        Expired: the offer or start clock or the deadline has run out, or the lease was given on.
        PeerFault: another node than the holder speaks.
        InvalidRequest: the lease is over.
    """
    _require_holder(record, node, lease_epoch)
    _require_open(record)
    if record.state is LeaseState.RUNNING:
        return record
    _require_time(record, now_ms)
    return record.model_copy(
        update={
            "state": LeaseState.RUNNING,
            "heard_at_ms": now_ms,
            "progress_at_ms": now_ms,
        }
    )


def heartbeat(
    record: LeaseRecord, *, node: str, lease_epoch: int, progress: int, now_ms: int
) -> LeaseRecord:
    """The holder is alive and this far; a heartbeat before the start is also the start.

    Silence is forgiven if it ends before `expire_if_due` ran: the delay may be ours, and
    nothing has been given to anyone else.  Standing still is not: progress must rise within
    the record's progress window.

    Raises:
        Expired: a clock has run out, or the lease was given on.
        PeerFault: another node than the holder speaks, or ``progress`` fell.
        InvalidRequest: the lease is over.
    """
    if record.state in (LeaseState.OFFERED, LeaseState.TAKEN):
        record = start(record, node=node, lease_epoch=lease_epoch, now_ms=now_ms)
    _require_holder(record, node, lease_epoch)
    _require_open(record)
    if progress < record.progress:
        raise PeerFault(
            f"Lease {record.lease.lease_id} reported progress {progress} after "
            f"{record.progress}; progress only rises.",
            code="progress_fell",
            lease_id=record.lease.lease_id,
        )
    if progress > record.progress:
        record = record.model_copy(update={"progress": progress, "progress_at_ms": now_ms})
    record = record.model_copy(update={"heard_at_ms": max(now_ms, record.heard_at_ms)})
    _require_time(record, now_ms)
    return record


def excuse(record: LeaseRecord, *, silent_ms: int, now_ms: int) -> LeaseRecord:
    """``silent_ms`` of the time up to ``now_ms`` were not the holder's fault, and do not count.

    A lease that was taken may have been started unheard, so it counts as running.
    """
    if record.state not in (LeaseState.TAKEN, LeaseState.RUNNING) or silent_ms <= 0:
        return record
    return record.model_copy(
        update={
            "state": LeaseState.RUNNING,
            "heard_at_ms": min(record.heard_at_ms + silent_ms, max(now_ms, record.heard_at_ms)),
            "progress_at_ms": min(
                record.progress_at_ms + silent_ms, max(now_ms, record.progress_at_ms)
            ),
        }
    )


def submit(
    record: LeaseRecord,
    *,
    node: str,
    lease_epoch: int,
    result_sha256: str,
    now_ms: int,
) -> LeaseRecord:
    """The result is taken; the same result again changes nothing, even after the verdict.

    A result is itself a sign of life and of progress, so only the deadline can be missed.

    Raises:
        Expired: the deadline has passed, or the lease expired or was given on before.
        PeerFault: another node than the holder speaks, or a different result was taken.
        InvalidRequest: the lease was refused or revoked.
    """
    _require_holder(record, node, lease_epoch)
    if record.result_sha256 is not None:
        if record.result_sha256 != result_sha256:
            raise PeerFault(
                f"Lease {record.lease.lease_id} already has the result "
                f"{record.result_sha256}; a second, different one is refused.",
                code="second_result",
                evidence=result_sha256,
                lease_id=record.lease.lease_id,
            )
        return record
    _require_open(record)
    if now_ms > record.lease.deadline_ms:
        raise _expired(record, Clock.DEADLINE)
    return record.model_copy(
        update={
            "state": LeaseState.SUBMITTED,
            "heard_at_ms": max(now_ms, record.heard_at_ms),
            "result_sha256": result_sha256,
        }
    )


def judge(record: LeaseRecord, *, accepted: bool, reason: str, now_ms: int) -> LeaseRecord:
    """The verdict on the submitted result is final; the same verdict again changes nothing.

    Raises:
        InvalidRequest: there is no result to judge, or the other verdict was given.
    """
    verdict = LeaseState.ACCEPTED if accepted else LeaseState.REJECTED
    if record.state is verdict:
        return record
    if record.state is not LeaseState.SUBMITTED:
        raise _not_open(record)
    return _ended(record, verdict, None if accepted else reason, now_ms)


def refuse(
    record: LeaseRecord, *, node: str, lease_epoch: int, reason: str, now_ms: int
) -> LeaseRecord:
    """The holder will not do the work; saying so again changes nothing.

    Raises:
        Expired: the lease expired or was given on.
        PeerFault: another node than the holder speaks.
        InvalidRequest: there is a result already, or the lease was revoked.
    """
    _require_holder(record, node, lease_epoch)
    if record.state is LeaseState.REFUSED:
        return record
    _require_open(record)
    return _ended(record, LeaseState.REFUSED, reason, now_ms)


def fail(
    record: LeaseRecord,
    *,
    node: str,
    lease_epoch: int,
    cause: FailureCause,
    reason: str,
    now_ms: int,
) -> LeaseRecord:
    """The holder began the work and gives it back; saying so again changes nothing.

    Raises:
        Expired: the lease expired or was given on.
        PeerFault: another node than the holder speaks.
        InvalidRequest: there is a result already, or the lease was refused or revoked.
    """
    _require_holder(record, node, lease_epoch)
    if record.state is LeaseState.FAILED:
        return record
    _require_open(record)
    ended = _ended(record, LeaseState.FAILED, reason, now_ms)
    return ended.model_copy(update={"cause": cause})


def outrun(record: LeaseRecord, *, now_ms: int) -> LeaseRecord:
    """Another worker's result for the same units was accepted: nobody is to blame.

    Unlike `revoke` it also ends a lease whose own result waits for its verdict.

    Raises:
        InvalidRequest: the lease is over.
    """
    if record.state.is_final:
        raise _not_open(record)
    reason = "another worker's result for the same units was accepted first"
    return _ended(record, LeaseState.REVOKED, reason, now_ms)


def revoke(record: LeaseRecord, *, reason: str, now_ms: int) -> LeaseRecord:
    """We have taken the lease back; doing so again changes nothing.

    Raises:
        Expired: the lease expired before.
        InvalidRequest: there is a result already, or the holder refused.
    """
    if record.state is LeaseState.REVOKED:
        return record
    _require_open(record)
    return _ended(record, LeaseState.REVOKED, reason, now_ms)


def due(record: LeaseRecord, now_ms: int) -> Clock | None:
    """The clock that has run out on an open lease, if one has; the strictest first."""
    if not record.state.is_open:
        return None
    if now_ms > record.lease.deadline_ms:
        return Clock.DEADLINE
    if record.state is not LeaseState.RUNNING:
        is_unanswered = record.state is LeaseState.OFFERED and record.answer_by_ms is not None
        if is_unanswered and now_ms > (record.answer_by_ms or 0):
            return Clock.OFFER
        return Clock.START if now_ms > record.lease.start_by_ms else None
    silent_ms = now_ms - record.heard_at_ms
    stalled_ms = now_ms - record.progress_at_ms
    if silent_ms > MISSED_HEARTBEATS * record.lease.heartbeat_ms:
        return Clock.HEARTBEAT
    return Clock.HEARTBEAT if stalled_ms > record.progress_window_ms else None


def expire_if_due(record: LeaseRecord, *, now_ms: int) -> LeaseRecord:
    """An open lease with a clock run out is EXPIRED; any other is returned as it was."""
    clock = due(record, now_ms)
    if clock is None:
        return record
    ended = _ended(record, LeaseState.EXPIRED, _expired(record, clock).message, now_ms)
    return ended.model_copy(update={"clock": clock})


def p90_up(samples_ms: Sequence[int]) -> int:
    """The 90th percentile of the samples by nearest rank, which is one of them.

    Raises:
        InvalidRequest: there are no samples.
    """
    if not samples_ms:
        raise InvalidRequest("A percentile needs at least one sample.", code="no_samples")
    rank = -(-9 * len(samples_ms) // 10)
    return sorted(samples_ms)[rank - 1]


def _ended(record: LeaseRecord, state: LeaseState, reason: str | None, now_ms: int) -> LeaseRecord:
    return record.model_copy(update={"state": state, "reason": reason, "ended_at_ms": now_ms})


def _require_holder(record: LeaseRecord, node: str, lease_epoch: int) -> None:
    lease = record.lease
    if node != lease.node:
        raise PeerFault(
            f"Lease {lease.lease_id} is held by {lease.node}; {node} cannot speak for it.",
            code="wrong_node",
            lease_id=lease.lease_id,
        )
    if lease_epoch < lease.lease_epoch:
        raise Expired(
            f"Lease epoch {lease_epoch} of task {lease.task_id} is over; the task is now leased "
            f"under epoch {lease.lease_epoch}. Drop the work.",
            clock=Clock.DEADLINE,
            code="fenced",
            lease_id=lease.lease_id,
        )
    if lease_epoch > lease.lease_epoch:
        raise PeerFault(
            f"Lease {lease.lease_id} has epoch {lease.lease_epoch}; nobody was given "
            f"{lease_epoch}.",
            code="forged_epoch",
            lease_id=lease.lease_id,
        )


def _require_open(record: LeaseRecord) -> None:
    if record.state is LeaseState.EXPIRED:
        raise _expired(record, record.clock or Clock.DEADLINE)
    if not record.state.is_open:
        raise _not_open(record)


def _require_time(record: LeaseRecord, now_ms: int) -> None:
    clock = due(record, now_ms)
    if clock is not None:
        raise _expired(record, clock)


def _not_open(record: LeaseRecord) -> InvalidRequest:
    return InvalidRequest(
        f"Lease {record.lease.lease_id} is {record.state.value}, so this cannot happen to it.",
        code=f"lease_{record.state.value}",
        lease_id=record.lease.lease_id,
    )


def _expired(record: LeaseRecord, clock: Clock) -> Expired:
    words = {
        Clock.OFFER: "was not answered in time",
        Clock.START: "was not started in time",
        Clock.HEARTBEAT: "fell silent or made no progress",
        Clock.DEADLINE: "passed its deadline",
    }
    return Expired(
        f"Lease {record.lease.lease_id} {words.get(clock, 'expired')}; its task goes to another "
        "worker. Drop the work.",
        clock=clock,
        lease_id=record.lease.lease_id,
    )
