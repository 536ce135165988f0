"""What is stated: one kind of in-toto statement for each kind of fact.

A statement is plain JSON in canonical form, so that two parties who hold the same records
build the same bytes: the orchestrator accepts a worker's statement only if it equals the one
it builds itself.

Source: in-toto Attestation Framework, Statement v1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError
from pydantic_core import from_json

from shoal.protocol.canonical import canonical_bytes
from shoal.protocol.errors import InvalidRequest, PeerFault
from shoal.protocol.ids import Address, Hex32, Name, PeerIdStr, Sha256, ShortId
from shoal.protocol.job import EnvSpec, SamplingSpec
from shoal.protocol.market import Lease, TaskKind
from shoal.protocol.policy import PolicyVersion
from shoal.protocol.record import Record, first_fault
from shoal.protocol.result import Result, Verdict
from shoal.protocol.task import EvaluateTask, GradientTask, RolloutTask, Task

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_ROOT = "https://shoal.dev/provenance/"
MAX_SUBJECTS = 512
MAX_LINKS = 1_024


class StatementKind(StrEnum):
    """The facts that are stated."""

    DATASET = "dataset"
    ENVIRONMENT = "environment"
    ROLLOUT_BATCH = "rollout-batch"
    GRADIENT_BATCH = "gradient-batch"
    EVALUATION = "evaluation"
    VERIFICATION = "verification"
    UPDATE = "update"
    RELEASE = "release"

    @property
    def predicate_type(self) -> str:
        """The in-toto predicate type."""
        return f"{PREDICATE_ROOT}{self.value}/v1"


WORK_KINDS: Mapping[TaskKind, StatementKind] = {
    TaskKind.ROLLOUT: StatementKind.ROLLOUT_BATCH,
    TaskKind.GRADIENT: StatementKind.GRADIENT_BATCH,
    TaskKind.EVALUATE: StatementKind.EVALUATION,
}
"""The kind of statement a worker makes of each kind of task."""


class DatasetPredicate(Record):
    """Data a job learned from.  Signed by the orchestrator.  Absent fields are not known."""

    job_id: Hex32
    name: Name
    num_rows: int | None = Field(default=None, ge=0)
    licence: str | None = Field(default=None, max_length=200)
    source: str | None = Field(default=None, max_length=2_000)


class EnvironmentPredicate(Record):
    """An environment of the job, as its spec names it.  Signed by the orchestrator.

    The subject's digest covers the environment's id, version, arguments, tasks and scoring.
    """

    job_id: Hex32
    environment: EnvSpec
    num_train_tasks: int | None = Field(default=None, ge=0)
    num_eval_tasks: int | None = Field(default=None, ge=0)


class WorkPredicate(Record):
    """What a worker did under a lease.  Signed by the worker's node.

    The lease carries job, task digest, units and price; the result carries how it was
    computed.  ``batch`` is absent for evaluations; ``environments`` is empty, and
    ``sampling``, ``seed`` and ``group_size`` are absent, where nothing was sampled;
    ``loss_sha256`` and ``input_sha256`` are a gradient's loss and batch slice.
    """

    lease: Lease
    result: Result
    policy: PolicyVersion
    batch: int | None = Field(default=None, ge=0)
    environments: tuple[EnvSpec, ...] = Field(default=(), max_length=64)
    sampling: SamplingSpec | None = None
    seed: int | None = None
    group_size: int | None = None
    loss_sha256: Sha256 | None = None
    input_sha256: Sha256 | None = None


class VerificationPredicate(Record):
    """A verdict, and whose work it is about.  Signed by the orchestrator.

    An accepted verdict pays ``account`` for the task, and ``work_sha256`` names the payload
    of the worker's own statement; it is absent only when a rejected result came with none
    that could be logged.
    """

    verdict: Verdict
    task_id: ShortId
    kind: TaskKind
    account: Address
    node: PeerIdStr
    work_sha256: Sha256 | None = None


class UpdatePredicate(Record):
    """One policy update: from ``parent`` to ``policy`` by these contributions.

    Signed by the orchestrator.  ``rollouts`` and ``gradients`` name the payloads of the
    workers' statements; ``num_tokens`` is what the summed gradient was divided by.
    """

    job_id: Hex32
    batch: int = Field(ge=0)
    parent: PolicyVersion
    policy: PolicyVersion
    rollouts: tuple[Sha256, ...] = Field(max_length=MAX_LINKS)
    gradients: tuple[Sha256, ...] = Field(max_length=MAX_LINKS // 2)
    num_tokens: int = Field(ge=0)
    optimizer_sha256: Sha256


class ReleasePredicate(Record):
    """The finished model.  Signed by the orchestrator; the subjects are the released files.

    ``update_sha256`` names the payload of the last update's statement, absent when the job
    ended before its first; ``evaluations`` names the evaluations reported with the model.
    """

    job_id: Hex32
    policy: PolicyVersion
    base_name: Name
    update_sha256: Sha256 | None = None
    evaluations: tuple[Sha256, ...] = Field(default=(), max_length=MAX_LINKS)


Predicate = (
    DatasetPredicate
    | EnvironmentPredicate
    | WorkPredicate
    | VerificationPredicate
    | UpdatePredicate
    | ReleasePredicate
)

_PREDICATES: Mapping[StatementKind, type[Predicate]] = {
    StatementKind.DATASET: DatasetPredicate,
    StatementKind.ENVIRONMENT: EnvironmentPredicate,
    StatementKind.ROLLOUT_BATCH: WorkPredicate,
    StatementKind.GRADIENT_BATCH: WorkPredicate,
    StatementKind.EVALUATION: WorkPredicate,
    StatementKind.VERIFICATION: VerificationPredicate,
    StatementKind.UPDATE: UpdatePredicate,
    StatementKind.RELEASE: ReleasePredicate,
}


class SubjectDigest(Record):
    """A subject's digest set; SHA-256 is the only one used."""

    sha256: Sha256


