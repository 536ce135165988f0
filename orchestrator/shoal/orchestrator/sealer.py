"""Market epochs: commitments in, the book sealed, bidders asked to open, the bids frozen.

An epoch ends when something has changed, at the earliest one market epoch after the last, and
after a minute at the latest, so that no seed is used for long.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from shoal.market.certificate import Chainhead
from shoal.market.frozen import FrozenBook, OpenedBid
from shoal.market.sealing import Backing, SealedBook
from shoal.orchestrator.context import Context
from shoal.orchestrator.roster import Member, Roster
from shoal.orchestrator.store.tables import CommitmentRow, SealRow
from shoal.protocol.errors import ShoalError, Unavailable
from shoal.protocol.ids import PeerId
from shoal.protocol.market import Bid
from shoal.protocol.merkle import hex32
from shoal.protocol.node import REVEAL_PROTOCOL
from shoal.protocol.sealing import (
    BidCancel,
    BidCancelReply,
    BidCommitment,
    BidReceipt,
    BidReveal,
    BookSeal,
    Reveals,
    SealNotice,
    StandingCommitment,
)
from shoal.protocol.signing import Signed, sign

_log = logging.getLogger(__name__)

_LONGEST_EPOCH_S = 60.0
_GATHER_S = 0.03
_LONGEST_GATHER_S = 0.25
"""Bids that come together are sealed together: many hear of a new job at once, and who comes a
moment later waits for a whole epoch."""
_REVEAL_WINDOW_S = 1.0
"""Who has not opened its bid by then competes from the next epoch on."""
_NOTICE_EVERY_MS = 60_000
"""How often a bidder with nothing to open is shown that its bids are still in the book."""


@dataclass(frozen=True, kw_only=True)
class SealedMarket:
    """One epoch's book as lots are cleared over it."""

    seal: Signed[BookSeal]
    book: FrozenBook
    head: Chainhead
    of_node: Mapping[str, Sequence[OpenedBid]]

    @classmethod
    def of(cls, seal: Signed[BookSeal], book: FrozenBook, head: Chainhead) -> SealedMarket:
        """The book with its bids found by node."""
        of_node: defaultdict[str, list[OpenedBid]] = defaultdict(list)
        for entry in book.opened:
            of_node[entry.bid.node].append(entry)
        return cls(seal=seal, book=book, head=head, of_node=dict(of_node))


