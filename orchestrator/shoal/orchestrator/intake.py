"""Jobs arriving: checked, priced against their budget, prepared, and funded on the chain."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from weakref import WeakValueDictionary

from sqlalchemy import select
from sqlalchemy.orm import Session

from shoal.models.base import describe_base, require_complete
from shoal.orchestrator.context import Context
from shoal.orchestrator.journal import Journal
from shoal.orchestrator.store.tables import JobRow
from shoal.protocol.errors import InvalidRequest, NotFound, OverBudget, ShoalError
from shoal.protocol.job import Job, JobSpec, JobState
from shoal.protocol.money import format_dollars
from shoal.protocol.policy import MAX_ADAPTER_BYTES, BaseModelRef
from shoal.protocol.signing import Signed
from shoal.provenance.statement import MAX_LINKS
from shoal.rl.base_models import fetch_base
from shoal.rl.environments import Environment, Split, load_environment
from shoal.rl.prompts import eval_prompts

_log = logging.getLogger(__name__)

ESCROW_PERIOD_S = 7 * 24 * 3600
_PREPARED_AT_ONCE = 3
"""Below the least number of threads that asyncio has for everything that may take long."""
_FUNDING_POLL_S = 0.5
"""At the latest after so long an escrow is looked for again."""
_FIRST_LOOK_S = 0.03
_FUNDING_DELAY_SHARE = 0.1
"""By how much of what its requester takes to fund a job it may start later for want of a look."""
_FUNDING_PATIENCE_MS = 3_600_000


class Intake:
    """Takes signed jobs and starts each once its escrow is funded."""

    def __init__(
        self, context: Context, journal: Journal, start: Callable[[str], Awaitable[None]]
    ) -> None:
        self._context = context
        self._journal = journal
        self._start = start
        self._models: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._room = asyncio.Semaphore(_PREPARED_AT_ONCE)
        self._may_wait = asyncio.Event()
        self._may_wait.set()

    async def submit(self, signed: Signed[Job]) -> JobRow:
        """Keeps the job, ready to be funded; the same job twice is kept once.

        Raises:
            InvalidRequest: the job cannot run: environment, model or budget.
            Unauthorised: the requester did not sign it.
        """
        job = signed.record
        signed.require_signer(self._context.domain, job.requester)
        # In turn, so that nothing is downloaded twice at once; other models wait for none of it.
        async with self._models.setdefault(job.spec.model, asyncio.Lock()), self._room:
            known = await self.find(job.job_id())
            return await self._admit(signed) if known is None else known

    async def _admit(self, signed: Signed[Job]) -> JobRow:
        job = signed.record
        check_size(job.spec)
        check_budget(job.spec)
        # Not in the compute thread: a model may take hours to come, and nobody has paid yet.
        base = await asyncio.to_thread(self._prepare, job.spec)
        now_ms = self._context.time.now_ms()
        row = JobRow(
            job_id=job.job_id(),
            record=signed.encode().decode(),
            base=base.encode().decode(),
            state=JobState.FUNDING.value,
            reason="waiting for the escrow to be funded",
            escrow_deadline_s=now_ms // 1000 + ESCROW_PERIOD_S,
            created_ms=now_ms,
        )
        await self._journal.event(
            row.job_id,
            "job_received",
            {"name": job.spec.name},
            also=lambda session: session.add(row),
        )
        self._may_wait.set()
        return row

    def _prepare(self, spec: JobSpec) -> BaseModelRef:
        environments: list[Environment] = []
        for env_spec in spec.environments:
            environments.append(load_environment(env_spec))
        # Draws the held-out prompts once, which refuses a job that asks for too many.
        eval_prompts(
            "0x" + spec.digest(),
            spec.environments,
            [environment.num_tasks(Split.EVAL) for environment in environments],
            spec.evaluation.num_examples,
        )
        folder = fetch_base(
            spec.model,
            self._context.config.resolved_models_dir(),
            allow_local=self._context.config.allow_local_models,
        )
        # Held only once the job runs: nobody has paid for the room yet.
        base = describe_base(spec.model, folder, self._context.blobs.put_file)
        require_complete(folder)
        if spec.lora is None and 4 * base.num_parameters > MAX_ADAPTER_BYTES:
            raise InvalidRequest(
                f"Model {spec.model!r} has {base.num_parameters} parameters, too many to send all "
                f"of them with every update; at most {MAX_ADAPTER_BYTES // 4} can be trained so. "
                'Train an adapter: tuning = "lora".',
                code="policy_too_large",
            )
        if spec.model_sha256 not in (None, base.content_digest()):
            raise InvalidRequest(
                f"Model {spec.model!r} has digest {base.content_digest()} and the job pins "
                f"{spec.model_sha256}; correct model_sha256 or leave it out.",
                code="model_changed",
            )
        return base

    async def find(self, job_id: str) -> JobRow | None:
        """The job, or None."""
        return await self._context.database.run(lambda session: session.get(JobRow, job_id))

    async def require(self, job_id: str) -> JobRow:
        """The job.

        Raises:
            NotFound: there is none with this id.
        """
        row = await self.find(job_id)
        if row is None:
            raise NotFound(f"There is no job {job_id}; `shoal jobs` lists them.", code="no_job")
        return row

    async def watch_funding(self) -> None:
        """Runs for ever: each job whose escrow is on the chain is started."""
        waiting: list[JobRow] = []
        while True:
            await self._may_wait.wait()
            await asyncio.sleep(pause_s(waiting, self._context.time.now_ms()))
            # Before looking, so that a job which arrives meanwhile is looked for again.
            self._may_wait.clear()
            waiting = await self._context.database.run(_waiting_for_funds)
            if waiting:
                self._may_wait.set()
            for row in waiting:
                try:
                    await self._check_funding(row)
                except ShoalError as error:
                    _log.warning(
                        "funding_unknown", extra={"job_id": row.job_id, "reason": error.message}
                    )

    async def _check_funding(self, row: JobRow) -> None:
        job = Signed[Job].model_validate_json(row.record).record
        try:
            escrow = await self._context.chain.escrow.job(
                row.job_id, depth=self._context.config.chain_depth
            )
        except NotFound:
            if self._context.time.now_ms() > row.created_ms + _FUNDING_PATIENCE_MS:
                await self._fail(row.job_id, "its escrow was never opened")
            return
        if escrow.coordinator.lower() != self._context.account.address.lower():
            await self._fail(row.job_id, "the escrow names another orchestrator")
        elif escrow.funded_micros < job.spec.budget.max_total_micros:
            await self._fail(
                row.job_id,
                f"the escrow holds ${format_dollars(escrow.funded_micros)} and the job's budget "
                f"is ${format_dollars(job.spec.budget.max_total_micros)}",
            )
        elif escrow.closed or escrow.deadline_s < row.escrow_deadline_s:
            # Workers would be paid from money that the requester can take back first.
            await self._fail(
                row.job_id,
                f"the escrow may be refunded at {escrow.deadline_s} (Unix seconds) and has to "
                f"hold until {row.escrow_deadline_s}",
            )
        else:
            # What lies above the budget is the requester's, not the job's.
            await self._fund(row.job_id, job.spec.budget.max_total_micros)

    async def _fund(self, job_id: str, funded_micros: int) -> None:
        def write(session: Session) -> None:
            row = session.get_one(JobRow, job_id)
            if row.state != JobState.FUNDING.value:
                raise InvalidRequest(f"Job {job_id} was cancelled while its escrow was looked up.")
            row.funded_micros = funded_micros
            row.state, row.reason = JobState.RUNNING.value, ""
            row.started_ms = self._context.time.now_ms()

        facts = {"funded_micros": funded_micros}
        await self._journal.event(job_id, "job_funded", facts, also=write)
        await self._start(job_id)

    async def _fail(self, job_id: str, reason: str) -> None:
        await self._journal.finish(
            job_id,
            JobState.FAILED,
            reason,
            # Its requester may have taken it back while its escrow was looked up.
            unless=lambda row: row.state != JobState.FUNDING.value,
        )


def _waiting_for_funds(session: Session) -> list[JobRow]:
    return list(session.scalars(select(JobRow).where(JobRow.state == JobState.FUNDING.value)))


def pause_s(waiting: Sequence[JobRow], now_ms: int) -> float:
    """Until the next look for escrows: short while a job that waits for its own is new."""
    newest_ms = max((row.created_ms for row in waiting), default=now_ms)
    delay_s = _FUNDING_DELAY_SHARE * (now_ms - newest_ms) / 1000
    return min(max(_FIRST_LOOK_S, delay_s), _FUNDING_POLL_S)


def check_size(spec: JobSpec) -> None:
    """Passes if one update's statement can name every piece of work it is made of.

    Raises:
        InvalidRequest: a batch is cut into too many tasks.
    """
    groups, sizes = spec.groups_per_batch, spec.tasks
    # A group without spread may be drawn again, at worst in a task of its parcel's own.
    rollouts = -(-groups // sizes.rollout) * (1 + spec.dynamic_sampling_rounds)
    gradients = -(-groups // sizes.gradient)
    # Gradients may be half of the links of a statement.
    for tasks, most, key in (
        (rollouts, MAX_LINKS, "rollout"),
        (gradients, MAX_LINKS // 2, "gradient"),
    ):
        if tasks > most:
            raise InvalidRequest(
                f"A batch of {groups} groups may be cut into {tasks} {key} tasks and {most} are "
                f"allowed; raise tasks.{key} or lower batch_size.",
                code="batch_too_large",
            )


def check_budget(spec: JobSpec) -> None:
    """Passes if the budget buys at least one policy update at the job's highest prices.

    Raises:
        OverBudget: it does not.
    """
    budget = spec.budget
    one_step = spec.groups_per_batch * (budget.max_rollout_micros + budget.max_gradient_micros)
    if budget.max_total_micros < one_step:
        raise OverBudget(
            f"The budget of ${format_dollars(budget.max_total_micros)} does not cover one policy "
            f"update, which may cost ${format_dollars(one_step)} at the job's highest prices; "
            "raise budget.max_total or lower budget.max_unit_price.",
            code="budget_too_small",
        )
