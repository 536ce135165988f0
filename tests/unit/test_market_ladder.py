"""The ladder: first with room, down after a failure, anew after two."""

from __future__ import annotations

import pytest

from shoal.market.ladder import RunningLadder, is_tail
from shoal.market.reauction import raise_reserve_up
from shoal.protocol.certificate import Rung
from shoal.protocol.errors import InvalidRequest

LETTERS = "abcd"
NODES = [letter * 40 for letter in LETTERS]


def rung(place: int, node: str) -> Rung:
    return Rung(
        rung=place,
        bid_digest="0x" + f"{place:064x}",
        account="0x" + "1" * 40,
        node=node * 40,
        price_micros=90,
        handicap_micros=10,
        pay_micros=100,
        num_units=4,
        room_units=4,
    )


def ladder(*nodes: str, earlier: dict[str, int] | None = None) -> RunningLadder[str]:
    return RunningLadder([rung(n, node) for n, node in enumerate(nodes)], earlier=earlier)


def pick(of: RunningLadder[str], parcel: str = "p", num_units: int = 4, **busy: int) -> int | None:
    found = of.next_rung(
        parcel,
        num_units,
        nodes=NODES,
        in_flight={letter * 40: units for letter, units in busy.items()},
    )
    return None if found is None else found.rung


def test_a_parcel_goes_to_the_first_rung_with_room() -> None:
    climbed = ladder("a", "b", "c")
    assert pick(climbed) == 0
    assert pick(climbed, a=1) == 1
    assert pick(climbed, num_units=3, a=1) == 0
    assert pick(climbed, a=4, b=4, c=4) is None
    assert pick(climbed, num_units=5) is None
    assert climbed.next_rung("p", 4, nodes=["c" * 40, "b" * 40], in_flight={}) == rung(1, "b")


def test_room_that_comes_free_is_filled_from_the_same_ladder() -> None:
    climbed = ladder("a", "b")
    assert pick(climbed, "p", a=4) == 1
    assert pick(climbed, "q", a=4, b=4) is None
    assert pick(climbed, "q", a=0, b=4) == 0


def test_a_failed_parcel_goes_below_and_never_back_to_its_node() -> None:
    climbed = ladder("a", "b", "a", "c")
    climbed.note_failure("p", 0)
    assert pick(climbed, "p") == 1
    assert pick(climbed, "p", b=4) == 3, "rung 2 is the node that failed it"
    assert pick(climbed, "q") == 0
    climbed.note_failure("q", 1)
    assert pick(climbed, "q") == 2, "rung 0 did not fail it, and is above"


def test_two_failures_or_nobody_below_need_a_new_clearing() -> None:
    climbed = ladder("a", "b", "c", "d")
    assert not climbed.needs_clearing("p", 4)
    climbed.note_failure("p", 0)
    assert not climbed.needs_clearing("p", 4)
    assert not climbed.raises_reserve("p")
    climbed.note_failure("p", 1)
    assert climbed.needs_clearing("p", 4)
    assert climbed.raises_reserve("p")
    assert raise_reserve_up(100, 200) == 110
    assert raise_reserve_up(199, 200) == 200
    assert climbed.carried("p") == 0
    assert not climbed.needs_clearing("q", 4)
    assert climbed.needs_clearing("q", 5), "no rung is ever large enough"
    assert climbed.needs_clearing("q", 4, gone=NODES)
    assert RunningLadder[str]([]).needs_clearing("q", 1)


def test_a_failure_under_an_earlier_clearing_still_counts() -> None:
    lonely = ladder("a")
    lonely.note_failure("p", 0)
    assert lonely.needs_clearing("p", 4)
    assert not lonely.raises_reserve("p")
    again = ladder("a", earlier={"p": lonely.carried("p")})
    assert pick(again) == 0, "a new clearing is a new chance"
    again.note_failure("p", 0)
    assert again.raises_reserve("p")


def test_a_ladder_resumes_from_its_failures() -> None:
    rungs = [rung(n, node) for n, node in enumerate("abc")]
    resumed = RunningLadder(rungs, failures=[("p", 0), ("p", 1)])
    assert resumed.num_failures("p") == 2
    assert resumed.next_rung("p", 1, nodes=NODES, in_flight={}) == rungs[2]


def test_a_ladder_out_of_order_and_a_rung_that_is_not_there_are_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        RunningLadder([rung(1, "a"), rung(1, "b")])
    assert caught.value.code == "bad_ladder"
    with pytest.raises(InvalidRequest) as caught:
        ladder("a").note_failure("p", 1)
    assert caught.value.code == "no_such_rung"


def test_the_tail_is_the_last_twentieth() -> None:
    assert [is_tail(left, 100) for left in (0, 1, 5, 6)] == [False, True, True, False]
    assert not is_tail(1, 19)
    assert is_tail(1, 20)
