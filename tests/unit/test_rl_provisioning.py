"""How long a job takes on a pool, what bounds it, and which machines to take."""

from __future__ import annotations

import heapq
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from learning_fixtures import make_spec

from shoal.protocol.job import BudgetSpec, SamplingSpec, TaskSizes
from shoal.protocol.learning import LoraSpec
from shoal.protocol.market import TaskKind
from shoal.rl.capacity.footprint import BaseFormat, Setup
from shoal.rl.capacity.known_models import find_shape
from shoal.rl.capacity.plan import plan_capacity
from shoal.rl.capacity.pool import LearnerMachine, Pool, ProviderClass, speed_of
from shoal.rl.capacity.provisioning import (
    HEADROOM,
    Bound,
    Crew,
    cheapest_crew,
    finish_s,
    needed_rollout_speed,
    needed_staleness,
    time_job,
)
from shoal.rl.capacity.report import CapacityPlan
from shoal.rl.capacity.volume import Expectation, Volume, volume_of

EXPECTED = Expectation(prompt_tokens=10, completion_tokens=100)


def provider(name: str = "card", **fields: Any) -> ProviderClass:
    defaults: dict[str, Any] = {
        "count": 1,
        "memory_gib": 80.0,
        "up_mbps": 1e6,
        "down_mbps": 1e6,
        "price_per_hour_micros": 1_000_000,
        "rollout_tokens_per_s": 1000.0,
        "gradient_tokens_per_s": 2000.0,
    }
    return ProviderClass(name=name, **{**defaults, **fields})


def setup(**changes: Any) -> Setup:
    spec = make_spec(
        **{
            "batch_size": 64,
            "rollouts_per_example": 8,
            "lora": LoraSpec(r=16),
            "sampling": SamplingSpec(max_tokens=100),
            "tasks": TaskSizes(rollout=1, gradient=1),
            "max_steps": 100,
            **changes,
        }
    )
    return Setup(shape=find_shape("1B"), spec=spec, prompt_tokens=10)


def crew(machine: ProviderClass, job: Setup, rollout: bool = True, gradient: bool = True) -> Crew:
    return Crew(
        provider=machine,
        speed=speed_of(machine, job, EXPECTED),
        rollout=rollout,
        gradient=gradient,
    )


def free_evaluations(volume: Volume) -> Volume:
    return replace(volume, evaluate=replace(volume.evaluate, tokens=0.0))


LEARNER = LearnerMachine(up_mbps=1e6, down_mbps=1e6, update_s=0.0)


def test_one_machine_does_rollouts_and_gradients_one_after_the_other() -> None:
    job = setup()
    volume = free_evaluations(volume_of(job, EXPECTED))
    timing = time_job(job.spec, volume, [crew(provider(), job)], LEARNER)
    assert timing.bound is Bound.WORK
    assert timing.update_s == pytest.approx(6400 / 1000 + 6400 / 2000, rel=1e-3)
    assert timing.job_s == pytest.approx(100 * timing.update_s + timing.rollout_s)


def test_gradients_go_to_the_machines_that_are_best_at_them() -> None:
    job = setup()
    volume = free_evaluations(volume_of(job, EXPECTED))
    sampler = crew(provider("sampler", gradient_tokens_per_s=10.0), job)
    trainer = crew(provider("trainer", rollout_tokens_per_s=1.0, gradient_tokens_per_s=2e4), job)
    timing = time_job(job.spec, volume, [sampler, trainer], LEARNER)
    assert timing.bounds_s[Bound.WORK] == pytest.approx(6.4, rel=1e-2)


def test_evaluations_are_part_of_the_work() -> None:
    job = setup()
    volume = volume_of(job, EXPECTED)
    alone = [crew(provider(), job)]
    with_them = time_job(job.spec, volume, alone, LEARNER).bounds_s[Bound.WORK]
    without = time_job(job.spec, free_evaluations(volume), alone, LEARNER).bounds_s[Bound.WORK]
    rounds = volume.evaluate.rounds * volume.evaluate.tokens / job.spec.max_steps / 1000
    assert with_them - without == pytest.approx(rounds, rel=1e-3)


def test_staleness_hides_what_waiting_costs_and_synchronous_pays_it() -> None:
    many = provider(count=100)
    updates = {}
    for staleness in (0, 1, 3):
        job = setup(max_staleness=staleness)
        volume = volume_of(job, EXPECTED)
        timing = time_job(job.spec, volume, [crew(many, job)], LEARNER)
        updates[staleness] = timing.update_s
        if staleness == 0:
            assert timing.bound is Bound.LOOP
            # A rollout and a gradient of one group, and the version between them.
            assert timing.update_s == pytest.approx(0.8 + 0.4, rel=0.02)
            assert needed_staleness(job.spec, timing) == 2
    assert updates[0] > updates[1] > updates[3]
    assert updates[3] == pytest.approx(0.4, rel=0.05)


