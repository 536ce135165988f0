"""One lot's cleared ladder at work: which rung gets the next parcel.

A lot is cleared once, and its result is every rung that may serve it, the best first.  While
the lot runs no auction is needed: a parcel goes to the first rung with room; one that failed
goes to a rung *below* the one that failed it, and never to that node again.  Rungs beyond the
last awarded unit stand by; each rung is paid what the clearing says, a stand-by its own price.
A parcel that failed twice, or that nobody below may take, needs a new clearing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Generic, TypeVar

from shoal.market.reauction import FAILURES_BEFORE_RAISE
from shoal.protocol.certificate import Rung
from shoal.protocol.errors import InvalidRequest

TAIL_PERMILLE = 50
"""The last 5 % of a policy version's units are done twice. Source: docs/architecture, "Market"."""

_P = TypeVar("_P", bound=Hashable)


class RunningLadder(Generic[_P]):
    """The rungs of one clearing, and which parcels failed on which of them.

    Args:
        rungs: In the order of the clearing, with places that rise.
        failures: Parcels that failed and the rung each failed on, to resume from.
        earlier: Failures that each parcel brings from earlier clearings; see `carried`.

    Raises:
        InvalidRequest: the rungs are out of order, or a failure names none of them.

    Example:
        >>> RunningLadder[str]([]).needs_clearing("a parcel", 4)
        True
    """

    def __init__(
        self,
        rungs: Sequence[Rung],
        failures: Iterable[tuple[_P, int]] = (),
        *,
        earlier: Mapping[_P, int] | None = None,
    ) -> None:
        if any(above.rung >= below.rung for above, below in pairwise(rungs)):
            raise InvalidRequest(
                "The rungs of a ladder do not have rising places; give them in the order of "
                "their clearing.",
                code="bad_ladder",
            )
        self._rungs = tuple(rungs)
        self._by_place = {rung.rung: rung for rung in rungs}
        self._of_node: dict[str, list[Rung]] = {}
        for rung in rungs:
            self._of_node.setdefault(rung.node, []).append(rung)
        self._earlier = dict(earlier or {})
        self._failed_on: dict[_P, list[Rung]] = {}
        for parcel, place in failures:
            self.note_failure(parcel, place)

    def __len__(self) -> int:
        return len(self._rungs)

    @property
    def nodes(self) -> Collection[str]:
        """Who has a rung."""
        return self._of_node.keys()

    def next_rung(
        self, parcel: _P, num_units: int, *, nodes: Iterable[str], in_flight: Mapping[str, int]
    ) -> Rung | None:
        """The first rung that may take the parcel and has room for it now; None if none has.

        Args:
            parcel: What is to be done.
            num_units: Its units, which one node does together.
            nodes: Who may be given work now: none that is paused, gone, or at work on the parcel
                already.  A large ladder is searched no further than these.
            in_flight: Units each node holds now of this kind; absent means none.
        """
        lowest, failed = self._failures_of(parcel)
        found = (
            rung
            for node in nodes
            if node not in failed
            for rung in self._of_node.get(node, ())
            if rung.rung > lowest and num_units <= rung.room_units - in_flight.get(node, 0)
        )
        return min(found, key=lambda rung: rung.rung, default=None)

    def place_of(self, node: str) -> int | None:
        """How many rungs stand before the node's first; None when it has none."""
        own = self._of_node.get(node)
        return bisect_left(self._rungs, own[0].rung, key=lambda r: r.rung) if own else None

    def note_failure(self, parcel: _P, place: int) -> None:
        """The parcel failed on this rung; it goes to one below.

        Raises:
            InvalidRequest: the ladder has no such rung.
        """
        rung = self._by_place.get(place)
        if rung is None:
            raise InvalidRequest(
                f"The ladder of {len(self._rungs)} rungs has none at {place}; name the rung "
                "that the lease cites.",
                code="no_such_rung",
            )
        self._failed_on.setdefault(parcel, []).append(rung)

    def note_earlier_failure(self, parcel: _P) -> None:
        """The parcel failed on a rung of an earlier clearing, which counts all the same."""
        self._earlier[parcel] = self._earlier.get(parcel, 0) + 1

    def num_failures(self, parcel: _P) -> int:
        """How often the parcel has failed since its reserve was last raised."""
        return self._earlier.get(parcel, 0) + len(self._failed_on.get(parcel, ()))

    def carried(self, parcel: _P) -> int:
        """The failures the parcel brings to its next clearing; none if that raises the reserve."""
        failures = self.num_failures(parcel)
        return 0 if self.raises_reserve(parcel) else failures

    def needs_clearing(self, parcel: _P, num_units: int, *, gone: Collection[str] = ()) -> bool:
        """Whether only a new clearing can place the parcel.

        It failed twice, or no rung below may ever take it, not counting nodes that are gone.
        """
        if self.raises_reserve(parcel):
            return True
        lowest, failed = self._failures_of(parcel)
        return all(
            rung.rung <= lowest
            or rung.node in failed
            or rung.node in gone
            or num_units > rung.room_units
            for rung in self._rungs
        )

    def raises_reserve(self, parcel: _P) -> bool:
        """Whether the parcel has failed so often that its next clearing may pay more."""
        return self.num_failures(parcel) >= FAILURES_BEFORE_RAISE

    def _failures_of(self, parcel: _P) -> tuple[int, set[str]]:
        """The lowest rung that failed the parcel, and the nodes that did."""
        failed_on = self._failed_on.get(parcel, ())
        lowest = max((rung.rung for rung in failed_on), default=-1)
        return lowest, {rung.node for rung in failed_on}


def is_tail(undelivered_units: int, version_units: int) -> bool:
    """Whether so few of a policy version's units are left that each is given to a second node.

    The first result that is accepted is paid; the other lease ends unpaid and without blame,
    so a tail costs its requester nothing, and a provider at most one task.

    Args:
        undelivered_units: Units nobody has delivered yet, none of which waits for a node.
        version_units: All units of the policy version.
    """
    return 0 < undelivered_units * 1_000 <= version_units * TAIL_PERMILLE
