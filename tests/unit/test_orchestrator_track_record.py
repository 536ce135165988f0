"""What leases that ended say of a provider: its place, its pauses, and how much it may hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from learning_fixtures import Lab as School
from learning_fixtures import write_base
from orchestrator_court import Court, court
from orchestrator_lab import Peer, arrival, open_lab, run, until

from shoal.market.lease import MISSED_HEARTBEATS, LeaseState
from shoal.market.reputation import Ending, Outcome
from shoal.orchestrator.leases import LiveLease
from shoal.orchestrator.track_record import TrackRecord
from shoal.orchestrator.workload import Workload
from shoal.protocol.node import FailureCause, IdleReason, LeaseOffer

STAKE_PRICE_MICROS = 15_000
"""Two units at this price need $0.63 of stake; the lab's peers have a dollar."""


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory) -> School:
    return School.open(write_base(tmp_path_factory.mktemp("base")))


def picture(record: TrackRecord, peers: Sequence[Peer], workload: Workload, now_ms: int) -> Any:
    """All that follows from the outcomes that ``record`` holds of the peers."""
    work = workload.work
    return [
        (
            record._reputation.standing(peer.account.address, now_ms=now_ms),
            record._reputation.unit_ms(peer.node, work, now_ms=now_ms),
            record._cooldown.until_ms(peer.node),
        )
        for peer in peers
    ]


async def every_ending(case: Court) -> list[Peer]:
    """Workers whose one lease each ended in a way of its own, by all that can happen."""
    lab, dispatcher = case.lab, case.lab.orchestrator.dispatcher
    peers = [case.peer, *[await lab.peer() for _ in range(5)]]
    good, bad, broken, silent, proud, leaving = peers

    async def lease(peer: Peer) -> tuple[LeaseOffer, LiveLease]:
        return await case.lease(peer)

    offer, live = await lease(bad)
    lied = case.lied(offer).result.payload
    payload = lab.context.blobs.read(lied.sha256)
    tokens = case.decoded(offer, payload).num_tokens
    await bad.submit(bad.message(offer, payload, num_tokens=tokens))
    await until(lambda: live.record.state is LeaseState.REJECTED)
    await dispatcher.drained(case.job)
    offer, _ = await lease(broken)
    await broken.fail(offer, FailureCause.NODE)
    offer, _ = await lease(leaving)
    await leaving.fail(offer, FailureCause.STOPPING)
    proud.refusal = "no"
    waiting = case.sale.workload.waiting[0]
    await dispatcher.grant(case.sale.workload, waiting, lab.award(proud, case.sale))
    await dispatcher.drained(case.job)
    await lease(silent)
    for _ in range(MISSED_HEARTBEATS):
        lab.time.advance(1_001)
        await good.beat()
    await dispatcher.reap()
    offer, live = await lease(good)
    lab.time.advance(600)
    assert (await case.verdict(case.honest(offer), live)).accepted
    return peers


def test_what_is_restored_is_what_was_known_live(tmp_path: Path, school: School) -> None:
    async def scenario() -> None:
        async with court(tmp_path, school) as case:
            peers = await every_ending(case)
            workload, now_ms = case.sale.workload, case.lab.time.now_ms()
            live = picture(case.lab.orchestrator.record, peers, workload, now_ms)
            counted = [(standing.num_receipts, bool(until_ms)) for standing, _, until_ms in live]
            assert counted == [(1, False), (1, True), (0, True), (0, True), (0, True), (0, False)]
            # 600 ms for two units, by the orchestrator's own clock.
            assert live[0][1] == 300
        async with open_lab(tmp_path) as lab:
            record = lab.orchestrator.record
            # The negative control: nothing is known before it is restored.
            assert picture(record, peers, workload, now_ms) != live
            await record.restore()
            assert picture(record, peers, workload, now_ms) == live

    run(scenario)


@pytest.mark.parametrize("is_over", [False, True])
def test_a_rejected_result_pauses_its_node_and_a_dismissed_one_does_not(
    tmp_path: Path, school: School, is_over: bool
) -> None:
    async def scenario() -> None:
        async with court(tmp_path, school) as case:
            offer, live = await case.lease()
            message = case.lied(offer)
            if is_over:
                del case.lab.orchestrator.jobs._running[case.job]
            await case.peer.submit(message)
            await until(lambda: live.record.state is LeaseState.REJECTED)
            await case.lab.orchestrator.dispatcher.drained(case.job)
            assert case.lab.orchestrator.setbacks.is_paused(case.peer.node) is not is_over
            await until(lambda: case.sale.workload.waiting == [(0, 1)])
            outcome = (await case.lab.lease_row(offer)).outcome
            assert (outcome is None) is is_over

    run(scenario)


