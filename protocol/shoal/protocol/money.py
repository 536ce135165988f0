"""Money as integers.

The unit is the *micro*: one millionth of a US dollar, which is one base unit of the
settlement token (6 decimals).  Nothing in Shoal holds money in a float.
"""

from __future__ import annotations

import re
from typing import Annotated, NewType

from pydantic import Field

from shoal.protocol.errors import InvalidRequest

Micros = NewType("Micros", int)

MICROS_PER_DOLLAR = 1_000_000
MAX_MICROS = 2**53 - 1
"""Largest amount a record may name: nine billion dollars, exact in canonical JSON."""

MicrosField = Annotated[int, Field(ge=0, le=MAX_MICROS)]

_DECIMAL = re.compile(r"^(\d{1,20})(?:\.(\d{1,6}))?$")


def parse_dollars(text: str, where: str) -> Micros:
    """The amount in ``text`` ("25", "0.40"), exact.

    Raises:
        InvalidRequest: ``text`` is not a decimal with at most six places.
    """
    match = _DECIMAL.match(text)
    if match is None:
        raise InvalidRequest(
            f"{where} is {text!r}; write an amount in dollars with at most six decimals, "
            'for example "25.00".',
            code="invalid_money",
        )
    whole, fraction = match.group(1), (match.group(2) or "").ljust(6, "0")
    return Micros(int(whole) * MICROS_PER_DOLLAR + int(fraction))


def format_dollars(micros: int) -> str:
    """``micros`` as dollars, with as few decimals as are exact, two at least."""
    sign = "-" if micros < 0 else ""
    whole, fraction = divmod(abs(micros), MICROS_PER_DOLLAR)
    return f"{sign}{whole}.{f'{fraction:06d}'.rstrip('0').ljust(2, '0')}"


def scale_down(micros: int, share_bps: int) -> Micros:
    """``micros × share_bps / 10,000``, rounded down."""
    return Micros(micros * share_bps // 10_000)
