"""A lot's whole life: ladder, leases and ledger together, through failures and restarts.

The desk below drives the market's rules as an orchestrator does, and keeps on record only what
a database would: outcomes, failures, pay.  A crash throws away the rest.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from market_records import DOMAIN, JOB_ID, NOW_MS, account, lease, lot, peer

from shoal.market import lease as leases
from shoal.market.cooldown import Cooldown
from shoal.market.freshness import fresh_pay_down, linear_freshness
from shoal.market.ladder import RunningLadder
from shoal.market.lease import LeaseRecord, LeaseState
from shoal.market.reauction import raise_reserve_up
from shoal.market.reputation import Outcome, Reputation, measured_unit_ms_up, outcome_of
from shoal.market.settlement import Ledger, PayEntry, PayoutSet
from shoal.protocol.certificate import Rung
from shoal.protocol.errors import Expired, InvalidRequest, OverBudget, PeerFault
from shoal.protocol.node import FailureCause

NODES = 4
UNITS = 3
PARCELS = range(5)
RESERVE, MAX_RESERVE = 100, 140
LOT = lot(freshness_permille=linear_freshness(2, 333))
WORK = "rollout"
FOREVER_MS = 10**15

parcels = st.sampled_from(PARCELS)
nodes = st.integers(1, NODES)


def rungs_at(reserve_micros: int) -> list[Rung]:
    """Every node, the cheapest first; pay stays under the reserve."""
    return [
        Rung(
            rung=n,
            bid_digest="0x" + f"{n:064x}",
            account=account(n).address,
            node=peer(n),
            price_micros=reserve_micros - 7 * (NODES - n),
            handicap_micros=0,
            pay_micros=reserve_micros - 7 * (NODES - n),
            num_units=UNITS,
            room_units=UNITS * (1 + n % 2),
        )
        for n in range(1, NODES + 1)
    ]


class WorkLife(RuleBasedStateMachine):
    """I1-I5, I9 and I10 of the lease, ladder and ledger, in any order of events."""

    @initialize(funded=st.integers(0, 4_000))
    def begin(self, funded: int) -> None:
        self.now_ms = NOW_MS
        self.ledger = Ledger(JOB_ID, funded)
        self.reserve = dict.fromkeys(PARCELS, RESERVE)
        self.ladders: dict[int, RunningLadder[int]] = {
            p: RunningLadder(rungs_at(RESERVE)) for p in PARCELS
        }
        self.live: dict[str, tuple[int, int, LeaseRecord]] = {}
        """Lease id to parcel, rung and record."""
        self.ended: list[LeaseRecord] = []
        self.failures: list[tuple[int, int]] = []
        """Since the last clearing of the parcel: parcel and rung."""
        self.earlier: dict[int, int] = {}
        self.outcomes: list[Outcome] = []
        self.reputation, self.cooldown = Reputation(), Cooldown()
        self.entries: list[PayEntry] = []
        self.done: set[int] = set()
        self.epochs: dict[int, int] = dict.fromkeys(PARCELS, 0)
        self.epoch = 0
        self.before: dict[str, int] = {}
        self.numbers = 0

    # What the orchestrator does.

    def of_parcel(self, parcel: int) -> list[LeaseRecord]:
        return [record for p, _, record in self.live.values() if p == parcel]

    def eligible(self, parcel: int) -> list[str]:
        busy = {record.lease.node for record in self.of_parcel(parcel)}
        everybody = [peer(n) for n in range(1, NODES + 1)]
        out = {node for node in everybody if self.cooldown.is_out(node, now_ms=self.now_ms)}
        return [node for node in everybody if node not in busy | out]

    def in_flight(self) -> Counter[str]:
        held: Counter[str] = Counter()
        for _, _, record in self.live.values():
            if record.state.is_open:
                held[record.lease.node] += record.lease.num_units
        return held

    def grant(self, parcel: int) -> None:
        rung = self.ladders[parcel].next_rung(
            parcel, UNITS, nodes=self.eligible(parcel), in_flight=self.in_flight()
        )
        if rung is None:
            return
        failed_on = [place for p, place in self.failures if p == parcel]
        assert all(rung.rung > place for place in failed_on), "down, never back"
        self.numbers += 1
        lease_id = f"lease_{self.numbers:010d}"
        try:
            self.ledger.hold(lease_id, UNITS * rung.pay_micros)
        except OverBudget:
            return
        self.epochs[parcel] += 1
        issued = lease(
            rung.rung,
            lease_id=lease_id,
            task_id=f"task_{self.numbers:010d}",
            lease_epoch=self.epochs[parcel],
            num_units=UNITS,
            unit_price_micros=rung.pay_micros,
            issued_at_ms=self.now_ms,
            start_by_ms=self.now_ms + 2_000,
            deadline_ms=self.now_ms + 60_000,
        )
        record = leases.offer(issued, answer_within_ms=1_000, progress_window_ms=20_000)
        self.live[lease_id] = parcel, rung.rung, record

    def end(self, lease_id: str, record: LeaseRecord, *, unit_ms: int | None = None) -> None:
        parcel, rung, _ = self.live.pop(lease_id)
        self.ledger.release(lease_id)
        self.ended.append(record)
        outcome = outcome_of(record, work=WORK, unit_ms=unit_ms)
        if outcome is None:
            return
        self.outcomes.append(outcome)
        self.reputation.note(outcome)
        self.cooldown.note(outcome)
        if record.state is not LeaseState.ACCEPTED and parcel not in self.done:
            self.failures.append((parcel, rung))
            self.ladders[parcel].note_failure(parcel, rung)

    # What may happen.

    @rule(ms=st.sampled_from([1, 500, 1_001, 3_001, 20_001, 700_000]))
    def time_passes(self, ms: int) -> None:
        self.now_ms += ms

    @rule(parcel=parcels)
    def a_waiting_parcel_is_leased(self, parcel: int) -> None:
        if parcel not in self.done and not self.of_parcel(parcel):
            self.grant(parcel)

    @rule(parcel=parcels)
    def a_parcel_is_given_to_a_second_node(self, parcel: int) -> None:
        if parcel not in self.done and len(self.of_parcel(parcel)) == 1:
            self.grant(parcel)

    @rule(parcel=parcels)
    def a_parcel_is_cleared_again(self, parcel: int) -> None:
        ladder = self.ladders[parcel]
        if parcel in self.done or self.of_parcel(parcel):
            return
        if not ladder.needs_clearing(parcel, UNITS):
            return
        reserve = self.reserve[parcel]
        assert ladder.raises_reserve(parcel) is (ladder.num_failures(parcel) >= 2)
        if ladder.raises_reserve(parcel):
            reserve = raise_reserve_up(reserve, MAX_RESERVE)
        assert self.reserve[parcel] <= reserve <= MAX_RESERVE
        self.earlier[parcel] = ladder.carried(parcel)
        self.failures = [(p, rung) for p, rung in self.failures if p != parcel]
        self.reserve[parcel] = reserve
        self.ladders[parcel] = RunningLadder(rungs_at(reserve), earlier=self.earlier)

    @precondition(lambda self: self.live)
    @rule(
        data=st.data(),
        verb=st.sampled_from(["take", "beat", "submit", "submit", "submit", "refuse", "fail"]),
        who=st.sampled_from([0, 0, 0, 0, 1]),
        behind=st.sampled_from([0, 0, 0, 0, 1, -1]),
        value=st.integers(0, 2),
    )
    def a_worker_speaks(
        self, data: st.DataObject, verb: str, who: int, behind: int, value: int
    ) -> None:
        lease_id = data.draw(st.sampled_from(sorted(self.live)))
        parcel, rung, record = self.live[lease_id]
        try:
            new = self.message(record, verb, who, behind, value)
        except (Expired, InvalidRequest, PeerFault):
            return
        assert who == 0
        assert behind == 0
        if new.state.is_final:
            self.end(lease_id, new)
        else:
            self.live[lease_id] = parcel, rung, new

    def message(
        self, record: LeaseRecord, verb: str, who: int, behind: int, value: int
    ) -> LeaseRecord:
        speaker = record.lease.node if who == 0 else peer(9)
        epoch, now_ms = record.lease.lease_epoch - behind, self.now_ms
        match verb:
            case "take":
                return leases.take(record, node=speaker, lease_epoch=epoch, now_ms=now_ms)
            case "beat":
                return leases.heartbeat(
                    record, node=speaker, lease_epoch=epoch, progress=value, now_ms=now_ms
                )
            case "submit":
                digest = f"{value}" * 64
                return leases.submit(
                    record, node=speaker, lease_epoch=epoch, result_sha256=digest, now_ms=now_ms
                )
            case "refuse":
                return leases.refuse(
                    record, node=speaker, lease_epoch=epoch, reason="no", now_ms=now_ms
                )
        return leases.fail(
            record,
            node=speaker,
            lease_epoch=epoch,
            cause=list(FailureCause)[value],
            reason="broken",
            now_ms=now_ms,
        )

    @precondition(lambda self: self.ended)
    @rule(data=st.data())
    def an_old_holder_hands_in_after_all(self, data: st.DataObject) -> None:
        record = data.draw(st.sampled_from(self.ended))
        held, owed = self.ledger.held_micros, self.ledger.owed_micros
        with suppress(Expired, InvalidRequest, PeerFault):
            assert self.message(record, "submit", 0, 0, 0) == record
        assert (self.ledger.held_micros, self.ledger.owed_micros) == (held, owed)

    @rule()
    def the_reaper_runs(self) -> None:
        for lease_id, (_, _, record) in list(self.live.items()):
            expired = leases.expire_if_due(record, now_ms=self.now_ms)
            if expired is not record:
                self.end(lease_id, expired)

    @rule(accepted=st.sampled_from([True, True, True, False]), lag=st.integers(0, 2))
    def a_verdict_falls(self, accepted: bool, lag: int) -> None:
        waiting = [
            (lease_id, parcel, record)
            for lease_id, (parcel, _, record) in self.live.items()
            if record.state is LeaseState.SUBMITTED
        ]
        if not waiting:
            return
        lease_id, parcel, record = waiting[0]
        judged = leases.judge(record, accepted=accepted, reason="r", now_ms=self.now_ms)
        if not accepted:
            self.end(lease_id, judged)
            return
        held = record.lease.num_units * record.lease.unit_price_micros
        pay = fresh_pay_down(LOT, UNITS, record.lease.unit_price_micros, lag=lag)
        assert pay <= held
        entry = PayEntry(
            task_id=record.lease.task_id,
            lease_id=lease_id,
            account=record.lease.account,
            pay_micros=pay,
            claim_id=f"claim_{parcel:010d}",
        )
        assert self.ledger.accept(entry) == pay
        assert self.ledger.accept(entry) == 0
        self.entries.append(entry)
        self.done.add(parcel)
        unit_ms = measured_unit_ms_up(
            record, submitted_at_ms=record.heard_at_ms, expected_ms=100, backlog_ms=0
        )
        self.end(lease_id, judged, unit_ms=unit_ms)
        for rival_id, (other, _, rival) in list(self.live.items()):
            if other == parcel:
                self.pay_for_nothing(rival_id, rival)

    def pay_for_nothing(self, rival_id: str, rival: LeaseRecord) -> None:
        """The loser of a race is paid nothing, even by a verdict that comes all the same."""
        parcel = self.live[rival_id][0]
        again = PayEntry(
            task_id=rival.lease.task_id,
            lease_id=rival_id,
            account=rival.lease.account,
            pay_micros=1,
            claim_id=f"claim_{parcel:010d}",
        )
        known = self.cooldown.until_ms(rival.lease.node)
        assert self.ledger.accept(again) == 0
        self.end(rival_id, leases.outrun(rival, now_ms=self.now_ms))
        assert self.cooldown.until_ms(rival.lease.node) == known

    @rule()
    def an_epoch_is_settled(self) -> None:
        self.epoch += 1
        payouts = self.ledger.payouts(self.epoch)
        now = {payout.account: payout.cumulative_micros for payout in payouts.payouts}
        assert all(now.get(who, 0) >= micros for who, micros in self.before.items())
        assert payouts.total_micros == sum(now.values()) <= self.ledger.funded_micros
        assert PayoutSet.decode(payouts.encode()) == payouts
        self.before = now

    @rule()
    def the_orchestrator_crashes_and_rebuilds(self) -> None:
        for lease_id, (_, _, record) in list(self.live.items()):
            stopped = leases.outrun(record, now_ms=self.now_ms)
            self.end(lease_id, stopped)
        root = self.ledger.payouts(1).root(DOMAIN)
        seen = self.everything_read()
        self.ledger = Ledger(JOB_ID, self.ledger.funded_micros, self.entries)
        self.reputation = Reputation(reversed(self.outcomes))
        self.cooldown = Cooldown(reversed(self.outcomes))
        self.ladders = {
            parcel: RunningLadder(
                rungs_at(self.reserve[parcel]),
                [(p, rung) for p, rung in self.failures if p == parcel],
                earlier=self.earlier,
            )
            for parcel in PARCELS
        }
        assert self.ledger.payouts(1).root(DOMAIN) == root
        assert self.everything_read() == seen

    def everything_read(self) -> object:
        who = [account(n).address for n in range(1, NODES + 1)]
        return (
            [self.reputation.standing(address, now_ms=self.now_ms) for address in who],
            [self.eligible(parcel) for parcel in PARCELS],
            [
                self.ladders[parcel].next_rung(
                    parcel, UNITS, nodes=self.eligible(parcel), in_flight={}
                )
                for parcel in PARCELS
            ],
            [self.ladders[parcel].num_failures(parcel) for parcel in PARCELS],
        )

    # What always holds.

    @invariant()
    def one_live_lease_for_each_copy_of_a_parcel(self) -> None:
        """I1: at most two copies, each its own node and its own fencing number."""
        for parcel in PARCELS:
            records = self.of_parcel(parcel)
            assert len(records) <= 2
            assert len({record.lease.node for record in records}) == len(records)
            assert len({record.lease.lease_epoch for record in records}) == len(records)
            assert not (records and parcel in self.done)

    @invariant()
    def paid_once_and_only_for_what_was_accepted(self) -> None:
        """I2, I3, I4: the claims paid are the parcels accepted, each once."""
        paid = [entry.claim for entry in self.ledger.entries]
        assert len(paid) == len(set(paid))
        assert set(paid) == {f"claim_{parcel:010d}" for parcel in self.done}
        accepted = {r.lease.lease_id for r in self.ended if r.state is LeaseState.ACCEPTED}
        assert {entry.lease_id for entry in self.ledger.entries} == accepted

    @invariant()
    def the_escrow_covers_every_liability_to_the_micro(self) -> None:
        """I5, and payouts + refund = escrow: no micro is lost or made by rounding."""
        ledger = self.ledger
        assert ledger.free_micros >= 0
        held = sum(UNITS * record.lease.unit_price_micros for _, _, record in self.live.values())
        assert ledger.held_micros == held
        assert ledger.owed_micros + held + ledger.free_micros == ledger.funded_micros

    @invariant()
    def whatever_is_not_over_has_a_timer(self) -> None:
        """I9: an open lease ends by a clock; a submitted one waits for us alone."""
        for _, _, record in self.live.values():
            assert not record.state.is_final
            timer = leases.due(record, FOREVER_MS)
            assert (timer is not None) == (record.state is not LeaseState.SUBMITTED)

    @invariant()
    def fencing_numbers_only_rise(self) -> None:
        """I10: no lease of a parcel has a number that another had."""
        for parcel in PARCELS:
            assert all(
                record.lease.lease_epoch <= self.epochs[parcel] for record in self.of_parcel(parcel)
            )

    def teardown(self) -> None:
        if not hasattr(self, "ledger"):
            return
        for lease_id, (_, _, record) in list(self.live.items()):
            self.end(lease_id, leases.outrun(record, now_ms=self.now_ms))
        payouts = self.ledger.payouts(self.epoch + 1)
        assert payouts.total_micros + self.ledger.refund() == self.ledger.funded_micros


TestWorkLife = WorkLife.TestCase
TestWorkLife.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def test_without_claim_ids_both_racers_would_be_paid() -> None:
    """Negative control: the claim id is what makes two leases of a parcel one debt."""
    for claim_id, owed in ((None, 60), ("claim_0000000001", 30)):
        ledger = Ledger(JOB_ID, 100)
        for number in (1, 2):
            ledger.hold(f"lease_{number:010d}", 50)
        for number in (1, 2):
            entry = PayEntry(
                task_id=f"task_{number:010d}",
                lease_id=f"lease_{number:010d}",
                account=account(number).address,
                pay_micros=30,
                claim_id=claim_id,
            )
            ledger.accept(entry)
        assert ledger.owed_micros == owed
        assert ledger.refund() == 100 - owed
