"""What a worker asks before it joins: is the way there, how fast is it, can it be dialled back.

One request and one reply on ``/shoal/probe/1``, each a small record in front of filling that
stands for real bytes::

    u16 length of the record, big-endian ‖ the record in canonical form ‖ filling
"""

from __future__ import annotations

from typing import Final, TypeVar

from pydantic import Field

from shoal.protocol.errors import InvalidRequest, PeerFault
from shoal.protocol.record import MAX_INT, Record

PROBE_PROTOCOL: Final = "/shoal/probe/1"
MAX_FILLING_BYTES: Final = 512 << 10
"""Most filling of one message: small enough that a slow line finishes it within a deadline."""
MAX_PROBE_BYTES: Final = MAX_FILLING_BYTES + 4_096
TOKEN_BYTES: Final = 16
_LENGTH_BYTES: Final = 2
_MAX_RECORD_BYTES: Final = 2_048

_R = TypeVar("_R", bound=Record)


class DialBack(Record):
    """Asks for a TCP connection to ``port`` of the address the asker is seen at, and no other.

    Whoever listens there sends ``token`` at once.  Only that counts as reached, so the answer
    says nothing about ports that somebody else listens on.
    """

    port: int = Field(ge=1, le=65_535)
    token: str = Field(pattern=rf"^[0-9a-f]{{{2 * TOKEN_BYTES}}}$")


class ProbeRequest(Record):
    """Writer: a worker that looks whether it could work.  Reader: the orchestrator.

    ``download_bytes`` of filling come back.  Absent ``dial_back`` asks for no connection.
    """

    download_bytes: int = Field(default=0, ge=0, le=MAX_FILLING_BYTES)
    dial_back: DialBack | None = None


class ProbeReply(Record):
    """Writer: the orchestrator.  Reader: the worker.

    ``now_ms`` is the orchestrator's clock as it answers.  ``observed`` is where it sees the
    worker, as ``/ip4/203.0.113.7/tcp/50123``; absent where no address is seen.  ``reached``
    says what came of a dial-back and is absent when none was asked for.
    """

    now_ms: int = Field(ge=0, le=MAX_INT)
    observed: str | None = Field(default=None, max_length=200)
    received_bytes: int = Field(ge=0, le=MAX_FILLING_BYTES)
    reached: bool | None = None


def pack_probe(record: Record, filling_bytes: int = 0) -> bytes:
    """``record`` with ``filling_bytes`` behind it.

    Raises:
        InvalidRequest: it is more filling than one message holds.
    """
    if not 0 <= filling_bytes <= MAX_FILLING_BYTES:
        raise InvalidRequest(
            f"A probe carries at most {MAX_FILLING_BYTES} bytes of filling, not "
            f"{filling_bytes}; send several.",
            code="message_too_large",
        )
    head = record.encode()
    return len(head).to_bytes(_LENGTH_BYTES, "big") + head + bytes(filling_bytes)


def unpack_probe(cls: type[_R], message: bytes) -> tuple[_R, int]:
    """The record in ``message``, and how many bytes of filling came with it.

    Raises:
        PeerFault: the message is cut short, over the cap, or holds another record.
    """
    start = _LENGTH_BYTES + int.from_bytes(message[:_LENGTH_BYTES], "big")
    if len(message) < start or len(message) - start > MAX_FILLING_BYTES:
        raise PeerFault(
            f"A probe of {len(message)} bytes does not hold the record and at most "
            f"{MAX_FILLING_BYTES} bytes of filling that it should.",
            code="malformed",
        )
    record = cls.decode(message[_LENGTH_BYTES:start], max_bytes=_MAX_RECORD_BYTES)
    return record, len(message) - start
