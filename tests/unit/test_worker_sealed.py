"""The worker's sealed bids: what it keeps, what it shows, and what it can prove afterwards."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account as EthAccount
from market_records import NOW_MS, lot
from sealed_market import auction_of, session_of
from worker_double import DOMAIN, JOB_ID, OrchestratorDouble

from shoal.market.certificate import clear_and_certify
from shoal.market.fault import ReceiptedBid, dropped_bid
from shoal.market.frozen import OpenedBid
from shoal.market.reserve import reserve_for
from shoal.network.identity import NodeIdentity
from shoal.network.memory import MemoryHub, MemoryNetwork
from shoal.protocol.clock import ManualTime
from shoal.protocol.errors import InvalidRequest, PeerFault, Unauthorised, Unavailable
from shoal.protocol.market import Bid, TaskKind
from shoal.protocol.merkle import unhex
from shoal.protocol.node import REVEAL_PROTOCOL
from shoal.protocol.sealing import BidReveal, BookSeal, SealNotice
from shoal.protocol.signing import Signed, sign, signing_digest
from shoal.worker.bidder import BID_EPOCHS, Bidder
from shoal.worker.capacity import CapacityNow
from shoal.worker.config import load_config
from shoal.worker.evidence import EvidenceBook
from shoal.worker.offers import Parties
from shoal.worker.sealed import SealedBid, SealedBids, seal_bid
from shoal.worker.session import Credentials, Link


class Trade:
    """One worker's sealed bids, and an orchestrator that signs what a test says."""

    def __init__(self, directory: Path) -> None:
        identity = NodeIdentity(b"o" * 32)
        self.double = OrchestratorDouble(MemoryNetwork(MemoryHub(), identity), identity)
        self.credentials = Credentials(
            account=EthAccount.create(), identity=NodeIdentity(b"w" * 32)
        )
        self.parties = self.credentials.parties(self.double.greeting)
        self.directory = directory
        self.bids = SealedBids(EvidenceBook(directory))

    def sealed(self, **changes: Any) -> SealedBid:
        fields: dict[str, Any] = {
            "job_id": JOB_ID,
            "kind": TaskKind.ROLLOUT,
            "epoch_from": 0,
            "epoch_to": 9,
            "price_micros": 100,
            "capacity": 8,
            "account": self.credentials.address,
            "node": self.credentials.node,
            "valid_until_ms": 1 << 50,
            "nonce": 1,
        }
        bid = Bid(**{**fields, **changes})
        return seal_bid(sign(bid, DOMAIN, self.credentials.account), self.parties)

    def kept(self, **changes: Any) -> SealedBid:
        """A bid that the worker has a receipt for."""
        sealed = self.sealed(**changes)
        self.bids.keep(sealed, self.double.receipt(sealed.commitment), self.parties)
        return sealed

    def lines(self, name: str) -> list[dict[str, Any]]:
        path = self.directory / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def names(*sealed: SealedBid) -> list[str]:
    return [item.commitment.commitment for item in sealed]


def test_what_is_sent_says_nothing_but_its_epochs_and_no_salt_comes_twice(tmp_path: Path) -> None:
    trade = Trade(tmp_path)
    one, same = trade.sealed(), trade.sealed()
    assert set(one.commitment.to_json()) == {"commitment", "epoch_from", "epoch_to"}
    # The very same bid under another salt cannot be told from another bid.
    assert one.reveal.signed.record == same.reveal.signed.record
    assert one.reveal.salt != same.reveal.salt
    assert one.commitment.commitment != same.commitment.commitment
    assert one.reveal.commitment(DOMAIN) == one.commitment.commitment


