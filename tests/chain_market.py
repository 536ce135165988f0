"""A market on a real chain: an orchestrator over it, and providers that bid with the worker's code.

The chain, the contracts, the records, the database, the market and the work are real; only
the network between the orchestrator and its providers is in memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import aiohttp
from eth_account import Account as EthAccount
from learning_fixtures import Lab as School
from learning_fixtures import make_spec, write_base
from orchestrator_court import enrol, learner_of
from orchestrator_lab import Sale, arrival

from shoal.contracts.anvil import Anvil, dev_account
from shoal.contracts.connection import Connection
from shoal.contracts.deployment import Terms, deploy, store_deployment
from shoal.contracts.gateway import ChainGateway
from shoal.contracts.records import Deployment
from shoal.market.replay import ClearingFile
from shoal.network.blob_store import BlobStore
from shoal.network.identity import NodeIdentity
from shoal.network.memory import MemoryHub, MemoryNetwork
from shoal.orchestrator.certificates import listed_certificates, published_clearing
from shoal.orchestrator.config import OrchestratorConfig
from shoal.orchestrator.context import Context
from shoal.orchestrator.main import Orchestrator
from shoal.orchestrator.store.database import Database
from shoal.orchestrator.store.tables import JobRow
from shoal.protocol.blob import BlobRef
from shoal.protocol.canonical import sha256_hex
from shoal.protocol.clock import ManualTime
from shoal.protocol.ids import PeerId
from shoal.protocol.job import BudgetSpec, Job, JobState
from shoal.protocol.market import TaskKind
from shoal.protocol.node import (
    CANCEL_PROTOCOL,
    LEASE_PROTOCOL,
    REVEAL_PROTOCOL,
    LeaseOffer,
    LeaseReply,
    OpenJob,
)
from shoal.protocol.policy import PolicyVersion
from shoal.protocol.sealing import BidCancel, BidCancelReply, SealNotice
from shoal.protocol.signing import Domain, sign
from shoal.protocol.task import RolloutTask
from shoal.rl.plan import Plan
from shoal.worker.bidder import Bidder
from shoal.worker.capacity import CapacityNow
from shoal.worker.config import Device, load_config
from shoal.worker.engine import PolicyEngine
from shoal.worker.evidence import EvidenceBook
from shoal.worker.executor import Assignment
from shoal.worker.offers import Parties, refusal_of, require_genuine
from shoal.worker.ports import TaskInput, TaskOutput
from shoal.worker.session import Credentials, Link, greet, join
from shoal.worker.stake import ensure_bound, ensure_stake
from shoal.worker.submit import Drop, Submitter

BUDGET = 1_000_000
RESERVE = 1_000
STAKE = 2_000_000
PENALTY, JOB_BOND = 1_000_000, 300_000
WINDOW_S, WEEK_S = 3_600, 604_800
LOT_UNITS, PARCEL_UNITS = 8, 2
MARKET_EPOCH_MS = 1_000
_GAS_MONEY = 10**18


@dataclass(kw_only=True)
class Project:
    """A funded job, as its bidders know it; ``plan`` makes its tasks."""

    job_id: str
    offer: OpenJob
    plan: Plan
    num_batches: int = 0


class Provider:
    """One bidder: its keys, its node, its notes, and the worker's own bidder over them.

    ``on_seal`` runs before a seal is answered.
    """

    def __init__(self, market: ChainMarket, number: int) -> None:
        self.number = number
        self.credentials = Credentials(
            account=EthAccount.create(), identity=NodeIdentity.generate()
        )
        self.chain = ChainGateway(market.connection, market.deployment, self.credentials.account)
        self.folder = market.folder / f"provider-{number}"
        self.book = EvidenceBook(self.folder / "evidence")
        self.network = MemoryNetwork(market.hub, self.credentials.identity, listens=False)
        self.link = Link(self.network)
        self.on_seal: Callable[[], Any] | None = None
        self.parties: Parties
        self.bidder: Bidder
        self._market = market

    async def join(self) -> None:
        """The provider is staked and bound on the chain, and on the orchestrator's list."""
        await self.network.start()
        await self.link.dial(self._market.context.network.addresses[0])
        greeting = await greet(self.link)
        self.parties = self.credentials.parties(greeting)
        address, least = self.credentials.address, greeting.min_stake_micros
        await ensure_stake(self.chain, address, least, cast(Any, STAKE))
        await ensure_bound(self.chain, self.credentials)
        bound = self.credentials.bind(greeting.domain, self._market.time.now_ms())
        await join(self.link, bound, f"provider {self.number}", "cpu")
        self.link.mark_joined()
        self.network.serve(REVEAL_PROTOCOL, self._on_seal)
        self.network.serve(LEASE_PROTOCOL, self._on_lease)

    async def bid(self, price_micros: int) -> None:
        """A worker with this price bids for every open job, as after a restart."""
        self._config = load_config(
            None,
            {},
            {
                "orchestrator": self._market.context.network.addresses[0],
                "price.rollout": f"0.{price_micros:06d}",
                "capacity.rollout": PARCEL_UNITS,
                "capacity.gradient": 0,
                "capacity.evaluate": 0,
            },
        )
        self.bidder = Bidder(
            self._config,
            CapacityNow(self._config.capacity),
            self.credentials,
            self.link,
            self.book,
            self._market.time,
        )
        jobs = [project.offer for project in self._market.projects]
        await self.bidder.refresh(jobs, self._market.orchestrator.sealer.epoch, self.parties)

    def commitment(self, project: Project) -> str:
        """What the present bid for the job was committed as."""
        return self.bidder._offers[project.job_id, TaskKind.ROLLOUT].commitment.commitment

    async def cancel(self, project: Project) -> None:
        """The bid for the job stands no more from the next market epoch on."""
        from_epoch = self._market.orchestrator.sealer.epoch
        cancel = BidCancel(commitment=self.commitment(project), from_epoch=from_epoch)
        signed = sign(cancel, self._market.domain, self.credentials.account)
        reply = BidCancelReply.decode(await self.link.request(CANCEL_PROTOCOL, signed.encode()))
        assert reply.from_epoch == from_epoch

    async def _on_seal(self, peer: PeerId, data: bytes) -> bytes:
        if self.on_seal is not None:
            await self.on_seal()
        return self.bidder.open(SealNotice.decode(data), self.parties).encode()

    async def _on_lease(self, peer: PeerId, data: bytes) -> bytes:
        offer = LeaseOffer.decode(data)
        require_genuine(offer, self.parties)
        refusal = refusal_of(offer, self._config, capacity=PARCEL_UNITS, units_held=0)
        if refusal is None:
            self._market.taken.put_nowait((self, offer))
        return LeaseReply(lease_id=offer.lease.record.lease_id, refusal=refusal).encode()

    async def work(self, offer: LeaseOffer) -> None:
        """The task of a lease that was taken is done and handed in."""
        output = await self._market.compute(cast(RolloutTask, offer.task))
        submitter = Submitter(
            self.credentials, self.link, cast(Any, self._market), self.book, lambda: 0.0
        )
        submitter.drop = Drop(domain=self.parties.domain, blob_urls=("memory:",))
        assignment = Assignment(offer=offer, received_s=0, arrival=0, turn=0, first_step=0)
        await submitter.deliver(assignment, output)


