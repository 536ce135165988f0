"""Verdicts: what is paid, what is not, how often is looked, and that nothing stops the judge."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import safetensors.numpy
from learning_fixtures import Lab as School
from learning_fixtures import write_base
from orchestrator_court import court
from orchestrator_lab import open_lab, run, until

from shoal.market.lease import LeaseState
from shoal.orchestrator.audits import Audits
from shoal.orchestrator.store.tables import LeaseRow
from shoal.orchestrator.verifier import Verifier
from shoal.protocol.errors import InvalidRequest, InvariantBroken, Unavailable
from shoal.protocol.market import TaskKind
from shoal.protocol.task import RolloutTask
from shoal.provenance.dsse import Envelope
from shoal.provenance.statement import StatementKind, VerificationPredicate, decode
from shoal.rl import verification
from shoal.rl.rollout import run_rollout
from shoal.rl.verification import RolloutVerification


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory) -> School:
    return School.open(write_base(tmp_path_factory.mktemp("base")))


def test_honest_work_is_accepted_paid_stated_and_delivered(tmp_path: Path, school: School) -> None:
    async def scenario() -> None:
        async with court(tmp_path, school) as case:
            offer, live = await case.lease()
            message = case.honest(offer)
            verdict = await case.verdict(message, live)
            assert verdict.accepted, verdict.reason()
            assert (verdict.pay_micros, verdict.num_units, verdict.audited) == (200, 2, True)
            assert (case.ledger.owed_micros, case.ledger.held_micros) == (200, 0)
            delivery = case.sale.delivered[0]
            assert isinstance(delivery.payload, RolloutVerification)
            assert delivery.units == (0, 1)
            work, ruling = await case.lab.statements()
            assert (work.kind, work.contributor) == ("rollout-batch", case.peer.account.address)
            assert work.envelope == message.statement
            assert delivery.statement_sha256 == work.payload_sha256
            said = decode(Envelope.from_text(ruling.envelope).payload_bytes())
            assert said.kind is StatementKind.VERIFICATION
            assert isinstance(said.predicate, VerificationPredicate)
            assert said.predicate.verdict == verdict
            assert said.predicate.work_sha256 == work.payload_sha256
            row = await case.lab.lease_row(offer)
            assert (row.state, row.pay_micros, row.settlement_epoch) == ("accepted", 200, 1)
            assert row.result == message.result.encode().decode()
            assert row.receipt == message.receipt.encode().decode()
            # Sent again after the verdict, it is acknowledged and nothing more.
            await case.peer.submit(message)
            assert case.ledger.owed_micros == 200

    run(scenario)


def test_forged_logprobs_are_rejected_unpaid_and_done_again_by_another(
    tmp_path: Path, school: School
) -> None:
    async def scenario() -> None:
        async with court(tmp_path, school) as case:
            case.member.consecutive_valid, case.member.audited = 7, 7
            offer, live = await case.lease()
            verdict = await case.verdict(case.lied(offer), live)
            assert not verdict.accepted
            assert verdict.reason().startswith("logprobs:")
            assert (verdict.pay_micros, verdict.num_units) == (0, 0)
            assert case.ledger.free_micros == case.ledger.funded_micros
            assert (case.member.consecutive_valid, case.member.audited) == (0, 0)
            assert case.lab.orchestrator.setbacks.is_paused(case.peer.node)
            (ruling,) = await case.lab.statements()
            assert ruling.kind == "verification"
            row = await case.lab.lease_row(offer)
            assert (row.state, row.pay_micros, row.settlement_epoch) == ("rejected", 0, None)
            events = await case.lab.orchestrator.journal.events(case.job, 0)
            assert events[-1].type == "result_rejected"
            assert events[-1].data["account"] == case.peer.account.address

            assert case.sale.workload.waiting == [(0, 1)]
            other = await case.lab.peer()
            again, live = await case.lease(other)
            assert again.lease.record.lease_epoch == 2
            await other.submit(case.honest(again, other))
            await until(lambda: live.record.state is LeaseState.ACCEPTED)
            assert [entry.account for entry in case.ledger.entries] == [other.account.address]

    run(scenario)


def test_without_the_audit_the_same_forgery_passes(tmp_path: Path, school: School) -> None:
    """The negative control: it is the audit that catches it, and the draw that decides."""

    async def scenario() -> None:
        async with court(tmp_path, school) as case:
            case.member.consecutive_valid, case.member.audited = 50, 50
            case.verifier._draw = lambda: 0.999
            offer, live = await case.lease()
            verdict = await case.verdict(case.lied(offer), live)
            assert (verdict.accepted, verdict.audited) == (True, False)

    run(scenario)


@pytest.mark.parametrize(
    ("consecutive", "audited", "rate", "draw", "expected"),
    [
        (0, 0, 0.0, 0.999, True),
        (9, 9, 0.0, 0.999, True),
        (10, 10, 0.0, 0.0999, True),
        (10, 10, 0.0, 0.1, False),
        (100, 10, 0.05, 0.0499, True),
        (100, 10, 0.05, 0.05, False),
        (0, 10, 0.0, 0.999, True),
        (1000, 10, 1.0, 0.999, True),
    ],
)
def test_newcomers_are_always_audited_and_others_by_the_rate(
    tmp_path: Path, consecutive: int, audited: int, rate: float, draw: float, expected: bool
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            peer = await lab.peer()
            member = lab.orchestrator.roster.member(peer.node)
            member.consecutive_valid, member.audited = consecutive, audited
            judge: Verifier = lab.orchestrator.verifier
            judge._draw = lambda: draw
            assert judge.audits(member, rate) is expected

    run(scenario)


GARBAGE = [
    b"",
    b"\x00" * 64,
    b"\xff" * 8 + b"{}",
    (1 << 62).to_bytes(8, "little") + b"{}",
    b"\x02\x00\x00\x00\x00\x00\x00\x00{}",
]


@pytest.mark.parametrize("payload", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_is_rejected_and_the_next_result_is_judged(
    tmp_path: Path, school: School, payload: bytes
) -> None:
    async def scenario() -> None:
        async with court(tmp_path, school) as case:
            offer, live = await case.lease()
            verdict = await case.verdict(case.message(offer, payload), live)
            assert not verdict.accepted
            assert verdict.reason().startswith("form:")
            offer, live = await case.lease()
            assert (await case.verdict(case.honest(offer), live)).accepted

    run(scenario)


def test_names_that_a_database_cannot_hold_are_written_without(
    tmp_path: Path, school: School
) -> None:
    async def scenario() -> None:
        async with court(tmp_path, school) as case:
            offer, live = await case.lease()
            honest = case.lab.context.blobs.read(case.honest(offer).result.payload.sha256)
            arrays = safetensors.numpy.load(honest) | {"odd\0": np.zeros(1, dtype=np.float32)}
            verdict = await case.verdict(case.message(offer, safetensors.numpy.save(arrays)), live)
            assert "odd\0" in verdict.reason()
            reason = (await case.lab.lease_row(offer)).reason
            assert "odd " in reason
            assert "\0" not in reason

    run(scenario)


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"task_id": "task_99999999"}, "form"),
        ({"kind": TaskKind.GRADIENT}, "form"),
        ({"num_units": 3}, "form"),
        ({"num_tokens": 10**6}, "form"),
        ({"dtype": "bfloat16"}, "form"),
        ({"task_sha256": "d" * 64}, "digest"),
        ({"policy_sha256": "e" * 64}, "policy"),
    ],
)
def test_a_result_that_contradicts_its_task_is_rejected(
    tmp_path: Path, school: School, changes: dict[str, Any], check: str
) -> None:
    async def scenario() -> None:
        async with court(tmp_path, school) as case:
            offer, live = await case.lease()
            task = cast(RolloutTask, offer.task)
            payload = run_rollout(school.policy, task, school.environments)
            message = case.message(offer, payload, **changes)
            verdict = await case.verdict(message, live)
            assert verdict.reason().startswith(f"{check}:"), verdict.reason()
            assert case.ledger.owed_micros == 0

    run(scenario)


@pytest.mark.parametrize("statement", ["", "{}", "[" * 5_000, "\ud7ff\0", '{"payload": 1}'])
def test_work_without_a_true_statement_is_rejected(
    tmp_path: Path, school: School, statement: str
) -> None:
    async def scenario() -> None:
        async with court(tmp_path, school) as case:
            offer, live = await case.lease()
            message = case.honest(offer).model_copy(update={"statement": statement})
            verdict = await case.verdict(message, live)
            assert verdict.reason().startswith("form:")
            # The negative control is the first test: the same work, stated truly, is accepted.
            assert [row.kind for row in await case.lab.statements()] == ["verification"]

    run(scenario)


def test_a_statement_of_other_work_is_rejected(tmp_path: Path, school: School) -> None:
    async def scenario() -> None:
        async with court(tmp_path, school) as case:
            offer, live = await case.lease()
            message = case.honest(offer)
            other = case.peer.message(offer, b"something else").statement
            verdict = await case.verdict(message.model_copy(update={"statement": other}), live)
            assert not verdict.accepted
            assert "does not say" in verdict.reason()

    run(scenario)


@pytest.mark.parametrize("failure", [RuntimeError("a defect"), InvalidRequest("a grader failed")])
def test_a_check_that_breaks_costs_the_lease_and_blames_nobody(
    tmp_path: Path,
    school: School,
    monkeypatch: pytest.MonkeyPatch,
    failure: Exception,
) -> None:
    async def scenario() -> None:
        async with court(tmp_path, school) as case:
            case.member.consecutive_valid = 3
            offer, live = await case.lease()
            message = case.honest(offer)

            def fail(*args: Any, **options: Any) -> Any:
                raise failure

            with monkeypatch.context() as patch:
                patch.setattr(verification, "verify_rollout", fail)
                verdict = await case.verdict(message, live)
            assert not verdict.accepted
            assert "could not be judged" in verdict.reason()
            assert "a defect" not in verdict.reason()
            assert case.member.consecutive_valid == 3
            assert not case.lab.orchestrator.setbacks.is_paused(case.peer.node)
            assert case.sale.workload.attempts[0] == 1
            offer, live = await case.lease()
            assert (await case.verdict(case.honest(offer), live)).accepted

    run(scenario)


def test_a_delivery_that_breaks_is_paid_and_ends_its_own_job_only(
    tmp_path: Path, school: School
) -> None:
    async def scenario() -> None:
        async with court(tmp_path, school, num_units=4) as case:

            async def fail(delivery: object) -> None:
                raise KeyError("a defect")

            case.sale.workload.deliver, deliver = fail, case.sale.workload.deliver
            offer, live = await case.lease()
            assert (await case.verdict(case.honest(offer), live)).accepted
            await until(lambda: bool(case.sale.abandoned))
            assert isinstance(case.sale.abandoned[0], InvariantBroken)
            assert case.ledger.owed_micros == 200
            case.sale.workload.deliver = deliver
            offer, live = await case.lease()
            assert (await case.verdict(case.honest(offer), live)).accepted

    run(scenario)


def test_nothing_is_judged_while_a_kill_would_lose_the_version_it_is_of(
    tmp_path: Path, school: School
) -> None:
    async def scenario() -> None:
        async with court(tmp_path, school) as case:
            is_kept = asyncio.Event()

            async def kept() -> None:
                await is_kept.wait()

            case.sale.workload.restorable = kept
            offer, live = await case.lease()
            await case.peer.submit(case.honest(offer))
            await asyncio.sleep(0.3)
            assert await case.lab.statements() == []
            assert (case.ledger.owed_micros, live.record.state.is_final) == (0, False)
            is_kept.set()
            await until(lambda: live.record.state.is_final)
            assert case.ledger.owed_micros == 200

    run(scenario)


def test_results_of_others_do_not_wait_for_a_version_to_be_kept(
    tmp_path: Path, school: School
) -> None:
    async def scenario() -> None:
        async with court(tmp_path, school, num_units=4) as case:
            is_kept = asyncio.Event()

            async def kept() -> None:
                await is_kept.wait()

            workload = case.sale.workload
            workload.restorable, workload.is_restorable = kept, is_kept.is_set
            (offer, live), (second, later) = await case.lease(), await case.lease()
            other = await case.lab.peer()
            elsewhere = await case.lab.open_sale(case.job, 2)
            elsewhere.make = case.sale.make
            await other.bid()
            offered, judged = await case.lab.lease(other, elsewhere)
            await case.peer.submit(case.honest(offer))
            await case.peer.submit(case.honest(second))
            await other.submit(case.honest(offered, other))
            await until(lambda: judged.record.state.is_final)
            assert not live.record.state.is_final
            is_kept.set()
            await until(lambda: live.record.state.is_final and later.record.state.is_final)
            assert case.ledger.owed_micros == 600

    run(scenario)


def test_what_waits_for_its_audit_while_its_job_is_cut_off_is_dismissed(
    tmp_path: Path, school: School, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with court(tmp_path, school) as case:
            begun, go_on, audit = asyncio.Event(), asyncio.Event(), Audits.audit

            async def slowly(audits: Audits, *args: Any) -> Any:
                begun.set()
                await go_on.wait()
                return await audit(audits, *args)

            monkeypatch.setattr(Audits, "audit", slowly)
            offer, live = await case.lease()
            await case.peer.submit(case.honest(offer))
            await begun.wait()
            await case.lab.orchestrator.jobs._abort(case.job, "a defect")
            go_on.set()
            await until(lambda: live.record.state.is_final)
            await case.lab.orchestrator.dispatcher.drained(case.job)
            row = await case.lab.lease_row(offer)
            assert (row.state, row.pay_micros, row.reason) == ("rejected", 0, "the job has ended")

    run(scenario)


def test_work_under_a_version_that_could_not_be_kept_is_dismissed_and_nobody_blamed(
    tmp_path: Path, school: School
) -> None:
    async def scenario() -> None:
        async with court(tmp_path, school) as case:

            async def lost() -> None:
                raise Unavailable("The version could not be kept.")

            case.sale.workload.restorable = lost
            offer, live = await case.lease()
            await case.peer.submit(case.honest(offer))
            await until(lambda: live.record.state.is_final)
            await case.lab.orchestrator.dispatcher.drained(case.job)
            assert await case.lab.statements() == []
            assert case.ledger.free_micros == case.ledger.funded_micros
            row = await case.lab.lease_row(offer)
            assert (row.state, row.outcome) == ("rejected", None)
            assert row.reason == "The version could not be kept."
            assert not case.lab.orchestrator.setbacks.is_paused(case.peer.node)

    run(scenario)


def test_a_result_of_a_job_that_is_over_is_dismissed_without_a_statement(
    tmp_path: Path, school: School
) -> None:
    async def scenario() -> None:
        async with court(tmp_path, school) as case:
            offer, live = await case.lease()
            message = case.honest(offer)
            del case.lab.orchestrator.jobs._running[case.job]
            await case.peer.submit(message)
            await until(lambda: live.record.state.is_final)
            await case.lab.orchestrator.dispatcher.drained(case.job)
            assert await case.lab.statements() == []
            assert case.ledger.free_micros == case.ledger.funded_micros
            assert (await case.lab.lease_row(offer)).reason == "the job has ended"

    run(scenario)


def test_verdicts_are_repeated_until_acknowledged(tmp_path: Path, school: School) -> None:
    async def scenario() -> None:
        async with court(tmp_path, school) as case:
            offer, live = await case.lease()
            verdict = await case.verdict(case.honest(offer), live)
            for _ in range(2):
                assert [v.record for v in (await case.peer.beat()).verdicts] == [verdict]
            reply = await case.peer.beat(acknowledged=[verdict.lease_id])
            assert reply.verdicts == ()

    run(scenario)


def test_a_claimed_compute_time_counts_no_more_than_the_time_held(
    tmp_path: Path, school: School
) -> None:
    async def scenario() -> None:
        async with court(tmp_path, school) as case:
            offer, live = await case.lease()
            honest = case.honest(offer)
            payload = case.lab.context.blobs.read(honest.result.payload.sha256)
            message = case.message(offer, payload, compute_ms=2**53 - 1)
            case.lab.time.advance(600)
            await case.verdict(message, live)
            pace = case.lab.orchestrator.dispatcher.pace
            assert pace.median_unit_ms(live.lease.job_id, live.lease.kind) == 301

    run(scenario)


def test_results_are_judged_in_the_order_they_came(tmp_path: Path, school: School) -> None:
    async def scenario() -> None:
        async with court(tmp_path, school, num_units=4) as case:
            first, second = await case.lease(), await case.lease()
            messages = [case.honest(offer) for offer, _ in (first, second)]
            await asyncio.gather(*(case.peer.submit(m) for m in reversed(messages)))
            await until(lambda: len(case.sale.delivered) == 2)
            assert [d.units for d in case.sale.delivered] == [(2, 3), (0, 1)]
            rows = await case.lab.rows(LeaseRow)
            assert {row.state for row in rows} == {"accepted"}

    run(scenario)


@pytest.mark.parametrize(
    ("newest", "pay_micros"), [(0, 200), (1, 200), (2, 160), (3, 100), (9, 100)]
)
def test_work_of_a_policy_that_was_overtaken_is_paid_less(
    tmp_path: Path, school: School, newest: int, pay_micros: int
) -> None:
    async def scenario() -> None:
        async with court(tmp_path, school) as case:
            workload = case.sale.workload
            schedule = {"freshness_permille": (1_000, 800, 500)}
            workload.lot = workload.lot.model_copy(update=schedule)
            offer, live = await case.lease()
            assert offer.task.policy.version == 1
            running = cast(Any, case.lab.orchestrator.jobs._running[case.job])
            running.policy = SimpleNamespace(version=newest)
            verdict = await case.verdict(case.honest(offer), live)
            assert (verdict.accepted, verdict.pay_micros) == (True, pay_micros)
            # What was held beyond that is free again.
            assert (case.ledger.owed_micros, case.ledger.held_micros) == (pay_micros, 0)
            assert (await case.lab.lease_row(offer)).pay_micros == pay_micros

    run(scenario)


def test_a_job_that_ends_while_its_result_is_judged_stops_no_judge(
    tmp_path: Path, school: School, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with court(tmp_path, school, num_units=4) as case:
            running = case.lab.orchestrator.jobs._running
            check, job = verification.verify_rollout, running[case.job]

            def meanwhile(*args: Any, **options: Any) -> RolloutVerification:
                running.pop(case.job)
                return check(*args, **options)

            offer, live = await case.lease()
            message = case.honest(offer)
            with monkeypatch.context() as patch:
                patch.setattr(verification, "verify_rollout", meanwhile)
                await case.peer.submit(message)
                await until(lambda: live.record.state.is_final)
            # No epoch is left that would pay it.
            assert case.ledger.owed_micros == 0
            running[case.job] = job
            offer, live = await case.lease()
            assert (await case.verdict(case.honest(offer), live)).accepted

    run(scenario)
