"""How long an update takes on a pool, what bounds it, and how few machines keep it going.

Version ``b + 1`` needs the gradients of batch ``b``, which need version ``b``; batch ``b``
needs version ``b − η``, with η the job's ``max_staleness``.  So the time between updates is
at least each of

- *work*: all tokens of an update over the speed of all machines;
- *gradient*: version out, gradients back, update made: a loop of one update;
- *loop*: version out, rollouts, gradients, update, over the η + 1 updates it may span;
- *line*: what the orchestrator's own line carries for an update.

Source: the overlap rule of Echo-2 (arXiv 2602.02192): the pool must deliver μ ≥ B/T, and the
data's age κ + ⌈D/T⌉ + queue/B must stay within the staleness allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from shoal.protocol.job import JobSpec
from shoal.rl.capacity.pool import LearnerMachine, ProviderClass, Speed
from shoal.rl.capacity.volume import KindVolume, Volume

HEADROOM = 1.1
"""How much faster than needed the rollouts should be, so that a machine may drop out."""
_TOLERANCE = 1e-9


class Bound(StrEnum):
    """What keeps updates from coming faster."""

    WORK = "work"
    GRADIENT = "gradient"
    LOOP = "loop"
    LINE = "line"


@dataclass(frozen=True, kw_only=True)
class Crew:
    """Machines of one class, with what they can do on this job."""

    provider: ProviderClass
    speed: Speed
    rollout: bool
    gradient: bool

    def transfer_s(self, up_bytes: float, down_bytes: float) -> float:
        """Seconds one of them needs to send and fetch."""
        bits = 8e-6
        return up_bytes * bits / self.provider.up_mbps + down_bytes * bits / self.provider.down_mbps


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of an update, part by part, and of the job.

    ``bounds_s`` are the four bounds; ``update_s`` is the largest.  ``rollout_s`` and
    ``gradient_s`` run from a version being published to the last result being in.
    """

    update_s: float
    bound: Bound
    bounds_s: dict[Bound, float]
    rollout_s: float
    gradient_s: float
    dissemination_s: float
    job_s: float


def time_job(
    spec: JobSpec, volume: Volume, crews: Sequence[Crew], learner: LearnerMachine
) -> Timing:
    """How long the job takes on ``crews``, of which some can roll out and some differentiate."""
    delays = {id(crew): crew.transfer_s(0, volume.version_bytes) for crew in crews}
    rollout_s = _finish_s(volume.rollout, crews, delays)
    gradient_s = _finish_s(volume.gradient, crews, delays)
    ready_s = _finish_s(volume.gradient, crews, dict.fromkeys(delays, 0.0))
    bounds = {
        Bound.WORK: _work_s(spec, volume, crews),
        Bound.GRADIENT: gradient_s + learner.update_s,
        Bound.LOOP: (rollout_s + ready_s + learner.update_s) / (spec.max_staleness + 1),
        Bound.LINE: _line_s(spec, volume, crews, learner),
    }
    bound = max(bounds, key=lambda name: bounds[name])
    update_s = bounds[bound]
    # The first batch has nothing to overlap with.
    start_s = rollout_s if spec.max_staleness else 0.0
    return Timing(
        update_s=update_s,
        bound=bound,
        bounds_s=bounds,
        rollout_s=rollout_s,
        gradient_s=gradient_s,
        dissemination_s=max(delays.values()),
        job_s=start_s + spec.max_steps * update_s,
    )


def needed_rollout_speed(volume: Volume, timing: Timing) -> float:
    """Completion tokens per second that keep the learner fed: B/T of Echo-2's rule."""
    return volume.rollout.tokens / max(timing.bounds_s[Bound.GRADIENT], _TOLERANCE)


def needed_staleness(spec: JobSpec, timing: Timing) -> int:
    """The least ``max_staleness`` at which waiting for rollouts costs no time.

    Echo-2's rule κ + ⌈D/T⌉ + queue/B ≤ S with κ = 1, counted from 0 for synchronous, and
    the queue what is rolled out meanwhile.
    """
    loop_s = timing.bounds_s[Bound.LOOP] * (spec.max_staleness + 1)
    others_s = max(s for bound, s in timing.bounds_s.items() if bound is not Bound.LOOP)
    return max(0, math.ceil(loop_s / max(others_s, _TOLERANCE) - 1e-6) - 1)


