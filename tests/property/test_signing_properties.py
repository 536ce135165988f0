"""What is signed and hashed is what the standard packages sign and hash."""

from __future__ import annotations

import pytest
import rfc8785
from eth_account.messages import encode_typed_data
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol.canonical import canonical_bytes
from shoal.protocol.certificate import ClearingCertificate
from shoal.protocol.errors import InvalidRequest
from shoal.protocol.job import Job, JobCommand
from shoal.protocol.market import Bid, Lease
from shoal.protocol.node import NodeBinding
from shoal.protocol.result import Receipt, Verdict
from shoal.protocol.sealing import BidCancel, BidReceipt, BookSeal
from shoal.protocol.signing import Domain, SignableRecord, _typed

MAX_INT = 2**53 - 1
NO_SURROGATES = st.characters(exclude_categories=["Cs"])
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-MAX_INT, MAX_INT)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(NO_SURROGATES),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(NO_SURROGATES), inner, max_size=4)
    ),
    max_leaves=20,
)

_BOUNDS = {"uint8": 2**8 - 1, "uint32": 2**32 - 1, "uint64": 2**64 - 1, "uint96": 2**96 - 1}


@settings(max_examples=300, deadline=None)
@given(value=values)
def test_the_canonical_form_is_rfc_8785s(value: object) -> None:
    assert canonical_bytes(value) == rfc8785.dumps(value)  # type: ignore[arg-type]


@settings(max_examples=300, deadline=None)
@given(
    digits=st.integers(-(10**17), 10**17),
    exponent=st.integers(-24, 8),
)
def test_floats_are_rfc_8785s_on_both_sides_of_where_the_writers_part(
    digits: int, exponent: int
) -> None:
    value = {"value": [float(f"{digits}e{exponent}"), float(f"1e{exponent}"), -0.0]}
    assert canonical_bytes(value) == rfc8785.dumps(value)


def test_every_kind_of_control_character_and_key_order_agrees() -> None:
    value = {chr(code): chr(code) for code in range(0x80)} | {"a" * n: n for n in range(5)}
    assert canonical_bytes(value) == rfc8785.dumps(value)


def message_of(data: st.DataObject, record: type[SignableRecord]) -> dict[str, object]:
    def value(solidity: str) -> object:
        if solidity == "string":
            return data.draw(st.text(max_size=80))
        if solidity == "address":
            return "0x" + data.draw(st.binary(min_size=20, max_size=20)).hex()
        if solidity == "bytes32":
            return data.draw(st.binary(min_size=32, max_size=32))
        if solidity == "bool":
            return data.draw(st.booleans())
        return data.draw(st.integers(0, _BOUNDS[solidity]))

    return {name: value(solidity) for name, solidity in record.eip712_fields}


@settings(max_examples=100, deadline=None)
@given(
    data=st.data(),
    record=st.sampled_from(
        [
            Job,
            JobCommand,
            Bid,
            BidReceipt,
            BidCancel,
            BookSeal,
            ClearingCertificate,
            Lease,
            NodeBinding,
            Receipt,
            Verdict,
        ]
    ),
    chain_id=st.integers(1, MAX_INT),
)
def test_what_is_signed_is_eip_712_typed_data(
    data: st.DataObject, record: type[SignableRecord], chain_id: int
) -> None:
    message = message_of(data, record)
    fake = type(
        record.__name__,
        (),
        {"eip712_fields": record.eip712_fields, "eip712_message": lambda self: message},
    )()
    domain = Domain(chain_id=chain_id, escrow="0x" + "5" * 40)
    types = {
        record.__name__: [
            {"name": name, "type": solidity} for name, solidity in record.eip712_fields
        ]
    }
    assert _typed(fake, domain) == encode_typed_data(domain.eip712(), types, message)


@pytest.mark.parametrize("value", [2**64, {"a": [1, -(2**53)]}, [float("nan")], float("inf")])
def test_what_has_no_canonical_form_is_refused_in_words(value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        canonical_bytes(value)
    assert caught.value.code == "not_canonical"
