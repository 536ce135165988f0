"""What a plan's figures mean, one sentence each: what bounds the job, and what to change."""

from __future__ import annotations

from collections.abc import Iterator

from shoal.protocol.learning import CodecKind, CodecSpec
from shoal.protocol.market import TaskKind
from shoal.protocol.money import Micros, format_dollars
from shoal.rl import codec
from shoal.rl.capacity.fitting import gib
from shoal.rl.capacity.footprint import SAMPLING_MAX_CACHE_BYTES, Setup
from shoal.rl.capacity.provisioning import Bound, Timing
from shoal.rl.capacity.report import BudgetPlan, PoolPlan
from shoal.rl.capacity.volume import Volume

MOST_STALENESS = 4
"""Learning with the default correction holds up to here.  Source: AReaL, arXiv 2505.24298
table 2, and our own runs."""
_SMALL_CODEC = CodecSpec(kind=CodecKind.INT8)
_LONG_TRANSFER = 0.5
_NOTICED = 0.1


def advise(
    setup: Setup, volume: Volume, budget: BudgetPlan, pool: PoolPlan | None
) -> Iterator[str]:
    """Sentences in the order in which they matter."""
    yield from _context(setup)
    yield from _money(setup, budget)
    if pool is None:
        return
    yield from _unable(pool)
    if pool.timing is not None:
        yield _bottleneck(setup, volume, pool, pool.timing)
        yield from _idle(setup, volume, pool)
        yield from _transfers(setup, volume, pool, pool.timing)
    yield from _dear(setup, pool)


def _context(setup: Setup) -> Iterator[str]:
    longest = setup.prompt_tokens + setup.spec.sampling.max_tokens
    if longest > setup.shape.context_tokens:
        yield (
            f"A prompt of {setup.prompt_tokens} and a completion of "
            f"{setup.spec.sampling.max_tokens} tokens exceed the model's context of "
            f"{setup.shape.context_tokens}; lower sampling.max_tokens."
        )
    if setup.row_cache_bytes > SAMPLING_MAX_CACHE_BYTES:
        fitting = longest * SAMPLING_MAX_CACHE_BYTES // setup.row_cache_bytes
        yield (
            f"One completion's keys and values take {gib(setup.row_cache_bytes)}, and workers "
            f"hold {gib(SAMPLING_MAX_CACHE_BYTES)}; prompt and sampling.max_tokens together may "
            f"have {fitting} tokens."
        )


def _money(setup: Setup, budget: BudgetPlan) -> Iterator[str]:
    total = setup.spec.budget.max_total_micros
    if budget.update_micros > total:
        yield (
            f"The budget of ${format_dollars(total)} does not cover one update at the most it "
            f"pays (${format_dollars(budget.update_micros)}); raise max_total or lower "
            "max_unit_price."
        )
    elif budget.covered_steps < setup.spec.max_steps:
        yield (
            f"If every unit cost the most it may, the budget of ${format_dollars(total)} would "
            f"cover {budget.covered_steps} of {setup.spec.max_steps} updates; "
            f"${format_dollars(_cents_up(budget.job_micros))} covers all."
        )


