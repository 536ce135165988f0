"""Jobs arriving: what is refused and why, and which money starts a job."""

from __future__ import annotations

import asyncio
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from learning_fixtures import write_base
from orchestrator_chain import FUNDED_MICROS
from orchestrator_lab import DOMAIN, TIMEOUT_S, Lab, open_lab, run
from sqlalchemy import select

from shoal.orchestrator import intake
from shoal.orchestrator.intake import Intake, pause_s
from shoal.orchestrator.store.tables import JobRow
from shoal.protocol.errors import InvalidRequest, NotFound, OverBudget, Unauthorised
from shoal.protocol.job import BudgetSpec, EnvSpec, EvalSpec, Job, JobState, TaskSizes
from shoal.protocol.signing import Signed, sign
from shoal.rl.base_models import fetch_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_base(tmp_path_factory.mktemp("base")))


class Desk:
    """An intake whose started jobs are only noted."""

    def __init__(self, lab: Lab, model: str) -> None:
        self.lab, self.model = lab, model
        self.started: list[str] = []

        async def start(job_id: str) -> None:
            self.started.append(job_id)

        self.intake = Intake(lab.context, lab.orchestrator.journal, start)

    def job(self, **spec: Any) -> Signed[Job]:
        return self.lab.make_job(**{"model": self.model, **spec})

    async def funding(self, **escrow: Any) -> JobRow:
        """The job's row after one look at an escrow with these terms."""
        row = await self.intake.submit(self.job())
        fields = {"coordinator": self.lab.context.account.address, **escrow}
        self.lab.chain.open(row.job_id, **fields)
        await self.look()
        return await self.intake.require(row.job_id)

    async def look(self) -> None:
        for row in await self.lab.context.database.run(
            lambda s: s.scalars(select(JobRow).where(JobRow.state == "funding")).all()
        ):
            await self.intake._check_funding(row)


def test_a_job_is_kept_with_its_base_and_waits_for_money(tmp_path: Path, base: str) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path, allow_local_models=True) as lab:
            desk = Desk(lab, base)
            row = await desk.intake.submit(desk.job())
            assert row.state == JobState.FUNDING.value
            assert "model.safetensors" in row.base
            assert lab.context.blobs.total_bytes > 1_000_000
            events = await lab.orchestrator.journal.events(row.job_id, 0)
            assert [event.type for event in events] == ["job_received"]
            await desk.look()
            assert desk.started == []

    run(scenario)


def test_the_same_job_is_kept_once_even_at_the_same_time(tmp_path: Path, base: str) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path, allow_local_models=True) as lab:
            desk = Desk(lab, base)
            job = desk.job()
            rows = await asyncio.gather(*(desk.intake.submit(job) for _ in range(3)))
            again = await desk.intake.submit(job)
            assert {row.job_id for row in (*rows, again)} == {job.record.job_id()}
            assert len(await lab.rows(JobRow)) == 1

    run(scenario)


def test_a_job_nobody_paid_for_yet_holds_no_room(tmp_path: Path, base: str) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path, allow_local_models=True) as lab:
            await Desk(lab, base).intake.submit(lab.make_job(model=base))
            assert lab.context.blobs._pins == {}

    run(scenario)


def test_a_job_whose_model_takes_long_holds_up_nothing_else(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path, allow_local_models=True) as lab:
            downloading, done = threading.Event(), threading.Event()

            def slowly(model: str, *args: Any, **options: Any) -> Path:
                if model == base:
                    downloading.set()
                    done.wait(TIMEOUT_S)
                return fetch_base(model, *args, **options)

            monkeypatch.setattr(intake, "fetch_base", slowly)
            other = str(shutil.copytree(base, tmp_path / "other"))
            desk = Desk(lab, base)
            submitting = asyncio.create_task(desk.intake.submit(desk.job()))
            await asyncio.to_thread(downloading.wait, TIMEOUT_S)
            async with asyncio.timeout(TIMEOUT_S):
                await lab.context.computed(lambda: None)
                quick = await desk.intake.submit(desk.job(model=other))
            assert quick.state == JobState.FUNDING.value
            assert not submitting.done()
            done.set()
            assert (await submitting).state == JobState.FUNDING.value

    run(scenario)


