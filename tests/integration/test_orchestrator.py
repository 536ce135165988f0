"""A whole market in one process: chain, libp2p, HTTP, database, learning, workers; all real."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
import torch
from eth_account import Account as EthAccount
from eth_account.signers.local import LocalAccount
from sqlalchemy import select

from shoal.client.api import ShoalClient
from shoal.client.submission import submit_job
from shoal.contracts.anvil import Anvil, dev_account
from shoal.contracts.deployment import deploy, store_deployment
from shoal.contracts.gateway import ChainGateway
from shoal.contracts.records import Deployment
from shoal.network.blob_client import BlobClient
from shoal.network.blob_store import BlobStore
from shoal.network.libp2p_node import Libp2pNode
from shoal.orchestrator.config import OrchestratorConfig
from shoal.orchestrator.main import serve
from shoal.orchestrator.store.database import Database
from shoal.orchestrator.store.tables import JobRow, LeaseRow, StatementRow
from shoal.protocol.job import BudgetSpec, EnvSpec, EvalSpec, JobSpec, SamplingSpec, TaskSizes
from shoal.protocol.keystore import store_account
from shoal.protocol.learning import LoraSpec, OptimizerSpec
from shoal.protocol.market import TaskKind
from shoal.protocol.node import HelloReply
from shoal.protocol.result import Verdict
from shoal.provenance.bundle import read_bundle
from shoal.provenance.verifier import verify_bundle
from shoal.rl.base_models import WarmStart, build_base
from shoal.worker import main as worker_main
from shoal.worker.config import Device, load_config
from shoal.worker.engine import PolicyEngine
from shoal.worker.node import Parts, WorkerNode
from shoal.worker.ports import AnyTask, Engine, ProviderChain, TaskInput, TaskOutput

ENVIRONMENT = EnvSpec(id="addition", args={"digits": 1})
BUDGET_MICROS = 3_000_000
STAKE_MICROS = 1_000_000
STEPS = 5
GROUPS = 4
EVALUATED = 8
PATIENCE_S = 100


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that answers some prompts rightly and some not, so that groups have spread."""
    torch.set_num_threads(1)
    recipe = WarmStart(environment=ENVIRONMENT, steps=30, batch_size=64, learning_rate=2e-3)
    return build_base(recipe, tmp_path_factory.mktemp("base"))


@dataclass(kw_only=True)
class World:
    """The chain, and one orchestrator that may be stopped and started."""

    folder: Path
    rpc_url: str
    deployment: Deployment
    faucet: ChainGateway
    requester: ChainGateway
    account: LocalAccount
    config: OrchestratorConfig
    model: Path

    @property
    def api_url(self) -> str:
        return f"http://127.0.0.1:{self.config.api_port}"

    @contextlib.asynccontextmanager
    async def orchestrator(self) -> AsyncIterator[None]:
        """The orchestrator answers; it is stopped, in order, at the end."""
        stop, ready = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(serve(self.config, stop, lambda *_: ready.set()))
        waiting = asyncio.create_task(ready.wait())
        await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if task.done():
            task.result()
        try:
            yield
        finally:
            stop.set()
            await task

    @contextlib.asynccontextmanager
    async def worker(
        self, name: str, price: str, engine: Engine | None = None
    ) -> AsyncIterator[str]:
        """A worker works until the end, and claims its pay; its account."""
        folder = self.folder / name
        config = load_config(
            None,
            {},
            {
                "orchestrator": self.api_url,
                "data_dir": str(folder),
                "name": name,
                "stake": "1.00",
                "device": "cpu",
                "claim_interval_s": 0.5,
                **{f"price.{kind.value}": price for kind in TaskKind},
            },
        )
        credentials = worker_main.load_credentials(config)
        await self.faucet.token.fund(credentials.address, 10**18, STAKE_MICROS)
        stop = asyncio.Event()
        async with contextlib.AsyncExitStack() as resources:
            store = BlobStore(config.folder / "blobs", 1 << 30)
            blobs = await resources.enter_async_context(BlobClient(store))

            async def connect(greeting: HelloReply) -> ProviderChain:
                chain = worker_main._chain(config, credentials, greeting)
                return await resources.enter_async_context(chain)

            parts = Parts(
                network=Libp2pNode(credentials.identity),
                credentials=credentials,
                connect_chain=connect,
                blobs=blobs,
                engine=engine or PolicyEngine(Device.CPU, 1),
                device="cpu",
            )
            task = asyncio.create_task(WorkerNode(config, parts).run(stop))
            try:
                yield credentials.address
            finally:
                stop.set()
                await task

    def spec(self, **changes: Any) -> JobSpec:
        fields: dict[str, Any] = {
            "name": "integration",
            "model": str(self.model),
            "max_steps": STEPS,
            "batch_size": 4 * GROUPS,
            "rollouts_per_example": 4,
            "optimizer": OptimizerSpec(learning_rate=1e-3, warmup_steps=1),
            "lora": LoraSpec(r=4, alpha=8),
            "sampling": SamplingSpec(max_tokens=4),
            "environments": (ENVIRONMENT,),
            "evaluation": EvalSpec(interval=STEPS, num_examples=EVALUATED),
            "tasks": TaskSizes(rollout=2, gradient=2, evaluate=2),
            "budget": BudgetSpec(
                max_total_micros=BUDGET_MICROS,
                max_rollout_micros=1_000,
                max_gradient_micros=1_000,
                max_evaluate_micros=1_000,
            ),
        }
        return JobSpec(**{**fields, **changes})

    async def submit(self, client: ShoalClient, **changes: Any) -> str:
        spec = self.spec(**changes)
        return (await submit_job(client, self.requester, spec, self.account)).job_id

    def rows(self, table: Any) -> list[Any]:
        """What a stopped orchestrator left in its database."""
        database = Database(self.config.resolved_database_url())
        try:
            return database.run_now(lambda session: list(session.scalars(select(table))))
        finally:
            database.close()


