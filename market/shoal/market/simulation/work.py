"""Units done down one ladder, in simulated seconds: who does how much, and how long it takes.

Each unit goes to the first rung with room, and the room it leaves is filled from the same
ladder.  A failed unit goes to a rung below the one that failed.  When only the last few units
are under way, each is given out a second time, and the first copy accepted pays.  Providers
that crash are silent until their heartbeats are missed; cheaters are caught by audits.
"""

from __future__ import annotations

import heapq
import math
import random
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from shoal.market.simulation.population import Floats, Ints
from shoal.protocol.errors import InvalidRequest

MAX_WORK_UNITS = 100_000_000
# Log-standard deviation of one unit's time around its provider's own.
TIME_SIGMA = 0.3
# Source: reference "Compute marketplaces", §2.1: a lease's deadline is 3 · p90, and the last
# 5 % of units are duplicated.
_P90_DEVIATIONS = 1.2815515655446004
DEADLINE_FACTOR = 3
TAIL_SHARE = 0.05
SILENCE_S = 30.0
_NOISES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """One market's rungs, cheapest first; every array is ``(rungs,)``.

    Attributes:
        capacity: Units each holds at once.
        pay_micros: What an accepted unit pays each.
        seconds_per_unit: Median time of a unit.
        failure_rate: Share of units that fail at their end.
        crash_at_s: When each falls silent for good; infinity for never.
        cheats: Who hands in every unit undone, at no cost and the same speed.
        stake_micros: What a cheater loses when it is caught.
    """

    capacity: Ints
    pay_micros: Ints
    seconds_per_unit: Floats
    failure_rate: Floats
    crash_at_s: Floats
    cheats: np.ndarray[tuple[int], np.dtype[np.bool_]]
    stake_micros: Ints


@dataclass(frozen=True, kw_only=True)
class Audit:
    """How cheating is found: each unit is checked with chance ``rate``, and seen with ``power``.

    Honest work is never mistaken, and an audit delays nobody.
    """

    rate: float = 0.05
    power: float = 0.95


@dataclass(frozen=True, kw_only=True)
class WorkDone:
    """What came of it; arrays are ``(rungs,)``.

    Attributes:
        makespan_s: When the last unit was accepted.
        accepted: Units each was paid for, a cheater's undetected ones among them.
        attempts: Leases given in all; one for each unit at the least.
        bad_units: Units a cheater was paid for.
        caught: Which cheaters were caught.
        cheater_profit_micros: Pay for undone work less stake lost; 0 for the honest.
        unfinished: Units nobody was left to do.
    """

    makespan_s: float
    accepted: Ints
    attempts: int
    bad_units: int
    caught: np.ndarray[tuple[int], np.dtype[np.bool_]]
    cheater_profit_micros: Ints
    unfinished: int


class _End(IntEnum):
    """How a lease ends."""

    DONE = 0
    FAILED = 1
    SILENT = 2


def do_work(
    ladder: Ladder, num_units: int, *, at_once: int, audit: Audit, seed: int = 0
) -> WorkDone:
    """``num_units`` are worked off down ``ladder``, at most ``at_once`` of them under way.

    Raises:
        InvalidRequest: no units, too many, or none at once.
    """
    if not 1 <= num_units <= MAX_WORK_UNITS or at_once < 1:
        raise InvalidRequest(
            f"A simulation works off 1 to {MAX_WORK_UNITS} units, at least one at once; this "
            f"asks for {num_units}, {at_once} at once.",
            code="bad_scenario",
        )
    floor = _Floor(ladder, num_units, at_once, audit, seed)
    while floor.step():
        pass
    return floor.result()


