"""How jobs begin and end: crashes, restarts, cancellations; what is done is paid for."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deliveries import made_up_delivery
from eth_account import Account
from learning_fixtures import write_base
from orchestrator_chain import MemoryChain
from orchestrator_jobs import ended, submitted
from orchestrator_lab import DOMAIN, TIMEOUT_S, Sale, open_lab, run, until
from orchestrator_pay import ALICE, pay
from sqlalchemy.exc import OperationalError

from shoal.network.identity import NodeIdentity
from shoal.orchestrator import job_escrow
from shoal.orchestrator import jobs as jobs_module
from shoal.orchestrator.jobrun import JobRun
from shoal.orchestrator.jobs import Jobs
from shoal.orchestrator.learner import Learner
from shoal.orchestrator.publisher import Publisher
from shoal.orchestrator.store.database import Database, DatabaseDown
from shoal.orchestrator.store.tables import JobRow
from shoal.protocol.errors import (
    ChainRejected,
    InvalidRequest,
    InvariantBroken,
    OverBudget,
)
from shoal.protocol.job import JobCommand, JobCommandKind, TaskSizes
from shoal.protocol.node import OpenJob
from shoal.protocol.policy import BaseModelRef, PolicyVersion
from shoal.protocol.signing import sign
from shoal.provenance.bundle import read_bundle
from shoal.provenance.verifier import verify_bundle
from shoal.rl.verification import EvaluateVerification

Play = Callable[[JobRun], Awaitable[None]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_base(tmp_path_factory.mktemp("base")))


def plays(monkeypatch: pytest.MonkeyPatch, play: Play) -> None:
    """Every job's run is ``play`` instead of training."""

    async def run(job_run: JobRun) -> str:
        await play(job_run)
        return ""

    monkeypatch.setattr(JobRun, "run", run)


@pytest.mark.parametrize(
    ("failure", "state", "reason", "closed"),
    [
        (RuntimeError("secret internals"), "failed", "a defect of the orchestrator", True),
        (InvalidRequest("The grader failed."), "failed", "The grader failed.", True),
        (OverBudget("No money is left."), "paused", "No money is left.", False),
        (None, "complete", "", True),
    ],
)
def test_every_end_is_orderly(
    tmp_path: Path,
    base: str,
    monkeypatch: pytest.MonkeyPatch,
    failure: Exception | None,
    state: str,
    reason: str,
    closed: bool,
) -> None:
    sales: list[Sale] = []

    async def scenario() -> None:
        async with open_lab(tmp_path, allow_local_models=True) as lab:

            async def play(job_run: JobRun) -> None:
                await job_run._state_environments()
                sales.append(await lab.open_sale(job_run.job_id))
                if failure is not None:
                    raise failure

            plays(monkeypatch, play)
            peer = await lab.peer()
            job = await submitted(lab, base)
            await lab.orchestrator.jobs.start(job)
            row = await ended(lab, job)
            assert (row.state, row.reason.startswith(reason)) == (state, True)
            assert "secret" not in row.reason
            assert lab.chain.escrows[job].closed is closed
            assert lab.chain.escrows[job].epoch == 1
            assert sales[0].workload.closed
            assert lab.orchestrator.jobs.open_jobs() == []
            # Nothing of it is sold any more, to whoever bids now.
            await peer.bid()
            auction = lab.start(lab.orchestrator.auctioneer.run())
            await asyncio.sleep(0)
            assert sales[0].workload.waiting == [(0, 1)]
            assert not auction.done()
            events = await lab.orchestrator.journal.events(job, 0)
            assert events[-1].type == f"job_{state}"
            bundle = read_bundle(await lab.orchestrator.publisher.bundle(job))
            folder = lab.orchestrator.jobs.run_dir(job) / "adapter"
            report = verify_bundle(bundle, folder)
            assert report.passed, report.text()

    run(scenario)


@pytest.mark.parametrize("loads", [True, False])
def test_workers_hear_of_a_job_while_its_policy_is_being_loaded(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch, loads: bool
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path, allow_local_models=True) as lab:
            open_jobs = lab.orchestrator.jobs.open_jobs
            announced: list[str] = []
            begun, may_end = asyncio.Event(), threading.Event()
            loop = asyncio.get_running_loop()

            def slowly(*arguments: Any) -> Learner:
                loop.call_soon_threadsafe(begun.set)
                may_end.wait(TIMEOUT_S)
                if not loads:
                    raise InvalidRequest("The model does not load.")
                return Learner(*arguments)

            listed: list[OpenJob] = []

            async def play(job_run: JobRun) -> None:
                await job_run._state_environments()
                listed.extend(open_jobs())

            plays(monkeypatch, play)
            monkeypatch.setattr("shoal.orchestrator.jobs.Learner", slowly)
            monkeypatch.setattr(lab.orchestrator.auctioneer.announcer, "job", announced.append)
            job = await submitted(lab, base)
            await lab.orchestrator.jobs.start(job)
            await begun.wait()
            early = open_jobs()
            assert ([open_job.job_id for open_job in early], announced) == ([job], [job])
            # Its base can be fetched, by a description that is there.
            described = BaseModelRef.decode(lab.context.blobs.read(early[0].base.sha256))
            assert all(lab.context.blobs.has(file.blob.sha256) for file in described.files)
            may_end.set()
            row = await ended(lab, job)
            # What workers prepare for is what they find.
            assert listed == (early if loads else [])
            assert (row.state, open_jobs()) == ("complete" if loads else "failed", [])

    run(scenario)


