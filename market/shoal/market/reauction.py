"""What work that keeps failing may cost: in the end a better price."""

from __future__ import annotations

from shoal.protocol.money import Micros

FAILURES_BEFORE_RAISE = 2


def raise_reserve_up(reserve_micros: int, max_reserve_micros: int) -> Micros:
    """The reserve × 1.1 rounded up, but never above the requester's maximum.

    Up, because a reserve below ten micros would otherwise never rise.  A lot whose reserve is
    the maximum already stays there.

    Source: docs/architecture, "Market": re-auction at ρ × 1.1.
    """
    return Micros(min(-(-reserve_micros * 11 // 10), max_reserve_micros))
