"""Reputation: the bound, the decay, what counts and what does not."""

from __future__ import annotations

from decimal import Decimal, getcontext, localcontext
from itertools import pairwise

import pytest
from market_records import NOW_MS, account, lease, peer

from shoal.market import lease as leases
from shoal.market import reputation as reputations
from shoal.market.beta import PPM, beta_lower_bound_down
from shoal.market.lease import LeaseRecord, LeaseState
from shoal.market.reputation import (
    HALF_LIFE_MS,
    NEWCOMER,
    QUANTILE_PPM,
    STEP_MS,
    Ending,
    Outcome,
    Reputation,
    measured_unit_ms_up,
    outcome_of,
)
from shoal.protocol.errors import InvalidRequest
from shoal.protocol.node import FailureCause

WORK = "rollout:qwen:512:8"
START_MS = NOW_MS // STEP_MS * STEP_MS


def outcome(
    number: int = 0,
    *,
    who: int = 1,
    node: int | None = None,
    ending: Ending = Ending.ACCEPTED,
    unit_ms: int = 100,
    at_ms: int = START_MS,
) -> Outcome:
    return Outcome(
        lease_id=f"lease_{number:010d}",
        account=account(who).address,
        node=peer(who if node is None else node),
        work=WORK,
        ending=ending,
        unit_ms=unit_ms if ending is Ending.ACCEPTED else None,
        ended_at_ms=at_ms,
    )


def record_of(accepted: int, rejected: int) -> Reputation:
    endings = [Ending.ACCEPTED] * accepted + [Ending.REJECTED] * rejected
    return Reputation(outcome(n, ending=ending) for n, ending in enumerate(endings))


# By mpmath 1.3.0: the root of betainc(a, b, 0, x, regularized=True) = 0.1 by forty bisections
# at thirty digits, × 1,000,000, rounded down.
@pytest.mark.parametrize(
    ("alpha", "beta", "expected_ppm"),
    [
        ("4", "1", 562_341),
        ("14", "1", 848_342),
        ("4", "11", 130_939),
        ("104", "3", 950_571),
        ("4", "500", 3_473),
        ("3000", "400", 875_225),
        ("1004.5", "1.25", 997_292),
        ("7.123456", "2.654321", 541_086),
        ("4.000001", "1", 562_341),
    ],
)
def test_the_bound_is_that_of_the_beta_distribution(
    alpha: str, beta: str, expected_ppm: int
) -> None:
    a, b = (int(Decimal(count) * PPM) for count in (alpha, beta))
    assert beta_lower_bound_down(a, b, 100_000) == expected_ppm


def test_the_bound_does_not_depend_on_the_callers_decimal_context() -> None:
    beta_lower_bound_down.cache_clear()
    with localcontext() as context:
        context.prec = 5
        coarse = beta_lower_bound_down(4_123_456, 1_654_321, 100_000)
        assert getcontext().prec == 5
    beta_lower_bound_down.cache_clear()
    assert coarse == beta_lower_bound_down(4_123_456, 1_654_321, 100_000)


