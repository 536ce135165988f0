"""The one byte form of a record, and its digest.

Source: RFC 8785 (JSON Canonicalization Scheme), through the ``rfc8785`` package.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import rfc8785

from shoal.protocol.ids import Digest

JsonValue = str | int | float | bool | None | Sequence["JsonValue"] | Mapping[str, "JsonValue"]


def canonical_bytes(value: object) -> bytes:
    """``value`` (plain JSON data) in RFC 8785 form."""
    return rfc8785.dumps(value)  # type: ignore[arg-type]  # its own JSON alias is invariant


def sha256_hex(data: bytes) -> Digest:
    """SHA-256 of ``data``, lower-case hex."""
    return Digest(hashlib.sha256(data).hexdigest())


def digest_of(value: object) -> Digest:
    """SHA-256 of the canonical form of ``value``."""
    return sha256_hex(canonical_bytes(value))
