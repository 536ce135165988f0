"""Which lease offers are genuine, and which of those the worker takes."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.models.base import require_allowed_files
from shoal.protocol.errors import PeerFault
from shoal.protocol.ids import Account, PeerId
from shoal.protocol.market import Lease, TaskKind
from shoal.protocol.money import format_dollars
from shoal.protocol.node import LeaseOffer
from shoal.protocol.policy import MAX_ADAPTER_BYTES
from shoal.protocol.signing import Domain
from shoal.protocol.task import GradientTask, RolloutTask
from shoal.worker.config import WorkerConfig
from shoal.worker.ports import AnyTask

MAX_HELD_LEASES = 256
"""One heartbeat names at most so many."""
MAX_SLICE_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class Parties:
    """Between whom a lease is, and where its signatures count."""

    domain: Domain
    orchestrator: Account
    account: Account
    node: PeerId


def require_genuine(offer: LeaseOffer, parties: Parties) -> None:
    """Passes only an offer the orchestrator signed, for this node, of exactly this task.

    Raises:
        Unauthorised: somebody else signed it.
        PeerFault: it contradicts itself, is for another node, or its base lists files that
            are no model's.
    """
    lease, task = offer.lease.record, offer.task
    offer.lease.require_signer(parties.domain, parties.orchestrator)
    if lease.node != parties.node or lease.account.lower() != parties.account.lower():
        raise _fault(lease, f"is for node {lease.node} of {lease.account}, not for this one")
    if task.digest() != lease.task_sha256:
        raise _fault(lease, "comes with another task than the one it was signed for")
    if (task.task_id, task.job_id, task.kind) != (lease.task_id, lease.job_id, lease.kind):
        raise _fault(lease, "names another task, job or kind than its task does")
    if task.policy.job_id != lease.job_id:
        raise _fault(lease, "uses a policy version of another job")
    if task.policy.base_sha256 != task.base.content_digest():
        raise _fault(lease, "pairs its policy version with another base")
    if isinstance(task, GradientTask) and task.loss.digest() != task.loss_sha256:
        raise _fault(lease, "pins another loss than the one it spells out")
    if lease.deadline_ms <= lease.issued_at_ms:
        raise _fault(lease, "was over before it was issued")
    require_allowed_files(task.base)


def units_of(task: AnyTask) -> int:
    """How many units of pay the task is worth."""
    return task.num_groups if isinstance(task, GradientTask) else len(task.prompts)


def refusal_of(
    offer: LeaseOffer, config: WorkerConfig, *, capacity: int, units_held: int
) -> str | None:
    """Why the worker will not do a genuine offer; None when it will.

    Args:
        offer: The offer.
        config: Floor prices and limits.
        capacity: Units of the kind it takes at once just now.
        units_held: Units of the same kind already in flight.
    """
    lease, task = offer.lease.record, offer.task
    floor = config.price.micros(lease.kind)
    if lease.unit_price_micros < floor:
        return (
            f"the unit price of ${format_dollars(lease.unit_price_micros)} is below the floor "
            f"of ${format_dollars(floor)}"
        )
    if lease.num_units != units_of(task):
        return f"the lease pays {lease.num_units} units for a task of {units_of(task)}"
    if units_held + lease.num_units > capacity:
        return (
            f"{units_held} of {capacity} {lease.kind.value} units are in flight and "
            f"{lease.num_units} more do not fit"
        )
    return _size_refusal(task, config, offer)


def _size_refusal(task: AnyTask, config: WorkerConfig, offer: LeaseOffer) -> str | None:
    base_bytes = sum(file.blob.size_bytes for file in task.base.files)
    if base_bytes > config.max_base_bytes:
        return f"the base has {base_bytes} bytes and {config.max_base_bytes} are allowed"
    if task.policy.adapter.size_bytes > MAX_ADAPTER_BYTES:
        return f"the adapter is larger than {MAX_ADAPTER_BYTES} bytes"
    if isinstance(task, GradientTask) and task.slice.size_bytes > MAX_SLICE_BYTES:
        return f"the batch slice is larger than {MAX_SLICE_BYTES} bytes"
    if isinstance(task, RolloutTask) and offer.max_result_bytes < _least_rollout_bytes(task):
        return f"a result of at most {offer.max_result_bytes} bytes cannot hold the rollouts"
    return None


def _least_rollout_bytes(task: RolloutTask) -> int:
    # A token id and a log-probability, four bytes each, for at least one token a row.
    return 8 * len(task.prompts) * task.group_size


def _fault(lease: Lease, what: str) -> PeerFault:
    return PeerFault(
        f"The lease {lease.lease_id} {what}; it is not taken.",
        evidence=lease.digest(),
        code="bad_lease",
        lease_id=lease.lease_id,
    )


PRIORITY = {TaskKind.GRADIENT: 0, TaskKind.EVALUATE: 1, TaskKind.ROLLOUT: 2}
"""What runs first: a batch waits for its gradients, a user for figures, then rollouts."""
