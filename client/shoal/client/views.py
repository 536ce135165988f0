"""What the orchestrator's API answers, as records the client reads.

Writer: the orchestrator.  Reader: the SDK and its callers.  Fields a newer orchestrator
adds are ignored; a field that is missing or of the wrong type is a `PeerFault`.  Money is
in micros, times in Unix milliseconds (``_ms``) or seconds (``_s``).
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from shoal.protocol.blob import MAX_BLOB_BYTES, BlobRef
from shoal.protocol.certificate import ClearingRule, ReserveTerms
from shoal.protocol.errors import PeerFault
from shoal.protocol.ids import Address, Hex32, PeerIdStr, Sha256, ShortId
from shoal.protocol.job import JobState
from shoal.protocol.market import MAX_LAGS, TaskKind
from shoal.protocol.node import ContractAddresses
from shoal.protocol.policy import BaseModelRef
from shoal.protocol.record import first_fault
from shoal.protocol.signing import Domain

_V = TypeVar("_V", bound="View")

TimeMs = Annotated[int, Field(ge=0, le=253_370_764_800_000)]
"""A time that has a date: up to the year 9999."""
MAX_LIST = 100_000
ENDED = frozenset({JobState.COMPLETE, JobState.CANCELLED, JobState.FAILED, JobState.PAUSED})
"""The states in which nothing more is done for a job; a paused one has used up its money."""


class View(BaseModel):
    """Plain data as answered; unknown fields are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class MarketInfo(View):
    """Who an orchestrator is: its account, chain, contracts and addresses."""

    software_version: str
    protocol_version: int
    domain: Domain
    contracts: ContractAddresses
    orchestrator: Address
    peer_id: str
    p2p_addresses: tuple[str, ...] = Field(max_length=64)
    blob_urls: tuple[str, ...] = Field(max_length=64)
    api_url: str
    rpc_urls: tuple[str, ...] = Field(max_length=64)
    min_stake_micros: int
    challenge_window_s: int


class SubmittedJob(View):
    """An accepted job and what its escrow must be opened with."""

    job_id: Hex32
    state: JobState
    job_digest: Hex32
    coordinator: Address
    escrow_deadline_s: int


class Evaluation(View):
    """How one policy version did on held-out prompts.

    ``accuracy`` is avg@k with k ``num_samples`` (0 to 1), between ``accuracy_low`` and
    ``accuracy_high`` with 95 % confidence.
    """

    policy_version: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    num_examples: int
    num_samples: int = 1

    @property
    def margin(self) -> float:
        """Half the width of the confidence interval."""
        return (self.accuracy_high - self.accuracy_low) / 2


class HealthView(View):
    """Something that is wrong with a job's learning: the figures, and what to do."""

    code: str
    finding: str
    remedy: str
    policy_version: int = 0

    @property
    def sentence(self) -> str:
        """Both, for people."""
        return f"{self.finding}: {self.remedy}"


class LeaseCounts(View):
    """What became of one worker's leases of one kind."""

    leased: int = 0
    accepted: int = 0
    rejected: int = 0
    expired: int = 0


class WorkerView(View):
    """One worker's part in a job; ``accepted_units`` are groups or held-out prompts."""

    account: Address
    node: str
    name: str
    connected: bool
    tasks: dict[str, LeaseCounts] = Field(default_factory=dict)
    accepted_units: int = 0
    earned_micros: int = 0
    claimed_micros: int = 0
    price_micros: dict[str, int] = Field(default_factory=dict)

    def leased(self) -> int:
        """Leases of every kind."""
        return sum(counts.leased for counts in self.tasks.values())

    def accepted(self) -> int:
        """Accepted leases of every kind."""
        return sum(counts.accepted for counts in self.tasks.values())


class ConnectedWorker(View):
    """A worker as the market at large lists it."""

    account: Address
    node: str
    name: str
    connected: bool


class EscrowView(View):
    """A job's money on chain."""

    funded_micros: int = 0
    committed_micros: int = 0
    claimed_micros: int = 0
    refunded_micros: int = 0
    closed: bool = False


class ModelView(View):
    """The job's adapter; absent digest: none is published yet."""

    adapter_sha256: Sha256 | None = None
    ready: bool = False


class JobView(View):
    """A job as of now.

    ``reward_recent`` is the mean reward of the last batch; ``eta_s`` is absent until a pace
    is known; ``spent_micros`` is accepted work, ``committed_micros`` what is posted on chain;
    ``health`` is what is wrong now, ``evaluations`` are in the order of their versions.
    """

    job_id: Hex32
    name: str
    requester: Address
    state: JobState
    reason: str | None = None
    policy_version: int = 0
    max_steps: int
    created_ms: int
    started_ms: int | None = None
    finished_ms: int | None = None
    eta_s: float | None = None
    budget_micros: int
    funded_micros: int = 0
    spent_micros: int = 0
    committed_micros: int = 0
    reward_recent: float | None = None
    evaluations: tuple[Evaluation, ...] = Field(default=(), max_length=MAX_LIST)
    health: tuple[HealthView, ...] = Field(default=(), max_length=MAX_LIST)
    tasks: dict[str, int] = Field(default_factory=dict)
    workers: tuple[WorkerView, ...] = Field(default=(), max_length=MAX_LIST)
    escrow: EscrowView | None = None
    model: ModelView | None = None

    @field_validator("evaluations")
    @classmethod
    def _by_version(cls, evaluations: tuple[Evaluation, ...]) -> tuple[Evaluation, ...]:
        return tuple(sorted(evaluations, key=lambda item: item.policy_version))

    @property
    def ended(self) -> bool:
        """Whether nothing more is done for the job."""
        return self.state in ENDED


