"""What a worker claims, and what it believes before it does; the books it claims from."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from worker_double import DOMAIN, ESCROW, JOB_ID, MemoryChain
from worker_records import ACCOUNT, receipt

from shoal.protocol.errors import PeerFault, Unavailable
from shoal.protocol.merkle import MerkleTree, payout_leaf
from shoal.worker.earnings import Collector
from shoal.worker.evidence import EvidenceBook

OTHER = "0x" + "5" * 40


class World:
    """A collector over an in-memory chain and an API that answers what it is told to."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.chain = MemoryChain(ACCOUNT.address)
        self.book = EvidenceBook(directory)
        self.book.keep_receipt(receipt())
        self.answer: Any = None
        self.asked: list[str] = []
        self.collector = Collector(
            self.chain,
            self.book,
            ACCOUNT.address,
            DOMAIN,
            api_url="http://api.invalid/",
            claim_min_micros=1_000,
        )
        monkeypatch.setattr("shoal.worker.earnings.get_json", self._get)

    def owe(self, micros: int, *, final: bool = False, epoch: int = 3) -> None:
        """The chain's root owes us ``micros``, and the API proves it."""
        leaves = [
            payout_leaf(DOMAIN.chain_id, ESCROW, JOB_ID, account, amount)
            for account, amount in ((OTHER, 7), (ACCOUNT.address, micros))
        ]
        tree = MerkleTree(leaves)
        self.chain.pay_root, self.chain.epoch = "0x" + tree.root.hex(), epoch
        self.answer = {
            "job_id": JOB_ID,
            "epoch": epoch,
            "account": ACCOUNT.address,
            "cumulative_micros": micros,
            "proof": ["0x" + node.hex() for node in tree.proof(1)],
            "claimed_micros": 0,
            "final": final,
        }

    def collect(self, *, even_small: bool = False) -> int:
        return asyncio.run(self.collector.collect(JOB_ID, even_small=even_small))

    async def _get(self, url: str) -> Any:
        self.asked.append(url)
        return self.answer


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def test_what_is_owed_is_claimed_once(world: World) -> None:
    world.owe(5_000)
    assert world.collect() == 5_000
    assert world.collect() == 0
    world.owe(8_000)
    assert world.collect() == 3_000
    assert [claim.cumulative_micros for claim in world.chain.claims] == [5_000, 8_000]
    assert world.asked[0].endswith(f"/v1/market/jobs/{JOB_ID}/payouts/{ACCOUNT.address}")


def test_nothing_is_claimed_where_nothing_is_known(world: World) -> None:
    assert world.collect() == 0
    assert world.chain.claims == []


def test_small_amounts_wait_until_the_job_is_final_or_the_worker_leaves(world: World) -> None:
    world.owe(999)
    assert world.collect() == 0
    assert world.collect(even_small=True) == 999
    world.owe(1_100, final=True)
    assert world.collect() == 101
    assert world.book.open_jobs() == ()


def test_a_proof_that_does_not_lead_to_the_root_is_a_fault(world: World) -> None:
    world.owe(5_000)
    world.answer["cumulative_micros"] = 6_000
    with pytest.raises(PeerFault, match="does not lead to the root"):
        world.collect()
    assert world.chain.claims == []


def test_an_epoch_that_is_not_the_chains_is_waited_for(world: World) -> None:
    world.owe(5_000)
    world.answer["epoch"] = 4
    with pytest.raises(Unavailable, match="epoch 4"):
        world.collect()


def test_a_root_that_may_still_be_challenged_is_waited_for(world: World) -> None:
    world.owe(5_000, final=True)
    world.chain.ready_at_s = 1_001
    assert world.collect() == 0
    assert world.book.open_jobs() == (JOB_ID,)
    world.chain.ready_at_s = 1_000
    assert world.collect() == 5_000


@pytest.mark.parametrize(
    "change",
    [
        {"account": OTHER},
        {"job_id": "0x" + "b" * 64},
        {"cumulative_micros": -1},
        {"cumulative_micros": 2**96},
        {"proof": ["0x12"]},
        {"proof": ["0x" + "1" * 64] * 65},
        {"epoch": "three"},
    ],
)
def test_a_hostile_answer_is_a_fault(world: World, change: dict[str, Any]) -> None:
    world.owe(5_000)
    world.answer |= change
    with pytest.raises(PeerFault):
        world.collect()
    assert world.chain.claims == []


def test_one_jobs_failure_does_not_keep_another_from_paying(world: World) -> None:
    world.owe(5_000)
    world.answer["epoch"] = 4
    assert asyncio.run(world.collector.collect_all(even_small=True)) == 0


def test_a_job_that_ends_is_looked_at_at_once(world: World) -> None:
    async def script() -> None:
        world.owe(5_000)
        running = asyncio.create_task(world.collector.run(3600.0))
        world.collector.note_open([JOB_ID])
        world.collector.note_open([])
        async with asyncio.timeout(30):
            await world.chain.was_claimed.wait()
        running.cancel()

    asyncio.run(script())
