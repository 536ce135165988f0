"""What a requester asks for.

A `JobSpec` is the job file with every default written out; a `Job` is the spec with the
requester's name to it.  `job_id` is derived from both, so that nobody can occupy another
requester's id on the chain.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, ClassVar

from eth_abi.abi import encode as abi_encode
from eth_utils.crypto import keccak
from pydantic import Field, model_validator

from shoal.protocol.ids import Address, Hex32, JobId, Name
from shoal.protocol.money import MicrosField
from shoal.protocol.record import MAX_INT, Record
from shoal.protocol.signing import SignableRecord

ExactInt = Annotated[int, Field(ge=-MAX_INT, le=MAX_INT)]

MAX_STEPS = 1_000_000
MAX_TOKENS = 131_072
MAX_PROMPTS = 65_536


class AdvantageScale(StrEnum):
    """How rewards become advantages inside a group."""

    GROUP_STD = "group_std"
    NONE = "none"


class LossKind(StrEnum):
    """The policy losses this version of the protocol knows."""

    DAPO = "dapo"


class LossSpec(Record):
    """The exact loss; its digest travels in every gradient task.

    Source: DAPO, arXiv 2503.14476, eq. 8 (token-level mean, decoupled clip ``0.2 / 0.28``).
    """

    kind: LossKind = LossKind.DAPO
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    clip_high: float = Field(default=0.28, gt=0, lt=10)
    advantage_scale: AdvantageScale = AdvantageScale.GROUP_STD


class OptimizerSpec(Record):
    """AdamW on the adapter, with linear warm-up and linear decay."""

    learning_rate: float = Field(default=1e-5, gt=0, le=1)
    warmup_steps: int = Field(default=5, ge=0, le=MAX_STEPS)
    final_lr_fraction: float = Field(default=0.1, ge=0, le=1)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    max_grad_norm: float = Field(default=1.0, gt=0, le=1e6)


class LoraSpec(Record):
    """The adapter's shape, in PEFT's words."""

    r: int = Field(default=16, ge=1, le=512)
    alpha: int = Field(default=32, ge=1, le=4096)
    target_modules: str = Field(default="all-linear", pattern=r"^[A-Za-z0-9_|.-]{1,200}$")


class SamplingSpec(Record):
    """How completions are drawn; no truncated sampling, so that ratios stay unbiased."""

    max_tokens: int = Field(default=256, ge=1, le=MAX_TOKENS)
    temperature: float = Field(default=1.0, gt=0, le=10)


class EnvSpec(Record):
    """One environment of the job, and its share of the prompts."""

    id: Name
    weight: float = Field(default=1.0, gt=0, le=1e6)
    args: dict[str, str | ExactInt | float | bool] = Field(default_factory=dict, max_length=64)


class EvalSpec(Record):
    """When held-out prompts are scored, and how many."""

    interval: int = Field(default=20, ge=1, le=MAX_STEPS)
    num_examples: int = Field(default=64, ge=1, le=MAX_PROMPTS)


class CheckpointSpec(Record):
    """When weights and optimiser state are kept."""

    interval: int = Field(default=25, ge=1, le=MAX_STEPS)
    keep_last: int = Field(default=3, ge=1, le=1000)


class BudgetSpec(Record):
    """The requester's money; a hard stop."""

    max_total_micros: MicrosField = Field(gt=0)
    max_rollout_micros: MicrosField = Field(gt=0)
    max_gradient_micros: MicrosField = Field(gt=0)
    max_evaluate_micros: MicrosField = Field(gt=0)


class VerifySpec(Record):
    """How much of the accepted work is recomputed, and how exactly it must agree."""

    spot_check_rate: float = Field(default=0.05, ge=0, le=1)
    logprob_tolerance: float = Field(default=1e-4, gt=0, le=1)