class JobStanding(View):
    """Where a job stands, and why if it ended badly."""

    job_id: str
    state: JobState
    reason: str


class JobEvent(View):
    """Something that happened to a job; ``seq`` rises, not always by one."""

    seq: int
    at_ms: int
    type: str
    data: dict[str, Any] = Field(default_factory=dict)


class ClearingView(View):
    """What one auction decided, without its bids; the certificate of this digest says it signed.

    ``num_rungs`` bids were eligible, of ``num_bidders`` accounts; ``num_refused`` were not.
    """

    sha256: Sha256
    lot_id: ShortId
    kind: TaskKind
    epoch: int
    num_units: int
    num_commitments: int
    num_revealed: int
    num_bidders: int
    num_rungs: int
    num_refused: int
    unfilled_units: int
    rule: ClearingRule
    clearing_price_micros: int
    reserve: ReserveTerms
    freshness_permille: tuple[int, ...] = Field(min_length=1, max_length=MAX_LAGS)
    issued_at_ms: TimeMs


class RungView(View):
    """One eligible bid in its place, from 0; money in micros per unit.

    ``num_units`` were won, or stand by; 0 means that others came first.
    """

    rung: int
    account: Address
    node: PeerIdStr
    name: str
    price_micros: int
    handicap_micros: int
    pay_micros: int
    num_units: int
    room_units: int
    standby: bool

    @property
    def adjusted_micros(self) -> int:
        """What bids are compared by."""
        return self.price_micros + self.handicap_micros


class RefusedBidView(View):
    """A bid that is not on the ladder; ``reason`` is a code such as ``above_reserve``."""

    account: Address
    node: PeerIdStr
    name: str
    price_micros: int
    handicap_micros: int
    reason: str


class KindBookView(View):
    """The newest clearing of one kind of a job's tasks.

    ``rungs`` and ``refused`` are the first ones where there are very many; ``refused_for``
    counts all by their reason.  ``lease_ids`` are the kind's newest leases.
    """

    clearing: ClearingView
    rungs: tuple[RungView, ...] = Field(max_length=MAX_LIST)
    refused: tuple[RefusedBidView, ...] = Field(max_length=MAX_LIST)
    refused_for: dict[str, int]
    lease_ids: tuple[ShortId, ...] = Field(max_length=MAX_LIST)


class BookView(View):
    """How the market stands to a job; a kind that was never auctioned is not in it."""

    job_id: Hex32
    books: tuple[KindBookView, ...] = Field(max_length=len(TaskKind))


class LeaseView(View):
    """One lease, and why its node has it at its price.

    ``attempt`` counts the leases of its task up to this one.  ``pay_micros`` is its whole pay,
    0 until it is accepted.  ``clearing``, ``bid`` (its rung there) and ``next_bid`` (the rung
    after it) are absent where the orchestrator has no certificate of it.
    """

    lease_id: ShortId
    job_id: Hex32
    lot_id: ShortId
    task_id: ShortId
    attempt: int
    kind: TaskKind
    state: str
    reason: str
    account: Address
    node: PeerIdStr
    num_units: int
    unit_price_micros: int
    pay_micros: int
    issued_at_ms: TimeMs
    ended_at_ms: TimeMs | None = None
    certificate_sha256: Sha256 | None = None
    rung: int | None = None
    clearing: ClearingView | None = None
    bid: RungView | None = None
    next_bid: RungView | None = None


class ModelFileView(View):
    """One file of a published adapter folder, by content."""

    path: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$")
    sha256: Sha256
    size_bytes: int = Field(ge=0, le=MAX_BLOB_BYTES)

    def blob(self) -> BlobRef:
        """The file's bytes."""
        return BlobRef(sha256=self.sha256, size_bytes=self.size_bytes)


class PublishedModel(View):
    """A job's adapter folder, and the base it belongs to."""

    files: tuple[ModelFileView, ...] = Field(min_length=1, max_length=512)
    base: BaseModelRef


def parse_view(cls: type[_V], data: object) -> _V:
    """``data``, as the orchestrator answered it, as a ``cls``.

    Raises:
        PeerFault: it is something else.
    """
    try:
        # The wire's own records are strict, which arrays, read as lists, are not for tuples.
        return cls.model_validate(data, strict=False)
    except ValidationError as error:
        raise PeerFault(
            f"The orchestrator's answer is not a {cls.__name__} ({first_fault(error)}); its "
            "version may not match this command's, compare `shoal version` on both.",
            code="malformed",
        ) from None
