"""Jobs in the orchestrator's lab that are really started, and how they ended."""

from __future__ import annotations

import asyncio
from typing import Any

from orchestrator_lab import TIMEOUT_S, Lab

from shoal.orchestrator.store.tables import JobRow
from shoal.protocol.job import JobState


async def submitted(lab: Lab, base: str, **spec: Any) -> str:
    """A job whose escrow is funded and which has not been started."""
    row = await lab.orchestrator.intake.submit(lab.make_job(model=base, **spec))
    lab.chain.open(row.job_id, lab.context.account.address)

    def fund(session: Any) -> None:
        stored = session.get_one(JobRow, row.job_id)
        stored.state, stored.funded_micros = JobState.RUNNING.value, 1_000_000

    await lab.context.database.run(fund)
    return row.job_id


async def ended(lab: Lab, job_id: str) -> JobRow:
    """The job's row once its task is over."""
    async with asyncio.timeout(TIMEOUT_S):
        await asyncio.gather(*lab.orchestrator.jobs._tasks)
    return await lab.orchestrator.intake.require(job_id)
