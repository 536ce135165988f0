"""Epochs: closed once, posted once and in order, whatever fails in between."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from orchestrator_chain import ADDRESSES
from orchestrator_lab import DOMAIN, Lab, open_lab, run
from orchestrator_pay import ALICE, BOB, pay, statement

from shoal.contracts.records import EpochPost
from shoal.market.settlement import PayEntry
from shoal.orchestrator.store.database import Database
from shoal.orchestrator.store.tables import EpochRow, JobRow
from shoal.protocol.errors import ChainRejected, InvariantBroken, NotFound, Unavailable
from shoal.protocol.ids import new_id
from shoal.protocol.merkle import MerkleTree, payout_leaf


async def epochs(lab: Lab) -> list[EpochRow]:
    return sorted(await lab.rows(EpochRow), key=lambda row: row.epoch)


def root(job: str, owed: dict[str, int]) -> str:
    leaves = [
        payout_leaf(DOMAIN.chain_id, DOMAIN.escrow, job, account, micros)
        for account, micros in sorted(owed.items())
    ]
    return "0x" + MerkleTree(leaves).root.hex()


def test_an_epoch_closes_once_with_its_pay_and_its_statements(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            settler = lab.orchestrator.settler
            assert not await settler.settle(job)
            await pay(lab, job, ALICE, 300)
            await pay(lab, job, BOB, 200)
            assert await settler.settle(job)
            assert not await settler.settle(job)
            await pay(lab, job, ALICE, 50)
            assert await settler.settle(job)
            first, second = lab.chain.posted
            assert (first.epoch, first.cumulative_micros, first.num_statements) == (1, 500, 2)
            assert (second.epoch, second.cumulative_micros, second.num_tasks) == (2, 550, 1)
            assert first.pay_root == root(job, {ALICE: 300, BOB: 200})
            assert second.pay_root == root(job, {ALICE: 350, BOB: 200})
            assert first.prov_root != second.prov_root
            rows = await epochs(lab)
            assert [row.tx_hash for row in rows] == [first.tx_hash, second.tx_hash]
            events = await lab.orchestrator.journal.events(job, 0)
            assert [event.data["epoch"] for event in events] == [1, 2]

    run(scenario)


def test_a_proof_leads_to_the_posted_root(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            settler = lab.orchestrator.settler
            with pytest.raises(NotFound) as caught:
                await settler.proof(job, ALICE)
            assert caught.value.code == "nothing_settled"
            await pay(lab, job, ALICE, 300)
            await pay(lab, job, BOB, 200)
            await settler.settle(job)
            proof = await settler.proof(job, BOB)
            assert (proof.epoch, proof.claim.cumulative_micros) == (1, 200)
            alice = payout_leaf(DOMAIN.chain_id, DOMAIN.escrow, job, ALICE, 300)
            assert proof.claim.proof == ("0x" + alice.hex(),)
            with pytest.raises(NotFound) as nobody:
                await settler.proof(job, ADDRESSES["d"])
            assert nobody.value.code == "nothing_owed"

    run(scenario)


def test_two_that_settle_at_once_post_one_epoch(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            await pay(lab, job, ALICE, 300)
            settler = lab.orchestrator.settler
            lab.chain.before_post = lambda: asyncio.sleep(0.01)
            done = await asyncio.gather(*(settler.settle(job) for _ in range(3)))
            assert sorted(done) == [False, False, True]
            assert [post.epoch for post in lab.chain.posted] == [1]

    run(scenario)


def test_a_receipt_lost_after_the_post_is_recovered_without_a_second_post(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            await pay(lab, job, ALICE, 300)
            lab.chain.fail_after_post = True
            with pytest.raises(Unavailable):
                await lab.orchestrator.settler.settle(job)
            assert [row.tx_hash for row in await epochs(lab)] == [None]
            chain, account = lab.chain, lab.context.account
        chain.down = False
        async with open_lab(tmp_path, account=account, chain=chain) as lab:
            await lab.orchestrator.journal.adopt(job)
            await lab.orchestrator.settler.adopt(job)
            assert not await lab.orchestrator.settler.settle(job)
            assert len(chain.posted) == 1
            assert [row.tx_hash for row in await epochs(lab)] == [chain.posted[0].tx_hash]
            assert (await lab.orchestrator.settler.proof(job, ALICE)).epoch == 1

    run(scenario)


def test_another_root_under_our_number_is_never_taken_for_ours(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            await pay(lab, job, ALICE, 300)
            lab.chain.down = True
            with pytest.raises(Unavailable):
                await lab.orchestrator.settler.settle(job)
            lab.chain.down = False
            row = (await epochs(lab))[0]
            foreign = {field: getattr(row, field) for field in EpochPost.model_fields}
            foreign["pay_root"] = "0x" + "e" * 64
            lab.chain.ledger.steal_nonce(lab.chain.post_call(EpochPost(**foreign)).data)
            with pytest.raises(InvariantBroken):
                await lab.orchestrator.settler.settle(job)
            lab.chain.posted = []
            with pytest.raises(Unavailable):
                await lab.orchestrator.settler.settle(job)

    run(scenario)


def test_epochs_that_wait_for_the_chain_are_posted_in_order(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            settler = lab.orchestrator.settler
            await pay(lab, job, ALICE, 300)
            lab.chain.down = True
            with pytest.raises(Unavailable):
                await settler.settle(job)
            assert [(row.epoch, row.tx_hash) for row in await epochs(lab)] == [(1, None)]
            await pay(lab, job, BOB, 100)
            with pytest.raises(Unavailable):
                await settler.settle(job)
            assert len(await epochs(lab)) == 1
            lab.chain.down = False
            assert await settler.settle(job)
            assert [(p.epoch, p.cumulative_micros) for p in lab.chain.posted] == [
                (1, 300),
                (2, 400),
            ]

    run(scenario)


async def owing_and_unable_to_close(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> str:
    """A job that owes Alice 300, and whose epoch the database failed to close."""
    job = await lab.add_job()
    settler = lab.orchestrator.settler
    await pay(lab, job, ALICE, 300)

    def fail(*_: object) -> None:
        raise Unavailable("The database is away.")

    with monkeypatch.context() as patch:
        patch.setattr(settler, "_close", fail)
        with pytest.raises(Unavailable):
            await settler.settle(job)
    return job


def test_a_database_that_fails_while_closing_loses_no_pay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            settler = lab.orchestrator.settler
            job = await owing_and_unable_to_close(lab, monkeypatch)
            assert lab.orchestrator.journal.open_epoch(job) == 2
            await pay(lab, job, BOB, 100)
            assert await settler.settle(job)
            first, second = lab.chain.posted
            assert (first.epoch, first.pay_root) == (1, root(job, {ALICE: 300}))
            assert (first.cumulative_micros, first.num_statements) == (300, 1)
            assert (second.epoch, second.pay_root) == (2, root(job, {ALICE: 300, BOB: 100}))

    run(scenario)


def test_a_database_that_fails_the_very_last_closing_loses_no_pay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            settler = lab.orchestrator.settler
            job = await owing_and_unable_to_close(lab, monkeypatch)
            # Nothing more is stated: the job is at its end.
            while await settler.settle(job):
                pass
            assert lab.chain.escrows[job].committed_micros == 300

    run(scenario)


def test_pay_is_posted_only_where_its_verdict_is_on_record(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            settler = lab.orchestrator.settler
            await pay(lab, job, ALICE, 300)
            # The database refused the write of this one's verdict just before the epoch closes.
            unwritten = PayEntry(
                task_id=new_id("task"), lease_id=new_id("lease"), account=BOB, pay_micros=200
            )
            settler.ledger(job).hold(unwritten.lease_id, 200)
            settler.ledger(job).accept(unwritten)
            assert await settler.settle(job)
            assert lab.chain.posted[-1].cumulative_micros == 300
            assert lab.chain.posted[-1].pay_root == root(job, {ALICE: 300})
            # Total and verdicts agree after a restart too, so the next epoch can be posted.
            assert (await settler.adopt(job)).owed_micros == 300
            await pay(lab, job, BOB, 50)
            assert await settler.settle(job)
            assert lab.chain.posted[-1].cumulative_micros == 350

    run(scenario)


def test_a_refusing_escrow_does_not_stop_the_other_jobs(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            refused, job = await lab.add_job(), await lab.add_job()
            for each in (refused, job):
                await pay(lab, each, ALICE, 300)
            escrow = lab.chain.escrows[refused]
            lab.chain.escrows[refused] = escrow.model_copy(update={"funded_micros": 299})
            await lab.orchestrator.settler.settle_all([refused, job])
            assert [post.job_id for post in lab.chain.posted] == [job]
            with pytest.raises(ChainRejected):
                await lab.orchestrator.settler.settle(refused)

    run(scenario)


def test_the_challenge_window_is_waited_for(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            await pay(lab, job, ALICE, 300)
            escrow = lab.chain.escrows[job]
            lab.chain.escrows[job] = escrow.model_copy(update={"ready_at_s": 1_001})
            with pytest.raises(Unavailable) as caught:
                await lab.orchestrator.settler.settle(job)
            assert caught.value.code == "challenge_window"
            lab.chain.escrows[job] = escrow.model_copy(update={"ready_at_s": 1_000})
            await lab.orchestrator.settler.settle(job)
            assert len(lab.chain.posted) == 1

    run(scenario)


def test_a_restart_goes_on_in_the_same_epoch_and_log(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            await pay(lab, job, ALICE, 300)
            await lab.orchestrator.settler.settle(job)
            await pay(lab, job, BOB, 100)
            chain, account = lab.chain, lab.context.account
        chain.down = False
        async with open_lab(tmp_path, account=account, chain=chain) as lab:
            journal, settler = lab.orchestrator.journal, lab.orchestrator.settler
            await journal.adopt(job)
            ledger = await settler.adopt(job)
            assert (journal.open_epoch(job), ledger.owed_micros) == (2, 400)
            row = statement(lab, job)
            assert (row.seq, row.epoch) == (2, 2)
            assert await settler.settle(job)
            assert lab.chain.posted[-1].cumulative_micros == 400
            stored = await lab.context.database.run(lambda s: s.get_one(JobRow, job))
            assert stored.epoch == 3

    run(scenario)


def test_statements_count_on_and_a_turned_epoch_takes_no_more(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            journal = lab.orchestrator.journal
            rows = [statement(lab, job), statement(lab, job)]
            assert journal.turn_epoch(job) == 1
            rows.append(statement(lab, job))
            assert [(row.seq, row.epoch) for row in rows] == [(0, 1), (1, 1), (2, 2)]
            assert journal.open_epoch(job) == 2

    run(scenario)


def test_a_follower_is_woken_and_a_failed_fact_tells_no_event(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            journal = lab.orchestrator.journal
            change = journal.next_change(job)
            assert not change.is_set()
            await journal.event(job, "noted", {"n": 1})
            assert change.is_set()
            assert not journal.next_change(job).is_set()

            def fail(session: object) -> None:
                raise KeyError("a fact that cannot be written")

            with pytest.raises(KeyError):
                await journal.event(job, "untrue", {}, also=fail)
            events = await journal.events(job, 0)
            assert [event.type for event in events] == ["noted"]
            assert await journal.events(job, events[0].seq) == []

    run(scenario)


def test_the_database_says_when_it_does_not_answer(tmp_path: Path) -> None:
    (tmp_path / "not-a-database.db").write_bytes(b"something else entirely" * 100)
    with pytest.raises(Unavailable) as caught:
        Database(f"sqlite:///{tmp_path / 'not-a-database.db'}")
    assert "not-a-database.db" in caught.value.message
    with pytest.raises(Unavailable):
        Database(f"sqlite:///{tmp_path / 'no' / 'such' / 'folder.db'}")
