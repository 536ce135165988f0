"""A slow lease holds nobody up: another node may try too, and the first valid result wins."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest
from learning_fixtures import Lab as School
from learning_fixtures import write_base
from orchestrator_court import taught
from orchestrator_lab import Lab, Peer, Sale, arrival, open_lab, run, until

from shoal.market.lease import LeaseState
from shoal.orchestrator.leases import LiveLease
from shoal.protocol.errors import InvalidRequest
from shoal.protocol.market import TaskKind
from shoal.protocol.node import FailureCause, LeaseOffer, ResultMessage
from shoal.protocol.task import RolloutTask
from shoal.rl.batch import RolloutPayload, RowLimits
from shoal.rl.rollout import run_rollout

UNIT_MS = 1_000
LATE_MS = 2 * 2 * UNIT_MS + 250


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory) -> School:
    return School.open(write_base(tmp_path_factory.mktemp("base")))


class Race:
    """A lot of one parcel, leased to the first of two workers; units usually take a second."""

    def __init__(self, lab: Lab, school: School, job: str, peers: list[Peer], sale: Sale) -> None:
        self.lab, self.school, self.job, self.peers, self.sale = lab, school, job, peers, sale
        self.dispatcher = lab.orchestrator.dispatcher
        self.ledger = lab.orchestrator.settler.ledger(job)

    async def begin(self) -> tuple[LeaseOffer, LiveLease]:
        self.lab.start(self.lab.orchestrator.auctioneer.run())
        self.lab.start(self.lab.orchestrator.verifier.run())
        return await self.taken(0)

    async def taken(self, number: int) -> tuple[LeaseOffer, LiveLease]:
        offer = await arrival(self.peers[number].offers)
        live = self.lab.live(offer)
        await until(lambda: live.record.state is LeaseState.TAKEN)
        await self.peers[number].beat(offer)
        return offer, live

    async def both(self) -> tuple[tuple[LeaseOffer, LiveLease], tuple[LeaseOffer, LiveLease]]:
        """The first worker is late, and the second has been leased the same units."""
        first = await self.begin()
        await self.peers[1].bid(price_micros=20)
        await self.pass_ms(LATE_MS + 1, slow=(0, first[0]))
        return first, await self.taken(1)

    async def pass_ms(self, span_ms: int, **beating: tuple[int, LeaseOffer]) -> None:
        """Time passes; all workers are there, and the named ones make progress all the while."""
        for _ in range(span_ms // 1_000):
            self.lab.time.advance(1_000)
            for peer in self.peers:
                await peer.beat()
            for number, offer in beating.values():
                await self.peers[number].beat(offer, progress=self.lab.time.now_ms())
        self.lab.time.advance(span_ms % 1_000)
        await self.dispatcher.reap()
        await self.lab.settled()

    def message(self, number: int, offer: LeaseOffer) -> ResultMessage:
        task = cast(RolloutTask, offer.task)
        payload = run_rollout(self.school.policy, task, self.school.environments)
        self.lab.context.blobs.put_bytes(payload)
        limits = RowLimits(
            num_prompts=len(task.prompts),
            num_rows=len(task.prompts) * task.group_size,
            max_tokens=task.sampling.max_tokens,
            vocab_size=self.school.policy.vocab_size,
        )
        num_tokens = RolloutPayload.decode(payload, limits).num_tokens
        return self.peers[number].message(offer, payload, num_tokens=num_tokens)


def pay(offer: LeaseOffer) -> int:
    lease = offer.lease.record
    return lease.num_units * lease.unit_price_micros


@asynccontextmanager
async def race(folder: Path, school: School) -> AsyncIterator[Race]:
    async with open_lab(folder) as lab:
        job = await taught(lab, school)
        peers = [await lab.peer(), await lab.peer()]
        await peers[0].bid(price_micros=10)
        sale = await lab.open_sale(job, 2)
        version = school.version()
        prompts = school.plan.prompts(0)
        sale.make = lambda units: school.plan.rollout(0, version, prompts, units).model_copy(
            update={"job_id": job}
        )
        lab.orchestrator.dispatcher.pace.note(job, TaskKind.ROLLOUT, "a peer", UNIT_MS)
        contest = Race(lab, school, job, peers, sale)
        yield contest


def test_a_lease_as_late_as_another_node_takes_is_given_to_it_too(
    tmp_path: Path, school: School
) -> None:
    async def scenario() -> None:
        async with race(tmp_path, school) as contest:
            slow, slow_live = await contest.begin()
            await contest.peers[1].bid(price_micros=20)
            await contest.pass_ms(LATE_MS, slow=(0, slow))
            assert contest.peers[1].offers.empty()
            await contest.pass_ms(1)
            fast, fast_live = await contest.taken(1)
            assert fast.lease.record.lease_epoch == slow.lease.record.lease_epoch + 1
            assert slow_live.record.state is LeaseState.RUNNING
            assert contest.ledger.held_micros == pay(slow) + pay(fast)
            # There is no third.
            await contest.pass_ms(LATE_MS + 1, slow=(0, slow), fast=(1, fast))
            assert len(contest.dispatcher.live_leases(contest.job)) == 2
            assert fast_live.rival is slow_live

    run(scenario)


def test_nobody_is_given_what_is_not_late_or_has_no_other_bidder(
    tmp_path: Path, school: School
) -> None:
    async def scenario() -> None:
        async with race(tmp_path, school) as contest:
            slow, _ = await contest.begin()
            await contest.pass_ms(2 * LATE_MS, slow=(0, slow))
            assert len(contest.dispatcher.live_leases(contest.job)) == 1
            # The straggler itself, free for more, is no help.
            assert contest.peers[0].offers.empty()

    run(scenario)


def test_a_lease_at_a_standstill_is_given_to_another_node_before_it_expires(
    tmp_path: Path, school: School
) -> None:
    async def scenario() -> None:
        async with race(tmp_path, school) as contest:
            contest.dispatcher.pace.forget(contest.job)
            slow, live = await contest.begin()
            await contest.peers[1].bid(price_micros=20)
            for _ in range(20):
                contest.lab.time.advance(1_000)
                await contest.peers[0].beat(slow, progress=0)
                await contest.peers[1].beat()
            await contest.pass_ms(0)
            assert contest.peers[1].offers.empty()
            await contest.pass_ms(1)
            await contest.taken(1)
            assert live.record.state is LeaseState.RUNNING

    run(scenario)


@pytest.mark.parametrize("winner", [0, 1])
def test_the_first_valid_result_is_paid_and_the_other_let_go_without_blame(
    tmp_path: Path, school: School, winner: int
) -> None:
    async def scenario() -> None:
        async with race(tmp_path, school) as contest:
            leases = await contest.both()
            offer, live = leases[winner]
            _, other = leases[1 - winner]
            await contest.peers[winner].submit(contest.message(winner, offer))
            await until(lambda: live.record.state.is_final and other.record.state.is_final)
            assert live.record.state is LeaseState.ACCEPTED
            assert other.record.state is LeaseState.REVOKED
            assert len(contest.sale.delivered) == 1
            assert contest.ledger.owed_micros == pay(offer)
            assert contest.ledger.held_micros == 0
            assert contest.sale.workload.waiting == []
            loser = contest.peers[1 - winner]
            assert not contest.lab.orchestrator.setbacks.is_paused(loser.node)
            late = contest.message(1 - winner, leases[1 - winner][0])
            with pytest.raises(InvalidRequest) as caught:
                await loser.submit(late)
            assert caught.value.code == "lease_revoked"

    run(scenario)


def test_of_two_results_in_the_queue_one_is_judged_and_paid(tmp_path: Path, school: School) -> None:
    async def scenario() -> None:
        async with race(tmp_path, school) as contest:
            (slow, slow_live), (fast, fast_live) = await contest.both()
            messages = [contest.message(0, slow), contest.message(1, fast)]
            await contest.peers[0].submit(messages[0])
            await contest.peers[1].submit(messages[1])
            await until(lambda: slow_live.record.state.is_final and fast_live.record.state.is_final)
            states = {slow_live.record.state, fast_live.record.state}
            assert states == {LeaseState.ACCEPTED, LeaseState.REVOKED}
            assert len(contest.sale.delivered) == 1
            assert contest.ledger.held_micros == 0

    run(scenario)


def test_when_one_of_the_two_fails_the_other_goes_on_alone(tmp_path: Path, school: School) -> None:
    async def scenario() -> None:
        async with race(tmp_path, school) as contest:
            (slow, slow_live), (fast, _) = await contest.both()
            await contest.peers[1].fail(fast, FailureCause.OUT_OF_MEMORY)
            assert contest.sale.workload.waiting == []
            assert slow_live.rival is None
            await contest.peers[0].submit(contest.message(0, slow))
            await until(lambda: slow_live.record.state is LeaseState.ACCEPTED)
            assert len(contest.sale.delivered) == 1

    run(scenario)


def test_a_last_attempt_ends_no_job_while_another_lease_may_still_deliver(
    tmp_path: Path, school: School
) -> None:
    async def scenario() -> None:
        async with race(tmp_path, school) as contest:
            (slow, slow_live), (fast, _) = await contest.both()
            workload = contest.sale.workload
            limit = contest.lab.context.config.max_attempts
            workload.attempts.update(dict.fromkeys(slow_live.units, limit))
            await contest.peers[1].fail(fast, FailureCause.OUT_OF_MEMORY)
            assert not contest.sale.abandoned
            # The control: once nobody works on it any more, that was the last attempt.
            await contest.peers[0].fail(slow, FailureCause.OUT_OF_MEMORY)
            assert [error.code for error in contest.sale.abandoned] == ["attempts_exhausted"]

    run(scenario)


def test_without_the_rule_one_slow_worker_holds_the_lot_up(
    tmp_path: Path, school: School, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with race(tmp_path, school) as contest:
            monkeypatch.setattr(contest.dispatcher.outlooks, "stragglers", list)
            slow, _ = await contest.begin()
            await contest.peers[1].bid(price_micros=20)
            await contest.pass_ms(2 * LATE_MS, slow=(0, slow))
            assert contest.peers[1].offers.empty()
            assert not contest.sale.delivered

    run(scenario)
