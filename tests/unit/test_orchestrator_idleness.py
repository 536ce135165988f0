"""The figures that a worker without leases is told, next to why it has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from orchestrator_bidders import sell, three
from orchestrator_lab import Lab, Peer, Sale, open_lab, run

from shoal.protocol.market import TaskKind
from shoal.protocol.node import (
    HEARTBEAT_PROTOCOL,
    FailureCause,
    Heartbeat,
    HeartbeatReply,
    IdleDetail,
    IdleReason,
)

ROLLOUT = TaskKind.ROLLOUT


async def told(peer: Peer) -> tuple[IdleReason, IdleDetail | None]:
    """What the peer's heartbeat is answered with."""
    raw = await peer.ask(HEARTBEAT_PROTOCOL, Heartbeat(leases=()).encode())
    reply = HeartbeatReply.decode(raw)
    return reply.idle_reason, reply.idle_detail


@pytest.fixture(autouse=True)
def _jobs_are_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing drives the lab's jobs, so the heartbeat is told that there are some."""
    from shoal.orchestrator.auctioneer import Auctioneer

    whole = Auctioneer.idle_reason
    monkeypatch.setattr(
        Auctioneer, "idle_reason", lambda self, node, has_jobs: whole(self, node, True)
    )


async def sold(lab: Lab) -> None:
    sell(lab)
    await lab.settled()


async def passed_over(lab: Lab, *, bid: dict[str, Any], **lot: Any) -> tuple[Peer, Sale]:
    """The only bidder for a lot, and the lot, once that was sold to nobody."""
    job = await lab.add_job()
    peer = await lab.peer()
    await peer.bid(**bid)
    sale = await lab.open_sale(job, **lot)
    await sold(lab)
    return peer, sale


def test_who_is_outbid_hears_its_place(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            _, _, dearest = await three(lab, capacity=3)
            await lab.open_sale(job, num_units=5, parcel_units=3)
            await sold(lab)
            reason, detail = await told(dearest)
            assert reason is IdleReason.OUTBID
            assert detail is not None
            assert (detail.kind, detail.place, detail.places) == (ROLLOUT, 3, 3)
            assert detail.price_micros is not None

    run(scenario)


@pytest.mark.parametrize(
    ("lag_ms", "told_why"),
    [(299, (IdleReason.OUTBID, None)), (301, (IdleReason.TOO_SLOW, (601, 300)))],
)
def test_who_would_be_late_hears_by_how_much(
    tmp_path: Path, lag_ms: int, told_why: tuple[IdleReason, tuple[int, int] | None]
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            *_, last = await three(lab, capacity=3)
            now_ms = lab.context.time.now_ms()
            pace = lab.orchestrator.dispatcher.outlooks.pace
            pace.note(job, ROLLOUT, last.node, 100)
            pace.note_lag(job, ROLLOUT, last.node, lag_ms, now_ms=now_ms)
            await lab.open_sale(job, num_units=6, parcel_units=3)
            await sold(lab)
            reason, detail = await told(last)
            assert detail is not None
            figures = None if detail.task_ms is None else (detail.task_ms, detail.usual_ms)
            assert (reason, figures) == told_why

    run(scenario)


def test_who_is_too_dear_hears_both_prices(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            lot = {"num_units": 2, "reserve_micros": 500}
            dear, _ = await passed_over(lab, bid={"price_micros": 700}, **lot)
            assert await told(dear) == (
                IdleReason.ABOVE_RESERVE,
                IdleDetail(kind=ROLLOUT, limit_micros=500, price_micros=700),
            )

    run(scenario)


def test_who_is_too_small_hears_both_sizes(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            lot = {"num_units": 8, "parcel_units": 4}
            small, _ = await passed_over(lab, bid={"capacity": 1}, **lot)
            assert await told(small) == (
                IdleReason.TASK_TOO_LARGE,
                IdleDetail(kind=ROLLOUT, task_units=4, capacity_units=1),
            )

    run(scenario)


def test_whose_stake_is_too_small_hears_what_is_needed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            poor, sale = await passed_over(lab, bid={}, reserve_micros=50_000)
            reason, detail = await told(poor)
            assert reason is IdleReason.STAKE_TOO_SMALL
            needed = lab.orchestrator.record.backing_micros(sale.workload, 2)
            stake = lab.context.config.min_stake_micros
            assert needed > stake
            assert detail == IdleDetail(
                kind=ROLLOUT, needed_stake_micros=needed, free_stake_micros=stake
            )

    run(scenario)


def test_who_is_paused_hears_for_how_long(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            peer = await lab.peer()
            await peer.bid()
            offer, _ = await lab.lease(peer, await lab.open_sale(job))
            await peer.fail(offer, FailureCause.OUT_OF_MEMORY)
            lab.time.advance(4_000)
            assert await told(peer) == (IdleReason.PAUSED, IdleDetail(wait_ms=6_000))

    run(scenario)


def test_a_reason_without_figures_has_no_detail(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            peer = await lab.peer()
            assert await told(peer) == (IdleReason.STARTING, None)

    run(scenario)
