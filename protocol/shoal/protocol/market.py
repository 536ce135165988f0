"""Lots, bids, awards and leases: the records of the reward market."""

from __future__ import annotations

from enum import StrEnum
from itertools import pairwise
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from shoal.protocol.ids import Address, Hex32, PeerIdStr, Sha256, ShortId
from shoal.protocol.money import MicrosField
from shoal.protocol.record import MAX_INT, Record
from shoal.protocol.signing import SignableRecord

MAX_UNITS = 2**32 - 1
ANY_JOB = "0x" + "0" * 64
MAX_LAGS = 65
"""Policy lags a lot may name a pay for: 0 to 64, the largest ``max_staleness`` of a job."""


class TaskKind(StrEnum):
    """What a unit of work is.

    A *unit* is one group of completions for ``ROLLOUT`` and ``GRADIENT``, and one held-out
    prompt for ``EVALUATE``.
    """

    ROLLOUT = "rollout"
    GRADIENT = "gradient"
    EVALUATE = "evaluate"


class LotClass(Record):
    """What makes the units of a lot alike, and so worth one price.

    Writer: the planner.  Reader: bidders and whoever replays a clearing.
    """

    kind: TaskKind
    environment_sha256: Sha256
    policy_sha256: Sha256
    token_bucket: int = Field(ge=1, le=MAX_INT)
    verification_tier: int = Field(default=1, ge=1, le=9)


class Lot(Record):
    """Units of one class, of one job, auctioned together.

    Writer: the orchestrator's planner.  Reader: the auction; bidders, by gossip.

    ``freshness_permille[lag]`` is the share of its price that a unit is paid when its policy
    version is ``lag`` older than the newest; beyond the last lag no work is issued.
    """

    lot_id: ShortId
    job_id: Hex32
    epoch: int = Field(ge=0, le=MAX_UNITS)
    lot_class: LotClass
    num_units: int = Field(ge=1, le=MAX_UNITS)
    reserve_micros: MicrosField
    freshness_permille: tuple[Annotated[int, Field(ge=0, le=1_000)], ...] = Field(
        default=(1_000,), min_length=1, max_length=MAX_LAGS
    )

    @model_validator(mode="after")
    def _staler_is_never_dearer(self) -> Lot:
        if any(a < b for a, b in pairwise(self.freshness_permille)):
            raise ValueError("freshness_permille rises with the lag")
        return self


class Bid(SignableRecord):
    """A standing offer to do units of one kind at a price.

    Writer: the worker's bidder, signed by the provider's account.  Reader: the auction.

    ``job_id`` of 64 zeros stands for any job.  ``capacity`` is how many units of this kind
    the node will hold in flight at once.  The bid covers epochs ``epoch_from`` to
    ``epoch_to`` and lapses at ``valid_until_ms`` all the same.  ``nonce`` only makes equal
    offers distinct: a node's newer bid of the same job and kind replaces the older.

    Example:
        >>> bid = Bid(job_id=ANY_JOB, kind=TaskKind.ROLLOUT, epoch_from=0, epoch_to=100,
        ...           price_micros=120, capacity=32, account="0x" + "1" * 40,
        ...           node="12D3KooWGzxzKZYveHXtpG6AsrUJBcWxHBFS2HsEoGTxrMLvKXtf",
        ...           valid_until_ms=1_790_000_000_000, nonce=1)
        >>> bid.covers("0x" + "a" * 64, 7)
        True
    """

    job_id: Hex32
    kind: TaskKind
    epoch_from: int = Field(ge=0, le=MAX_UNITS)
    epoch_to: int = Field(ge=0, le=MAX_UNITS)
    price_micros: MicrosField = Field(gt=0)
    capacity: int = Field(ge=1, le=MAX_UNITS)
    account: Address
    node: PeerIdStr
    valid_until_ms: int = Field(ge=0, le=MAX_INT)
    nonce: int = Field(ge=0, le=MAX_INT)

    eip712_fields: ClassVar[tuple[tuple[str, str], ...]] = (
        ("jobId", "bytes32"),
        ("kind", "string"),
        ("epochFrom", "uint32"),
        ("epochTo", "uint32"),
        ("priceMicros", "uint96"),
        ("capacity", "uint32"),
        ("account", "address"),
        ("node", "string"),
        ("validUntilMs", "uint64"),
        ("nonce", "uint64"),
    )

    @model_validator(mode="after")
    def _range_is_forward(self) -> Bid:
        if self.epoch_to < self.epoch_from:
            raise ValueError("epoch_to is before epoch_from")
        return self

    def eip712_message(self) -> dict[str, Any]:
        """The fields the provider signs."""
        return {
            "jobId": bytes.fromhex(self.job_id[2:]),
            "kind": self.kind.value,
            "epochFrom": self.epoch_from,
            "epochTo": self.epoch_to,
            "priceMicros": self.price_micros,
            "capacity": self.capacity,
            "account": self.account,
            "node": self.node,
            "validUntilMs": self.valid_until_ms,
            "nonce": self.nonce,
        }

    def covers(self, job_id: str, epoch: int) -> bool:
        """Whether the bid stands for this job and epoch."""
        return self.job_id in (job_id, ANY_JOB) and self.epoch_from <= epoch <= self.epoch_to


