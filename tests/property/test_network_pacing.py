"""Token buckets: a burst, then the rate, whatever the clock's steps."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.network.pacing import Bucket, Pacer


def test_a_burst_then_the_rate() -> None:
    bucket = Bucket(10.0, 20.0, 0.0)
    assert sum(bucket.take(1, 0.0) for _ in range(100)) == 20
    assert sum(bucket.take(1, 0.5) for _ in range(100)) == 5
    assert sum(bucket.take(1, 100.0) for _ in range(100)) == 20


def test_what_is_spent_beyond_is_waited_for() -> None:
    bucket = Bucket(100.0, 50.0, 0.0)
    assert bucket.spend(50, 0.0) == 0
    assert bucket.spend(25, 0.0) == 0.25
    assert bucket.spend(0, 0.25) == 0


@given(
    steps=st.lists(st.tuples(st.floats(0, 3), st.integers(0, 50)), max_size=50),
    rate=st.floats(0.5, 100),
    burst=st.floats(1, 200),
)
def test_never_more_than_burst_and_rate(
    steps: list[tuple[float, int]], rate: float, burst: float
) -> None:
    bucket, now_s, taken = Bucket(rate, burst, 0.0), 0.0, 0
    for wait_s, asked in steps:
        now_s += wait_s
        taken += sum(bucket.take(1, now_s) for _ in range(asked))
    assert taken <= burst + rate * now_s + 1e-6


def test_keys_have_buckets_of_their_own_and_are_bounded() -> None:
    pacer = Pacer(1.0, 1.0, lambda: 0.0)
    assert pacer.take("a")
    assert not pacer.take("a")
    assert pacer.take("b")
    for number in range(10_000):
        pacer.take(number)
    assert len(pacer._buckets) == 4096