def cheapest_crew(crews: Sequence[Crew], needed: float) -> list[tuple[Crew, int]]:
    """The machines, cheapest per token first, that together roll out ``needed`` with headroom.

    Fewer where the pool has no more.  Source: Echo-2, activation by price over speed.
    """
    able = sorted(
        (crew for crew in crews if crew.rollout),
        key=lambda crew: crew.provider.price_per_hour_micros / crew.speed.rollout,
    )
    missing, chosen = needed * HEADROOM, []
    for crew in able:
        count = min(crew.provider.count, math.ceil(missing / crew.speed.rollout))
        if count > 0:
            chosen.append((crew, count))
            missing -= count * crew.speed.rollout
    return chosen


def finish_s(num_tasks: int, machines: Sequence[tuple[int, float, float]]) -> float:
    """When the last of ``num_tasks`` equal tasks is done, each machine taking the next one.

    Args:
        num_tasks: At least one.
        machines: How many, when they can start, seconds for a task.
    """
    return _smallest(
        lambda until_s: (
            sum(
                count * math.floor((until_s - start_s) / task_s + _TOLERANCE)
                for count, start_s, task_s in machines
                if until_s > start_s
            )
            >= num_tasks
        ),
        min(start_s + task_s for _, start_s, task_s in machines),
    )


def _finish_s(kind: KindVolume, crews: Sequence[Crew], delays: dict[int, float]) -> float:
    gradient = kind.kind == "gradient"
    machines = []
    for crew in crews:
        if not (crew.gradient if gradient else crew.rollout):
            continue
        speed = crew.speed.gradient if gradient else crew.speed.rollout
        task_s = kind.tokens / kind.tasks / speed
        task_s += crew.transfer_s(kind.up_bytes, kind.down_bytes)
        machines.append((crew.provider.count, delays[id(crew)], task_s))
    return finish_s(kind.tasks, machines)


def _work_s(spec: JobSpec, volume: Volume, crews: Sequence[Crew]) -> float:
    """The least time in which the pool does an update's tokens, shared out as suits it best.

    Gradients go to the machines that are best at them relative to rollouts.
    """
    evaluations = volume.evaluate.tokens * volume.evaluate.rounds / spec.max_steps
    sampled = volume.rollout.tokens + evaluations
    ranked = sorted(
        crews,
        key=lambda crew: crew.speed.gradient / crew.speed.rollout if crew.rollout else math.inf,
        reverse=True,
    )

    def enough(within_s: float) -> bool:
        left, done = volume.gradient.tokens, 0.0
        for crew in ranked:
            share = 0.0
            if crew.gradient and left > 0:
                capacity = crew.provider.count * crew.speed.gradient * within_s
                share = min(1.0, left / capacity)
                left -= share * capacity
            if crew.rollout:
                done += (1 - share) * crew.provider.count * crew.speed.rollout * within_s
        return left <= _TOLERANCE and done >= sampled * (1 - _TOLERANCE)

    return _smallest(enough, 1e-9)


def _line_s(spec: JobSpec, volume: Volume, crews: Sequence[Crew], learner: LearnerMachine) -> float:
    """Seconds the orchestrator's line is busy for one update.

    A version goes to each machine that has a task of it.
    """
    machines = sum(crew.provider.count for crew in crews)
    tasks = volume.rollout.tasks * (spec.max_staleness + 1) + volume.gradient.tasks
    copies = min(machines, tasks)
    out = copies * volume.version_bytes + volume.gradient.tasks * volume.gradient.down_bytes
    back = sum(kind.tasks * kind.up_bytes for kind in (volume.rollout, volume.gradient))
    return max(out * 8e-6 / learner.up_mbps, back * 8e-6 / learner.down_mbps)


def _smallest(enough: Callable[[float], bool], low: float) -> float:
    """The least value, to a millionth, at which ``enough`` holds; it must hold at some."""
    if enough(low):
        return low
    high = low * 2
    while not enough(high):
        low, high = high, high * 2
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
