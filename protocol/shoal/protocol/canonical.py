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

from shoal.protocol.errors import InvalidRequest
from shoal.protocol.ids import Digest

JsonValue = str | int | float | bool | None | Sequence["JsonValue"] | Mapping[str, "JsonValue"]


_MAX_INT = 2**53 - 1
_LEAST_SAME = 1e-4
"""Below it the standard library writes an exponent, and RFC 8785 does not yet."""
_same_form = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":")
).encode


def canonical_bytes(value: object) -> bytes:
    """``value`` (plain JSON data) in RFC 8785 form.

    Raises:
        InvalidRequest: It has none: a number is too large to be exact, or is none.
    """
    try:
        return _same_form(_as_both_write(value)).encode()
    except _Differs:
        pass
    try:
        return rfc8785.dumps(value)  # type: ignore[arg-type]  # its own JSON alias is invariant
    except rfc8785.CanonicalizationError as error:
        raise InvalidRequest(
            f"The data has no canonical form: {str(error)[:200]}; send numbers that a double "
            "holds exactly.",
            code="not_canonical",
        ) from None


class _Differs(Exception):
    """The standard library would write the value in another form."""


def _as_both_write(value: Any) -> Any:
    """An equal value that both writers write alike.

    They agree on all but large integers, keys beyond ASCII, whose order differs, and floats.
    Of these, whole ones are written as integers, and others from 1e-4 on in the same digits:
    both take the fewest that give the number back, without an exponent.

    Raises:
        _Differs: there is none.
    """
    kind = type(value)
    if kind is str or kind is bool or value is None:
        return value
    if kind is int and -_MAX_INT <= value <= _MAX_INT:
        return value
    if kind is float and (_LEAST_SAME <= abs(value) <= _MAX_INT or value == 0):
        return int(value) if value.is_integer() else value
    if kind is list or kind is tuple:
        return [_as_both_write(item) for item in value]
    if kind is dict and all(type(key) is str and key.isascii() for key in value):
        return {key: _as_both_write(item) for key, item in value.items()}
    raise _Differs


def parse_json(data: bytes | str) -> Any:
    """The JSON value in ``data``, which may come from anyone.

    Not ``json.loads``, whose bound is the interpreter's recursion limit: libraries raise that
    until deep nesting overflows the stack.  This parser has a bound of its own.

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
