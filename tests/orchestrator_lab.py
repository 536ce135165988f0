"""An orchestrator whose chain and network are in memory, and workers that a test drives.

Everything else is real: the records, the signatures, the database, the blobs, the market.
"""

from __future__ import annotations

import asyncio
import atexit
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
from eth_account import Account as EthAccount
from eth_account.signers.local import LocalAccount
from learning_fixtures import make_spec
from orchestrator_chain import DEPLOYMENT, FUNDED_MICROS, MemoryChain
from sqlalchemy import select
from worker_double import make_task

from shoal.contracts.gateway import ChainGateway
from shoal.market.lease import LeaseState
from shoal.market.reserve import reserve_for
from shoal.network.blob_store import BlobStore
from shoal.network.identity import NodeIdentity
from shoal.network.memory import MemoryHub, MemoryNetwork
from shoal.network.port import Limits
from shoal.orchestrator.config import OrchestratorConfig
from shoal.orchestrator.context import Context
from shoal.orchestrator.leases import LiveLease
from shoal.orchestrator.main import Orchestrator
from shoal.orchestrator.store.database import Database
from shoal.orchestrator.store.tables import Base, JobRow, LeaseRow, StatementRow
from shoal.orchestrator.workload import Delivery, Workload, parcels_of
from shoal.protocol.canonical import sha256_hex
from shoal.protocol.clock import ManualTime, TimeSource
from shoal.protocol.errors import ShoalError, Unavailable
from shoal.protocol.ids import PeerId, new_id
from shoal.protocol.job import BudgetSpec, Job, JobState, VerifySpec
from shoal.protocol.market import Award, Bid, Lot, LotClass, TaskKind
from shoal.protocol.merkle import hex32
from shoal.protocol.node import (
    CANCEL_PROTOCOL,
    COMMIT_PROTOCOL,
    FAILURE_PROTOCOL,
    HEARTBEAT_PROTOCOL,
    HELLO_PROTOCOL,
    JOIN_PROTOCOL,
    LEASE_PROTOCOL,
    PROTOCOL_VERSION,
    RESULT_PROTOCOL,
    REVEAL_PROTOCOL,
    BoundNode,
    FailureCause,
    FailureReply,
    Heartbeat,
    HeartbeatReply,
    HelloReply,
    HelloRequest,
    JoinReply,
    JoinRequest,
    LeaseFailure,
    LeaseOffer,
    LeaseProgress,
    LeaseReply,
    NodeBinding,
    ResultMessage,
    ResultReply,
)
from shoal.protocol.result import Receipt, Result
from shoal.protocol.sealing import (
    BidCancel,
    BidCancelReply,
    BidCommitment,
    BidReceipt,
    BidReveal,
    Reveals,
    SealNotice,
)
from shoal.protocol.signing import Domain, Signed, sign
from shoal.protocol.task import Task
from shoal.worker.statement import sign_statement

_T = TypeVar("_T")
TIMEOUT_S = 20.0
NODE_KEY_BYTES = 32
DOMAIN = Domain(chain_id=DEPLOYMENT.chain_id, escrow=DEPLOYMENT.job_escrow)


