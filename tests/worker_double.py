"""An orchestrator for a worker to work for, inside one process: real records and signatures."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eth_account import Account as EthAccount
from eth_account.signers.local import LocalAccount

from shoal.contracts.records import ZERO_ADDRESS, Claim, EscrowState, Mined, StakeInfo
from shoal.market.seal import SealedEpoch
from shoal.network.identity import NodeIdentity, public_key_of, verify
from shoal.network.port import Network
from shoal.protocol.blob import BlobRef
from shoal.protocol.canonical import digest_of, sha256_hex
from shoal.protocol.errors import ShoalError, Unavailable
from shoal.protocol.ids import Digest, PeerId
from shoal.protocol.job import EnvSpec, SamplingSpec
from shoal.protocol.learning import GradientSpec, LoraSpec, LossSpec, OptimizerSpec
from shoal.protocol.market import Bid, Lease, TaskKind
from shoal.protocol.merkle import unhex
from shoal.protocol.node import (
    COMMIT_PROTOCOL,
    FAILURE_PROTOCOL,
    HEARTBEAT_PROTOCOL,
    HELLO_PROTOCOL,
    JOIN_PROTOCOL,
    LEASE_PROTOCOL,
    PROTOCOL_VERSION,
    RESULT_PROTOCOL,
    REVEAL_PROTOCOL,
    ContractAddresses,
    FailureReply,
    Heartbeat,
    HeartbeatReply,
    HelloReply,
    HelloRequest,
    IdleReason,
    JoinReply,
    JoinRequest,
    LeaseFailure,
    LeaseOffer,
    LeaseReply,
    OpenJob,
    ResultMessage,
    ResultReply,
)
from shoal.protocol.policy import BaseModelRef, ModelFile, PolicyVersion
from shoal.protocol.result import Check, CheckName, Verdict
from shoal.protocol.sealing import BidCommitment, BidReceipt, Reveals, SealNotice
from shoal.protocol.signing import Domain, Signed, sign
from shoal.protocol.task import EvaluateTask, GradientTask, PromptRef, RolloutTask
from shoal.worker.ports import AnyTask, TaskInput, TaskOutput

JOB_ID = "0x" + "a" * 64
ESCROW = "0x" + "2" * 40
DOMAIN = Domain(chain_id=31337, escrow=ESCROW)
CONTRACTS = ContractAddresses(
    token="0x" + "1" * 40,
    stake_vault="0x" + "3" * 40,
    job_escrow=ESCROW,
    provenance_log=ESCROW,
    fault_court="0x" + "4" * 40,
    model_shares="0x" + "5" * 40,
)
ENVIRONMENTS = (EnvSpec(id="addition"),)
NOW_MS = 1_790_000_000_000
PRICE_MICROS = 500


def blob(data: bytes) -> BlobRef:
    """The reference of small ``data``."""
    return BlobRef(sha256=sha256_hex(data), size_bytes=len(data))


BASE_FILES = {"config.json": b"{}", "model.safetensors": b"weights"}
BASE = BaseModelRef(
    name="builtin:double",
    files=tuple(ModelFile(path=path, blob=blob(data)) for path, data in BASE_FILES.items()),
    num_parameters=7,
)
ADAPTER = b"adapter zero"
SLICE = b"a slice of a batch"
POLICY = PolicyVersion(
    job_id=JOB_ID, version=0, base_sha256=BASE.content_digest(), adapter=blob(ADAPTER)
)
BLOBS = [*BASE_FILES.values(), BASE.encode(), ADAPTER, SLICE]


def make_task(kind: TaskKind, number: int = 0) -> AnyTask:
    """A task of ``kind`` worth two units."""
    shared: dict[str, Any] = {
        "task_id": f"task_{number:08d}",
        "job_id": JOB_ID,
        "base": BASE,
        "policy": POLICY,
        "lora": LoraSpec(),
    }
    prompts = (PromptRef(environment=0, index=1), PromptRef(environment=0, index=2))
    match kind:
        case TaskKind.ROLLOUT:
            return RolloutTask(
                **shared,
                batch=0,
                environments=ENVIRONMENTS,
                prompts=prompts,
                slots=(0, 1),
                group_size=4,
                sampling=SamplingSpec(max_tokens=4),
                seed=number,
            )
        case TaskKind.EVALUATE:
            return EvaluateTask(
                **shared,
                environments=ENVIRONMENTS,
                prompts=prompts,
                slots=(0, 1),
                samples_per_prompt=1,
                temperature=0.0,
                max_tokens=4,
                seed=number,
            )
        case TaskKind.GRADIENT:
            return GradientTask(
                **shared,
                batch=0,
                loss=LossSpec(),
                loss_sha256=LossSpec().digest(),
                gradient=GradientSpec(),
                optimizer=OptimizerSpec(),
                learning_rate=1e-3,
                temperature=1.0,
                max_tokens=4,
                slice=blob(SLICE),
                num_rows=8,
                num_groups=2,
            )


class MemoryBlobs:
    """A blob plane in memory; ``gate`` holds fetches back until it is set."""

    def __init__(self, directory: Path, held: Sequence[bytes] = BLOBS) -> None:
        self._directory = directory
        self.held: dict[str, bytes] = {sha256_hex(data): data for data in held}
        self.tokens: dict[str, str] = {}
        self.fetched: list[str] = []
        self.num_asked = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def fetch(
        self,
        ref: BlobRef,
        sources: Sequence[str],
        *,
        timeout_s: float,
        on_bytes: Callable[[int], None] = lambda num_bytes: None,
    ) -> Path:
        self.num_asked += 1
        await self.gate.wait()
        self.fetched.append(ref.sha256)
        if ref.sha256 not in self.held:
            raise Unavailable(f"No source gave blob {ref.sha256}.")
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / ref.sha256
        path.write_bytes(self.held[ref.sha256])
        on_bytes(ref.size_bytes)
        return path

    async def fetch_bytes(self, ref: BlobRef, sources: Sequence[str], *, timeout_s: float) -> bytes:
        path = await self.fetch(ref, sources, timeout_s=timeout_s)
        return path.read_bytes()

    async def put(self, url: str, data: bytes, token: str, *, timeout_s: float) -> BlobRef:
        ref = blob(data)
        self.held[ref.sha256] = data
        self.tokens[ref.sha256] = token
        return ref


class ScriptedEngine:
    """Computes payloads that say what was asked; may be held back or made to fail."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.started = threading.Event()
        self.free = threading.Event()
        self.free.set()
        self.failure: Exception | None = None

    def prepare(self) -> None:
        """Nothing is slow to load."""

    def run(self, task: AnyTask, inputs: TaskInput, on_progress: Callable[[], None]) -> TaskOutput:
        self.ran.append(task.task_id)
        self.started.set()
        self.free.wait(5)
        on_progress()
        if self.failure is not None:
            raise self.failure
        return TaskOutput(
            payload=f"{task.kind} {task.task_id}".encode(),
            policy_sha256=Digest(digest_of([inputs.base_sha256, sha256_hex(inputs.adapter)])),
            num_tokens=9,
            compute_ms=1,
            engine="scripted",
            dtype="float32",
        )


