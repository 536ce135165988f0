"""The end that a job is settled towards, which is on record before anything follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sqlalchemy.orm import Session

from shoal.orchestrator.context import Context
from shoal.orchestrator.store.tables import JobRow
from shoal.protocol.job import JobState

_SETTLING: Final = "settling, then "


@dataclass(frozen=True)
class Ending:
    """How a job ends, and why."""

    state: JobState
    reason: str = ""


CANCELLATION: Final = Ending(JobState.CANCELLED, "cancelled by its requester")


def ending_of(row: JobRow) -> Ending | None:
    """The end that the job is being settled towards, if it is."""
    if row.state != JobState.DRAINING.value:
        return None
    state, _, reason = row.reason.removeprefix(_SETTLING).partition(": ")
    return Ending(JobState(state), reason)


def is_cancelled(row: JobRow) -> bool:
    """Whether the job is being settled because its requester took it back."""
    return ending_of(row) == CANCELLATION


class Endings:
    """Decides how jobs end, each time in one transaction: a cancellation stands."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def cancel(self, job_id: str) -> JobState:
        """The job is being settled towards its cancellation, unless another end is decided.

        A job that was to be paused, or is, has no end yet.

        Returns:
            The state it was in.
        """

        def write(session: Session) -> JobState:
            row = session.get_one(JobRow, job_id)
            state, ending = JobState(row.state), ending_of(row)
            if state in (JobState.FUNDING, JobState.RUNNING, JobState.PAUSED) or (
                ending is not None and ending.state is JobState.PAUSED
            ):
                _settle(row, CANCELLATION)
            return state

        return await self._context.database.run(write)

    async def decide(self, job_id: str, ending: Ending) -> Ending:
        """The job is being settled towards ``ending``, or its cancellation: which of them."""

        def write(session: Session) -> Ending:
            row = session.get_one(JobRow, job_id)
            decided = CANCELLATION if is_cancelled(row) else ending
            _settle(row, decided)
            return decided

        return await self._context.database.run(write)


def _settle(row: JobRow, ending: Ending) -> None:
    row.state = JobState.DRAINING.value
    row.reason = f"{_SETTLING}{ending.state.value}: {ending.reason}"
