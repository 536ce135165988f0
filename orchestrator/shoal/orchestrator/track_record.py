"""What each provider's ended leases say of it, and the terms its bids compete under."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import select
from sqlalchemy.orm import Session

from shoal.market.capacity import AuditTerms, capacity_down, stake_up
from shoal.market.cooldown import Cooldown
from shoal.market.frozen import TermsTable
from shoal.market.handicap import HandicapTerms, bidder_terms
from shoal.market.lease import LeaseRecord, LeaseState
from shoal.market.reputation import (
    HORIZON_STEPS,
    STEP_MS,
    Outcome,
    Reputation,
    measured_unit_ms_up,
    outcome_of,
)
from shoal.market.sealing import Backing
from shoal.orchestrator.context import Context
from shoal.orchestrator.leases import LiveLease
from shoal.orchestrator.roster import Member, Roster
from shoal.orchestrator.store.tables import LeaseRow
from shoal.orchestrator.workload import Workload
from shoal.protocol.certificate import BidderTerms
from shoal.protocol.job import VerifySpec
from shoal.protocol.market import Bid

DETECTION_PERMILLE = 950
"""How often an audit finds a false result.  Source: docs/architecture, "Reputation"."""
VERIFY_PERMILLE = 20
REDISPATCH_PERMILLE = 30
"""What checking and giving out again cost for a unit that fails, of the most it may cost."""


class TrackRecord:
    """The outcomes of the last thirty days, and what follows from them.

    Args:
        context: The orchestrator's surroundings.
        roster: Who is here, with what stake.
    """

    def __init__(self, context: Context, roster: Roster) -> None:
        self._context = context
        self._roster = roster
        self._reputation = Reputation()
        self._cooldown = Cooldown()
        self.backed_micros: Callable[[str], int] = lambda account: 0
        """How much of an account's stake backs units in flight."""

    async def restore(self) -> None:
        """Everything in the database that still weighs is counted."""
        oldest_ms = self._context.time.now_ms() - HORIZON_STEPS * STEP_MS

        def stored(session: Session) -> list[Outcome]:
            rows = session.scalars(
                select(LeaseRow.outcome).where(
                    LeaseRow.outcome.is_not(None), LeaseRow.ended_ms >= oldest_ms
                )
            )
            return [Outcome.decode(row.encode()) for row in rows if row is not None]

        for outcome in await self._context.database.run(stored):
            self._note(outcome)

    def note(
        self,
        live: LiveLease,
        record: LeaseRecord,
        *,
        blameless: bool = False,
    ) -> Outcome | None:
        """The ended lease counts; what to write down of it, if it says anything.

        Args:
            live: The lease.
            record: How it ended.
            blameless: The result could not be judged, by a fault of ours.
        """
        unit_ms = None
        if record.state is LeaseState.ACCEPTED:
            unit_ms = measured_unit_ms_up(
                record,
                submitted_at_ms=record.heard_at_ms,
                expected_ms=live.expected_ms,
                backlog_ms=live.backlog_ms,
            )
        outcome = outcome_of(record, work=live.workload.work, unit_ms=unit_ms, blameless=blameless)
        if outcome is not None:
            self._note(outcome)
        return outcome

    def _note(self, outcome: Outcome) -> None:
        self._reputation.note(outcome)
        self._cooldown.note(outcome)

    def forget_old(self) -> None:
        """What weighs nothing any more is held no longer."""
        now_ms = self._context.time.now_ms()
        self._reputation.forget_old(now_ms=now_ms)
        self._cooldown.forget_old(now_ms=now_ms)

    def is_out(self, node: str) -> bool:
        """Whether the node is left out of all work for now, for words it broke."""
        return self._cooldown.is_out(node, now_ms=self._context.time.now_ms())

    def out_for_ms(self, node: str) -> int:
        """For how long the node is still left out; 0 when it is not."""
        return max(0, self._cooldown.until_ms(node) - self._context.time.now_ms())

    def backing_of(self, bid: Bid) -> Backing:
        """What stands behind a bid that is just opened."""
        member = self._roster.find(bid.node)
        stake_micros = 0 if member is None else member.stake_micros
        return Backing(
            staked=stake_micros >= self._context.config.min_stake_micros,
            # Which class the bid will serve is not known yet; each clearing bounds it by its own.
            bound_units=bid.capacity if stake_micros else 0,
        )

    def terms(self, workload: Workload) -> TermsTable:
        """The terms of everybody on the roster for the workload's class."""
        now_ms = self._context.time.now_ms()
        members = self._roster.members()
        work = workload.work
        nodes = [member.node for member in members]
        ceiling = workload.reserve.requester_max_micros
        handicap = HandicapTerms(
            verify_micros=ceiling * VERIFY_PERMILLE // 1_000,
            redispatch_micros=ceiling * REDISPATCH_PERMILLE // 1_000,
            delay_micros_per_s=workload.delay_micros_per_s,
            target_unit_ms=self._reputation.target_unit_ms(nodes, work, now_ms=now_ms),
        )
        return TermsTable(
            self._terms_of(member, workload, work, handicap, now_ms) for member in members
        )

    def _terms_of(
        self, member: Member, workload: Workload, work: str, handicap: HandicapTerms, now_ms: int
    ) -> BidderTerms:
        standing = self._reputation.standing(member.account, now_ms=now_ms)
        unit_ms = self._reputation.unit_ms(member.node, work, now_ms=now_ms)
        price = max(1, workload.reserve.reference_micros or workload.lot.reserve_micros)
        return bidder_terms(
            member.account,
            member.node,
            standing=standing,
            unit_ms=unit_ms,
            terms=handicap,
            bound_units=capacity_down(member.stake_micros, price, audit_terms(workload.verify)),
            staked=member.stake_micros >= self._context.config.min_stake_micros,
        )

    def backing_micros(self, workload: Workload, num_units: int) -> int:
        """The stake that backs this many units of the workload while they are in flight."""
        price = workload.reserve.reference_micros or workload.lot.reserve_micros
        return stake_up(num_units, price, audit_terms(workload.verify))

    def has_stake(self, member: Member, workload: Workload, num_units: int) -> bool:
        """Whether the member's stake, beside all it backs already, backs these units too."""
        free = member.stake_micros - self.backed_micros(member.account)
        return free >= self.backing_micros(workload, num_units)


def audit_terms(verify: VerifySpec) -> AuditTerms:
    """How likely a false result of the job is found."""
    return AuditTerms(
        audit_permille=max(1, round(verify.spot_check_rate * 1_000)),
        detection_permille=DETECTION_PERMILLE,
    )