class Award(Record):
    """A task's worth of units for one rung of a cleared lot.

    Writer: the auctioneer.  Reader: the dispatcher.  ``unit_price_micros`` is paid for each
    *accepted* unit; the certificate says why.
    """

    lot_id: ShortId
    certificate_sha256: Sha256
    rung: int = Field(ge=0, le=MAX_UNITS)
    account: Address
    node: PeerIdStr
    num_units: int = Field(ge=1, le=MAX_UNITS)
    unit_price_micros: MicrosField = Field(gt=0)


class Lease(SignableRecord):
    """The right and duty of one node to do one task, until a deadline.

    Writer: the orchestrator, signed.  Reader: the worker; later, whoever settles.

    ``lease_epoch`` is the fencing number: each time the same task is leased again it rises,
    and a result under an older number is refused.  ``start_by_ms`` and ``deadline_ms`` are
    times of the orchestrator's clock; a silent holder loses the lease after three missed
    heartbeats of ``heartbeat_ms``.  ``certificate_sha256`` and ``rung`` name the clearing, and
    the place in it, that give the node this work at this price.
    """

    lease_id: ShortId
    lease_epoch: int = Field(ge=1, le=MAX_UNITS)
    lot_id: ShortId
    certificate_sha256: Sha256
    rung: int = Field(ge=0, le=MAX_UNITS)
    job_id: Hex32
    task_id: ShortId
    task_sha256: Sha256
    kind: TaskKind
    account: Address
    node: PeerIdStr
    num_units: int = Field(ge=1, le=MAX_UNITS)
    unit_price_micros: MicrosField = Field(gt=0)
    issued_at_ms: int = Field(ge=0, le=MAX_INT)
    start_by_ms: int = Field(ge=0, le=MAX_INT)
    deadline_ms: int = Field(ge=0, le=MAX_INT)
    heartbeat_ms: int = Field(ge=10, le=3_600_000)

    eip712_fields: ClassVar[tuple[tuple[str, str], ...]] = (
        ("leaseDigest", "bytes32"),
        ("jobId", "bytes32"),
        ("account", "address"),
        ("numUnits", "uint32"),
        ("unitPriceMicros", "uint96"),
    )

    def eip712_message(self) -> dict[str, Any]:
        """The fields the orchestrator signs; the digest covers all the others."""
        return {
            "leaseDigest": bytes.fromhex(self.digest()),
            "jobId": bytes.fromhex(self.job_id[2:]),
            "account": self.account,
            "numUnits": self.num_units,
            "unitPriceMicros": self.unit_price_micros,
        }


class Payout(Record):
    """What a job owes one account, from its first epoch to this one.

    Writer: settlement.  Reader: the escrow (as a Merkle leaf), the provider.  Cumulative, so
    that claiming twice pays once.
    """

    job_id: Hex32
    epoch: int = Field(ge=0, le=MAX_UNITS)
    account: Address
    cumulative_micros: MicrosField
