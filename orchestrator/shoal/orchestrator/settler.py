"""Settlement: what was accepted in an epoch goes to the chain with what was stated in it.

An epoch's payout root and provenance root travel in one transaction.  The row with both
roots is committed together with the outbox's order to post them.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shoal.contracts.records import Claim, EpochPost, EscrowState
from shoal.market.lease import LeaseState
from shoal.market.settlement import Ledger, PayEntry, PayoutSet, payout_set
from shoal.orchestrator.context import Context
from shoal.orchestrator.effects import closing_key, enqueue_closing, enqueue_epoch, epoch_key
from shoal.orchestrator.journal import Journal
from shoal.orchestrator.outbox import Outbox
from shoal.orchestrator.store.tables import EpochRow, JobRow, LeaseRow, StatementRow
from shoal.protocol.errors import ChainRejected, NotFound, Unavailable
from shoal.protocol.money import format_dollars
from shoal.provenance.log import EpochLog
from shoal.provenance.statement import StatementKind

_log = logging.getLogger(__name__)

_MAX_PAYOUTS_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class PayoutProof:
    """What one account may claim of a job, and the proof the escrow asks for."""

    epoch: int
    claim: Claim


class JobFrozen(ChainRejected):
    """The court has ended the job: nothing more of it is ever posted."""

    default_code = "job_frozen"


async def _nothing(job_id: str, error: JobFrozen) -> None:
    """Nobody is told of a frozen job."""


class Settler:
    """Closes epochs and posts their roots."""

    def __init__(self, context: Context, journal: Journal, outbox: Outbox) -> None:
        self._context = context
        self._journal = journal
        self._outbox = outbox
        self._ledgers: dict[str, Ledger] = {}
        self._turns: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.on_frozen: Callable[[str, JobFrozen], Awaitable[None]] = _nothing
        """Called with a job of the round that the court has ended, and why."""

    def ledger(self, job_id: str) -> Ledger:
        """The money of a job this process runs."""
        return self._ledgers[job_id]

    def knows(self, job_id: str) -> bool:
        """Whether the job's ledger has been rebuilt."""
        return job_id in self._ledgers

    async def adopt(self, job_id: str) -> Ledger:
        """Rebuilds the job's ledger from the verdicts in the database."""
        self._ledgers[job_id] = await self._context.database.run(
            lambda session: _stored_ledger(session, job_id)
        )
        return self._ledgers[job_id]

    async def settle(self, job_id: str) -> bool:
        """Posts the job's open epoch if it holds anything; whether it did.

        Raises:
            Unavailable: the chain or the database did not answer; calling again goes on
                where this call stopped.
            JobFrozen: the court has ended the job.
            ChainRejected: the escrow refused the roots.
        """
        # The epochs' own clock and the end of a job may both ask at the same time.
        async with self._turns[job_id]:
            await self._post_unposted(job_id)
            if not await self._context.database.run(lambda session: _pending(session, job_id)):
                # Who posts looks first; else workers might work on for nothing.
                await self._unfrozen(job_id)
                return False
            # Pay decided from here on belongs to the next epoch; what was decided before and is
            # being written is ahead of the closing in the database's thread.
            epoch = self._journal.turn_epoch(job_id)
            await self._context.database.run(lambda session: self._close(session, job_id, epoch))
            await self._post_unposted(job_id)
            return True

    def _close(self, session: Session, job_id: str, through: int) -> None:
        job = session.get_one(JobRow, job_id)
        # Normally one epoch; more where the database failed after an epoch was turned.
        for epoch in range(job.epoch, through + 1):
            owed = _owed(session, job_id, epoch)
            statements = session.scalars(
                select(StatementRow)
                .where(StatementRow.job_id == job.job_id, StatementRow.epoch == epoch)
                .order_by(StatementRow.seq)
            ).all()
            num_tasks = session.scalar(
                select(func.count())
                .select_from(LeaseRow)
                .where(LeaseRow.job_id == job.job_id, LeaseRow.settlement_epoch == epoch)
            )
            post = EpochPost(
                job_id=job.job_id,
                epoch=epoch,
                pay_root="0x" + owed.root(self._context.domain).hex(),
                prov_root="0x" + epoch_log(job.job_id, epoch, statements).root.hex(),
                cumulative_micros=owed.total_micros,
                num_tasks=num_tasks or 0,
                num_statements=len(statements),
            )
            session.add(EpochRow(**post.model_dump(), payouts=owed.encode().decode()))
            enqueue_epoch(session, self._context.account.address, post)
        job.epoch = through + 1

    async def _post_unposted(self, job_id: str) -> None:
        rows = await self._context.database.run(
            lambda session: session.scalars(
                select(EpochRow)
                .where(EpochRow.job_id == job_id, EpochRow.tx_hash.is_(None))
                .order_by(EpochRow.epoch)
            ).all()
        )
        for row in rows:
            await self._post(row)

    async def _post(self, row: EpochRow) -> None:
        onchain = await self._unfrozen(row.job_id)
        waits = onchain.epoch < row.epoch and onchain.ready_at_s > 0
        if waits and onchain.ready_at_s > await self._context.chain.now_s():
            raise Unavailable(
                f"The last epoch of job {row.job_id} may still be challenged; the next one is "
                "posted afterwards.",
                code="challenge_window",
            )
        await self._outbox.deliver(epoch_key(row.job_id, row.epoch))
        self._journal.wake(row.job_id)

    async def _unfrozen(self, job_id: str) -> EscrowState:
        """The job's escrow, which the court has not frozen."""
        escrow = await self._context.chain.escrow.job(job_id)
        if escrow.frozen:
            rest = escrow.funded_micros - escrow.committed_micros - escrow.refunded_micros
            raise JobFrozen(
                "The fault court froze the job's escrow, because its orchestrator was proved to "
                "have broken the rules of the market: nothing more is leased or paid. The "
                f"${format_dollars(escrow.committed_micros)} that its accepted epochs owe stay "
                f"claimable; the other ${format_dollars(rest)} are the requester's, who takes "
                f"them back with `shoal refund {job_id}`.",
                reason="JobFrozen",
            )
        return escrow

    async def close(self, job_id: str) -> None:
        """The job's escrow is closed: what no epoch committed is its requester's again.

        Raises:
            Unavailable: the chain or the database did not answer; call again.
            ChainRejected: the escrow refused.
        """
        account = self._context.account.address
        await self._context.database.run(lambda session: enqueue_closing(session, account, job_id))
        await self._outbox.deliver(closing_key(job_id))

    async def payouts(self, job_id: str) -> tuple[int, PayoutSet]:
        """The last posted epoch and what it owes.

        Raises:
            NotFound: no epoch of the job is on the chain yet.
        """
        row = await self._context.database.run(
            lambda session: session.scalar(
                select(EpochRow)
                .where(EpochRow.job_id == job_id, EpochRow.tx_hash.is_not(None))
                .order_by(EpochRow.epoch.desc())
                .limit(1)
            )
        )
        if row is None:
            raise NotFound(
                f"Job {job_id} has no settled epoch yet; try again in a few seconds.",
                code="nothing_settled",
            )
        return row.epoch, PayoutSet.decode(row.payouts.encode(), max_bytes=_MAX_PAYOUTS_BYTES)

    async def proof(self, job_id: str, account: str) -> PayoutProof:
        """What ``account`` may claim.

        Raises:
            NotFound: nothing is owed to it.
        """
        epoch, payouts = await self.payouts(job_id)
        cumulative_micros, proof = payouts.proof(self._context.domain, account)
        claim = Claim(
            account=account,
            cumulative_micros=cumulative_micros,
            proof=tuple("0x" + node.hex() for node in proof),
        )
        return PayoutProof(epoch=epoch, claim=claim)

    async def settle_all(self, job_ids: list[str]) -> None:
        """Settles each job; one whose chain does not answer or refuses waits for the next round."""
        for job_id in job_ids:
            try:
                await self.settle(job_id)
            except JobFrozen as error:
                await self.on_frozen(job_id, error)
            except (Unavailable, ChainRejected) as error:
                _log.warning("settlement_waits", extra={"job_id": job_id, "reason": error.message})


