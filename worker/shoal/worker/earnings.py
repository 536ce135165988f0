"""Collects what jobs owe: the proof is checked against the chain before anything is sent."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shoal.contracts.records import Claim, EscrowState
from shoal.protocol.errors import PeerFault, ShoalError, Unavailable
from shoal.protocol.ids import Address, Hex32
from shoal.protocol.merkle import payout_leaf, verify
from shoal.protocol.money import MicrosField
from shoal.protocol.record import first_fault
from shoal.protocol.signing import Domain
from shoal.worker.events import log_event, log_failure
from shoal.worker.evidence import EvidenceBook
from shoal.worker.http import get_json
from shoal.worker.ports import ProviderChain

_MAX_PROOF: Final = 64
_FAST_PAUSE_S: Final = 1.0
_FAST_ROUNDS: Final = 60
"""After a job ends its last epoch is about to be posted: for a minute we look every second."""


class PayoutStatement(BaseModel):
    """What the orchestrator's API says a job owes an account, with the proof.

    Writer: the orchestrator.  Reader: the worker, which believes the chain's root only.
    ``final`` says that the job will never owe the account more.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    job_id: Hex32
    account: Address
    epoch: int = Field(ge=0, lt=2**64)
    cumulative_micros: MicrosField
    proof: tuple[Hex32, ...] = Field(max_length=_MAX_PROOF)
    final: bool = False


class Collector:
    """Claims what is owed, job by job.

    Args:
        chain: The chain, with the provider's account.
        book: Which jobs may owe something.
        account: The provider's account.
        domain: Chain and escrow.
        api_url: The orchestrator's API.
        claim_min_micros: Below it an unfinished job is left to owe more.
    """

    def __init__(
        self,
        chain: ProviderChain,
        book: EvidenceBook,
        account: str,
        domain: Domain,
        *,
        api_url: str,
        claim_min_micros: int,
    ) -> None:
        self._chain = chain
        self._book = book
        self._account = account
        self._domain = domain
        self._api_url = api_url.rstrip("/")
        self._claim_min_micros = claim_min_micros
        # One claim at a time: the closing claim must not race the periodic one.
        self._lock = asyncio.Lock()
        self._hurry = asyncio.Event()
        self._seen_open: frozenset[str] = frozenset()
        self._fast_rounds = 0
        self._owed: dict[str, int] = {}
        self.paid_micros = 0
        """What was claimed since the start."""

    @property
    def owed_micros(self) -> int | None:
        """What the jobs owed at the last look; None before the first."""
        return sum(self._owed.values()) if self._owed else None

    def note_open(self, job_ids: Iterable[str]) -> None:
        """Jobs that were open and no longer are will be looked at soon: they pay up now."""
        now_open = frozenset(job_ids)
        if self._seen_open - now_open:
            self._fast_rounds = _FAST_ROUNDS
            self._hurry.set()
        self._seen_open = now_open

    async def run(self, interval_s: float) -> None:
        """Collects every ``interval_s``, and oftener after a job ended, until cancelled."""
        while True:
            pause_s = min(interval_s, _FAST_PAUSE_S) if self._fast_rounds else interval_s
            self._fast_rounds = max(0, self._fast_rounds - 1)
            self._hurry.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._hurry.wait()
            await self.collect_all(even_small=False)

    async def collect_all(self, *, even_small: bool) -> int:
        """Micros claimed over all jobs; a job that fails is logged and left for next time."""
        total = 0
        for job_id in self._book.open_jobs():
            try:
                total += await self.collect(job_id, even_small=even_small)
            except ShoalError as error:
                log_failure("claim_failed", error, job_id=job_id)
        return total

    async def collect(self, job_id: str, *, even_small: bool) -> int:
        """Micros claimed from one job, 0 when nothing was worth claiming.

        Raises:
            PeerFault: the orchestrator's proof does not lead to the chain's root.
            Unavailable: the API or the chain does not answer, or they are an epoch apart.
            ChainRejected: the chain refused the claim.
        """
        async with self._lock:
            statement = await self._statement(job_id)
            if statement is None:
                return 0
            owed_micros = statement.cumulative_micros - await self._chain.escrow.claimed(
                job_id, self._account
            )
            self._owed[job_id] = max(0, owed_micros)
            if owed_micros <= 0:
                paid_micros = 0
            elif even_small or statement.final or owed_micros >= self._claim_min_micros:
                if not await self._claim(statement, owed_micros):
                    return 0
                paid_micros = owed_micros
                self._owed[job_id] = 0
                self.paid_micros += paid_micros
            else:
                return 0
            if statement.final:
                self._book.settle_job(job_id)
            return paid_micros

    async def _claim(self, statement: PayoutStatement, owed_micros: int) -> bool:
        """False when the root may still be challenged, so that nothing is payable yet."""
        escrow = await self._chain.escrow.job(statement.job_id)
        self._check_proof(statement, escrow)
        if escrow.ready_at_s > 0 and escrow.ready_at_s > await self._chain.now_s():
            return False
        claim = Claim(
            account=self._account,
            cumulative_micros=statement.cumulative_micros,
            proof=statement.proof,
        )
        mined = await self._chain.escrow.claim(statement.job_id, claim)
        log_event("paid", job_id=statement.job_id, amount_micros=owed_micros, tx_hash=mined.tx_hash)
        return True

    async def _statement(self, job_id: str) -> PayoutStatement | None:
        url = f"{self._api_url}/v1/market/jobs/{job_id}/payouts/{self._account}"
        answer = await get_json(url)
        if answer is None:
            return None
        try:
            statement = PayoutStatement.model_validate(answer)
        except ValidationError as error:
            raise PeerFault(
                f"{url} answered with no payout: {first_fault(error)}.", code="malformed"
            ) from None
        if statement.job_id != job_id or statement.account.lower() != self._account.lower():
            raise PeerFault(
                f"{url} answered with the payout of {statement.account} for another query.",
                code="wrong_payout",
            )
        return statement

    def _check_proof(self, statement: PayoutStatement, escrow: EscrowState) -> None:
        if escrow.epoch != statement.epoch:
            raise Unavailable(
                f"The orchestrator states epoch {statement.epoch} of {statement.job_id} and the "
                f"chain is at {escrow.epoch}; the claim is tried again.",
                code="epoch_apart",
            )
        leaf = payout_leaf(
            self._domain.chain_id,
            self._domain.escrow,
            statement.job_id,
            statement.account,
            statement.cumulative_micros,
        )
        root = bytes.fromhex(escrow.pay_root[2:])
        if not verify(root, leaf, [bytes.fromhex(node[2:]) for node in statement.proof]):
            raise PeerFault(
                f"The orchestrator's proof for epoch {statement.epoch} of {statement.job_id} does "
                f"not lead to the root on chain; keep its answer as evidence.",
                evidence=leaf.hex(),
                code="bad_proof",
            )
