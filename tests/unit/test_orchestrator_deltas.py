"""Deltas between policy versions, and the room they take."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np

from shoal.network.blob_store import BlobStore
from shoal.network.meters import Meters
from shoal.orchestrator.deltas import PolicyDeltas
from shoal.protocol.holders import SWARM_BYTES
from shoal.protocol.policy import PolicyVersion

JOB = "0x" + "1" * 64


def test_a_delta_finished_after_its_job_holds_no_room(tmp_path: Path) -> None:
    async def scenario() -> None:
        blobs = BlobStore(tmp_path, 1 << 30)
        deltas = PolicyDeltas(blobs, Meters(), enabled=True)
        before = np.random.default_rng(0).integers(0, 255, SWARM_BYTES + 1, dtype=np.uint8)
        after = before.copy()
        after[:100] += 1
        versions = [
            PolicyVersion(
                job_id=JOB, version=number, base_sha256="0" * 64, adapter=blobs.put_bytes(data)
            )
            for number, data in enumerate([before.tobytes(), after.tobytes()])
        ]
        for is_over in (True, False):
            deltas.follow(*versions)
            (making,) = deltas._making.values()
            await asyncio.sleep(0)
            if is_over:
                deltas.forget_job(JOB)
            await making
            assert bool(blobs._pins) is not is_over
            assert bool(await deltas.leading_to(versions[1].adapter.sha256)) is not is_over

    asyncio.run(scenario())
