"""All jobs of this orchestrator: started, run to their end, settled, closed."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from shoal.models.base import describe_base
from shoal.orchestrator.auctioneer import Auctioneer
from shoal.orchestrator.bonds import Bonds
from shoal.orchestrator.context import Context
from shoal.orchestrator.deltas import PolicyDeltas
from shoal.orchestrator.dispatcher import Dispatcher
from shoal.orchestrator.jobrun import JobRun
from shoal.orchestrator.journal import Journal
from shoal.orchestrator.learner import Learner
from shoal.orchestrator.publisher import Publisher
from shoal.orchestrator.reference import reserves_of
from shoal.orchestrator.settler import JobFrozen, Settler
from shoal.orchestrator.store.tables import JobRow
from shoal.protocol.blob import BlobRef
from shoal.protocol.errors import (
    ChainRejected,
    InvalidRequest,
    NotFound,
    OverBudget,
    ShoalError,
    Unavailable,
)
from shoal.protocol.job import Job, JobCommand, JobState
from shoal.protocol.market import TaskKind
from shoal.protocol.node import OpenJob
from shoal.protocol.policy import BaseModelRef
from shoal.protocol.signing import Signed
from shoal.rl.base_models import fetch_base
from shoal.rl.local import blob_of_file

_log = logging.getLogger(__name__)

_CHAIN_RETRY_S = 1.0
_SETTLING = "settling, then "
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
        self._bonds = bonds
        self._deltas = deltas
        settler.on_frozen = self._freeze
        self._running: dict[str, JobRun] = {}
        self._preparing: dict[str, OpenJob] = {}
        """Funded jobs whose policy is still being loaded; workers fetch the base and bid."""
        self._cancelled: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()

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
        task = asyncio.create_task(self._guard(job_id), name=f"job {job_id[:10]}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

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
        run = self._running.get(job_id)
        if run is not None:
            run.halt(JobCancelled("cancelled by its requester"))
        elif row.state == JobState.FUNDING.value:
            await self._journal.finish(job_id, JobState.CANCELLED, "cancelled by its requester")
        elif row.state == JobState.PAUSED.value:
            await self._close_escrow(job_id)
            await self._journal.finish(job_id, JobState.CANCELLED, "cancelled by its requester")
        elif row.state == JobState.RUNNING.value:
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

    async def _guard(self, job_id: str) -> None:
        try:
            await self._drive(job_id)
        except ShoalError as error:
            _log.error("job_failed", extra={"job_id": job_id, "reason": error.message})
            await self._abort(job_id, error.message)
        except Exception:
            _log.exception("job_crashed", extra={"job_id": job_id})
            await self._abort(job_id, _DEFECT)
        finally:
            self._running.pop(job_id, None)
            self._deltas.forget_job(job_id)

    async def _abort(self, job_id: str, reason: str) -> None:
        """The job is over without an orderly end; nothing of it is sold any more."""
        self._running.pop(job_id, None)
        self._auctioneer.withdraw(job_id)
        self._auctioneer.forget_job(job_id)
        await self._dispatcher.revoke_job(job_id, "the job has failed")
        await self._journal.finish(job_id, JobState.FAILED, reason)

    async def _drive(self, job_id: str) -> None:
        await self._journal.adopt(job_id)
        await self._settler.adopt(job_id)
        row = await self._context.database.run(lambda session: session.get_one(JobRow, job_id))
        job = Signed[Job].model_validate_json(row.record).record
        base = BaseModelRef.model_validate_json(row.base)
        try:
            run = await self._load(job, base, sells=row.state == JobState.RUNNING.value)
            if job_id in self._cancelled:
                run.halt(JobCancelled("cancelled by its requester"))
            await run.restore()
            if row.state == JobState.RUNNING.value:
                # Before anything is leased: without it no work could be paid for.
                await self._put_up_bond(job_id)
        except ShoalError as error:
            # What a job has learnt may still be saved by who mends this; a new one has nothing.
            state = JobState.PAUSED if row.policy_version else JobState.FAILED
            await self._settle_and_finish(job_id, state, error.message)
            return
        if row.state == JobState.DRAINING.value:
            state, reason = _read_ending(row.reason)
        else:
            state, reason = await _run(run)
        run.selling = False
        await self._drain(job_id, state, reason)
        try:
            await self._publisher.publish(run)
        except Exception as error:
            # Whatever became of the model, its workers are owed their pay.
            _log.exception("publishing_failed", extra={"job_id": job_id})
            state = JobState.FAILED
            reason = error.message if isinstance(error, ShoalError) else _DEFECT
        await self._settle_and_finish(job_id, state, reason)

    async def _settle_and_finish(self, job_id: str, state: JobState, reason: str) -> None:
        """Everybody is paid, the job is at its end, and its escrow closed unless it may go on."""
        try:
            await self._settle_fully(job_id)
        except JobFrozen as error:
            state, reason = JobState.FAILED, error.message
        if state is not JobState.PAUSED:
            await self._close_escrow(job_id)
            self._auctioneer.forget_job(job_id)
        await self._journal.finish(job_id, state, reason)

    async def _load(self, job: Job, base: BaseModelRef, *, sells: bool) -> JobRun:
        """The job's run, which is found from now on; if it ``sells``, workers hear of it first."""
        job_id = job.job_id()
        folder, base_blob = await self._context.computed(lambda: self._unchanged_base(job, base))
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
        finally:
            self._preparing.pop(job_id, None)
        self._running[job_id] = run
        return run

    def _unchanged_base(self, job: Job, base: BaseModelRef) -> tuple[Path, BlobRef]:
        """Where the base's files are, and the blob by which workers fetch them."""
        folder = fetch_base(
            job.spec.model,
            self._context.config.resolved_models_dir(),
            allow_local=self._context.config.allow_local_models,
        )
        # Hashed again, because the folder may have changed since the job began.
        found = describe_base(job.spec.model, folder, self._pinned_blob)
        if found.content_digest() != base.content_digest():
            raise InvalidRequest(
                f"Model {job.spec.model!r} has digest {found.content_digest()} where the job began "
                f"with {base.content_digest()}; bring back the files it began with.",
                code="model_changed",
            )
        return folder, self._context.blobs.put_bytes(base.encode(), pin=True)

    def _pinned_blob(self, path: Path) -> BlobRef:
        """The file as a blob; pins do not outlive a process, and blobs may be dropped."""
        ref, blobs = blob_of_file(path), self._context.blobs
        if not blobs.has(ref.sha256):
            return blobs.put_file(path, pin=True)
        blobs.pin(ref.sha256)
        return ref

    def run_dir(self, job_id: str) -> Path:
        """Where the job's checkpoints and released files are."""
        return self._context.config.data_dir / "jobs" / job_id

    async def _drain(self, job_id: str, state: JobState, reason: str) -> None:
        """Nothing of the job is open any more; results already sent in are still judged."""
        await self._set_state(job_id, JobState.DRAINING, f"{_SETTLING}{state.value}: {reason}")
        self._auctioneer.withdraw(job_id)
        await self._dispatcher.revoke_job(job_id, "the job has ended")
        await self._dispatcher.drained(job_id)

    async def _put_up_bond(self, job_id: str) -> None:
        while True:
            try:
                return await self._bonds.put_up(job_id)
            except (Unavailable, ChainRejected) as error:
                _require_passing(error)
                _log.warning("bond_waits", extra={"job_id": job_id, "reason": str(error)})
                await asyncio.sleep(_CHAIN_RETRY_S)

    async def _settle_fully(self, job_id: str) -> None:
        while True:
            try:
                if not await self._settler.settle(job_id):
                    return
            except (Unavailable, ChainRejected) as error:
                _require_passing(error)
                _log.warning("settlement_waits", extra={"job_id": job_id, "reason": str(error)})
                await asyncio.sleep(_CHAIN_RETRY_S)

    async def _close_escrow(self, job_id: str) -> None:
        while True:
            try:
                await self._settler.close(job_id)
            except (Unavailable, ChainRejected) as error:
                _require_passing(error)
                _log.warning("closing_waits", extra={"job_id": job_id, "reason": str(error)})
                await asyncio.sleep(_CHAIN_RETRY_S)
            else:
                await self._journal.event(job_id, "escrow_closed", {})
                return

    async def _set_state(self, job_id: str, state: JobState, reason: str) -> None:
        def write(session: Session) -> None:
            row = session.get_one(JobRow, job_id)
            row.state, row.reason = state.value, reason

        await self._context.database.run(write)


def _require_passing(error: Unavailable | ChainRejected) -> None:
    """Passes only what trying again may mend.

    A refusal that names a transaction was of that transaction alone, and the outbox sends the
    effect anew; one that names none was the contract's answer before anything was sent.

    Raises:
        ChainRejected: the contract's answer.
    """
    if isinstance(error, ChainRejected) and not error.tx_hash:
        raise error


async def _run(run: JobRun) -> tuple[JobState, str]:
    """How the run ended, and why."""
    try:
        return JobState.COMPLETE, await run.run()
    except OverBudget as error:
        return JobState.PAUSED, error.message
    except JobCancelled as error:
        return JobState.CANCELLED, error.message
    except ShoalError as error:
        return JobState.FAILED, error.message
    except Exception:
        # Its workers are still paid and its escrow closed, so this is an end like others.
        _log.exception("job_crashed", extra={"job_id": run.job_id})
        return JobState.FAILED, _DEFECT


def _read_ending(settling: str) -> tuple[JobState, str]:
    """The end that a job was being settled towards when the process stopped."""
    state, _, reason = settling.removeprefix(_SETTLING).partition(": ")
    return JobState(state), reason
