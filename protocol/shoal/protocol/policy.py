"""Models and their versions."""

from __future__ import annotations

from pydantic import Field

from shoal.protocol.blob import BlobRef
from shoal.protocol.canonical import digest_of
from shoal.protocol.ids import Digest, Hex32, Name, Sha256
from shoal.protocol.record import MAX_INT, Record

MAX_ADAPTER_BYTES = 1 << 30
"""The most a policy version may weigh: it travels to every worker, every update."""


class ModelFile(Record):
    """One file of a model folder; ``path`` has no directories."""

    path: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$")
    blob: BlobRef


class BaseModelRef(Record):
    """A base model, by content.

    Writer: the orchestrator, once it has loaded what the job names.  Reader: workers, who
    fetch the files by digest and load them from disk.

    ``files`` holds config, tokenizer and safetensors weights; nothing in them is executed.
    """

    name: Name
    files: tuple[ModelFile, ...] = Field(min_length=1, max_length=512)
    num_parameters: int = Field(ge=1, le=MAX_INT)

    def content_digest(self) -> Digest:
        """Digest of the files alone, whatever the model is called."""
        return digest_of([[f.path, f.blob.sha256] for f in self.files])


class PolicyVersion(Record):
    """What a worker samples from or differentiates: a base and an adapter.

    Writer: the orchestrator, after each update.  Reader: workers.

    Version 0 carries the job's seeded initial adapter, which changes nothing yet.

    Example:
        >>> from shoal.protocol.blob import BlobRef
        >>> PolicyVersion(job_id="0x" + "0" * 64, version=0, base_sha256="0" * 64,
        ...               adapter=BlobRef(sha256="1" * 64, size_bytes=8)).policy_sha256()[:8]
        'f05dfee9'
    """

    job_id: Hex32
    version: int = Field(ge=0, le=MAX_INT)
    base_sha256: Sha256
    adapter: BlobRef

    def policy_sha256(self) -> Digest:
        """Digest of the weights this version denotes: base and adapter, not the number."""
        return digest_of([self.base_sha256, self.adapter.sha256])