class _Floor:
    """The state of the work: what is waiting, who holds what, and what ends next."""

    def __init__(
        self, ladder: Ladder, num_units: int, at_once: int, audit: Audit, seed: int
    ) -> None:
        self._random = random.Random(seed)
        noise = np.random.default_rng([seed, 2]).lognormal(0.0, TIME_SIGMA, _NOISES)
        limit = DEADLINE_FACTOR * math.exp(_P90_DEVIATIONS * TIME_SIGMA)
        self._noise: list[float] = noise.tolist()
        self._late = limit
        self._ladder = ladder
        self._num_units = num_units
        self._at_once = at_once
        self._found = audit.rate * audit.power
        self._seconds: list[float] = ladder.seconds_per_unit.tolist()
        self._failure: list[float] = ladder.failure_rate.tolist()
        self._crash_at: list[float] = ladder.crash_at_s.tolist()
        self._room: list[int] = ladder.capacity.tolist()
        self._accepted = [0] * len(self._room)
        # The units a cheater holds come back when it is caught.
        self._cheats: dict[int, set[int]] = {
            rung: set() for rung in np.nonzero(ladder.cheats)[0].tolist()
        }
        self._caught: set[int] = set()
        # One byte for each rung, 1 where there is room: finding the first is one memchr.
        self._open = bytearray(room > 0 for room in self._room)
        self._fresh = 0
        self._returned: list[tuple[int, int]] = []
        self._done = bytearray(num_units)
        self._copies = bytearray(num_units)
        self._holder = array("i", bytes(4 * num_units))
        self._under_way = 0
        self._num_done = 0
        self._attempts = 0
        self._events: list[tuple[float, int, int, int]] = []
        self._tail: Iterator[int] | None = None
        self._now_s = 0.0
        self._last_s = 0.0

    def step(self) -> bool:
        """What waits is given out and one lease has ended; false when nothing is left to end."""
        self._give_out()
        if not self._events or self._num_done == self._num_units:
            return False
        self._now_s, unit, rung, end = heapq.heappop(self._events)
        if rung in self._caught:
            return True
        if end == _End.SILENT:
            self._close(rung)
        else:
            self._free(rung)
        self._copies[unit] -= 1
        if rung in self._cheats:
            self._cheats[rung].discard(unit)
        if end == _End.DONE and self._is_found_out(rung):
            self._catch(rung, unit)
        elif end == _End.DONE:
            self._accept(unit, rung)
        else:
            self._give_back(unit, rung)
        return True

    def result(self) -> WorkDone:
        """What came of it."""
        accepted = np.asarray(self._accepted, dtype=np.int64)
        caught = np.zeros(len(accepted), dtype=np.bool_)
        caught[sorted(self._caught)] = True
        cheats = self._ladder.cheats
        profit = accepted * self._ladder.pay_micros - np.where(caught, self._ladder.stake_micros, 0)
        return WorkDone(
            makespan_s=self._last_s,
            accepted=accepted,
            attempts=self._attempts,
            bad_units=int(accepted[cheats].sum()),
            caught=caught,
            cheater_profit_micros=np.where(cheats, profit, 0),
            unfinished=self._num_units - self._num_done,
        )

    def _give_out(self) -> None:
        """Every rung with room has work, as far as there is any and as much may be under way."""
        while self._under_way < self._at_once and (rung := self._open.find(1)) >= 0:
            if self._returned:
                unit, failed = self._returned.pop()
                below = self._open.find(1, failed + 1)
                rung = below if below >= 0 else rung
            elif self._fresh < self._num_units:
                unit = self._fresh
                self._fresh += 1
            else:
                break
            self._under_way += 1
            self._lease(unit, rung)
        if self._fresh == self._num_units and not self._returned:
            self._copy_tail()

    def _copy_tail(self) -> None:
        """The last units under way are given out once more, to others, as far as there is room."""
        if self._tail is None:
            if self._under_way > TAIL_SHARE * self._num_units:
                return
            waiting = sorted(unit for _, unit, _, _ in self._events if self._copies[unit] == 1)
            self._tail = iter(waiting)
        while (rung := self._open.find(1)) >= 0:
            unit = next(self._tail, None)
            if unit is None:
                return
            if rung == self._holder[unit]:
                rung = self._open.find(1, rung + 1)
            if rung >= 0 and not self._done[unit] and self._copies[unit] == 1:
                self._lease(unit, rung)

    def _lease(self, unit: int, rung: int) -> None:
        """``rung`` has begun ``unit``, and how that will end is known to nobody but the queue."""
        self._attempts += 1
        self._copies[unit] += 1
        self._holder[unit] = rung
        self._room[rung] -= 1
        if not self._room[rung]:
            self._open[rung] = 0
        if rung in self._cheats:
            self._cheats[rung].add(unit)
        noise = self._noise[self._random.getrandbits(16)]
        takes_s = self._seconds[rung] * min(noise, self._late)
        end = _End.DONE
        if noise > self._late or self._random.random() < self._failure[rung]:
            end = _End.FAILED
        if self._now_s + takes_s > self._crash_at[rung]:
            takes_s = max(self._crash_at[rung] - self._now_s, 0.0) + SILENCE_S
            end = _End.SILENT
        heapq.heappush(self._events, (self._now_s + takes_s, unit, rung, end))

    def _free(self, rung: int) -> None:
        self._room[rung] += 1
        self._open[rung] = 1

    def _close(self, rung: int) -> None:
        """``rung`` is offered nothing more."""
        self._open[rung] = 0

    def _is_found_out(self, rung: int) -> bool:
        return rung in self._cheats and self._random.random() < self._found

    def _catch(self, rung: int, unit: int) -> None:
        """The cheater is out; all that it held is given to others."""
        self._caught.add(rung)
        self._close(rung)
        self._give_back(unit, rung)
        for held in sorted(self._cheats.pop(rung)):
            self._copies[held] -= 1
            self._give_back(held, rung)

    def _accept(self, unit: int, rung: int) -> None:
        if self._done[unit]:
            return
        self._done[unit] = 1
        self._num_done += 1
        self._under_way -= 1
        self._accepted[rung] += 1
        self._last_s = self._now_s

    def _give_back(self, unit: int, rung: int) -> None:
        """``unit`` waits again, unless it is done or another copy is under way."""
        if not self._done[unit] and not self._copies[unit]:
            self._under_way -= 1
            self._returned.append((unit, rung))
