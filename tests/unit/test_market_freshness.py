"""Pay by policy lag."""

from __future__ import annotations

import pytest
from market_records import lot

from shoal.market.freshness import fresh_pay_down, linear_freshness
from shoal.protocol.errors import InvalidRequest

LOT = lot(freshness_permille=(1_000, 999, 500, 0))


def test_pay_falls_with_the_lag_and_is_rounded_down_once() -> None:
    assert [fresh_pay_down(LOT, 3, 7, lag=lag) for lag in range(4)] == [21, 20, 10, 0]
    assert fresh_pay_down(LOT, 0, 7, lag=0) == 0


@pytest.mark.parametrize("lag", [-1, 4])
def test_work_that_is_not_issued_has_no_price(lag: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        fresh_pay_down(LOT, 1, 100, lag=lag)
    assert caught.value.code == "too_stale"


@pytest.mark.parametrize("shares", [(), (1_001,), (-1,), (900, 901), (1_000, 0, 1)])
def test_a_lot_whose_schedule_rises_or_overpays_cannot_be_made(shares: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="freshness_permille"):
        lot(freshness_permille=shares)


def test_a_line_from_full_pay_to_the_last_share() -> None:
    assert linear_freshness(0) == (1_000,)
    assert linear_freshness(3) == (1_000,) * 4
    assert linear_freshness(3, 500) == (1_000, 833, 666, 500)
    assert linear_freshness(1, 0) == (1_000, 0)
    for arguments in ((-1, 500), (65, 500), (3, 1_001), (3, -1)):
        with pytest.raises(InvalidRequest):
            linear_freshness(*arguments)
