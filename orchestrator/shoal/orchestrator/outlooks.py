"""What is to be expected of nodes and leases: who hands in when, and what has fallen behind."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.market.pace import Outlook, Pace, remaining_ms, timely_ms
from shoal.orchestrator.context import Context
from shoal.orchestrator.leases import LeaseTable, LiveLease
from shoal.orchestrator.placement import Parcel
from shoal.orchestrator.workload import Workload

_STALL_SHARE = 3
"""A lease may be given to another node too after a third of its progress window at a stop."""


class Outlooks:
    """Looks ahead by the pace of each node and by what it holds.

    Args:
        context: The orchestrator's surroundings.
        table: The live leases.
    """

    def __init__(self, context: Context, table: LeaseTable) -> None:
        self._context = context
        self._table = table
        self.pace = Pace()
        self._slow: list[LiveLease] = []

    def backlog_ms(self, node: str) -> int:
        """What the node holds is expected to take, by everybody's pace."""
        return sum(held.expected_ms for held in self._table.open_of(node))

    def note(self, live: LiveLease, *, unit_ms: int) -> None:
        """The lease was accepted, and each of its units took ``unit_ms`` to compute."""
        lease = live.lease
        self.pace.note(lease.job_id, lease.kind, lease.node, unit_ms)
        lasted_ms = live.record.heard_at_ms - lease.issued_at_ms
        self._note_lag(live, lasted_ms, unit_ms * len(live.units))

    def note_outrun(self, live: LiveLease) -> None:
        """Another delivered the parcel of this lease, which would have lasted longer yet."""
        age_ms = self._age_ms(live)
        # Its age alone would make a slow node look the quicker the sooner it is outrun.
        total_ms = age_ms + remaining_ms(age_ms, self._due_ms(live))
        self._note_lag(live, total_ms, live.expected_ms)

    def _note_lag(self, live: LiveLease, lasted_ms: int, compute_ms: int) -> None:
        lease, now_ms = live.lease, self._context.time.now_ms()
        lag_ms = max(0, lasted_ms - live.backlog_ms - compute_ms)
        self.pace.note_lag(lease.job_id, lease.kind, lease.node, lag_ms, now_ms=now_ms)

    def is_usual(self, workload: Workload, parcel: Parcel, node: str) -> bool:
        """Whether the node would hand the parcel in within twice what one takes to compute.

        Then it is as quick as anybody can be asked to be; so is who is tried before anybody's
        times are known.
        """
        usual_ms = self._usual_ms(workload, parcel)
        return usual_ms is None or self._finish_ms(workload, parcel, node) <= 2 * usual_ms

    def is_slow(self, workload: Workload, node: str) -> bool:
        """Whether the node is not as quick as usual even for the lot's largest parcel left."""
        parcel = max(workload.undelivered, key=len, default=())
        return bool(parcel) and not self.is_usual(workload, parcel, node)

    def times_ms(self, workload: Workload, node: str) -> tuple[int, int]:
        """What the node takes for the lot's largest parcel left, and what one takes to compute."""
        parcel = max(workload.undelivered, key=len, default=())
        return self._finish_ms(workload, parcel, node), self._usual_ms(workload, parcel) or 0

    def in_time(
        self, workload: Workload, parcel: Parcel, ready: Sequence[str], able: Sequence[str]
    ) -> Sequence[str]:
        """Those of ``ready`` who would not keep the lot waiting if they were given the parcel.

        The learner, and every other node, would wait for anybody else, however cheap; see
        `timely_ms`.

        Args:
            workload: The lot.
            parcel: What is to be leased.
            ready: Who has room for work of its kind.
            able: Who can have it, at once or after what they hold; one at least.
        """
        outlooks = [self._of(workload, node) for node in able]
        waiting = sum(map(len, {*workload.waiting, parcel}))
        by_ms = timely_ms(outlooks, parcel_units=len(parcel), waiting_units=waiting)
        return [node for node in ready if self._finish_ms(workload, parcel, node) <= by_ms]

    def quicker(self, behind: LiveLease, ready: list[str]) -> list[str]:
        """Those of ``ready`` who would be done sooner than the straggler."""
        if self._stands_still(behind):
            return ready
        within_ms = self._spare_ms(behind)
        workload, parcel = behind.workload, behind.units
        return [n for n in ready if self._finish_ms(workload, parcel, n) < within_ms]

    def _usual_ms(self, workload: Workload, parcel: Parcel) -> int | None:
        median_ms = self.pace.median_unit_ms(workload.lot.job_id, workload.kind)
        return None if median_ms is None else median_ms * len(parcel)

    def _finish_ms(self, workload: Workload, parcel: Parcel, node: str) -> int:
        return self._of(workload, node).finish_ms(len(parcel))

    def _of(self, workload: Workload, node: str) -> Outlook:
        job_id, kind, now_ms = workload.lot.job_id, workload.kind, self._context.time.now_ms()
        held = self._table.open_of(node)
        # What is late already is taken to be late by as much again.
        late_ms = max((self._late_ms(live) for live in held), default=0)
        lag_ms = self.pace.lag_ms(job_id, kind, node, now_ms=now_ms)
        ahead_ms = sum(live.expected_ms for live in held) + max(0, late_ms)
        unit_ms = self.pace.unit_ms(job_id, kind, node) or 0
        return Outlook(ahead_ms=ahead_ms, lag_ms=lag_ms, unit_ms=unit_ms)

    def _late_ms(self, live: LiveLease) -> int:
        return self._age_ms(live) - self._due_ms(live)

    def _age_ms(self, live: LiveLease) -> int:
        return self._context.time.now_ms() - live.lease.issued_at_ms

    def _due_ms(self, live: LiveLease) -> int:
        """After how long the node, as it is known, should hand the lease in."""
        lease, now_ms = live.lease, self._context.time.now_ms()
        unit_ms = self.pace.unit_ms(lease.job_id, lease.kind, lease.node)
        own_ms = live.expected_ms if unit_ms is None else unit_ms * len(live.units)
        lag_ms = self.pace.lag_ms(lease.job_id, lease.kind, lease.node, now_ms=now_ms)
        return live.backlog_ms + own_ms + lag_ms

    def look(self) -> None:
        """Notes which leases straggle now; see `stragglers`."""
        self._slow = [live for live in self._table if self._straggles(live)]

    def stragglers(self) -> list[LiveLease]:
        """Leases that hold up a lot of which nothing else waits, far behind their peers.

        Those that the last `look` found; each is named once.
        """
        slow, self._slow = self._slow, []
        return [live for live in slow if not live.workload.waiting and live.may_rival]

    def tail(self) -> list[LiveLease]:
        """Leases of the last few units of their lot, which nobody else works on yet."""
        # Asked once for each lot: the answer takes a look at all that is under way of it.
        lots = {live.lease.lot_id: live.workload for live in self._table}
        tails = {lot_id for lot_id, workload in lots.items() if workload.is_tail}
        return [live for live in self._table if live.lease.lot_id in tails and live.may_rival]

    def _straggles(self, live: LiveLease) -> bool:
        workload = live.workload
        if workload.waiting or workload.closed or not live.may_rival:
            return False
        usual_ms = self._usual_ms(workload, live.units)
        is_far_behind = usual_ms is not None and self._spare_ms(live) > usual_ms
        return is_far_behind or self._stands_still(live)

    def _stands_still(self, live: LiveLease) -> bool:
        record = live.record
        still_ms = self._context.time.now_ms() - record.progress_at_ms
        return still_ms * _STALL_SHARE > record.progress_window_ms

    def _spare_ms(self, live: LiveLease) -> int:
        """Within what time another node must be done for a second try to be worth it."""
        remaining = remaining_ms(self._age_ms(live), self._due_ms(live))
        return remaining - self._context.config.straggler_slack_ms