class Subject(Record):
    """What a statement is about, by content."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True)

    name: Name
    digests: SubjectDigest = Field(alias="digest")


class _Form(Record):
    """The outer form of a statement, under in-toto's names."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True)

    type: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    subject: tuple[Subject, ...] = Field(min_length=1, max_length=MAX_SUBJECTS)
    predicate_type: str = Field(alias="predicateType", max_length=200)
    predicate: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Statement:
    """A statement, taken apart: its kind, subjects and predicate."""

    kind: StatementKind
    subjects: tuple[Subject, ...]
    predicate: Predicate

    @property
    def job_id(self) -> str:
        """The job this is part of."""
        match self.predicate:
            case WorkPredicate():
                return self.predicate.lease.job_id
            case VerificationPredicate():
                return self.predicate.verdict.job_id
            case _:
                return self.predicate.job_id


def encode(kind: StatementKind, subjects: Mapping[str, str], predicate: Predicate) -> bytes:
    """The statement's canonical bytes; ``subjects`` maps names to SHA-256 digests.

    Raises:
        InvalidRequest: the predicate is of another kind, there are no subjects or too many,
            or a number has no exact canonical form.
    """
    if not isinstance(predicate, _PREDICATES[kind]):
        raise InvalidRequest(
            f"A {kind.value} statement cannot carry a {type(predicate).__name__}.",
            code="wrong_predicate",
        )
    if not 0 < len(subjects) <= MAX_SUBJECTS:
        raise InvalidRequest(
            f"A statement is about 1 to {MAX_SUBJECTS} subjects, not {len(subjects)}.",
            code="bad_subjects",
        )
    try:
        return canonical_bytes(
            {
                "_type": STATEMENT_TYPE,
                "subject": [
                    {"name": name, "digest": {"sha256": sha256}}
                    for name, sha256 in sorted(subjects.items())
                ],
                "predicateType": kind.predicate_type,
                "predicate": predicate.model_dump(mode="json", exclude_none=True),
            }
        )
    except ValueError:
        raise InvalidRequest(
            "The statement holds a number that canonical JSON cannot carry exactly; send "
            "smaller numbers.",
            code="number_too_large",
        ) from None


