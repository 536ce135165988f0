"""Paying for a job on a real chain: only for the job that was signed, only to its coordinator."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account as EthAccount
from eth_account.signers.local import LocalAccount

from shoal.client.api import ShoalClient
from shoal.client.demo import example_job
from shoal.client.jobfile import load_job_file
from shoal.client.submission import submit_job
from shoal.client.views import MarketInfo, SubmittedJob
from shoal.contracts.anvil import Anvil, dev_account
from shoal.contracts.deployment import deploy
from shoal.contracts.gateway import ChainGateway
from shoal.protocol.errors import NotFound, OverBudget, PeerFault
from shoal.protocol.job import Job, JobState
from shoal.protocol.signing import Signed
from tests.integration.test_client_api import INFO

COORDINATOR = "0x" + "5" * 40


class Answers(ShoalClient):
    """A client whose orchestrator's two answers are made here, around a real signed job."""

    def __init__(self, info: MarketInfo, changes: dict[str, Any]) -> None:
        super().__init__("http://unused")
        self._answer = info
        self._changes = changes
        self.received: Signed[Job] | None = None

    async def info(self) -> MarketInfo:
        return self._answer

    async def submit(self, job: Signed[Job]) -> SubmittedJob:
        self.received = job
        honest = {
            "job_id": job.record.job_id(),
            "state": JobState.FUNDING,
            "job_digest": "0x" + job.record.job_digest().hex(),
            "coordinator": COORDINATOR,
            "escrow_deadline_s": 4_000_000_000,
        }
        return SubmittedJob.model_validate(honest | self._changes)


Use = Callable[[Answers, ChainGateway, LocalAccount], Awaitable[None]]


def on_chain(tmp_path: Path, use: Use, *, micros: int, changes: dict[str, Any]) -> None:
    async def go() -> None:
        async with Anvil(tmp_path) as chain:
            deployment = await deploy(chain.rpc_url, dev_account(0))
            account: LocalAccount = EthAccount.create()
            async with await ChainGateway.connect(
                chain.rpc_url, deployment, dev_account(0)
            ) as faucet:
                await faucet.fund(account.address, 10**18, micros)
            domain = {"chain_id": deployment.chain_id, "escrow": deployment.job_escrow}
            info = MarketInfo.model_validate(INFO | {"domain": domain})
            async with await ChainGateway.connect(chain.rpc_url, deployment, account) as gateway:
                await use(Answers(info, changes), gateway, account)

    asyncio.run(go())


def test_the_whole_budget_is_in_escrow(tmp_path: Path) -> None:
    spec = load_job_file(example_job())
    budget = spec.budget.max_total_micros

    async def use(client: Answers, gateway: ChainGateway, account: LocalAccount) -> None:
        submitted = await submit_job(client, gateway, spec, account)
        state = await gateway.escrow(submitted.job_id)
        assert (state.funded_micros, state.coordinator) == (budget, COORDINATOR)
        assert await gateway.token_balance(account.address) == 5
        assert client.received is not None
        client.received.require_signer((await client.info()).domain, account.address)

    on_chain(tmp_path, use, micros=budget + 5, changes={})


@pytest.mark.parametrize(
    "changes",
    [
        {"job_id": "0x" + "9" * 64},
        {"job_digest": "0x" + "9" * 64},
        {"coordinator": "0x" + "9" * 40},
    ],
)
def test_nothing_is_paid_for_another_job(tmp_path: Path, changes: dict[str, Any]) -> None:
    spec = load_job_file(example_job())
    budget = spec.budget.max_total_micros

    async def use(client: Answers, gateway: ChainGateway, account: LocalAccount) -> None:
        with pytest.raises(PeerFault, match="nothing was paid"):
            await submit_job(client, gateway, spec, account)
        assert await gateway.token_balance(account.address) == budget

    on_chain(tmp_path, use, micros=budget, changes=changes)


def test_an_account_without_the_budget_sends_nothing(tmp_path: Path) -> None:
    spec = load_job_file(example_job())

    async def use(client: Answers, gateway: ChainGateway, account: LocalAccount) -> None:
        with pytest.raises(OverBudget, match="holds"):
            await submit_job(client, gateway, spec, account)
        assert client.received is None
        with pytest.raises(NotFound):
            await gateway.escrow("0x" + "12" * 32)

    on_chain(tmp_path, use, micros=spec.budget.max_total_micros - 1, changes={})