class MemoryChain:
    """A chain of one provider, in memory."""

    def __init__(self, account: str, *, staked: int = 10_000_000, tokens: int = 0) -> None:
        self.account = account
        self.token = self.vault = self.escrow = self
        self.staked = staked
        self.tokens = tokens
        self.wei = 10**18
        self.nodes: dict[bytes, str] = {}
        self.paid = 0
        self.claims: list[Claim] = []
        self.was_claimed = asyncio.Event()
        self.pay_root = "0x" + "0" * 64
        self.epoch = 0
        self.ready_at_s = 0

    async def now_s(self) -> int:
        return 1_000

    async def eth_balance(self, account: str) -> int:
        return self.wei

    async def balance(self, account: str) -> int:
        return self.tokens

    async def stake_of(self, account: str) -> StakeInfo:
        return StakeInfo(active_micros=self.staked, unbonding_micros=0, unbond_at_s=0)

    async def stake(self, amount_micros: int) -> Mined:
        self.tokens -= amount_micros
        self.staked += amount_micros
        return self._mined()

    async def node_owner(self, node_key: bytes) -> str | None:
        return self.nodes.get(node_key)

    async def bind_node(self, node_key: bytes) -> Mined:
        self.nodes[node_key] = self.account
        return self._mined()

    async def job(self, job_id: str) -> EscrowState:
        return EscrowState(
            job_id=job_id,
            sponsor=ZERO_ADDRESS,
            coordinator=ZERO_ADDRESS,
            deadline_s=0,
            epoch=self.epoch,
            funded_micros=0,
            committed_micros=0,
            claimed_micros=self.paid,
            refunded_micros=0,
            closed=False,
            frozen=False,
            bond_micros=0,
            pay_root=self.pay_root,
            ready_at_s=self.ready_at_s,
        )

    async def claimed(self, job_id: str, account: str) -> int:
        return self.paid

    async def claim(self, job_id: str, claim: Claim) -> Mined:
        self.claims.append(claim)
        self.was_claimed.set()
        self.paid = claim.cumulative_micros
        return self._mined()

    def _mined(self) -> Mined:
        return Mined(tx_hash="0x" + "7" * 64, block_number=1, gas_used=1)