@dataclass(kw_only=True)
class ChainMarket:
    """The chain, the orchestrator over it, and everybody else."""

    folder: Path
    faucet: ChainGateway
    requester: ChainGateway
    chain: ChainGateway
    connection: Connection
    context: Context
    hub: MemoryHub
    orchestrator: Orchestrator
    school: School
    engine: PolicyEngine = field(default_factory=lambda: PolicyEngine(Device.CPU, 1))
    projects: list[Project] = field(default_factory=list)
    providers: list[Provider] = field(default_factory=list)
    taken: asyncio.Queue[tuple[Provider, LeaseOffer]] = field(default_factory=asyncio.Queue)

    @property
    def domain(self) -> Domain:
        return self.context.domain

    @property
    def deployment(self) -> Deployment:
        return self.context.deployment

    @property
    def rpc_url(self) -> str:
        return self.context.config.rpc_url

    @property
    def time(self) -> ManualTime:
        return cast(ManualTime, self.context.time)

    async def compute(self, task: RolloutTask) -> TaskOutput:
        """What a worker's engine makes of the task."""
        inputs = TaskInput(
            base_folder=self.school.folder,
            base_sha256=self.school.plan.base.content_digest(),
            adapter=self.school.policy.adapter_bytes(),
            batch_slice=None,
        )
        return await self.context.computed(lambda: self.engine.run(task, inputs, lambda: None))

    async def put(self, url: str, data: bytes, token: str, *, timeout_s: float) -> BlobRef:
        """The workers' way to hand in bytes: what the blob server does with an upload."""
        await self.orchestrator.authorise_upload(token, sha256_hex(data), len(data))
        return self.context.blobs.put_bytes(data)

    async def open_job(self) -> Project:
        """A job whose budget lies in escrow, whose orchestrator answers for it with a bond."""
        budget = BudgetSpec(
            max_total_micros=BUDGET,
            max_rollout_micros=RESERVE,
            max_gradient_micros=RESERVE,
            max_evaluate_micros=RESERVE,
        )
        # Two rows to a group and two groups to a task: real work, and little of it.
        spec = make_spec(budget=budget, batch_size=2 * LOT_UNITS, rollouts_per_example=2)
        payer = self.requester.sender.account
        job = Job(spec=spec, requester=payer.address, nonce=len(self.projects))
        signed, job_id = sign(job, self.domain, payer), job.job_id()
        deadline_s = await self.chain.now_s() + WEEK_S
        await self.requester.escrow.open_job(
            job.job_digest(), self.chain.account, BUDGET, deadline_s
        )
        await self.orchestrator.bonds.put_up(job_id)
        row = JobRow(
            job_id=job_id,
            record=signed.encode().decode(),
            base="{}",
            state=JobState.RUNNING.value,
            escrow_deadline_s=deadline_s,
            funded_micros=(await self.chain.escrow.job(job_id)).funded_micros,
            created_ms=self.time.now_ms(),
        )
        await self.context.database.run(lambda session: session.add(row))
        await self.orchestrator.journal.adopt(job_id)
        await self.orchestrator.settler.adopt(job_id)
        enrol(self.orchestrator, job_id, learner_of(self.school, spec))
        base = self.school.plan.base
        offer = OpenJob(
            job_id=job_id,
            name=spec.name,
            model=spec.model,
            base=base.files[0].blob,
            num_parameters=base.num_parameters,
            lora=spec.lora,
            reserve_micros=dict.fromkeys(TaskKind, RESERVE),
            epoch=1,
        )
        plan = Plan(
            job_id=job_id,
            spec=spec,
            base=base,
            train_sizes=self.school.plan.train_sizes,
            eval_sizes=self.school.plan.eval_sizes,
        )
        self.projects.append(Project(job_id=job_id, offer=offer, plan=plan))
        return self.projects[-1]

    async def join(self, count: int) -> None:
        """``count`` providers have stake, a bound node and a connection."""
        providers = [Provider(self, number) for number in range(1, count + 1)]
        fund = self.faucet.token.fund
        await asyncio.gather(*(fund(p.credentials.address, _GAS_MONEY, STAKE) for p in providers))
        await asyncio.gather(*(provider.join() for provider in providers))
        self.providers += providers

    async def turn(self) -> int:
        """The next market epoch has begun; its number."""
        epoch = self.orchestrator.sealer.epoch
        await self.orchestrator.sealer.turn()
        self.time.advance(MARKET_EPOCH_MS)
        return epoch

    async def sell(self, project: Project) -> str:
        """A lot of the job was cleared, leased, done, judged and paid; its id."""
        sale = Sale(project.job_id, LOT_UNITS, RESERVE, PARCEL_UNITS)
        project.num_batches += 1
        batch, prompts = project.num_batches, project.plan.prompts(project.num_batches)
        version = self.school.version().model_copy(update={"job_id": project.job_id})
        assert isinstance(version, PolicyVersion)

        def make(units: Sequence[int]) -> RolloutTask:
            return project.plan.rollout(batch, version, prompts, units)

        delivered: asyncio.Queue[Any] = asyncio.Queue()

        async def deliver(delivery: Any) -> None:
            delivered.put_nowait(delivery)

        sale.make = make
        sale.workload.deliver = deliver
        await self.orchestrator.auctioneer.open(sale.workload)
        num_parcels = len(sale.workload.waiting)
        for _ in range(num_parcels):
            provider, offer = await arrival(self.taken)
            await provider.work(offer)
        for _ in range(num_parcels):
            await arrival(delivered)
        assert not sale.abandoned
        return sale.workload.lot.lot_id

    async def certificates(self, project: Project) -> list[ClearingFile]:
        """Every clearing of the job as the API serves it, the oldest first."""
        context = self.context
        listed = await listed_certificates(context, project.job_id, before_ms=None, limit=100)
        files = [await published_clearing(context, str(entry["sha256"])) for entry in listed]
        return [ClearingFile.model_validate_json(file.encode()) for file in reversed(files)]

    async def pass_time(self, seconds: int) -> None:
        """The chain's clock is ahead by so much more."""
        async with aiohttp.ClientSession() as session:
            for method, params in (("evm_increaseTime", [seconds]), ("evm_mine", [])):
                body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
                async with session.post(self.rpc_url, json=body) as reply:
                    assert "error" not in await reply.json()


