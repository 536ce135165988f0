"""Who is in a simulated market: costs, capacities, speeds and failures of many providers.

Arrays are ``(markets, providers)``: markets are independent draws, one for each seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from shoal.protocol.errors import InvalidRequest

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

MAX_PROVIDERS = 100_000
MAX_MARKETS = 1_000
MEDIAN_COST_MICROS = 10_000


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One kind of market.

    The spread of costs is the one figure set by the reference's table: at 0.25 a truthful
    uniform price is 1.24 times the average cost in a thick market, as it is there.

    Args:
        num_providers: How many compete.
        cost_sigma: Log-standard deviation of the cost of a unit.
        capacity_sigma: Log-standard deviation of capacity.
        mean_capacity: Mean units in flight a provider can hold.
        load: Units auctioned ÷ capacity of all.
        load_spread: How far a round's load strays from ``load``, evenly, as a share of it.
        num_giants: How many providers own ``giants_share`` of all capacity together.
        giants_share: What the giants own, of 1.
        share_cap: φ: the most one provider may win, of the units; 1 is no cap.
        reserve_ratio: Reserve ÷ median cost.
        cartel_size: How many providers, drawn at random, bid as one.
    """

    num_providers: int
    cost_sigma: float = 0.25
    capacity_sigma: float = 0.5
    mean_capacity: int = 100
    load: float = 0.6
    load_spread: float = 0.0
    num_giants: int = 0
    giants_share: float = 0.5
    share_cap: float = 1.0
    reserve_ratio: float = 2.0
    cartel_size: int = 0

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("providers", self.num_providers, 2, MAX_PROVIDERS),
            ("load", self.load, 0.01, 1.0),
            ("load spread", self.load_spread, 0.0, 0.9),
            ("share cap", self.share_cap, 0.001, 1.0),
            ("reserve ratio", self.reserve_ratio, 1.0, 100.0),
            ("giants", self.num_giants, 0, self.num_providers - 1),
            ("cartel members", self.cartel_size, 0, self.num_providers - 1),
        ):
            if not low <= value <= high:
                raise InvalidRequest(
                    f"A simulated market's {name} lie from {low} to {high}, not at {value}.",
                    code="bad_scenario",
                )


@dataclass(frozen=True, kw_only=True)
class Population:
    """The providers of many independent markets, and what each market auctions.

    ``capacity`` is what a provider has; ``most_units`` what the share cap lets it win of it.
    ``tie_rank`` orders equal prices, in place of the hash of a real clearing.
    ``cartel`` marks who bids together.  ``num_units`` are auctioned in a round, on average.
    """

    cost_micros: Ints
    capacity: Ints
    most_units: Ints
    tie_rank: Ints
    cartel: NDArray[np.bool_]
    num_units: Ints
    load_spread: float
    reserve_micros: Ints

    @property
    def num_markets(self) -> int:
        """How many markets were drawn."""
        return int(self.cost_micros.shape[0])

    @property
    def num_providers(self) -> int:
        """How many providers each has."""
        return int(self.cost_micros.shape[1])


def draw_population(scenario: Scenario, num_markets: int, seed: int) -> Population:
    """Markets drawn from ``scenario``; the first ``m`` are the same however many are drawn.

    Raises:
        InvalidRequest: more markets than `MAX_MARKETS`, or none.
    """
    if not 1 <= num_markets <= MAX_MARKETS:
        raise InvalidRequest(
            f"A simulation draws 1 to {MAX_MARKETS} markets, not {num_markets}.",
            code="bad_scenario",
        )
    rows = [
        _draw_market(scenario, np.random.default_rng([seed, market]))
        for market in range(num_markets)
    ]
    cost, capacity, rank, cartel = (np.stack(column) for column in zip(*rows, strict=True))
    units = np.maximum(1, np.floor(scenario.load * capacity.sum(axis=1))).astype(np.int64)
    share = Fraction(scenario.share_cap).limit_denominator(1000)
    most_each = -(-units * share.numerator // share.denominator)
    reserve = round(scenario.reserve_ratio * MEDIAN_COST_MICROS)
    return Population(
        cost_micros=cost,
        capacity=capacity,
        most_units=np.minimum(capacity, most_each[:, None]),
        tie_rank=rank,
        cartel=cartel,
        num_units=units,
        load_spread=scenario.load_spread,
        reserve_micros=np.full(num_markets, reserve, dtype=np.int64),
    )


def _draw_market(
    scenario: Scenario, rng: np.random.Generator
) -> tuple[Ints, Ints, Ints, NDArray[np.bool_]]:
    """Costs, capacities, tie ranks and cartel membership of one market."""
    n = scenario.num_providers
    cost = np.rint(MEDIAN_COST_MICROS * rng.lognormal(0.0, scenario.cost_sigma, n))
    size = rng.lognormal(0.0, scenario.capacity_sigma, n)
    giants = scenario.num_giants
    if giants:
        size[:giants] = 1.0 / giants * scenario.giants_share
        size[giants:] *= (1.0 - scenario.giants_share) / size[giants:].sum()
    capacity = np.maximum(1, np.rint(size / size.mean() * scenario.mean_capacity))
    members = np.zeros(n, dtype=np.bool_)
    members[rng.permutation(n)[: scenario.cartel_size]] = True
    return (
        np.maximum(1, cost).astype(np.int64),
        capacity.astype(np.int64),
        rng.permutation(n).astype(np.int64),
        members,
    )