@pytest.mark.parametrize(
    "arguments", [(0, PPM, 100_000), (PPM, -1, 100_000), (PPM, PPM, 0), (10**13, PPM, 100_000)]
)
def test_a_bound_outside_its_range_is_refused(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        beta_lower_bound_down(*arguments)
    assert caught.value.code == "bad_beta"


def test_a_standing_counts_from_the_prior() -> None:
    standing = record_of(10, 0).standing(account(1).address, now_ms=START_MS)
    assert standing.acceptance_ppm == 848_342
    assert record_of(0, 10).standing(account(1).address, now_ms=START_MS).acceptance_ppm == 130_939
    assert record_of(100, 2).standing(account(1).address, now_ms=START_MS).num_receipts == 102
    assert Reputation().standing(account(9).address, now_ms=START_MS) == NEWCOMER


def test_beyond_a_million_outcomes_the_share_stays() -> None:
    many, more = (Reputation([outcome()]) for _ in range(2))
    for book, times in ((many, 900_000), (more, 9_000_000)):
        tally = book._tallies[account(1).address.lower()]
        tally.accepted[START_MS // STEP_MS] = times
        tally.against[START_MS // STEP_MS] = times // 9
    bounds = [b.standing(account(1).address, now_ms=START_MS).acceptance_ppm for b in (many, more)]
    assert bounds[0] == pytest.approx(900_000, abs=3_500)
    assert bounds[1] == pytest.approx(bounds[0], abs=3_500)


def test_long_counts_are_rounded_against_the_provider_and_few_bounds_are_computed() -> None:
    exact = beta_lower_bound_down((4 + 1_000) * PPM, (1 + 37) * PPM, QUANTILE_PPM)
    rounded = record_of(1_000, 37).standing(account(1).address, now_ms=START_MS).acceptance_ppm
    assert exact * 0.98 < rounded <= exact
    reputations._bound_ppm.cache_clear()
    for accepted in range(1_000, 1_200):
        reputations._acceptance_ppm(accepted * PPM, 0)
    assert reputations._bound_ppm.cache_info().misses < 16


def test_counts_halve_in_three_days_and_are_forgotten_in_thirty() -> None:
    book = record_of(64, 0)
    who = account(1).address
    weights = [book.standing(who, now_ms=START_MS + n * HALF_LIFE_MS) for n in range(11)]
    assert [w.accepted_ppm for w in weights[:4]] == [64_000_000, 32_000_000, 16_000_000, 8_000_000]
    assert weights[9].num_receipts == 64
    assert weights[10] == NEWCOMER
    # Between the half-lives it falls with every step of three hours, and never jumps.
    falling = [book.standing(who, now_ms=START_MS + n * STEP_MS).accepted_ppm for n in range(48)]
    for earlier, later in pairwise(falling):
        assert 97 * earlier < 100 * later < 98 * earlier


def test_receipts_are_judged_results() -> None:
    book = Reputation(outcome(n, ending=ending) for n, ending in enumerate(Ending))
    assert book.standing(account(1).address, now_ms=START_MS).num_receipts == 2


def test_rejections_of_one_node_are_the_accounts() -> None:
    book = record_of(10, 0)
    before = book.standing(account(1).address, now_ms=START_MS).acceptance_ppm
    book.note(outcome(50, node=7, ending=Ending.EXPIRED))
    shouted = account(1).address.upper().replace("0X", "0x")
    assert book.standing(shouted, now_ms=START_MS).acceptance_ppm < before


def test_speed_is_the_p90_of_the_nodes_latest_results_at_this_work() -> None:
    book = Reputation()
    for n in range(100):
        slow = 900 if n % 10 == 0 else 100
        book.note(outcome(n, unit_ms=slow if n >= 50 else 5_000, at_ms=START_MS + n))
    assert book.unit_ms(peer(1), WORK, now_ms=START_MS) == 100
    book.note(outcome(100, unit_ms=901, at_ms=START_MS + 100))
    assert book.unit_ms(peer(1), WORK, now_ms=START_MS) == 100
    book.note(outcome(101, unit_ms=902, at_ms=START_MS + 101))
    assert book.unit_ms(peer(1), WORK, now_ms=START_MS) == 900
    assert book.unit_ms(peer(1), "gradient:qwen:512:8", now_ms=START_MS) is None
    assert book.unit_ms(peer(1), WORK, now_ms=START_MS + 10 * HALF_LIFE_MS) is None


def test_the_target_is_the_lower_median_of_the_nodes() -> None:
    book = Reputation(outcome(n, who=n, unit_ms=n * 100) for n in range(1, 5))
    nodes = [peer(n) for n in range(1, 6)]
    assert book.target_unit_ms(nodes, WORK, now_ms=START_MS) == 200
    assert book.target_unit_ms([peer(9)], WORK, now_ms=START_MS) is None


def ended(state: LeaseState, cause: FailureCause | None = None) -> LeaseRecord:
    return leases.offer(lease()).model_copy(
        update={"state": state, "cause": cause, "ended_at_ms": NOW_MS + 5}
    )


@pytest.mark.parametrize(
    ("record", "ending"),
    [
        (ended(LeaseState.ACCEPTED), Ending.ACCEPTED),
        (ended(LeaseState.REJECTED), Ending.REJECTED),
        (ended(LeaseState.EXPIRED), Ending.EXPIRED),
        (ended(LeaseState.REFUSED), Ending.REFUSED),
        (ended(LeaseState.FAILED, FailureCause.NODE), Ending.FAILED),
        (ended(LeaseState.FAILED, FailureCause.STOPPING), None),
        (ended(LeaseState.FAILED, FailureCause.NOT_FINITE), None),
        (ended(LeaseState.REVOKED), None),
        (leases.offer(lease()), None),
    ],
)
def test_only_what_the_provider_answers_for_counts(
    record: LeaseRecord, ending: Ending | None
) -> None:
    found = outcome_of(record, work=WORK, unit_ms=70)
    assert (found.ending if found else None) == ending
    assert outcome_of(record, work=WORK, unit_ms=70, blameless=True) is None
    if found is not None:
        assert found.unit_ms == (70 if ending is Ending.ACCEPTED else None)


def test_time_is_measured_by_our_clock_and_shared_with_what_came_before() -> None:
    record = leases.offer(lease())

    def measured(taken_ms: int, expected_ms: int, backlog_ms: int) -> int:
        return measured_unit_ms_up(
            record,
            submitted_at_ms=NOW_MS + taken_ms,
            expected_ms=expected_ms,
            backlog_ms=backlog_ms,
        )

    assert measured(4_000, 400, 0) == 1_000
    assert measured(4_000, 400, 1_200) == 250
    assert measured(0, 0, 0) == 1
    # Ten leases handed in at once, as if each had taken a tenth: the first shows the whole wait.
    together = sorted(measured(4_000, 400, 400 * ahead) for ahead in range(10))
    assert leases.p90_up(together) == 500 > 100


def test_what_is_old_is_forgotten_and_nothing_else() -> None:
    book = record_of(3, 1)
    book.note(outcome(70, who=2, at_ms=START_MS + HALF_LIFE_MS))
    later_ms = START_MS + 10 * HALF_LIFE_MS
    before = book.standing(account(2).address, now_ms=later_ms)
    book.forget_old(now_ms=later_ms)
    assert book.standing(account(2).address, now_ms=later_ms) == before != NEWCOMER
    assert list(book._tallies) == [account(2).address.lower()]
    assert list(book._speeds) == [(peer(2), WORK)]
