"""What a plan consists of: its figures, without how they are found."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.protocol.market import TaskKind
from shoal.protocol.money import Micros
from shoal.rl.capacity.fitting import Fit
from shoal.rl.capacity.footprint import Footprint, Setup
from shoal.rl.capacity.pool import ProviderClass, Speed
from shoal.rl.capacity.provisioning import Timing
from shoal.rl.capacity.volume import Expectation, Volume


@dataclass(frozen=True, kw_only=True)
class ClassPlan:
    """What one class of providers can do for the job.

    ``unit_micros`` is what a unit of each kind costs the provider at its own price;
    ``below_reserve`` names the kinds it can offer at no more than the job pays.
    """

    provider: ProviderClass
    speed: Speed
    rollout: Fit
    gradient: Fit
    unit_micros: dict[TaskKind, float]
    below_reserve: tuple[TaskKind, ...]
    version_s: float
    base_s: float

    @property
    def offered(self) -> tuple[TaskKind, ...]:
        """The kinds it can do, and at a price the job pays."""
        return tuple(kind for kind in self.below_reserve if self.can_do(kind))

    @property
    def group_micros(self) -> float:
        """What sampling and differentiating one group costs the provider."""
        return self.unit_micros[TaskKind.ROLLOUT] + self.unit_micros[TaskKind.GRADIENT]

    def can_do(self, kind: TaskKind) -> bool:
        """Whether the memory suffices for tasks of this kind."""
        return self.gradient.fits if kind is TaskKind.GRADIENT else self.rollout.fits


@dataclass(frozen=True, kw_only=True)
class BudgetPlan:
    """The job's money: what it costs at most, and how far the budget reaches at that."""

    update_micros: Micros
    job_micros: Micros
    covered_steps: int


@dataclass(frozen=True, kw_only=True)
class PoolPlan:
    """The job on a pool; ``timing`` is absent when no machine can do one of its tasks.

    ``cheapest`` are the machines that keep the learner fed at the lowest price.
    """

    classes: tuple[ClassPlan, ...]
    learner: Fit
    timing: Timing | None
    needed_tokens_per_s: float
    pool_tokens_per_s: float
    needed_staleness: int
    cheapest: tuple[tuple[str, int], ...]
    cheapest_micros: Micros
    pool_micros: Micros


@dataclass(frozen=True, kw_only=True)
class CapacityPlan:
    """Everything `shoal plan` says; ``pool`` is absent without a pool file."""

    setup: Setup
    expected: Expectation
    footprints: tuple[Footprint, ...]
    volume: Volume
    budget: BudgetPlan
    pool: PoolPlan | None
    advice: tuple[str, ...]
