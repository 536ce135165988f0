"""Nodes and the messages between a worker and the orchestrator.

Each libp2p protocol is one request and one reply::

    /shoal/hello/1      worker → orchestrator   HelloRequest     → HelloReply
    /shoal/join/1       worker → orchestrator   JoinRequest      → JoinReply
    /shoal/bid/2        worker → orchestrator   BidCommitment    → Signed[BidReceipt]
    /shoal/bid-cancel/1 worker → orchestrator   Signed[BidCancel] → BidCancelReply
    /shoal/reveal/1     orchestrator → worker   SealNotice       → Reveals
    /shoal/lease/1      orchestrator → worker   LeaseOffer       → LeaseReply
    /shoal/result/1     worker → orchestrator   ResultMessage    → ResultReply
    /shoal/failure/1    worker → orchestrator   LeaseFailure     → FailureReply
    /shoal/evidence/1   orchestrator → worker   EvidenceRequest  → EvidenceReply
    /shoal/heartbeat/1  worker → orchestrator   Heartbeat        → HeartbeatReply

and `shoal.protocol.probe` has ``/shoal/probe/1``.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, ClassVar

from pydantic import Field

from shoal.protocol.blob import BlobRef
from shoal.protocol.ids import Address, Hex32, Hex64, Name, PeerIdStr, Sha256, ShortId
from shoal.protocol.learning import LoraSpec
from shoal.protocol.market import MAX_UNITS, Lease, TaskKind
from shoal.protocol.money import MicrosField
from shoal.protocol.record import MAX_INT, Record
from shoal.protocol.result import Receipt, Result, Verdict
from shoal.protocol.signing import Domain, SignableRecord, Signed
from shoal.protocol.task import Task

PROTOCOL_VERSION = 2
MAX_REVOKED = 256
"""Leases that one message may name as taken back."""

HELLO_PROTOCOL = "/shoal/hello/1"
JOIN_PROTOCOL = "/shoal/join/1"
COMMIT_PROTOCOL = "/shoal/bid/2"
CANCEL_PROTOCOL = "/shoal/bid-cancel/1"
REVEAL_PROTOCOL = "/shoal/reveal/1"
LEASE_PROTOCOL = "/shoal/lease/1"
RESULT_PROTOCOL = "/shoal/result/1"
FAILURE_PROTOCOL = "/shoal/failure/1"
EVIDENCE_PROTOCOL = "/shoal/evidence/1"
HEARTBEAT_PROTOCOL = "/shoal/heartbeat/1"


class NodeBinding(SignableRecord):
    """Ties a node key to the account that is paid for the node's work.

    Writer: the account (EIP-712); the node key countersigns `node_message` with Ed25519 in
    the join request, so neither can claim the other.  Reader: the orchestrator, and anyone
    who checks a provenance bundle.  The chain records it in ``StakeVault.bindNode``.
    """

    account: Address
    node: PeerIdStr
    node_key: Hex32
    valid_from_ms: int = Field(ge=0, le=MAX_INT)

    eip712_fields: ClassVar[tuple[tuple[str, str], ...]] = (
        ("account", "address"),
        ("node", "string"),
        ("nodeKey", "bytes32"),
        ("validFromMs", "uint64"),
    )

    def eip712_message(self) -> dict[str, Any]:
        """The fields the account signs."""
        return {
            "account": self.account,
            "node": self.node,
            "nodeKey": bytes.fromhex(self.node_key[2:]),
            "validFromMs": self.valid_from_ms,
        }

    def node_message(self) -> bytes:
        """The bytes the node key countersigns."""
        return b"shoal node binding\n" + self.encode()


class BoundNode(Record):
    """A binding with both signatures."""

    binding: Signed[NodeBinding]
    node_signature: Hex64


class ContractAddresses(Record):
    """The contracts a deployment consists of."""

    token: Address
    stake_vault: Address
    job_escrow: Address
    provenance_log: Address
    fault_court: Address
    model_shares: Address


class HelloRequest(Record):
    """What a worker says first.  Writer: worker.  Reader: orchestrator."""

    protocol_version: int = Field(ge=0, le=MAX_UNITS)
    software_version: Name


class HelloReply(Record):
    """Everything a worker needs before it can join: chain, contracts, where bytes are.

    Writer: orchestrator.  Reader: worker.  ``rpc_urls`` are suggestions: a provider who
    wants to trust no one points its worker at a node of its own.  ``p2p_addresses`` is where
    this node may be dialled from now on, so that a worker finds it again under another one.
    ``bound_node`` proves that the node speaks for ``orchestrator``, whose signature of it also
    vouches for chain and escrow; without it a worker can not tell that from a claim.
    """

    protocol_version: int = Field(ge=0, le=MAX_UNITS)
    software_version: Name
    domain: Domain
    contracts: ContractAddresses
    orchestrator: Address
    min_stake_micros: MicrosField
    rpc_urls: tuple[str, ...] = Field(max_length=16)
    api_url: str = Field(max_length=500)
    blob_urls: tuple[str, ...] = Field(max_length=16)
    p2p_addresses: tuple[Annotated[str, Field(max_length=512)], ...] = Field(
        default=(), max_length=16
    )
    heartbeat_ms: int = Field(ge=10, le=3_600_000)
    bound_node: BoundNode | None = None


class JoinRequest(Record):
    """A worker's credentials.  Writer: worker.  Reader: orchestrator."""

    bound_node: BoundNode
    name: Name
    device: Name


