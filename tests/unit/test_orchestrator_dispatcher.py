"""Leases from offer to end: every clock, every late or forged message, nothing lost on the way."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from orchestrator_chain import FUNDED_MICROS
from orchestrator_lab import (
    DOMAIN,
    TIMEOUT_S,
    Lab,
    Peer,
    Sale,
    arrival,
    database_away,
    open_lab,
    run,
    until,
)

from shoal.market.lease import LeaseState
from shoal.orchestrator.leases import LiveLease
from shoal.orchestrator.store.tables import LeaseRow
from shoal.protocol.errors import (
    Clock,
    Expired,
    InvalidRequest,
    NotFound,
    OverBudget,
    PeerFault,
    Unauthorised,
    Unavailable,
)
from shoal.protocol.market import TaskKind
from shoal.protocol.node import LeaseOffer
from shoal.protocol.signing import sign

PAYLOAD = b"what was computed"


class Deal:
    """One worker, one job, one running lease of two units."""

    def __init__(self, lab: Lab, job: str, peer: Peer, sale: Sale) -> None:
        self.lab, self.job, self.peer, self.sale = lab, job, peer, sale
        self.dispatcher = lab.orchestrator.dispatcher
        self.ledger = lab.orchestrator.settler.ledger(job)

    @classmethod
    async def make(cls, lab: Lab, *, num_units: int = 2) -> Deal:
        job = await lab.add_job()
        return cls(lab, job, await lab.peer(), await lab.open_sale(job, num_units))

    async def lease(self) -> tuple[LeaseOffer, LiveLease]:
        return await self.lab.lease(self.peer, self.sale)

    async def grant(self, *, price_micros: int = 100) -> LiveLease:
        """A lease of the first parcel is offered to the worker."""
        workload = self.sale.workload
        award = self.lab.award(self.peer, self.sale, price_micros=price_micros)
        return await self.dispatcher.grant(workload, workload.waiting[0], award)

    def upload(self, payload: bytes = PAYLOAD) -> None:
        self.lab.context.blobs.put_bytes(payload)

    def untouched(self) -> bool:
        """Whether no unit is out, no money is held and nothing waits for a verdict."""
        return (
            self.sale.workload.waiting == [(0, 1)]
            and self.ledger.free_micros == FUNDED_MICROS
            and not self.dispatcher.live_leases(self.job)
            and self.dispatcher.submissions.empty()
        )


def test_a_lot_is_handed_out_once_a_worker_has_taken_the_last_that_waited(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            deal = await Deal.make(lab, num_units=4)
            workload = deal.sale.workload
            await deal.lease()
            assert workload.waiting
            assert not workload.handed_out.is_set()
            deal.peer.refusal = "no"
            await deal.grant()
            await until(lambda: workload.waiting == [(2, 3)])
            assert not workload.handed_out.is_set()
            deal.peer.refusal = None
            deal.peer.gate.clear()
            await deal.grant()
            await arrival(deal.peer.offers)
            await arrival(deal.peer.offers)
            assert not workload.waiting
            assert not workload.handed_out.is_set()
            deal.peer.gate.set()
            async with asyncio.timeout(TIMEOUT_S):
                await workload.handed_out.wait()

    run(scenario)


def test_an_accepted_offer_is_a_running_lease_on_record(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            deal = await Deal.make(lab)
            offer, live = await deal.lease()
            offer.lease.require_signer(DOMAIN, lab.context.account.address)
            assert offer.lease.record.task_sha256 == offer.task.digest()
            assert (offer.lease.record.num_units, live.units) == (2, (0, 1))
            assert deal.ledger.held_micros == 200
            assert deal.sale.workload.waiting == []
            assert (await lab.lease_row(offer)).state == "offered"

    run(scenario)


def test_a_refusal_gives_the_units_back_and_suspends_the_bidder(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            deal = await Deal.make(lab)
            deal.peer.refusal = "no\0 room"
            await deal.grant()
            offer = await arrival(deal.peer.offers)
            await deal.dispatcher.drained(deal.job)
            assert deal.untouched()
            assert deal.sale.workload.attempts.total() == 0
            assert lab.orchestrator.setbacks.is_paused(deal.peer.node)
            lab.time.advance(10_000)
            assert not lab.orchestrator.setbacks.is_paused(deal.peer.node)
            row = await lab.lease_row(offer)
            assert (row.state, row.reason) == ("refused", "no  room")

    run(scenario)


def test_an_offer_to_a_node_that_has_gone_gives_the_units_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            deal = await Deal.make(lab)
            await deal.peer.network.stop()
            await deal.grant()
            await deal.dispatcher.drained(deal.job)
            assert deal.untouched()

    run(scenario)


def test_a_grant_above_the_free_money_takes_no_unit(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            deal = await Deal.make(lab)
            with pytest.raises(OverBudget):
                await deal.grant(price_micros=FUNDED_MICROS // 2 + 1)
            assert deal.untouched()

    run(scenario)


def test_a_database_that_fails_a_grant_loses_no_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            deal = await Deal.make(lab)
            with database_away(monkeypatch), pytest.raises(Unavailable):
                await deal.grant()
            assert deal.untouched()
            await deal.lease()

    run(scenario)


def test_a_database_that_fails_an_ending_loses_no_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            deal = await Deal.make(lab)
            await deal.lease()
            lab.time.advance(10_000)
            with database_away(monkeypatch):
                await deal.dispatcher.reap()
            assert deal.untouched()

    run(scenario)


@pytest.mark.parametrize(
    ("beats_ms", "ends_ms", "clock"),
    [
        ((), 5_001, Clock.HEARTBEAT),
        ((1_000, 2_000), 7_001, Clock.HEARTBEAT),
        (tuple(range(1_000, 31_000, 1_000)), 30_001, Clock.DEADLINE),
    ],
)
def test_silence_and_deadlines_end_a_lease_and_nothing_sooner(
    tmp_path: Path, beats_ms: tuple[int, ...], ends_ms: int, clock: Clock
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path, first_lease_ms=30_000) as lab:
            deal = await Deal.make(lab)
            offer, live = await deal.lease()
            passed = 0
            for number, at_ms in enumerate(beats_ms):
                lab.time.advance(at_ms - passed)
                passed = at_ms
                assert (await deal.peer.beat(offer, progress=number)).revoked == ()
            lab.time.advance(ends_ms - 1 - passed)
            await deal.dispatcher.reap()
            assert live.record.state is LeaseState.RUNNING
            lab.time.advance(1)
            await deal.dispatcher.reap()
            assert (live.record.state, live.record.clock) == (LeaseState.EXPIRED, clock)
            assert deal.untouched()
            assert deal.sale.workload.attempts[0] == 1
            # The silent node does not win the very same units at once again.
            assert lab.orchestrator.setbacks.is_paused(deal.peer.node)
            assert (await deal.peer.beat(offer)).revoked == (offer.lease.record.lease_id,)
            assert (await lab.lease_row(offer)).state == "expired"

    run(scenario)


def test_an_offer_nobody_answers_ends_by_the_offer_clock(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            deal = await Deal.make(lab)
            deal.peer.gate.clear()
            await deal.grant()
            live = lab.live(await arrival(deal.peer.offers))
            lab.time.advance(10_001)
            await deal.dispatcher.reap()
            assert (live.record.state, live.record.clock) == (LeaseState.EXPIRED, Clock.OFFER)
            # The answer that comes now starts nothing.
            deal.peer.gate.set()
            await until(lambda: not deal.dispatcher.offers)
            assert deal.untouched()

    run(scenario)


def test_a_unit_that_fails_too_often_ends_its_job(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path, max_attempts=3) as lab:
            deal = await Deal.make(lab)
            for attempt in (1, 2, 3):
                assert not deal.sale.abandoned
                offer, _ = await deal.lease()
                assert offer.lease.record.lease_epoch == attempt
                lab.time.advance(5_001)
                await deal.dispatcher.reap()
            error = deal.sale.abandoned[0]
            assert (type(error), error.code) == (InvalidRequest, "attempts_exhausted")

    run(scenario)


def test_a_result_is_queued_once_however_often_it_is_sent(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            deal = await Deal.make(lab)
            offer, live = await deal.lease()
            deal.upload()
            message = deal.peer.message(offer, PAYLOAD)
            replies = await asyncio.gather(*(deal.peer.submit(message) for _ in range(3)))
            assert {reply.result_sha256 for reply in replies} == {message.result.digest()}
            assert deal.dispatcher.submissions.qsize() == 1
            assert live.record.state is LeaseState.SUBMITTED
            assert deal.dispatcher.in_flight() == {}
            # A submitted lease waits for its verdict, whatever its clocks say.
            lab.time.advance(10**9)
            await deal.dispatcher.reap()
            assert live.record.state is LeaseState.SUBMITTED

    run(scenario)


def test_a_second_different_result_is_a_fault(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            deal = await Deal.make(lab)
            offer, live = await deal.lease()
            deal.upload()
            await deal.peer.submit(deal.peer.message(offer, PAYLOAD))
            first = live.record
            deal.upload(b"another")
            with pytest.raises(PeerFault) as caught:
                await deal.peer.submit(deal.peer.message(offer, b"another"))
            assert caught.value.code == "second_result"
            assert live.record is first
            assert deal.dispatcher.submissions.qsize() == 1

    run(scenario)


def test_a_late_result_names_the_clock_and_changes_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            deal = await Deal.make(lab)
            offer, live = await deal.lease()
            deal.upload()
            lab.time.advance(5_001)
            await deal.dispatcher.reap()
            ended = live.record
            with pytest.raises(Expired) as caught:
                await deal.peer.submit(deal.peer.message(offer, PAYLOAD))
            assert caught.value.clock is Clock.HEARTBEAT
            assert live.record is ended
            assert deal.untouched()

    run(scenario)


@pytest.mark.parametrize(
    ("change", "error", "code"),
    [
        ({"lease_epoch": 1}, Expired, "fenced"),
        ({"lease_epoch": 9}, PeerFault, "forged_epoch"),
        ({"lease_id": "lease_00000000"}, NotFound, "no_lease"),
    ],
)
def test_results_of_other_epochs_and_leases_are_refused(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], code: str
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            deal = await Deal.make(lab)
            await deal.lease()
            lab.time.advance(5_001)
            await deal.dispatcher.reap()
            offer, live = await deal.lease()
            assert offer.lease.record.lease_epoch == 2
            deal.upload()
            before = live.record
            with pytest.raises(error) as caught:
                await deal.peer.submit(deal.peer.message(offer, PAYLOAD, **change))
            assert getattr(caught.value, "code", "") == code
            assert live.record is before
            assert deal.dispatcher.submissions.empty()

    run(scenario)


def test_another_node_cannot_hand_in_or_keep_alive_a_lease(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            deal = await Deal.make(lab)
            offer, live = await deal.lease()
            thief = await lab.peer()
            deal.upload()
            before = live.record
            with pytest.raises(PeerFault) as caught:
                await thief.submit(thief.message(offer, PAYLOAD))
            assert caught.value.code == "wrong_node"
            lab.time.advance(2_000)
            assert (await thief.beat(offer, progress=5)).revoked == (offer.lease.record.lease_id,)
            assert live.record is before

    run(scenario)


@pytest.mark.parametrize(
    "change",
    [
        {"lease_id": "lease_00000000"},
        {"lease_epoch": 7},
        {"job_id": "0x" + "b" * 64},
        {"result_sha256": "c" * 64},
    ],
)
def test_a_receipt_for_something_else_is_a_fault(tmp_path: Path, change: dict[str, Any]) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            deal = await Deal.make(lab)
            offer, live = await deal.lease()
            deal.upload()
            message = deal.peer.message(offer, PAYLOAD)
            receipt = deal.peer.receipt(offer, message.result, **change)
            forged = message.model_copy(
                update={"receipt": sign(receipt, DOMAIN, deal.peer.account)}
            )
            with pytest.raises(PeerFault) as caught:
                await deal.peer.submit(forged)
            assert caught.value.code == "receipt_mismatch"
            assert live.record.state is LeaseState.RUNNING
            await deal.peer.submit(message)

    run(scenario)


def test_a_receipt_signed_by_another_account_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            deal = await Deal.make(lab)
            offer, live = await deal.lease()
            deal.upload()
            message = deal.peer.message(offer, PAYLOAD)
            receipt = sign(message.receipt.record, DOMAIN, lab.requester)
            with pytest.raises(Unauthorised):
                await deal.peer.submit(message.model_copy(update={"receipt": receipt}))
            assert live.record.state is LeaseState.RUNNING

    run(scenario)


def test_a_result_whose_payload_never_came_may_be_sent_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            deal = await Deal.make(lab)
            offer, live = await deal.lease()
            message = deal.peer.message(offer, PAYLOAD)
            with pytest.raises(InvalidRequest) as caught:
                await deal.peer.submit(message)
            assert caught.value.code == "payload_missing"
            assert live.record.state is LeaseState.RUNNING
            deal.upload()
            await deal.peer.submit(message)

    run(scenario)


def test_a_blob_larger_than_the_lease_allows_is_no_result(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            deal = await Deal.make(lab)
            offer, live = await deal.lease()
            # Such as the weights of a base model, which the same store holds.
            large = b"w" * (offer.max_result_bytes + 1)
            deal.upload(large)
            with pytest.raises(InvalidRequest) as caught:
                await deal.peer.submit(deal.peer.message(offer, large))
            assert caught.value.code == "oversize"
            assert live.record.state is LeaseState.RUNNING

    run(scenario)


def test_a_token_stores_one_result_of_its_lease_and_nothing_else(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            deal = await Deal.make(lab)
            offer, _ = await deal.lease()
            authorise = deal.dispatcher.authorise_upload
            token, most = offer.upload_token, offer.max_result_bytes
            with pytest.raises(Unauthorised) as caught:
                await authorise("0" * 32, "a" * 64, 1)
            assert caught.value.code == "bad_token"
            with pytest.raises(InvalidRequest) as too_large:
                await authorise(token, "a" * 64, most + 1)
            assert too_large.value.code == "oversize"
            await authorise(token, "a" * 64, most)
            await authorise(token, "a" * 64, most)
            with pytest.raises(Unauthorised) as used:
                await authorise(token, "b" * 64, 1)
            assert used.value.code == "token_used"
            lab.time.advance(5_001)
            await deal.dispatcher.reap()
            with pytest.raises(Unauthorised):
                await authorise(token, "a" * 64, most)

    run(scenario)


def test_the_end_of_a_job_revokes_what_runs_and_keeps_what_was_sent(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            deal = await Deal.make(lab, num_units=4)
            sent, sent_live = await deal.lease()
            running, running_live = await deal.lease()
            deal.upload()
            await deal.peer.submit(deal.peer.message(sent, PAYLOAD))
            await deal.dispatcher.revoke_job(deal.job, "the job has ended")
            assert sent_live.record.state is LeaseState.SUBMITTED
            assert running_live.record.state is LeaseState.REVOKED
            assert deal.ledger.held_micros == 200
            reply = await deal.peer.beat(running, sent)
            assert reply.revoked == (running.lease.record.lease_id,)
            drained = asyncio.create_task(deal.dispatcher.drained(deal.job))
            await asyncio.sleep(0)
            assert not drained.done()
            deal.dispatcher._forget(sent_live)
            await drained

    run(scenario)


def test_claimed_slowness_does_not_stretch_deadlines_beyond_the_ceiling(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path, lease_ceiling_ms=90_000) as lab:
            deal = await Deal.make(lab)
            pace, node = deal.dispatcher.pace, deal.peer.node
            pace.note(deal.job, TaskKind.ROLLOUT, node, 2**52)
            offer, _ = await deal.lease()
            assert offer.lease.record.deadline_ms == lab.time.now_ms() + 90_000
            pace.forget(deal.job)
            pace.note(deal.job, TaskKind.ROLLOUT, node, 10_000)
            lab.time.advance(5_001)
            await deal.dispatcher.reap()
            offer, _ = await deal.lease()
            assert offer.lease.record.deadline_ms == lab.time.now_ms() + 3 * 10_000 * 2

    run(scenario)


def test_leases_of_an_earlier_process_are_swept(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            deal = await Deal.make(lab)
            await deal.lease()
        async with open_lab(tmp_path) as lab:
            await lab.orchestrator.jobs._dispatcher.sweep()
            rows = await lab.rows(LeaseRow)
            assert [(row.state, row.reason) for row in rows] == [
                ("revoked", "the orchestrator was restarted")
            ]

    run(scenario)
