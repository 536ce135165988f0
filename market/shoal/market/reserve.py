"""The most a unit may cost: the requester's maximum, or nine tenths of a data centre's price."""

from __future__ import annotations

import datetime
import tomllib
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

from shoal.market.reauction import raise_reserve_up
from shoal.protocol.certificate import ReserveOrigin, ReserveTerms
from shoal.protocol.errors import InvalidRequest
from shoal.protocol.money import Micros, parse_dollars

REFERENCE_SHARE_PERMILLE = 900
"""Of the reference price.  Source: docs/architecture, "Market"."""

MAX_RAISES = 400
"""More raises change nothing: 1.1⁴⁰⁰ is above the largest amount."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuPrice:
    """What one seller asks for an hour of one GPU, and where that was read."""

    gpu: str
    seller: str
    micros_per_hour: Micros
    source: str
    found_in: str
    read_on: datetime.date


@lru_cache(maxsize=1)
def gpu_prices() -> tuple[GpuPrice, ...]:
    """The committed table of data-centre prices, row by row."""
    text = files("shoal.market").joinpath("data/gpu_prices.toml").read_text(encoding="utf-8")
    return tuple(
        GpuPrice(
            gpu=row["gpu"],
            seller=row["seller"],
            micros_per_hour=parse_dollars(row["usd_per_gpu_hour"], "gpu_prices.toml"),
            source=row["source"],
            found_in=row["found_in"],
            read_on=row["read_on"],
        )
        for row in tomllib.loads(text)["price"]
    )


def reference_price(gpu: str) -> GpuPrice | None:
    """The cheapest data-centre offer of ``gpu``; none where the table has no row for it."""
    rows = [row for row in gpu_prices() if row.gpu == gpu]
    return min(rows, key=lambda row: row.micros_per_hour, default=None)


def reserve_for(
    requester_max_micros: int,
    *,
    gpu: str | None = None,
    units_per_1000_gpu_hours: int | None = None,
) -> ReserveTerms:
    """What a unit of a class may cost, rounded down, and why.

    Args:
        requester_max_micros: The most the requester pays for a unit.
        gpu: The GPU the class was benchmarked on, as its driver names it; absent, or not in
            the table, leaves the requester's maximum alone.
        units_per_1000_gpu_hours: How many units that GPU does in 1,000 hours, by benchmark.

    Raises:
        InvalidRequest: a GPU is given without its benchmark, or a benchmark of no unit.
    """
    row = None if gpu is None else reference_price(gpu)
    if row is None:
        return ReserveTerms(
            requester_max_micros=requester_max_micros,
            origin=ReserveOrigin.REQUESTER,
            reserve_micros=requester_max_micros,
        )
    if units_per_1000_gpu_hours is None or units_per_1000_gpu_hours < 1:
        raise InvalidRequest(
            f"The class is priced by {gpu} but no number of units per 1,000 hours is known for "
            "it; benchmark the class, or leave the GPU out.",
            code="no_benchmark",
        )
    reference = row.micros_per_hour * 1_000 // units_per_1000_gpu_hours
    ceiling = row.micros_per_hour * REFERENCE_SHARE_PERMILLE // units_per_1000_gpu_hours
    below = ceiling < requester_max_micros
    return ReserveTerms(
        requester_max_micros=requester_max_micros,
        reference_micros=reference,
        gpu=gpu,
        units_per_1000_gpu_hours=units_per_1000_gpu_hours,
        origin=ReserveOrigin.REFERENCE if below else ReserveOrigin.REQUESTER,
        reserve_micros=min(ceiling, requester_max_micros),
    )


def raised(terms: ReserveTerms) -> ReserveTerms:
    """The reserve after work failed at the present one: × 1.1, up to the requester's maximum."""
    update = {
        "num_raises": terms.num_raises + 1,
        "reserve_micros": raise_reserve_up(terms.reserve_micros, terms.requester_max_micros),
    }
    return terms.model_copy(update=update)


def worked_out_again(terms: ReserveTerms) -> ReserveTerms:
    """The terms as the requester's maximum, the GPU and the failures give them."""
    fresh = reserve_for(
        terms.requester_max_micros,
        gpu=terms.gpu,
        units_per_1000_gpu_hours=terms.units_per_1000_gpu_hours,
    )
    for _ in range(min(terms.num_raises, MAX_RAISES)):
        fresh = raised(fresh)
    return fresh
