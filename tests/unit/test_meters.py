"""Counters and gauges: exact from many threads, bounded whatever labels come."""

from __future__ import annotations

import threading

from shoal.network.meters import Kind, Meters, Sample


def test_counts_and_levels_are_told_apart_by_labels() -> None:
    meters = Meters()
    meters.count("requests_served", protocol="/a/1", outcome="ok")
    meters.count("requests_served", 2, outcome="ok", protocol="/a/1")
    meters.count("requests_served", protocol="/a/1", outcome="expired")
    meters.gauge("connections_open", 3)
    meters.gauge("connections_open", 1)
    assert meters.value("requests_served", protocol="/a/1", outcome="ok") == 3
    assert meters.value("never") == 0
    assert meters.snapshot() == (
        Sample(name="connections_open", kind=Kind.GAUGE, labels=(), value=1),
        Sample(
            name="requests_served",
            kind=Kind.COUNTER,
            labels=(("outcome", "expired"), ("protocol", "/a/1")),
            value=1,
        ),
        Sample(
            name="requests_served",
            kind=Kind.COUNTER,
            labels=(("outcome", "ok"), ("protocol", "/a/1")),
            value=3,
        ),
    )


def test_labels_a_stranger_chooses_fold_into_one() -> None:
    meters = Meters()
    for number in range(10_000):
        meters.count("faults", kind=str(number))
    samples = meters.snapshot()
    assert len(samples) == 257
    assert sum(sample.value for sample in samples) == 10_000
    assert meters.value("faults", kind="other") == 10_000 - 256
    meters.count("faults", kind="7")
    assert meters.value("faults", kind="7") == 2


def test_threads_lose_no_count() -> None:
    meters = Meters()
    ready = threading.Barrier(4)

    def work() -> None:
        ready.wait()
        for _ in range(5_000):
            meters.count("n")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert meters.value("n") == 20_000
