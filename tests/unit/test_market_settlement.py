"""Re-auction and settlement."""

from __future__ import annotations

import pytest
from market_records import DOMAIN, JOB_ID, account
from pydantic import ValidationError

from shoal.market.reauction import raise_reserve_up
from shoal.market.settlement import Ledger, PayEntry, PayoutSet
from shoal.protocol.errors import InvalidRequest, InvariantBroken, NotFound, OverBudget
from shoal.protocol.market import Payout
from shoal.protocol.merkle import EMPTY_ROOT, payout_leaf, verify


def entry(task: int, micros: int, who: int = 1, lease: int | None = None) -> PayEntry:
    return PayEntry(
        task_id=f"task_{task:010d}",
        lease_id=f"lease_{task if lease is None else lease:010d}",
        account=account(who).address,
        pay_micros=micros,
    )


def test_the_reserve_rises_by_a_tenth_up_to_the_maximum() -> None:
    seen = [100]
    for _ in range(4):
        seen.append(raise_reserve_up(seen[-1], 125))
    assert seen == [100, 110, 121, 125, 125]
    assert raise_reserve_up(1, 10) == 2


def test_money_is_held_before_it_is_owed() -> None:
    ledger = Ledger(JOB_ID, 1_000)
    ledger.hold("lease_0000000001", 600)
    ledger.hold("lease_0000000001", 600)
    with pytest.raises(OverBudget):
        ledger.hold("lease_0000000002", 401)
    assert (ledger.held_micros, ledger.free_micros) == (600, 400)
    with pytest.raises(InvalidRequest):
        ledger.hold("lease_0000000001", 601)
    with pytest.raises(InvalidRequest):
        ledger.hold("lease_0000000003", -1)
    assert ledger.accept(entry(1, 500)) == 500
    assert (ledger.owed_micros, ledger.held_micros, ledger.free_micros) == (500, 0, 500)
    assert ledger.release("lease_0000000001") == 0


def test_a_task_is_paid_once_whichever_lease_it_comes_from() -> None:
    ledger = Ledger(JOB_ID, 1_000)
    ledger.hold("lease_0000000001", 300)
    ledger.hold("lease_0000000002", 300)
    assert ledger.accept(entry(1, 300)) == 300
    assert ledger.accept(entry(1, 300)) == 0
    assert ledger.accept(entry(1, 300, who=2, lease=2)) == 0
    assert ledger.free_micros == 700


def test_the_refund_is_what_nobody_is_owed() -> None:
    ledger = Ledger(JOB_ID, 1_000)
    ledger.hold("lease_0000000001", 300)
    with pytest.raises(InvalidRequest) as caught:
        ledger.refund()
    assert caught.value.code == "leases_open"
    ledger.accept(entry(1, 299))
    ledger.top_up(5)
    assert ledger.refund() == 706
    assert ledger.refund() + ledger.payouts(1).total_micros == ledger.funded_micros


def test_pay_above_the_hold_stops_the_process() -> None:
    ledger = Ledger(JOB_ID, 1_000)
    ledger.hold("lease_0000000001", 300)
    with pytest.raises(InvariantBroken):
        ledger.accept(entry(1, 301))
    with pytest.raises(InvariantBroken):
        ledger.accept(entry(2, 1))


def test_a_ledger_resumes_from_its_entries() -> None:
    ledger = Ledger(JOB_ID, 1_000)
    for number in (1, 2, 3):
        ledger.hold(f"lease_{number:010d}", 100)
        ledger.accept(entry(number, 100, who=number % 2 + 1))
    resumed = Ledger(JOB_ID, 1_000, ledger.entries)
    assert resumed.payouts(4) == ledger.payouts(4)
    with pytest.raises(InvariantBroken, match="twice"):
        Ledger(JOB_ID, 1_000, [*ledger.entries, ledger.entries[0]])
    with pytest.raises(InvariantBroken, match="funded"):
        Ledger(JOB_ID, 299, ledger.entries)


def test_every_payee_can_prove_its_payout() -> None:
    ledger = Ledger(JOB_ID, 10_000)
    for who in range(1, 6):
        ledger.hold(f"lease_{who:010d}", who * 100)
        ledger.accept(entry(who, who * 100, who=who))
    payouts = ledger.payouts(1)
    root = payouts.root(DOMAIN)
    assert payouts.total_micros == 1_500
    for who in range(1, 6):
        micros, proof = payouts.proof(DOMAIN, account(who).address.lower())
        leaf = payout_leaf(DOMAIN.chain_id, DOMAIN.escrow, JOB_ID, account(who).address, micros)
        assert verify(root, leaf, proof)
        more = payout_leaf(DOMAIN.chain_id, DOMAIN.escrow, JOB_ID, account(who).address, micros + 1)
        assert not verify(root, more, proof)
    with pytest.raises(NotFound):
        payouts.proof(DOMAIN, account(9).address)


def test_spellings_of_one_account_are_one_account() -> None:
    ledger = Ledger(JOB_ID, 1_000)
    ledger.hold("lease_0000000001", 100)
    ledger.hold("lease_0000000002", 100)
    ledger.accept(entry(1, 100))
    low = entry(2, 100).model_copy(update={"account": account(1).address.lower()})
    ledger.accept(low)
    assert [p.cumulative_micros for p in ledger.payouts(1).payouts] == [200]


def test_nobody_owed_is_the_empty_root() -> None:
    assert Ledger(JOB_ID, 5).payouts(1).root(DOMAIN) == EMPTY_ROOT


def test_an_inconsistent_payout_set_cannot_be_made() -> None:
    payout = Payout(job_id=JOB_ID, epoch=1, account=account(1).address, cumulative_micros=5)
    with pytest.raises(ValidationError, match="sum"):
        PayoutSet(job_id=JOB_ID, epoch=1, payouts=(payout,), total_micros=6)
    with pytest.raises(ValidationError, match="once"):
        PayoutSet(job_id=JOB_ID, epoch=1, payouts=(payout, payout), total_micros=10)
    with pytest.raises(ValidationError, match="another"):
        PayoutSet(job_id=JOB_ID, epoch=2, payouts=(payout,), total_micros=5)
