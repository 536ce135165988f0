"""What a provider's record costs the requester, in micros per unit, added to its price.

``h = (1 - r) ÷ r · (c_verify + c_redispatch) + λ · max(0, τ - τ*)``, where ``r`` is the lower
bound of acceptance and ``τ`` the p90 time of a unit.  Quasi-linear, so the threshold at which
a bid still wins is exact.  Rounded up: against who is handicapped.

Two limits keep a bad record from being worth less than an empty one, since whoever had such a
record would take a new name: nobody is thought less reliable than a newcomer, and nobody
slower than one whose speed is unknown.  Work that fails all the same is kept off by cooldown
and paid for by stake.

Source: docs/architecture, "Reputation"; on cheap names Friedman and Resnick, "The social cost
of cheap pseudonyms", Journal of Economics & Management Strategy 10 (2001).
"""

from __future__ import annotations

from pydantic import Field

from shoal.market.beta import PPM
from shoal.market.reputation import NEWCOMER, Standing
from shoal.protocol.certificate import BidderTerms
from shoal.protocol.money import MAX_MICROS, Micros, MicrosField
from shoal.protocol.record import MAX_INT, Record

_MS_PER_S = 1_000
_SLOWEST_FACTOR = 3
"""By so many times the target another node has been given the work too (`pace.remaining_ms`)."""


class HandicapTerms(Record):
    """What failing and waiting cost, for one lot.

    Writer: the orchestrator, with the lot.  Reader: whoever recomputes a handicap.

    ``verify_micros`` and ``redispatch_micros`` are paid in vain for a unit that fails;
    ``delay_micros_per_s`` is the requester's λ, what a second more per unit costs; and
    ``target_unit_ms`` is τ*, absent while nobody's speed at this work is known.
    """

    verify_micros: MicrosField = 0
    redispatch_micros: MicrosField = 0
    delay_micros_per_s: MicrosField = 0
    target_unit_ms: int | None = Field(default=None, ge=1, le=MAX_INT)


def handicap_up(standing: Standing, unit_ms: int | None, terms: HandicapTerms) -> Micros:
    """The handicap of a provider in micros per unit, rounded up.

    Args:
        standing: The account's record.
        unit_ms: The node's p90 time for a unit of this work; None when unknown, which counts
            as the slowest that counts: three times the target, by when another node has been
            given the work too, so that waiting costs the requester no more.
        terms: What failing and waiting cost.

    Example:
        >>> handicap_up(NEWCOMER, None, HandicapTerms(verify_micros=100))
        78
    """
    acceptance_ppm = max(standing.acceptance_ppm, NEWCOMER.acceptance_ppm)
    lost_micros = terms.verify_micros + terms.redispatch_micros
    excess_ms = _excess_ms(unit_ms, terms.target_unit_ms)
    numerator = (PPM - acceptance_ppm) * lost_micros * _MS_PER_S
    numerator += terms.delay_micros_per_s * excess_ms * acceptance_ppm
    # A handicap above every amount a reserve can name shuts a bid out just the same.
    return Micros(min(-(-numerator // (acceptance_ppm * _MS_PER_S)), MAX_MICROS))


def _excess_ms(unit_ms: int | None, target_unit_ms: int | None) -> int:
    if target_unit_ms is None:
        return 0
    slowest_ms = _SLOWEST_FACTOR * target_unit_ms
    counted_ms = slowest_ms if unit_ms is None else min(unit_ms, slowest_ms)
    return max(0, counted_ms - target_unit_ms)


def bidder_terms(
    account: str,
    node: str,
    *,
    standing: Standing,
    unit_ms: int | None,
    terms: HandicapTerms,
    bound_units: int,
    staked: bool,
) -> BidderTerms:
    """What the auction is told of one bidder; nothing in it is the bidder's own word.

    Args:
        account: The provider's account.
        node: The bidder's node.
        standing: The account's record.
        unit_ms: The node's p90 time for a unit of this work; None when unknown.
        terms: What failing and waiting cost.
        bound_units: How many units the account's free stake backs.
        staked: Whether the account holds the stake that joining takes.
    """
    return BidderTerms(
        account=account,
        node=node,
        handicap_micros=handicap_up(standing, unit_ms, terms),
        bound_units=bound_units,
        num_receipts=standing.num_receipts,
        staked=staked,
    )
