"""Audits beside all else: begun ahead for newcomers, without holding up who is not audited."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from learning_fixtures import Lab as School
from learning_fixtures import write_base
from orchestrator_court import Court, court, gradient_sale
from orchestrator_lab import TIMEOUT_S, Peer, run, until

from shoal.market.lease import LeaseState
from shoal.orchestrator.leases import LiveLease
from shoal.orchestrator.verifier import NEWCOMER_AUDITS
from shoal.protocol.ids import LeaseId
from shoal.protocol.learning import CodecKind, CodecSpec, GradientSpec
from shoal.protocol.node import FailureCause, LeaseOffer, ResultMessage
from shoal.protocol.result import Verdict
from shoal.protocol.task import GradientTask
from shoal.rl import gradient_audit, verification
from shoal.rl.batch import GradientPayload
from shoal.rl.gradient import run_gradient

SPEC = GradientSpec(codec=CodecSpec(kind=CodecKind.INT8, chunk=256))


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory) -> School:
    return School.open(write_base(tmp_path_factory.mktemp("base")))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which gradients the orchestrator recomputed: ahead of a result, or after it came."""
    times: list[str] = []

    def note(module: Any, name: str, when: str) -> None:
        real = getattr(module, name)

        def noted(*args: Any) -> Any:
            times.append(when)
            return real(*args)

        monkeypatch.setattr(module, name, noted)

    note(verification, "due_gradient", "ahead")
    note(gradient_audit, "slice_gradient", "after")
    return times


class Differentiator:
    """A worker of the court's that takes gradients."""

    def __init__(self, case: Court, peer: Peer) -> None:
        self.case, self.peer, self.lab = case, peer, case.lab
        self.member = case.lab.orchestrator.roster.member(peer.node)

    async def lease(self) -> tuple[LeaseOffer, LiveLease]:
        sale, self._rows = await gradient_sale(self.lab, self.case.school, self.case.job, SPEC)
        return await self.lab.lease(self.peer, sale)

    def answer(self, offer: LeaseOffer, *, sign: int = 1) -> ResultMessage:
        """The gradient, or with ``sign`` -1 what undoes the lesson."""
        task = cast(GradientTask, offer.task)
        policy, blobs = self.case.school.policy, self.lab.context.blobs
        data = run_gradient(policy, task, blobs.read(task.slice.sha256)).payload
        payload = GradientPayload.decode(data, policy.shapes(), task.gradient.codec)
        arrays = {name: sign * array for name, array in payload.gradients.items()}
        data = GradientPayload.pack(arrays, payload.stats, task.gradient.codec)[0].encode()
        blobs.put_bytes(data)
        return self.peer.message(offer, data, num_tokens=self._rows.num_tokens)

    async def verdict(self, message: ResultMessage, live: LiveLease) -> Verdict:
        await self.peer.submit(message)
        await until(lambda: live.record.state.is_final)
        return self.member.undelivered[LeaseId(live.lease.lease_id)].record

    def trust(self) -> None:
        """The worker is no newcomer, and the draw never falls on it."""
        self.member.audited = self.member.consecutive_valid = 1_000
        self.case.verifier._draw = lambda: 1.0


@asynccontextmanager
async def bench(folder: Path, school: School) -> AsyncIterator[tuple[Court, Differentiator]]:
    async with court(folder, school, num_units=4) as case:
        yield case, Differentiator(case, await case.lab.peer())


