"""``shoal market simulate``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from shoal.client.commands.options import FiniteRange, output_option
from shoal.client.output import Output

_SHARE = FiniteRange(min=0, max=1)


@dataclass(frozen=True, kw_only=True)
class _Market:
    """The simulated market, as given; absent takes what fits its size."""

    providers: int
    giants: int
    cartel: int
    share_cap: float
    load: float
    load_spread: float


@dataclass(frozen=True, kw_only=True)
class _Work:
    """The simulated work, as given."""

    units: int | None
    crashes: float
    cheaters: float
    audit_rate: float


@dataclass(frozen=True, kw_only=True)
class _Effort:
    """How much is simulated, as given; absent takes what fits the market's size."""

    markets: int | None
    rounds: int | None
    seed: int


def _market_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds what describes the market, passed as one `_Market` ``market``."""

    @click.option("--providers", type=click.IntRange(2, 100_000), default=40, show_default=True)
    @click.option("--giants", type=click.IntRange(0), default=0, help="Owners of half, together.")
    @click.option("--cartel", type=click.IntRange(0), default=0, help="Providers bidding as one.")
    @click.option(
        "--share-cap", type=_SHARE, default=1.0, help="The most one provider may win; 1 is no cap."
    )
    @click.option(
        "--load", type=_SHARE, default=0.6, show_default=True, help="Units of a lot ÷ capacity."
    )
    @click.option("--load-spread", type=_SHARE, default=0.0, help="How far the load strays.")
    @functools.wraps(command)
    def wrapped(
        *args: Any,
        providers: int,
        giants: int,
        cartel: int,
        share_cap: float,
        load: float,
        load_spread: float,
        **rest: Any,
    ) -> Any:
        market = _Market(
            providers=providers,
            giants=giants,
            cartel=cartel,
            share_cap=share_cap,
            load=load,
            load_spread=load_spread,
        )
        return command(*args, market=market, **rest)

    return wrapped


def _work_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds what describes the work, passed as one `_Work` ``work``."""

    @click.option("--units", type=click.IntRange(1, 100_000_000), help="Units; ten lots if absent.")
    @click.option("--crashes", type=_SHARE, default=0.1, show_default=True, help="Share.")
    @click.option("--cheaters", type=_SHARE, default=0.05, show_default=True, help="Share.")
    @click.option("--audit-rate", type=_SHARE, default=0.05, show_default=True)
    @functools.wraps(command)
    def wrapped(
        *args: Any,
        units: int | None,
        crashes: float,
        cheaters: float,
        audit_rate: float,
        **rest: Any,
    ) -> Any:
        work = _Work(units=units, crashes=crashes, cheaters=cheaters, audit_rate=audit_rate)
        return command(*args, work=work, **rest)

    return wrapped


def _effort_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds how much is simulated, passed as one `_Effort` ``effort``."""

    @click.option("--markets", type=click.IntRange(1, 1000), help="Independent draws.")
    @click.option("--rounds", type=click.IntRange(4, 100_000), help="Rounds of learning.")
    @click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
    @functools.wraps(command)
    def wrapped(*args: Any, markets: int | None, rounds: int | None, seed: int, **rest: Any) -> Any:
        effort = _Effort(markets=markets, rounds=rounds, seed=seed)
        return command(*args, effort=effort, **rest)

    return wrapped


@click.command("simulate")
@_market_options
@_work_options
@_effort_options
@click.option("--table", is_flag=True, help="The standard markets and thicknesses instead.")
@click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw a PNG (matplotlib)."
)
@output_option
def simulate(
    market: _Market,
    work: _Work,
    effort: _Effort,
    table: bool,
    plot: Path | None,
    output: Output,
) -> int:
    """Try the market's pay rules on providers who learn what to bid.

    Providers with costs, speeds and failures of their own learn under each rule; then one
    job is worked off, with crashes and cheaters. See docs/market-simulation.md.
    """
    from shoal.client.simulate_view import require_plotting

    if plot is not None:
        require_plotting()
    if table:
        _simulate_table(effort, plot, output)
    else:
        _simulate_one(market, work, effort, plot, output)
    return 0


def _simulate_one(
    market: _Market, work: _Work, effort: _Effort, plot: Path | None, output: Output
) -> None:
    from shoal.client.simulate_view import plot_trial, trial_json, trial_picture
    from shoal.market.simulation.population import Scenario
    from shoal.market.simulation.trial import fitting_effort, run_trial
    from shoal.market.simulation.work import Audit
    from shoal.market.simulation.workforce import Faults

    scenario = Scenario(
        num_providers=market.providers,
        num_giants=market.giants,
        cartel_size=market.cartel,
        share_cap=market.share_cap,
        load=market.load,
        load_spread=market.load_spread,
    )
    faults = Faults(
        crash_share=work.crashes, cheat_share=work.cheaters, audit=Audit(rate=work.audit_rate)
    )
    fitting = fitting_effort(market.providers, effort.markets, effort.rounds, effort.seed)
    trial = run_trial(scenario, fitting, faults, work.units)
    if output.json_mode:
        output.emit(trial_json(trial))
    else:
        output.say(*trial_picture(trial))
    if plot is not None:
        plot_trial(trial, plot)


def _simulate_table(effort: _Effort, plot: Path | None, output: Output) -> None:
    from shoal.client.simulate_view import plot_study, study_json, study_picture
    from shoal.market.simulation.trial import fitting_effort, run_study

    study = run_study(fitting_effort(64, effort.markets, effort.rounds, effort.seed))
    if output.json_mode:
        output.emit(study_json(study))
    else:
        output.say(*study_picture(study))
    if plot is not None:
        plot_study(study, plot)
