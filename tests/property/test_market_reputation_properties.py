"""Reputation, handicap, cooldown and capacity, whatever happened in whatever order."""

from __future__ import annotations

import random
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from market_records import NOW_MS, account, lot, peer

from shoal.market import handicap
from shoal.market import reputation as reputations
from shoal.market.capacity import AuditTerms, capacity_down, stake_up
from shoal.market.cooldown import Cooldown
from shoal.market.freshness import fresh_pay_down, linear_freshness
from shoal.market.handicap import HandicapTerms, handicap_up
from shoal.market.reputation import NEWCOMER, STEP_MS, Ending, Outcome, Reputation

WORKS = ("rollout", "gradient")
ACCOUNTS = (1, 2)

outcomes = st.lists(
    st.tuples(
        st.sampled_from(ACCOUNTS),
        st.integers(1, 3),
        st.sampled_from(WORKS),
        st.sampled_from([*Ending, Ending.ACCEPTED, Ending.ACCEPTED]),
        st.integers(1, 5_000),
        st.integers(0, 300 * STEP_MS) | st.integers(0, 600_000),
    ),
    max_size=40,
).map(
    lambda rows: [
        Outcome(
            lease_id=f"lease_{n:010d}",
            account=account(who).address,
            node=peer(node),
            work=work,
            ending=ending,
            unit_ms=unit_ms if ending is Ending.ACCEPTED else None,
            ended_at_ms=NOW_MS + at_ms,
        )
        for n, (who, node, work, ending, unit_ms, at_ms) in enumerate(rows)
    ]
)
terms = st.builds(
    HandicapTerms,
    verify_micros=st.integers(0, 10**6),
    redispatch_micros=st.integers(0, 10**6),
    delay_micros_per_s=st.integers(0, 10**6),
    target_unit_ms=st.none() | st.integers(1, 10_000),
)
audits = st.builds(
    AuditTerms, audit_permille=st.integers(1, 1_000), detection_permille=st.integers(1, 1_000)
)


def seen(reputation: Reputation, cooldown: Cooldown, now_ms: int) -> object:
    """Everything the market reads of a record."""
    standings = [reputation.standing(account(n).address, now_ms=now_ms) for n in ACCOUNTS]
    nodes = [peer(n) for n in range(1, 4)]
    speeds = [reputation.unit_ms(node, work, now_ms=now_ms) for node in nodes for work in WORKS]
    return standings, speeds, [cooldown.is_out(node, now_ms=now_ms) for node in nodes]


@settings(max_examples=60, deadline=None)
@given(
    history=outcomes,
    shuffle=st.randoms(use_true_random=False),
    after_ms=st.integers(0, 600_000) | st.integers(0, 300 * STEP_MS),
    num_samples=st.integers(1, 4),
)
def test_noted_one_by_one_or_recomputed_in_any_order_it_is_the_same(
    history: list[Outcome], shuffle: random.Random, after_ms: int, num_samples: int
) -> None:
    # So few that some of the samples are always dropped.
    with patch.object(reputations, "MAX_SAMPLES", num_samples):
        check_order_does_not_matter(history, shuffle, after_ms)


def check_order_does_not_matter(
    history: list[Outcome], shuffle: random.Random, after_ms: int
) -> None:
    now_ms = max((outcome.ended_at_ms for outcome in history), default=NOW_MS) + after_ms
    reputation, cooldown = Reputation(), Cooldown()
    for outcome in history:
        reputation.note(outcome)
        cooldown.note(outcome)
        # Reading in between must not disturb what is read later.
        reputation.standing(outcome.account, now_ms=outcome.ended_at_ms)
    shuffled = list(history)
    shuffle.shuffle(shuffled)
    again = Reputation(shuffled), Cooldown(shuffled)
    assert seen(reputation, cooldown, now_ms) == seen(*again, now_ms)
    reputation.forget_old(now_ms=now_ms)
    cooldown.forget_old(now_ms=now_ms)
    assert seen(reputation, cooldown, now_ms) == seen(*again, now_ms)


