"""What a rollout's age takes off its pay, published with the lot.

The lag is how many policy versions older than the update's the sampling policy is.  Entry
``n`` of a lot's ``freshness_permille`` is the share of the price that is paid at lag ``n``;
work that would be older than the last entry is not issued.
"""

from __future__ import annotations

from shoal.protocol.errors import InvalidRequest
from shoal.protocol.market import MAX_LAGS, Lot
from shoal.protocol.money import Micros

FULL_PERMILLE = 1_000


def fresh_pay_down(lot: Lot, num_units: int, unit_price_micros: int, *, lag: int) -> Micros:
    """What a task's accepted units are paid, rounded down once for the task.

    Raises:
        InvalidRequest: no work of this lag is issued under the lot.
    """
    shares = lot.freshness_permille
    if not 0 <= lag < len(shares):
        raise InvalidRequest(
            f"Work {lag} policy versions old has no price; lot {lot.lot_id} takes lags 0 to "
            f"{len(shares) - 1}.",
            code="too_stale",
            lag=lag,
        )
    return Micros(num_units * unit_price_micros * shares[lag] // FULL_PERMILLE)


def linear_freshness(max_staleness: int, last_permille: int = FULL_PERMILLE) -> tuple[int, ...]:
    """Full pay at lag 0, ``last_permille`` at the last, in between on a line, rounded down.

    Raises:
        InvalidRequest: ``max_staleness`` or ``last_permille`` is out of range.

    Example:
        >>> linear_freshness(3, 500)
        (1000, 833, 666, 500)
    """
    if not (0 <= max_staleness < MAX_LAGS and 0 <= last_permille <= FULL_PERMILLE):
        raise InvalidRequest(
            f"A freshness schedule for {max_staleness} versions down to {last_permille} per mille "
            f"cannot be made; give 0 to {MAX_LAGS - 1} versions and 0 to 1000 per mille.",
            code="bad_freshness",
        )
    drop = FULL_PERMILLE - last_permille
    return tuple(
        FULL_PERMILLE - -(-drop * lag // max(1, max_staleness)) for lag in range(max_staleness + 1)
    )
