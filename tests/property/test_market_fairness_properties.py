"""Weighted shares, whatever the jobs' weights and the sizes of their tasks."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.market.fairness import FairShares

weights = st.lists(st.floats(0.1, 100), min_size=2, max_size=4)
sizes = st.lists(st.integers(1, 1_000), min_size=50, max_size=300)


def serve(job_weights: dict[str, float], service_ms: list[int]) -> dict[str, float]:
    """The service of each job when all of them always want more."""
    shares, served = FairShares(), dict.fromkeys(job_weights, 0.0)
    for amount in service_ms:
        job = shares.next_of(job_weights)
        shares.charge(job, amount, weight=job_weights[job])
        served[job] += amount
    return served


@settings(max_examples=100, deadline=None)
@given(weights=weights, service_ms=sizes)
def test_services_stand_in_the_ratio_of_the_weights(
    weights: list[float], service_ms: list[int]
) -> None:
    jobs = {str(number): weight for number, weight in enumerate(weights)}
    served = serve(jobs, service_ms)
    largest = max(service_ms)
    for one in jobs:
        for other in jobs:
            # Source: start-time fair queuing, theorem 1.
            bound = largest / jobs[one] + largest / jobs[other]
            apart = abs(served[one] / jobs[one] - served[other] / jobs[other])
            assert apart <= bound * (1 + 1e-9)


@settings(max_examples=50, deadline=None)
@given(weights=weights, service_ms=sizes, idle=st.integers(0, 200))
def test_a_job_that_wants_nothing_leaves_its_share_and_returns_to_no_more_than_it(
    weights: list[float], service_ms: list[int], idle: int
) -> None:
    jobs = {str(number): weight for number, weight in enumerate(weights)}
    shares = FairShares()
    away = [job for job in jobs if job != "0"]
    for amount in service_ms[:idle]:
        job = shares.next_of(away)
        assert job != "0"
        shares.charge(job, amount, weight=jobs[job])
    served = dict.fromkeys(jobs, 0.0)
    for amount in service_ms:
        job = shares.next_of(jobs)
        shares.charge(job, amount, weight=jobs[job])
        served[job] += amount
    largest = max(service_ms)
    for other in away:
        ahead = served["0"] / jobs["0"] - served[other] / jobs[other]
        assert ahead <= (2 * largest / jobs["0"] + 2 * largest / jobs[other]) * (1 + 1e-9)


def test_taking_turns_without_weights_breaks_the_bound() -> None:
    # The bound does separate: it fails where the jobs merely take turns.
    jobs = {"light": 1.0, "heavy": 9.0}
    served = dict.fromkeys(jobs, 100 * 10.0)
    apart = abs(served["light"] / jobs["light"] - served["heavy"] / jobs["heavy"])
    assert apart > 10 / jobs["light"] + 10 / jobs["heavy"]
    fair = serve(jobs, [10] * 200)
    assert abs(fair["light"] / 1 - fair["heavy"] / 9) <= 10 + 10 / 9
