"""How a plan reads: tables for a person, figures with their units for a program."""

from __future__ import annotations

from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from shoal.client.picture import dollars
from shoal.protocol.market import TaskKind
from shoal.protocol.money import MICROS_PER_DOLLAR
from shoal.rl.capacity.fitting import Fit, gib
from shoal.rl.capacity.footprint import AVAILABLE
from shoal.rl.capacity.provisioning import Bound, Timing
from shoal.rl.capacity.report import CapacityPlan, ClassPlan, PoolPlan

_BOUND_WORDS = {
    Bound.WORK: "all tokens of an update, on all machines",
    Bound.GRADIENT: "version out, gradients back, update made",
    Bound.LOOP: "version out, rollouts, gradients, update, overlapped",
    Bound.LINE: "the orchestrator's line",
}


def plan_picture(plan: CapacityPlan) -> list[RenderableType]:
    """The plan as people read it."""
    parts: list[RenderableType] = [
        "",
        _headline(plan),
        "",
        _memory_table(plan),
        "",
        _volume_table(plan),
    ]
    if plan.pool is not None:
        parts += ["", _pool_table(plan.pool), *_misfits(plan.pool)]
        if plan.pool.timing is not None:
            parts += ["", _timing_table(plan.pool, plan.pool.timing)]
    parts += ["", _money_line(plan)]
    parts += [Text.assemble(("• ", "yellow"), sentence) for sentence in plan.advice]
    return parts


def _headline(plan: CapacityPlan) -> Text:
    shape, spec = plan.setup.shape, plan.setup.spec
    trained = (
        "every weight trained"
        if spec.lora is None
        else f"adapter of rank {spec.lora.r}: {count(plan.setup.trained_values)}"
    )
    line = Text.assemble(
        (spec.name, "bold"),
        "  on  ",
        (shape.name, "bold"),
        f"  {count(shape.num_parameters)} parameters, {trained}; ",
        f"prompts of about {plan.expected.prompt_tokens:.0f} tokens, completions of "
        f"{plan.expected.completion_tokens:g}",
    )
    if plan.setup.base not in AVAILABLE:
        line.append(f"\nA base in {plan.setup.base} is not available yet.", style="yellow")
    return line


def _memory_table(plan: CapacityPlan) -> Table:
    table = _table("memory at the peak")
    for footprint in plan.footprints:
        name = "orchestrator" if footprint.role == "learner" else f"{footprint.role} worker"
        table.add_column(name, justify="right")
    names = dict.fromkeys(part for f in plan.footprints for part in f.parts)
    for name in names:
        sizes = (f.parts.get(name) for f in plan.footprints)
        table.add_row(name, *("—" if size is None else gib(size) for size in sizes))
    totals = (gib(f.total_bytes) for f in plan.footprints)
    table.add_row(Text("total", style="bold"), *(Text(total, style="bold") for total in totals))
    return table


def _volume_table(plan: CapacityPlan) -> Table:
    table = _table("tokens and bytes")
    for title in ("tasks", "units", "tokens", "up a task", "down a task", "tokens in all"):
        table.add_column(title, justify="right")
    for kind in plan.volume.kinds:
        per = "evaluation" if kind.kind == "evaluate" else "update"
        table.add_row(
            f"{kind.kind}, each {per}",
            f"{kind.tasks:,}",
            f"{kind.units:,}",
            count(kind.tokens),
            size(kind.up_bytes),
            size(kind.down_bytes),
            count(kind.job_tokens),
        )
    version = size(plan.volume.version_bytes)
    table.add_row("policy version", "1", "", "", "", version, "")
    table.add_row("base, once", "1", "", "", "", size(plan.setup.shape.stored_bytes), "")
    return table


def _pool_table(pool: PoolPlan) -> Table:
    table = _table("machines")
    for title in ("count", "rollout tok/s", "gradient tok/s", "version", "$/1k groups", "bids"):
        table.add_column(title, justify="right")
    for item in pool.classes:
        about = "≈ " if item.speed.estimated else ""
        cost = 1000 * item.group_micros / MICROS_PER_DOLLAR
        table.add_row(
            item.provider.name,
            f"{item.provider.count:,}",
            _speed(item.rollout, f"{about}{count(item.speed.rollout)}"),
            _speed(item.gradient, f"{about}{count(item.speed.gradient)}"),
            seconds(item.version_s),
            f"{cost:.2g}" if item.rollout.fits or item.gradient.fits else "—",
            _bids(item),
        )
    return table


def _speed(fit: Fit, text: str) -> Text:
    return Text(text) if fit.fits else Text("too large", style="red")


def _bids(item: ClassPlan) -> Text:
    if not (item.rollout.fits or item.gradient.fits):
        return Text("—", style="dim")
    kinds = [kind.value for kind in item.offered]
    if len(kinds) == len(TaskKind):
        return Text("all")
    return Text("\n".join(kinds) or "nothing", style="" if kinds else "yellow")


def _misfits(pool: PoolPlan) -> list[RenderableType]:
    return [
        Text.assemble((f"  {item.provider.name}, {fit.role}: ", "dim"), fit.sentence())
        for item in pool.classes
        for fit in (item.rollout, item.gradient)
        if not fit.fits
    ]


