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
from shoal.protocol.learning import MAX_STEPS, GradientSpec, LoraSpec, LossSpec, OptimizerSpec
from shoal.protocol.money import MicrosField
from shoal.protocol.record import MAX_INT, Record
from shoal.protocol.signing import SignableRecord

ExactInt = Annotated[int, Field(ge=-MAX_INT, le=MAX_INT)]

MAX_TOKENS = 131_072
MAX_PROMPTS = 65_536


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
    """When held-out prompts are scored, how, and when that ends the job early.

    ``temperature`` 0 takes the most likely token; above 0, ``samples_per_example`` completions
    are drawn for each prompt.  The job stops early once ``patience`` evaluations in a row
    brought no better avg@k, or once it reaches ``target``; absent, it never does.
    """

    interval: int = Field(default=20, ge=1, le=MAX_STEPS)
    num_examples: int = Field(default=64, ge=1, le=MAX_PROMPTS)
    samples_per_example: int = Field(default=1, ge=1, le=1024)
    temperature: float = Field(default=0.0, ge=0, le=10)
    patience: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    target: float | None = Field(default=None, ge=0, le=1)

    @model_validator(mode="after")
    def _one_greedy_sample(self) -> EvalSpec:
        if self.temperature == 0 and self.samples_per_example > 1:
            raise ValueError(
                f"samples_per_example {self.samples_per_example} would repeat the same greedy "
                "completion; set temperature above 0"
            )
        return self


class Release(StrEnum):
    """Which policy version a job releases when it ends."""

    LAST = "last"
    BEST = "best"


class CheckpointSpec(Record):
    """When weights and optimiser state are kept, and which version is released.

    The version with the best held-out avg@k is always kept beside them.
    """

    interval: int = Field(default=25, ge=1, le=MAX_STEPS)
    keep_last: int = Field(default=3, ge=1, le=1000)
    release: Release = Release.LAST


class TaskSizes(Record):
    """How many units make one task.

    A batch is cut into tasks in one way only, whoever does them: so the same job gives the
    same numbers however many workers share it, and whenever it is resumed.
    """

    rollout: int = Field(default=64, ge=1, le=MAX_PROMPTS)
    gradient: int = Field(default=64, ge=1, le=MAX_PROMPTS)
    evaluate: int = Field(default=256, ge=1, le=MAX_PROMPTS)


class BudgetSpec(Record):
    """The requester's money; a hard stop.

    ``delay_micros_per_s`` is what a second more per unit costs the requester, by which slow
    providers are handicapped.  ``stale_pay_permille`` is the share of its price that work
    ``max_staleness`` versions old is paid; less old work is paid on the line between.
    """

    max_total_micros: MicrosField = Field(gt=0)
    max_rollout_micros: MicrosField = Field(gt=0)
    max_gradient_micros: MicrosField = Field(gt=0)
    max_evaluate_micros: MicrosField = Field(gt=0)
    delay_micros_per_s: MicrosField = 0
    stale_pay_permille: int = Field(default=1_000, ge=0, le=1_000)


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
    ``model_sha256`` accepts whatever content the name resolves to.  An absent ``lora`` trains
    every weight of the base, which then travels whole.  ``dynamic_sampling_rounds`` is how
    often prompts whose group had no spread are replaced by fresh ones (DAPO, arXiv 2503.14476
    §3.2); 0 keeps them.
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
    lora: LoraSpec | None = LoraSpec()
    gradient: GradientSpec = GradientSpec()
    tasks: TaskSizes = TaskSizes()
    dynamic_sampling_rounds: int = Field(default=0, ge=0, le=16)
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
