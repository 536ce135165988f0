"""What replays find, before the court: thirty bidders, several epochs, one bid left out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from eth_abi.abi import encode as abi_encode
from market_records import NOW_MS, account, lot
from sealed_market import HEAD, Stage, auction_of, bid_of, node, salt_of, terms

from shoal.contracts.anvil import Anvil, dev_account
from shoal.contracts.court import CaseStatus, Fault
from shoal.contracts.deployment import deploy
from shoal.contracts.gateway import ChainGateway
from shoal.market.certificate import Session, clear_and_certify
from shoal.market.fault import ReceiptedBid, dropped_bid
from shoal.market.frozen import FrozenBook, TermsTable
from shoal.market.replay import ClearingFile, clearing_file, court_proofs, replay
from shoal.market.reserve import reserve_for
from shoal.market.seal import SealedEpoch
from shoal.market.sealing import Backing, SealedBook
from shoal.protocol.certificate import ClearingRule
from shoal.protocol.errors import ChainRejected
from shoal.protocol.merkle import keccak, unhex
from shoal.protocol.sealing import BidCommitment, BidReveal, commitment_of
from shoal.protocol.signing import Domain, sign, signing_digest

BUDGET = 1_000_000
DAY_S = 86_400
NUM_BIDDERS = 30


@dataclass
class Bench:
    """A chain with a court, an orchestrator with jobs, and somebody who accuses it."""

    requester: ChainGateway
    accuser: ChainGateway
    stage: Stage

    async def job(self, number: int) -> Stage:
        """A funded job of its own, since a proven fault ends the job."""
        digest = bytes([number]) * 32
        deadline_s = await self.requester.now_s() + DAY_S
        orchestrator = self.stage.orchestrator.address
        await self.requester.escrow.open_job(digest, orchestrator, BUDGET, deadline_s)
        packed = abi_encode(["address", "bytes32"], [self.requester.account, digest])
        return replace(self.stage, job_id="0x" + keccak(packed).hex())


@asynccontextmanager
async def bench(directory: Path) -> AsyncIterator[Bench]:
    async with Anvil(directory) as anvil:
        deployment = await deploy(anvil.rpc_url, dev_account(0))
        async with (
            await ChainGateway.connect(anvil.rpc_url, deployment, dev_account(0)) as accuser,
            await ChainGateway.connect(anvil.rpc_url, deployment, dev_account(1)) as requester,
        ):
            await accuser.token.fund(requester.account, 0, 10 * BUDGET)
            domain = Domain(chain_id=deployment.chain_id, escrow=deployment.job_escrow)
            stage = Stage(domain=domain, orchestrator=dev_account(2))
            yield Bench(requester, accuser, stage)


def test_the_court_accepts_what_a_replay_finds_and_nothing_else(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with bench(tmp_path) as b:
            dear = await b.job(1)
            forged = dear.repriced(dear.published(), 2, 150)
            (above,) = court_proofs(forged)
            case = await b.accuser.court.prove(above.calldata())
            assert (case.fault, case.status) == (Fault.PRICE_ABOVE_BID, CaseStatus.UPHELD)
            assert case.accused == b.stage.orchestrator.address
            with pytest.raises(ChainRejected) as twice:
                await b.accuser.court.prove(above.calldata())
            assert twice.value.reason.startswith("CaseExists(")

            cheap = await b.job(2)
            (below,) = court_proofs(cheap.repriced(cheap.published(), 1, 2))
            case = await b.accuser.court.prove(below.calldata())
            assert case.fault is Fault.PRICE_BELOW_BID

            double = await b.job(3)
            other = double.published(left_out=(2,))
            lie = double.published().model_copy(update={"seal": other.seal})
            (books,) = court_proofs(lie)
            assert (await b.accuser.court.prove(books.calldata())).fault is Fault.TWO_BOOKS

            # A lie told to the court: an honest rung said to pay more than was signed.
            fair = await b.job(4)
            file = fair.published()
            (lie_of,) = court_proofs(fair.repriced(file, 2, 150))
            signed = two_parts(file)
            slander = replace(lie_of, arguments=((*signed, *lie_of.arguments[0][2:]),))
            with pytest.raises(ChainRejected) as kept:
                await b.accuser.court.prove(slander.calldata())
            assert kept.value.reason.startswith("NotInTree(")

    asyncio.run(scenario())


def two_parts(file: ClearingFile) -> tuple[tuple[object, ...], bytes]:
    """The honest certificate and its signature, as the court takes them."""
    message = file.certificate.record.eip712_message()
    names = [name for name, _ in file.certificate.record.eip712_fields]
    return tuple(message[name] for name in names), unhex(file.certificate.signature)


def test_a_better_bid_dropped_among_thirty_bidders_is_proven(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with bench(tmp_path) as b:
            stage = await b.job(1)
            market = _Market(stage)
            for epoch in range(3):
                market.seal(epoch)
                file = market.cleared()
                assert file.certificate.record.rule is ClearingRule.UNIFORM
                assert replay(file, stage.orchestrator.address) is None
            market.seal(3, dropped=5)
            file = market.cleared()
            # The replay alone cannot know of a bid that nobody published; its owner does.
            assert replay(file) is None
            held = market.held(5)
            bid = held.reveal.signed.record
            worst = max(rung.price_micros for rung in file.rungs if rung.num_units)
            assert bid.price_micros < worst
            proof = dropped_bid(file.certificate, file.commitments, held, stage.domain)
            case = await b.accuser.court.prove(proof.calldata())
            assert (case.fault, case.status) == (Fault.DROPPED_BID, CaseStatus.UPHELD)
            # Whoever sends the proof, the bidder is the one who was wronged.
            assert case.challenger == bid.account
            assert case.accused == stage.orchestrator.address

    asyncio.run(scenario())


class _Market:
    """Thirty bidders of standing bids, and an orchestrator that seals, opens and clears."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._book = SealedBook(stage.domain)
        self._numbers = {}
        self._receipts = {}
        self._reveals = {}
        for number in range(1, NUM_BIDDERS + 1):
            bid = bid_of(number, price_micros=90 + number)
            digest = signing_digest(bid, stage.domain)
            name = commitment_of(digest, unhex(salt_of(number)))
            sealed = BidCommitment(commitment=name, epoch_from=0, epoch_to=100)
            self._receipts[number] = self._book.commit(
                sealed, node=node(number), account=bid.account, now_ms=NOW_MS
            )
            self._reveals[number] = BidReveal(
                signed=sign(bid, stage.domain, account(number)), salt=salt_of(number)
            )
            self._numbers[name] = number

    def seal(self, epoch: int, *, dropped: int | None = None) -> None:
        """Closes the book, without the commitment of ``dropped``, and opens the bids."""
        self._sealed = self._book.seal(epoch, now_ms=NOW_MS)
        for number, reveal in self._reveals.items():
            _, wanted = self._book.of_node(node(number))
            assert bool(wanted) == (epoch == 0)
            if wanted:
                backing = Backing(staked=True, bound_units=1_000)
                self._book.reveal(reveal, node=node(number), backing=backing, now_ms=NOW_MS)
        self._opened = list(self._book.freeze().opened)
        if dropped is not None:
            self._opened = [e for e in self._opened if e.bid.node != node(dropped)]
            kept = [entry.commitment for entry in self._opened]
            self._sealed = SealedEpoch.of(epoch, kept, sealed_at_ms=NOW_MS)

    def cleared(self) -> ClearingFile:
        """The epoch's lot, certified and published."""
        stage, seal = self._stage, self._sealed.seal
        table = TermsTable([terms(number) for number in self._reveals])
        book = FrozenBook(seal.epoch, self._opened)
        session = Session(seal=seal, book=book, terms=table, head=HEAD)
        auctioned = lot(100, job_id=stage.job_id, epoch=seal.epoch + 1)
        reserve = reserve_for(auctioned.reserve_micros)
        cleared, certificate = clear_and_certify(
            auction_of(auctioned), reserve, session, issued_at_ms=NOW_MS
        )
        return clearing_file(
            sign(certificate, stage.domain, stage.orchestrator),
            sign(seal, stage.domain, stage.orchestrator),
            self._sealed.commitments,
            session,
            cleared.ladder.rungs(),
            domain=stage.domain,
        )

    def held(self, number: int) -> ReceiptedBid:
        """The bidder's own evidence."""
        receipt = sign(self._receipts[number], self._stage.domain, self._stage.orchestrator)
        return ReceiptedBid(receipt=receipt, reveal=self._reveals[number])
