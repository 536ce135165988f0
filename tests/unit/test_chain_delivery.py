"""What a node's words mean, which block can hold a log, when to try again."""

from __future__ import annotations

import pytest

from shoal.contracts.delivery import Answer, Policy, raised, read_answer
from shoal.contracts.logs import bloom_of, may_hold

WHO, OTHER = "0x" + "1" * 40, "0x" + "2" * 40
TOPIC, RARE = b"\x01" * 32, b"\x02" * 32


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("already known", Answer.TAKEN),
        ("AlreadyKnown", Answer.TAKEN),
        ("nonce too low: next nonce 7, tx nonce 5", Answer.SPENT),
        ("replacement transaction underpriced", Answer.UNDERPRICED),
        ("transaction underpriced", Answer.UNDERPRICED),
        ("insufficient funds for gas * price + value", Answer.REFUSED),
        ("internal error", Answer.UNCLEAR),
        ("", Answer.UNCLEAR),
    ],
)
def test_a_refusal_is_read_by_its_words(words: str, answer: Answer) -> None:
    assert read_answer(words) is answer


def test_a_replacement_pays_an_eighth_more_rounded_up() -> None:
    assert [raised(fee) for fee in (0, 1, 8, 1_000, 1_001)] == [0, 2, 9, 1_125, 1_127]


def test_waits_double_and_end() -> None:
    policy = Policy(depth=0, stall_ms=1_000, retry_ms=10)
    assert [policy.stall_after_ms(n) for n in (1, 2, 3)] == [1_000, 2_000, 4_000]
    assert policy.retry_after_ms(1) == 10
    assert policy.retry_after_ms(1_000) == policy.retry_after_ms(8) == 1_280


def test_a_bloom_filter_tells_where_no_log_can_be() -> None:
    bloom = bloom_of([{"address": WHO, "topics": [TOPIC]}])
    assert may_hold(bloom, [WHO], [TOPIC])
    assert may_hold(bloom, [OTHER, WHO], [])
    assert not may_hold(bloom, [OTHER], [TOPIC])
    assert not may_hold(bloom, [WHO], [RARE])
    assert not may_hold(bloom_of([]), [WHO], [])
