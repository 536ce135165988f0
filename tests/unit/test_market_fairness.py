"""Shares, pauses and pace: whose turn it is, who sits out, and what takes too long."""

from __future__ import annotations

import pytest
from market_records import NOW_MS, lease, peer

from shoal.market.fairness import FairShares
from shoal.market.lease import LeaseState, fail, offer, outrun, start, submit
from shoal.market.pace import Pace
from shoal.market.pause import FIRST_PAUSE_MS, LONGEST_PAUSE_MS, Pauses
from shoal.protocol.errors import Expired, InvalidRequest, PeerFault
from shoal.protocol.market import TaskKind
from shoal.protocol.node import FailureCause

JOB, ROLLOUT = "0x" + "a" * 64, TaskKind.ROLLOUT


def test_a_job_that_was_away_has_no_claim_on_the_past() -> None:
    shares = FairShares()
    for _ in range(100):
        shares.charge("busy", 10, weight=1)
    turns = []
    for _ in range(10):
        job = shares.next_of(["busy", "back"])
        shares.charge(job, 10, weight=1)
        turns.append(job)
    assert abs(turns.count("back") - turns.count("busy")) <= 2


def test_an_estimate_is_corrected_by_what_the_work_took() -> None:
    shares = FairShares()
    shares.charge("a", 1_000, weight=1)
    shares.charge("b", 1_000, weight=1)
    shares.correct("a", -900, weight=1)
    assert shares.next_of(["b", "a"]) == "a"
    shares.correct("gone", 5, weight=1)
    shares.forget("a")
    assert shares.next_of(["a", "b"]) == "a"


def test_what_cannot_be_shared_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        FairShares().next_of([])
    with pytest.raises(InvalidRequest):
        FairShares().charge("a", 1, weight=0)
    with pytest.raises(InvalidRequest):
        FairShares().charge("a", -1, weight=1)


def test_pauses_double_to_a_limit_and_end_with_a_pardon() -> None:
    pauses, now_ms = Pauses(), NOW_MS
    lengths = []
    for _ in range(9):
        lengths.append(pauses.strike("n", now_ms=now_ms) - now_ms)
        now_ms += lengths[-1]
        assert pauses.is_paused("n", now_ms=now_ms - 1)
        assert not pauses.is_paused("n", now_ms=now_ms)
    assert lengths[:3] == [FIRST_PAUSE_MS, 2 * FIRST_PAUSE_MS, 4 * FIRST_PAUSE_MS]
    assert lengths[-1] == LONGEST_PAUSE_MS
    pauses.strike("n", now_ms=now_ms)
    pauses.pardon("n")
    assert not pauses.is_paused("n", now_ms=now_ms)
    assert pauses.strike("n", now_ms=now_ms) == now_ms + FIRST_PAUSE_MS


def test_free_strikes_cost_nothing() -> None:
    pauses = Pauses(free_strikes=1)
    pauses.strike("n", now_ms=NOW_MS)
    assert not pauses.is_paused("n", now_ms=NOW_MS)
    assert pauses.strike("n", now_ms=NOW_MS) == NOW_MS + FIRST_PAUSE_MS


def test_a_first_lease_is_allowed_more_than_a_known_pace() -> None:
    pace = Pace()

    def allowance_ms(node: str, backlog_ms: int = 0) -> int:
        return pace.allowance_ms(JOB, ROLLOUT, node, 4, backlog_ms=backlog_ms, first_ms=600_000)

    assert pace.median_unit_ms(JOB, ROLLOUT) is None
    assert allowance_ms("new") == 600_000
    pace.note(JOB, ROLLOUT, "old", 100)
    assert allowance_ms("old") == 3 * 100 * 4
    assert allowance_ms("new") == 10 * 100 * 4
    # What the node holds before it takes its time first.
    assert allowance_ms("old", backlog_ms=1_000) == 3 * (100 * 4 + 1_000)
    pace.forget(JOB)
    assert pace.samples(JOB, ROLLOUT, "old") == ()


def test_a_lease_that_fails_says_why_and_is_over() -> None:
    record = start(offer(lease()), node=peer(1), lease_epoch=2, now_ms=NOW_MS)
    told = {"cause": FailureCause.ENVIRONMENT, "reason": "it threw", "now_ms": NOW_MS + 5}
    failed = fail(record, node=peer(1), lease_epoch=2, **told)  # type: ignore[arg-type]
    assert (failed.state, failed.cause) == (LeaseState.FAILED, FailureCause.ENVIRONMENT)
    assert failed.state.is_final
    assert fail(failed, node=peer(1), lease_epoch=2, **told) is failed  # type: ignore[arg-type]
    with pytest.raises(PeerFault):
        fail(record, node=peer(2), lease_epoch=2, **told)  # type: ignore[arg-type]
    with pytest.raises(Expired):
        fail(record, node=peer(1), lease_epoch=1, **told)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest):
        submit(failed, node=peer(1), lease_epoch=2, result_sha256="a" * 64, now_ms=NOW_MS + 6)


def test_a_lease_is_outrun_even_with_its_result_in() -> None:
    record = start(offer(lease()), node=peer(1), lease_epoch=2, now_ms=NOW_MS)
    sent = submit(record, node=peer(1), lease_epoch=2, result_sha256="a" * 64, now_ms=NOW_MS + 1)
    for behind in (record, sent):
        assert outrun(behind, now_ms=NOW_MS + 2).state is LeaseState.REVOKED
    with pytest.raises(InvalidRequest):
        outrun(outrun(record, now_ms=NOW_MS + 2), now_ms=NOW_MS + 3)