class Inbox:
    """What arrived, with a way to await the next arrival of a kind."""

    def __init__(self) -> None:
        self.hellos: asyncio.Queue[HelloRequest] = asyncio.Queue()
        self.joins: asyncio.Queue[JoinRequest] = asyncio.Queue()
        self.commitments: asyncio.Queue[BidCommitment] = asyncio.Queue()
        self.bids: asyncio.Queue[Signed[Bid]] = asyncio.Queue()
        self.results: asyncio.Queue[ResultMessage] = asyncio.Queue()
        self.failures: asyncio.Queue[LeaseFailure] = asyncio.Queue()
        self.beats: asyncio.Queue[Heartbeat] = asyncio.Queue()


class OrchestratorDouble:
    """Answers a worker's requests, and offers it leases.

    ``greeting`` and ``beat`` are what it answers with; a test replaces them.  Each commitment
    is sealed at once in a market epoch of its own, and the bid behind it asked for.
    """

    def __init__(self, network: Network, identity: NodeIdentity) -> None:
        self.network = network
        self.identity = identity
        self.account: LocalAccount = EthAccount.create()
        self.inbox = Inbox()
        self.committed: list[str] = []
        self._next_epoch = 0
        self._seals: set[asyncio.Task[None]] = set()
        self.refuse_result: ShoalError | None = None
        self.refuse_beat: ShoalError | None = None
        self.greeting = HelloReply(
            protocol_version=PROTOCOL_VERSION,
            software_version="0.1.0",
            domain=DOMAIN,
            contracts=CONTRACTS,
            orchestrator=self.account.address,
            min_stake_micros=1_000_000,
            rpc_urls=(),
            api_url="http://api.invalid",
            blob_urls=("http://blobs.invalid",),
            heartbeat_ms=10,
        )
        self.jobs: tuple[OpenJob, ...] = (self.open_job(),)
        self.beat = HeartbeatReply(
            revoked=(),
            verdicts=(),
            open_jobs=self.jobs,
            market_epoch=0,
            idle_reason=IdleReason.STARTING,
        )
        for protocol, handler in {
            HELLO_PROTOCOL: self._on_hello,
            JOIN_PROTOCOL: self._on_join,
            COMMIT_PROTOCOL: self._on_commitment,
            RESULT_PROTOCOL: self._on_result,
            FAILURE_PROTOCOL: self._on_failure,
            HEARTBEAT_PROTOCOL: self._on_beat,
        }.items():
            network.serve(protocol, handler)

    @staticmethod
    def open_job(reserve_micros: int = 1_000, job_id: str = JOB_ID) -> OpenJob:
        return OpenJob(
            job_id=job_id,
            name="double",
            model="builtin:double",
            base=blob(BASE.encode()),
            num_parameters=7,
            lora=LoraSpec(),
            reserve_micros=dict.fromkeys(TaskKind, reserve_micros),
            epoch=0,
        )

    def offer(
        self,
        task: AnyTask,
        account: str,
        node: str,
        *,
        number: int = 0,
        lease_epoch: int = 1,
        span_ms: int = 60_000,
        **changes: Any,
    ) -> LeaseOffer:
        """A signed offer of ``task`` to ``node``; ``changes`` falsify fields of the lease."""
        values: dict[str, Any] = {
            "lease_id": f"lease_{number:08d}",
            "lease_epoch": lease_epoch,
            "lot_id": "lot_00000000",
            "certificate_sha256": "0" * 64,
            "rung": 0,
            "job_id": task.job_id,
            "task_id": task.task_id,
            "task_sha256": task.digest(),
            "kind": task.kind,
            "account": account,
            "node": node,
            "num_units": 2,
            "unit_price_micros": PRICE_MICROS,
            "issued_at_ms": NOW_MS,
            "start_by_ms": NOW_MS + span_ms,
            "deadline_ms": NOW_MS + span_ms,
            "heartbeat_ms": 10,
        }
        lease = Lease(**{**values, **changes})
        return LeaseOffer(
            lease=sign(lease, self.greeting.domain, self.account),
            task=task,
            upload_token=f"{number:032x}",
            max_result_bytes=1 << 20,
        )

    async def send(self, offer: LeaseOffer, node: PeerId) -> LeaseReply:
        """What the worker answers to ``offer``."""
        reply = await self.network.request(node, LEASE_PROTOCOL, offer.encode(), timeout_s=5)
        return LeaseReply.decode(reply)

    def verdict(
        self, message: ResultMessage, account: LocalAccount | None = None
    ) -> Signed[Verdict]:
        """An accepting verdict on ``message``."""
        record = Verdict(
            lease_id=message.result.lease_id,
            lease_epoch=message.result.lease_epoch,
            job_id=message.receipt.record.job_id,
            result_sha256=message.result.digest(),
            accepted=True,
            num_units=2,
            pay_micros=2 * PRICE_MICROS,
            audited=False,
            checks=(Check(name=CheckName.FORM, passed=True, detail="well formed"),),
        )
        return sign(record, self.greeting.domain, account or self.account)

    async def _on_hello(self, peer: PeerId, payload: bytes) -> bytes:
        self.inbox.hellos.put_nowait(HelloRequest.decode(payload))
        return self.greeting.encode()

    async def _on_join(self, peer: PeerId, payload: bytes) -> bytes:
        request = JoinRequest.decode(payload)
        binding = request.bound_node.binding
        binding.require_signer(self.greeting.domain, binding.record.account)
        signature = bytes.fromhex(request.bound_node.node_signature[2:])
        assert verify(public_key_of(peer), binding.record.node_message(), signature)
        self.inbox.joins.put_nowait(request)
        return JoinReply(open_jobs=self.jobs, market_epoch=self.beat.market_epoch).encode()

    def receipt(self, sealed: BidCommitment, **changes: Any) -> Signed[BidReceipt]:
        """The receipt for ``sealed``; ``changes`` falsify its fields."""
        fields: dict[str, Any] = {
            **sealed.model_dump(),
            "epoch_from": max(sealed.epoch_from, self._next_epoch),
            "received_at_ms": NOW_MS,
            "seq": len(self.committed),
        }
        return sign(BidReceipt(**{**fields, **changes}), self.greeting.domain, self.account)

    def notice(
        self,
        commitments: Sequence[str],
        *,
        epoch: int = 0,
        wanted: Sequence[str] | None = None,
        signer: LocalAccount | None = None,
    ) -> SealNotice:
        """The book of exactly these commitments, sealed; all are asked for by default."""
        names = [unhex(name) for name in commitments]
        sealed = SealedEpoch.of(epoch, names, sealed_at_ms=NOW_MS)
        return SealNotice(
            seal=sign(sealed.seal, self.greeting.domain, signer or self.account),
            proofs=tuple(sealed.inclusion(name) for name in commitments),
            wanted=tuple(commitments if wanted is None else wanted),
        )

    async def show(self, node: PeerId, notice: SealNotice) -> Reveals:
        """What the worker answers to the seal."""
        raw = await self.network.request(node, REVEAL_PROTOCOL, notice.encode(), timeout_s=5)
        return Reveals.decode(raw)

    async def _on_commitment(self, peer: PeerId, payload: bytes) -> bytes:
        sealed = BidCommitment.decode(payload)
        self.inbox.commitments.put_nowait(sealed)
        receipt = self.receipt(sealed)
        if sealed.commitment not in self.committed:
            self.committed.append(sealed.commitment)
        # After the reply: a worker shows what it holds a receipt for.
        task = asyncio.create_task(self._seal(peer, sealed))
        self._seals.add(task)
        task.add_done_callback(self._seals.discard)
        return receipt.encode()

    async def _seal(self, peer: PeerId, sealed: BidCommitment) -> None:
        wanted = [sealed.commitment]
        notice = self.notice(self.committed, epoch=self._next_epoch, wanted=wanted)
        self._next_epoch += 1
        reveals = Reveals(reveals=())
        try:
            while not reveals.reveals:
                await asyncio.sleep(0.001)
                reveals = await self.show(peer, notice)
        except ShoalError:
            return
        for reveal in reveals.reveals:
            assert reveal.commitment(self.greeting.domain) == sealed.commitment
            reveal.signed.require_signer(self.greeting.domain, reveal.signed.record.account)
            self.inbox.bids.put_nowait(reveal.signed)

    async def _on_result(self, peer: PeerId, payload: bytes) -> bytes:
        message = ResultMessage.decode(payload)
        message.receipt.require_signer(self.greeting.domain, message.receipt.record.account)
        if self.refuse_result is not None:
            refusal, self.refuse_result = self.refuse_result, None
            raise refusal
        self.inbox.results.put_nowait(message)
        result = message.result
        return ResultReply(lease_id=result.lease_id, result_sha256=result.digest()).encode()

    async def _on_failure(self, peer: PeerId, payload: bytes) -> bytes:
        failure = LeaseFailure.decode(payload)
        self.inbox.failures.put_nowait(failure)
        return FailureReply(lease_id=failure.lease_id).encode()

    async def _on_beat(self, peer: PeerId, payload: bytes) -> bytes:
        beat = Heartbeat.decode(payload)
        if self.refuse_beat is not None:
            refusal, self.refuse_beat = self.refuse_beat, None
            raise refusal
        self.inbox.beats.put_nowait(beat)
        return self.beat.encode()


def replaced_policy(task: AnyTask, **changes: Any) -> AnyTask:
    """``task`` with fields of its policy version replaced."""
    return task.model_copy(update={"policy": task.policy.model_copy(update=changes)})
