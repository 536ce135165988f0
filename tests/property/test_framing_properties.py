"""Any bytes as a header or an error give a length within the cap, or a typed error."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.network.framing import (
    HEADER_BYTES,
    Status,
    decode_error,
    decode_header,
    encode_error,
    encode_header,
)
from shoal.protocol.errors import InvalidRequest, PeerFault, ShoalError
from shoal.protocol.ids import PeerId

PEER = PeerId("12D3KooWtest")
ANY = frozenset(Status)


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES), st.integers(0, 1 << 40))
def test_header_gives_a_length_within_the_cap_or_a_typed_error(header: bytes, cap: int) -> None:
    try:
        num_bytes = decode_header(header, peer=PEER, expected=ANY, cap=cap)
    except (InvalidRequest, PeerFault):
        return
    assert 0 <= num_bytes <= cap


@given(st.integers(0, (1 << 64) - 1))
def test_header_round_trip(num_bytes: int) -> None:
    header = encode_header(Status.OK, num_bytes)
    assert decode_header(header, peer=PEER, expected=ANY, cap=1 << 64) == num_bytes


@given(st.binary(max_size=2000))
def test_error_body_of_any_bytes_gives_a_shoal_error(body: bytes) -> None:
    assert isinstance(decode_error(body), ShoalError)


@given(st.text(), st.dictionaries(st.from_regex(r"[a-z]{1,20}", fullmatch=True), st.integers()))
def test_error_keeps_its_message(message: str, context: dict[str, int]) -> None:
    context = {key: value for key, value in context.items() if key not in {"message", "code"}}
    error = InvalidRequest(message)
    error.context.update(context)
    again = decode_error(encode_error(error))
    assert type(again) is InvalidRequest
    assert again.message == message[:1000] or again.message == message[:2000]
