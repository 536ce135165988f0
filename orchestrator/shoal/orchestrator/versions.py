"""The policy versions of a job: those at hand because something may need them, and the record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shoal.network.blob_store import BlobStore
from shoal.orchestrator.context import Context
from shoal.orchestrator.journal import Journal
from shoal.orchestrator.store.rows import insert_rows, update_row
from shoal.orchestrator.store.tables import JobRow, PolicyRow
from shoal.protocol.errors import InvalidRequest, InvariantBroken
from shoal.protocol.job import JobSpec
from shoal.protocol.policy import PolicyVersion
from shoal.provenance.statement import StatementKind, UpdatePredicate, update_statement


class Versions:
    """Holds a pin on each version's adapter for as long as work may be out under it.

    Wanted are the newest version, the ``max_staleness`` before it, and, while an evaluation is
    under way, every evaluated version from that one on: the best of them is chosen in order.
    """

    def __init__(self, spec: JobSpec, blobs: BlobStore) -> None:
        self._spec = spec
        self._blobs = blobs
        self._held: dict[int, PolicyVersion] = {}

    @property
    def newest(self) -> PolicyVersion | None:
        """The newest version; None before the first."""
        return self._held[max(self._held)] if self._held else None

    def numbers(self) -> list[int]:
        """The numbers of the versions held, in order."""
        return sorted(self._held)

    def get(self, number: int) -> PolicyVersion:
        """Version ``number``, which is wanted."""
        if number not in self._held:
            raise InvariantBroken(f"Policy version {number} is needed and was given up before.")
        return self._held[number]

    def add(self, policy: PolicyVersion) -> None:
        """``policy``, whose adapter is pinned, is held."""
        self._held[policy.version] = policy

    def is_evaluated(self, number: int) -> bool:
        """Whether version ``number`` is one of those evaluated."""
        return number % self._spec.evaluation.interval == 0 or number == self._spec.max_steps

    def wanted(self, newest: int, pending: Sequence[int]) -> list[int]:
        """The versions held that are still needed once ``newest`` is there.

        Args:
            newest: The version that is, or is about to be, the newest.
            pending: Versions whose evaluation is under way.
        """
        oldest = min(pending, default=newest)
        return [
            number
            for number in self.numbers()
            if newest - self._spec.max_staleness <= number < newest
            or (number >= oldest and self.is_evaluated(number) and number < newest)
        ]

    def drop_unwanted(self, newest: int, pending: Sequence[int]) -> None:
        """Only what is wanted is held and pinned, and ``newest`` with it."""
        keep = {newest, *self.wanted(newest, pending)}
        for number in set(self._held) - keep:
            self._blobs.unpin(self._held.pop(number).adapter.sha256)

    def let_go(self) -> None:
        """None is pinned any more; the newest is still known."""
        for policy in self._held.values():
            self._blobs.unpin(policy.adapter.sha256)


class VersionRecords:
    """What the database says of a job's versions."""

    def __init__(self, context: Context, journal: Journal, job_id: str) -> None:
        self._context = context
        self._journal = journal
        self._job_id = job_id
        self._newest = -1

    async def newest(self) -> int | None:
        """The newest version on record; None for a new job.  Call before the others."""
        found = await self._context.database.run(
            lambda session: session.scalar(
                select(func.max(PolicyRow.version)).where(PolicyRow.job_id == self._job_id)
            )
        )
        self._newest = -1 if found is None else found
        return found

    async def has(self, policy: PolicyVersion) -> bool:
        """Whether ``policy`` was made before, in a process that saved no checkpoint of it.

        Raises:
            InvalidRequest: another policy was recorded for its version; work was done and paid
                under that one, so the job cannot go on from here.
        """
        if policy.version > self._newest:
            return False
        record = await self._context.database.run(
            lambda session: session.get_one(PolicyRow, (self._job_id, policy.version)).record
        )
        if record != policy.encode().decode():
            raise InvalidRequest(
                f"Policy version {policy.version} was made again from an older checkpoint and came "
                "out otherwise than recorded; put back the newest checkpoint of the job.",
                code="not_reproduced",
                job_id=self._job_id,
            )
        return True

    async def begin(self, policy: PolicyVersion) -> None:
        """Version 0 is on record."""
        await self._context.database.run(lambda session: self._write(session, policy))

    async def add(
        self, policy: PolicyVersion, facts: UpdatePredicate, metrics: Mapping[str, float]
    ) -> None:
        """The version, the statement of how it was made and its figures are one transaction."""
        statement = self._journal.state(self._job_id, StatementKind.UPDATE, update_statement(facts))

        def write(session: Session) -> None:
            insert_rows(session, statement)
            self._write(session, policy)

        await self._journal.event(self._job_id, "update", metrics, also=write)

    def _write(self, session: Session, policy: PolicyVersion) -> None:
        row = PolicyRow(
            job_id=self._job_id,
            version=policy.version,
            record=policy.encode().decode(),
            created_ms=self._context.time.now_ms(),
        )
        insert_rows(session, row)
        update_row(session, JobRow, self._job_id, {"policy_version": policy.version})
