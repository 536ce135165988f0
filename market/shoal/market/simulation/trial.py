"""A whole simulation: bidders learn under every rule, then one job is worked off."""

from __future__ import annotations

from dataclasses import dataclass, replace

from shoal.market.pricing import choose_rule
from shoal.market.simulation.comparison import (
    TABLE,
    Comparison,
    Effort,
    Thickness,
    compare,
    compare_thickness,
)
from shoal.market.simulation.learning import DEFAULT_ROUNDS
from shoal.market.simulation.population import Scenario
from shoal.market.simulation.rules import PayRule
from shoal.market.simulation.workforce import Faults, Shift, work_off

LOTS_OF_WORK = 10
# What a simulation of any size may take without being asked to: about a minute.
_MOST_MARKETS = 32
_PROVIDERS_IN_ALL = 4_000
_BIDS_IN_ALL = 2_000_000
_FEWEST_ROUNDS = 100


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One kind of market under every rule, and one job worked off in it.

    ``rule`` is the one the market itself would choose; the job is paid by it.
    """

    comparison: Comparison
    effort: Effort
    rule: PayRule
    num_units: int
    faults: Faults
    shift: Shift


@dataclass(frozen=True, kw_only=True)
class Study:
    """The standard markets, and both pay rules at each thickness."""

    effort: Effort
    comparisons: tuple[Comparison, ...]
    steady: tuple[Thickness, ...]
    varying: tuple[Thickness, ...]


def fitting_effort(
    num_providers: int, markets: int | None = None, rounds: int | None = None, seed: int = 0
) -> Effort:
    """As much as a market of that size can be given in about a minute, where not said."""
    drawn = min(_MOST_MARKETS, max(1, _PROVIDERS_IN_ALL // num_providers))
    chosen = drawn if markets is None else markets
    fitting = max(_FEWEST_ROUNDS, _BIDS_IN_ALL // (num_providers * chosen))
    return Effort(
        markets=chosen, rounds=min(DEFAULT_ROUNDS, fitting) if rounds is None else rounds, seed=seed
    )


def run_trial(
    scenario: Scenario, effort: Effort, faults: Faults, num_units: int | None = None
) -> Trial:
    """Bidders have learned under every rule, and the job is done; ten lots if not said."""
    comparison, population, learned = compare(
        f"{scenario.num_providers} providers", scenario, effort
    )
    rule = PayRule(str(choose_rule(scenario.num_providers)))
    units = LOTS_OF_WORK * int(population.num_units[0]) if num_units is None else num_units
    shift = work_off(population, learned[rule], rule, units, faults=faults, seed=effort.seed)
    return Trial(
        comparison=comparison,
        effort=effort,
        rule=rule,
        num_units=units,
        faults=faults,
        shift=shift,
    )


def run_study(effort: Effort, load_spread: float = 0.25) -> Study:
    """The markets of the reference's table, and the thickness at which one price pays."""
    thin = Scenario(num_providers=TABLE[0][1].num_providers)
    return Study(
        effort=effort,
        comparisons=tuple(compare(name, scenario, effort)[0] for name, scenario in TABLE),
        steady=compare_thickness(thin, effort),
        varying=compare_thickness(replace(thin, load_spread=load_spread), effort),
    )
