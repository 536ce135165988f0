"""Results, receipts and verdicts."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, ClassVar

from pydantic import Field

from shoal.protocol.blob import BlobRef
from shoal.protocol.ids import Address, Hex32, Name, PeerIdStr, Sha256, ShortId
from shoal.protocol.market import MAX_UNITS, TaskKind
from shoal.protocol.record import MAX_INT, Record
from shoal.protocol.signing import SignableRecord


class Result(Record):
    """What a worker computed under a lease.

    Writer: the worker.  Reader: the orchestrator's verifier.  ``payload`` is a safetensors
    blob whose arrays `shoal.rl.batch` fixes for each kind.  ``policy_sha256`` is the
    worker's assertion of the weights it really used.  ``engine`` and ``dtype`` say how.
    """

    lease_id: ShortId
    lease_epoch: int = Field(ge=1, le=MAX_UNITS)
    task_id: ShortId
    task_sha256: Sha256
    kind: TaskKind
    policy_sha256: Sha256
    payload: BlobRef
    num_units: int = Field(ge=1, le=MAX_UNITS)
    num_tokens: int = Field(ge=0, le=MAX_INT)
    compute_ms: int = Field(ge=0, le=MAX_INT)
    engine: Name
    dtype: Name


class Receipt(SignableRecord):
    """The provider's own statement that it did the work of a lease.

    Writer: the worker, signed by the provider's account.  Reader: the orchestrator, which
    keeps it as evidence; the provider, who keeps its copy with the verdict.
    """

    lease_id: ShortId
    lease_epoch: int = Field(ge=1, le=MAX_UNITS)
    job_id: Hex32
    result_sha256: Sha256
    account: Address
    node: PeerIdStr

    eip712_fields: ClassVar[tuple[tuple[str, str], ...]] = (
        ("leaseId", "string"),
        ("leaseEpoch", "uint32"),
        ("jobId", "bytes32"),
        ("resultDigest", "bytes32"),
        ("account", "address"),
        ("node", "string"),
    )

    def eip712_message(self) -> dict[str, Any]:
        """The fields the provider signs."""
        return {
            "leaseId": self.lease_id,
            "leaseEpoch": self.lease_epoch,
            "jobId": bytes.fromhex(self.job_id[2:]),
            "resultDigest": bytes.fromhex(self.result_sha256),
            "account": self.account,
            "node": self.node,
        }


class CheckName(StrEnum):
    """The verification checks, in the order they run; each stops the next."""

    FORM = "form"
    DIGEST = "digest"
    POLICY = "policy"
    PROMPTS = "prompts"
    TERMINATION = "termination"
    REWARDS = "rewards"
    LOGPROBS = "logprobs"
    GRADIENT = "gradient"


class Check(Record):
    """One check's outcome: what was measured against which limit, in words and figures."""

    name: CheckName
    passed: bool
    detail: str = Field(max_length=500)


class Verdict(SignableRecord):
    """Whether a result is accepted, and why.

    Writer: the orchestrator, signed.  Reader: the provider, settlement, auditors.
    ``audited`` says whether the expensive recomputation ran.
    """

    lease_id: ShortId
    lease_epoch: int = Field(ge=1, le=MAX_UNITS)
    job_id: Hex32
    result_sha256: Sha256
    accepted: bool
    num_units: int = Field(ge=0, le=MAX_UNITS)
    pay_micros: int = Field(ge=0, le=MAX_INT)
    audited: bool
    checks: tuple[Check, ...] = Field(max_length=32)

    eip712_fields: ClassVar[tuple[tuple[str, str], ...]] = (
        ("verdictDigest", "bytes32"),
        ("accepted", "bool"),
        ("payMicros", "uint96"),
    )

    def eip712_message(self) -> dict[str, Any]:
        """The fields the orchestrator signs; the digest covers all the others."""
        return {
            "verdictDigest": bytes.fromhex(self.digest()),
            "accepted": self.accepted,
            "payMicros": self.pay_micros,
        }

    def reason(self) -> str:
        """The failing check in words, or "accepted"."""
        failed = next((check for check in self.checks if not check.passed), None)
        return f"{failed.name.value}: {failed.detail}" if failed else "accepted"
