"""A real worker process: libp2p, anvil, blobs over HTTP, a real policy, pay and a clean end."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from aiohttp import web
from eth_account.signers.local import LocalAccount
from learning_fixtures import write_base
from worker_double import OrchestratorDouble

from shoal.contracts.anvil import Anvil, dev_account
from shoal.contracts.deployment import deploy
from shoal.contracts.gateway import ChainGateway
from shoal.contracts.records import Deployment, EpochPost
from shoal.models.base import describe_base
from shoal.models.policy import Policy
from shoal.network.blob_server import BlobServer
from shoal.network.blob_store import BlobStore
from shoal.network.identity import NodeIdentity, public_key_of
from shoal.network.libp2p_node import Libp2pNode
from shoal.protocol.errors import Unauthorised
from shoal.protocol.ids import PeerId
from shoal.protocol.job import EnvSpec, SamplingSpec
from shoal.protocol.keystore import load_or_create_account
from shoal.protocol.learning import GradientSpec, LoraSpec, LossSpec, OptimizerSpec
from shoal.protocol.merkle import MerkleTree, payout_leaf
from shoal.protocol.node import ContractAddresses, ResultMessage
from shoal.protocol.policy import BaseModelRef, PolicyVersion
from shoal.protocol.signing import Domain
from shoal.protocol.task import EvaluateTask, GradientTask, PromptRef, RolloutTask
from shoal.provenance import dsse
from shoal.provenance.statement import require_same_work
from shoal.rl.batch import RolloutPayload, RowLimits
from shoal.rl.environments import Split, load_environment
from shoal.rl.evaluation import run_evaluate
from shoal.rl.gradient import encode_slice, make_groups, run_gradient
from shoal.rl.rollout import encode_prompts, run_rollout
from shoal.worker.config import load_config
from shoal.worker.main import claim_all
from shoal.worker.ports import AnyTask

JOB_DIGEST = b"\x22" * 32
BUDGET_MICROS = 10_000_000
STAKE_MICROS = 5_000_000
MAX_RSS_KIB = 700 * 1024
ENVIRONMENT = EnvSpec(id="addition")
LORA = LoraSpec(r=8, alpha=16)


@dataclass
class Market:
    """Everything around the worker: chain, orchestrator, blobs, API and the job's policy."""

    chain: ChainGateway
    coordinator: ChainGateway
    requester: ChainGateway
    double: OrchestratorDouble
    store: BlobStore
    policy: Policy
    base: BaseModelRef
    version: PolicyVersion
    job_id: str
    uploads: dict[str, str] = field(default_factory=dict)
    payouts: dict[str, Any] = field(default_factory=dict)

    def options(self, directory: Path) -> dict[str, Any]:
        return {
            "orchestrator": self.double.network.addresses[0],
            "data_dir": str(directory),
            "stake": "5.00",
            "claim_interval_s": 0.2,
            "device": "cpu",
            "log_file": str(directory / "log.jsonl"),
        }

    def task(self, number: int) -> dict[str, Any]:
        return {
            "task_id": f"task_{number:08d}",
            "job_id": self.job_id,
            "base": self.base,
            "policy": self.version,
            "lora": LORA,
        }

    async def owe(self, account: str, micros: int) -> None:
        """The chain's root owes ``account``, and the API proves it."""
        deployment = self.chain.deployment
        leaf = payout_leaf(deployment.chain_id, deployment.job_escrow, self.job_id, account, micros)
        tree = MerkleTree([leaf])
        post = EpochPost(
            job_id=self.job_id,
            epoch=1,
            pay_root="0x" + tree.root.hex(),
            prov_root="0x" + "1" * 64,
            cumulative_micros=micros,
            num_tasks=3,
            num_statements=3,
        )
        await self.coordinator.escrow.post_epoch(post)
        self.payouts[account] = {
            "job_id": self.job_id,
            "epoch": 1,
            "account": account,
            "cumulative_micros": micros,
            "proof": [],
            "claimed_micros": 0,
            "final": True,
        }