def test_slow_lines_show_in_the_gradient_bound_and_a_slow_learner_in_the_line() -> None:
    job = setup()
    volume = volume_of(job, EXPECTED)
    slow = crew(provider(count=100, up_mbps=20.0), job)
    timing = time_job(job.spec, volume, [slow], LEARNER)
    assert timing.bound is Bound.GRADIENT
    assert timing.gradient_s == pytest.approx(volume.gradient.up_bytes * 8e-6 / 20, rel=0.05)
    narrow = LearnerMachine(up_mbps=10.0, down_mbps=1e6, update_s=0.0)
    timing = time_job(job.spec, volume, [crew(provider(count=100), job)], narrow)
    assert timing.bound is Bound.LINE
    assert timing.update_s > 16 * volume.version_bytes * 8e-6 / 10


def test_the_learners_own_time_counts_in_every_loop() -> None:
    job = setup()
    volume = volume_of(job, EXPECTED)
    crews = [crew(provider(count=100), job)]
    waiting = LearnerMachine(up_mbps=1e6, down_mbps=1e6, update_s=5.0)
    quick = time_job(job.spec, volume, crews, LEARNER).bounds_s
    slow = time_job(job.spec, volume, crews, waiting).bounds_s
    assert slow[Bound.GRADIENT] == pytest.approx(quick[Bound.GRADIENT] + 5)
    assert slow[Bound.LOOP] == pytest.approx(quick[Bound.LOOP] + 2.5)


def test_the_learner_is_fed_by_the_cheapest_machines() -> None:
    job = setup()
    volume = volume_of(job, EXPECTED)
    dear = crew(provider("dear", count=9), job)
    cheap = crew(provider("cheap", count=3, price_per_hour_micros=10_000), job)
    unable = crew(provider("unable", price_per_hour_micros=1), job, rollout=False)
    chosen = cheapest_crew([dear, cheap, unable], 5000)
    assert [(c.provider.name, count) for c, count in chosen] == [("cheap", 3), ("dear", 3)]
    assert sum(count * c.speed.rollout for c, count in chosen) >= 5000 * HEADROOM
    assert cheapest_crew([cheap], 1e9) == [(cheap, 3)]
    timing = time_job(job.spec, volume, [dear], LEARNER)
    needed = volume.rollout.tokens / timing.bounds_s[Bound.GRADIENT]
    assert needed_rollout_speed(volume, timing) == pytest.approx(needed)


machines = st.lists(
    st.tuples(st.integers(1, 4), st.integers(0, 20).map(float), st.integers(1, 20).map(float)),
    min_size=1,
    max_size=4,
)


@given(st.integers(1, 40), machines)
def test_equal_tasks_end_when_each_machine_takes_the_next_one(
    num_tasks: int, machines: list[tuple[int, float, float]]
) -> None:
    free = [(start + task, task) for count, start, task in machines for _ in range(count)]
    heapq.heapify(free)
    ended = 0.0
    for _ in range(num_tasks):
        ended, task = heapq.heappop(free)
        heapq.heappush(free, (ended + task, task))
    assert finish_s(num_tasks, machines) == pytest.approx(ended, rel=1e-5)


# --- estimated speeds ---------------------------------------------------------------------


def nominal(**fields: Any) -> ProviderClass:
    return provider(rollout_tokens_per_s=None, gradient_tokens_per_s=None, **fields)


def test_a_single_stream_on_an_a100_is_as_fast_as_measured() -> None:
    """Source: 75 tokens/s of Llama-3.1-8B in bf16, vLLM on an A100 40GB, one request."""
    a100 = nominal(fp32_tflops=19.5, bf16_tflops=312.0, bandwidth_gb_s=1555.0)
    single = replace(setup(batch_size=2, rollouts_per_example=2), shape=find_shape("8B"))
    single = replace(single, base=BaseFormat.BF16)
    one_row = single.spec.model_copy(update={"batch_size": 1, "rollouts_per_example": 1})
    speed = speed_of(a100, replace(single, spec=one_row), EXPECTED)
    assert speed.estimated
    assert speed.rollout == pytest.approx(75, rel=0.1)


def test_batches_amortise_the_weights_until_arithmetic_binds() -> None:
    card = nominal(fp32_tflops=80.0, bandwidth_gb_s=1000.0)
    speeds = []
    for rows in (2, 8, 32, 128):
        job = setup(batch_size=rows, rollouts_per_example=2, tasks=TaskSizes(rollout=64))
        speeds.append(speed_of(card, job, EXPECTED).rollout)
    assert speeds[1] / speeds[0] == pytest.approx(4, rel=0.1)
    assert speeds[3] / speeds[2] < 4
    peak = 80e12 * 0.4 / (2 * find_shape("1B").active_parameters)
    assert max(speeds) < peak


