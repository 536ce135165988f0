"""The order of a job's offers: what the learner waits for goes first, and not for long."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path

import numpy as np
import pytest
from learning_fixtures import write_base
from orchestrator_jobs import ended, submitted
from orchestrator_lab import TIMEOUT_S, open_lab, run, until
from sqlalchemy import select

from shoal.orchestrator import jobrun
from shoal.orchestrator.batches import Batch, Scored
from shoal.orchestrator.jobrun import JobRun
from shoal.orchestrator.store.tables import StatementRow
from shoal.orchestrator.versions import VersionRecords
from shoal.orchestrator.workload import Delivery, Workload
from shoal.protocol.errors import Unavailable
from shoal.protocol.market import TaskKind
from shoal.provenance.statement import StatementKind, UpdatePredicate
from shoal.rl.gradient import Group


def whole_batch() -> Batch:
    """Batch 0, of one group that teaches."""
    group = Group(
        prompt=np.array([1, 2], np.int32),
        token_ids=(np.array([3], np.int32), np.array([4], np.int32)),
        logprobs=(np.array([-0.5], np.float32), np.array([-0.5], np.float32)),
        truncated=np.zeros(2, np.bool_),
        advantages=np.array([1.0, -1.0], np.float32),
        teaching=np.ones(2, np.bool_),
    )
    batch = Batch(number=0, num_groups=1)
    scored = Scored(group=group, environment=0, rewards=(1.0, 0.0), policy_version=0)
    batch.add([0], [scored], "a" * 64)
    return batch


@pytest.mark.parametrize("answered", [True, False])
def test_rollouts_are_offered_once_a_worker_has_the_gradient_or_after_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answered: bool
) -> None:
    monkeypatch.setattr(jobrun, "_HEAD_START_S", TIMEOUT_S if answered else 0.0)

    async def scenario() -> None:
        async with open_lab(tmp_path, allow_local_models=True) as lab:
            on_market = lab.orchestrator.auctioneer._open

            async def play(job_run: JobRun) -> str:
                batch = whole_batch()
                job_run._sampler._batches[0] = batch
                job_run._sampler.begin(1)
                job_run._slicer.begin(batch)
                offering = asyncio.create_task(job_run._next_gradient(0))
                await until(lambda: bool(on_market))
                if answered:
                    await asyncio.wait((offering,), timeout=0.05)
                    assert [workload.kind for workload in on_market] == [TaskKind.GRADIENT]
                    on_market[0].handed_out.set()
                async with asyncio.timeout(TIMEOUT_S):
                    await offering
                kinds = [workload.kind for workload in on_market]
                assert kinds == [TaskKind.GRADIENT, TaskKind.ROLLOUT]
                return ""

            monkeypatch.setattr(JobRun, "run", play)
            base = str(write_base(tmp_path / "base"))
            job = await submitted(lab, base, max_staleness=1, max_steps=5)
            await lab.orchestrator.jobs.start(job)
            assert (await ended(lab, job)).state == "complete"

    run(scenario)


async def published(
    job_run: JobRun,
    monkeypatch: pytest.MonkeyPatch,
    before_checkpoint: Callable[[], object] = lambda: None,
    *,
    recorded: bool = False,
) -> Workload:
    """The job's first update is published, perhaps for the second time; work under it."""
    learner = job_run.learner
    learner.checkpoint(0)
    policy = learner.publish(1, job_run._context.blobs)
    if recorded:
        await job_run._records.begin(policy)
        await job_run._records.newest()
    checkpoint = learner.checkpoint

    def late(version: int, older: Collection[int] = ()) -> Path:
        before_checkpoint()
        return checkpoint(version, older)

    facts = UpdatePredicate(
        job_id=job_run.job_id,
        batch=0,
        parent=job_run._current(),
        policy=policy,
        rollouts=(),
        gradients=(),
        num_tokens=0,
        optimizer_sha256="a" * 64,
    )
    monkeypatch.setattr(learner, "checkpoint", late)
    await job_run._publish(policy, facts, {"reward": 0.0})

    async def deliver(_: Delivery) -> None:
        """Nothing is."""

    return job_run._planner.evaluation(policy, job_run._planner.held_out(), deliver)


async def play_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, play: Callable[[JobRun], Awaitable[None]]
) -> None:
    """``play`` has the run of a job that stands at its first version."""

    async def played(job_run: JobRun) -> str:
        await play(job_run)
        return ""

    async with open_lab(tmp_path, allow_local_models=True) as lab:
        monkeypatch.setattr(JobRun, "run", played)
        job = await submitted(lab, str(write_base(tmp_path / "base")), max_steps=5)
        await lab.orchestrator.jobs.start(job)
        assert (await ended(lab, job)).state == "complete"


def test_nothing_done_under_a_version_is_judged_while_a_kill_would_lose_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def play(job_run: JobRun) -> None:
        goes_on = threading.Event()
        workload = await published(job_run, monkeypatch, lambda: goes_on.wait(TIMEOUT_S))
        assert workload.lot.lot_class.policy_sha256 == job_run._current().policy_sha256()
        assert (await workload.build_task(workload.waiting[0])).policy.version == 1
        waiting = asyncio.ensure_future(workload.restorable())
        await asyncio.wait((waiting,), timeout=0.05)
        assert not waiting.done()
        goes_on.set()
        async with asyncio.timeout(TIMEOUT_S):
            await waiting
        assert job_run.learner.resume(1, job_run._context.blobs)[-1].version == 1
        records = VersionRecords(job_run._context, job_run._journal, job_run.job_id)
        assert await records.newest() == 1
        await job_run._tidied()

    run(lambda: play_job(tmp_path, monkeypatch, play))


def test_an_epoch_that_turns_while_a_version_is_kept_does_not_close_without_its_statement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def play(job_run: JobRun) -> None:
        journal = job_run._journal
        closed = journal.open_epoch(job_run.job_id)
        workload = await published(job_run, monkeypatch, lambda: journal.turn_epoch(job_run.job_id))
        await workload.restorable()
        update = StatementRow.kind == StatementKind.UPDATE.value
        stated = await job_run._context.database.run(
            lambda session: session.scalars(select(StatementRow.epoch).where(update)).all()
        )
        assert stated == [closed + 1]
        await job_run._tidied()

    run(lambda: play_job(tmp_path, monkeypatch, play))


@pytest.mark.parametrize("recorded", [True, False])
def test_after_a_restart_work_is_recalled_until_an_update_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: bool
) -> None:
    async def play(job_run: JobRun) -> None:
        job_run._market.active = True
        await published(job_run, monkeypatch, recorded=recorded)
        assert job_run._market.active is recorded
        await job_run._tidied()

    run(lambda: play_job(tmp_path, monkeypatch, play))


def test_a_job_whose_version_cannot_be_kept_stops_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def play(job_run: JobRun) -> None:
        def fail() -> None:
            raise OSError("the disk is gone")

        workload = await published(job_run, monkeypatch, fail)
        with pytest.raises(Unavailable, match="could not be kept"):
            await workload.restorable()
        async with asyncio.timeout(TIMEOUT_S):
            with pytest.raises(OSError, match="the disk is gone"):
                await job_run._unless_halted(asyncio.Event().wait())

    run(lambda: play_job(tmp_path, monkeypatch, play))
