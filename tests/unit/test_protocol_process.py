"""What every program does at its edge."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from shoal.protocol.process import share_interpreter


@pytest.fixture
def interval_s() -> Iterator[float]:
    """Python's own; it is back afterwards."""
    before_s = sys.getswitchinterval()
    yield before_s
    sys.setswitchinterval(before_s)


def test_waiting_thread_gets_the_interpreter_sooner(interval_s: float) -> None:
    share_interpreter()
    assert sys.getswitchinterval() == pytest.approx(interval_s / 10)
