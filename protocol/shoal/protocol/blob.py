"""References to content-addressed bytes."""

from __future__ import annotations

from pydantic import Field

from shoal.protocol.ids import Sha256
from shoal.protocol.record import Record

CHUNK_BYTES = 4 << 20
MAX_BLOB_BYTES = 1 << 40


class BlobRef(Record):
    """Names bytes by their digest.

    Writer: whoever made the bytes, inside a signed record.  Reader: whoever fetches them,
    who needs to trust no carrier.

    Absent ``chunks_sha256`` means the blob is one chunk (4 MiB or less); otherwise it names
    the blob that concatenates the 32-byte SHA-256 of each 4 MiB chunk in order.

    Example:
        >>> BlobRef(sha256="e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        ...         size_bytes=0).size_bytes
        0
    """

    sha256: Sha256
    size_bytes: int = Field(ge=0, le=MAX_BLOB_BYTES)
    chunks_sha256: Sha256 | None = None
