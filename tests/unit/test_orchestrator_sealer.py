"""The market's epochs: what a receipt promises, what a seal holds, who competes, what survives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account as EthAccount
from orchestrator_lab import DOMAIN, Lab, Peer, arrival, open_lab, run
from sqlalchemy.exc import IntegrityError

from shoal.market.replay import replay
from shoal.market.seal import SealedEpoch
from shoal.network.identity import NodeIdentity
from shoal.orchestrator.certificates import published_clearing
from shoal.orchestrator.sealer import Sealer
from shoal.orchestrator.store.database import Database
from shoal.orchestrator.store.tables import CommitmentRow, SealRow
from shoal.protocol.errors import InvalidRequest, NotFound, PeerFault, Unauthorised, Unavailable
from shoal.protocol.market import TaskKind
from shoal.protocol.merkle import unhex
from shoal.protocol.node import CANCEL_PROTOCOL, COMMIT_PROTOCOL, REVEAL_PROTOCOL
from shoal.protocol.sealing import (
    MAX_COMMITMENTS_PER_NODE,
    BidCancel,
    BidCommitment,
    BidReveal,
    BookSeal,
    StandingCommitment,
)
from shoal.protocol.signing import Signed, sign


def book(lab: Lab) -> list[str]:
    """The nodes whose bids compete in the present epoch."""
    market = lab.orchestrator.sealer.market
    return [] if market is None else [entry.bid.node for entry in market.book.opened]


async def last_seal(lab: Lab) -> BookSeal:
    """The newest seal in the database, which the orchestrator has signed."""
    rows = sorted(await lab.rows(SealRow), key=lambda row: int(row.epoch))
    signed = Signed[BookSeal].decode(rows[-1].seal.encode())
    signed.require_signer(DOMAIN, lab.context.account.address)
    return signed.record


def refusals(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [str(vars(record)["code"]) for record in caplog.records if record.msg == "bid_refused"]


def test_a_receipt_is_signed_and_on_record_before_any_seal(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            peer = await lab.peer()
            bid = peer.make_bid(price_micros=250, epoch_to=9)
            sealed = peer.seal(bid)
            receipt = await peer.commit(sealed)
            receipt.require_signer(DOMAIN, lab.context.account.address)
            said = receipt.record
            assert (said.commitment, said.epoch_from, said.epoch_to) == (sealed.commitment, 0, 9)
            assert said.received_at_ms == lab.time.now_ms()
            (row,) = await lab.rows(CommitmentRow)
            entry = StandingCommitment.decode(row.entry.encode())
            assert (entry.receipt, entry.opened) == (said, None)
            assert (entry.node, entry.account) == (peer.node, peer.account.address)
            # Nobody was asked for a price, and no book is there to clear over.
            assert (await lab.rows(SealRow), peer.notices, book(lab)) == ([], [], [])

            await peer.turn()
            (notice,) = peer.notices
            notice.seal.require_signer(DOMAIN, lab.context.account.address)
            assert notice.seal.record == await last_seal(lab)
            assert notice.proofs[0].holds(notice.seal.record)
            assert notice.wanted == (sealed.commitment,)
            assert book(lab) == [peer.node]
            assert lab.orchestrator.auctioneer.prices(peer.node) == {"rollout": 250}

    run(scenario)


def test_a_commitment_after_the_seal_stands_in_the_next_epoch_only(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            early, late = await lab.peer(), await lab.peer()
            await early.commit(early.seal(early.make_bid()))
            answered: list[int] = []
            show = early._on_seal

            async def meanwhile(peer: Any, data: bytes) -> bytes:
                receipt = await late.commit(late.seal(late.make_bid()))
                answered.append(receipt.record.epoch_from)
                return await show(peer, data)

            early.network.serve(REVEAL_PROTOCOL, meanwhile)
            await early.turn()
            assert answered == [1]
            assert book(lab) == [early.node]
            assert (await last_seal(lab)).num_commitments == 1
            early.network.serve(REVEAL_PROTOCOL, show)
            await late.turn()
            assert sorted(book(lab)) == sorted([early.node, late.node])
            assert (await last_seal(lab)).num_commitments == 2

    run(scenario)


def test_what_was_shown_once_is_not_asked_for_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            peer = await lab.peer()
            receipt = await peer.bid()
            for _ in range(3):
                await peer.turn()
            assert [notice.wanted for notice in peer.notices] == [(receipt.record.commitment,)]
            assert book(lab) == [peer.node]
            # But once a minute it is shown that its bid is in the book.
            lab.time.advance(60_000)
            await peer.beat()
            await peer.turn()
            assert [len(notice.wanted) for notice in peer.notices] == [1, 0]
            assert peer.notices[-1].proofs[0].holds(await last_seal(lab))

    run(scenario)


def test_a_bid_withdrawn_before_the_seal_does_not_compete_and_after_it_does(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            peer = await lab.peer()
            receipt = await peer.bid(turn=False)
            name = receipt.record.commitment
            assert (await peer.cancel(name, 1)).from_epoch == 1
            await peer.turn()
            assert book(lab) == [peer.node]
            # Epoch 0 is sealed: nothing can be taken out of it any more.
            with pytest.raises(InvalidRequest) as late:
                await peer.cancel(name, 0)
            assert late.value.code == "already_sealed"
            assert book(lab) == [peer.node]
            await peer.turn()
            assert book(lab) == []
            # Its leaf stays, so that nobody can call it dropped.
            assert (await last_seal(lab)).num_commitments == 1
            assert len(peer.notices) == 1

    run(scenario)


def test_a_withdrawal_is_the_bidders_own(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            peer, thief = await lab.peer(), await lab.peer()
            name = (await peer.bid(turn=False)).record.commitment
            with pytest.raises(NotFound):
                await thief.cancel(name, 0)
            forged = sign(BidCancel(commitment=name, from_epoch=0), DOMAIN, thief.account)
            with pytest.raises(Unauthorised):
                await peer.ask(CANCEL_PROTOCOL, forged.encode())
            await peer.turn()
            assert book(lab) == [peer.node]

    run(scenario)


def test_who_does_not_open_in_time_competes_in_the_next_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            slow = await lab.peer()
            show, free = slow._on_seal, asyncio.Event()

            async def held_back(peer: Any, data: bytes) -> bytes:
                await free.wait()
                return await show(peer, data)

            slow.network.serve(REVEAL_PROTOCOL, held_back)
            await slow.bid(turn=False)
            with monkeypatch.context() as patch:
                patch.setattr("shoal.orchestrator.sealer._REVEAL_WINDOW_S", 0.05)
                await slow.turn()
            assert book(lab) == []
            assert (await last_seal(lab)).num_commitments == 1
            free.set()
            await slow.turn()
            assert book(lab) == [slow.node]

    run(scenario)


@pytest.mark.parametrize("is_restored", [True, False])
def test_a_receipt_survives_a_restart(tmp_path: Path, is_restored: bool) -> None:
    async def scenario() -> None:
        identity, account = NodeIdentity.generate(), EthAccount.create()
        async with open_lab(tmp_path, identity=identity, account=account) as lab:
            opened, unopened = await lab.peer(), await lab.peer()
            held = [await opened.bid(), await unopened.bid(turn=False)]
            assert [receipt.record.epoch_from for receipt in held] == [0, 1]
        async with open_lab(tmp_path, identity=identity, account=account) as lab:
            names = [unhex(receipt.record.commitment) for receipt in held]
            promised = SealedEpoch.of(1, names, sealed_at_ms=0).seal
            if not is_restored:
                # The negative control: the next root leaves out what was promised.
                sealed = lab.orchestrator.sealer._book.seal(1, now_ms=0)
                assert sealed.seal.commit_root != promised.commit_root
                return
            await lab.orchestrator.sealer.restore()
            assert lab.orchestrator.sealer.epoch == 1
            await lab.orchestrator.sealer.turn()
            assert (await last_seal(lab)).commit_root == promised.commit_root
            # What had been shown before competes though its node is not back yet.
            assert book(lab) == [opened.node]
            # Numbers of receipts go on where they ended.
            other = await lab.peer()
            assert (await other.bid()).record.seq == 2
            await lab.orchestrator.sealer.turn()

    run(scenario)


@pytest.mark.parametrize("is_restored", [True, False])
def test_an_epoch_is_never_sealed_twice_though_nobody_was_shown_its_seal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_restored: bool
) -> None:
    async def crash(self: Sealer, seal: Signed[BookSeal]) -> None:
        raise RuntimeError("the power is gone")

    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            peer = await lab.peer()
            with monkeypatch.context() as patch:
                patch.setattr(Sealer, "_ask", crash)
                with pytest.raises(RuntimeError):
                    await peer.bid()
            assert (await last_seal(lab)).epoch == 0
        async with open_lab(tmp_path) as lab:
            if not is_restored:
                # The negative control: without what is on record it would be sealed again, and
                # it is the database that refuses.
                with pytest.raises(IntegrityError):
                    await lab.orchestrator.sealer.turn()
                return
            await lab.orchestrator.sealer.restore()
            await lab.orchestrator.sealer.turn()
            assert [row.epoch for row in await lab.rows(SealRow)] == [0, 1]

    run(scenario)


def test_a_chain_or_database_that_is_away_leaves_the_epoch_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            peer, late = await lab.peer(), await lab.peer()
            await peer.bid()
            before = lab.orchestrator.sealer.market
            await late.bid(turn=False)
            lab.chain.down = True
            with pytest.raises(Unavailable):
                await late.turn()
            assert lab.orchestrator.sealer.market is before
            lab.chain.down = False
            answer = Database.run

            async def fail_the_freezing(self: Database, work: Any) -> Any:
                if work.__name__ == "freeze":
                    raise Unavailable("The database is away.")
                return await answer(self, work)

            with monkeypatch.context() as patch:
                patch.setattr(Database, "run", fail_the_freezing)
                with pytest.raises(Unavailable):
                    await late.turn()
            assert lab.orchestrator.sealer.market is before
            await late.turn()
            assert sorted(book(lab)) == sorted([peer.node, late.node])
            # What was opened when it could not be written down is written down now.
            entries = [
                StandingCommitment.decode(row.entry.encode())
                for row in await lab.rows(CommitmentRow)
            ]
            assert all(entry.opened is not None for entry in entries)

    run(scenario)


FORGERIES: dict[str, tuple[Callable[[Peer, Peer], BidCommitment], str]] = {
    "somebody else's node": (
        lambda peer, other: peer.seal(peer.make_bid(node=other.node)),
        "wrong_signer",
    ),
    "somebody else's account": (
        lambda peer, other: peer.seal(
            peer.make_bid(account=other.account.address), signer=other.account
        ),
        "wrong_signer",
    ),
    "another hand": (
        lambda peer, other: peer.seal(peer.make_bid(), signer=other.account),
        "wrong_signer",
    ),
    "lapsed": (lambda peer, other: peer.seal(peer.make_bid(valid_until_ms=1)), "bid_expired"),
}


@pytest.mark.parametrize(("forge", "code"), FORGERIES.values(), ids=FORGERIES.keys())
def test_a_bid_that_breaks_a_rule_is_refused_when_it_is_opened(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    forge: Callable[[Peer, Peer], BidCommitment],
    code: str,
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            peer, other = await lab.peer(), await lab.peer()
            # Sealed it looks like any other.
            await peer.commit(forge(peer, other))
            await other.bid()
            assert refusals(caplog) == [code]
            assert book(lab) == [other.node]
            # The negative control: the same bid, as it should be, competes.
            await peer.bid()
            assert sorted(book(lab)) == sorted([peer.node, other.node])

    run(scenario)


@pytest.mark.parametrize("forged", ["salt", "price", "epochs", "node"])
def test_a_bid_that_opens_no_commitment_of_its_node_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, forged: str
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            peer, thief = await lab.peer(), await lab.peer()
            bid = peer.make_bid()
            sealed = peer.seal(bid)
            true = peer.reveals[sealed.commitment]
            if forged == "epochs":
                shorter = sealed.model_copy(update={"epoch_to": sealed.epoch_to - 1})
                await peer.commit(shorter)
            else:
                await peer.commit(sealed)
            match forged:
                case "salt":
                    shown = true.model_copy(update={"salt": "0x" + "5" * 64})
                case "price":
                    dearer = bid.model_copy(update={"price_micros": 999})
                    shown = BidReveal(signed=sign(dearer, DOMAIN, peer.account), salt=true.salt)
                case _:
                    shown = true
            if forged == "node":
                # Another node shows the bid, whose price it has learnt, as its own.
                peer.reveals.clear()
                await thief.commit(thief.seal(thief.make_bid()))
                thief.reveals = dict.fromkeys(thief.reveals, shown)
            else:
                peer.reveals[sealed.commitment] = shown
            await peer.turn()
            assert refusals(caplog) == ["commitment_mismatch"]
            assert book(lab) == []

    run(scenario)


HOSTILE = [b"", b"\xff", b"null", b"{}", b"[" * 5_000, b'{"commitment":"0x12"}']


@pytest.mark.parametrize("protocol", [COMMIT_PROTOCOL, CANCEL_PROTOCOL])
def test_malformed_and_oversized_messages_are_the_peers_fault(
    tmp_path: Path, protocol: str
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            peer = await lab.peer()
            for data in HOSTILE:
                with pytest.raises(PeerFault):
                    await peer.ask(protocol, data)
            with pytest.raises(InvalidRequest):
                await peer.ask(protocol, b" " * (17 << 10))
            assert await lab.rows(CommitmentRow) == []
            await peer.bid()

    run(scenario)


@pytest.mark.parametrize("answer", HOSTILE)
def test_a_malformed_opening_costs_nobody_else_anything(tmp_path: Path, answer: bytes) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            hostile, peer = await lab.peer(), await lab.peer()

            async def nonsense(sender: Any, data: bytes) -> bytes:
                return answer

            hostile.network.serve(REVEAL_PROTOCOL, nonsense)
            await hostile.bid(turn=False)
            await peer.bid()
            assert book(lab) == [peer.node]

    run(scenario)


def test_a_stranger_and_a_node_with_too_many_bids_are_turned_away(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            stranger, greedy = await lab.peer(joined=False), await lab.peer()
            with pytest.raises(Unauthorised) as caught:
                await stranger.bid()
            assert caught.value.code == "not_joined"
            for number in range(MAX_COMMITMENTS_PER_NODE):
                name = f"0x{number:064x}"
                sealed = BidCommitment(commitment=name, epoch_from=0, epoch_to=1)
                await greedy.commit(sealed)
            with pytest.raises(InvalidRequest) as full:
                await greedy.bid()
            assert full.value.code == "too_many_bids"
            with pytest.raises(InvalidRequest) as stolen:
                await (await lab.peer()).commit(sealed)
            assert stolen.value.code == "duplicate_commitment"
            assert len(await lab.rows(CommitmentRow)) == MAX_COMMITMENTS_PER_NODE

    run(scenario)


def test_the_same_commitment_again_has_the_same_receipt_and_an_old_nonce_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            peer = await lab.peer()
            old, new = peer.make_bid(price_micros=100), peer.make_bid(price_micros=200)
            sealed = peer.seal(new)
            receipt = await peer.commit(sealed)
            assert await peer.commit(sealed) == receipt
            await peer.turn()
            await peer.bid(old)
            assert refusals(caplog) == ["stale_nonce"]
            prices = lab.orchestrator.auctioneer.prices
            assert prices(peer.node) == {"rollout": 200}
            for kind in TaskKind:
                await peer.bid(kind=kind, nonce=7)
            assert set(prices(peer.node)) == set(TaskKind)

    run(scenario)


def test_epochs_turn_when_bids_come_and_bids_together_make_one_epoch(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path, market_epoch_ms=10) as lab:
            first, second = await lab.peer(), await lab.peer()
            turned: asyncio.Queue[tuple[str, ...]] = asyncio.Queue()
            lab.orchestrator.sealer.on_market = lambda: turned.put_nowait(tuple(sorted(book(lab))))
            for peer in (first, second):
                await peer.bid(turn=False)
            lab.start(lab.orchestrator.sealer.run())
            assert await arrival(turned) == tuple(sorted([first.node, second.node]))
            lab.time.advance(10)
            await first.bid(kind=TaskKind.EVALUATE, turn=False)
            assert await arrival(turned) == tuple(sorted([first.node, first.node, second.node]))

    run(scenario)


def test_bids_are_waited_for_while_they_keep_coming_and_not_longer_than_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.orchestrator.sealer._GATHER_S", 0)

    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            sealer = lab.orchestrator.sealer

            def bids_come() -> asyncio.Task[None]:
                sealer._changed.set()
                return asyncio.create_task(sealer._gather())

            monkeypatch.setattr("shoal.orchestrator.sealer._LONGEST_GATHER_S", 60)
            gathering = bids_come()
            for _ in range(10):
                sealer._changed.set()
                await asyncio.sleep(0)
                assert not gathering.done()
            await gathering
            # The control: with one who never stops bidding the epoch turns all the same.
            monkeypatch.setattr("shoal.orchestrator.sealer._LONGEST_GATHER_S", 0.01)
            gathering = bids_come()
            while not gathering.done():
                sealer._changed.set()
                await asyncio.sleep(0)

    run(scenario)


def test_certificates_replay_from_what_the_database_holds(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            peers = [await lab.peer() for _ in range(4)]
            for number, peer in enumerate(peers):
                await peer.bid(price_micros=50 + number, turn=False)
            silent = await lab.peer()
            await silent.bid(turn=False)
            silent.reveals.clear()
            await silent.turn()
            lab.start(lab.orchestrator.auctioneer.run())
            cited = []
            for winner in peers[:2]:
                await lab.open_sale(job, num_units=8, parcel_units=8)
                cited.append((await arrival(winner.offers)).lease.record.certificate_sha256)
                # The second lot is cleared over another book, in which one bid was replaced.
                await peers[3].bid(price_micros=40, capacity=1)
            assert len(set(cited)) == 2
            for sha256 in cited:
                file = await published_clearing(lab.context, sha256)
                assert replay(file, lab.context.account.address) is None
                assert len(file.commitments) > len(file.reveals) == 4
                # The control: with one bid less it is another clearing.
                shorter = file.model_copy(update={"reveals": file.reveals[:-1]})
                assert replay(shorter, lab.context.account.address) is not None

    run(scenario)


@pytest.mark.parametrize("is_forgotten", [True, False])
def test_a_node_may_bid_for_job_after_job_as_the_earlier_ones_end(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    is_forgotten: bool,
) -> None:
    monkeypatch.setattr("shoal.market.sealing.MAX_OFFERS_PER_NODE", 2)

    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            peer = await lab.peer()
            for number in range(4):
                job_id = f"0x{number + 1:064x}"
                await peer.bid(job_id=job_id)
                if is_forgotten:
                    assert book(lab) == [peer.node]
                    lab.orchestrator.sealer.forget_job(job_id)
            # The negative control: nonces that are kept for ever use up a node's share of them.
            assert set(refusals(caplog)) == (set() if is_forgotten else {"too_many_bids"})

    run(scenario)
