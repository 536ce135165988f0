"""The one byte form of a record, and its digest.

Source: RFC 8785 (JSON Canonicalization Scheme), through the ``rfc8785`` package; what the
standard library writes in the same form goes through that, ten times as fast.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import rfc8785
from pydantic_core import from_json

from shoal.protocol.ids import Digest

JsonValue = str | int | float | bool | None | Sequence["JsonValue"] | Mapping[str, "JsonValue"]


_MAX_INT = 2**53 - 1
_same_form = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":")
).encode


def canonical_bytes(value: object) -> bytes:
    """``value`` (plain JSON data) in RFC 8785 form."""
    if _is_plain(value):
        return _same_form(value).encode()
    return rfc8785.dumps(value)  # type: ignore[arg-type]  # its own JSON alias is invariant


def _is_plain(value: object) -> bool:
    """Whether the two writers agree: no float, no large integer, only ASCII keys.

    They differ in how a float is written and in which order keys beyond ASCII come.
    """
    kind = type(value)
    if kind is str or kind is bool or value is None:
        return True
    if kind is int:
        return -_MAX_INT <= value <= _MAX_INT  # type: ignore[operator]
    if kind is list or kind is tuple:
        return all(map(_is_plain, value))  # type: ignore[call-overload]
    if kind is dict:
        return all(
            type(key) is str and key.isascii() and _is_plain(item)
            for key, item in value.items()  # type: ignore[attr-defined]
        )
    return False


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