@pytest.mark.parametrize("changes", [{"commitment": "0x" + "9" * 64}, {"epoch_to": 8}])
def test_a_receipt_for_something_else_is_a_fault_and_not_kept(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    trade = Trade(tmp_path)
    sealed = trade.sealed()
    receipt = trade.double.receipt(sealed.commitment, **changes)
    with pytest.raises(PeerFault) as caught:
        trade.bids.keep(sealed, receipt, trade.parties)
    assert caught.value.code == "wrong_receipt"
    assert trade.lines("bids.jsonl") == []
    # Nor is it shown: the orchestrator has given its word for nothing.
    notice = trade.double.notice(names(sealed))
    assert trade.bids.open(notice, trade.parties).reveals == ()


def test_a_receipt_of_another_hand_is_refused(tmp_path: Path) -> None:
    trade = Trade(tmp_path)
    sealed = trade.sealed()
    forged = sign(trade.double.receipt(sealed.commitment).record, DOMAIN, EthAccount.create())
    with pytest.raises(Unauthorised):
        trade.bids.keep(sealed, forged, trade.parties)
    assert trade.lines("bids.jsonl") == []


def test_a_receipted_bid_is_kept_once_with_all_that_proves_it(tmp_path: Path) -> None:
    trade = Trade(tmp_path)
    sealed = trade.kept()
    trade.bids.keep(sealed, trade.double.receipt(sealed.commitment), trade.parties)
    (line,) = trade.lines("bids.jsonl")
    assert ReceiptedBid.model_validate_json(json.dumps(line)).reveal == sealed.reveal


def test_only_what_is_asked_for_and_sealed_is_shown(tmp_path: Path) -> None:
    trade = Trade(tmp_path)
    first, second = trade.kept(), trade.kept(nonce=2)
    sealed = names(first, second)
    asked = trade.double.notice(sealed, wanted=names(second))
    assert trade.bids.open(asked, trade.parties).reveals == (second.reveal,)
    nothing = trade.double.notice(sealed, wanted=())
    assert trade.bids.open(nothing, trade.parties).reveals == ()
    unknown = trade.double.notice(sealed, wanted=("0x" + "7" * 64,))
    assert trade.bids.open(unknown, trade.parties).reveals == ()
    # A price shown for a book that does not hold it would be known before the book is closed.
    left_out = trade.double.notice(names(first), wanted=sealed)
    assert trade.bids.open(left_out, trade.parties).reveals == (first.reveal,)


def test_a_proof_of_another_book_proves_nothing(tmp_path: Path) -> None:
    trade = Trade(tmp_path)
    sealed = trade.kept()
    true = trade.double.notice(names(sealed))
    other = trade.double.notice(["0x" + "7" * 64])
    lie = true.model_copy(update={"seal": other.seal})
    assert trade.bids.open(lie, trade.parties).reveals == ()
    assert len(trade.lines("drops.jsonl")) == 1


def test_a_seal_by_somebody_else_opens_nothing(tmp_path: Path) -> None:
    trade = Trade(tmp_path)
    sealed = trade.kept()
    for notice in (
        trade.double.notice(names(sealed), signer=EthAccount.create()),
        trade.double.notice([], wanted=names(sealed), signer=trade.credentials.account),
    ):
        with pytest.raises(Unauthorised):
            trade.bids.open(notice, trade.parties)
    assert trade.lines("drops.jsonl") == []


@pytest.mark.parametrize(("epoch", "is_dropped"), [(3, False), (4, True), (9, True), (10, False)])
def test_a_drop_is_one_only_in_the_epochs_of_the_receipt(
    tmp_path: Path, epoch: int, is_dropped: bool
) -> None:
    trade = Trade(tmp_path)
    sealed = trade.sealed()
    receipt = trade.double.receipt(sealed.commitment, epoch_from=4)
    trade.bids.keep(sealed, receipt, trade.parties)
    trade.bids.open(trade.double.notice([], epoch=epoch), trade.parties)
    assert len(trade.lines("drops.jsonl")) == is_dropped


def test_a_bid_that_was_left_out_is_proof_the_court_takes(tmp_path: Path) -> None:
    trade = Trade(tmp_path)
    mine, other = trade.kept(price_micros=50), trade.sealed(nonce=2)
    notice = trade.double.notice(names(other), epoch=7)
    for _ in range(3):
        assert trade.bids.open(notice, trade.parties).reveals == ()
    # Kept once, however often the orchestrator shows it.
    (line,) = trade.lines("drops.jsonl")
    held = ReceiptedBid.model_validate_json(json.dumps(line["bid"]))
    assert Signed[BookSeal].model_validate_json(json.dumps(line["seal"])) == notice.seal

    certificate = certificate_over(trade, other.reveal)
    assert certificate.record.seed_parts.commit_root == notice.seal.record.commit_root
    proof = dropped_bid(certificate, names(other), held, DOMAIN)
    assert proof.function == "droppedBid"
    assert mine.commitment.commitment in proof.sentence
    # The control: there is no such proof against a book that holds the bid.
    honest = certificate_over(trade, mine.reveal, other.reveal)
    with pytest.raises(InvalidRequest) as caught:
        dropped_bid(honest, names(mine, other), held, DOMAIN)
    assert caught.value.code == "not_dropped"


def certificate_over(trade: Trade, *reveals: BidReveal) -> Signed[Any]:
    """A clearing of a lot of the job over exactly these bids, signed by the orchestrator."""
    opened = [
        OpenedBid(
            signed=reveal.signed,
            digest=signing_digest(reveal.signed.record, DOMAIN),
            commitment=unhex(reveal.commitment(DOMAIN)),
            salt=unhex(reveal.salt),
        )
        for reveal in reveals
    ]
    auctioned = lot(job_id=JOB_ID)
    session = session_of(opened, [])
    auction, reserve = auction_of(auctioned), reserve_for(auctioned.reserve_micros)
    _, certificate = clear_and_certify(auction, reserve, session, issued_at_ms=NOW_MS)
    return sign(certificate, DOMAIN, trade.double.account)


@asynccontextmanager
async def bidding(
    folder: Path, way: type[Link] = Link
) -> AsyncIterator[tuple[Bidder, OrchestratorDouble, Parties]]:
    """A bidder that has dialled an orchestrator's double."""
    trade = Trade(folder / "evidence")
    hub, orchestrator = MemoryHub(), NodeIdentity(b"o" * 32)
    double = OrchestratorDouble(MemoryNetwork(hub, orchestrator), orchestrator)
    network = MemoryNetwork(hub, trade.credentials.identity, listens=False)
    await double.network.start()
    await network.start()
    link = way(network)
    await link.dial(double.network.addresses[0])
    config = load_config(None, {}, {"orchestrator": "http://a", "data_dir": folder})
    parties = trade.credentials.parties(double.greeting)
    book = EvidenceBook(folder / "book")
    capacity = CapacityNow(config.capacity)
    bidder = Bidder(config, capacity, trade.credentials, link, book, ManualTime())
    network.serve(REVEAL_PROTOCOL, lambda peer, data: shown(bidder, parties, data))
    yield bidder, double, parties
    await network.stop()
    await double.network.stop()


def test_after_joining_again_the_same_commitments_are_sent_and_new_ones_in_time(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with bidding(tmp_path) as (bidder, double, parties):

            async def sent(market_epoch: int) -> list[str]:
                double.committed.clear()
                await bidder.refresh(double.jobs, market_epoch, parties)
                return list(double.committed)

            first = await sent(0)
            assert len(first) == len(TaskKind)
            assert await sent(1) == []
            bidder.forget()
            assert await sent(1) == first
            # Half of their epochs later they are followed by others.
            renewed = await sent(BID_EPOCHS // 2)
            assert len(renewed) == len(TaskKind)
            assert not set(renewed) & set(first)

    asyncio.run(scenario())


def test_a_jobs_bids_are_sent_together_and_one_that_fails_is_sent_again(tmp_path: Path) -> None:
    class Together(Link):
        """A way on which nothing arrives before all of a job's bids are on it."""

        asked = 0

        async def request(self, protocol: str, payload: bytes, *, timeout_s: float = 1.0) -> bytes:
            self.asked += 1
            number = self.asked
            if number == len(TaskKind):
                all_sent.set()
            await all_sent.wait()
            if number == 1:
                raise Unavailable("The connection broke.")
            return await super().request(protocol, payload)

    all_sent = asyncio.Event()

    async def scenario() -> None:
        async with bidding(tmp_path, Together) as (bidder, double, parties):
            async with asyncio.timeout(20):
                await bidder.refresh(double.jobs, 0, parties)
            assert len(double.committed) == len(TaskKind) - 1
            await bidder.refresh(double.jobs, 0, parties)
            assert len({*double.committed}) == len(double.committed) == len(TaskKind)

    asyncio.run(scenario())


async def shown(bidder: Bidder, parties: Parties, data: bytes) -> bytes:
    return bidder.open(SealNotice.decode(data), parties).encode()