class Sealer:
    """Takes commitments, and turns the market's epochs.

    Args:
        context: The orchestrator's surroundings.
        roster: Whose connection a commitment came over.
        backing_of: What stands behind a bid that is opened.
    """

    def __init__(
        self, context: Context, roster: Roster, backing_of: Callable[[Bid], Backing]
    ) -> None:
        self._context = context
        self._roster = roster
        self._backing_of = backing_of
        self._book = SealedBook(context.domain)
        self._changed = asyncio.Event()
        self._sealed_at_ms = 0
        self._noticed_ms: dict[str, int] = {}
        self._stored: set[str] = set()
        """The bids of the book last frozen, which are in the database."""
        self.market: SealedMarket | None = None
        """The book of the present epoch; None before the first."""
        self.on_market: Callable[[], None] = lambda: None
        """Called when a new epoch's book is frozen."""

    @property
    def epoch(self) -> int:
        """The first market epoch that bids can still be made for."""
        return self._book.next_epoch

    async def restore(self) -> None:
        """The commitments whose receipts are not over stand again, opened where they were."""
        self._book = await self._context.database.run(self._stored_book)
        if len(self._book):
            self._changed.set()

    def _stored_book(self, session: Session) -> SealedBook:
        last = session.scalar(select(SealRow.epoch).order_by(SealRow.epoch.desc()).limit(1))
        seq = session.scalar(select(CommitmentRow.seq).order_by(CommitmentRow.seq.desc()).limit(1))
        book = SealedBook(
            self._context.domain,
            next_epoch=0 if last is None else last + 1,
            next_seq=0 if seq is None else seq + 1,
        )
        rows = session.scalars(
            select(CommitmentRow.entry)
            .where(CommitmentRow.epoch_to >= book.next_epoch)
            .order_by(CommitmentRow.seq)
        )
        for row in rows:
            book.restore(StandingCommitment.decode(row.encode()))
        return book

    async def commit(self, peer: PeerId, sealed: BidCommitment) -> Signed[BidReceipt]:
        """The commitment stands from the next seal on, by our signed word.

        Raises:
            Unauthorised: the bidder has not joined.
            InvalidRequest, Unavailable: the commitment breaks a rule of the book, which is named.
        """
        member = self._roster.member(peer)
        now_ms = self._context.time.now_ms()
        receipt = self._book.commit(sealed, node=peer, account=member.account, now_ms=now_ms)
        # Before the receipt leaves: a word that is given must outlive this process.
        await self._keep(sealed.commitment)
        self._changed.set()
        return sign(receipt, self._context.domain, self._context.account)

    async def cancel(self, peer: PeerId, signed: Signed[BidCancel]) -> BidCancelReply:
        """The commitment is not asked for from the named epoch on.

        Raises:
            NotFound, InvalidRequest, Unauthorised, PeerFault: the rule that forbids it.
        """
        cancel = self._book.cancel(signed, node=peer)
        await self._keep(cancel.commitment)
        self._changed.set()
        return BidCancelReply(commitment=cancel.commitment, from_epoch=cancel.from_epoch)

    def forget_job(self, job_id: str) -> None:
        """Bids for this job alone compete no more; a node may bid for only so many jobs."""
        self._book.forget_job(job_id)

    async def _keep(self, commitment: str) -> None:
        """What is known of the commitment is in the database."""
        row = _row(self._book.entry(commitment))
        await self._context.database.run(lambda session: session.merge(row) and None)

    async def run(self) -> None:
        """Runs for ever: turns the epoch when the book has changed, or a minute has passed."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LONGEST_EPOCH_S):
                    await self._changed.wait()
            await asyncio.sleep(self._left_s())
            await self._gather()
            if not len(self._book):
                continue
            try:
                await self.turn()
            except Unavailable as error:
                _log.warning("seal_waits", extra={"reason": error.message})
                self._changed.set()

    async def _gather(self) -> None:
        """For a moment the book has not changed, or it has changed for long enough."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LONGEST_GATHER_S):
                while self._changed.is_set():
                    self._changed.clear()
                    await asyncio.sleep(_GATHER_S)
        self._changed.clear()

    def _left_s(self) -> float:
        """How long the present epoch must still last."""
        age_ms = self._context.time.now_ms() - self._sealed_at_ms
        return max(0, self._context.config.market_epoch_ms - age_ms) / 1000

    async def turn(self) -> None:
        """The next epoch's book is sealed, opened and frozen.

        Raises:
            Unavailable: the chain or the database does not answer; the epoch before goes on.
        """
        now_ms = self._context.time.now_ms()
        block = await self._context.chain.connection.block()
        sealed = self._book.seal(self._book.next_epoch, now_ms=now_ms)
        seal = sign(sealed.seal, self._context.domain, self._context.account)
        row = SealRow(
            epoch=sealed.seal.epoch,
            seal=seal.encode().decode(),
            block_hash=block["hash"].to_0x_hex(),
            block_number=block["number"],
        )
        # Before anybody is shown it: the same epoch must never be sealed twice.
        await self._context.database.run(lambda session: session.add(row))
        self._sealed_at_ms = now_ms
        await self._ask(seal)
        book = self._book.freeze()
        names = [hex32(entry.commitment) for entry in book.opened]
        rows = [_row(self._book.entry(name)) for name in names if name not in self._stored]

        def freeze(session: Session) -> None:
            session.get_one(SealRow, book.epoch).competing = json.dumps(names)
            for opened in rows:
                session.merge(opened)

        # Before anything is cleared over it: else no certificate of it could be replayed.
        await self._context.database.run(freeze)
        self._stored = set(names)
        head = Chainhead(block_hash=row.block_hash, block_number=row.block_number)
        self.market = SealedMarket.of(seal, book, head)
        self.on_market()

    async def _ask(self, seal: Signed[BookSeal]) -> None:
        """Everyone with a bid to open was asked for it, and had its time."""
        asked = [
            asyncio.create_task(self._show(member, notice))
            for member in self._roster.members()
            if self._roster.is_here(member) and (notice := self._notice(member, seal)) is not None
        ]
        if asked:
            _, late = await asyncio.wait(asked, timeout=_REVEAL_WINDOW_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    def _notice(self, member: Member, seal: Signed[BookSeal]) -> SealNotice | None:
        """What the member is to be shown of the seal; None when that can wait."""
        now_ms = self._context.time.now_ms()
        proofs, wanted = self._book.of_node(member.node)
        waited_ms = now_ms - self._noticed_ms.get(member.node, 0)
        # Also to one with no proof at all: whose every bid was left out must hear of the seal.
        if not wanted and waited_ms < _NOTICE_EVERY_MS:
            return None
        self._noticed_ms[member.node] = now_ms
        return SealNotice(seal=seal, proofs=proofs, wanted=wanted)

    async def _show(self, member: Member, notice: SealNotice) -> None:
        try:
            raw = await self._context.network.request(
                member.node, REVEAL_PROTOCOL, notice.encode(), timeout_s=_REVEAL_WINDOW_S
            )
            reveals = Reveals.decode(raw).reveals
        except ShoalError as error:
            _log.info("no_reveal", extra={"worker": member.node, "reason": error.message})
            return
        self._roster.heard(member.node)
        for reveal in reveals:
            self._open(member, reveal)

    def _open(self, member: Member, reveal: BidReveal) -> None:
        """The bid competes, or the log says which rule it breaks."""
        try:
            self._book.reveal(
                reveal,
                node=member.node,
                backing=self._backing_of(reveal.signed.record),
                now_ms=self._context.time.now_ms(),
            )
        except ShoalError as error:
            _log.warning(
                "bid_refused",
                extra={"worker": member.node, "code": error.code, "reason": error.message},
            )


def _row(entry: StandingCommitment) -> CommitmentRow:
    return CommitmentRow(
        commitment=entry.receipt.commitment,
        epoch_to=entry.receipt.epoch_to,
        seq=entry.receipt.seq,
        entry=entry.encode().decode(),
    )
