"""Whole parcels into limited room, rung by rung."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class Demand:
    """The parcels not yet given away, by size.

    Args:
        parcels: How many there are of each number of units.
    """

    def __init__(self, parcels: dict[int, int]) -> None:
        self._left = dict(sorted(parcels.items(), reverse=True))

    @property
    def num_parcels(self) -> int:
        """Parcels left."""
        return sum(self._left.values())

    @property
    def num_units(self) -> int:
        """Units left."""
        return sum(size * count for size, count in self._left.items())

    @property
    def smallest(self) -> int:
        """The smallest parcel left; 0 when none is."""
        return min(self._left, default=0)

    def take(self, room: int) -> int:
        """As many units as whole parcels can put into ``room``; the number taken.

        The most that fit, so that a bid which moves up the ladder never wins less; among equal
        totals, larger parcels first.
        """
        if len(self._left) == 1:
            ((size, count),) = self._left.items()
            return self._remove({size: min(room // size, count)})
        room = min(room, self.num_units)
        greedy: dict[int, int] = {}
        left = room
        for size, count in self._left.items():
            greedy[size] = min(left // size, count)
            left -= greedy[size] * size
        return self._remove(greedy if not left else self._fullest(room))

    def take_smallest(self, room: int) -> int:
        """One parcel, the smallest, if it fits ``room``; its units, or 0."""
        size = self.smallest
        return self._remove({size: 1}) if 0 < size <= room else 0

    def _remove(self, counts: dict[int, int]) -> int:
        for size, count in counts.items():
            self._left[size] -= count
            if not self._left[size]:
                del self._left[size]
        return sum(size * count for size, count in counts.items())

    def _fullest(self, room: int) -> dict[int, int]:
        """How many of each size fill ``room`` as far as can be.

        Bit ``n`` of a number says that n units can be made up of the sizes so far.  Source: the
        bounded subset-sum by doubling counts.
        """
        within = (1 << (room + 1)) - 1
        reachable = [1]
        ascending = sorted(self._left.items())
        for size, count in ascending:
            sums, step = reachable[-1], 1
            while count > 0:
                step = min(step, count)
                sums |= (sums << (size * step)) & within
                count -= step
                step *= 2
            reachable.append(sums)
        left = reachable[-1].bit_length() - 1
        counts = {}
        for place in range(len(ascending) - 1, -1, -1):
            size, available = ascending[place]
            number = min(left // size, available)
            while not reachable[place] >> (left - number * size) & 1:
                number -= 1
            counts[size] = number
            left -= number * size
        return counts


@dataclass(frozen=True, kw_only=True)
class Room:
    """How much each rung may hold, and with whom it shares that.

    ``capacity`` is shared by all rungs of a ``node``, ``bound`` by all of an ``account``.
    """

    capacity: Sequence[int]
    bound: Sequence[int]
    node: Sequence[int]
    account: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Filled:
    """Who has what.

    ``next_rung`` is the first that could hold one more parcel, once all are given away.
    """

    units: list[int]
    standby: list[bool]
    unfilled_units: int
    next_rung: int | None


class _Holdings:
    """What nodes and accounts hold so far."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._of_node: dict[int, int] = {}
        self._of_account: dict[int, int] = {}

    def left(self, rung: int) -> int:
        room = self._room
        return min(
            room.capacity[rung] - self._of_node.get(room.node[rung], 0),
            room.bound[rung] - self._of_account.get(room.account[rung], 0),
        )

    def add(self, rung: int, units: int) -> None:
        node, account = self._room.node[rung], self._room.account[rung]
        self._of_node[node] = self._of_node.get(node, 0) + units
        self._of_account[account] = self._of_account.get(account, 0) + units


def fill(
    demand: Demand,
    room: Room,
    *,
    newcomer: Sequence[bool],
    newcomer_parcels: int,
    standby_units: int,
) -> Filled:
    """All parcels are given away as far as the rungs have room, in their order.

    Newcomers have the first ``newcomer_parcels``, the smallest there are; the rest goes down the
    ladder, newcomers included.  Rungs without units that come next stand by, for
    ``standby_units`` in all.
    """
    count = len(room.node)
    holdings = _Holdings(room)
    units = [0] * count
    smallest = demand.smallest
    for rung in (n for n in range(count) if newcomer[n]) if newcomer_parcels else ():
        while newcomer_parcels and (taken := demand.take_smallest(holdings.left(rung))):
            units[rung] += taken
            holdings.add(rung, taken)
            newcomer_parcels -= 1
    for rung in range(count):
        if not demand.num_parcels:
            break
        left = holdings.left(rung)
        if left >= demand.smallest and (taken := demand.take(left)):
            units[rung] += taken
            holdings.add(rung, taken)
    unfilled = demand.num_units
    roomy = (rung for rung in range(count) if holdings.left(rung) >= smallest)
    next_rung = None if unfilled else next(roomy, None)
    return Filled(
        units=units,
        standby=_stand_by(units, holdings, standby_units, smallest),
        unfilled_units=unfilled,
        next_rung=next_rung,
    )


def _stand_by(
    units: list[int], holdings: _Holdings, standby_units: int, smallest: int
) -> list[bool]:
    """Who stands by; their ``units`` are what they keep free."""
    standby = [False] * len(units)
    for rung, won in enumerate(units):
        if standby_units < smallest:
            break
        left = 0 if won else min(holdings.left(rung), standby_units)
        if left >= smallest:
            units[rung] = left
            standby[rung] = True
            holdings.add(rung, left)
            standby_units -= left
    return standby