def _pending(session: Session, job_id: str) -> bool:
    """Whether anything is stated that no closed epoch holds."""
    stated = session.scalar(
        select(func.count())
        .select_from(StatementRow)
        .where(
            StatementRow.job_id == job_id,
            StatementRow.epoch >= session.get_one(JobRow, job_id).epoch,
        )
    )
    return bool(stated)


def _owed(session: Session, job_id: str, epoch: int) -> PayoutSet:
    """What the verdicts on record owe up to the epoch.

    Not what the ledger in memory says: a verdict whose write fails was never given, and what is
    committed on the chain can only grow.
    """
    rows = session.execute(
        select(LeaseRow.account, func.sum(LeaseRow.pay_micros))
        .where(
            LeaseRow.job_id == job_id,
            LeaseRow.state == LeaseState.ACCEPTED.value,
            LeaseRow.settlement_epoch <= epoch,
        )
        .group_by(LeaseRow.account)
    )
    return payout_set(job_id, epoch, ((account, int(micros)) for account, micros in rows))


def _stored_ledger(session: Session, job_id: str) -> Ledger:
    """The job's money by its accepted verdicts."""
    query = select(LeaseRow).where(
        LeaseRow.job_id == job_id, LeaseRow.state == LeaseState.ACCEPTED.value
    )
    entries = [
        PayEntry(
            task_id=row.task_id,
            lease_id=row.lease_id,
            account=row.account,
            pay_micros=row.pay_micros,
            claim_id=row.claim_id,
        )
        for row in session.scalars(query)
    ]
    return Ledger(job_id, session.get_one(JobRow, job_id).funded_micros, entries)


def epoch_log(job_id: str, epoch: int, rows: Iterable[StatementRow]) -> EpochLog:
    """The provenance log of one epoch, from its stored statements in order."""
    log = EpochLog(job_id, epoch)
    for row in rows:
        log.append(StatementKind(row.kind), row.payload_sha256, row.contributor)
    return log