@asynccontextmanager
async def chain_market(folder: Path) -> AsyncIterator[ChainMarket]:
    """The chain with its contracts, and the orchestrator; nobody has joined yet."""
    async with AsyncExitStack() as stack:
        anvil = await stack.enter_async_context(Anvil(folder / "chain"))
        terms = Terms(challenge_window_s=WINDOW_S, min_bond_micros=JOB_BOND, penalty_micros=PENALTY)
        deployment = await deploy(anvil.rpc_url, dev_account(0), terms=terms)
        store_deployment(folder / "deployment.json", deployment)
        faucet, requester, chain = [
            await stack.enter_async_context(
                await ChainGateway.connect(anvil.rpc_url, deployment, dev_account(number))
            )
            for number in range(3)
        ]
        await faucet.token.fund(requester.account, 0, 2 * BUDGET)
        await faucet.token.fund(chain.account, 0, STAKE + 2 * JOB_BOND)
        await chain.vault.stake(STAKE)
        connection = Connection(anvil.rpc_url)
        stack.push_async_callback(connection.close)
        hub = MemoryHub()
        context = await _open_context(stack, folder, hub, chain)
        school = School.open(write_base(folder / "base"))
        context.blobs.put_bytes(school.policy.adapter_bytes(), pin=True)
        orchestrator = Orchestrator(context, "http://api.invalid", lambda: "http://b.invalid")
        orchestrator.front_desk.serve(context.network)
        await orchestrator.outbox.open()
        await orchestrator.bonds.open()
        market = ChainMarket(
            folder=folder,
            faucet=faucet,
            requester=requester,
            chain=chain,
            connection=connection,
            context=context,
            hub=hub,
            orchestrator=orchestrator,
            school=school,
        )
        stack.push_async_callback(_close, market)
        yield market


