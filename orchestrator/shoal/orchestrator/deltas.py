"""What differs between consecutive policy versions, for workers that hold the one before.

A matter of transport: nothing waits for a delta, and no record mentions one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from typing import Final

from shoal.network.blob_delta import write_delta
from shoal.network.blob_store import BlobStore
from shoal.network.meters import Meters
from shoal.protocol.blob import BlobRef
from shoal.protocol.errors import NotFound, ShoalError
from shoal.protocol.holders import SWARM_BYTES, DeltaStep
from shoal.protocol.policy import PolicyVersion

WORTH_SHARE: Final = 0.8
"""A delta is kept when it is less than this share of the blob.

Made at 100 MB/s and applied at 250 MB/s by one core, a megabyte of blob costs 14 ms; a fifth of
it saved is as much on a line of 115 Mbit/s, and six times as much on one of 20 Mbit/s.
"""
_MAX_STEPS: Final = 10
"""Steps remembered of one job; who is further behind fetches the whole version."""
_WAIT_S: Final = 2.0

_log = logging.getLogger(__name__)


class PolicyDeltas:
    """The deltas of running jobs, each from one policy version to the next.

    Args:
        blobs: Where adapters are and deltas go, pinned while they are of use.
        meters: Counts deltas made, and those not worth keeping.
        enabled: Whether any are made.
    """

    def __init__(self, blobs: BlobStore, meters: Meters, *, enabled: bool) -> None:
        self.blobs = blobs
        self._meters = meters
        self._enabled = enabled
        self._steps: dict[str, OrderedDict[str, DeltaStep]] = {}
        self._by_target: dict[str, DeltaStep] = {}
        self._making: dict[str, asyncio.Task[None]] = {}

    def follow(self, before: PolicyVersion, after: PolicyVersion) -> None:
        """A delta from ``before`` to ``after`` is being made, unless none could be worth it.

        Both adapters are in the store now; dropping them later does no harm.
        """
        sizes = {before.adapter.size_bytes, after.adapter.size_bytes}
        target = after.adapter.sha256
        if (
            not self._enabled
            or len(sizes) > 1
            or min(sizes) <= SWARM_BYTES
            or before.adapter == after.adapter
            or target in self._by_target
            or target in self._making
        ):
            return
        task = asyncio.create_task(self._make(before, after), name=f"delta to {target[:12]}")
        self._making[target] = task
        task.add_done_callback(lambda done: self._making.pop(target, None))

    async def leading_to(self, sha256: str) -> tuple[DeltaStep, ...]:
        """The chain of deltas that ends with that adapter, last step first.

        Waits while the last step is being made: that takes less time than the whole adapter
        takes over a home line.
        """
        making = self._making.get(sha256)
        if making is not None:
            await asyncio.wait((making,), timeout=_WAIT_S)
        steps: list[DeltaStep] = []
        step = self._by_target.get(sha256)
        while step is not None and len(steps) < _MAX_STEPS:
            steps.append(step)
            step = self._by_target.get(step.base_sha256)
        return tuple(steps)

    def forget_job(self, job_id: str) -> None:
        """The job is over; its deltas may be dropped."""
        for step in self._steps.pop(job_id, {}).values():
            self._forget(step)

    async def close(self) -> None:
        """No delta is being made."""
        tasks = tuple(self._making.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _make(self, before: PolicyVersion, after: PolicyVersion) -> None:
        steps = self._steps.setdefault(after.job_id, OrderedDict())
        try:
            ref = await asyncio.to_thread(self._write, before.adapter, after.adapter)
        except (ShoalError, OSError) as error:
            _log.warning("delta_not_made", extra={"reason": str(error), "job_id": after.job_id})
            return
        self._meters.count("policy_deltas", outcome="kept" if ref else "too_large")
        if ref is None:
            return
        self._meters.count("policy_delta_bytes", ref.size_bytes)
        self._meters.count("policy_delta_bytes_replaced", after.adapter.size_bytes)
        step = DeltaStep(
            base_sha256=before.adapter.sha256, target_sha256=after.adapter.sha256, blob=ref
        )
        steps[step.target_sha256] = self._by_target[step.target_sha256] = step
        if self._steps.get(after.job_id) is not steps:
            # The job ended meanwhile.
            self._forget(step)
            return
        if len(steps) > _MAX_STEPS:
            self._forget(steps.popitem(last=False)[1])

    def _write(self, before: BlobRef, after: BlobRef) -> BlobRef | None:
        with (
            self.blobs.open(before.sha256) as base,
            self.blobs.open(after.sha256) as target,
            self.blobs.draft() as draft,
        ):
            worth_bytes = int(after.size_bytes * WORTH_SHARE) - 1
            if not write_delta(base, target, after.size_bytes, draft.write, max_bytes=worth_bytes):
                return None
            # After a crash nobody would be told of it.
            return draft.keep(pin=True, settled=False)

    def _forget(self, step: DeltaStep) -> None:
        self._by_target.pop(step.target_sha256, None)
        # It may have been dropped by hand; then there is nothing to let go of.
        with contextlib.suppress(NotFound):
            self.blobs.unpin(step.blob.sha256)
            if step.blob.chunks_sha256 is not None:
                self.blobs.unpin(step.blob.chunks_sha256)