def decode(payload: bytes) -> Statement:
    """The statement in ``payload``, which came from a stranger and was capped on the way.

    Raises:
        PeerFault: it is not exactly a statement of a known kind in canonical form.
    """
    try:
        # Not `json.loads`: deep nesting makes that overflow the stack wherever a library has
        # raised the recursion limit, as one of ours does; this parser has a fixed depth.
        data = from_json(payload, allow_inf_nan=False)
        is_canonical = canonical_bytes(data) == payload
    except ValueError:
        raise PeerFault("A statement is not JSON.", code="malformed") from None
    # Canonical form leaves no room for duplicate keys, which readers resolve differently.
    if not is_canonical:
        raise PeerFault("A statement is not in canonical form (RFC 8785).", code="malformed")
    kinds = {kind.predicate_type: kind for kind in StatementKind}
    try:
        form = _Form.model_validate_json(payload)
        if form.predicate_type not in kinds:
            raise PeerFault(
                f"A statement has the unknown predicate type {form.predicate_type!r}.",
                code="unknown_kind",
            )
        kind = kinds[form.predicate_type]
        predicate = _PREDICATES[kind].model_validate_json(json.dumps(form.predicate))
    except ValidationError as error:
        raise PeerFault(
            f"A statement is malformed: {first_fault(error)}.", code="malformed"
        ) from None
    return Statement(kind=kind, subjects=form.subject, predicate=predicate)


def work_statement(lease: Lease, task: Task, result: Result) -> bytes:
    """The worker's statement of the result it computes for ``task`` under ``lease``."""
    shared: dict[str, Any] = {"lease": lease, "result": result, "policy": task.policy}
    match task:
        case RolloutTask():
            predicate = WorkPredicate(
                **shared,
                batch=task.batch,
                environments=task.environments,
                sampling=task.sampling,
                seed=task.seed,
                group_size=task.group_size,
            )
        case GradientTask():
            predicate = WorkPredicate(
                **shared,
                batch=task.batch,
                loss_sha256=task.loss_sha256,
                input_sha256=task.slice.sha256,
            )
        case EvaluateTask():
            predicate = WorkPredicate(**shared, environments=task.environments)
    kind = WORK_KINDS[task.kind]
    return encode(kind, {f"{kind.value}.safetensors": result.payload.sha256}, predicate)


def environment_statement(
    job_id: str,
    environment: EnvSpec,
    environment_sha256: str,
    *,
    num_train_tasks: int | None = None,
    num_eval_tasks: int | None = None,
) -> bytes:
    """The orchestrator's statement of an environment and its content digest."""
    predicate = EnvironmentPredicate(
        job_id=job_id,
        environment=environment,
        num_train_tasks=num_train_tasks,
        num_eval_tasks=num_eval_tasks,
    )
    return encode(StatementKind.ENVIRONMENT, {environment.id: environment_sha256}, predicate)


def dataset_statement(
    job_id: str,
    name: str,
    dataset_sha256: str,
    *,
    num_rows: int | None = None,
    licence: str | None = None,
    source: str | None = None,
) -> bytes:
    """The orchestrator's statement of a dataset and its content digest."""
    predicate = DatasetPredicate(
        job_id=job_id, name=name, num_rows=num_rows, licence=licence, source=source
    )
    return encode(StatementKind.DATASET, {name: dataset_sha256}, predicate)


def verification_statement(verdict: Verdict, lease: Lease, *, work_sha256: str | None) -> bytes:
    """The orchestrator's statement of its verdict on the result of ``lease``.

    Args:
        verdict: The verdict.
        lease: The lease it is about, which says who is paid.
        work_sha256: SHA-256 of the payload of the worker's statement.
    """
    predicate = VerificationPredicate(
        verdict=verdict,
        task_id=lease.task_id,
        kind=lease.kind,
        account=lease.account,
        node=lease.node,
        work_sha256=work_sha256,
    )
    return encode(StatementKind.VERIFICATION, {"result": verdict.result_sha256}, predicate)


def update_statement(predicate: UpdatePredicate) -> bytes:
    """The orchestrator's statement of an update; the new adapter is its subject."""
    name = f"adapter-v{predicate.policy.version}.safetensors"
    return encode(StatementKind.UPDATE, {name: predicate.policy.adapter.sha256}, predicate)


def release_statement(predicate: ReleasePredicate, files: Mapping[str, str]) -> bytes:
    """The orchestrator's statement of a release; ``files`` maps names to SHA-256 digests."""
    return encode(StatementKind.RELEASE, files, predicate)


def require_same_work(payload: bytes, lease: Lease, task: Task, result: Result) -> None:
    """Passes only if ``payload`` is exactly the statement these records give.

    Raises:
        PeerFault: the worker states something else than it delivered.
    """
    if payload != work_statement(lease, task, result):
        raise PeerFault(
            f"The statement sent with the result of lease {lease.lease_id} does not say what "
            "the lease, the task and the result say.",
            code="statement_mismatch",
            lease_id=lease.lease_id,
        )
