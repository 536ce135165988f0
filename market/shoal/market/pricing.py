"""Which rule prices a lot, and how a posted price follows supply and demand."""

from __future__ import annotations

from shoal.protocol.certificate import ClearingRule
from shoal.protocol.money import MAX_MICROS, Micros

MIN_AUCTION_BIDDERS = 3
"""With fewer there is no competition to find a price, so one is posted.

Source: docs/architecture, "Market"."""

UNIFORM_BIDDERS = 28
"""Distinct staked bidders from which one price for all costs the requester less than each
bid's own: fewer can move it by withholding capacity.  Source: docs/market-simulation."""

ETA_PERMILLE = 250
"""η: a lot that its bidders could fill twice over lowers the price by a ninth, and no lot
moves it by more than 28 %."""

MAX_PRESSURE_PERMILLE = 1_000
"""The most that K/S - 1 counts: without supply the price would otherwise jump to the reserve."""

_ONE = 1 << 64


def choose_rule(num_bidders: int) -> ClearingRule:
    """The rule for a lot with this many distinct staked accounts among its eligible bids."""
    if num_bidders < MIN_AUCTION_BIDDERS:
        return ClearingRule.POSTED
    return ClearingRule.UNIFORM if num_bidders >= UNIFORM_BIDDERS else ClearingRule.PAY_AS_BID


def next_posted_price(
    price_micros: int, *, demand_units: int, supply_units: int, reserve_micros: int
) -> Micros:
    """``p · exp(η (K/S − 1))``, between one micro and the reserve.

    A rise is rounded up and a fall down, so that a price of a few micros moves too.

    Args:
        price_micros: The price posted for the lot just cleared.
        demand_units: K, the units of that lot.
        supply_units: S, the units its bidders would have done at that price.
        reserve_micros: The most the next lot pays.

    Source: docs/architecture, "Market": the posted fallback.
    """
    if supply_units <= 0:
        pressure = MAX_PRESSURE_PERMILLE
    else:
        pressure = (demand_units - supply_units) * 1_000 // supply_units
        pressure = min(pressure, MAX_PRESSURE_PERMILLE)
    scaled = price_micros * _exp_fixed(pressure * ETA_PERMILLE)
    moved = -(-scaled // _ONE) if pressure > 0 else scaled // _ONE
    return Micros(max(1, min(moved, reserve_micros, MAX_MICROS)))


def _exp_fixed(exponent_millionths: int) -> int:
    """``exp`` of an exponent between −1 and 1, as a multiple of 2⁻⁶⁴, rounded down.

    Integers only, so that every machine computes the same price.  Source: the Taylor series of
    exp, whose terms beyond the last kept are below 2⁻⁶⁴.
    """
    size = abs(exponent_millionths)
    total = term = _ONE
    n = 1
    while term:
        term = term * size // (1_000_000 * n)
        total += term
        n += 1
    return total if exponent_millionths >= 0 else _ONE * _ONE // total