@asynccontextmanager
async def market(directory: Path) -> AsyncIterator[Market]:
    async with AsyncExitStack() as stack:
        anvil = await stack.enter_async_context(Anvil(directory / "chain"))
        deployment = await deploy(anvil.rpc_url, dev_account(0))
        faucet, requester, coordinator = await _gateways(stack, anvil.rpc_url, deployment)
        await faucet.token.fund(requester.account, 0, BUDGET_MICROS)
        deadline_s = await faucet.now_s() + 86_400
        await requester.escrow.open_job(JOB_DIGEST, coordinator.account, BUDGET_MICROS, deadline_s)
        job_id = _job_id(requester.account)

        folder = write_base(directory / "model")
        store = BlobStore(directory / "blobs", 1 << 30)
        base = describe_base("builtin:test", folder, store.put_file)
        # Sums are split by thread: only with the worker's own number are they bit-equal.
        torch.set_num_threads(1)
        policy = Policy.load(folder, LORA, seed=1)
        version = PolicyVersion(
            job_id=job_id,
            version=0,
            base_sha256=base.content_digest(),
            adapter=store.put_bytes(policy.adapter_bytes()),
        )
        identity = NodeIdentity.generate()
        network = Libp2pNode(identity, "/ip4/127.0.0.1/tcp/0")
        double = OrchestratorDouble(network, identity)
        world = Market(
            chain=faucet,
            coordinator=coordinator,
            requester=requester,
            double=double,
            store=store,
            policy=policy,
            base=base,
            version=version,
            job_id=job_id,
        )
        blobs = BlobServer(store, "127.0.0.1", 0, authorise=_authorise(world))
        await blobs.start()
        stack.push_async_callback(blobs.stop)
        api_url = await _serve_api(world, stack)
        double.greeting = double.greeting.model_copy(
            update={
                "domain": Domain(chain_id=deployment.chain_id, escrow=deployment.job_escrow),
                "contracts": _addresses(deployment),
                "min_stake_micros": STAKE_MICROS,
                "rpc_urls": (anvil.rpc_url,),
                "api_url": api_url,
                "blob_urls": (blobs.url,),
                "heartbeat_ms": 100,
            }
        )
        job = double.open_job(job_id=job_id)
        double.jobs = (job.model_copy(update={"base": store.put_bytes(base.encode())}),)
        double.beat = double.beat.model_copy(update={"open_jobs": double.jobs})
        await network.start()
        stack.push_async_callback(network.stop)
        yield world


async def _gateways(
    stack: AsyncExitStack, rpc_url: str, deployment: Deployment
) -> list[ChainGateway]:
    return [
        await stack.enter_async_context(
            await ChainGateway.connect(rpc_url, deployment, dev_account(number))
        )
        for number in range(3)
    ]


def _job_id(requester: str) -> str:
    from eth_abi.abi import encode
    from eth_utils.crypto import keccak

    return "0x" + keccak(encode(["address", "bytes32"], [requester, JOB_DIGEST])).hex()


def _addresses(deployment: Deployment) -> ContractAddresses:
    return ContractAddresses(**deployment.model_dump(exclude={"chain_id", "block_number"}))


def _authorise(world: Market) -> Any:
    async def authorise(token: str, digest: str, size_bytes: int) -> None:
        if token not in world.uploads:
            raise Unauthorised("This upload token is unknown.")
        world.uploads[token] = digest

    return authorise


async def _serve_api(world: Market, stack: AsyncExitStack) -> str:
    async def payouts(request: web.Request) -> web.Response:
        answer = world.payouts.get(request.match_info["account"])
        return web.json_response(answer, status=200 if answer else 404)

    app = web.Application()
    app.router.add_get("/v1/market/jobs/{job}/payouts/{account}", payouts)
    runner = web.AppRunner(app)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return f"http://127.0.0.1:{runner.addresses[0][1]}"


@asynccontextmanager
async def worker_process(options: dict[str, Any]) -> AsyncIterator[asyncio.subprocess.Process]:
    pairs = [part for key, value in options.items() for part in ("--set", f"{key}={value}")]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "shoal.worker", *pairs, stderr=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def computed(world: Market, task: AnyTask, node: PeerId, account: str) -> bytes:
    """The payload the worker hands in for ``task``, its papers checked."""
    number = int(task.task_id[-4:])
    offer = world.double.offer(task, account, node, number=number)
    world.uploads[offer.upload_token] = ""
    reply = await world.double.send(offer, node)
    assert reply.refusal is None
    message: ResultMessage = await world.double.inbox.results.get()
    result = message.result
    assert world.uploads[offer.upload_token] == result.payload.sha256
    assert result.policy_sha256 == world.version.policy_sha256()
    envelope = dsse.Envelope.from_text(message.statement)
    stated = dsse.verify(envelope, public_key_of(node))
    require_same_work(stated, offer.lease.record, task, result)
    return world.store.read(result.payload.sha256)


