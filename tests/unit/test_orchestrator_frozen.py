"""A job that the court has ended: nothing more is leased, and what was learnt is released."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from learning_fixtures import write_base
from orchestrator_jobs import ended, submitted
from orchestrator_lab import Lab, Sale, open_lab, run, until

from shoal.orchestrator.jobrun import JobRun
from shoal.orchestrator.settler import JobFrozen
from shoal.provenance.bundle import read_bundle


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_base(tmp_path_factory.mktemp("base")))


def freeze(lab: Lab, job: str) -> None:
    """The court has decided: the escrow is closed and frozen."""
    changes = {"frozen": True, "closed": True}
    lab.chain.escrows[job] = lab.chain.escrows[job].model_copy(update=changes)


def test_a_freeze_takes_back_every_lease_and_ends_the_job_with_its_model_released(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path, allow_local_models=True) as lab:
            sales: list[Sale] = []

            async def play(job_run: JobRun) -> str:
                await job_run._state_environments()
                sales.append(await lab.open_sale(job_run.job_id, 4))
                await job_run._unless_halted(asyncio.Event().wait())
                return ""

            monkeypatch.setattr(JobRun, "run", play)
            job, peer = await submitted(lab, base), await lab.peer()
            await lab.orchestrator.jobs.start(job)
            await until(lambda: bool(sales))
            offer, live = await lab.lease(peer, sales[0])
            settler = lab.orchestrator.settler
            await settler.settle_all([job])
            # Now and while nothing is left to post, an escrow in order disturbs nobody.
            await settler.settle_all([job])
            assert live.record.state == "running"
            assert [found.job_id for found in lab.orchestrator.jobs.open_jobs()] == [job]
            freeze(lab, job)
            sent = len(lab.chain.ledger.broadcasts)
            await settler.settle_all([job])
            assert live.record.state == "revoked"
            assert "the fault court froze" in (live.record.reason or "")
            assert sales[0].workload.closed
            assert lab.orchestrator.jobs.open_jobs() == []
            assert (await peer.beat(offer)).revoked == (offer.lease.record.lease_id,)
            row = await ended(lab, job)
            assert row.state == "failed"
            assert "The fault court froze the job's escrow" in row.reason
            assert "the other $1.00" in row.reason
            assert f"`shoal refund {job}`" in row.reason
            assert (lab.chain.escrows[job].epoch, len(lab.chain.ledger.broadcasts)) == (1, sent)
            folder = lab.orchestrator.jobs.run_dir(job) / "adapter"
            assert (folder / "adapter_model.safetensors").exists()
            assert read_bundle(await lab.orchestrator.publisher.bundle(job)).files

    run(scenario)


def test_a_job_frozen_in_its_last_moment_has_failed_whatever_it_learnt(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path, allow_local_models=True) as lab:

            async def play(job_run: JobRun) -> str:
                await job_run._state_environments()
                freeze(lab, job_run.job_id)
                return ""

            monkeypatch.setattr(JobRun, "run", play)
            job = await submitted(lab, base)
            await lab.orchestrator.jobs.start(job)
            row = await ended(lab, job)
            assert (row.state, lab.chain.escrows[job].epoch) == ("failed", 0)
            assert "nothing more is leased or paid" in row.reason
            kinds = [event.type for event in await lab.orchestrator.journal.events(job, 0)]
            assert kinds[-3:] == ["model_published", "escrow_closed", "job_failed"]

    run(scenario)


def test_a_freeze_is_seen_where_there_is_nothing_to_post(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            assert await lab.orchestrator.settler.settle(job) is False
            freeze(lab, job)
            with pytest.raises(JobFrozen) as caught:
                await lab.orchestrator.settler.settle(job)
            assert caught.value.code == "job_frozen"

    run(scenario)
