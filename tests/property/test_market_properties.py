"""What holds for every life of a lease and every ledger."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from market_records import DOMAIN, JOB_ID, NOW_MS, account, lease, peer

from shoal.market.lease import (
    LeaseRecord,
    due,
    expire_if_due,
    heartbeat,
    judge,
    offer,
    refuse,
    revoke,
    start,
    submit,
)
from shoal.market.settlement import Ledger, PayEntry
from shoal.protocol.errors import Expired, InvalidRequest, OverBudget, PeerFault


class LeaseLife(RuleBasedStateMachine):
    """Any messages, honest or not, at any time: at most one result, one end, one verdict."""

    @initialize()
    def begin(self) -> None:
        self.now_ms = NOW_MS
        self.record: LeaseRecord = offer(lease(), progress_window_ms=20_000)
        self.taken: set[str] = set()
        self.final: LeaseRecord | None = None

    def attempt(self, new: LeaseRecord) -> None:
        if self.final is not None:
            assert new == self.record
        self.record = new
        if new.result_sha256:
            self.taken.add(new.result_sha256)
        if new.state.is_final:
            self.final = new

    @rule(ms=st.sampled_from([0, 1, 500, 1_000, 2_000, 3_001, 20_001]))
    def time_passes(self, ms: int) -> None:
        self.now_ms += ms

    @rule(
        node=st.sampled_from([1, 1, 1, 2]),
        epoch=st.sampled_from([2, 2, 2, 1, 3]),
        verb=st.sampled_from(["start", "beat", "submit", "refuse"]),
        value=st.integers(0, 3),
    )
    def a_message_arrives(self, node: int, epoch: int, verb: str, value: int) -> None:
        who = {"node": peer(node), "lease_epoch": epoch, "now_ms": self.now_ms}
        try:
            match verb:
                case "start":
                    new = start(self.record, **who)  # type: ignore[arg-type]
                case "beat":
                    new = heartbeat(self.record, progress=value, **who)  # type: ignore[arg-type]
                case "submit":
                    digest = str(value) * 64
                    new = submit(self.record, result_sha256=digest, **who)  # type: ignore[arg-type]
                case _:
                    new = refuse(self.record, reason="no", **who)  # type: ignore[arg-type]
        except (Expired, InvalidRequest, PeerFault):
            return
        assert node == 1
        assert epoch == 2
        self.attempt(new)

    @rule()
    def the_reaper_runs(self) -> None:
        self.attempt(expire_if_due(self.record, now_ms=self.now_ms))
        assert due(self.record, self.now_ms) is None

    @rule(accepted=st.booleans())
    def a_verdict_falls(self, accepted: bool) -> None:
        try:
            new = judge(self.record, accepted=accepted, reason="r", now_ms=self.now_ms)
        except InvalidRequest:
            return
        assert new.result_sha256 is not None
        self.attempt(new)

    @precondition(lambda self: self.record.state.is_open)
    @rule()
    def we_revoke(self) -> None:
        self.attempt(revoke(self.record, reason="cancelled", now_ms=self.now_ms))

    @invariant()
    def at_most_one_result_and_every_open_lease_ends_by_its_deadline(self) -> None:
        assert len(self.taken) <= 1
        too_late_ms = self.record.lease.deadline_ms + 1
        assert self.record.state.is_open == (due(self.record, too_late_ms) is not None)
        assert (self.record.clock is not None) == (self.record.state == "expired")


TestLeaseLife = LeaseLife.TestCase
TestLeaseLife.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


class LedgerLife(RuleBasedStateMachine):
    """Holds, releases, payments and replays in any order never owe more than is funded."""

    @initialize(funded=st.integers(0, 3_000))
    def begin(self, funded: int) -> None:
        self.ledger = Ledger(JOB_ID, funded)
        self.before: dict[str, int] = {}
        self.expected: dict[str, int] = {}

    @rule(lease_id=st.integers(0, 9), micros=st.integers(0, 900))
    def hold(self, lease_id: int, micros: int) -> None:
        try:
            self.ledger.hold(f"lease_{lease_id:010d}", micros)
        except (OverBudget, InvalidRequest):
            return

    @rule(lease_id=st.integers(0, 9))
    def release(self, lease_id: int) -> None:
        self.ledger.release(f"lease_{lease_id:010d}")

    @rule(micros=st.integers(0, 500))
    def top_up(self, micros: int) -> None:
        self.ledger.top_up(micros)

    @rule(
        lease_id=st.integers(0, 9),
        task=st.integers(0, 9),
        who=st.integers(1, 3),
        share=st.integers(0, 100),
    )
    def accept(self, lease_id: int, task: int, who: int, share: int) -> None:
        name = f"lease_{lease_id:010d}"
        held = self._held(name)
        entry = PayEntry(
            task_id=f"task_{task:010d}",
            lease_id=name,
            account=account(who).address,
            pay_micros=held * share // 100,
        )
        paid = self.ledger.accept(entry)
        if entry.task_id in self.expected:
            assert paid == 0
        else:
            self.expected[entry.task_id] = entry.pay_micros
            assert paid == entry.pay_micros

    def _held(self, name: str) -> int:
        return self.ledger._held.get(name, 0)

    @invariant()
    def never_more_than_funded_and_never_less_than_before(self) -> None:
        ledger = self.ledger
        assert ledger.owed_micros + ledger.held_micros <= ledger.funded_micros
        assert ledger.free_micros >= 0
        assert ledger.owed_micros == sum(self.expected.values())
        now = {p.account: p.cumulative_micros for p in ledger.payouts(1).payouts}
        assert sum(now.values()) == ledger.owed_micros
        assert all(now.get(who, 0) >= micros for who, micros in self.before.items())
        self.before = now


TestLedgerLife = LedgerLife.TestCase
TestLedgerLife.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@settings(max_examples=60, deadline=None)
@given(
    pays=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 500)), max_size=12),
    shuffle=st.randoms(use_true_random=False),
)
def test_the_order_of_verdicts_changes_no_payout(
    pays: list[tuple[int, int]], shuffle: random.Random
) -> None:
    entries = [
        PayEntry(
            task_id=f"task_{n:010d}",
            lease_id=f"lease_{n:010d}",
            account=account(who).address,
            pay_micros=micros,
        )
        for n, (who, micros) in enumerate(pays)
    ]
    replayed = entries * 2
    shuffle.shuffle(replayed)

    def settle(order: list[PayEntry]) -> bytes:
        ledger = Ledger(JOB_ID, 10_000)
        for entry in entries:
            ledger.hold(entry.lease_id, entry.pay_micros)
        for entry in order:
            ledger.accept(entry)
        return ledger.payouts(3).root(DOMAIN)

    assert settle(entries) == settle(replayed)


def test_without_a_hold_the_ledger_would_overspend() -> None:
    """Negative control: the hold is what keeps pay inside the funds."""
    ledger = Ledger(JOB_ID, 100)
    with pytest.raises(OverBudget):
        ledger.hold("lease_0000000001", 101)
    ledger._held["lease_0000000001"] = 101
    ledger.accept(
        PayEntry(
            task_id="task_0000000001",
            lease_id="lease_0000000001",
            account=account(1).address,
            pay_micros=101,
        )
    )
    assert ledger.owed_micros > ledger.funded_micros
