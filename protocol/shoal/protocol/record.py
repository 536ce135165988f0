"""What every record shares: frozen, strict, canonical, capped on arrival."""

from __future__ import annotations

from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from shoal.protocol.canonical import canonical_bytes, digest_of
from shoal.protocol.errors import InvalidRequest, PeerFault
from shoal.protocol.ids import Digest

MAX_RECORD_BYTES = 1 << 20

MAX_INT = 2**53 - 1
"""Largest integer a record carries: what canonical JSON holds exactly (RFC 8785, I-JSON)."""

_R = TypeVar("_R", bound="Record")


class Record(BaseModel):
    """An immutable value that crosses a process boundary.

    Unknown fields and wrong types are refused: what a stranger sends is either exactly a
    record or a `PeerFault`.
    """

    # A slot, not an attribute: neither `model_copy` nor comparison looks at it.
    __slots__ = ("_digest",)

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON data."""
        return self.model_dump(mode="json")

    def encode(self) -> bytes:
        """The record in canonical form (RFC 8785)."""
        return canonical_bytes(self.to_json())

    def digest(self) -> Digest:
        """SHA-256 of the canonical form; computed once, as a record never changes."""
        known: Digest | None = getattr(self, "_digest", None)
        if known is None:
            known = digest_of(self.to_json())
            object.__setattr__(self, "_digest", known)
        return known

    @classmethod
    def decode(cls, data: bytes, *, max_bytes: int = MAX_RECORD_BYTES) -> Self:
        """The record in ``data``, which came from a peer.

        Raises:
            PeerFault: ``data`` is larger than ``max_bytes`` or is not exactly this record.
        """
        if len(data) > max_bytes:
            raise PeerFault(
                f"A {cls.__name__} of {len(data)} bytes is larger than the {max_bytes} allowed.",
                code="oversize",
            )
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise PeerFault(
                f"The peer sent a malformed {cls.__name__}: {first_fault(error)}.",
                code="malformed",
            ) from None


def first_fault(error: ValidationError) -> str:
    """The first thing wrong, as ``field: reason``."""
    fault = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in fault["loc"]) or "value"
    # Our own validators' sentences: pydantic names their class, callers end them.
    reason = fault["msg"].removeprefix("Value error, ").removesuffix(".")
    return f"{where}: {reason}"


def parse_request(cls: type[_R], data: object) -> _R:
    """``data`` as a ``cls``; for input a user wrote rather than a peer sent.

    Raises:
        InvalidRequest: naming the first field that is wrong.
    """
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise InvalidRequest(f"{cls.__name__} is not valid: {first_fault(error)}.") from None