@contextlib.asynccontextmanager
async def market(folder: Path, model: Path, database_url: str = "") -> AsyncIterator[World]:
    async with contextlib.AsyncExitStack() as stack:
        anvil = await stack.enter_async_context(Anvil(folder / "chain"))
        deployment = await deploy(anvil.rpc_url, dev_account(0))
        store_deployment(folder / "deployment.json", deployment)
        coordinator, requester = EthAccount.create(), EthAccount.create()
        store_account(folder / "orchestrator.json", coordinator)
        faucet, payer = [
            await stack.enter_async_context(
                await ChainGateway.connect(anvil.rpc_url, deployment, account)
            )
            for account in (dev_account(0), requester)
        ]
        await faucet.token.fund(coordinator.address, 10**19, 0)
        await faucet.token.fund(requester.address, 10**18, BUDGET_MICROS)
        yield World(
            folder=folder,
            rpc_url=anvil.rpc_url,
            deployment=deployment,
            faucet=faucet,
            requester=payer,
            account=requester,
            model=model,
            config=OrchestratorConfig(
                data_dir=folder / "orchestrator",
                rpc_url=anvil.rpc_url,
                deployment_file=folder / "deployment.json",
                key_file=folder / "orchestrator.json",
                database_url=database_url,
                api_port=free_port(),
                allow_local_models=True,
                chain_depth=0,
                heartbeat_ms=100,
                epoch_ms=300,
            ),
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def until_event(client: ShoalClient, job_id: str, wanted: str) -> None:
    """Returns at the first such event; fails when the job ends without it."""
    async for event in client.follow_events(job_id):
        if event.type == wanted:
            return
    raise AssertionError(f"job {job_id} ended without {wanted}")


async def check_settled(world: World, job_id: str, accounts: list[str]) -> Counter[str]:
    """Money and provenance of an ended job add up; what each account was paid."""
    await world.requester.escrow.refund(job_id)
    escrow = await world.faucet.escrow.job(job_id)
    assert escrow.closed
    assert escrow.funded_micros == BUDGET_MICROS
    assert escrow.funded_micros == escrow.claimed_micros + escrow.refunded_micros
    assert await world.faucet.token.balance(world.account.address) == escrow.refunded_micros
    leases: list[LeaseRow] = world.rows(LeaseRow)
    owed: Counter[str] = Counter()
    for lease in leases:
        if lease.state == "accepted":
            verdict = Verdict.decode((lease.verdict or "").encode())
            assert (verdict.accepted, verdict.pay_micros) == (True, lease.pay_micros)
            assert lease.pay_micros == lease.num_units * lease.unit_price_micros
            owed[lease.account] += lease.pay_micros
        else:
            assert lease.pay_micros == 0
    for account in accounts:
        assert await world.faucet.escrow.claimed(job_id, account) == owed[account]
        assert await world.faucet.token.balance(account) == owed[account]
    assert escrow.claimed_micros == owed.total() > 0

    run_dir = world.config.data_dir / "jobs" / job_id
    head, count = await world.faucet.provenance.head(world.faucet.escrow.address, job_id)
    bundle = read_bundle(run_dir / "bundle.json")
    report = verify_bundle(bundle, run_dir / "adapter", pinned_head=head)
    assert report.passed, report.text()
    assert report.head_pinned
    released = {file.path for file in bundle.files}
    assert {"adapter_model.safetensors", "adapter_config.json", "metrics.jsonl"} <= released
    assert len(bundle.epochs) == count == escrow.epoch > 1
    assert report.num_statements == len(world.rows(StatementRow))
    return owed


@pytest.mark.parametrize("engine", ["sqlite", "postgres"])
def test_a_job_survives_a_restart_and_everybody_is_paid(
    tmp_path: Path, base: Path, engine: str, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue("postgres_url") if engine == "postgres" else ""

    async def scenario() -> None:
        async with market(tmp_path, base, url) as world, contextlib.AsyncExitStack() as workers:
            async with world.orchestrator(), ShoalClient(world.api_url) as client:
                accounts = [
                    await workers.enter_async_context(world.worker(name, price))
                    for name, price in (("cheap", "0.0002"), ("dear", "0.0003"))
                ]
                job_id = await world.submit(client)
                await until_event(client, job_id, "update")
            (stopped,) = world.rows(JobRow)
            assert stopped.state == "running"
            assert 0 < stopped.policy_version < STEPS
            async with world.orchestrator(), ShoalClient(world.api_url) as client:
                view = await client.wait(job_id, timeout_s=PATIENCE_S)
                assert (view.state, view.reason) == ("complete", "")
                assert view.policy_version == STEPS
                await client.bundle(job_id)
                metrics = (await client.metrics(job_id)).decode().splitlines()
                await workers.aclose()
            owed = await check_settled(world, job_id, accounts)
            assert set(owed) <= set(accounts)
            updates = [json.loads(line) for line in metrics if "reward" in json.loads(line)]
            assert [update["step"] for update in updates] == list(range(1, STEPS + 1))
            kinds = Counter(row.kind for row in world.rows(StatementRow))
            assert kinds["update"] == STEPS
            assert kinds["release"] == 1
            assert kinds["gradient-batch"] > 0

    asyncio.run(limited(scenario()))


class Cheat:
    """Really computes, then hands in something that looks like it and is not."""

    def __init__(self) -> None:
        self._honest = PolicyEngine(Device.CPU, 1)
        self.tried: Counter[TaskKind] = Counter()

    def prepare(self) -> None:
        self._honest.prepare()

    def run(self, task: AnyTask, inputs: TaskInput, on_progress: Any) -> TaskOutput:
        output = self._honest.run(task, inputs, on_progress)
        self.tried[task.kind] += 1
        arrays = safetensors.numpy.load(output.payload)
        match task.kind:
            case TaskKind.ROLLOUT:
                arrays["logprobs"] = arrays["logprobs"] - 0.01
                arrays["rewards"] = arrays["rewards"] * 0 + 1
                payload = safetensors.numpy.save(arrays)
            case TaskKind.GRADIENT:
                payload = safetensors.numpy.save(
                    {name: array * 2 for name, array in arrays.items()}
                )
            case TaskKind.EVALUATE:
                payload = b"\xff" * len(output.payload)
        return TaskOutput(
            payload=payload,
            policy_sha256=output.policy_sha256,
            num_tokens=output.num_tokens,
            compute_ms=output.compute_ms,
            engine=output.engine,
            dtype=output.dtype,
        )


def test_a_cheat_is_rejected_unpaid_and_its_units_are_done_by_the_honest(
    tmp_path: Path, base: Path
) -> None:
    async def scenario() -> None:
        async with market(tmp_path, base) as world, contextlib.AsyncExitStack() as workers:
            cheat = Cheat()
            async with world.orchestrator(), ShoalClient(world.api_url) as client:
                # Cheaper than the honest one, so that it is asked first; alone at the beginning.
                liar = await workers.enter_async_context(world.worker("liar", "0.0001", cheat))
                job_id = await world.submit(client, max_steps=2)
                await until_event(client, job_id, "result_rejected")
                honest = await workers.enter_async_context(world.worker("honest", "0.0003"))
                view = await client.wait(job_id, timeout_s=PATIENCE_S)
                assert (view.state, view.reason) == ("complete", "")
                await client.bundle(job_id)
                await workers.aclose()
            owed = await check_settled(world, job_id, [liar, honest])
            assert set(owed) == {honest}
            leases: list[LeaseRow] = world.rows(LeaseRow)
            judged = {lease.state for lease in leases if lease.account == liar}
            assert "rejected" in judged
            assert "accepted" not in judged
            assert cheat.tried.total() > 0
            reasons = {
                lease.kind: lease.reason.partition(":")[0]
                for lease in leases
                if lease.state == "rejected"
            }
            expected = {"rollout": "logprobs", "evaluate": "form", "gradient": "gradient"}
            assert reasons.items() <= expected.items()
            done = Counter[str]()
            for lease in leases:
                if lease.state == "accepted":
                    done[lease.kind] += lease.num_units
            assert done["rollout"] == 2 * GROUPS
            assert done["evaluate"] == 2 * EVALUATED

    asyncio.run(limited(scenario()))


async def limited(scenario: Any) -> None:
    async with asyncio.timeout(PATIENCE_S + 15):
        await scenario