class JobSpec(Record):
    """A job file, resolved: every default is written out.

    Writer: the requester's client.  Reader: the orchestrator, and whoever audits the model.

    ``batch_size`` counts rollouts (completions) per policy update and is a multiple of
    ``rollouts_per_example``, the group size.  ``max_staleness`` is how many versions old a
    rollout's policy may be when its batch is applied; 0 is synchronous.  An absent
    ``model_sha256`` accepts whatever content the name resolves to.
    """

    schema_version: int = Field(default=1, ge=1, le=1)
    name: Name
    model: Name
    model_sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    seed: int = Field(default=0, ge=0, le=MAX_INT)
    max_steps: int = Field(ge=1, le=MAX_STEPS)
    batch_size: int = Field(ge=1, le=1 << 20)
    rollouts_per_example: int = Field(default=8, ge=2, le=1024)
    max_staleness: int = Field(default=1, ge=0, le=64)
    loss: LossSpec = LossSpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    lora: LoraSpec = LoraSpec()
    sampling: SamplingSpec = SamplingSpec()
    environments: tuple[EnvSpec, ...] = Field(min_length=1, max_length=64)
    evaluation: EvalSpec = EvalSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    budget: BudgetSpec
    verify: VerifySpec = VerifySpec()

    @model_validator(mode="after")
    def _batch_is_whole_groups(self) -> JobSpec:
        if self.batch_size % self.rollouts_per_example:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of rollouts_per_example "
                f"{self.rollouts_per_example}"
            )
        return self

    @property
    def groups_per_batch(self) -> int:
        """Prompts (groups) per policy update."""
        return self.batch_size // self.rollouts_per_example


class Job(SignableRecord):
    """A spec, who pays for it, and a nonce that lets the same spec be submitted twice.

    Writer: the requester, who signs it.  Reader: the orchestrator.
    """

    spec: JobSpec
    requester: Address
    nonce: int = Field(ge=0, le=MAX_INT)

    eip712_fields: ClassVar[tuple[tuple[str, str], ...]] = (
        ("requester", "address"),
        ("specDigest", "bytes32"),
        ("budgetMicros", "uint96"),
        ("nonce", "uint64"),
    )

    def eip712_message(self) -> dict[str, Any]:
        """The fields the requester signs."""
        return {
            "requester": self.requester,
            "specDigest": bytes.fromhex(self.spec.digest()),
            "budgetMicros": self.spec.budget.max_total_micros,
            "nonce": self.nonce,
        }

    def job_digest(self) -> bytes:
        """The 32 bytes passed to ``JobEscrow.open``."""
        return bytes.fromhex(self.digest())

    def job_id(self) -> JobId:
        """``keccak(abi.encode(requester, job digest))``, as the escrow derives it."""
        encoded = abi_encode(["address", "bytes32"], [self.requester, self.job_digest()])
        return JobId("0x" + keccak(encoded).hex())


class JobCommandKind(StrEnum):
    """What a requester may tell a running job."""

    CANCEL = "cancel"


class JobCommand(SignableRecord):
    """A requester's order to one of its jobs.

    Writer: the requester, who signs it.  Reader: the orchestrator.  Giving the same order
    twice changes nothing, so it needs no nonce.
    """

    job_id: Hex32
    kind: JobCommandKind

    eip712_fields: ClassVar[tuple[tuple[str, str], ...]] = (
        ("jobId", "bytes32"),
        ("kind", "string"),
    )

    def eip712_message(self) -> dict[str, Any]:
        """The fields the requester signs."""
        return {"jobId": bytes.fromhex(self.job_id[2:]), "kind": self.kind.value}


class JobState(StrEnum):
    """Where a job is.

    ``FUNDING → RUNNING → DRAINING → COMPLETE | CANCELLED | FAILED | PAUSED``.  A job is paused
    when its money is used up: its last version is released and its escrow stays open.
    """

    FUNDING = "funding"
    RUNNING = "running"
    PAUSED = "paused"
    DRAINING = "draining"
    COMPLETE = "complete"
    CANCELLED = "cancelled"
    FAILED = "failed"
