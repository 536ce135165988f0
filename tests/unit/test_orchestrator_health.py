"""What the market did between two updates is counted once; what is wrong becomes an event."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from learning_fixtures import make_spec
from orchestrator_lab import Lab, open_lab, run
from sqlalchemy import Select, text
from sqlalchemy.dialects import sqlite

from shoal.market.lease import LeaseState
from shoal.orchestrator import health as health_module
from shoal.orchestrator.evaluations import Evaluations
from shoal.orchestrator.health import JobHealth
from shoal.orchestrator.store.tables import LeaseRow, LotRow
from shoal.orchestrator.views import wrong_now
from shoal.protocol.ids import new_id
from shoal.protocol.job import EnvSpec
from shoal.protocol.market import TaskKind
from shoal.rl.health import WINDOW, HealthCode

SECOND_MS = 1_000


async def nothing(version: int) -> None:
    """No best version is kept here."""


def health_of(lab: Lab, job_id: str) -> tuple[JobHealth, Evaluations]:
    spec = make_spec(environments=(EnvSpec(id="addition"), EnvSpec(id="addition")))
    unused = cast(Any, None)
    journal = lab.orchestrator.journal
    evaluations = Evaluations(lab.context, journal, unused, unused, spec, nothing)
    return JobHealth(lab.context, journal, job_id, spec, evaluations), evaluations


async def add_lease(
    lab: Lab,
    job_id: str,
    state: LeaseState,
    *,
    kind: TaskKind = TaskKind.ROLLOUT,
    account: str = "0x1",
    units: int = 4,
    pay_micros: int = 0,
) -> None:
    lot_id = new_id("lot")
    rows = [
        LotRow(lot_id=lot_id, job_id=job_id, record="", opened_ms=0),
        LeaseRow(
            lease_id=new_id("lease"),
            lease_epoch=1,
            lot_id=lot_id,
            job_id=job_id,
            task_id=new_id("task"),
            kind=kind.value,
            account=account,
            node="node",
            num_units=units,
            unit_price_micros=1,
            state=state.value,
            record="",
            issued_ms=0,
            ended_ms=lab.time.now_ms() if state.is_final else None,
            pay_micros=pay_micros,
        ),
    ]

    def write(session: Any) -> None:
        session.add(rows[0])
        session.flush()
        session.add(rows[1])

    await lab.context.database.run(write)


def test_each_lease_counts_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job_id = await lab.add_job()
            await add_lease(lab, job_id, LeaseState.ACCEPTED, pay_micros=1_000)
            lab.time.advance(SECOND_MS)
            health, _ = health_of(lab, job_id)
            for account in ("0x1", "0x2"):
                await add_lease(lab, job_id, LeaseState.ACCEPTED, account=account, pay_micros=40)
            await add_lease(lab, job_id, LeaseState.REJECTED, account="0x3")
            await add_lease(lab, job_id, LeaseState.RUNNING, kind=TaskKind.GRADIENT, account="0x4")
            lab.time.advance(2 * SECOND_MS)
            first = await health.market_metrics()
            assert first["market/spent"] == 1_080
            assert first["market/unit_price"] == 10
            assert first["market/tasks_inflight"] == 1
            assert first["market/tasks_rejected"] == 1
            assert first["market/verify_fail_rate"] == pytest.approx(1 / 3)
            assert first["market/providers_active"] == 3
            lab.time.advance(2 * SECOND_MS)
            again = await health.market_metrics()
            assert again["market/spent"] == 1_080
            assert again["market/tasks_rejected"] == 0
            assert again["market/verify_fail_rate"] == 0
            assert "market/unit_price" not in again

    run(scenario)


def test_failures_are_counted_by_cause(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job_id = await lab.add_job()
            health, _ = health_of(lab, job_id)
            journal = lab.orchestrator.journal
            for cause in ("not_finite", "environment", "environment"):
                await journal.event(job_id, "lease_failed", {"cause": cause, "reason": "…"})
            failed = "form: could not be judged: The grader of 'x' failed on a completion"
            for reason in ("policy: computed under abc", "logprobs: 0.3", "form: no", failed):
                await journal.event(job_id, "result_rejected", {"reason": reason})
            lab.time.advance(2 * SECOND_MS)
            metrics = await health.market_metrics()
            assert metrics["market/failed/not_finite"] == 1
            assert metrics["market/failed/environment"] == 3
            assert metrics["market/rejected_wrong_weights"] == 2

    run(scenario)


@pytest.mark.parametrize(
    ("statement", "looked_up"),
    [
        (health_module._LIVE_LEASES, "(job_id=? AND ended_ms=?)"),
        (health_module._ENDED_LEASES, "(job_id=? AND ended_ms>? AND ended_ms<?)"),
        (health_module._FAILURES, "(job_id=? AND type=? AND at_ms>? AND at_ms<?)"),
    ],
)
def test_an_update_looks_at_nothing_that_ended_before_the_last(
    tmp_path: Path, statement: Select[Any], looked_up: str
) -> None:
    stretch = {"job_id": "0x1", "since_ms": 1, "until_ms": 2}
    given = {name: stretch[name] for name in statement.compile().params.keys() & stretch}
    query = statement.params(given).compile(
        dialect=sqlite.dialect(), compile_kwargs={"literal_binds": True}
    )

    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            plan = await lab.context.database.run(
                lambda session: session.execute(text(f"EXPLAIN QUERY PLAN {query}")).all()
            )
            assert looked_up in plan[0].detail

    run(scenario)


async def told(lab: Lab, job_id: str) -> list[dict[str, Any]]:
    events = await lab.orchestrator.journal.events(job_id, 0)
    return [event.data for event in events if event.type == "health"]


async def wrong(lab: Lab, job_id: str) -> list[dict[str, Any]]:
    return await lab.context.database.run(lambda session: wrong_now(session, job_id))


def test_a_diagnosis_is_an_event_when_it_begins_and_when_it_ends(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job_id = await lab.add_job()
            health, _ = health_of(lab, job_id)
            for step in range(1, 3 * WINDOW + 1):
                cut = 0.9 if step <= WINDOW else 0.0
                await health.see({"step": float(step), "completions/clipped_ratio": cut})
                if step == WINDOW:
                    (begun,) = await wrong(lab, job_id)
                    assert begun["code"] == HealthCode.COMPLETIONS_TRUNCATED
                    assert begun["policy_version"] == WINDOW
            changes = await told(lab, job_id)
            assert [change["active"] for change in changes] == [True, False]
            assert "raise sampling.max_tokens" in changes[0]["remedy"]
            assert await wrong(lab, job_id) == []

    run(scenario)


def test_what_was_wrong_before_a_restart_is_not_known_to_be_wrong_after_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job_id = await lab.add_job()
            journal, seen = lab.orchestrator.journal, []
            for event in ("health", "job_resumed", "health"):
                facts = {"code": "no_spread", "active": True} if event == "health" else {}
                await journal.event(job_id, event, facts)
                seen.append(len(await wrong(lab, job_id)))
            assert seen == [1, 0, 1]

    run(scenario)


def test_evaluations_reported_before_a_restart_count_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job_id = await lab.add_job()
            _, evaluations = health_of(lab, job_id)
            for version, accuracy in ((5, 0.4), (0, 0.2)):
                await lab.orchestrator.journal.event(
                    job_id,
                    "evaluation",
                    {
                        "policy_version": version,
                        "accuracy": accuracy,
                        "accuracy_low": accuracy - 0.1,
                        "accuracy_high": accuracy + 0.1,
                        "statements": [],
                    },
                )
            await evaluations.restore(job_id, [0, 5, 10])
            assert evaluations.is_reported(5)
            assert not evaluations.is_reported(10)
            assert evaluations.standings.best_version == 5

    run(scenario)
