"""Frames: the length is checked before any room is made, and errors cross safely."""

from __future__ import annotations

import pytest

from shoal.network.framing import (
    HEADER_BYTES,
    MAX_ERROR_BYTES,
    Status,
    decode_error,
    decode_header,
    encode_error,
    encode_header,
    status_of,
)
from shoal.protocol.errors import InvalidRequest, OverBudget, PeerFault
from shoal.protocol.ids import PeerId

PEER = PeerId("12D3KooWtest")
REPLY = frozenset({Status.OK, Status.ERROR})


def test_header_round_trip() -> None:
    header = encode_header(Status.OK, 7)
    assert len(header) == HEADER_BYTES
    assert decode_header(header, peer=PEER, expected=REPLY, cap=7) == 7
    assert status_of(header) is Status.OK


@pytest.mark.parametrize("num_bytes", [8, 2**32, 2**63, 2**64 - 1])
def test_length_over_the_cap_is_refused(num_bytes: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode_header(encode_header(Status.OK, num_bytes), peer=PEER, expected=REPLY, cap=7)
    assert caught.value.code == "message_too_large"


def test_error_body_has_its_own_cap() -> None:
    header = encode_header(Status.ERROR, MAX_ERROR_BYTES + 1)
    with pytest.raises(InvalidRequest):
        decode_header(header, peer=PEER, expected=REPLY, cap=1 << 30)


@pytest.mark.parametrize("header", [b"\xff" * HEADER_BYTES, b"GET / HTT", bytes(HEADER_BYTES)])
def test_bytes_that_are_no_frame_are_a_peers_fault(header: bytes) -> None:
    with pytest.raises(PeerFault) as caught:
        decode_header(header, peer=PEER, expected=REPLY, cap=1 << 62)
    assert caught.value.evidence == header.hex()


def test_error_keeps_class_code_and_context() -> None:
    error = decode_error(encode_error(OverBudget("No money left.", job_id="job_1")))
    assert type(error) is OverBudget
    assert error.context == {"job_id": "job_1"}


def test_oversize_error_is_cut_to_the_cap() -> None:
    wire = encode_error(InvalidRequest("x" * 100_000, detail="y" * 100_000))
    assert len(wire) <= MAX_ERROR_BYTES
    assert type(decode_error(wire)) is InvalidRequest


@pytest.mark.parametrize("body", [b"", b"\xff\xfe", b"[" * 10_000, b"[]", b'{"message": 3}'])
def test_hostile_error_body_is_a_peers_fault(body: bytes) -> None:
    assert isinstance(decode_error(body), PeerFault)