@settings(max_examples=60, deadline=None)
@given(history=outcomes, terms=terms)
def test_a_new_name_never_has_a_smaller_handicap(
    history: list[Outcome], terms: HandicapTerms
) -> None:
    now_ms = max((outcome.ended_at_ms for outcome in history), default=NOW_MS)
    reputation = Reputation(history)
    fresh = handicap_up(NEWCOMER, None, terms)
    for outcome in history:
        standing = reputation.standing(outcome.account, now_ms=now_ms)
        unit_ms = reputation.unit_ms(outcome.node, outcome.work, now_ms=now_ms)
        assert 0 <= handicap_up(standing, unit_ms, terms) <= fresh


def test_without_its_limit_a_bad_record_would_be_worth_dropping(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Negative control for the test above."""
    bad = Reputation(
        Outcome(
            lease_id=f"lease_{n:010d}",
            account=account(1).address,
            node=peer(1),
            work="rollout",
            ending=Ending.EXPIRED,
            ended_at_ms=NOW_MS,
        )
        for n in range(10)
    ).standing(account(1).address, now_ms=NOW_MS)
    costs = HandicapTerms(verify_micros=100)
    fresh = handicap_up(NEWCOMER, None, costs)
    assert handicap_up(bad, None, costs) == fresh
    limitless = NEWCOMER.__class__(accepted_ppm=0, rejected_ppm=0, acceptance_ppm=1, num_receipts=0)
    monkeypatch.setattr(handicap, "NEWCOMER", limitless)
    assert handicap_up(bad, None, costs) > fresh


@settings(max_examples=60, deadline=None)
@given(history=outcomes, terms=terms, ending=st.sampled_from(list(Ending)))
def test_kept_promises_never_raise_a_handicap_and_broken_ones_never_lower_it(
    history: list[Outcome], terms: HandicapTerms, ending: Ending
) -> None:
    now_ms = max((outcome.ended_at_ms for outcome in history), default=NOW_MS)
    who = account(1).address
    reputation = Reputation(history)
    before = reputation.standing(who, now_ms=now_ms)
    reputation.note(
        Outcome(
            lease_id="lease_9999999999",
            account=who,
            node=peer(9),
            work="rollout",
            ending=ending,
            ended_at_ms=now_ms,
        )
    )
    after = reputation.standing(who, now_ms=now_ms)
    costs = [handicap_up(standing, 1_000, terms) for standing in (before, after)]
    if ending is Ending.ACCEPTED:
        assert after.acceptance_ppm >= before.acceptance_ppm
        assert costs[1] <= costs[0]
    else:
        assert after.acceptance_ppm <= before.acceptance_ppm
        assert costs[1] >= costs[0]


@settings(max_examples=100, deadline=None)
@given(
    stake=st.integers(0, 10**12),
    price=st.integers(1, 10**9),
    terms=audits,
    parts=st.integers(1, 7),
)
def test_stake_split_over_many_names_backs_no_more(
    stake: int, price: int, terms: AuditTerms, parts: int
) -> None:
    whole = capacity_down(stake, price, terms)
    # Up to what a record's field holds: beyond, each name is capped alike.
    if whole < 2**32 - 1:
        assert parts * capacity_down(stake // parts, price, terms) <= whole
        # The bound is tight: what it allows is backed, and one unit more is not.
        assert stake_up(whole, price, terms) <= stake < stake_up(whole + 1, price, terms)


@settings(max_examples=60, deadline=None)
@given(
    staleness=st.integers(0, 20),
    last=st.integers(0, 1_000),
    units=st.integers(0, 10**6),
    price=st.integers(0, 10**9),
)
def test_older_work_is_never_paid_better(staleness: int, last: int, units: int, price: int) -> None:
    aged = lot(freshness_permille=linear_freshness(staleness, last))
    pays = [fresh_pay_down(aged, units, price, lag=lag) for lag in range(staleness + 1)]
    assert pays == sorted(pays, reverse=True)
    assert pays[0] == units * price
    for pay, share in zip(pays, aged.freshness_permille, strict=True):
        assert 1_000 * pay <= units * price * share < 1_000 * (pay + 1)