def test_a_job_signed_by_another_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            desk = Desk(lab, "builtin:tiny-addition")
            forged = sign(desk.job().record, DOMAIN, lab.context.account)
            with pytest.raises(Unauthorised):
                await desk.intake.submit(forged)
            assert await lab.rows(JobRow) == []

    run(scenario)


@pytest.mark.parametrize(
    ("spec", "error", "code", "says"),
    [
        (
            {"environments": (EnvSpec(id="additoin"),)},
            InvalidRequest,
            "unknown_environment",
            "'addition'",
        ),
        (
            {"environments": (EnvSpec(id="addition", args={"digit": 2}),)},
            InvalidRequest,
            "invalid_environment_argument",
            "'digits'",
        ),
        ({"model": "builtin:tiny-additoin"}, InvalidRequest, "unreachable_model", "tiny-addition"),
        ({"model": "/no/such/folder"}, InvalidRequest, "unreachable_model", "no local paths"),
        (
            {
                "budget": BudgetSpec(
                    max_total_micros=7_999,
                    max_rollout_micros=1_000,
                    max_gradient_micros=1_000,
                    max_evaluate_micros=1_000,
                )
            },
            OverBudget,
            "budget_too_small",
            "0.008",
        ),
        (
            {"evaluation": EvalSpec(num_examples=65_536)},
            InvalidRequest,
            "too_few_prompts",
            "eval.num_examples",
        ),
        (
            {"batch_size": 4 * 513, "tasks": TaskSizes(gradient=1)},
            InvalidRequest,
            "batch_too_large",
            "tasks.gradient",
        ),
        (
            {
                "batch_size": 4 * 513,
                "tasks": TaskSizes(rollout=1, gradient=64),
                "dynamic_sampling_rounds": 1,
            },
            InvalidRequest,
            "batch_too_large",
            "tasks.rollout",
        ),
    ],
)
def test_a_job_that_cannot_run_is_refused_with_a_reason(
    tmp_path: Path, spec: dict[str, Any], error: type[InvalidRequest], code: str, says: str
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            desk = Desk(lab, "builtin:tiny-addition")
            with pytest.raises(error) as caught:
                await desk.intake.submit(desk.job(**spec))
            assert caught.value.code == code
            assert says in caught.value.message
            assert await lab.rows(JobRow) == []

    run(scenario)


def test_a_budget_for_exactly_one_update_is_enough(tmp_path: Path, base: str) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path, allow_local_models=True) as lab:
            desk = Desk(lab, base)
            budget = BudgetSpec(
                max_total_micros=8_000,
                max_rollout_micros=1_000,
                max_gradient_micros=1_000,
                max_evaluate_micros=1_000,
            )
            await desk.intake.submit(desk.job(budget=budget))

    run(scenario)


def test_a_model_other_than_the_pinned_one_is_refused(tmp_path: Path, base: str) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path, allow_local_models=True) as lab:
            desk = Desk(lab, base)
            with pytest.raises(InvalidRequest) as caught:
                await desk.intake.submit(desk.job(model_sha256="a" * 64))
            assert caught.value.code == "model_changed"

    run(scenario)


def test_a_base_too_large_to_travel_whole_is_refused(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path, allow_local_models=True) as lab:
            desk = Desk(lab, base)
            await desk.intake.submit(desk.job(lora=None))
            monkeypatch.setattr("shoal.orchestrator.intake.MAX_ADAPTER_BYTES", 1000)
            await desk.intake.submit(desk.job())
            with pytest.raises(InvalidRequest, match="Train an adapter") as caught:
                await desk.intake.submit(desk.job(lora=None))
            assert caught.value.code == "policy_too_large"

    run(scenario)


