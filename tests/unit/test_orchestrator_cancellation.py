"""A job that its requester takes back ends as that, whenever the order comes and whatever fails."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account
from learning_fixtures import write_base
from orchestrator_chain import MemoryChain
from orchestrator_jobs import ended, submitted
from orchestrator_lab import DOMAIN, Lab, open_lab, run, until

from shoal.network.identity import NodeIdentity
from shoal.orchestrator.jobrun import JobRun
from shoal.orchestrator.settler import Settler
from shoal.orchestrator.store.tables import JobRow
from shoal.protocol.errors import InvalidRequest, OverBudget, Unauthorised
from shoal.protocol.job import JobCommand, JobCommandKind
from shoal.protocol.signing import Signed, sign


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_base(tmp_path_factory.mktemp("base")))


def order(lab: Lab, job: str) -> Signed[JobCommand]:
    return sign(JobCommand(job_id=job, kind=JobCommandKind.CANCEL), DOMAIN, lab.requester)


async def row_of(lab: Lab, job: str) -> JobRow:
    return await lab.orchestrator.intake.require(job)


@pytest.mark.parametrize("when", ["funding", "loading", "running", "paused"])
def test_a_requester_may_cancel_at_any_time(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path, allow_local_models=True) as lab:
            running = asyncio.Event()

            async def play(job_run: JobRun) -> str:
                running.set()
                if when == "paused":
                    raise OverBudget("No money is left.")
                await job_run._unless_halted(asyncio.Event().wait())
                return ""

            monkeypatch.setattr(JobRun, "run", play)
            jobs = lab.orchestrator.jobs
            if when == "funding":
                job = (await lab.orchestrator.intake.submit(lab.make_job(model=base))).job_id
            else:
                job = await submitted(lab, base)
                await jobs.start(job)
            if when == "running":
                await running.wait()
            if when == "paused":
                assert (await ended(lab, job)).state == "paused"
            with pytest.raises(Unauthorised):
                await jobs.cancel(sign(order(lab, job).record, DOMAIN, lab.context.account))
            await jobs.cancel(order(lab, job))
            row = await ended(lab, job)
            assert (row.state, row.reason) == ("cancelled", "cancelled by its requester")
            assert when == "funding" or lab.chain.escrows[job].closed
            # A second time changes nothing.
            await jobs.cancel(order(lab, job))
            assert (await ended(lab, job)).state == "cancelled"
            if when == "funding":
                # Money that comes after all does not revive it.
                lab.chain.open(job, lab.context.account.address)
                with pytest.raises(InvalidRequest):
                    await lab.orchestrator.intake._fund(job, 1_000_000)
                assert (await row_of(lab, job)).state == "cancelled"

    run(scenario)


def test_an_escrow_that_is_open_already_is_closed_with_its_job(tmp_path: Path, base: str) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path, allow_local_models=True) as lab:
            job = (await lab.orchestrator.intake.submit(lab.make_job(model=base))).job_id
            lab.chain.open(job, lab.context.account.address)
            await lab.orchestrator.jobs.cancel(order(lab, job))
            assert (await ended(lab, job)).state == "cancelled"
            assert lab.chain.escrows[job].closed

    run(scenario)


def test_an_order_that_meets_the_funding_is_obeyed(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path, allow_local_models=True) as lab:

            async def play(job_run: JobRun) -> str:
                await job_run._unless_halted(asyncio.Event().wait())
                return ""

            monkeypatch.setattr(JobRun, "run", play)
            row = await lab.orchestrator.intake.submit(lab.make_job(model=base))
            lab.chain.open(row.job_id, lab.context.account.address)
            await asyncio.gather(
                lab.orchestrator.jobs.cancel(order(lab, row.job_id)),
                lab.orchestrator.intake._check_funding(row),
                return_exceptions=True,
            )
            assert (await ended(lab, row.job_id)).state == "cancelled"
            assert lab.chain.escrows[row.job_id].closed

    run(scenario)


def test_a_look_at_the_escrow_makes_no_failure_of_a_cancelled_job(
    tmp_path: Path, base: str
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path, allow_local_models=True) as lab:
            row = await lab.orchestrator.intake.submit(lab.make_job(model=base))
            lab.chain.open(row.job_id, lab.context.account.address, funded_micros=1)
            look = lab.chain.job

            async def meanwhile(job_id: str, *, depth: int = 0) -> Any:
                lab.chain.job = look  # type: ignore[method-assign]
                await lab.orchestrator.jobs.cancel(order(lab, job_id))
                return await look(job_id, depth=depth)

            lab.chain.job = meanwhile  # type: ignore[method-assign]
            await lab.orchestrator.intake._check_funding(row)
            assert (await ended(lab, row.job_id)).state == "cancelled"

    run(scenario)


@pytest.mark.parametrize("when", ["funding", "running"])
def test_an_order_that_was_answered_outlives_the_process(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    chain, account, identity = MemoryChain(), Account.create(), NodeIdentity.generate()
    runs: list[str] = []

    async def cancelled() -> str:
        async with open_lab(
            tmp_path, account=account, identity=identity, chain=chain, allow_local_models=True
        ) as lab:

            async def play(job_run: JobRun) -> str:
                runs.append(job_run.job_id)
                # An update is being computed: no order is looked at meanwhile.
                await asyncio.Event().wait()
                return ""

            monkeypatch.setattr(JobRun, "run", play)
            if when == "running":
                job = await submitted(lab, base)
                await lab.orchestrator.jobs.start(job)
                await until(lambda: bool(runs))
            else:
                job = (await lab.orchestrator.intake.submit(lab.make_job(model=base))).job_id
                chain.open(job, account.address)
                chain.down = True
            await lab.orchestrator.jobs.cancel(order(lab, job))
            return job

    async def after(job: str) -> None:
        async with open_lab(
            tmp_path, account=account, identity=identity, chain=chain, allow_local_models=True
        ) as lab:
            await lab.orchestrator.jobs.resume()
            assert (await ended(lab, job)).state == "cancelled"
            assert chain.escrows[job].closed

    job = run(cancelled)
    chain.down = False
    run(lambda: after(job))
    assert len(runs) == (when == "running")


def test_an_order_that_comes_while_a_paused_job_is_settled_is_obeyed(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path, allow_local_models=True) as lab:

            async def play(job_run: JobRun) -> str:
                await job_run._state_environments()
                raise OverBudget("No money is left.")

            settling, go_on, settle = asyncio.Event(), asyncio.Event(), Settler.settle

            async def slowly(settler: Settler, job_id: str) -> bool:
                settling.set()
                await go_on.wait()
                return await settle(settler, job_id)

            monkeypatch.setattr(JobRun, "run", play)
            monkeypatch.setattr(Settler, "settle", slowly)
            job = await submitted(lab, base)
            await lab.orchestrator.jobs.start(job)
            await settling.wait()
            await lab.orchestrator.jobs.cancel(order(lab, job))
            go_on.set()
            row = await ended(lab, job)
            assert (row.state, lab.chain.escrows[job].closed) == ("cancelled", True)

    run(scenario)


def test_an_order_that_comes_after_the_end_was_decided_changes_nothing(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path, allow_local_models=True) as lab:

            async def play(job_run: JobRun) -> str:
                return ""

            settle, calls = Settler.settle, 0

            async def cancelled_meanwhile(settler: Settler, job_id: str) -> bool:
                nonlocal calls
                calls += 1
                await lab.orchestrator.jobs.cancel(order(lab, job_id))
                return await settle(settler, job_id)

            monkeypatch.setattr(JobRun, "run", play)
            monkeypatch.setattr(Settler, "settle", cancelled_meanwhile)
            job = await submitted(lab, base)
            await lab.orchestrator.jobs.start(job)
            assert (await ended(lab, job)).state == "complete"
            assert calls

    run(scenario)