def _cents_up(micros: int) -> Micros:
    return Micros(-(-micros // 10_000) * 10_000)


def _unable(pool: PoolPlan) -> Iterator[str]:
    for kind in (TaskKind.ROLLOUT, TaskKind.GRADIENT):
        fits = [getattr(item, kind) for item in pool.classes]
        if any(fit.fits for fit in fits):
            continue
        least = min(fits, key=lambda fit: fit.needs_bytes - fit.has_bytes)
        name = pool.classes[fits.index(least)].provider.name
        yield f"No provider of the pool can do a {kind} task; {name} comes nearest: it " + (
            least.sentence() + "."
        )
    if not pool.learner.fits:
        yield f"The orchestrator's machine {pool.learner.sentence()}."


def _bottleneck(setup: Setup, volume: Volume, pool: PoolPlan, timing: Timing) -> str:
    spec = setup.spec
    match timing.bound:
        case Bound.WORK:
            return "The machines' speed bounds the job: more of them, or faster ones, shorten it."
        case Bound.GRADIENT if _own_s(timing) > timing.gradient_s:
            return (
                f"The orchestrator's own work bounds the job: {_seconds(_own_s(timing))} for each "
                "update (update_s); larger batches have fewer of them."
            )
        case Bound.GRADIENT:
            return (
                f"The gradients bound the job: {volume.gradient.tasks} slices take "
                f"{_seconds(timing.gradient_s)} with their transfers; smaller ones "
                "(tasks.gradient) spread over more machines, and more rollouts would not help."
            )
        case Bound.LOOP:
            raised = min(pool.needed_staleness, MOST_STALENESS)
            remedy = (
                f"max_staleness = {raised} lets rollouts overlap with it"
                if raised > spec.max_staleness
                else "smaller tasks (tasks.rollout) shorten it"
            )
            return (
                f"Waiting bounds the job: a version goes out, its rollouts come back and are "
                f"learnt from in {_seconds(timing.bounds_s[Bound.LOOP] * (spec.max_staleness + 1))}"
                f"; {remedy}."
            )
        case Bound.LINE:
            return (
                "The orchestrator's own line bounds the job; give it more Mb/s, a smaller "
                "adapter (lora.r) or a smaller codec ([gradient])."
            )


def _own_s(timing: Timing) -> float:
    """What the orchestrator takes for an update beside the gradients."""
    return timing.bounds_s[Bound.GRADIENT] - timing.gradient_s


def _idle(setup: Setup, volume: Volume, pool: PoolPlan) -> Iterator[str]:
    """Machines beyond the number of tasks find nothing to do."""
    machines = sum(item.provider.count for item in pool.classes if item.rollout.fits)
    batches = setup.spec.max_staleness + 1
    tasks = volume.rollout.tasks * batches
    if machines > tasks and setup.spec.tasks.rollout > 1:
        size = max(1, volume.rollout.units * batches // machines)
        yield (
            f"Only {tasks} rollout tasks are out at once and {machines} machines could take one; "
            f"tasks.rollout = {size} gives each of them work."
        )


def _transfers(setup: Setup, volume: Volume, pool: PoolPlan, timing: Timing) -> Iterator[str]:
    spec = setup.spec.gradient.codec
    for item in pool.classes:
        if not item.gradient.fits:
            continue
        up_s = volume.gradient.up_bytes * 8e-6 / item.provider.up_mbps
        work_s = volume.gradient.tokens / volume.gradient.tasks / item.speed.gradient
        smaller = codec.wire_bytes(_SMALL_CODEC, setup.trained_values)
        long = up_s > _LONG_TRANSFER * work_s and up_s > _NOTICED * timing.update_s
        if long and smaller * 2 < volume.gradient.up_bytes:
            yield (
                f"{item.provider.name} takes {_seconds(up_s)} to send a gradient in "
                f'"{spec.kind}" that it computes in {_seconds(work_s)}; gradient.codec = "int8" '
                f'sends a quarter, "topk" a thirtieth or less.'
            )
            return


def _dear(setup: Setup, pool: PoolPlan) -> Iterator[str]:
    """Providers whose machines cost more than the job pays for what they do."""
    for item in pool.classes:
        kinds = [kind for kind in TaskKind if item.can_do(kind) and kind not in item.below_reserve]
        if kinds and item.provider.price_per_hour_micros:
            kind = kinds[0]
            cost = Micros(int(item.unit_micros[kind]) + 1)
            yield (
                f"{item.provider.name} will not bid for {kind} at its own price: a unit costs it "
                f"${format_dollars(cost)}, more than budget.max_unit_price.{kind}."
            )


def _seconds(value: float) -> str:
    if value < 1:
        return f"{1000 * value:.3g} ms"
    return f"{value:.3g} s" if value < 600 else f"{value / 60:.3g} min"
