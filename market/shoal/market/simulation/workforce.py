"""Who does the work: learned bids, with speeds, failures, crashes and cheats, as one ladder."""

from __future__ import annotations

from dataclasses import dataclass, field

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
    rng = np.random.default_rng([seed, 4])
    n = population.num_providers
    cheats = _some(n, faults.cheat_share, rng)
    crashes = _some(n, faults.crash_share, rng)
    seconds = MEDIAN_SECONDS * rng.lognormal(0.0, SPEED_SIGMA, n)
    failure = rng.beta(*_FAILURE_BETA, n)
    spread = rng.random(n)
    books = books_of(population, learned.last_actions)
    asked = books.adjusted_micros[market]
    price = np.where(cheats, max(1, int(asked.min()) - 1), asked)
    capacity = np.where(cheats, population.most_units[market], books.units[market])
    order = np.lexsort((population.tie_rank[market], price))
    order = order[price[order] <= population.reserve_micros[market]]
    at_once = int(population.num_units[market])
    clearing = _clearing_price(price[order], capacity[order], at_once, population, market)
    pay = np.maximum(price, clearing) if rule is PayRule.UNIFORM else price
    terms = AuditTerms(
        audit_permille=max(1, round(faults.audit.rate * 1000)),
        detection_permille=max(1, round(faults.audit.power * 1000)),
    )
    reserve = int(population.reserve_micros[market])
    stake = np.array([stake_up(int(units), reserve, terms) for units in capacity])

    def ladder(crash_at_s: np.ndarray[tuple[int], np.dtype[np.float64]], *, honest: bool) -> Ladder:
        return Ladder(
            capacity=capacity[order],
            pay_micros=pay[order],
            seconds_per_unit=seconds[order],
            failure_rate=failure[order],
            crash_at_s=crash_at_s[order],
            cheats=cheats[order] & (not honest),
            stake_micros=stake[order],
        )

    never = np.full(n, np.inf)
    clean = do_work(
        ladder(never, honest=True), num_units, at_once=at_once, audit=faults.audit, seed=seed
    )
    crash_at_s = np.where(crashes, spread * clean.makespan_s, np.inf)
    return Shift(
        rungs=order,
        done=do_work(
            ladder(crash_at_s, honest=False),
            num_units,
            at_once=at_once,
            audit=faults.audit,
            seed=seed,
        ),
        clean=clean,
        cheats=cheats[order],
        num_crashed=int(crashes[order].sum()),
    )


def _some(
    n: int, share: float, rng: np.random.Generator
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which of ``n`` providers are among a random ``share`` of them."""
    chosen = np.zeros(n, dtype=np.bool_)
    chosen[rng.permutation(n)[: round(share * n)]] = True
    return chosen


def _clearing_price(
    price: Ints, units: Ints, num_units: int, population: Population, market: int
) -> int:
    """σ* of one lot on the rungs."""
    reach = np.cumsum(units)
    rung = int(np.searchsorted(reach, num_units, side="right"))
    if rung == len(price):
        return int(population.reserve_micros[market])
    return int(price[rung])
