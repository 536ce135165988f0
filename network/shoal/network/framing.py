"""How one request or reply lies on a stream: an 8-byte length, a status byte, a body.

The length is checked against a cap before any room is made for the body, and the end of a
stream is never taken for the end of a message.
"""

from __future__ import annotations

import json
import struct
from enum import IntEnum
from typing import Final

from shoal.protocol.canonical import parse_json
from shoal.protocol.errors import (
    InvalidRequest,
    PeerFault,
    ShoalError,
    Unavailable,
    error_from_wire,
)
from shoal.protocol.ids import PeerId

_HEADER: Final = struct.Struct(">QB")
HEADER_BYTES: Final = _HEADER.size
MAX_ERROR_BYTES: Final = 16 << 10


class Status(IntEnum):
    """What a frame's body is."""

    REQUEST = 0
    OK = 1
    ERROR = 2


def encode_header(status: Status, num_bytes: int) -> bytes:
    """The frame header for a body of `num_bytes`."""
    return _HEADER.pack(num_bytes, status)


def decode_header(header: bytes, *, peer: PeerId, expected: frozenset[Status], cap: int) -> int:
    """The body's length, once it is known to be within `cap`.

    Raises:
        PeerFault: The header breaks the framing rules (code ``bad_frame``).
        InvalidRequest: The body would be over `cap` (code ``message_too_large``).
    """
    num_bytes, raw_status = _HEADER.unpack(header)
    if raw_status not in expected:
        raise PeerFault(
            f"Peer {peer} sent bytes that are not a Shoal frame; the stream is closed.",
            code="bad_frame",
            evidence=header.hex(),
        )
    allowed = min(cap, MAX_ERROR_BYTES) if raw_status == Status.ERROR else cap
    if num_bytes > allowed:
        raise too_large(num_bytes, allowed, f"announced by peer {peer}")
    return int(num_bytes)


def status_of(header: bytes) -> Status:
    """The status in a header that `decode_header` accepted."""
    return Status(header[HEADER_BYTES - 1])


def too_large(num_bytes: int, cap: int, where: str) -> InvalidRequest:
    """The error for a message over its cap."""
    return InvalidRequest(
        f"A message of {num_bytes} bytes {where} is over the limit of {cap} bytes; "
        "send bulk data as a blob.",
        code="message_too_large",
        size_bytes=min(num_bytes, 2**63 - 1),
        limit_bytes=cap,
    )


def encode_error(error: ShoalError) -> bytes:
    """The error as a reply's body, at most `MAX_ERROR_BYTES` long."""
    body = json.dumps(error.to_wire()).encode()
    if len(body) <= MAX_ERROR_BYTES:
        return body
    short = type(error).__name__, error.code[:64], error.message[:1000]
    wire = dict(zip(("error", "code", "message"), short, strict=True))
    return json.dumps({**wire, "context": {}}).encode()


def decode_error(body: bytes) -> ShoalError:
    """The error a peer sent; never an exception of the peer's choosing."""
    try:
        return error_from_wire(parse_json(body))
    except ValueError:
        return PeerFault("The peer answered with an error that is not JSON.", code="bad_frame")


def handler_failed(protocol: str) -> Unavailable:
    """What a caller hears when our handler broke: that it did, and nothing of how."""
    return Unavailable(
        f"The peer failed while handling a {protocol} request; the fault is in its log. "
        "Try again later.",
        code="handler_failed",
    )


def overloaded(num_in_flight: int) -> Unavailable:
    """What a caller hears when a node is already handling as much as it takes on."""
    return Unavailable(
        f"The peer is already handling {num_in_flight} requests; try again in a second.",
        code="overloaded",
    )


def banned(peer: PeerId) -> Unavailable:
    """What a caller hears when it dials a peer that this node keeps out."""
    return Unavailable(
        f"Peer {peer} is banned here for what it sent; dial another node.",
        code="banned",
        retry_after_s=60,
    )


def too_often(rate: float) -> Unavailable:
    """What a caller hears when it asks more often than one peer may."""
    return Unavailable(
        f"The peer takes {rate:g} requests per second from one node; try again in a second.",
        code="overloaded",
    )


def not_reachable(peer: PeerId, why: str) -> Unavailable:
    """What a caller hears when no relay leads to a peer."""
    return Unavailable(
        f"Peer {peer} cannot be reached through a relay: {why}; use another holder.",
        code="not_reachable",
    )


def not_connected(peer: PeerId) -> Unavailable:
    """What a caller hears when there is no connection to write to."""
    return Unavailable(
        f"Peer {peer} is not connected; wait until it dials again, or dial it.",
        code="not_connected",
    )
