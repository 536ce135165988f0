"""How a job looks on a terminal."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from shoal.client.views import JobView, WorkerView
from shoal.protocol.job import JobState
from shoal.protocol.market import TaskKind
from shoal.protocol.money import MICROS_PER_DOLLAR

_BARS = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH = 32
_BAR_WIDTH = 32
_ACCURACIES = 4
_STATE_STYLES = {
    JobState.COMPLETE: "bold green",
    JobState.FAILED: "bold red",
    JobState.CANCELLED: "yellow",
    JobState.PAUSED: "yellow",
}


def picture_of(view: JobView, rewards: Sequence[float]) -> RenderableType:
    """The whole job: progress, reward, held-out accuracy, spend and workers.

    Args:
        view: The job as of now.
        rewards: Mean batch rewards seen so far, oldest first.
    """
    parts: list[RenderableType] = ["", _headline(view), _figures(view, rewards)]
    parts += [Text(f"! {diagnosis.sentence}", style="yellow") for diagnosis in view.health]
    if view.workers:
        parts += ["", worker_table(view)]
    return Group(*parts)


def _headline(view: JobView) -> Text:
    state = _STATE_STYLES.get(view.state, "cyan")
    line = Text.assemble(
        (view.name, "bold"), "  ", (short_job(view.job_id), "dim"), "  ", (view.state.value, state)
    )
    if view.reason:
        line.append(f" ({view.reason})", style=state)
    return line


def _figures(view: JobView, rewards: Sequence[float]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(width=_BAR_WIDTH)
    grid.add_column(no_wrap=True)
    steps = Text(f"{view.policy_version}/{view.max_steps}", style="bold")
    if not view.ended:
        steps.append(f"  {time_left(view)}", style="dim")
    grid.add_row("policy version", _bar(view.policy_version, view.max_steps, "cyan"), steps)
    reward = "—" if view.reward_recent is None else f"{view.reward_recent:.3f}"
    grid.add_row("reward", Text(sparkline(rewards), style="green"), Text(reward, style="bold"))
    grid.add_row("held-out accuracy", _accuracies(view), _accuracy_change(view))
    spend = Text(dollars(view.spent_micros), style="bold")
    spend.append(f" of {dollars(view.budget_micros)}", style="dim")
    grid.add_row("spend", _bar(view.spent_micros, view.budget_micros, "magenta"), spend)
    return grid


def _bar(done: int, total: int, style: str) -> ProgressBar:
    return ProgressBar(
        total=max(1, total),
        completed=min(done, total),
        width=_BAR_WIDTH,
        complete_style=style,
        finished_style=style,
    )


def _accuracies(view: JobView) -> Text:
    shown = [f"{100 * item.accuracy:.1f}%" for item in view.evaluations]
    if not shown:
        return Text("not evaluated yet", style="dim")
    # The first and the last ones: what the job began with, and where it is now.
    skipped = " … " if len(shown) > _ACCURACIES else " → "
    text = shown[0] + "".join(
        (skipped if index == 0 else " → ") + item
        for index, item in enumerate(shown[1:][-_ACCURACIES + 1 :])
    )
    return Text(text, style="green")


def _accuracy_change(view: JobView) -> Text:
    if not view.evaluations:
        return Text("")
    margin = Text(plus_minus(view.evaluations[-1].margin), style="dim")
    if len(view.evaluations) > 1:
        change = 100 * (view.evaluations[-1].accuracy - view.evaluations[0].accuracy)
        margin.append(f"  {change:+.1f} points", style="bold not dim")
    return margin


def worker_table(view: JobView) -> Table:
    """Who works on the job: accepted tasks, those lost (rejected or expired), price, pay."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", show_edge=False)
    table.add_column("worker", no_wrap=True)
    for title in ("rollout", "gradient", "evaluate", "lost"):
        table.add_column(title, justify="right")
    table.add_column("$/rollout", justify="right")
    table.add_column("earned", justify="right")
    for worker in sorted(view.workers, key=lambda item: item.name):
        table.add_row(*_worker_row(worker))
    return table


def _worker_row(worker: WorkerView) -> list[RenderableType]:
    accepted = [
        str(worker.tasks[kind].accepted) if kind in worker.tasks else "0" for kind in TaskKind
    ]
    lost = sum(counts.rejected + counts.expired for counts in worker.tasks.values())
    price = worker.price_micros.get(TaskKind.ROLLOUT)
    name = Text(worker.name)
    if not worker.connected:
        name = Text.assemble((worker.name, "dim strike"), ("  gone", "bold red"))
    return [
        name,
        *accepted,
        Text(str(lost), style="red" if lost else "dim"),
        "—" if price is None else f"{price / MICROS_PER_DOLLAR:.6f}",
        dollars(worker.earned_micros),
    ]


def sparkline(values: Sequence[float], width: int = _SPARK_WIDTH) -> str:
    """``values`` as a line of bars, the latest at the right; at most ``width`` long.

    The scale is 0 to 1, that of rewards, so that a bar's height means the same all along.
    """
    if not values:
        return ""
    if len(values) > width:
        # Each bar is the mean of its stretch.
        edges = [round(i * len(values) / width) for i in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges) if b > a]
    top = len(_BARS) - 1
    return "".join(_BARS[round(min(1.0, max(0.0, value)) * top)] for value in values)


def plus_minus(margin: float) -> str:
    """Half the width of a 95 % confidence interval, in points."""
    return f"±{100 * margin:.1f}"


def time_left(view: JobView) -> str:
    """How long the job will still take, for people."""
    if view.eta_s is None:
        return "starting"
    return f"{duration(view.eta_s)} left"


def duration(seconds: float) -> str:
    """``seconds`` as 42 s, 3:07 or 1:02:03."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def dollars(micros: int) -> str:
    """``micros`` as dollars and cents, rounded for reading; exact sums are in the JSON."""
    cents = (abs(micros) * 100 + MICROS_PER_DOLLAR // 2) // MICROS_PER_DOLLAR
    return f"{'-' if micros < 0 else ''}${cents // 100}.{cents % 100:02d}"


def short(account: str) -> str:
    """An account short enough for a table: its head and tail."""
    return f"{account[:6]}…{account[-4:]}"


def short_job(job_id: str) -> str:
    """A job id's first digits, which commands accept in place of all of them."""
    return job_id[:12]
