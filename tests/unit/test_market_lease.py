"""Leases: every clock, every fence, every repeat."""

from __future__ import annotations

import pytest
from market_records import JOB_ID, NOW_MS, lease, peer

from shoal.market.lease import (
    LeaseRecord,
    LeaseState,
    due,
    excuse,
    expire_if_due,
    heartbeat,
    judge,
    offer,
    p90_up,
    refuse,
    revoke,
    start,
    submit,
    take,
)
from shoal.market.pace import Pace
from shoal.protocol.errors import Clock, Expired, InvalidRequest, PeerFault
from shoal.protocol.market import TaskKind

RESULT = "a" * 64


def running(at_ms: int = NOW_MS) -> LeaseRecord:
    return start(offer(lease()), node=peer(1), lease_epoch=2, now_ms=at_ms)


def submitted() -> LeaseRecord:
    return submit(running(), node=peer(1), lease_epoch=2, result_sha256=RESULT, now_ms=NOW_MS + 10)


def test_the_straight_way_through() -> None:
    record = running()
    assert start(record, node=peer(1), lease_epoch=2, now_ms=NOW_MS + 9) == record
    record = heartbeat(record, node=peer(1), lease_epoch=2, progress=3, now_ms=NOW_MS + 900)
    assert (record.progress, record.progress_at_ms) == (3, NOW_MS + 900)
    done = judge(submitted(), accepted=True, reason="", now_ms=NOW_MS + 20)
    assert done.state is LeaseState.ACCEPTED
    assert judge(done, accepted=True, reason="", now_ms=NOW_MS + 21) == done
    with pytest.raises(InvalidRequest):
        judge(done, accepted=False, reason="rewards", now_ms=NOW_MS + 21)
    rejected = judge(submitted(), accepted=False, reason="rewards", now_ms=NOW_MS + 20)
    assert rejected.reason == "rewards"


@pytest.mark.parametrize(
    ("record", "last_good_ms", "clock"),
    [
        (offer(lease()), NOW_MS + 2_000, Clock.START),
        (running(), NOW_MS + 5_000, Clock.HEARTBEAT),
        (offer(lease(), progress_window_ms=500), NOW_MS + 2_000, Clock.START),
        (
            start(
                offer(lease(), progress_window_ms=500),
                node=peer(1),
                lease_epoch=2,
                now_ms=NOW_MS,
            ),
            NOW_MS + 500,
            Clock.HEARTBEAT,
        ),
        (
            running().model_copy(
                update={"heard_at_ms": NOW_MS + 59_000, "progress_at_ms": NOW_MS + 59_000}
            ),
            NOW_MS + 60_000,
            Clock.DEADLINE,
        ),
    ],
)
def test_each_clock_runs_out_just_after_its_timer(
    record: LeaseRecord, last_good_ms: int, clock: Clock
) -> None:
    assert due(record, last_good_ms) is None
    assert expire_if_due(record, now_ms=last_good_ms) == record
    expired = expire_if_due(record, now_ms=last_good_ms + 1)
    assert (expired.state, expired.clock) == (LeaseState.EXPIRED, clock)
    with pytest.raises(Expired) as caught:
        submit(expired, node=peer(1), lease_epoch=2, result_sha256=RESULT, now_ms=NOW_MS)
    assert caught.value.clock is clock


def test_the_offer_the_start_and_the_heartbeat_have_clocks_of_their_own() -> None:
    offered = offer(lease(), answer_within_ms=500)
    assert due(offered, NOW_MS + 500) is None
    unanswered = expire_if_due(offered, now_ms=NOW_MS + 501)
    assert unanswered.clock is Clock.OFFER
    assert "not answered" in (unanswered.reason or "")
    with pytest.raises(Expired) as caught:
        take(offered, node=peer(1), lease_epoch=2, now_ms=NOW_MS + 501)
    assert caught.value.clock is Clock.OFFER

    taken = take(offered, node=peer(1), lease_epoch=2, now_ms=NOW_MS + 500)
    assert (taken.state, taken.state.is_open) == (LeaseState.TAKEN, True)
    assert take(taken, node=peer(1), lease_epoch=2, now_ms=NOW_MS + 600) == taken
    assert due(taken, NOW_MS + 2_000) is None
    assert expire_if_due(taken, now_ms=NOW_MS + 2_001).clock is Clock.START

    begun = heartbeat(taken, node=peer(1), lease_epoch=2, progress=0, now_ms=NOW_MS + 2_000)
    assert begun.state is LeaseState.RUNNING
    assert take(begun, node=peer(1), lease_epoch=2, now_ms=NOW_MS + 2_001) == begun
    assert due(begun, NOW_MS + 7_000) is None
    assert expire_if_due(begun, now_ms=NOW_MS + 7_001).clock is Clock.HEARTBEAT


def test_a_lease_that_was_taken_can_be_given_back_or_handed_in() -> None:
    taken = take(offer(lease()), node=peer(1), lease_epoch=2, now_ms=NOW_MS)
    back = refuse(taken, node=peer(1), lease_epoch=2, reason="full", now_ms=NOW_MS + 1)
    assert back.state is LeaseState.REFUSED
    done = submit(taken, node=peer(1), lease_epoch=2, result_sha256=RESULT, now_ms=NOW_MS + 1)
    assert done.state is LeaseState.SUBMITTED
    with pytest.raises(PeerFault):
        take(offer(lease()), node=peer(2), lease_epoch=2, now_ms=NOW_MS)
    with pytest.raises(InvalidRequest):
        take(back, node=peer(1), lease_epoch=2, now_ms=NOW_MS + 2)


