"""The handicap: its formula, its rounding, its limits."""

from __future__ import annotations

from fractions import Fraction

from market_records import account, peer

from shoal.market.handicap import HandicapTerms, bidder_terms, handicap_up
from shoal.market.reputation import NEWCOMER, Standing
from shoal.protocol.money import MAX_MICROS

TERMS = HandicapTerms(
    verify_micros=70, redispatch_micros=30, delay_micros_per_s=40, target_unit_ms=1_000
)


def standing(acceptance_ppm: int) -> Standing:
    return Standing(accepted_ppm=0, rejected_ppm=0, acceptance_ppm=acceptance_ppm, num_receipts=99)


def test_the_formula_rounded_up() -> None:
    # (1 - 0.8) / 0.8 * 100 + 40 * (1.5 - 1.0) = 25 + 20
    assert handicap_up(standing(800_000), 1_500, TERMS) == 45
    exact = Fraction(100_001, 899_999) * 100 + 40 * Fraction(1, 1_000)
    assert handicap_up(standing(899_999), 1_001, TERMS) == -(-exact.numerator // exact.denominator)
    assert handicap_up(standing(800_000), 900, TERMS) == 25
    assert handicap_up(standing(1_000_000), 1_000, TERMS) == 0
    assert handicap_up(standing(800_000), 1_500, HandicapTerms()) == 0


def test_nobody_is_thought_slower_than_the_unknown_or_worse_than_a_newcomer() -> None:
    unknown = handicap_up(NEWCOMER, None, TERMS)
    assert unknown == handicap_up(NEWCOMER, 3_000, TERMS) == handicap_up(NEWCOMER, 10**9, TERMS)
    assert handicap_up(standing(1), 10**9, TERMS) == unknown
    assert handicap_up(standing(0), 10**9, TERMS) == unknown


def test_without_a_target_speed_costs_nothing() -> None:
    terms = TERMS.model_copy(update={"target_unit_ms": None})
    assert handicap_up(standing(800_000), 10**9, terms) == 25


def test_a_handicap_never_leaves_what_a_record_can_name() -> None:
    dear = HandicapTerms(
        verify_micros=MAX_MICROS,
        redispatch_micros=MAX_MICROS,
        delay_micros_per_s=MAX_MICROS,
        target_unit_ms=2**53 - 1,
    )
    assert handicap_up(NEWCOMER, None, dear) == MAX_MICROS


def test_the_auction_is_told_what_receipts_and_stake_say() -> None:
    known = Standing(accepted_ppm=1, rejected_ppm=2, acceptance_ppm=800_000, num_receipts=51)
    terms = bidder_terms(
        account(1).address,
        peer(1),
        standing=known,
        unit_ms=1_500,
        terms=TERMS,
        bound_units=7,
        staked=True,
    )
    assert (terms.handicap_micros, terms.bound_units, terms.num_receipts) == (45, 7, 51)
    assert (terms.account, terms.node, terms.staked) == (account(1).address, peer(1), True)