class OpenJob(Record):
    """A job that accepts bids, as a worker needs to know it.

    Writer: orchestrator.  Reader: the worker, which fetches the base before it bids, and its
    bidder, which compares the reserves with its floor prices.  ``base`` is the blob of the
    encoded `BaseModelRef`.
    """

    job_id: Hex32
    name: Name
    model: Name
    base: BlobRef
    num_parameters: int = Field(ge=1, le=MAX_INT)
    lora: LoraSpec | None
    reserve_micros: dict[TaskKind, MicrosField]
    epoch: int = Field(ge=0, le=MAX_UNITS)


class JoinReply(Record):
    """Writer: orchestrator.  Reader: worker.

    ``market_epoch`` is the first epoch that bids can still be made for.
    """

    open_jobs: tuple[OpenJob, ...] = Field(max_length=1024)
    market_epoch: int = Field(ge=0, le=MAX_UNITS)


class LeaseOffer(Record):
    """A signed lease with its task.

    ``upload_token`` is the bearer secret that lets this lease's result, and nothing else,
    be stored with the orchestrator; ``max_result_bytes`` caps it.  ``revoked`` are leases taken
    back since the worker's last heartbeat, to be dropped first: what they leave is offered here.
    """

    lease: Signed[Lease]
    task: Task
    upload_token: str = Field(pattern=r"^[0-9a-f]{32,128}$")
    max_result_bytes: int = Field(ge=1, le=MAX_INT)
    revoked: tuple[ShortId, ...] = Field(default=(), max_length=MAX_REVOKED)


class LeaseReply(Record):
    """Absent ``refusal`` means the worker accepted; else why it will not do the work."""

    lease_id: ShortId
    refusal: str | None = Field(default=None, max_length=500)


class ResultMessage(Record):
    """A result, the provider's receipt for it, and the node's signed statement of it."""

    result: Result
    receipt: Signed[Receipt]
    statement: str = Field(max_length=200_000)


class ResultReply(Record):
    """Writer: orchestrator.  Says only that the result is kept; the verdict follows."""

    lease_id: ShortId
    result_sha256: Sha256


class FailureCause(StrEnum):
    """Why a worker could not do a task it had accepted.

    ``TOO_SLOW`` gives up a lease that would end first; ``NODE`` is any other fault of the
    machine, and ``TASK`` any other fault of what it was given.
    """

    OUT_OF_MEMORY = "out_of_memory"
    NOT_FETCHED = "not_fetched"
    WRONG_BASE = "wrong_base"
    PROMPT_TOO_LONG = "prompt_too_long"
    NOT_FINITE = "not_finite"
    ENVIRONMENT = "environment"
    TOO_SLOW = "too_slow"
    NODE = "node"
    TASK = "task"
    STOPPING = "stopping"


class LeaseFailure(Record):
    """A worker gives a lease back, saying why, instead of letting it run out.

    Writer: worker.  Reader: orchestrator, which offers the work elsewhere at once.
    """

    lease_id: ShortId
    lease_epoch: int = Field(ge=1, le=MAX_UNITS)
    cause: FailureCause
    detail: str = Field(max_length=500)


