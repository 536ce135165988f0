"""Who hands in when: what a lag counts for, who is timely, and what a job gains by asking."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from shoal.market import pace as pace_module
from shoal.market.pace import Outlook, Pace, remaining_ms, timely_ms
from shoal.protocol.market import TaskKind

JOB, ROLLOUT, GRADIENT = "job", TaskKind.ROLLOUT, TaskKind.GRADIENT
UNIT_MS, UNITS = 10, 12


def outlook(ahead_ms: int = 0, lag_ms: int = 0, unit_ms: int = UNIT_MS) -> Outlook:
    return Outlook(ahead_ms=ahead_ms, lag_ms=lag_ms, unit_ms=unit_ms)


def timely(*nodes: Outlook, parcels: int = 1) -> int:
    return timely_ms(nodes, parcel_units=UNITS, waiting_units=parcels * UNITS)


def test_a_nodes_lag_is_the_median_of_its_last_three() -> None:
    pace = Pace()
    assert pace.lag_ms(JOB, ROLLOUT, "n", now_ms=0) == 0
    for now_ms, lag_ms in enumerate((20, 1_000)):
        pace.note_lag(JOB, ROLLOUT, "n", lag_ms, now_ms=now_ms)
    # One odd lease says nothing yet; two do, and one good one later does not undo it.
    assert pace.lag_ms(JOB, ROLLOUT, "n", now_ms=2) == 20
    pace.note_lag(JOB, ROLLOUT, "n", 1_200, now_ms=2)
    assert pace.lag_ms(JOB, ROLLOUT, "n", now_ms=3) == 1_000
    pace.note_lag(JOB, ROLLOUT, "n", 20, now_ms=3)
    assert pace.lag_ms(JOB, ROLLOUT, "n", now_ms=4) == 1_000
    # Of that node, job and kind alone.
    assert pace.lag_ms(JOB, GRADIENT, "n", now_ms=4) == 0
    assert pace.lag_ms(JOB, ROLLOUT, "m", now_ms=4) == 0
    pace.forget(JOB)
    assert pace.lag_ms(JOB, ROLLOUT, "n", now_ms=4) == 0


@pytest.mark.parametrize(("lag_ms", "memory_ms"), [(400, 8_000), (1_000, 10_000), (60_000, 10_000)])
def test_a_lag_is_believed_for_twenty_times_its_length_or_ten_seconds(
    lag_ms: int, memory_ms: int
) -> None:
    pace = Pace()
    pace.note_lag(JOB, ROLLOUT, "n", lag_ms, now_ms=500)
    assert pace.lag_ms(JOB, ROLLOUT, "n", now_ms=500 + memory_ms) == lag_ms
    assert pace.lag_ms(JOB, ROLLOUT, "n", now_ms=501 + memory_ms) == 0


def test_a_nodes_own_median_goes_before_everybodys() -> None:
    pace = Pace()
    assert pace.unit_ms(JOB, ROLLOUT, "n") is None
    for unit_ms in (10, 12, 11):
        pace.note(JOB, ROLLOUT, "n", unit_ms)
    assert pace.unit_ms(JOB, ROLLOUT, "other") == pace.median_unit_ms(JOB, ROLLOUT) == 11
    pace.note(JOB, ROLLOUT, "other", 90)
    assert (pace.unit_ms(JOB, ROLLOUT, "other"), pace.unit_ms(JOB, ROLLOUT, "n")) == (90, 11)
    pace.forget(JOB)
    assert pace.unit_ms(JOB, ROLLOUT, "n") is None


def test_one_parcel_may_take_twice_as_long_as_the_quickest() -> None:
    assert timely(outlook(), outlook(lag_ms=1_000)) == 2 * UNITS * UNIT_MS
    # Who is quick but busy counts from when it will be free.
    assert timely(outlook(ahead_ms=500), outlook(lag_ms=1_000)) == 500 + 2 * UNITS * UNIT_MS
    assert timely(outlook(lag_ms=1_000)) == 2 * (1_000 + UNITS * UNIT_MS)


def test_the_more_waits_the_slower_a_node_may_be() -> None:
    quick, slow = outlook(), outlook(lag_ms=1_000)
    few, many = timely(quick, slow, parcels=2), timely(quick, slow, parcels=12)
    assert few < slow.finish_ms(UNITS) < many


def test_nodes_alike_are_all_timely_however_little_waits() -> None:
    for number in range(1, 6):
        nodes = [outlook(lag_ms=30)] * number
        assert all(node.finish_ms(UNITS) <= timely(*nodes) for node in nodes)


def test_the_slowest_numbers_are_no_trouble() -> None:
    assert timely(outlook(unit_ms=0), parcels=3) >= 0
    assert timely(outlook(unit_ms=2**52, lag_ms=2**52), parcels=3) >= 2**52


def test_a_lease_that_is_late_may_last_as_long_again() -> None:
    assert remaining_ms(0, 300) == 300
    assert remaining_ms(300, 300) == 0
    assert remaining_ms(1_000, 300) == 700


class Job:
    """Policy versions one after another, each of some parcels, in virtual time.

    Every node does one lease at a time and the first ready one has the best price.  Whoever
    ``lags`` adds that to each lease; computing takes everybody as long.
    """

    def __init__(self, lags: dict[str, Callable[[int], int]]) -> None:
        self.lags, self.pace, self.now_ms = lags, Pace(), 0
        self.served = dict.fromkeys(lags, 0)
        self.pace.note(JOB, ROLLOUT, "anybody", UNIT_MS)

    def makespan_ms(self, versions: int, parcels: int) -> int:
        began_ms = self.now_ms
        for _ in range(versions):
            self.update(parcels)
        return self.now_ms - began_ms

    def update(self, parcels: int) -> None:
        waiting, busy = parcels, dict[str, tuple[int, int]]()
        while waiting or busy:
            for node in [node for node in self.lags if node not in busy]:
                if waiting and self.is_timely(node, waiting, busy):
                    lag_ms = self.lags[node](self.now_ms)
                    busy[node] = self.now_ms + lag_ms + UNITS * UNIT_MS, lag_ms
                    waiting -= 1
                    self.served[node] += 1
            node = min(busy, key=lambda name: busy[name][0])
            self.now_ms, lag_ms = busy.pop(node)
            self.pace.note_lag(JOB, ROLLOUT, node, lag_ms, now_ms=self.now_ms)

    def is_timely(self, node: str, waiting: int, busy: dict[str, tuple[int, int]]) -> bool:
        nodes = {
            name: outlook(
                ahead_ms=max(0, busy[name][0] - self.now_ms) if name in busy else 0,
                lag_ms=self.pace.lag_ms(JOB, ROLLOUT, name, now_ms=self.now_ms),
            )
            for name in self.lags
        }
        by_ms = pace_module.timely_ms(
            nodes.values(), parcel_units=UNITS, waiting_units=waiting * UNITS
        )
        return nodes[node].finish_ms(UNITS) <= by_ms


def steady(lag_ms: int) -> Callable[[int], int]:
    return lambda now_ms: lag_ms


CLEAN = {"home": steady(20), "far": steady(20), "open": steady(20)}
SLOW = {"home": steady(1_500), "far": steady(1_500), "open": steady(20)}


@pytest.mark.parametrize("parcels", [1, 2, 4])
def test_two_slow_lines_of_three_do_not_hold_a_job_up(
    parcels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean_ms = Job(CLEAN).makespan_ms(200, parcels)
    with_rule = Job(SLOW).makespan_ms(200, parcels)
    # The best that the one quick node can do, and a little to find that out and to look again.
    alone_ms = Job({"open": steady(20)}).makespan_ms(200, parcels)
    assert with_rule <= 1.5 * alone_ms
    # The control: were everybody timely, the job would wait for the slow lines.
    monkeypatch.setattr(pace_module, "timely_ms", lambda *args, **kwargs: 1 << 40)
    assert Job(SLOW).makespan_ms(200, parcels) > 3 * max(clean_ms, alone_ms / 2)


def test_a_line_that_has_recovered_is_found_out_and_served_again() -> None:
    recovers = {"home": lambda now_ms: 1_500 if now_ms < 10_000 else 20, "open": steady(20)}
    job = Job(recovers)
    job.makespan_ms(60, 2)
    while job.now_ms < 60_000:
        job.update(2)
    before = job.served["home"]
    job.makespan_ms(50, 2)
    assert job.served["home"] - before == 50


def test_where_all_are_slow_all_are_served() -> None:
    lags = {"a": 1_200, "b": 1_500, "c": 1_900}
    job = Job({name: steady(lag_ms) for name, lag_ms in lags.items()})
    job.makespan_ms(50, 3)
    assert set(job.served.values()) == {50}


def test_a_large_lot_is_shared_with_slow_lines() -> None:
    job = Job(SLOW)
    job.makespan_ms(5, 60)
    assert min(job.served.values()) >= 5 * 2
    # As quick as the quick node alone would never be.
    assert job.now_ms < Job({"open": steady(20)}).makespan_ms(5, 60)