class Peer:
    """A worker that does what a test says: keys, a connection, and an inbox of offers.

    ``reveals`` is what it shows when its commitments are asked for, ``notices`` who asked;
    ``turn`` ends the orchestrator's market epoch.
    """

    def __init__(
        self,
        network: MemoryNetwork,
        identity: NodeIdentity,
        home: PeerId,
        turn: Callable[[], Awaitable[None]],
        account: LocalAccount | None = None,
    ) -> None:
        self.network = network
        self.identity = identity
        self.account: LocalAccount = account or EthAccount.create()
        self.offers: asyncio.Queue[LeaseOffer] = asyncio.Queue()
        self.reveals: dict[str, BidReveal] = {}
        self.notices: list[SealNotice] = []
        self.turn = turn
        self.refusal: str | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self._home = home
        self._nonce = 0
        network.serve(LEASE_PROTOCOL, self._on_lease)
        network.serve(REVEAL_PROTOCOL, self._on_seal)

    @property
    def node(self) -> PeerId:
        return self.identity.peer_id

    async def _on_lease(self, peer: PeerId, data: bytes) -> bytes:
        offer = LeaseOffer.decode(data)
        self.offers.put_nowait(offer)
        await self.gate.wait()
        lease_id = offer.lease.record.lease_id
        return LeaseReply(lease_id=lease_id, refusal=self.refusal).encode()

    async def ask(self, protocol: str, data: bytes) -> bytes:
        return await self.network.request(self._home, protocol, data, timeout_s=TIMEOUT_S)

    async def hello(self, version: int = PROTOCOL_VERSION) -> HelloReply:
        request = HelloRequest(protocol_version=version, software_version="0.1.0")
        return HelloReply.decode(await self.ask(HELLO_PROTOCOL, request.encode()))

    def bound(
        self,
        *,
        identity: NodeIdentity | None = None,
        signer: LocalAccount | None = None,
        counter: NodeIdentity | None = None,
    ) -> BoundNode:
        """The binding; the arguments forge one of its parts each."""
        named = identity or self.identity
        binding = NodeBinding(
            account=self.account.address,
            node=named.peer_id,
            node_key="0x" + named.public_key.hex(),
            valid_from_ms=0,
        )
        signature = (counter or named).sign(binding.node_message())
        return BoundNode(
            binding=sign(binding, DOMAIN, signer or self.account),
            node_signature="0x" + signature.hex(),
        )

    async def join(self, bound: BoundNode | None = None) -> JoinReply:
        request = JoinRequest(bound_node=bound or self.bound(), name="peer", device="cpu")
        return JoinReply.decode(await self.ask(JOIN_PROTOCOL, request.encode()))

    def make_bid(self, kind: TaskKind = TaskKind.ROLLOUT, **changes: Any) -> Bid:
        self._nonce += 1
        fields: dict[str, Any] = {
            "job_id": "0x" + "0" * 64,
            "kind": kind,
            "epoch_from": 0,
            "epoch_to": 1 << 30,
            "price_micros": 100,
            "capacity": 8,
            "account": self.account.address,
            "node": self.node,
            "valid_until_ms": 1 << 50,
            "nonce": self._nonce,
        }
        return Bid(**{**fields, **changes})

    def seal(self, bid: Bid, *, signer: LocalAccount | None = None) -> BidCommitment:
        """The bid's commitment; the bid itself is shown when it is asked for."""
        signed = sign(bid, DOMAIN, signer or self.account)
        reveal = BidReveal(signed=signed, salt=hex32(secrets.token_bytes(32)))
        name = reveal.commitment(DOMAIN)
        self.reveals[name] = reveal
        return BidCommitment(commitment=name, epoch_from=bid.epoch_from, epoch_to=bid.epoch_to)

    async def commit(self, sealed: BidCommitment) -> Signed[BidReceipt]:
        return Signed[BidReceipt].decode(await self.ask(COMMIT_PROTOCOL, sealed.encode()))

    async def cancel(self, commitment: str, from_epoch: int) -> BidCancelReply:
        record = BidCancel(commitment=commitment, from_epoch=from_epoch)
        data = sign(record, DOMAIN, self.account).encode()
        return BidCancelReply.decode(await self.ask(CANCEL_PROTOCOL, data))

    async def bid(
        self, bid: Bid | None = None, *, turn: bool = True, **changes: Any
    ) -> Signed[BidReceipt]:
        """The bid is committed to and, after a ``turn`` of the epoch, shown and in the book."""
        receipt = await self.commit(self.seal(bid or self.make_bid(**changes)))
        if turn:
            await self.turn()
        return receipt

    async def _on_seal(self, peer: PeerId, data: bytes) -> bytes:
        notice = SealNotice.decode(data)
        self.notices.append(notice)
        shown = [self.reveals[name] for name in notice.wanted if name in self.reveals]
        return Reveals(reveals=tuple(shown)).encode()

    async def beat(
        self, *offers: LeaseOffer, progress: int = 0, acknowledged: Sequence[str] = ()
    ) -> HeartbeatReply:
        beat = Heartbeat(
            leases=tuple(
                LeaseProgress(
                    lease_id=offer.lease.record.lease_id,
                    lease_epoch=offer.lease.record.lease_epoch,
                    progress=progress,
                )
                for offer in offers
            ),
            acknowledged=tuple(acknowledged),
        )
        return HeartbeatReply.decode(await self.ask(HEARTBEAT_PROTOCOL, beat.encode()))

    def message(self, offer: LeaseOffer, payload: bytes, **changes: Any) -> ResultMessage:
        """The result of ``offer``; ``changes`` falsify fields of the result."""
        lease = offer.lease.record
        fields: dict[str, Any] = {
            "lease_id": lease.lease_id,
            "lease_epoch": lease.lease_epoch,
            "task_id": lease.task_id,
            "task_sha256": lease.task_sha256,
            "kind": lease.kind,
            "policy_sha256": offer.task.policy.policy_sha256(),
            "payload": {"sha256": sha256_hex(payload), "size_bytes": len(payload)},
            "num_units": lease.num_units,
            "num_tokens": 1,
            "compute_ms": 5,
            "engine": "transformers",
            "dtype": "float32",
        }
        result = Result.model_validate({**fields, **changes})
        return ResultMessage(
            result=result,
            receipt=sign(self.receipt(offer, result), DOMAIN, self.account),
            statement=sign_statement(self.identity, lease, cast(Any, offer.task), result),
        )

    def receipt(self, offer: LeaseOffer, result: Result, **changes: Any) -> Receipt:
        lease = offer.lease.record
        fields: dict[str, Any] = {
            "lease_id": lease.lease_id,
            "lease_epoch": lease.lease_epoch,
            "job_id": lease.job_id,
            "result_sha256": result.digest(),
            "account": self.account.address,
            "node": self.node,
        }
        return Receipt(**{**fields, **changes})

    async def fail(
        self, offer: LeaseOffer, cause: FailureCause, detail: str = "no", **changes: Any
    ) -> FailureReply:
        """Gives the lease back; ``changes`` falsify fields of the message."""
        lease = offer.lease.record
        failure = LeaseFailure(
            **{
                "lease_id": lease.lease_id,
                "lease_epoch": lease.lease_epoch,
                "cause": cause,
                "detail": detail,
                **changes,
            }
        )
        return FailureReply.decode(await self.ask(FAILURE_PROTOCOL, failure.encode()))

    async def submit(self, message: ResultMessage) -> ResultReply:
        return ResultReply.decode(await self.ask(RESULT_PROTOCOL, message.encode()))


