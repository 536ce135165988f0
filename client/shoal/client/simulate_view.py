"""How a simulated market reads: tables for a person, figures for a program, a picture."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from shoal.client.plan_view import seconds
from shoal.market.simulation.comparison import TRUTHFUL, Comparison, Estimate, Thickness
from shoal.market.simulation.rules import PayRule
from shoal.market.simulation.trial import Study, Trial
from shoal.protocol.errors import InvalidRequest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_RULE_WORDS = {
    str(PayRule.PAY_AS_BID): "pay as bid",
    str(PayRule.UNIFORM): "one price",
    str(PayRule.CLARKE): "Clarke (oracle)",
    str(PayRule.POSTED): "posted price",
    TRUTHFUL: "one price, all truthful",
}


def trial_picture(trial: Trial) -> list[RenderableType]:
    """One market as people read it: the rules, who earns, and the work."""
    effort = trial.effort
    head = Text.assemble(
        (trial.comparison.name, "bold"),
        f"  {effort.markets} market{'s' * (effort.markets > 1)}, {effort.rounds} rounds of "
        f"learning, seed {effort.seed}; costs are relative to the true ones",
    )
    return ["", head, "", _rule_table(trial.comparison), "", _size_table(trial), "", _work(trial)]


def study_picture(study: Study) -> list[RenderableType]:
    """The standard markets as people read them."""
    parts: list[RenderableType] = ["", _study_table(study)]
    for series in (study.steady, study.varying):
        parts += ["", _thickness_table(series)]
    return parts


def _rule_table(comparison: Comparison) -> Table:
    table = _table("rule")
    for title in ("unit price", "pay ÷ cost", "social cost", "filled", "÷ reserve"):
        table.add_column(title, justify="right", no_wrap=True)
    for result in comparison.rules:
        table.add_row(
            _RULE_WORDS[result.rule],
            estimate(result.unit_price),
            estimate(result.pay),
            estimate(result.social_cost),
            f"{100 * result.fill_rate.mean:.1f} %",
            f"{result.highest_pay_of_reserve:.2f}",
        )
    return table


def _size_table(trial: Trial) -> Table:
    result = trial.comparison.result(str(trial.rule))
    table = _table(f"income by size, {_RULE_WORDS[result.rule]}")
    for title in ("of capacity", "of units", "of income", "margin over cost"):
        table.add_column(title, justify="right", no_wrap=True)
    for quarter in result.sizes:
        shares = (quarter.capacity_share, quarter.unit_share, quarter.income_share)
        margin = "—" if quarter.margin is None else f"{100 * quarter.margin:.1f} %"
        table.add_row(quarter.name, *(f"{100 * share:.1f} %" for share in shares), margin)
    return table


def _work(trial: Trial) -> Table:
    shift, done = trial.shift, trial.shift.done
    table = _table("one job worked off")
    table.add_column("", justify="right")
    table.add_column("")
    clean = f"{shift.makespan_ratio:.2f} times the {seconds(shift.clean.makespan_s)} without faults"
    table.add_row("makespan", seconds(done.makespan_s), clean)
    table.add_row("units", f"{trial.num_units:,}", f"{done.unfinished:,} undone")
    table.add_row("leases", f"{done.attempts:,}", "failed, lost and doubled ones among them")
    table.add_row("crashed", f"{shift.num_crashed:,}", f"of {len(shift.rungs):,} on the ladder")
    table.add_row(
        "cheaters caught",
        f"{int(done.caught.sum()):,}",
        f"of {int(shift.cheats.sum()):,}; {shift.cheaters_ahead:,} gained by it; "
        f"{done.bad_units:,} false units were paid",
    )
    return table


def _study_table(study: Study) -> Table:
    table = _table("price of a unit ÷ least true cost (social cost)")
    for word in _RULE_WORDS.values():
        table.add_column(word, justify="right")
    for comparison in study.comparisons:
        cells = (
            f"{estimate(result.unit_price)} ({result.social_cost.mean:.3f})"
            for result in map(comparison.result, _RULE_WORDS)
        )
        table.add_row(comparison.name, *cells)
    return table


def _thickness_table(series: Sequence[Thickness]) -> Table:
    spread = series[0].load_spread
    load = f"load varies by {100 * spread:.0f} %" if spread else "load is steady"
    table = _table(f"bidders; {load}")
    for title in ("pay as bid", "one price", "one price saves"):
        table.add_column(title, justify="right", no_wrap=True)
    for item in series:
        table.add_row(
            str(item.num_providers),
            estimate(item.pay_as_bid),
            estimate(item.uniform),
            estimate(item.uniform_saves),
        )
    return table


def _table(title: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", show_edge=False)
    table.add_column(title, no_wrap=True)
    return table


def estimate(value: Estimate) -> str:
    """A mean with its 95 % interval, where there is one."""
    if math.isinf(value.half_width):
        return f"{value.mean:.3f}"
    return f"{value.mean:.3f}±{value.half_width:.3f}"


def trial_json(trial: Trial) -> dict[str, Any]:
    """The trial for a program; each figure's unit stands in its name."""
    shift, done = trial.shift, trial.shift.done
    return {
        "type": "simulation",
        "effort": dataclasses.asdict(trial.effort),
        "comparison": _plain(dataclasses.asdict(trial.comparison)),
        "work": {
            "rule": str(trial.rule),
            "units": trial.num_units,
            "unfinished": done.unfinished,
            "leases": done.attempts,
            "makespan_s": done.makespan_s,
            "clean_makespan_s": shift.clean.makespan_s,
            "rungs": len(shift.rungs),
            "crashed": shift.num_crashed,
            "cheaters": int(shift.cheats.sum()),
            "cheaters_caught": int(done.caught.sum()),
            "cheaters_ahead": shift.cheaters_ahead,
            "false_units_paid": done.bad_units,
        },
    }


