"""What becomes of a job's escrow: each step is tried until the chain has taken it."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from shoal.orchestrator.bonds import Bonds
from shoal.orchestrator.context import Context
from shoal.orchestrator.journal import Journal
from shoal.orchestrator.settler import Settler
from shoal.protocol.errors import ChainRejected, NotFound, Unavailable

_log = logging.getLogger(__name__)

_CHAIN_RETRY_S: Final = 1.0


class PatientEscrow:
    """Bond, settlement and closing of jobs, over a chain that comes and goes.

    Each raises ChainRejected where the contract refuses for good.
    """

    def __init__(self, context: Context, journal: Journal, settler: Settler, bonds: Bonds) -> None:
        self._context = context
        self._journal = journal
        self._settler = settler
        self._bonds = bonds

    async def put_up_bond(self, job_id: str) -> None:
        """Our bond for the job is up."""
        while True:
            try:
                return await self._bonds.put_up(job_id)
            except (Unavailable, ChainRejected) as error:
                _require_passing(error)
                _log.warning("bond_waits", extra={"job_id": job_id, "reason": str(error)})
                await asyncio.sleep(_CHAIN_RETRY_S)

    async def settle_fully(self, job_id: str) -> None:
        """Everything that was accepted or stated is posted.

        Raises:
            JobFrozen: the court has ended the job.
        """
        while True:
            try:
                if not await self._settler.settle(job_id):
                    return
            except (Unavailable, ChainRejected) as error:
                _require_passing(error)
                _log.warning("settlement_waits", extra={"job_id": job_id, "reason": str(error)})
                await asyncio.sleep(_CHAIN_RETRY_S)

    async def close(self, job_id: str) -> None:
        """What nobody is owed is the requester's again."""
        while True:
            try:
                await self._settler.close(job_id)
            except (Unavailable, ChainRejected) as error:
                _require_passing(error)
                _log.warning("closing_waits", extra={"job_id": job_id, "reason": str(error)})
                await asyncio.sleep(_CHAIN_RETRY_S)
            else:
                await self._journal.event(job_id, "escrow_closed", {})
                return

    async def is_open(self, job_id: str) -> bool:
        """Whether an escrow of the job is open on the chain, and ours to close."""
        while True:
            try:
                escrow = await self._context.chain.escrow.job(job_id)
            except NotFound:
                return False
            except Unavailable as error:
                _log.warning("closing_waits", extra={"job_id": job_id, "reason": str(error)})
                await asyncio.sleep(_CHAIN_RETRY_S)
            else:
                ours = escrow.coordinator.lower() == self._context.account.address.lower()
                return ours and not escrow.closed


def _require_passing(error: Unavailable | ChainRejected) -> None:
    """Passes only what trying again may mend.

    A refusal that names a transaction was of that transaction alone, and the outbox sends the
    effect anew; one that names none was the contract's answer before anything was sent.

    Raises:
        ChainRejected: the contract's answer.
    """
    if isinstance(error, ChainRejected) and not error.tx_hash:
        raise error
