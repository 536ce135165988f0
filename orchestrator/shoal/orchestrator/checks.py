"""What every result must satisfy, audited or not: all that is checked without weights."""

from __future__ import annotations

from shoal.network.blob_store import BlobStore
from shoal.orchestrator.learner import Learner
from shoal.protocol.result import Result
from shoal.protocol.task import EvaluateTask, GradientTask, RolloutTask, Task
from shoal.rl import verification
from shoal.rl.gradient_audit import ResidualEvidence
from shoal.rl.verification import GradientVerification, Verification


def check_result(
    learner: Learner, blobs: BlobStore, task: Task, result: Result, evidence: ResidualEvidence
) -> Verification:
    """Whether ``result``, whose payload is in ``blobs``, answers ``task``.

    Call it in the checking thread, whose the environments and the policy's tokenizer are; the
    policy's weights, which the compute thread moves, are not looked at.
    """
    data = blobs.read(result.payload.sha256)
    tolerance = learner.spec.verify.logprob_tolerance
    match task:
        case RolloutTask():
            return verification.verify_rollout(
                learner.policy,
                task,
                result,
                data,
                learner.environments,
                audit=False,
                tolerance=tolerance,
            )
        case EvaluateTask():
            return verification.verify_evaluate(
                learner.policy,
                task,
                result,
                data,
                learner.environments,
                audit=False,
                tolerance=tolerance,
            )
        case GradientTask():
            return verification.verify_gradient(
                learner.policy,
                task,
                result,
                data,
                blobs.read(task.slice.sha256),
                audit=False,
                evidence=evidence,
            )


def payload_of(found: Verification) -> object | None:
    """What is handed on of a result that passed; None of one that did not."""
    if not found.accepted:
        return None
    return found.payload if isinstance(found, GradientVerification) else found
