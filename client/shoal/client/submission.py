"""How a job is submitted: signed, posted, then paid for on chain."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from eth_account.signers.local import LocalAccount

from shoal.client.api import ShoalClient
from shoal.client.views import MarketInfo, SubmittedJob
from shoal.protocol.errors import OverBudget, PeerFault, Unavailable
from shoal.protocol.job import Job, JobSpec
from shoal.protocol.money import format_dollars
from shoal.protocol.signing import sign

if TYPE_CHECKING:
    from shoal.contracts.gateway import ChainGateway

_NONCE_BITS = 52
"""As many as a whole number may have in canonical JSON (RFC 8785, after IEEE 754)."""


async def open_gateway(
    info: MarketInfo, account: LocalAccount, rpc_url: str | None = None
) -> ChainGateway:
    """A connection to the orchestrator's chain, acting as ``account``.

    Args:
        info: The orchestrator's greeting, which names chain and contracts.
        account: Whose transactions are sent.
        rpc_url: A chain node the caller trusts; absent uses the orchestrator's proposal.

    Raises:
        InvalidRequest: the node is on another chain than the orchestrator.
        Unavailable: no node answers.
    """
    # web3 takes about a second to import, which only paying commands owe.
    from shoal.contracts.gateway import ChainGateway
    from shoal.contracts.records import Deployment

    urls = (rpc_url,) if rpc_url else info.rpc_urls
    if not urls:
        raise Unavailable("The orchestrator names no chain node; name one with --rpc-url.")
    deployment = Deployment(
        chain_id=info.domain.chain_id, block_number=0, **info.contracts.model_dump()
    )
    return await ChainGateway.connect(urls[0], deployment, account)


async def submit_job(
    client: ShoalClient,
    gateway: ChainGateway,
    spec: JobSpec,
    account: LocalAccount,
) -> SubmittedJob:
    """The job is accepted and its whole budget lies in escrow.

    Raises:
        OverBudget: the account holds less than the budget; nothing was sent.
        InvalidRequest: the orchestrator refuses the job; nothing was paid.
        PeerFault: the orchestrator names another job or another coordinator than itself.
        ChainRejected: the escrow could not be opened.
    """
    info = await client.info()
    budget_micros = spec.budget.max_total_micros
    balance_micros = await gateway.token.balance(account.address)
    if balance_micros < budget_micros:
        raise OverBudget(
            f"The job's budget is ${format_dollars(budget_micros)} and {account.address} holds "
            f"${format_dollars(balance_micros)}; fund the account or lower budget.max_total.",
            account=account.address,
            balance_micros=balance_micros,
        )
    job = Job(spec=spec, requester=account.address, nonce=secrets.randbits(_NONCE_BITS))
    submitted = await client.submit(sign(job, info.domain, account))
    _require_ours(submitted, job, info)
    await gateway.escrow.open_job(
        job.job_digest(), submitted.coordinator, budget_micros, submitted.escrow_deadline_s
    )
    return submitted


def _require_ours(submitted: SubmittedJob, job: Job, info: MarketInfo) -> None:
    """Refuses to pay for anything but the job that was signed."""
    if submitted.job_id != job.job_id() or submitted.job_digest[2:] != job.job_digest().hex():
        raise PeerFault(
            f"The orchestrator answered for job {submitted.job_id}, not for {job.job_id()} as "
            "submitted; nothing was paid.",
            code="wrong_job",
        )
    if submitted.coordinator.lower() != info.orchestrator.lower():
        raise PeerFault(
            f"The orchestrator {info.orchestrator} names {submitted.coordinator} to spend the "
            "escrow; nothing was paid.",
            code="wrong_coordinator",
        )
