"""All jobs of this orchestrator: started, run to their end, settled, closed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from sqlalchemy import select

from shoal.orchestrator.auctioneer import Auctioneer
from shoal.orchestrator.bases import HeldBases
from shoal.orchestrator.bonds import Bonds
from shoal.orchestrator.context import Context
from shoal.orchestrator.deltas import PolicyDeltas
from shoal.orchestrator.dispatcher import Dispatcher
from shoal.orchestrator.endings import CANCELLATION, Ending, Endings, ending_of, is_cancelled
from shoal.orchestrator.job_escrow import PatientEscrow
from shoal.orchestrator.jobrun import JobRun
from shoal.orchestrator.journal import Journal
from shoal.orchestrator.learner import Learner
from shoal.orchestrator.publisher import Publisher
from shoal.orchestrator.reference import reserves_of
from shoal.orchestrator.settler import JobFrozen, Settler
from shoal.orchestrator.store.database import DatabaseDown
from shoal.orchestrator.store.tables import JobRow
from shoal.protocol.blob import BlobRef
from shoal.protocol.errors import (
    InvalidRequest,
    NotFound,
    OverBudget,
    ShoalError,
)
from shoal.protocol.job import Job, JobCommand, JobState
from shoal.protocol.market import TaskKind
from shoal.protocol.node import OpenJob
from shoal.protocol.policy import BaseModelRef
from shoal.protocol.signing import Signed

_log = logging.getLogger(__name__)

_DEFECT = "a defect of the orchestrator; its log has the details"


class JobCancelled(InvalidRequest):
    """The requester took the job back."""

    default_code = "job_cancelled"


class Jobs:
    """Runs each funded job in a task of its own."""

    def __init__(
        self,
        context: Context,
        journal: Journal,
        settler: Settler,
        dispatcher: Dispatcher,
        auctioneer: Auctioneer,
        publisher: Publisher,
        bonds: Bonds,
        deltas: PolicyDeltas,
    ) -> None:
        self._context = context
        self._journal = journal
        self._settler = settler
        self._dispatcher = dispatcher
        self._auctioneer = auctioneer
        self._publisher = publisher
        self._escrow = PatientEscrow(context, journal, settler, bonds)
        self._deltas = deltas
        settler.on_frozen = self._freeze
        self._running: dict[str, JobRun] = {}
        self._preparing: dict[str, OpenJob] = {}
        """Funded jobs whose policy is still being loaded; workers fetch the base and bid."""
        self._cancelled: set[str] = set()
        self._endings = Endings(context)
        self._bases = HeldBases(context)
        self._tasks: set[asyncio.Task[None]] = set()
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def find(self, job_id: str) -> JobRun | None:
        """The job's run, while this process holds it."""
        return self._running.get(job_id)

    def learner(self, job_id: str) -> Learner:
        """The policy of a running job, for the verifier."""
        return self._running[job_id].learner

    def policy_version(self, job_id: str) -> int:
        """The newest published version of a running job; 0 before the first and after its end."""
        run = self._running.get(job_id)
        return 0 if run is None or run.policy is None else run.policy.version

    def running_version(self, job_id: str) -> int | None:
        """The same; None before the job's start and after its end."""
        return self.policy_version(job_id) if job_id in self._running else None

    def open_jobs(self) -> list[OpenJob]:
        """The jobs that accept bids."""
        # What failed on the market may cost more than a lot that is just opened.
        raised = self._auctioneer.reserves()
        running = [
            self._listed(
                run.learner.job,
                run.learner.base,
                run.learner.base_blob,
                {
                    kind: max(micros, raised.get((job_id, kind), 0))
                    for kind, micros in run.reserves.items()
                },
            )
            for job_id, run in self._running.items()
            if run.selling
        ]
        return [*running, *self._preparing.values()]

    def _listed(
        self, job: Job, base: BaseModelRef, base_blob: BlobRef, reserve_micros: dict[TaskKind, int]
    ) -> OpenJob:
        job_id = job.job_id()
        return OpenJob(
            job_id=job_id,
            name=job.spec.name,
            model=job.spec.model,
            num_parameters=base.num_parameters,
            base=base_blob,
            lora=job.spec.lora,
            reserve_micros=reserve_micros,
            epoch=self._journal.open_epoch(job_id),
        )

    def running_ids(self) -> list[str]:
        """The jobs whose epochs are being settled."""
        return list(self._running)

    async def resume(self) -> None:
        """Starts every job the database says is running; leases of before are over."""
        await self._dispatcher.sweep()
        unfinished = (JobState.RUNNING.value, JobState.DRAINING.value)
        rows = await self._context.database.run(
            lambda session: session.scalars(
                select(JobRow).where(JobRow.state.in_(unfinished))
            ).all()
        )
        for row in rows:
            await self.start(row.job_id)

    async def start(self, job_id: str) -> None:
        """The job runs from now on, from its newest checkpoint if it has one."""
        self._begin(job_id, lambda: self._drive(job_id))

    def _begin(self, job_id: str, work: Callable[[], Awaitable[None]]) -> None:
        task = asyncio.create_task(self._guard(job_id, work), name=f"job {job_id[:10]}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def watch(self) -> None:
        """Runs until the database is lost to a job.

        What the job holds in memory may then be ahead of what is on record, so the process has
        to end: started again it goes on from the record.

        Raises:
            DatabaseDown: it is.
        """
        await asyncio.shield(self._broken)

    async def cancel(self, command: Signed[JobCommand]) -> None:
        """The job ends as soon as what was handed in is judged; ended jobs stay as they are.

        Raises:
            NotFound: there is no such job.
            Unauthorised: somebody else than its requester signed.
        """
        job_id = command.record.job_id
        row = await self._context.database.run(lambda session: session.get(JobRow, job_id))
        if row is None:
            raise NotFound(f"There is no job {job_id}; `shoal jobs` lists them.", code="no_job")
        job = Signed[Job].model_validate_json(row.record).record
        command.require_signer(self._context.domain, job.requester)
        was = await self._endings.cancel(job_id)
        if was is JobState.FUNDING:
            self._begin(job_id, lambda: self._turn_away(job_id))
        elif was is JobState.PAUSED:
            self._begin(job_id, lambda: self._settle_and_finish(job_id, CANCELLATION))
        elif was is JobState.RUNNING:
            run = self._running.get(job_id)
            if run is not None:
                run.halt(JobCancelled(CANCELLATION.reason))
            else:
                # Its policy is still being loaded; it is halted as soon as there is a run.
                self._cancelled.add(job_id)

    async def _freeze(self, job_id: str, error: JobFrozen) -> None:
        """Nobody works for the job any more, and it ends with the error at its next wait."""
        run = self._running.get(job_id)
        if run is None:
            return
        run.selling = False
        run.halt(error)
        self._auctioneer.withdraw(job_id)
        await self._dispatcher.revoke_job(job_id, "the fault court froze the job's escrow")

    async def close(self) -> None:
        """Stops driving all jobs; their records stay as they are."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._deltas.close()

    async def _guard(self, job_id: str, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await self._to_an_end(job_id, work)
        except DatabaseDown as error:
            _log.error("job_lost_database", extra={"job_id": job_id, "reason": error.message})
            if not self._broken.done():
                self._broken.set_exception(error)
            return
        self._let_go(job_id)
        self._cancelled.discard(job_id)

    async def _to_an_end(self, job_id: str, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except DatabaseDown:
            raise
        except ShoalError as error:
            _log.error("job_failed", extra={"job_id": job_id, "reason": error.message})
            await self._abort(job_id, error.message)
        except Exception:
            _log.exception("job_crashed", extra={"job_id": job_id})
            await self._abort(job_id, _DEFECT)

    async def _abort(self, job_id: str, reason: str) -> None:
        """The job is over without an orderly end: no more is sold, what was accepted is paid."""
        self._let_go(job_id)
        self._auctioneer.withdraw(job_id)
        self._auctioneer.forget_job(job_id)
        await self._dispatcher.revoke_job(job_id, "the job has failed")
        ending = Ending(JobState.FAILED, reason)
        try:
            await self._settle_and_finish(job_id, ending)
        except DatabaseDown:
            raise
        except Exception:
            _log.exception("not_settled", extra={"job_id": job_id})
            await self._finish(job_id, ending)

    def _let_go(self, job_id: str) -> None:
        """This process does not hold the job any more, nor room for its blobs."""
        run = self._running.pop(job_id, None)
        if run is not None:
            run.let_go()
        self._deltas.forget_job(job_id)
        self._bases.let_go(job_id)

    async def _turn_away(self, job_id: str) -> None:
        """A cancelled job that never began is at its end: its escrow, if it has one, is closed."""
        if await self._escrow.is_open(job_id):
            await self._escrow.close(job_id)
        await self._finish(job_id, CANCELLATION)

    async def _drive(self, job_id: str) -> None:
        await self._journal.adopt(job_id)
        await self._settler.adopt(job_id)
        row = await self._context.database.run(lambda session: session.get_one(JobRow, job_id))
        if is_cancelled(row) and row.started_ms is None:
            await self._turn_away(job_id)
            return
        job = Signed[Job].model_validate_json(row.record).record
        base = BaseModelRef.model_validate_json(row.base)
        ending = ending_of(row)
        try:
            run = await self._load(job, base, sells=ending is None)
            if job_id in self._cancelled:
                run.halt(JobCancelled(CANCELLATION.reason))
            await run.restore()
            if ending is None:
                # Before anything is leased: without it no work could be paid for.
                await self._escrow.put_up_bond(job_id)
        except DatabaseDown:
            raise
        except ShoalError as error:
            # What a job has learnt may still be saved by who mends this; a new one has nothing.
            state = JobState.PAUSED if row.policy_version else JobState.FAILED
            await self._settle_and_finish(job_id, Ending(state, error.message))
            return
        if ending is None:
            ending = await _run(run)
        run.selling = False
        ending = await self._drain(job_id, ending)
        try:
            await self._publisher.publish(run)
        except DatabaseDown:
            raise
        except Exception as error:
            # Whatever became of the model, its workers are owed their pay.
            _log.exception("publishing_failed", extra={"job_id": job_id})
            reason = error.message if isinstance(error, ShoalError) else _DEFECT
            ending = Ending(JobState.FAILED, reason)
        await self._settle_and_finish(job_id, ending)

    async def _settle_and_finish(self, job_id: str, ending: Ending) -> None:
        """Everybody is paid, the job is at its end, and its escrow closed unless it may go on.

        The end is ``ending``, or the job's cancellation.
        """
        ending = await self._endings.decide(job_id, ending)
        try:
            await self._escrow.settle_fully(job_id)
        except JobFrozen as error:
            ending = Ending(JobState.FAILED, error.message)
        if ending.state is JobState.PAUSED:
            if await self._finish(job_id, ending, unless=is_cancelled):
                return
            ending = CANCELLATION
        await self._escrow.close(job_id)
        self._auctioneer.forget_job(job_id)
        await self._finish(job_id, ending)

    async def _finish(
        self, job_id: str, ending: Ending, *, unless: Callable[[JobRow], bool] = lambda row: False
    ) -> bool:
        return await self._journal.finish(job_id, ending.state, ending.reason, unless=unless)

    async def _load(self, job: Job, base: BaseModelRef, *, sells: bool) -> JobRun:
        """The job's run, which is found from now on; if it ``sells``, workers hear of it first."""
        job_id = job.job_id()
        folder, base_blob = await self._context.computed(lambda: self._bases.hold(job, base))
        if sells:
            terms = reserves_of(job.spec, self._context.config.reference)
            reserve_micros = {kind: reserve.reserve_micros for kind, reserve in terms.items()}
            self._preparing[job_id] = self._listed(job, base, base_blob, reserve_micros)
            self._auctioneer.announcer.job(job_id)
        try:
            learner = await self._context.computed(
                lambda: Learner(job, base, base_blob, folder, self.run_dir(job_id))
            )
            run = JobRun(self._context, self._journal, self._auctioneer, self._deltas, learner)
            run.selling = sells
        finally:
            self._preparing.pop(job_id, None)
        self._running[job_id] = run
        return run

    def run_dir(self, job_id: str) -> Path:
        """Where the job's checkpoints and released files are."""
        return self._context.config.data_dir / "jobs" / job_id

    async def _drain(self, job_id: str, ending: Ending) -> Ending:
        """Nothing of the job is open any more; results already sent in are still judged.

        Returns:
            The end it is settled towards: ``ending``, or its cancellation.
        """
        ending = await self._endings.decide(job_id, ending)
        self._auctioneer.withdraw(job_id)
        await self._dispatcher.revoke_job(job_id, "the job has ended")
        await self._dispatcher.drained(job_id)
        return ending


async def _run(run: JobRun) -> Ending:
    """How the run ended, and why.

    Raises:
        DatabaseDown: it has not ended; it goes on after a restart.
    """
    try:
        return Ending(JobState.COMPLETE, await run.run())
    except DatabaseDown:
        raise
    except OverBudget as error:
        return Ending(JobState.PAUSED, error.message)
    except JobCancelled as error:
        return Ending(JobState.CANCELLED, error.message)
    except ShoalError as error:
        return Ending(JobState.FAILED, error.message)
    except Exception:
        # Its workers are still paid and its escrow closed, so this is an end like others.
        _log.exception("job_crashed", extra={"job_id": run.job_id})
        return Ending(JobState.FAILED, _DEFECT)