def test_a_funded_job_starts_once_with_its_budget_and_no_more(tmp_path: Path, base: str) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path, allow_local_models=True) as lab:
            desk = Desk(lab, base)
            row = await desk.funding(funded_micros=FUNDED_MICROS + 500)
            assert (row.state, row.funded_micros) == (JobState.RUNNING.value, FUNDED_MICROS)
            await desk.look()
            assert desk.started == [row.job_id]
            events = await lab.orchestrator.journal.events(row.job_id, 0)
            assert events[-1].type == "job_funded"

    run(scenario)


@pytest.mark.parametrize(
    ("escrow", "says"),
    [
        ({"funded_micros": FUNDED_MICROS - 1}, "0.999999"),
        ({"coordinator": "0x" + "9" * 40}, "another orchestrator"),
        ({"deadline_s": 1_700_000_000}, "may be refunded"),
        ({"closed": True}, "may be refunded"),
    ],
)
def test_an_escrow_that_cannot_pay_fails_the_job(
    tmp_path: Path, base: str, escrow: dict[str, Any], says: str
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path, allow_local_models=True) as lab:
            desk = Desk(lab, base)
            row = await desk.funding(**escrow)
            assert row.state == JobState.FAILED.value
            assert says in row.reason
            assert row.finished_ms is not None
            assert desk.started == []
            events = await lab.orchestrator.journal.events(row.job_id, 0)
            assert events[-1].type == "job_failed"

    run(scenario)


def test_a_job_nobody_funds_is_given_up_after_an_hour(tmp_path: Path, base: str) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path, allow_local_models=True) as lab:
            desk = Desk(lab, base)
            row = await desk.intake.submit(desk.job())
            lab.time.advance(3_600_000)
            await desk.look()
            assert (await desk.intake.require(row.job_id)).state == JobState.FUNDING.value
            lab.time.advance(1)
            await desk.look()
            assert "never opened" in (await desk.intake.require(row.job_id)).reason

    run(scenario)


def test_funding_is_watched_through_a_chain_that_comes_and_goes(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.orchestrator.intake._FUNDING_POLL_S", 0.001)

    async def scenario() -> None:
        async with open_lab(tmp_path, allow_local_models=True) as lab:
            started: asyncio.Queue[str] = asyncio.Queue()
            intake = Intake(lab.context, lab.orchestrator.journal, started.put)
            row = await intake.submit(Desk(lab, base).job())
            asked = asyncio.Event()
            answer = lab.chain.answer

            def ask() -> None:
                asked.set()
                answer()

            monkeypatch.setattr(lab.chain, "answer", ask)
            lab.chain.down = True
            lab.start(intake.watch_funding())
            await asked.wait()
            lab.chain.open(row.job_id, lab.context.account.address)
            lab.chain.down = False
            assert await started.get() == row.job_id

    run(scenario)


def test_a_job_nobody_submitted_is_not_found(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            with pytest.raises(NotFound) as caught:
                await lab.orchestrator.intake.require("0x" + "0" * 64)
            assert caught.value.code == "no_job"

    run(scenario)


def test_an_escrow_is_looked_for_the_less_often_the_longer_it_is_missing() -> None:
    def pauses(*ages_s: float) -> float:
        now_ms = 1_000_000
        return pause_s([JobRow(created_ms=now_ms - int(1000 * age_s)) for age_s in ages_s], now_ms)

    assert pauses() == pauses(0) == pauses(0.1) == 0.03
    assert pauses(1) == pytest.approx(0.1)
    assert pauses(4) == pytest.approx(0.4)
    assert pauses(5) == pauses(3600) == 0.5
    # One that has just come does not wait for those whose requesters take their time.
    assert pauses(3600, 0) == pauses(0)
