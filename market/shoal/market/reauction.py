"""What happens to a task whose lease failed: another lease, in the end at a better price."""

from __future__ import annotations

from pydantic import Field, model_validator

from shoal.protocol.errors import InvalidRequest
from shoal.protocol.ids import ShortId
from shoal.protocol.market import MAX_UNITS
from shoal.protocol.money import Micros, MicrosField
from shoal.protocol.record import Record

FAILURES_BEFORE_RAISE = 2
DEFAULT_MAX_ATTEMPTS = 8


class Attempts(Record):
    """How often a task has been leased, how often that failed, what it may cost next time.

    Writer: the dispatcher, through the functions below.  Reader: the dispatcher, the auction.
    ``lease_epoch`` is the fencing number of the latest lease; 0 before the first.

    Example:
        >>> task = begin_attempt(Attempts(task_id="task_0123456789", reserve_micros=100,
        ...                               max_reserve_micros=115))
        >>> task = after_failure(begin_attempt(after_failure(task)))
        >>> (task.lease_epoch, task.failures, task.reserve_micros)
        (2, 2, 110)
    """

    task_id: ShortId
    reserve_micros: MicrosField
    max_reserve_micros: MicrosField
    lease_epoch: int = Field(default=0, ge=0, le=MAX_UNITS)
    failures: int = Field(default=0, ge=0, le=MAX_UNITS)
    max_attempts: int = Field(default=DEFAULT_MAX_ATTEMPTS, ge=1, le=1_000)

    @model_validator(mode="after")
    def _reserve_is_within_the_maximum(self) -> Attempts:
        if self.reserve_micros > self.max_reserve_micros:
            raise ValueError("reserve_micros is above max_reserve_micros")
        return self


def raise_reserve_up(reserve_micros: int, max_reserve_micros: int) -> Micros:
    """The reserve × 1.1 rounded up, but never above the requester's maximum.

    Source: docs/architecture, "Market": re-auction at ρ × 1.1.  Up, because a reserve below
    ten micros would otherwise never rise.
    """
    return Micros(min(-(-reserve_micros * 11 // 10), max_reserve_micros))


def begin_attempt(attempts: Attempts) -> Attempts:
    """The next lease of the task has its fencing number, one above the last.

    Raises:
        InvalidRequest: the task has failed as often as it may.
    """
    require_attempts_left(attempts)
    return attempts.model_copy(update={"lease_epoch": attempts.lease_epoch + 1})


def after_failure(attempts: Attempts) -> Attempts:
    """The failure is counted; from the second on the reserve has risen.

    Raises:
        InvalidRequest: the task has failed as often as it may.  The count does not go on:
            the job's owner has to act.
    """
    failures = attempts.failures + 1
    reserve = attempts.reserve_micros
    if failures >= FAILURES_BEFORE_RAISE:
        reserve = raise_reserve_up(reserve, attempts.max_reserve_micros)
    counted = attempts.model_copy(update={"failures": failures, "reserve_micros": reserve})
    require_attempts_left(counted)
    return counted


def require_attempts_left(attempts: Attempts) -> None:
    """Passes only if the task may be leased once more.

    Raises:
        InvalidRequest: it has failed as often as it may.
    """
    if attempts.failures >= attempts.max_attempts:
        raise InvalidRequest(
            f"Task {attempts.task_id} failed {attempts.failures} times, the most allowed; look "
            "at its leases' reasons, then raise the unit price or mend the job.",
            code="attempts_exhausted",
            task_id=attempts.task_id,
        )
