"""The order of a job's offers: what the learner waits for goes first, and not for long."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from learning_fixtures import write_base
from orchestrator_jobs import ended, submitted
from orchestrator_lab import TIMEOUT_S, open_lab, run, until

from shoal.orchestrator import jobrun
from shoal.orchestrator.batches import Batch, Scored
from shoal.orchestrator.jobrun import JobRun
from shoal.protocol.market import TaskKind
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
