"""Whatever a contract reverts with, we say something short and do not fall over."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.contracts.artefact import error_types
from shoal.contracts.rejection import MAX_REASON_CHARS, decode_revert


@given(st.sampled_from([b"", *error_types()]), st.binary(max_size=400))
def test_any_revert_data_has_a_short_reason(selector: bytes, rest: bytes) -> None:
    reason = decode_revert(selector + rest)
    assert 0 < len(reason) <= MAX_REASON_CHARS
