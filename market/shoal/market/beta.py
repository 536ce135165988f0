"""Lower bounds of the Beta distribution, to the digit the same on every machine.

A handicap is part of what a clearing certificate commits to, so a bound that differs in its
last digit between two processors would make honest certificates look false.  Binary floats
and their libraries differ; decimal arithmetic of a fixed precision does not.

Source: IBM's General Decimal Arithmetic specification 1.70, by which ``+ - × ÷ √ exp ln``
are correctly rounded; Python's ``decimal`` implements it.
"""

from __future__ import annotations

from decimal import (
    ROUND_HALF_EVEN,
    Context,
    Decimal,
    DivisionByZero,
    InvalidOperation,
    Overflow,
    localcontext,
)
from functools import lru_cache

from shoal.protocol.errors import InvalidRequest, InvariantBroken

PPM = 1_000_000
"""Shares and decayed counts are whole numbers of millionths."""

MAX_COUNT_PPM = 1_000_000 * PPM
"""A million events: the continued fraction needs some √1,000,000 steps for them."""

_CONTEXT = Context(
    prec=28,
    rounding=ROUND_HALF_EVEN,
    Emin=-999_999,
    Emax=999_999,
    capitals=1,
    clamp=0,
    flags=[],
    traps=[InvalidOperation, DivisionByZero, Overflow],
)
_ENOUGH = Decimal("1e-18")
_MAX_STEPS = 20_000
_TINY = Decimal("1e-300")
_SHIFT = 20
"""From here on the terms of Stirling's series below reach eighteen digits."""
_STIRLING = ((1, 12), (-1, 360), (1, 1260), (-1, 1680), (1, 1188), (-691, 360_360), (1, 156))
_HALF_LN_TWO_PI = Decimal("0.9189385332046727417803297364056176398614")
_START_SIGMAS = Decimal("-1.2816")
"""Where the search starts: about the 10 % point of a normal distribution."""


@lru_cache(maxsize=65_536)
def beta_lower_bound_down(alpha_ppm: int, beta_ppm: int, quantile_ppm: int) -> int:
    """The quantile of Beta(α, β) in millionths, rounded down.

    It is the largest ``m`` for which the distribution has at most the quantile below
    ``m / 1,000,000``.

    Args:
        alpha_ppm: α in millionths, at least one whole.
        beta_ppm: β in millionths, at least one whole.
        quantile_ppm: The quantile in millionths, between 0 and 1 exclusive.

    Raises:
        InvalidRequest: an argument is out of its range.

    Example:
        >>> beta_lower_bound_down(4_000_000, 1_000_000, 100_000)  # 0.1 ** (1 / 4)
        562341
    """
    in_range = all(PPM <= count <= MAX_COUNT_PPM for count in (alpha_ppm, beta_ppm))
    if not in_range or not 0 < quantile_ppm < PPM:
        raise InvalidRequest(
            f"A Beta({alpha_ppm}, {beta_ppm}) bound at quantile {quantile_ppm} (all in "
            f"millionths) is not defined here; give both counts from 1 to {MAX_COUNT_PPM // PPM} "
            "whole, and a quantile between 0 and 1.",
            code="bad_beta",
        )
    with localcontext(_CONTEXT):
        return _bound_down(
            Decimal(alpha_ppm) / PPM, Decimal(beta_ppm) / PPM, Decimal(quantile_ppm) / PPM
        )


def _bound_down(alpha: Decimal, beta: Decimal, quantile: Decimal) -> int:
    """Newton's method on I_x = quantile, kept inside a bracket that every third step halves."""
    ln_beta = _ln_gamma(alpha) + _ln_gamma(beta) - _ln_gamma(alpha + beta)
    mean = alpha / (alpha + beta)
    sigma = (mean * (1 - mean) / (alpha + beta + 1)).sqrt()
    low, high = 0, PPM
    guess, step = int((mean + _START_SIGMAS * sigma) * PPM), 0
    while high - low > 1:
        step += 1
        middle = (low + high) // 2 if step % 3 == 0 else min(max(guess, low + 1), high - 1)
        x = Decimal(middle) / PPM
        front = (alpha * x.ln() + beta * (1 - x).ln() - ln_beta).exp()
        share = _share_below(x, alpha, beta, front)
        if share <= quantile:
            low = middle
        else:
            high = middle
        # The density, or next to none of it: then the bracket decides.
        density = max(front / (x * (1 - x)), _TINY)
        leap = (quantile - share) / density * PPM
        guess = middle + int(min(max(leap, Decimal(-PPM)), Decimal(PPM)))
    return low


def _share_below(x: Decimal, alpha: Decimal, beta: Decimal, front: Decimal) -> Decimal:
    """I_x(α, β), the regularised incomplete beta function; ``front`` is x^α (1-x)^β ÷ B(α, β).

    Source: NIST Digital Library of Mathematical Functions 8.17.22 and 8.17.4.
    """
    # The fraction converges fast on this side only; on the other the upper tail is taken.
    if x <= (alpha + 1) / (alpha + beta + 2):
        return front * _fraction(x, alpha, beta) / alpha
    return 1 - front * _fraction(1 - x, beta, alpha) / beta


def _fraction(x: Decimal, a: Decimal, b: Decimal) -> Decimal:
    """The continued fraction of I_x(a, b), by Lentz's method.

    Source: Thompson and Barnett, Journal of Computational Physics 64 (1986), 490.
    """
    c = Decimal(1)
    d = 1 / _not_zero(1 - (a + b) / (a + 1) * x)
    value = d
    for step in range(1, _MAX_STEPS):
        a2m = a + 2 * step
        even = step * (b - step) * x / ((a2m - 1) * a2m)
        d = 1 / _not_zero(1 + even * d)
        c = _not_zero(1 + even / c)
        value *= c * d
        odd = -(a + step) * (a + b + step) * x / (a2m * (a2m + 1))
        d = 1 / _not_zero(1 + odd * d)
        c = _not_zero(1 + odd / c)
        change = c * d
        value *= change
        if abs(change - 1) < _ENOUGH:
            return value
    raise InvariantBroken(f"The incomplete beta function of {a}, {b} at {x} did not converge.")


def _not_zero(value: Decimal) -> Decimal:
    return _TINY if abs(value) < _TINY else value


def _ln_gamma(x: Decimal) -> Decimal:
    """The logarithm of Γ(x), by Stirling's series, after Γ(x) = Γ(x + n) ÷ (x · (x + 1) · … ).

    Source: NIST Digital Library of Mathematical Functions 5.11.1.
    """
    product = Decimal(1)
    while x < _SHIFT:
        product *= x
        x += 1
    total = (x - Decimal("0.5")) * x.ln() - x + _HALF_LN_TWO_PI
    power = x
    for numerator, denominator in _STIRLING:
        total += numerator / (denominator * power)
        power *= x * x
    return total - product.ln()
