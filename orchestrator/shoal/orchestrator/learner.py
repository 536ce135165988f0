"""The policy of one job: its versions, its optimiser, its checkpoints.

Everything here runs in the compute thread; `JobRun` calls it and holds the order.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shoal.models.policy import Policy
from shoal.network.blob_store import BlobStore
from shoal.protocol.job import Job, JobSpec
from shoal.protocol.policy import BaseModelRef, PolicyVersion
from shoal.rl.aggregation import AdapterOptimizer, UpdateStats
from shoal.rl.batch import GradientPayload
from shoal.rl.checkpoint import newest_checkpoint, save_checkpoint
from shoal.rl.environments import Environment, load_environment


class Learner:
    """Holds the current policy and the one the verifier recomputes with.

    The two are apart so that recomputing an old version never disturbs the current one.
    """

    def __init__(self, job: Job, base: BaseModelRef, folder: Path, run_dir: Path) -> None:
        self.job = job
        self.spec: JobSpec = job.spec
        self.base = base
        self.environments: list[Environment] = [
            load_environment(spec) for spec in job.spec.environments
        ]
        self._checkpoints = run_dir / "checkpoints"
        self.policy = Policy.load(folder, self.spec.lora, seed=self.spec.seed)
        self.auditor = Policy.load(folder, self.spec.lora, seed=self.spec.seed)
        self._optimizer = AdapterOptimizer(self.policy, self.spec.optimizer, self.spec.max_steps)

    def resume(self, version: int) -> int:
        """Continues from the checkpoint of ``version``, or the newest before it; its version."""
        checkpoint = newest_checkpoint(self._checkpoints, version)
        if checkpoint is None:
            return 0
        self.policy.load_adapter(checkpoint.adapter)
        self._optimizer.load_state(checkpoint.optimizer)
        return checkpoint.manifest.step

    def publish(self, version: int, blobs: BlobStore) -> PolicyVersion:
        """The current weights as a policy version whose adapter can be fetched."""
        return PolicyVersion(
            job_id=self.job.job_id(),
            version=version,
            base_sha256=self.base.content_digest(),
            adapter=blobs.put_bytes(self.policy.adapter_bytes(), pin=True),
        )

    def update(self, gradients: Sequence[GradientPayload], total_tokens: int) -> UpdateStats:
        """One optimiser step over the batch's summed gradient."""
        return self._optimizer.apply(gradients, total_tokens)

    def checkpoint(self, version: int) -> None:
        """Weights and optimiser state of ``version`` are on disk."""
        save_checkpoint(
            self._checkpoints,
            self.job.job_id(),
            version,
            adapter=self.policy.adapter_bytes(),
            optimizer=self._optimizer.state_bytes(),
            keep=self.spec.checkpoint,
        )