class Sale:
    """A workload over made-up rollout tasks, and what came of it."""

    def __init__(
        self,
        job_id: str,
        num_units: int,
        reserve_micros: int,
        parcel_units: int,
        *,
        max_micros: int | None = None,
    ) -> None:
        """``max_micros`` is the requester's maximum, where it is above the reserve."""
        reserve = reserve_for(max_micros or reserve_micros)
        self.delivered: list[Delivery] = []
        self.abandoned: list[ShoalError] = []
        self.before_build: Callable[[], Awaitable[None]] | None = None
        self.make: Callable[[Sequence[int]], Task] = self._made_up
        self.workload = Workload(
            lot=Lot(
                lot_id=new_id("lot"),
                job_id=job_id,
                epoch=1,
                lot_class=LotClass(
                    kind=TaskKind.ROLLOUT,
                    environment_sha256="0" * 64,
                    policy_sha256="1" * 64,
                    token_bucket=4,
                ),
                num_units=num_units,
                reserve_micros=reserve_micros,
            ),
            work="rollout:made up:4:1",
            reserve=reserve.model_copy(update={"reserve_micros": reserve_micros}),
            build_task=self._build,
            deliver=self._deliver,
            abandon=self.abandoned.append,
            max_result_bytes=lambda units: 1 << 20,
            verify=VerifySpec(),
            waiting=parcels_of(range(num_units), parcel_units),
        )

    def _made_up(self, units: Sequence[int]) -> Task:
        task = make_task(TaskKind.ROLLOUT, units[0])
        return task.model_copy(update={"job_id": self.workload.lot.job_id})

    async def _build(self, units: Sequence[int]) -> Task:
        if self.before_build is not None:
            await self.before_build()
        return self.make(units)

    async def _deliver(self, delivery: Delivery) -> None:
        self.delivered.append(delivery)