def test_progress_must_rise_within_its_window() -> None:
    record = running()
    for second in range(1, 61):
        record = heartbeat(
            record, node=peer(1), lease_epoch=2, progress=0, now_ms=NOW_MS + second * 999
        )
    with pytest.raises(Expired):
        heartbeat(
            offer(lease(deadline_ms=NOW_MS + 900_000)).model_copy(
                update={"state": LeaseState.RUNNING}
            ),
            node=peer(1),
            lease_epoch=2,
            progress=0,
            now_ms=NOW_MS + 60_001,
        )
    record = heartbeat(record, node=peer(1), lease_epoch=2, progress=5, now_ms=NOW_MS + 59_950)
    with pytest.raises(PeerFault, match="only rises"):
        heartbeat(record, node=peer(1), lease_epoch=2, progress=4, now_ms=NOW_MS + 59_960)


def test_a_heartbeat_before_the_start_is_the_start() -> None:
    record = heartbeat(offer(lease()), node=peer(1), lease_epoch=2, progress=1, now_ms=NOW_MS + 1)
    assert record.state is LeaseState.RUNNING


def test_fences() -> None:
    with pytest.raises(Expired) as caught:
        submit(running(), node=peer(1), lease_epoch=1, result_sha256=RESULT, now_ms=NOW_MS)
    assert caught.value.code == "fenced"
    with pytest.raises(PeerFault) as fault:
        submit(running(), node=peer(1), lease_epoch=3, result_sha256=RESULT, now_ms=NOW_MS)
    assert fault.value.code == "forged_epoch"
    with pytest.raises(PeerFault) as fault:
        submit(running(), node=peer(2), lease_epoch=2, result_sha256=RESULT, now_ms=NOW_MS)
    assert fault.value.code == "wrong_node"
    with pytest.raises(Expired):
        submit(running(), node=peer(1), lease_epoch=2, result_sha256=RESULT, now_ms=NOW_MS + 60_001)


def test_a_result_counts_once() -> None:
    record = submitted()
    again = submit(
        record, node=peer(1), lease_epoch=2, result_sha256=RESULT, now_ms=NOW_MS + 90_000
    )
    assert again == record
    with pytest.raises(PeerFault) as caught:
        submit(record, node=peer(1), lease_epoch=2, result_sha256="b" * 64, now_ms=NOW_MS + 11)
    assert caught.value.evidence == "b" * 64


def test_refusing_and_revoking_end_an_open_lease_only() -> None:
    refused = refuse(offer(lease()), node=peer(1), lease_epoch=2, reason="too large", now_ms=NOW_MS)
    assert (refused.state, refused.reason) == (LeaseState.REFUSED, "too large")
    revoked = revoke(running(), reason="job cancelled", now_ms=NOW_MS)
    assert revoke(revoked, reason="again", now_ms=NOW_MS) == revoked
    for ended in (refused, revoked):
        assert ended.state.is_final
        with pytest.raises(InvalidRequest):
            submit(ended, node=peer(1), lease_epoch=2, result_sha256=RESULT, now_ms=NOW_MS)
    with pytest.raises(InvalidRequest):
        revoke(submitted(), reason="late", now_ms=NOW_MS)
    with pytest.raises(PeerFault):
        refuse(offer(lease()), node=peer(2), lease_epoch=2, reason="", now_ms=NOW_MS)


def test_deadlines_are_three_times_the_slow_tenth() -> None:
    assert p90_up(list(range(1, 11))) == 9
    assert p90_up([7]) == 7
    pace = Pace()
    for unit_ms in range(10, 101, 10):
        pace.note(JOB_ID, TaskKind.ROLLOUT, peer(1), unit_ms)
    for backlog_ms, allowed_ms in ((0, 3 * 90 * 8), (100, 3 * (90 * 8 + 100))):
        assert allowed_ms == pace.allowance_ms(
            JOB_ID, TaskKind.ROLLOUT, peer(1), 8, backlog_ms=backlog_ms, first_ms=1
        )
    with pytest.raises(InvalidRequest):
        p90_up([])


def test_excused_time_moves_the_clocks_of_silence_and_no_other() -> None:
    record = excuse(running(), silent_ms=5_000, now_ms=NOW_MS + 6_000)
    assert due(record, NOW_MS + 10_000) is None
    assert due(record, NOW_MS + 10_001) is Clock.HEARTBEAT
    assert due(record, record.lease.deadline_ms + 1) is Clock.DEADLINE
    # Never into the future: what was heard just now is not heard later.
    assert excuse(running(), silent_ms=99_000, now_ms=NOW_MS + 10).heard_at_ms == NOW_MS + 10
    assert excuse(running(NOW_MS + 50), silent_ms=5, now_ms=NOW_MS).heard_at_ms == NOW_MS + 50


def test_a_lease_taken_before_the_silence_may_have_been_started_in_it() -> None:
    taken = take(offer(lease()), node=peer(1), lease_epoch=2, now_ms=NOW_MS)
    record = excuse(taken, silent_ms=5_000, now_ms=NOW_MS + 5_000)
    assert record.state is LeaseState.RUNNING
    assert due(record, NOW_MS + 5_000) is None
    # The control: unexcused, its start clock has run out.
    assert due(taken, NOW_MS + 5_000) is Clock.START


@pytest.mark.parametrize("record", [offer(lease()), submitted()])
def test_what_is_not_under_way_needs_no_excuse(record: LeaseRecord) -> None:
    assert excuse(record, silent_ms=5_000, now_ms=NOW_MS + 5_000) is record
    assert excuse(running(), silent_ms=0, now_ms=NOW_MS) == running()