def study_json(study: Study) -> dict[str, Any]:
    """The standard markets for a program."""
    fields: dict[str, Any] = _plain(dataclasses.asdict(study))
    return {"type": "simulation_table", **fields}


def _plain(value: Any) -> Any:
    """``value`` with nothing in it that JSON does not know; an unknown width is null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def require_plotting() -> None:
    """Passes if pictures can be drawn here.

    Raises:
        InvalidRequest: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise InvalidRequest(
            "--plot draws with matplotlib, which is not installed; install it with "
            "`pip install matplotlib`, or leave --plot out.",
            code="no_matplotlib",
        )


def plot_trial(trial: Trial, path: Path) -> None:
    """``path`` is a PNG: what each rule costs, and who earns under the market's own.

    Raises:
        InvalidRequest: it cannot be written there.
    """
    figure, (left, right) = _panels()
    _plot_rules(left, [trial.comparison])
    sizes = trial.comparison.result(str(trial.rule)).sizes
    places = range(len(sizes))
    for offset, name in ((-0.2, "capacity"), (0.2, "income")):
        shares = [getattr(item, f"{name}_share") for item in sizes]
        right.bar([place + offset for place in places], shares, 0.4, label=f"share of {name}")
    right.set_xticks(list(places), [item.name for item in sizes], fontsize="small")
    right.set_title(f"income by size, {_RULE_WORDS[str(trial.rule)]}")
    right.legend(fontsize="small")
    _save(figure, path)


def plot_study(study: Study, path: Path) -> None:
    """``path`` is a PNG: the standard markets, and where one price begins to pay.

    Raises:
        InvalidRequest: it cannot be written there.
    """
    figure, (left, right) = _panels()
    _plot_rules(left, study.comparisons)
    for series, name in ((study.steady, "steady load"), (study.varying, "varying load")):
        means = [item.uniform_saves.mean for item in series]
        widths = [item.uniform_saves.half_width for item in series]
        bidders = [item.num_providers for item in series]
        right.errorbar(bidders, means, widths, label=name, marker="o", markersize=3, capsize=2)
    right.axhline(0.0, color="black", linewidth=0.8)
    right.set_xlabel("bidders")
    right.set_ylabel("what one price saves, of the least cost")
    right.set_title("pay as bid less one price")
    right.legend(fontsize="small")
    _save(figure, path)


def _panels() -> tuple[Figure, tuple[Axes, Axes]]:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    return figure, (left, right)


def _plot_rules(panel: Axes, comparisons: Sequence[Comparison]) -> None:
    """A group of bars for each market: the price of a unit under each rule."""
    width = 0.8 / len(_RULE_WORDS)
    for number, (rule, word) in enumerate(_RULE_WORDS.items()):
        prices = [comparison.result(rule).unit_price for comparison in comparisons]
        widths = [0 if math.isinf(price.half_width) else price.half_width for price in prices]
        places = [place + number * width for place in range(len(prices))]
        panel.bar(places, [price.mean for price in prices], width, yerr=widths, label=word)
    names = [comparison.name for comparison in comparisons]
    middle = [place + 0.4 - width / 2 for place in range(len(names))]
    panel.set_xticks(middle, names, rotation=25, ha="right", fontsize="x-small")
    panel.set_ylim(bottom=1.0)
    panel.set_title("price of a unit ÷ least true cost, 95 % interval", fontsize="medium")
    panel.legend(fontsize="x-small")


def _save(figure: Figure, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure.tight_layout()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The version of the library would change the file without changing the picture.
        figure.savefig(path, dpi=110, format="png", metadata={"Software": None})
    except OSError as error:
        raise InvalidRequest(f"The plot cannot be written to {path}: {error.strerror}.") from None
    finally:
        plt.close(figure)