def known(record: TrackRecord, peer: Peer, work: str, now_ms: int, accepted: int) -> None:
    """The worker's account has this many accepted leases behind it."""
    for number in range(accepted):
        record._note(
            Outcome(
                lease_id=f"lease_{number:010d}",
                account=peer.account.address,
                node=peer.node,
                work=work,
                ending=Ending.ACCEPTED,
                unit_ms=100,
                ended_at_ms=now_ms,
            )
        )


@pytest.mark.parametrize("is_known", [True, False])
def test_a_record_of_good_work_goes_before_a_lower_price(tmp_path: Path, is_known: bool) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            proven, stranger, third = [await lab.peer() for _ in range(3)]
            for peer, price in ((proven, 120), (stranger, 100), (third, 300)):
                await peer.bid(price_micros=price, capacity=2)
            sale = await lab.open_sale(job)
            if is_known:
                work, now_ms = sale.workload.work, lab.time.now_ms()
                known(lab.orchestrator.record, proven, work, now_ms, 50)
            terms = {row.node: row for row in lab.orchestrator.record.terms(sale.workload).rows}
            assert terms[stranger.node].handicap_micros == 39
            assert terms[proven.node].handicap_micros == (3 if is_known else 39)
            lab.start(lab.orchestrator.auctioneer.run())
            # The negative control: where nothing is known of either, the price decides.
            winner = proven if is_known else stranger
            offer = await arrival(winner.offers)
            assert offer.lease.record.unit_price_micros == (120 if is_known else 100)

    run(scenario)


def test_nothing_that_a_worker_says_of_itself_is_in_its_terms(
    tmp_path: Path, school: School
) -> None:
    async def scenario() -> None:
        async with court(tmp_path, school) as case:
            offer, live = await case.lease()
            payload = case.lab.context.blobs.read(case.honest(offer).result.payload.sha256)
            lab = case.lab
            lab.time.advance(10_000)
            # A worker that says it took a millisecond is measured all the same.
            message = case.message(offer, payload, compute_ms=1)
            assert (await case.verdict(message, live)).accepted
            work = case.sale.workload.work
            now_ms = lab.time.now_ms()
            assert (
                lab.orchestrator.record._reputation.unit_ms(case.peer.node, work, now_ms=now_ms)
                == 5_000
            )

    run(scenario)


@pytest.mark.parametrize("stake_micros", [1_000_000, 2_000_000])
def test_stake_bounds_what_an_account_holds_with_all_its_nodes(
    tmp_path: Path, stake_micros: int
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            first = await lab.peer()
            second = await lab.peer(account=first.account)
            lab.chain.stakes[first.account.address] = stake_micros
            await lab.orchestrator.roster.refresh_stakes()
            for peer in (first, second):
                await peer.bid(capacity=2)
            sale = await lab.open_sale(job, num_units=4, reserve_micros=STAKE_PRICE_MICROS)
            lab.start(lab.orchestrator.auctioneer.run())
            await lab.settled()
            leases = lab.orchestrator.dispatcher.live_leases(job)
            record = lab.orchestrator.record
            needed = record.backing_micros(sale.workload, 2)
            assert needed == -(-2 * STAKE_PRICE_MICROS * 1_000_000 // (50 * 950))
            if stake_micros >= 2 * needed:
                # The negative control: it is the stake alone that held the second one back.
                assert {live.lease.node for live in leases} == {first.node, second.node}
                return
            (live,) = leases
            assert record.backed_micros(first.account.address) == needed
            assert sale.workload.waiting != []
            # With its verdict a unit needs no stake any more.
            await until(lambda: live.record.state is LeaseState.TAKEN)
            lab.orchestrator.dispatcher.conclude(
                live, live.record.model_copy(update={"state": LeaseState.ACCEPTED}), unit_ms=1
            )
            await lab.settled()
            (other,) = lab.orchestrator.dispatcher.live_leases(job)
            assert other.lease.account == first.account.address

    run(scenario)


def test_who_has_too_little_stake_for_one_task_is_told_so(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            peer = await lab.peer()
            await peer.bid()
            await lab.open_sale(job, reserve_micros=2 * STAKE_PRICE_MICROS)
            lab.start(lab.orchestrator.auctioneer.run())
            await lab.settled()
            assert peer.offers.empty()
            idle = lab.orchestrator.auctioneer.idle_reason
            assert idle(peer.node, True) is IdleReason.STAKE_TOO_SMALL

    run(scenario)


def test_who_has_left_the_stake_vault_wins_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            peer = await lab.peer()
            await peer.bid()
            lab.chain.stakes[peer.account.address] = 0
            await lab.orchestrator.roster.refresh_stakes()
            sale = await lab.open_sale(job)
            lab.start(lab.orchestrator.auctioneer.run())
            await lab.settled()
            assert peer.offers.empty()
            (row,) = lab.orchestrator.record.terms(sale.workload).rows
            assert (row.staked, row.bound_units) == (False, 0)

    run(scenario)
