"""What a failed lease means: for its node, for its account, for its job.

A node that breaks its word is left out, longer each time in a row.  A job that several
providers find impossible ends with their reason.  One provider alone cannot end a job: after
its first failure of a lot it is kept from that lot for longer and longer, and others get it.
"""

from __future__ import annotations

from collections import defaultdict

from shoal.market.lease import LeaseRecord, LeaseState
from shoal.market.pause import Pauses
from shoal.orchestrator.context import Context
from shoal.orchestrator.journal import Journal
from shoal.orchestrator.leases import LiveLease
from shoal.orchestrator.placement import Parcel
from shoal.orchestrator.roster import Roster
from shoal.orchestrator.track_record import TrackRecord
from shoal.protocol.errors import InvalidRequest
from shoal.protocol.node import FailureCause

ACCOUNTS_THAT_CONVINCE = 2
"""Providers that must find a job's task impossible before the job ends for it."""

_WORDS = {
    FailureCause.WRONG_BASE: "the base or the adapter is another than the task names",
    FailureCause.PROMPT_TOO_LONG: "a prompt does not fit the model's context",
    FailureCause.NOT_FINITE: "the loss or the gradient is not finite",
    FailureCause.ENVIRONMENT: "an environment or its grader failed",
    FailureCause.TASK: "the task cannot be computed",
}
"""What may be the job's own fault, in words."""


class Setbacks:
    """Counts failures and says who is left out for them."""

    def __init__(
        self, context: Context, journal: Journal, roster: Roster, record: TrackRecord
    ) -> None:
        self._context = context
        self._journal = journal
        self._roster = roster
        self._record = record
        self._of_lots: defaultdict[str, Pauses] = defaultdict(lambda: Pauses(free_strikes=1))
        self._impossible: dict[tuple[str, Parcel, FailureCause], set[str]] = {}

    def is_paused(self, node: str) -> bool:
        """Whether the node is left out of all work now."""
        return self._record.is_out(node)

    def may_work(self, node: str, account: str, lot_id: str) -> bool:
        """Whether the node may be leased units of this lot now."""
        of_lot = self._of_lots.get(lot_id)
        kept_out = of_lot is not None and of_lot.is_paused(
            account.lower(), now_ms=self._context.time.now_ms()
        )
        return not kept_out and not self.is_paused(node)

    def weigh(self, live: LiveLease, record: LeaseRecord) -> InvalidRequest | None:
        """Counts the failed lease against whom it speaks; what ends the job, if that is enough."""
        lease, cause = live.lease, record.cause
        account = lease.account.lower()
        member = self._roster.find(lease.node)
        if member is not None:
            member.failures[cause.value if cause is not None else record.state.value] += 1
        self._of_lots[lease.lot_id].strike(account, now_ms=self._context.time.now_ms())
        if cause not in _WORDS:
            return None
        accounts = self._impossible.setdefault((lease.lot_id, live.units, cause), set())
        accounts.add(account)
        if len(accounts) < ACCOUNTS_THAT_CONVINCE:
            return None
        return InvalidRequest(
            f"{len(accounts)} providers could not do a {lease.kind.value} task of the job: "
            f"{_WORDS[cause]}. The last one said: {record.reason}. Mend the job and submit it "
            "again.",
            code=f"job_{cause.value}",
        )

    async def tell(self, live: LiveLease, record: LeaseRecord) -> None:
        """The failure is an event of the job, whose requester may read why."""
        lease = live.lease
        cause = record.cause.value if record.cause is not None else record.state.value
        if record.state is LeaseState.EXPIRED and record.clock is not None:
            cause = f"expired_{record.clock.value}"
        await self._journal.event(
            lease.job_id,
            "lease_failed",
            {
                "lease_id": lease.lease_id,
                "kind": lease.kind.value,
                "node": lease.node,
                "account": lease.account,
                "cause": cause,
                "reason": record.reason or "",
            },
        )

    def forget_lot(self, lot_id: str) -> None:
        """The lot is done or withdrawn."""
        self._of_lots.pop(lot_id, None)
        for key in [key for key in self._impossible if key[0] == lot_id]:
            del self._impossible[key]
