"""The policy of one job: its versions, its optimiser, its checkpoints.

Everything here runs in the compute thread, except what only touches files; `JobRun` calls it
and holds the order.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from shoal.models.policy import Policy
from shoal.network.blob_store import BlobStore
from shoal.protocol.blob import BlobRef
from shoal.protocol.errors import InvalidRequest
from shoal.protocol.job import Job, JobSpec
from shoal.protocol.policy import MAX_ADAPTER_BYTES, BaseModelRef, PolicyVersion
from shoal.rl.aggregation import AdapterOptimizer, UpdateStats
from shoal.rl.batch import GradientPayload
from shoal.rl.checkpoint import (
    KeptAdapter,
    is_spaced,
    keep_best,
    load_best,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    sync_checkpoint,
)
from shoal.rl.environments import Environment, load_environment
from shoal.rl.gradient import Group, batch_divisor


class Learner:
    """Holds the current policy and the one the verifier recomputes with.

    The two are apart so that recomputing an old version, which the audit thread does, never
    disturbs the current one.

    Args:
        job: The job.
        base: Its base.
        base_blob: The blob of ``base``, encoded: what workers fetch the base by.
        folder: Where the base's files are.
        run_dir: Where the job's checkpoints go.
    """

    def __init__(
        self, job: Job, base: BaseModelRef, base_blob: BlobRef, folder: Path, run_dir: Path
    ) -> None:
        self.job = job
        self.job_id = job.job_id()
        self.spec: JobSpec = job.spec
        self.base = base
        self.base_blob = base_blob
        self._base_sha256 = base.content_digest()
        self.environments: list[Environment] = [
            load_environment(spec) for spec in job.spec.environments
        ]
        self._checkpoints = run_dir / "checkpoints"
        self.policy = Policy.load(folder, self.spec.lora, seed=self.spec.seed)
        self.auditor = Policy.load(folder, self.spec.lora, seed=self.spec.seed)
        self._optimizer = AdapterOptimizer(
            self.policy, self.spec.optimizer, self.spec.max_steps, self.spec.gradient
        )
        self._encoded: bytes | None = None

    def resume(self, version: int, blobs: BlobStore) -> list[PolicyVersion]:
        """Continues from the checkpoint of ``version``, or the newest whole one before it.

        Returns:
            The policy versions that work may still be out under, pinned; the current one last.

        Raises:
            InvalidRequest: there is no checkpoint of a job that has made updates, or it is of
                another job or for another base.
        """
        checkpoint = newest_checkpoint(
            self._checkpoints,
            version,
            job_id=self.job_id,
            base_sha256=self._base_sha256,
        )
        if checkpoint is None:
            if version:
                raise InvalidRequest(
                    f"{self._checkpoints} holds no whole checkpoint of job {self.job_id}, "
                    f"which was at policy version {version}; put the folder back.",
                    code="no_checkpoint",
                )
            return [self._version(0, self._adapter(), blobs)]
        self.policy.load_adapter(checkpoint.adapter)
        self._encoded = None
        self._optimizer.load_state(checkpoint.optimizer)
        older = [
            self._version(number, adapter, blobs) for number, adapter in checkpoint.older.items()
        ]
        return [*older, self._version(checkpoint.manifest.step, self._adapter(), blobs)]

    def publish(self, version: int, blobs: BlobStore) -> PolicyVersion:
        """The current weights as a policy version whose adapter can be fetched.

        The checkpoint brings the adapter back, so nobody waits until the disk has it twice.
        """
        return self._version(version, self._adapter(), blobs, settled=False)

    def _adapter(self) -> bytes:
        """The current weights, encoded once for each update."""
        if self._encoded is None:
            self._encoded = self.policy.adapter_bytes()
        return self._encoded

    def _version(
        self, number: int, adapter: bytes, blobs: BlobStore, *, settled: bool = True
    ) -> PolicyVersion:
        if len(adapter) > MAX_ADAPTER_BYTES:
            raise InvalidRequest(
                f"A policy version of this job has {len(adapter)} bytes and workers take at most "
                f"{MAX_ADAPTER_BYTES}; "
                + ("lower lora.r." if self.spec.lora else 'train an adapter: tuning = "lora".'),
                code="policy_too_large",
            )
        return PolicyVersion(
            job_id=self.job_id,
            version=number,
            base_sha256=self._base_sha256,
            adapter=blobs.put_bytes(adapter, pin=True, settled=settled),
        )

    def update(self, gradients: Sequence[GradientPayload], groups: Sequence[Group]) -> UpdateStats:
        """One optimiser step over the summed gradient of the batch of ``groups``.

        Without gradients, because no group teaches, the momentum of earlier ones still moves
        the weights, as it does in a trainer that sees the same batch.
        """
        divisor = batch_divisor(groups, self.spec.loss, self.spec.sampling.max_tokens)
        self._encoded = None
        # Where the overlong mask leaves no token there is no gradient either.
        return self._optimizer.apply(gradients, max(divisor, 1.0))

    def checkpoint(self, version: int, older: Collection[int] = ()) -> Path:
        """Weights and optimiser state of ``version``, and the adapters of ``older`` versions.

        They outlive the process; `secure` makes them outlive a power cut.
        """
        return save_checkpoint(
            self._checkpoints,
            self.job_id,
            version,
            base_sha256=self._base_sha256,
            adapter=self._adapter(),
            optimizer=self._optimizer.state_bytes(),
            older=older,
        )

    def secure(self, folder: Path, policy: PolicyVersion, blobs: BlobStore) -> None:
        """The version's checkpoint is on the disk if it is one of those kept for long.

        Only then are older ones dropped.  The others survive the process's death, and a power
        cut that spoils one is seen by its digest.  The published adapter is on the disk in any
        case.  Touches files only.
        """
        blobs.settle(policy.adapter.sha256)
        if is_spaced(policy.version, self.spec.checkpoint):
            sync_checkpoint(folder)
        prune_checkpoints(self._checkpoints, self.spec.checkpoint)

    def keep_best(self, policy: PolicyVersion, adapter: bytes) -> None:
        """``policy`` is the version that did best so far.  Touches files only."""
        kept = KeptAdapter(
            job_id=policy.job_id,
            base_sha256=policy.base_sha256,
            version=policy.version,
            adapter_sha256=policy.adapter.sha256,
        )
        keep_best(self._checkpoints, kept, adapter)

    def best(self, blobs: BlobStore) -> PolicyVersion | None:
        """The version that did best, its adapter pinned; None before the first evaluation."""
        found = load_best(self._checkpoints, job_id=self.job_id, base_sha256=self._base_sha256)
        return None if found is None else self._version(found[0].version, found[1], blobs)
