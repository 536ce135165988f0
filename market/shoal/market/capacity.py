"""How much work stake backs, and how much stake makes cheating lose.

A result is audited with probability *a*, and an audit finds a false one with probability
*d*.  Whoever cheats on a unit gains at most its price, so a unit in flight is backed by
``price ÷ (a · d)`` of stake: what is lost on being found, times the chance of it, is then no
less than what is gained otherwise.  Shares are whole per mille, and every rounding is against
the provider.

Source: docs/architecture, "Reputation"; the form of the bound is that of PoSP, Zhang et al.,
arXiv 2405.00295.
"""

from __future__ import annotations

from pydantic import Field

from shoal.protocol.errors import InvalidRequest
from shoal.protocol.market import MAX_UNITS
from shoal.protocol.money import Micros, MicrosField
from shoal.protocol.record import Record

_PERMILLE = 1_000
SAFETY_FACTOR = 3
"""κ: how many times over stake and unpaid work must cover a cheat's gain before it is found.

Source: docs/architecture, "Reputation".
"""


class AuditTerms(Record):
    """How likely a false result is found.

    Writer: the orchestrator's operator.  Reader: the auction; a provider choosing its stake.
    """

    audit_permille: int = Field(ge=1, le=_PERMILLE)
    detection_permille: int = Field(ge=1, le=_PERMILLE)

    @property
    def found_ppm(self) -> int:
        """The probability that a false result is found, in millionths: exact."""
        return self.audit_permille * self.detection_permille


class Cheat(Record):
    """What one false unit is worth to whoever hands it in.

    ``cost_micros`` is the honest work saved, ``bribe_micros`` what anybody pays for the harm.
    """

    cost_micros: MicrosField
    bribe_micros: MicrosField = 0


def stake_up(num_units: int, price_micros: int, terms: AuditTerms) -> Micros:
    """The stake that backs this many units in flight, rounded up.

    Raises:
        InvalidRequest: a number is negative.

    Example:
        >>> stake_up(1, 2_000, AuditTerms(audit_permille=50, detection_permille=950))
        42106
    """
    _require_amounts(num_units=num_units, price_micros=price_micros)
    return Micros(-(-num_units * price_micros * _PERMILLE**2 // terms.found_ppm))


def capacity_down(free_stake_micros: int, price_micros: int, terms: AuditTerms) -> int:
    """Q: how many more units of a class the free stake backs, rounded down.

    Args:
        free_stake_micros: Stake that backs nothing yet.
        price_micros: The class's reference price for a unit, or its reserve if it has none.
        terms: How likely a false result is found.

    Raises:
        InvalidRequest: the stake is negative, or the price is not above zero.
    """
    _require_amounts(free_stake_micros=free_stake_micros, price_micros=price_micros - 1)
    return min(free_stake_micros * terms.found_ppm // (price_micros * _PERMILLE**2), MAX_UNITS)


def deterrent_stake_up(
    cheat: Cheat, terms: AuditTerms, *, holdback_micros: int = 0, safety_factor: int = SAFETY_FACTOR
) -> Micros:
    """The least stake with which cheating on any share of the work loses, rounded up.

    A cheat hands in ``1 ÷ p`` false units before it is found, p being audit × detection, so
    stake and unpaid work must exceed ``(c + B) ÷ p``: here κ times over,
    ``S + H ≥ κ · (c + B) ÷ p``.

    Args:
        cheat: What one false unit is worth.
        terms: How likely it is found.
        holdback_micros: Pay for accepted work that is still withheld when a cheat is found.
        safety_factor: κ.

    Source: docs/architecture, "Reputation".

    Example:
        >>> deterrent_stake_up(
        ...     Cheat(cost_micros=2_000), AuditTerms(audit_permille=50, detection_permille=950))
        126316
    """
    _require_amounts(holdback_micros=holdback_micros, safety_factor=safety_factor - 1)
    gain = cheat.cost_micros + cheat.bribe_micros
    covered = -(-safety_factor * gain * _PERMILLE**2 // terms.found_ppm)
    return Micros(max(0, covered - holdback_micros))


def expected_cheat_gain_ppm(
    cheat: Cheat, terms: AuditTerms, *, price_micros: int, forfeit_micros: int
) -> int:
    """What one false unit gains over an honest one, in millionths of a micro: exact.

    ``c + (1 - p) · B - p · (r + S + H)``: the work is saved; the bribe is paid unless the
    cheat is found; found, it costs the unit's pay and everything forfeited.

    Args:
        cheat: What one false unit is worth.
        terms: How likely it is found.
        price_micros: The unit's pay.
        forfeit_micros: Stake slashed and pay withheld when it is found.

    Source: docs/architecture, "Reputation": cheating pays unless ``p (r + S) > c + (1 - p) B``.
    """
    _require_amounts(price_micros=price_micros, forfeit_micros=forfeit_micros)
    found, whole = terms.found_ppm, _PERMILLE**2
    return (
        cheat.cost_micros * whole
        + (whole - found) * cheat.bribe_micros
        - found * (price_micros + forfeit_micros)
    )


def _require_amounts(**amounts: int) -> None:
    for name, amount in amounts.items():
        if amount < 0:
            raise InvalidRequest(
                f"{name} is too small by {-amount}; stake, prices and units cannot be negative, "
                "and a price is above zero.",
                code="bad_amount",
            )