@contextmanager
def held_up(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[Callable[[], bool]]:
    """`verification.<name>` begins and does not go on before the end; whether it began."""
    begun, may_go_on, real = threading.Event(), threading.Event(), getattr(verification, name)

    def slow(*args: Any, **options: Any) -> Any:
        begun.set()
        may_go_on.wait(TIMEOUT_S)
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(verification, name, slow)
        try:
            yield begun.is_set
        finally:
            may_go_on.set()


def test_a_newcomers_gradient_is_recomputed_before_it_comes_and_once(
    tmp_path: Path, school: School, computed: list[str]
) -> None:
    async def scenario() -> None:
        async with bench(tmp_path, school) as (_, worker):
            offer, live = await worker.lease()
            await until(lambda: computed == ["ahead"])
            verdict = await worker.verdict(worker.answer(offer), live)
            assert (verdict.accepted, verdict.audited) == (True, True), verdict.reason()
            assert "recomputed: off by" in " ".join(check.detail for check in verdict.checks)
            assert computed == ["ahead"]
            assert worker.member.audited == 1

    run(scenario)


def test_a_newcomers_wrong_gradient_is_rejected_by_what_was_recomputed_ahead(
    tmp_path: Path, school: School, computed: list[str]
) -> None:
    async def scenario() -> None:
        async with bench(tmp_path, school) as (_, worker):
            offer, live = await worker.lease()
            verdict = await worker.verdict(worker.answer(offer, sign=-1), live)
            assert (verdict.accepted, verdict.audited) == (False, True)
            assert "recomputed: off by" in verdict.reason()
            assert computed == ["ahead"]
            # The negative control: it is the recomputing that finds it.
            worker.trust()
            offer, live = await worker.lease()
            verdict = await worker.verdict(worker.answer(offer, sign=-1), live)
            assert (verdict.accepted, verdict.audited) == (True, False)

    run(scenario)


@pytest.mark.parametrize("sign", [1, -1])
def test_where_recomputing_ahead_fails_the_audit_recomputes(
    tmp_path: Path,
    school: School,
    computed: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    sign: int,
) -> None:
    def fail(*args: Any) -> Any:
        raise RuntimeError("a defect")

    async def scenario() -> None:
        async with bench(tmp_path, school) as (_, worker):
            monkeypatch.setattr(verification, "due_gradient", fail)
            offer, live = await worker.lease()
            verdict = await worker.verdict(worker.answer(offer, sign=sign), live)
            assert (verdict.accepted, verdict.audited) == (sign == 1, True), verdict.reason()
            assert computed == ["after"]
            assert "recomputing_ahead_failed" in caplog.messages

    run(scenario)


@pytest.mark.parametrize(("draw", "recomputed"), [(1.0, []), (0.0, ["after"])])
def test_of_who_is_no_newcomer_nothing_is_recomputed_before_the_draw(
    tmp_path: Path, school: School, computed: list[str], draw: float, recomputed: list[str]
) -> None:
    async def scenario() -> None:
        async with bench(tmp_path, school) as (case, worker):
            worker.trust()
            worker.member.audited = NEWCOMER_AUDITS
            case.verifier._draw = lambda: draw
            offer, live = await worker.lease()
            # Whatever the audit thread was given at the lease would have begun before this.
            await case.lab.context.audited(lambda: None)
            assert computed == []
            verdict = await worker.verdict(worker.answer(offer), live)
            assert (verdict.accepted, verdict.audited) == (True, bool(recomputed))
            assert computed == recomputed

    run(scenario)


def test_what_was_recomputed_for_a_lease_that_ended_is_dropped(
    tmp_path: Path,
    school: School,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)

    async def scenario() -> None:
        async with bench(tmp_path, school) as (case, worker):
            finished: list[object] = []
            real = verification.due_gradient

            def noted(*args: Any) -> Any:
                found = real(*args)
                finished.append(found)
                return found

            monkeypatch.setattr(verification, "due_gradient", noted)
            with held_up(monkeypatch, "due_gradient") as begun:
                offer, live = await worker.lease()
                await until(begun)
                await worker.peer.fail(offer, FailureCause.OUT_OF_MEMORY)
                assert live.record.state is LeaseState.FAILED
            await case.lab.context.audited(lambda: None)
            # It gave up at its first micro-batch, and there is no gradient of it left.
            assert finished == []
            offer, live = await worker.lease()
            await until(lambda: len(finished) == 1)
            verdict = await worker.verdict(worker.answer(offer), live)
            assert verdict.accepted, verdict.reason()
            assert len(finished) == 1
            assert not [r for r in caplog.records if r.message == "recomputing_ahead_failed"]

    run(scenario)


def test_a_gradient_is_judged_while_rollouts_are_audited(
    tmp_path: Path, school: School, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with bench(tmp_path, school) as (case, worker):
            worker.trust()
            rollout, audited = await case.lease()
            gradient, live = await worker.lease()
            with held_up(monkeypatch, "audit_rollout") as begun:
                await case.peer.submit(case.honest(rollout))
                await until(begun)
                verdict = await worker.verdict(worker.answer(gradient), live)
                assert (verdict.accepted, verdict.audited) == (True, False), verdict.reason()
                assert audited.record.state is LeaseState.SUBMITTED
            await until(lambda: audited.record.state is LeaseState.ACCEPTED)
            statements = [row.kind for row in await case.lab.statements()]
            assert statements == [
                "gradient-batch",
                "verification",
                "rollout-batch",
                "verification",
            ]

    run(scenario)


def test_results_of_a_worker_wait_for_the_audit_that_decides_about_them(
    tmp_path: Path, school: School, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a liar would get unaudited in whatever it hands in before it is found out."""

    async def scenario() -> None:
        async with bench(tmp_path, school) as (case, _):
            case.member.audited = case.member.consecutive_valid = 1_000
            draws = iter([0.0])
            case.verifier._draw = lambda: next(draws, 1.0)
            (first, bad), (second, later) = await case.lease(), await case.lease()
            with held_up(monkeypatch, "audit_rollout") as begun:
                await case.peer.submit(case.lied(first))
                await until(begun)
                await case.peer.submit(case.lied(second))
                await until(lambda: bool(case.verifier._held[case.peer.node]))
            await until(lambda: later.record.state.is_final)
            states = (bad.record.state, later.record.state)
            assert states == (LeaseState.REJECTED, LeaseState.REJECTED)
            # Its worker is a newcomer again by then, so it was audited whatever the draw.
            assert (await case.lab.lease_row(second)).audited

    run(scenario)


def test_if_they_did_not_wait_the_second_lie_would_pass(
    tmp_path: Path, school: School, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control of the test above."""

    class HoldsNobody(dict[str, Any]):
        def __contains__(self, key: object) -> bool:
            return False

    async def scenario() -> None:
        async with bench(tmp_path, school) as (case, _):
            case.verifier._held = HoldsNobody()
            case.member.audited = case.member.consecutive_valid = 1_000
            draws = iter([0.0])
            case.verifier._draw = lambda: next(draws, 1.0)
            (first, bad), (second, later) = await case.lease(), await case.lease()
            with held_up(monkeypatch, "audit_rollout") as begun:
                await case.peer.submit(case.lied(first))
                await until(begun)
                await case.peer.submit(case.lied(second))
                await until(lambda: later.record.state is LeaseState.ACCEPTED)
            await until(lambda: bad.record.state is LeaseState.REJECTED)

    run(scenario)


@pytest.mark.parametrize(("room", "beside"), [(1, 1), (2, 2)])
def test_so_many_audits_wait_and_the_next_result_is_judged_when_one_is_done(
    tmp_path: Path, school: School, monkeypatch: pytest.MonkeyPatch, room: int, beside: int
) -> None:
    async def scenario() -> None:
        async with bench(tmp_path, school) as (case, worker):
            case.verifier._room = asyncio.Semaphore(room)
            (first, live), (second, other) = await case.lease(), await case.lease(worker.peer)
            with held_up(monkeypatch, "audit_rollout") as begun:
                await case.peer.submit(case.honest(first))
                await until(begun)
                await worker.peer.submit(case.honest(second, worker.peer))
                await until(lambda: case.verifier._room.locked())
                # Its other checks come first, and then it waits for room or for the thread.
                await until(case.lab.orchestrator.dispatcher.submissions.empty)
                await case.lab.context.computed(lambda: None)
                await asyncio.sleep(0)
                assert len(case.verifier._beside) == beside
            await until(lambda: live.record.state is LeaseState.ACCEPTED)
            await until(lambda: other.record.state is LeaseState.ACCEPTED)

    run(scenario)


def test_a_judge_that_stops_leaves_no_audit_behind(
    tmp_path: Path, school: School, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with bench(tmp_path, school) as (case, worker):
            offer, live = await case.lease()
            await worker.lease()
            with held_up(monkeypatch, "audit_rollout") as begun:
                await case.peer.submit(case.honest(offer))
                await until(begun)
                beside = list(case.verifier._beside)
                case.judging.cancel()
                await asyncio.wait([case.judging])
                assert beside
                await asyncio.wait(beside)
                assert all(task.cancelled() for task in beside)
            assert live.record.state is LeaseState.SUBMITTED

    run(scenario)