def test_full_tuning_and_kl_make_gradients_dearer() -> None:
    card = nominal(fp32_tflops=80.0, bandwidth_gb_s=1000.0)
    lora = speed_of(card, setup(), EXPECTED).gradient
    full = speed_of(card, setup(lora=None), EXPECTED).gradient
    kl = make_spec().loss.model_copy(update={"kl_beta": 0.1})
    assert lora / full == pytest.approx(1.5)
    assert lora / speed_of(card, setup(loss=kl), EXPECTED).gradient == pytest.approx(1.5)


# --- the whole plan -----------------------------------------------------------------------


def planned(job: Setup, *machines: ProviderClass) -> CapacityPlan:
    return plan_capacity(job, EXPECTED, Pool(learner=LEARNER, providers=machines))


def test_money_is_counted_in_units() -> None:
    budget = BudgetSpec(
        max_total_micros=1_000_000,
        max_rollout_micros=1000,
        max_gradient_micros=500,
        max_evaluate_micros=10,
    )
    plan = plan_capacity(setup(budget=budget), EXPECTED, None)
    assert plan.budget.update_micros == 8 * 1500
    scores = plan.volume.evaluate.rounds * 8 * 10
    assert plan.budget.job_micros == 100 * 12_000 + scores
    assert plan.budget.covered_steps == (1_000_000 - scores) // 12_000
    assert any("would cover 83 of 100 updates" in sentence for sentence in plan.advice)
    assert plan.pool is None


def test_a_machine_that_costs_more_than_it_is_paid_does_not_bid() -> None:
    budget = BudgetSpec(
        max_total_micros=10**9,
        max_rollout_micros=300,
        max_gradient_micros=100,
        max_evaluate_micros=1,
    )
    plan = planned(setup(budget=budget), provider())
    assert plan.pool is not None
    (item,) = plan.pool.classes
    # A group of 800 tokens takes 0.8 s and 0.4 s at a dollar an hour.
    assert item.unit_micros[TaskKind.ROLLOUT] == pytest.approx(800 / 1000 * 1e6 / 3600)
    assert item.offered == (TaskKind.ROLLOUT,)
    assert any("will not bid for gradient" in sentence for sentence in plan.advice)


@pytest.mark.parametrize(
    ("job", "machines", "expected"),
    [
        (setup(), [provider()], "The machines' speed bounds the job"),
        (setup(), [provider(count=100, up_mbps=20.0)], "The gradients bound the job: 8 slices"),
        (setup(max_staleness=0), [provider(count=100)], "max_staleness = 2 lets rollouts overlap"),
        (
            setup(tasks=TaskSizes(rollout=8, gradient=1)),
            [provider(count=100)],
            "tasks.rollout = 1 gives each",
        ),
        (setup(), [provider(memory_gib=2.0)], "No provider of the pool can do a rollout task"),
        (setup(), [provider(count=100, up_mbps=20.0)], 'gradient.codec = "int8"'),
        (
            setup(sampling=SamplingSpec(max_tokens=131_072)),
            [provider()],
            "exceed the model's context of 131072",
        ),
    ],
)
def test_advice_says_what_to_change(
    job: Setup, machines: list[ProviderClass], expected: str
) -> None:
    plan = planned(job, *machines)
    assert any(expected in sentence for sentence in plan.advice), plan.advice


def test_an_orchestrator_that_is_slow_itself_is_named() -> None:
    slow = Pool(learner=LearnerMachine(update_s=60.0), providers=(provider(count=100),))
    plan = plan_capacity(setup(), EXPECTED, slow)
    assert any("own work bounds the job: 60 s" in sentence for sentence in plan.advice)


def test_a_pool_that_cannot_do_the_job_has_no_timing() -> None:
    plan = planned(setup(), provider(memory_gib=2.0))
    assert plan.pool is not None
    assert plan.pool.timing is None
    assert (plan.pool.pool_micros, plan.pool.cheapest) == (0, ())
    assert math.isfinite(plan.pool.needed_tokens_per_s)


def test_sentences_end_as_sentences_do() -> None:
    for job in (setup(), setup(max_staleness=0), setup(tasks=TaskSizes(rollout=8))):
        for machine in (provider(), provider(count=100, up_mbps=20.0), provider(memory_gib=2.0)):
            assert all(s.endswith(".") and "\n" not in s for s in planned(job, machine).advice)
