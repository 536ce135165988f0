"""The demo's summary: nothing is lost, pay is the chain's."""

from __future__ import annotations

import pytest
from client_records import drawn, job
from pydantic import ValidationError

from shoal.client.summary import (
    ChainSummary,
    DemoSummary,
    EscrowSummary,
    ModelSummary,
    ProvenanceSummary,
    summarise_workers,
    summary_picture,
)
from shoal.client.views import JobView, parse_view
from shoal.contracts.records import Payment
from shoal.protocol.market import TaskKind


def payment(account: str, amount_micros: int) -> Payment:
    return Payment(
        account=account,
        amount_micros=amount_micros,
        cumulative_micros=amount_micros,
        tx_hash="0x" + "0" * 64,
        block_number=9,
    )


def summary(*, verified: bool) -> DemoSummary:
    account = "0x" + "cd" * 20
    return DemoSummary(
        job_id="0x" + "12" * 32,
        reward_before=0.1,
        reward_before_interval=(0.08, 0.12),
        reward_after=0.62,
        reward_after_interval=(0.58, 0.66),
        steps=150,
        wall_s=200.5,
        tasks=dict.fromkeys(TaskKind, 4),
        workers=summarise_workers(
            parse_view(JobView, job()).workers,
            [payment(account, 700), payment(account, 50)],
            {"12D3": {"rollout": 900}},
            account,
        ),
        escrow=EscrowSummary(funded=1_000, paid=750, refunded=250),
        chain=ChainSummary(chain_id=31337, transactions=30, gas_used=1_234_567),
        model=ModelSummary(path="runs/demo/adapter", sha256="0" * 64),
        provenance=ProvenanceSummary(statements=12, verified=verified),
    )


def test_an_escrow_that_does_not_add_up_is_no_summary() -> None:
    with pytest.raises(ValidationError, match="1000 micros were funded"):
        EscrowSummary(funded=1_000, paid=700, refunded=250)


def test_pay_is_summed_over_the_chain_s_payments() -> None:
    (worker,) = summary(verified=True).workers
    assert worker.paid_micros == 750
    assert worker.killed
    assert worker.price_micros == {"rollout": 900}
    assert (worker.tasks, worker.accepted) == (9, 7)


def test_the_table_says_what_happened() -> None:
    text = drawn(*summary_picture(summary(verified=True)), width=80)
    assert "10.0% ±2.0 → 62.0% ±4.0" in text
    for figure in ("+52.0 points", "150 updates", "PASS", "1,234,567 gas"):
        assert figure in text
    assert "✗ worker-1" in text
    assert "FAIL" in drawn(*summary_picture(summary(verified=False)), width=80)