def peak_rss_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


async def _work(world: Market, node: PeerId, account: str) -> None:
    environments = [load_environment(ENVIRONMENT)]
    prompts = tuple(PromptRef(environment=0, index=index) for index in range(2))
    rollout = RolloutTask(
        **world.task(1),
        batch=0,
        environments=(ENVIRONMENT,),
        prompts=prompts,
        slots=(0, 1),
        group_size=64,
        sampling=SamplingSpec(max_tokens=4),
        seed=5,
    )
    payload = await computed(world, rollout, node, account)
    assert payload == run_rollout(world.policy, rollout, environments)

    evaluate = EvaluateTask(
        **world.task(2),
        environments=(ENVIRONMENT,),
        prompts=prompts,
        slots=(0, 1),
        samples_per_prompt=1,
        temperature=0.0,
        max_tokens=4,
        seed=5,
    )
    assert await computed(world, evaluate, node, account) == run_evaluate(
        world.policy, evaluate, environments
    )

    limits = RowLimits(
        num_prompts=2, num_rows=128, max_tokens=4, vocab_size=world.policy.vocab_size
    )
    tokens = encode_prompts(world.policy, environments, prompts, Split.TRAIN)
    rewards = np.arange(128, dtype=np.float32) % 2
    groups = make_groups(RolloutPayload.decode(payload, limits), tokens, rewards, 64, LossSpec())
    slice_bytes = encode_slice(groups).encode()
    gradient = GradientTask(
        **world.task(3),
        batch=0,
        loss=LossSpec(),
        loss_sha256=LossSpec().digest(),
        gradient=GradientSpec(),
        optimizer=OptimizerSpec(),
        learning_rate=1e-3,
        temperature=1.0,
        max_tokens=4,
        slice=world.store.put_bytes(slice_bytes),
        num_rows=128,
        num_groups=2,
    )
    expected = run_gradient(world.policy, gradient, slice_bytes).payload
    assert await computed(world, gradient, node, account) == expected


def test_a_worker_stakes_works_is_paid_and_leaves(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with market(tmp_path) as world:
            directory = tmp_path / "worker"
            account: LocalAccount = load_or_create_account(directory / "account.json")
            await world.chain.token.fund(account.address, 10**18, STAKE_MICROS)
            async with worker_process(world.options(directory)) as process:
                async with asyncio.timeout(100):
                    joined = await world.double.inbox.joins.get()
                    node = PeerId(joined.bound_node.binding.record.node)
                    bid = (await world.double.inbox.bids.get()).record
                    assert (bid.account, bid.node) == (account.address, node)
                    stake = await world.chain.vault.stake_of(account.address)
                    assert stake.active_micros == STAKE_MICROS
                    key = public_key_of(node)
                    assert await world.chain.vault.node_owner(key) == account.address
                    await _work(world, node, account.address)
                    await world.owe(account.address, 12_345)
                    while '"paid"' not in (directory / "log.jsonl").read_text():
                        await world.double.inbox.beats.get()
                    assert await world.chain.escrow.claimed(world.job_id, account.address) == 12_345
                    rss_kib = peak_rss_kib(process.pid)
                    process.send_signal(signal.SIGTERM)
                async with asyncio.timeout(30):
                    assert await process.wait() == 0
            assert await world.chain.token.balance(account.address) == 12_345
            assert rss_kib <= MAX_RSS_KIB, f"the worker peaked at {rss_kib // 1024} MiB"
            log = (directory / "log.jsonl").read_text()
            lines = [json.loads(line) for line in log.splitlines()]
            names = [line["event"] for line in lines]
            assert names[-1] == "left"
            assert {"joined", "lease_accepted", "result_delivered", "paid"} <= set(names)
            assert account.key.hex() not in log
            # A second claim, by hand and without the worker, finds nothing left to pay.
            config = load_config(None, {}, world.options(directory))
            assert await claim_all(config) == 0

    asyncio.run(scenario())


def test_a_worker_without_stake_ends_with_one_sentence(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with market(tmp_path) as world:
            options = world.options(tmp_path / "worker")
            del options["stake"]
            async with worker_process(options) as process:
                async with asyncio.timeout(60):
                    _, said = await process.communicate()
                assert process.returncode == Unauthorised.exit_code
                (sentence,) = said.decode().splitlines()
                assert sentence.startswith("shoal worker: The account 0x")
                assert "--stake 5.00" in sentence

    asyncio.run(scenario())
