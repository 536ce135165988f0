"""Who does the work: learned bids, with speeds, failures, crashes and cheats, as one ladder."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from shoal.market.capacity import AuditTerms, stake_up
from shoal.market.simulation.counterfactual import books_of
from shoal.market.simulation.learning import Learned
from shoal.market.simulation.population import Ints, Population
from shoal.market.simulation.rules import PayRule
from shoal.market.simulation.work import Audit, Ladder, WorkDone, do_work
from shoal.protocol.errors import InvalidRequest

# A unit's median time, and how providers differ in it.
MEDIAN_SECONDS = 30.0
SPEED_SIGMA = 0.4
# Failures of an honest provider: the mean of Beta(1, 40) is 2.4 % of its units.
_FAILURE_BETA = (1.0, 40.0)


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What goes wrong, as shares of the providers, and how cheating is looked for."""

    crash_share: float = 0.1
    cheat_share: float = 0.05
    audit: Audit = field(default_factory=Audit)

    def __post_init__(self) -> None:
        shares = (self.crash_share, self.cheat_share, self.audit.rate, self.audit.power)
        if not all(0 <= share <= 1 for share in shares) or not self.audit.rate * self.audit.power:
            raise InvalidRequest(
                "Shares of crashed and cheating providers, audits and what they see lie from 0 "
                f"to 1, the last two above 0; this simulation has {shares}.",
                code="bad_scenario",
            )


@dataclass(frozen=True, kw_only=True)
class Shift:
    """One job worked off twice: as it was, and with nobody crashing or cheating.

    ``rungs`` are the providers from the first rung to the last.
    """

    rungs: Ints
    done: WorkDone
    clean: WorkDone
    cheats: np.ndarray[tuple[int], np.dtype[np.bool_]]
    num_crashed: int

    @property
    def makespan_ratio(self) -> float:
        """How many times longer it took for the crashes and cheats."""
        return self.done.makespan_s / self.clean.makespan_s

    @property
    def cheaters_ahead(self) -> int:
        """Cheaters who were paid, all told, more than they lost."""
        return int((self.done.cheater_profit_micros > 0).sum())


def work_off(
    population: Population,
    learned: Learned,
    rule: PayRule,
    num_units: int,
    *,
    faults: Faults,
    market: int = 0,
    seed: int = 0,
) -> Shift:
    """The units are worked off by the bidders of one market, with and without faults.

    As many units are under way at once as a lot has.  Crashes come evenly over the clean
    makespan.  A cheater has no cost, so it asks less than everybody and works as much as it
    can; its stake is what the capacity bound demands at the reserve.
    """
    crew = _Crew(population, learned, rule, faults, market, seed)
    at_once = int(population.num_units[market])

    def worked(ladder: Ladder) -> WorkDone:
        return do_work(ladder, num_units, at_once=at_once, audit=faults.audit, seed=seed)

    clean = worked(crew.honest_ladder())
    faulty = crew.faulty_ladder(clean.makespan_s)
    return Shift(
        rungs=crew.order,
        done=worked(faulty),
        clean=clean,
        cheats=faulty.cheats,
        num_crashed=int(np.isfinite(faulty.crash_at_s).sum()),
    )


class _Crew:
    """The bidders of one market, as rungs, with what nature gave each of them."""

    def __init__(
        self,
        population: Population,
        learned: Learned,
        rule: PayRule,
        faults: Faults,
        market: int,
        seed: int,
    ) -> None:
        rng = np.random.default_rng([seed, 4])
        n = population.num_providers
        cheats = _some(n, faults.cheat_share, rng)
        crashes = _some(n, faults.crash_share, rng)
        seconds = MEDIAN_SECONDS * rng.lognormal(0.0, SPEED_SIGMA, n)
        failure = rng.beta(*_FAILURE_BETA, n)
        crash_at = np.where(crashes, rng.random(n), np.inf)
        books = books_of(population, learned.last_actions)
        asked, reserve = books.adjusted_micros[market], int(population.reserve_micros[market])
        price = np.where(cheats, max(1, int(asked.min()) - 1), asked)
        capacity = np.where(cheats, population.most_units[market], books.units[market])
        order = np.lexsort((population.tie_rank[market], price))
        self.order = order = order[price[order] <= reserve]
        self._crash_at = crash_at[order]
        price, capacity = price[order], capacity[order]
        clearing = _clearing_price(price, capacity, int(population.num_units[market]), reserve)
        terms = AuditTerms(
            audit_permille=max(1, round(faults.audit.rate * 1000)),
            detection_permille=max(1, round(faults.audit.power * 1000)),
        )
        self._faulty = Ladder(
            capacity=capacity,
            pay_micros=np.maximum(price, clearing) if rule is PayRule.UNIFORM else price,
            seconds_per_unit=seconds[order],
            failure_rate=failure[order],
            crash_at_s=np.full(len(order), np.inf),
            cheats=cheats[order],
            stake_micros=np.array([stake_up(int(units), reserve, terms) for units in capacity]),
        )

    def honest_ladder(self) -> Ladder:
        """The rungs with nobody crashing or cheating."""
        return replace(self._faulty, cheats=np.zeros_like(self._faulty.cheats))

    def faulty_ladder(self, within_s: float) -> Ladder:
        """The rungs as they are, crashes falling evenly ``within_s``."""
        return replace(self._faulty, crash_at_s=self._crash_at * within_s)


def _some(
    n: int, share: float, rng: np.random.Generator
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which of ``n`` providers are among a random ``share`` of them."""
    chosen = np.zeros(n, dtype=np.bool_)
    chosen[rng.permutation(n)[: round(share * n)]] = True
    return chosen


def _clearing_price(price: Ints, units: Ints, num_units: int, reserve_micros: int) -> int:
    """σ* of one lot on the rungs."""
    rung = int(np.searchsorted(np.cumsum(units), num_units, side="right"))
    return reserve_micros if rung == len(price) else int(price[rung])