def _timing_table(pool: PoolPlan, timing: Timing) -> Table:
    table = _table("time of an update")
    table.add_column("", justify="right")
    table.add_column("")
    for bound, value in timing.bounds_s.items():
        style = "bold" if bound is timing.bound else ""
        table.add_row(
            Text(bound.value, style=style),
            Text(seconds(value), style=style),
            Text(_BOUND_WORDS[bound] + (" ← what bounds it" if style else ""), style=style),
        )
    table.add_row("whole job", seconds(timing.job_s), f"{dollars(pool.pool_micros)} for all of it")
    crew = ", ".join(f"{number} {name}" for name, number in pool.cheapest) or "nobody"
    table.add_row(
        "learner fed by",
        f"{count(pool.needed_tokens_per_s)} tok/s",
        f"the pool rolls out {count(pool.pool_tokens_per_s)} tok/s; cheapest: {crew} "
        f"({dollars(pool.cheapest_micros)})",
    )
    table.add_row("max_staleness", str(pool.needed_staleness), "at which waiting costs no time")
    return table


def _money_line(plan: CapacityPlan) -> Text:
    budget, spec = plan.budget, plan.setup.spec
    return Text.assemble(
        ("money  ", "dim"),
        f"at most {dollars(budget.update_micros)} an update and {dollars(budget.job_micros)} "
        f"for {spec.max_steps} updates; the budget is ",
        (dollars(spec.budget.max_total_micros), "bold"),
    )


def _table(title: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", show_edge=False)
    table.add_column(title, no_wrap=True)
    return table


def plan_json(plan: CapacityPlan) -> dict[str, Any]:
    """The plan for a program; each figure's unit stands in its name."""
    return {
        "type": "plan",
        "model": plan.setup.shape.name,
        "base": plan.setup.base.value,
        "base_available": plan.setup.base in AVAILABLE,
        "num_parameters": plan.setup.shape.num_parameters,
        "trained_values": plan.setup.trained_values,
        "base_stored_bytes": plan.setup.shape.stored_bytes,
        "expected": vars(plan.expected),
        "memory_bytes": {
            f.role.value: {"total": f.total_bytes, **f.parts} for f in plan.footprints
        },
        "version_bytes": plan.volume.version_bytes,
        "tasks": {
            kind.kind.value: {name: value for name, value in vars(kind).items() if name != "kind"}
            | {"job_tokens": kind.job_tokens}
            for kind in plan.volume.kinds
        },
        "budget": vars(plan.budget),
        "pool": None if plan.pool is None else _pool_json(plan.pool),
        "advice": list(plan.advice),
    }


def _pool_json(pool: PoolPlan) -> dict[str, Any]:
    timing = pool.timing
    return {
        "classes": [_class_json(item) for item in pool.classes],
        "learner": _fit_json(pool.learner),
        "timing": None
        if timing is None
        else vars(timing) | {"bounds_s": {b.value: s for b, s in timing.bounds_s.items()}},
        "needed_tokens_per_s": pool.needed_tokens_per_s,
        "pool_tokens_per_s": pool.pool_tokens_per_s,
        "needed_staleness": pool.needed_staleness,
        "cheapest": [{"name": name, "count": number} for name, number in pool.cheapest],
        "cheapest_micros": pool.cheapest_micros,
        "pool_micros": pool.pool_micros,
    }


def _class_json(item: ClassPlan) -> dict[str, Any]:
    return {
        "name": item.provider.name,
        "count": item.provider.count,
        "rollout": _fit_json(item.rollout),
        "gradient": _fit_json(item.gradient),
        "rollout_tokens_per_s": item.speed.rollout,
        "gradient_tokens_per_s": item.speed.gradient,
        "estimated": item.speed.estimated,
        "unit_micros": {kind.value: cost for kind, cost in item.unit_micros.items()},
        "bids": [kind.value for kind in item.offered],
        "version_s": item.version_s,
        "base_s": item.base_s,
    }


def _fit_json(fit: Fit) -> dict[str, Any]:
    return {
        "fits": fit.fits,
        "needs_bytes": fit.needs_bytes,
        "has_bytes": fit.has_bytes,
        "nearest": [vars(remedy) for remedy in fit.remedies],
    }


def count(value: float) -> str:
    """A number of things, short: 1.2 k, 41.9 M, 8.03 G."""
    for suffix, unit in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= unit:
            return f"{value / unit:.3g} {suffix}"
    return f"{value:.3g}"


def size(size_bytes: float) -> str:
    """Bytes on a line, decimal."""
    return f"{count(size_bytes)}B" if size_bytes >= 1e3 else f"{size_bytes:.0f} B"


def seconds(value: float) -> str:
    """A time, in the unit people would say it in."""
    for limit, unit, name in ((1.0, 1e-3, "ms"), (600.0, 1.0, "s"), (7200.0, 60.0, "min")):
        if value < limit:
            return f"{value / unit:.3g} {name}"
    return f"{value / 3600:.3g} h"
