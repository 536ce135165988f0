"""Paying for a job on a real chain: only for the job that was signed, only to its coordinator."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from client_records import INFO
from eth_abi.abi import encode as abi_encode
from eth_account import Account as EthAccount
from eth_account.signers.local import LocalAccount
from eth_utils.crypto import keccak

from shoal.client.api import ShoalClient
from shoal.client.demo import example_job
from shoal.client.escrow import Refund, refund_rest
from shoal.client.jobfile import load_job_file
from shoal.client.submission import submit_job
from shoal.client.views import MarketInfo, SubmittedJob
from shoal.contracts.anvil import Anvil, dev_account
from shoal.contracts.deployment import deploy
from shoal.contracts.gateway import ChainGateway
from shoal.protocol.errors import InvalidRequest, NotFound, OverBudget, PeerFault
from shoal.protocol.job import Job, JobState
from shoal.protocol.signing import Signed

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
                await faucet.token.fund(account.address, 10**18, micros)
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
        state = await gateway.escrow.job(submitted.job_id)
        assert (state.funded_micros, state.coordinator) == (budget, COORDINATOR)
        assert await gateway.token.balance(account.address) == 5
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
        assert await gateway.token.balance(account.address) == budget

    on_chain(tmp_path, use, micros=budget, changes=changes)


def test_an_account_without_the_budget_sends_nothing(tmp_path: Path) -> None:
    spec = load_job_file(example_job())

    async def use(client: Answers, gateway: ChainGateway, account: LocalAccount) -> None:
        with pytest.raises(OverBudget, match="holds"):
            await submit_job(client, gateway, spec, account)
        assert client.received is None
        with pytest.raises(NotFound):
            await gateway.escrow.job("0x" + "12" * 32)

    on_chain(tmp_path, use, micros=spec.budget.max_total_micros - 1, changes={})


def test_what_no_epoch_committed_comes_back_once_the_escrow_is_closed(tmp_path: Path) -> None:
    async def use(client: Answers, gateway: ChainGateway, account: LocalAccount) -> None:
        digest = b"\x01" * 32
        deadline_s = await gateway.now_s() + 1_000
        await gateway.escrow.open_job(digest, account.address, 900, deadline_s)
        job_id = job_id_of(account.address, digest)
        with pytest.raises(InvalidRequest, match=r"from \d{4}-\d\d-\d\d .* UTC on") as caught:
            await refund_rest(gateway, job_id)
        assert caught.value.code == "refund_too_early"
        assert await gateway.token.balance(account.address) == 100
        await gateway.escrow.close_job(job_id)
        first, second = [await refund_rest(gateway, job_id) for _ in range(2)]
        assert first == Refund(refunded_micros=900, sent_now=True)
        assert second == Refund(refunded_micros=900, sent_now=False)
        assert await gateway.token.balance(account.address) == 1_000
        with pytest.raises(NotFound):
            await refund_rest(gateway, "0x" + "12" * 32)

    on_chain(tmp_path, use, micros=1_000, changes={})


def test_an_escrow_past_its_deadline_is_refunded_though_nobody_closed_it(tmp_path: Path) -> None:
    async def use(client: Answers, gateway: ChainGateway, account: LocalAccount) -> None:
        digest = b"\x02" * 32
        # The chain's clock moves with its blocks; two more pass this deadline.
        deadline_s = await gateway.now_s() + 2
        await gateway.escrow.open_job(digest, account.address, 1_000, deadline_s)
        job_id = job_id_of(account.address, digest)
        while await gateway.now_s() < deadline_s:
            await gateway.token.transfer(account.address, 0)
        assert await refund_rest(gateway, job_id) == Refund(refunded_micros=1_000, sent_now=True)

    on_chain(tmp_path, use, micros=1_000, changes={})


def job_id_of(account: str, digest: bytes) -> str:
    return "0x" + keccak(abi_encode(["address", "bytes32"], [account, digest])).hex()
