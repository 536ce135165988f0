"""The check of how completions end, against its rule written row by row."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.rl.batch import EvaluatePayload
from shoal.rl.checklist import CheckFailedError, Checklist

END_IDS = frozenset({0, 3})
MAX_TOKENS = 4
rows = st.lists(
    st.tuples(st.lists(st.integers(0, 6), min_size=1, max_size=MAX_TOKENS), st.booleans()),
    min_size=1,
    max_size=6,
)


def fault_of(tokens: list[int], finished: bool) -> str | None:
    *before, last = tokens
    if any(token in END_IDS for token in before):
        return "goes on after an end token"
    if (last in END_IDS) != finished:
        return "says the contrary of its last token about having finished"
    if last not in END_IDS and len(tokens) != MAX_TOKENS:
        return f"stops after {len(tokens)} of {MAX_TOKENS} tokens without an end token"
    return None


@settings(max_examples=300, deadline=None)
@given(rows=rows)
def test_the_first_row_that_ends_wrongly_is_named(rows: list[tuple[list[int], bool]]) -> None:
    payload = EvaluatePayload(
        prompts_sha256=(),
        token_ids=tuple(np.array(tokens, dtype=np.int32) for tokens, _ in rows),
        finished=np.array([finished for _, finished in rows]),
        rewards=np.zeros(len(rows), dtype=np.float32),
    )
    faults = [(number, fault_of(*row)) for number, row in enumerate(rows)]
    due = next((f"row {number} {fault}" for number, fault in faults if fault), None)
    checks = Checklist()
    try:
        checks.termination(payload, END_IDS, MAX_TOKENS)
    except CheckFailedError:
        assert checks.done[-1].detail == due
    else:
        assert due is None
