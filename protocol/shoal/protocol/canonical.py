"""The one byte form of a record, and its digest.

Source: RFC 8785 (JSON Canonicalization Scheme), through the ``rfc8785`` package.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import rfc8785
from pydantic_core import from_json

from shoal.protocol.ids import Digest

JsonValue = str | int | float | bool | None | Sequence["JsonValue"] | Mapping[str, "JsonValue"]


def canonical_bytes(value: object) -> bytes:
    """``value`` (plain JSON data) in RFC 8785 form."""
    return rfc8785.dumps(value)  # type: ignore[arg-type]  # its own JSON alias is invariant


def parse_json(data: bytes | str) -> Any:
    """The JSON value in ``data``, which may come from anyone.

    Not ``json.loads``: a library that Shoal imports raises the interpreter's recursion limit
    so far that deep nesting would overflow the stack; this parser has a limit of its own.

    Raises:
        ValueError: it is not JSON, or is nested too deeply.
    """
    return from_json(data)


def sha256_hex(data: bytes) -> Digest:
    """SHA-256 of ``data``, lower-case hex."""
    return Digest(hashlib.sha256(data).hexdigest())


def digest_of(value: object) -> Digest:
    """SHA-256 of the canonical form of ``value``."""
    return sha256_hex(canonical_bytes(value))
