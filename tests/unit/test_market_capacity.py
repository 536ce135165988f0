"""What stake backs, and what stake makes cheating lose."""

from __future__ import annotations

from fractions import Fraction

import pytest
from pydantic import ValidationError

from shoal.market.capacity import (
    AuditTerms,
    Cheat,
    capacity_down,
    deterrent_stake_up,
    expected_cheat_gain_ppm,
    stake_up,
)
from shoal.protocol.errors import InvalidRequest
from shoal.protocol.market import MAX_UNITS

TERMS = AuditTerms(audit_permille=50, detection_permille=950)


def test_the_references_example() -> None:
    """5 % audited, 95 % found, $0.002 a unit: at least $0.042 of stake for each in flight."""
    assert stake_up(1, 2_000, TERMS) == 42_106
    assert capacity_down(42_105, 2_000, TERMS) == 0
    assert capacity_down(42_106, 2_000, TERMS) == 1
    assert capacity_down(1_000_000, 2_000, TERMS) == 23


def test_a_capacity_fits_a_records_field() -> None:
    certain = AuditTerms(audit_permille=1_000, detection_permille=1_000)
    assert capacity_down(2**53, 1, certain) == MAX_UNITS


@pytest.mark.parametrize(
    "call",
    [
        lambda: capacity_down(-1, 10, TERMS),
        lambda: capacity_down(10, 0, TERMS),
        lambda: stake_up(-1, 10, TERMS),
        lambda: stake_up(1, -10, TERMS),
        lambda: deterrent_stake_up(Cheat(cost_micros=1), TERMS, holdback_micros=-1),
        lambda: deterrent_stake_up(Cheat(cost_micros=1), TERMS, safety_factor=0),
    ],
)
def test_amounts_that_make_no_sense_are_refused(call: object) -> None:
    assert callable(call)
    with pytest.raises(InvalidRequest) as caught:
        call()
    assert caught.value.code == "bad_amount"


@pytest.mark.parametrize("share", [0, 1_001, -5])
def test_shares_are_per_mille(share: int) -> None:
    with pytest.raises(ValidationError):
        AuditTerms(audit_permille=share, detection_permille=950)


def test_a_chance_of_one_in_twenty_needs_63_times_the_cost() -> None:
    """Reference figures: q = 5 %, d = 0.95 give 21 tasks before capture and S + H ≥ 63 c."""
    stake = deterrent_stake_up(Cheat(cost_micros=1_000_000), TERMS)
    assert 63_000_000 < stake < 63_200_000
    withheld = deterrent_stake_up(Cheat(cost_micros=1_000_000), TERMS, holdback_micros=3_000_000)
    assert withheld == stake - 3_000_000
    assert deterrent_stake_up(Cheat(cost_micros=1), TERMS, holdback_micros=10**9) == 0


def test_the_gain_of_a_false_unit_is_what_the_model_says() -> None:
    cheat = Cheat(cost_micros=800, bribe_micros=300)
    found = Fraction(475, 10_000)
    exact = 800 + (1 - found) * 300 - found * (1_000 + 5_000)
    got = expected_cheat_gain_ppm(cheat, TERMS, price_micros=1_000, forfeit_micros=5_000)
    assert Fraction(got, 1_000_000) == exact
    assert got > 0


def test_the_bounds_are_what_keeps_cheating_from_paying() -> None:
    """Negative control: with less stake than either bound asks for, cheating pays."""
    cheat = Cheat(cost_micros=2_000, bribe_micros=500)
    enough = deterrent_stake_up(cheat, TERMS, safety_factor=1)
    assert expected_cheat_gain_ppm(cheat, TERMS, price_micros=2_000, forfeit_micros=enough) < 0
    assert expected_cheat_gain_ppm(cheat, TERMS, price_micros=2_000, forfeit_micros=0) > 0
    # The capacity bound alone covers a gain of up to the price, by the unit's own pay.
    saved = Cheat(cost_micros=2_000)
    backing = stake_up(1, 2_000, TERMS)
    assert expected_cheat_gain_ppm(saved, TERMS, price_micros=2_000, forfeit_micros=backing) < 0
    halved = backing // 2
    assert expected_cheat_gain_ppm(saved, TERMS, price_micros=2_000, forfeit_micros=halved) > 0