class Lab:
    """One orchestrator and its surroundings."""

    def __init__(self, context: Context, hub: MemoryHub, chain: MemoryChain, now: ManualTime):
        self.context = context
        self.hub = hub
        self.chain = chain
        self.time = now
        chain.ledger.address = context.account.address
        self.orchestrator = Orchestrator(context, "http://api.invalid", lambda: "http://b.invalid")
        self.orchestrator.front_desk.serve(context.network)
        self.requester: LocalAccount = EthAccount.create()
        self._tasks: list[asyncio.Task[None]] = []
        self._peers: list[MemoryNetwork] = []
        self._nonce = 0

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """``work`` runs until the lab is closed."""
        task = asyncio.create_task(work)
        self._tasks.append(task)
        return task

    def make_job(self, **spec: Any) -> Signed[Job]:
        self._nonce += 1
        budget = BudgetSpec(
            max_total_micros=FUNDED_MICROS,
            max_rollout_micros=1_000,
            max_gradient_micros=1_000,
            max_evaluate_micros=1_000,
        )
        job = Job(
            spec=make_spec(**{"budget": budget, **spec}),
            requester=self.requester.address,
            nonce=self._nonce,
        )
        return sign(job, DOMAIN, self.requester)

    async def add_job(self, *, funded_micros: int = FUNDED_MICROS, **spec: Any) -> str:
        """A funded, running job that nothing drives; its id."""
        signed = self.make_job(**spec)
        job_id = signed.record.job_id()
        row = JobRow(
            job_id=job_id,
            record=signed.encode().decode(),
            base="{}",
            state=JobState.RUNNING.value,
            escrow_deadline_s=1 << 40,
            funded_micros=funded_micros,
            created_ms=self.time.now_ms(),
        )
        await self.context.database.run(lambda session: session.add(row))
        self.chain.open(job_id, self.context.account.address, funded_micros=funded_micros)
        await self.orchestrator.journal.adopt(job_id)
        await self.orchestrator.settler.adopt(job_id)
        return job_id

    async def peer(self, *, joined: bool = True, account: LocalAccount | None = None) -> Peer:
        """A connected worker with stake and a node bound on the chain."""
        identity = NodeIdentity.generate()
        network = MemoryNetwork(self.hub, identity, listens=False)
        await network.start()
        self._peers.append(network)
        address = self.context.network.addresses[0]
        home = await network.connect(address, timeout_s=TIMEOUT_S)
        peer = Peer(network, identity, home, self.orchestrator.sealer.turn, account)
        self.chain.owners[identity.public_key] = peer.account.address
        self.chain.stakes[peer.account.address] = self.context.config.min_stake_micros
        if joined:
            await peer.join()
        return peer

    async def open_sale(
        self,
        job_id: str,
        num_units: int = 2,
        *,
        reserve_micros: int = 1_000,
        parcel_units: int = 2,
        max_micros: int | None = None,
    ) -> Sale:
        """Units on the market, ``parcel_units`` to a task."""
        sale = Sale(job_id, num_units, reserve_micros, parcel_units, max_micros=max_micros)
        await self.orchestrator.auctioneer.open(sale.workload)
        return sale

    async def lease(
        self, peer: Peer, sale: Sale, *, num_units: int = 2, price_micros: int = 100
    ) -> tuple[LeaseOffer, LiveLease]:
        """``peer`` holds a running lease of the sale's next units, granted without an auction."""
        parcel = sale.workload.waiting[0]
        award = self.award(peer, sale, num_units, price_micros)
        await self.orchestrator.dispatcher.grant(sale.workload, parcel, award)
        offer = await arrival(peer.offers)
        live = self.live(offer)
        await until(lambda: live.record.state is LeaseState.TAKEN)
        await peer.beat(offer)
        return offer, live

    async def settled(self) -> None:
        """The running auctioneer has placed all that it can."""
        auctioneer = self.orchestrator.auctioneer
        # A round that begins is no round that has ended: the second shows that the first has.
        for _ in range(2):
            auctioneer.poke()
            await until(lambda: not auctioneer._changed.is_set())

    def award(self, peer: Peer, sale: Sale, num_units: int = 2, price_micros: int = 100) -> Award:
        return Award(
            lot_id=sale.workload.lot.lot_id,
            certificate_sha256="0" * 64,
            rung=0,
            account=peer.account.address,
            node=peer.node,
            num_units=num_units,
            unit_price_micros=price_micros,
        )

    def live(self, offer: LeaseOffer) -> LiveLease:
        lease = offer.lease.record
        found = self.orchestrator.dispatcher.live_leases(lease.job_id)
        return next(live for live in found if live.lease.lease_id == lease.lease_id)

    async def rows(self, table: type[Base]) -> list[Any]:
        def read(session: Any) -> list[Any]:
            return list(session.scalars(select(table)))

        return await self.context.database.run(read)

    async def lease_row(self, offer: LeaseOffer) -> LeaseRow:
        lease_id = offer.lease.record.lease_id
        return await self.context.database.run(lambda s: s.get_one(LeaseRow, lease_id))

    async def statements(self) -> list[StatementRow]:
        return sorted(await self.rows(StatementRow), key=lambda row: cast(int, row.seq))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.orchestrator.jobs.close()
        await self.orchestrator.dispatcher.offers.close()
        for network in self._peers:
            await network.stop()