async def _open_context(
    stack: AsyncExitStack, folder: Path, hub: MemoryHub, chain: ChainGateway
) -> Context:
    """The orchestrator's surroundings: ``chain``'s account, a new database, a node at ``hub``."""
    config = OrchestratorConfig(
        data_dir=folder / "orchestrator",
        rpc_url=chain.connection.rpc_url,
        deployment_file=folder / "deployment.json",
        key_file=folder / "key.json",
        chain_depth=0,
        min_stake_micros=STAKE,
    )
    config.data_dir.mkdir()
    identity = NodeIdentity.generate()
    network = MemoryNetwork(hub, identity)
    await network.start()
    stack.push_async_callback(network.stop)
    database = Database(config.resolved_database_url())
    stack.callback(database.close)
    compute, checking, auditing = (ThreadPoolExecutor(max_workers=1) for _ in range(3))
    stack.callback(compute.shutdown)
    stack.callback(checking.shutdown)
    stack.callback(auditing.shutdown)
    deployment = chain.deployment
    return Context(
        config=config,
        database=database,
        network=network,
        blobs=BlobStore(config.data_dir / "blobs", config.blob_cache_bytes),
        chain=chain,
        deployment=deployment,
        account=chain.sender.account,
        identity=identity,
        domain=Domain(chain_id=deployment.chain_id, escrow=deployment.job_escrow),
        time=ManualTime(),
        compute=compute,
        checking=checking,
        auditing=auditing,
    )


async def _close(market: ChainMarket) -> None:
    await market.orchestrator.jobs.close()
    await market.orchestrator.dispatcher.offers.close()
    for provider in market.providers:
        await provider.network.stop()


@asynccontextmanager
async def at_work(market: ChainMarket) -> AsyncIterator[None]:
    """The orchestrator's auctioneer, verifier and outbox run meanwhile."""
    orchestrator = market.orchestrator
    loops = [
        asyncio.create_task(work)
        for work in (
            orchestrator.auctioneer.run(),
            orchestrator.verifier.run(),
            orchestrator.outbox.run(),
        )
    ]
    try:
        yield
    finally:
        for task in loops:
            task.cancel()
        await asyncio.gather(*loops, return_exceptions=True)