@pytest.mark.parametrize("refuses", ["once mined", "always"])
def test_a_transaction_that_fails_in_its_block_is_sent_again_and_a_refusal_is_an_end(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch, refuses: str
) -> None:
    monkeypatch.setattr(job_escrow, "_CHAIN_RETRY_S", 0)

    async def scenario() -> None:
        async with open_lab(tmp_path, allow_local_models=True) as lab:

            async def play(job_run: JobRun) -> None:
                await job_run._state_environments()

            honest, failed = lab.chain.run, set[bytes]()

            def meddle(data: bytes, tx_hash: str, *, commit: bool) -> None:
                if refuses == "always" or (commit and data[:1] not in failed):
                    failed.add(data[:1])
                    raise ChainRejected("The escrow ran dry.", reason="OutOfGas")
                honest(data, tx_hash, commit=commit)

            plays(monkeypatch, play)
            monkeypatch.setattr(lab.chain, "run", meddle)
            job = await submitted(lab, base)
            await lab.orchestrator.jobs.start(job)
            row = await ended(lab, job)
            escrow = lab.chain.escrows[job]
            if refuses == "always":
                assert (row.state, row.reason) == ("failed", "The escrow ran dry.")
                assert (escrow.epoch, escrow.closed) == (0, False)
            else:
                # The posting and the closing failed once each, and both were done after all.
                assert failed == {b"p", b"c"}
                assert (row.state, escrow.epoch, escrow.closed) == ("complete", 1, True)

    run(scenario)


def test_a_model_that_cannot_be_published_still_pays_its_workers(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path, allow_local_models=True) as lab:

            async def play(job_run: JobRun) -> None:
                await job_run._state_environments()

            async def fail(*_: object) -> None:
                raise OSError("the disk is full")

            plays(monkeypatch, play)
            monkeypatch.setattr(Publisher, "publish", fail)
            job = await submitted(lab, base)
            await lab.orchestrator.jobs.start(job)
            row = await ended(lab, job)
            assert row.state == "failed"
            assert (lab.chain.escrows[job].epoch, lab.chain.escrows[job].closed) == (1, True)

    run(scenario)


@pytest.mark.parametrize("has_learnt", [False, True])
def test_a_base_that_changed_since_the_job_began_is_found_out(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch, has_learnt: bool
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path, allow_local_models=True) as lab:

            async def never(job_run: JobRun) -> None:
                raise AssertionError("a job must not go on with another base")

            plays(monkeypatch, never)
            copy = shutil.copytree(base, tmp_path / "base")
            job = await submitted(lab, str(copy))

            def learn(session: Any) -> None:
                session.get_one(JobRow, job).policy_version = int(has_learnt)

            await lab.context.database.run(learn)
            config = copy / "config.json"
            config.write_text(config.read_text() + "\n")
            await lab.orchestrator.jobs.start(job)
            row = await ended(lab, job)
            # What it has learnt may be saved by who brings the files back.
            assert row.state == ("paused" if has_learnt else "failed")
            assert "bring back the files" in row.reason
            assert lab.chain.escrows[job].closed is not has_learnt

    run(scenario)


