"""The whole plan of a job: what fits where, how long it takes, what it costs, what to change."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.protocol.job import JobSpec
from shoal.protocol.market import TaskKind
from shoal.protocol.money import Micros
from shoal.rl.capacity.advice import advise
from shoal.rl.capacity.fitting import fit_role
from shoal.rl.capacity.footprint import Role, Setup, footprint_of
from shoal.rl.capacity.pool import Pool, ProviderClass, speed_of
from shoal.rl.capacity.provisioning import (
    Crew,
    cheapest_crew,
    needed_rollout_speed,
    needed_staleness,
    time_job,
)
from shoal.rl.capacity.report import BudgetPlan, CapacityPlan, ClassPlan, PoolPlan
from shoal.rl.capacity.volume import Expectation, Volume, num_evaluations, volume_of

_HOUR_S = 3600.0


def plan_capacity(setup: Setup, expected: Expectation, pool: Pool | None) -> CapacityPlan:
    """The plan of ``setup`` if things go as ``expected``, on ``pool``."""
    volume = volume_of(setup, expected)
    budget = _budget(setup.spec)
    pooled = None if pool is None else _on_pool(setup, expected, volume, pool)
    return CapacityPlan(
        setup=setup,
        expected=expected,
        footprints=tuple(footprint_of(role, setup) for role in Role),
        volume=volume,
        budget=budget,
        pool=pooled,
        advice=tuple(advise(setup, volume, budget, pooled)),
    )


def _budget(spec: JobSpec) -> BudgetPlan:
    """Groups are paid to be sampled and to be differentiated, held-out prompts to be scored."""
    money, evaluation = spec.budget, spec.evaluation
    update = spec.groups_per_batch * (money.max_rollout_micros + money.max_gradient_micros)
    rounds = num_evaluations(spec.max_steps, evaluation.interval)
    score = rounds * evaluation.num_examples * money.max_evaluate_micros
    left = max(0, money.max_total_micros - score)
    return BudgetPlan(
        update_micros=Micros(update),
        job_micros=Micros(spec.max_steps * update + score),
        covered_steps=min(spec.max_steps, left // update),
    )


def _on_pool(setup: Setup, expected: Expectation, volume: Volume, pool: Pool) -> PoolPlan:
    classes = tuple(_class_plan(setup, expected, volume, p) for p in pool.providers)
    crews = [
        Crew(
            provider=item.provider,
            speed=item.speed,
            rollout=item.rollout.fits,
            gradient=item.gradient.fits,
        )
        for item in classes
        if item.rollout.fits or item.gradient.fits
    ]
    learner = fit_role(Role.LEARNER, setup, pool.learner.usable_bytes)
    able = any(crew.rollout for crew in crews) and any(crew.gradient for crew in crews)
    timing = time_job(setup.spec, volume, crews, pool.learner) if able else None
    needed = 0.0 if timing is None else needed_rollout_speed(volume, timing)
    chosen = cheapest_crew(crews, needed)
    job_hours = 0.0 if timing is None else timing.job_s / _HOUR_S
    return PoolPlan(
        classes=classes,
        learner=learner,
        timing=timing,
        needed_tokens_per_s=needed,
        pool_tokens_per_s=sum(c.provider.count * c.speed.rollout for c in crews if c.rollout),
        needed_staleness=0 if timing is None else needed_staleness(setup.spec, timing),
        cheapest=tuple((crew.provider.name, count) for crew, count in chosen),
        cheapest_micros=_rent([(crew.provider, count) for crew, count in chosen], job_hours),
        pool_micros=_rent([(crew.provider, crew.provider.count) for crew in crews], job_hours),
    )


def _rent(machines: Sequence[tuple[ProviderClass, int]], hours: float) -> Micros:
    return Micros(round(sum(p.price_per_hour_micros * count for p, count in machines) * hours))


def _class_plan(
    setup: Setup, expected: Expectation, volume: Volume, provider: ProviderClass
) -> ClassPlan:
    speed = speed_of(provider, setup, expected)
    second = provider.price_per_hour_micros / _HOUR_S
    units = {
        kind.kind: second
        * kind.tokens
        / max(kind.units, 1)
        / (speed.gradient if kind.kind is TaskKind.GRADIENT else speed.rollout)
        for kind in volume.kinds
    }
    reserve = reserves(setup.spec)
    return ClassPlan(
        provider=provider,
        speed=speed,
        rollout=fit_role(Role.ROLLOUT, setup, provider.usable_bytes),
        gradient=fit_role(Role.GRADIENT, setup, provider.usable_bytes),
        unit_micros=units,
        below_reserve=tuple(kind for kind in units if units[kind] <= reserve[kind]),
        version_s=volume.version_bytes * 8e-6 / provider.down_mbps,
        base_s=setup.shape.stored_bytes * 8e-6 / provider.down_mbps,
    )


def reserves(spec: JobSpec) -> dict[TaskKind, int]:
    """The most the job pays for a unit of each kind, in micros."""
    return {
        TaskKind.ROLLOUT: spec.budget.max_rollout_micros,
        TaskKind.GRADIENT: spec.budget.max_gradient_micros,
        TaskKind.EVALUATE: spec.budget.max_evaluate_micros,
    }
