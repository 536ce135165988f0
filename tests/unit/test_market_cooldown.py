"""Cooldown: doubled, capped, and over in time."""

from __future__ import annotations

from market_records import NOW_MS, account, peer

from shoal.market.cooldown import KEPT_FOR_ONE_BROKEN, WINDOW_MS, Cooldown
from shoal.market.pause import FIRST_PAUSE_MS, LONGEST_PAUSE_MS
from shoal.market.reputation import Ending, Outcome


def outcome(ending: Ending, at_ms: int, *, node: int = 1) -> Outcome:
    return Outcome(
        lease_id="lease_0123456789",
        account=account(1).address,
        node=peer(node),
        work="rollout",
        ending=ending,
        ended_at_ms=at_ms,
    )


def pause_ms(cooldown: Cooldown, at_ms: int) -> int:
    return max(0, cooldown.until_ms(peer(1)) - at_ms)


def test_each_broken_promise_doubles_the_pause_up_to_the_longest() -> None:
    cooldown, seen = Cooldown(), []
    for n in range(9):
        cooldown.note(outcome(Ending.EXPIRED, NOW_MS + n))
        seen.append(pause_ms(cooldown, NOW_MS + n))
    assert seen[:4] == [FIRST_PAUSE_MS << n for n in range(4)]
    assert seen[-1] == LONGEST_PAUSE_MS
    until_ms = cooldown.until_ms(peer(1))
    assert cooldown.is_out(peer(1), now_ms=until_ms - 1)
    assert not cooldown.is_out(peer(1), now_ms=until_ms)
    assert not cooldown.is_out(peer(2), now_ms=NOW_MS)


def test_every_kind_of_broken_promise_counts_and_a_kept_one_does_not() -> None:
    for ending in Ending:
        cooldown = Cooldown([outcome(ending, NOW_MS)])
        expected = 0 if ending is Ending.ACCEPTED else FIRST_PAUSE_MS
        assert pause_ms(cooldown, NOW_MS) == expected


def test_what_lies_three_hours_back_is_forgiven() -> None:
    cooldown = Cooldown(outcome(Ending.REFUSED, NOW_MS + n) for n in range(5))
    much_later_ms = NOW_MS + WINDOW_MS + 10
    cooldown.note(outcome(Ending.REFUSED, much_later_ms))
    assert pause_ms(cooldown, much_later_ms) == FIRST_PAUSE_MS


def test_kept_promises_make_up_for_broken_ones_but_taking_turns_does_not() -> None:
    kept = [outcome(Ending.ACCEPTED, NOW_MS + n) for n in range(KEPT_FOR_ONE_BROKEN * 3)]
    honest = Cooldown([*kept, *(outcome(Ending.EXPIRED, NOW_MS + 20 + n) for n in range(4))])
    assert pause_ms(honest, NOW_MS + 23) == FIRST_PAUSE_MS
    turns = Cooldown()
    for n in range(20):
        turns.note(outcome(Ending.ACCEPTED, NOW_MS + 2 * n))
        turns.note(outcome(Ending.REFUSED, NOW_MS + 2 * n + 1))
    assert pause_ms(turns, NOW_MS + 39) == LONGEST_PAUSE_MS


def test_a_node_that_did_nothing_lately_is_forgotten() -> None:
    cooldown = Cooldown([outcome(Ending.EXPIRED, NOW_MS), outcome(Ending.EXPIRED, NOW_MS, node=2)])
    cooldown.note(outcome(Ending.EXPIRED, NOW_MS + LONGEST_PAUSE_MS, node=2))
    later_ms = NOW_MS + WINDOW_MS + LONGEST_PAUSE_MS
    cooldown.forget_old(now_ms=later_ms)
    assert cooldown.until_ms(peer(1)) == 0
    assert cooldown.until_ms(peer(2)) > 0
