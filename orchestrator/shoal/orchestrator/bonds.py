"""What the orchestrator answers with for its jobs: put up before work is paid, taken back after.

Where a deployment asks for no bond, nothing is done and nothing is read but that.
"""

from __future__ import annotations

import logging
from functools import partial

from sqlalchemy import select
from sqlalchemy.orm import Session

from shoal.contracts.delivery import Stage
from shoal.contracts.records import EscrowState
from shoal.orchestrator.context import Context
from shoal.orchestrator.effects import (
    PUT_UP_BOND,
    RETURN_BOND,
    JobBond,
    allowance_key,
    bond_key,
    bond_return_key,
    enqueue_bond,
    enqueue_bond_return,
)
from shoal.orchestrator.outbox import Outbox
from shoal.orchestrator.store.tables import OutboxRow
from shoal.protocol.errors import ChainRejected
from shoal.protocol.money import format_dollars

_log = logging.getLogger(__name__)


class Bonds:
    """Puts up each job's bond and takes it back, once each."""

    def __init__(self, context: Context, outbox: Outbox) -> None:
        self._context = context
        self._outbox = outbox
        self._least_micros = 0

    async def open(self) -> None:
        """What the deployment asks for is known; call before any job is started.

        Raises:
            Unavailable: the chain does not answer.
        """
        self._least_micros = await self._context.chain.escrow.min_bond_micros()

    async def put_up(self, job_id: str) -> None:
        """The job's escrow holds the least bond from us, where the deployment asks for one.

        Raises:
            Unavailable: the chain or the database did not answer; call again.
            ChainRejected: the escrow or the token refused, as where our account lacks the money.
        """
        if not self._least_micros:
            return
        account, escrow = self._context.account.address, self._context.deployment.job_escrow
        bond = JobBond(job_id=job_id, amount_micros=self._least_micros)
        await self._context.database.run(
            lambda session: enqueue_bond(session, account, escrow, bond)
        )
        try:
            await self._outbox.deliver(allowance_key(escrow))
            await self._outbox.deliver(bond_key(job_id))
        except ChainRejected as error:
            raise ChainRejected(
                f"{error.message} For every job the account {account} of the orchestrator has to "
                f"put up ${format_dollars(bond.amount_micros)} of its own tokens.",
                reason=error.reason,
                code=error.code,
                tx_hash=error.tx_hash,
            ) from error

    async def take_back(self) -> None:
        """Every bond that may leave the escrow is ours again.

        Raises:
            Unavailable: the chain or the database did not answer; call again.
        """
        account = self._context.account.address
        for job_id in await self._context.database.run(_outstanding):
            if not await self._may_return(await self._context.chain.escrow.job(job_id)):
                continue
            await self._context.database.run(
                partial(enqueue_bond_return, account=account, job_id=job_id)
            )
            try:
                await self._outbox.deliver(bond_return_key(job_id))
            except ChainRejected as error:
                _log.warning("bond_waits", extra={"job_id": job_id, "reason": error.message})

    async def _may_return(self, job: EscrowState) -> bool:
        """Whether the job is over, and so is the time in which its bond may still be taken."""
        if not job.closed:
            return False
        window_s = await self._context.chain.escrow.challenge_window_s()
        # Of a closed job the deadline is when it ended.
        free_s = max(job.deadline_s + window_s, job.ready_at_s)
        return free_s <= await self._context.chain.now_s()


def _outstanding(session: Session) -> list[str]:
    """Jobs with a bond that was put up and has not come back for good."""
    rows = session.execute(
        select(OutboxRow.claim_key, OutboxRow.kind, OutboxRow.stage).where(
            OutboxRow.kind.in_((PUT_UP_BOND, RETURN_BOND))
        )
    ).all()
    up = (Stage.MINED.value, Stage.FINAL.value)
    bonded = [row.claim_key for row in rows if row.kind == PUT_UP_BOND and row.stage in up]
    returned = {
        row.claim_key for row in rows if row.kind == RETURN_BOND and row.stage == Stage.FINAL.value
    }
    jobs = sorted(key.removeprefix(bond_key("")) for key in bonded)
    return [job_id for job_id in jobs if bond_return_key(job_id) not in returned]