def test_a_restart_while_settling_goes_on_to_the_same_end_and_releases_once(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = NodeIdentity.generate()

    async def begin() -> tuple[str, Any, MemoryChain]:
        async with open_lab(tmp_path, allow_local_models=True, identity=node) as lab:

            async def play(job_run: JobRun) -> None:
                await job_run._state_environments()
                raise OverBudget("No money is left.")

            plays(monkeypatch, play)
            job = await submitted(lab, base)
            lab.chain.down = True
            await lab.orchestrator.jobs.start(job)
            journal = lab.orchestrator.journal
            while True:
                change = journal.next_change(job)
                if any(e.type == "model_published" for e in await journal.events(job, 0)):
                    return job, lab.context.account, lab.chain
                await change.wait()

    job, account, chain = run(begin)
    chain.down = False

    async def go_on() -> None:
        async with open_lab(
            tmp_path, allow_local_models=True, identity=node, account=account, chain=chain
        ) as lab:

            async def never(job_run: JobRun) -> None:
                raise AssertionError("a job that is being settled must not train on")

            plays(monkeypatch, never)
            await lab.orchestrator.jobs.resume()
            row = await ended(lab, job)
            assert (row.state, row.reason) == ("paused", "No money is left.")
            kinds = [row.kind for row in await lab.statements()]
            assert kinds == ["environment", "release"]
            assert lab.chain.escrows[job].epoch == 1

    run(go_on)


def test_a_job_that_loses_the_database_ends_the_process_and_goes_on_in_the_next(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain, account, identity = MemoryChain(), Account.create(), NodeIdentity.generate()
    honest, losses = Database.run_now, ["JobHealth", "Settler.adopt"]

    def run_now(database: Database, work: Any) -> Any:
        if losses and work.__qualname__.startswith(losses[0]):
            losses.pop(0)
            raise OperationalError("SELECT", {}, Exception("the database is starting up"))
        return honest(database, work)

    async def process() -> JobRow:
        async with open_lab(
            tmp_path, account=account, identity=identity, chain=chain, allow_local_models=True
        ) as lab:

            async def play(job_run: JobRun) -> None:
                if not chain.posted and len(losses) == 2:
                    await pay(lab, job_run.job_id, ALICE, 300)
                # As every update does.
                await job_run._health.market_metrics()

            plays(monkeypatch, play)
            if jobs:
                await lab.orchestrator.jobs.resume()
            else:
                jobs.append(await submitted(lab, base))
                await lab.orchestrator.jobs.start(jobs[0])
            row = await ended(lab, jobs[0])
            if row.state == "running":
                with pytest.raises(DatabaseDown, match="starting up"):
                    await lab.orchestrator.jobs.watch()
            return row

    jobs: list[str] = []
    monkeypatch.setattr(Database, "run_now", run_now)
    assert [run(process).state for _ in range(3)] == ["running", "running", "complete"]
    assert losses == []
    assert (chain.escrows[jobs[0]].committed_micros, chain.escrows[jobs[0]].closed) == (300, True)


def test_a_defect_outside_a_run_still_pays_for_what_was_accepted(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path, allow_local_models=True) as lab:

            async def play(job_run: JobRun) -> None:
                await pay(lab, job_run.job_id, ALICE, 300)

            async def broken(*_: object) -> None:
                raise RuntimeError("secret internals")

            plays(monkeypatch, play)
            monkeypatch.setattr(Jobs, "_drain", broken)
            job = await submitted(lab, base)
            await lab.orchestrator.jobs.start(job)
            row = await ended(lab, job)
            assert (row.state, row.reason) == ("failed", jobs_module._DEFECT)
            escrow = lab.chain.escrows[job]
            assert (escrow.committed_micros, escrow.closed) == (300, True)

    run(scenario)


def test_a_job_that_is_over_holds_no_room_but_its_release(tmp_path: Path, base: str) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path, allow_local_models=True) as lab:
            job = await submitted(lab, base, max_steps=1)
            await lab.orchestrator.jobs.start(job)
            await until(lambda: bool(lab.orchestrator.jobs.running_ids()))
            held = set(lab.context.blobs._pins)
            row = await lab.orchestrator.intake.require(job)
            files = {file.blob.sha256 for file in BaseModelRef.model_validate_json(row.base).files}
            assert files < held
            command = JobCommand(job_id=job, kind=JobCommandKind.CANCEL)
            await lab.orchestrator.jobs.cancel(sign(command, DOMAIN, lab.requester))
            assert (await ended(lab, job)).state == "cancelled"
            released = {file.blob.sha256 for file in lab.orchestrator.publisher.files(job)}
            assert set(lab.context.blobs._pins) == released

    run(scenario)


def test_an_evaluation_is_told_once_all_its_prompts_are_scored(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path, allow_local_models=True) as lab:
            seen: list[JobRun] = []

            async def play(job_run: JobRun) -> None:
                seen.append(job_run)
                policy: PolicyVersion = job_run._current()
                await job_run.evaluations.start(policy)
                (workload,) = lab.orchestrator.auctioneer._open
                assert workload.waiting == [(0, 1, 2), (3, 4, 5), (6, 7)]
                for units, reward in zip(list(workload.waiting), (1.0, 0.0, 0.0), strict=True):
                    evaluation = job_run.evaluations.all[0]
                    assert not evaluation.complete.is_set()
                    rewards = np.full(len(units), reward, dtype=np.float32)
                    payload = EvaluateVerification(checks=(), rewards=rewards)
                    await workload.accept(made_up_delivery(units, payload))
                await job_run.evaluations.finish()
                with pytest.raises(InvariantBroken):
                    await workload.deliver(made_up_delivery((0,), object()))

            plays(monkeypatch, play)
            job = await submitted(lab, base, tasks=TaskSizes(evaluate=3))
            await lab.orchestrator.jobs.start(job)
            assert (await ended(lab, job)).state == "complete"
            events = await lab.orchestrator.journal.events(job, 0)
            (told,) = [event.data for event in events if event.type == "evaluation"]
            due = {"policy_version": 0, "accuracy": 3 / 8, "num_examples": 8}
            assert told.items() >= due.items()
            assert seen[0].evaluations.all[0].accuracy == 3 / 8

    run(scenario)