@asynccontextmanager
async def open_lab(
    folder: Path,
    *,
    identity: NodeIdentity | None = None,
    account: LocalAccount | None = None,
    chain: MemoryChain | None = None,
    clock: TimeSource | None = None,
    limits: Limits | None = None,
    **settings: Any,
) -> AsyncIterator[Lab]:
    """A lab over ``folder``; a second one over the same folder is the same after a restart."""
    data_dir = folder / "orchestrator"
    data_dir.mkdir(exist_ok=True)
    database_file = data_dir / "orchestrator.db"
    if not database_file.exists():
        shutil.copy(_empty_database(), database_file)
    config = OrchestratorConfig(
        data_dir=data_dir,
        rpc_url="http://chain.invalid",
        deployment_file=folder / "deployment.json",
        key_file=folder / "key.json",
        **settings,
    )
    hub, now, chain = MemoryHub(), ManualTime(), chain or MemoryChain()
    identity = identity or NodeIdentity.generate()
    network = MemoryNetwork(hub, identity, limits=limits)
    await network.start()
    database = Database(config.resolved_database_url())
    compute, checking, auditing = (ThreadPoolExecutor(max_workers=1) for _ in range(3))
    context = Context(
        config=config,
        database=database,
        network=network,
        blobs=BlobStore(data_dir / "blobs", config.blob_cache_bytes),
        chain=cast(ChainGateway, chain),
        deployment=DEPLOYMENT,
        account=account or EthAccount.create(),
        identity=identity,
        domain=DOMAIN,
        time=clock or now,
        compute=compute,
        checking=checking,
        auditing=auditing,
    )
    lab = Lab(context, hub, chain, now)
    await lab.orchestrator.outbox.open()
    try:
        yield lab
    finally:
        await lab.close()
        await network.stop()
        compute.shutdown()
        checking.shutdown()
        auditing.shutdown()
        database.close()


@cache
def _empty_database() -> Path:
    """A migrated database to copy: migrating anew for each test would take most of its time."""
    folder = tempfile.mkdtemp(prefix="shoal-lab-")
    atexit.register(shutil.rmtree, folder)
    path = Path(folder) / "empty.db"
    Database(f"sqlite:///{path}").close()
    return path


@contextmanager
def database_away(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every transaction begun inside the block fails."""

    async def fail(self: Database, work: Any) -> Any:
        raise Unavailable("The database is away.")

    with monkeypatch.context() as patch:
        patch.setattr(Database, "run", fail)
        yield


def run(scenario: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
    """The scenario's result, or a failure if it hangs."""

    async def limited() -> _T:
        async with asyncio.timeout(4 * TIMEOUT_S):
            return await scenario()

    return asyncio.run(limited())


async def arrival(queue: asyncio.Queue[_T]) -> _T:
    """The next item, or a failure if none comes."""
    async with asyncio.timeout(TIMEOUT_S):
        return await queue.get()


async def until(condition: Callable[[], bool]) -> None:
    """Returns once ``condition`` holds; lets everything that is ready run in between."""
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110 - there is no event for every condition
            await asyncio.sleep(0.001)