class FailureReply(Record):
    """Writer: orchestrator.  Says only that the lease is over."""

    lease_id: ShortId


class EvidenceRequest(Record):
    """Asks for bytes the worker committed to in a result, for an audit drawn afterwards.

    Writer: orchestrator.  Reader: worker, which uploads the blob with ``upload_token``.
    """

    lease_id: ShortId
    blob_sha256: Sha256
    upload_token: str = Field(pattern=r"^[0-9a-f]{32,128}$")


class EvidenceReply(Record):
    """Writer: worker.  ``uploaded`` is false when it does not have the bytes any more."""

    lease_id: ShortId
    uploaded: bool


class LeaseProgress(Record):
    """How far a lease has come; ``progress`` must rise for the lease to stay alive."""

    lease_id: ShortId
    lease_epoch: int = Field(ge=1, le=MAX_UNITS)
    progress: int = Field(ge=0, le=MAX_INT)


class IdleReason(StrEnum):
    """Why a worker without leases earns nothing just now."""

    WORKING = "working"
    NO_JOBS = "no_jobs"
    ABOVE_RESERVE = "above_reserve"
    OUTBID = "outbid"
    TOO_SLOW = "too_slow"
    TASK_TOO_LARGE = "task_too_large"
    STAKE_TOO_SMALL = "stake_too_small"
    NO_WORK = "no_work"
    PAUSED = "paused"
    FETCHING_BASE = "fetching_base"
    STARTING = "starting"


class IdleDetail(Record):
    """The figures behind an `IdleReason`, of the work that comes nearest to this worker.

    Writer: orchestrator.  Reader: worker, which tells its provider.  Absent is what has no
    bearing on the reason, or is not known.

    Attributes:
        kind: The kind of that work.
        limit_micros: The most its units may cost now.
        price_micros: What this worker asks for one.
        needed_stake_micros: Stake that backs its smallest task.
        free_stake_micros: This account's stake that backs nothing else.
        task_units: Units of its smallest task.
        capacity_units: Units this worker takes at once.
        place: This worker's place on the ladder, from 1.
        places: How many stand on it.
        wait_ms: How long until the worker is let in again.
        task_ms: How long this worker is expected to take for that task, its bytes' way included.
        usual_ms: How long such a task takes to compute, by everybody's pace.
    """

    kind: TaskKind | None = None
    limit_micros: MicrosField | None = None
    price_micros: MicrosField | None = None
    needed_stake_micros: MicrosField | None = None
    free_stake_micros: MicrosField | None = None
    task_units: int | None = Field(default=None, ge=0, le=MAX_UNITS)
    capacity_units: int | None = Field(default=None, ge=0, le=MAX_UNITS)
    place: int | None = Field(default=None, ge=1, le=MAX_UNITS)
    places: int | None = Field(default=None, ge=1, le=MAX_UNITS)
    wait_ms: int | None = Field(default=None, ge=0, le=MAX_INT)
    task_ms: int | None = Field(default=None, ge=0, le=MAX_INT)
    usual_ms: int | None = Field(default=None, ge=0, le=MAX_INT)


class Heartbeat(Record):
    """A worker's sign of life.  Writer: worker.  Reader: orchestrator.

    ``acknowledged`` names verdicts received, so that each is delivered until it is.
    """

    leases: tuple[LeaseProgress, ...] = Field(max_length=256)
    acknowledged: tuple[ShortId, ...] = Field(default=(), max_length=1024)


class HeartbeatReply(Record):
    """Writer: orchestrator.  Reader: worker.

    ``revoked`` leases are to be dropped at once; ``verdicts`` are the provider's to keep.
    ``market_epoch`` is the first epoch that bids can still be made for.  ``idle_detail`` is
    absent where the reason has no figures.
    """

    revoked: tuple[ShortId, ...] = Field(max_length=MAX_REVOKED)
    verdicts: tuple[Signed[Verdict], ...] = Field(max_length=256)
    open_jobs: tuple[OpenJob, ...] = Field(max_length=1024)
    market_epoch: int = Field(ge=0, le=MAX_UNITS)
    idle_reason: IdleReason
    idle_detail: IdleDetail | None = None
