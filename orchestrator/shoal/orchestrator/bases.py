"""The bases of jobs that run: found again unchanged, and held in the blob store meanwhile."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from shoal.models.base import describe_base
from shoal.orchestrator.context import Context
from shoal.protocol.blob import BlobRef
from shoal.protocol.errors import InvalidRequest
from shoal.protocol.job import Job
from shoal.protocol.policy import BaseModelRef
from shoal.rl.base_models import fetch_base
from shoal.rl.local import blob_of_file


class HeldBases:
    """Holds each running job's base: workers fetch it for as long as the job runs."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._pins: defaultdict[str, list[str]] = defaultdict(list)

    def hold(self, job: Job, base: BaseModelRef) -> tuple[Path, BlobRef]:
        """The folder of the job's ``base``, and the blob by which workers fetch it.

        Hashes every file: not for the event loop.

        Raises:
            InvalidRequest: it is not what the job began with.
        """
        job_id = job.job_id()
        folder = fetch_base(
            job.spec.model,
            self._context.config.resolved_models_dir(),
            allow_local=self._context.config.allow_local_models,
        )
        # Hashed again, because the folder may have changed since the job began.
        found = describe_base(job.spec.model, folder, lambda path: self._file(job_id, path))
        if found.content_digest() != base.content_digest():
            raise InvalidRequest(
                f"Model {job.spec.model!r} has digest {found.content_digest()} where the job began "
                f"with {base.content_digest()}; bring back the files it began with.",
                code="model_changed",
            )
        blobs = self._context.blobs
        for file in base.files:
            chunks = blobs.list_chunks(file.blob.sha256)
            if chunks is not None:
                blobs.pin(chunks)
                self._pins[job_id].append(chunks)
        described = blobs.put_bytes(base.encode(), pin=True)
        self._pins[job_id] += _digests(described)
        return folder, described

    def let_go(self, job_id: str) -> None:
        """The job is over; what was held for it may be dropped to make room."""
        for digest in self._pins.pop(job_id, ()):
            self._context.blobs.unpin(digest)

    def _file(self, job_id: str, path: Path) -> BlobRef:
        """The file as a blob; pins do not outlive a process, and blobs may be dropped."""
        ref, blobs = blob_of_file(path), self._context.blobs
        if blobs.has(ref.sha256):
            blobs.pin(ref.sha256)
        else:
            ref = blobs.put_file(path, pin=True)
        self._pins[job_id] += _digests(ref)
        return ref


def _digests(ref: BlobRef) -> list[str]:
    return [ref.sha256] if ref.chunks_sha256 is None else [ref.sha256, ref.chunks_sha256]
