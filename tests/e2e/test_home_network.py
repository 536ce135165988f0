"""The main job between homes: NAT, a slow line, a killed worker, a cut orchestrator."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator

import pytest
from home_market import HomeMarket, Outcome
from netlab import NetLab, require

from shoal.client.demo import example_job
from shoal.client.jobfile import load_job_file
from shoal.protocol.job import JobState

# Tasks of a second or two: one shorter than its own way over the slow line goes to the others.
CAPACITY = {"rollout": 512, "gradient": 512}
SETTINGS = (
    "max_steps=8",
    "batch_size=18432",
    "rollouts_per_example=12",
    "tasks.rollout=512",
    "tasks.gradient=512",
    "eval.interval=4",
    "eval.num_examples=128",
)
SLOW_MS = 80
CUT_S = 12.0
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HomeMarket, Outcome]]:
    """A job that met all of it, finished and settled."""
    require()
    with NetLab() as lab:
        market = HomeMarket(lab, lab.host("office"), tmp_path_factory.mktemp("homes"))
        yield market, asyncio.run(_live_through(lab, market))


async def _live_through(lab: NetLab, market: HomeMarket) -> Outcome:
    await market.open()
    await market.add(lab.host("open"), capacity=CAPACITY)
    home = await market.add(lab.natted("home"), capacity=CAPACITY)
    far = lab.natted("far")
    far.delay(SLOW_MS)
    await market.add(far, capacity=CAPACITY)
    await market.wait_connected()
    job_id = await market.submit(load_job_file(example_job(), SETTINGS))
    workers = market.workers.values()
    await market.wait_for(job_id, lambda view: all(w.events("accepted") for w in workers))
    home.kill()
    home.start()
    await market.wait_connected()
    await market.wait_for(job_id, lambda view: not view.ended)
    market.office.cut()
    await asyncio.sleep(CUT_S)
    market.office.mend()
    await market.wait_for(job_id, lambda view: view.state is JobState.COMPLETE)
    return await market.settle(job_id)


def test_the_job_is_done_and_every_worker_had_a_part(
    story: tuple[HomeMarket, Outcome],
) -> None:
    market, outcome = story
    assert outcome.view.policy_version == outcome.view.max_steps
    assert {worker.name for worker in outcome.view.workers} == market.workers.keys()
    for worker in market.workers.values():
        assert any(verdict["accepted"] for verdict in worker.verdicts()), worker.name


def test_the_killed_worker_and_the_cut_off_ones_came_back(
    story: tuple[HomeMarket, Outcome],
) -> None:
    market, _ = story
    workers = market.workers
    assert len(workers["home"].events("starting")) == 2
    assert len(workers["home"].events("joined")) >= 2
    # Nobody was told of the cut: each worker found out by itself, and dialled again.
    for worker in workers.values():
        assert worker.events("orchestrator_lost"), worker.name
        assert worker.events("joined")[-1]["time"] > worker.events("orchestrator_lost")[-1]["time"]


def test_escrow_ledger_chain_and_every_book_agree(story: tuple[HomeMarket, Outcome]) -> None:
    market, outcome = story
    escrow, paid = outcome.escrow, outcome.paid()
    assert escrow.closed
    assert escrow.funded_micros == escrow.claimed_micros + escrow.refunded_micros
    assert escrow.claimed_micros == escrow.committed_micros == sum(paid.values()) > 0
    for worker in market.workers.values():
        earned = [verdict for verdict in worker.verdicts() if verdict["accepted"]]
        assert sum(verdict["pay_micros"] for verdict in earned) == paid[worker.account.lower()]
    assert paid.keys() <= {worker.account.lower() for worker in market.workers.values()}


def test_nobody_was_paid_twice(story: tuple[HomeMarket, Outcome]) -> None:
    market, _ = story
    accepted = [
        verdict
        for worker in market.workers.values()
        for verdict in worker.verdicts()
        if verdict["accepted"]
    ]
    leases = Counter(verdict["lease_id"] for verdict in accepted)
    results = Counter(verdict["result_sha256"] for verdict in accepted)
    assert set(leases.values()) == set(results.values()) == {1}


def test_the_provenance_holds(story: tuple[HomeMarket, Outcome]) -> None:
    _, outcome = story
    assert outcome.is_proven, outcome.proof
