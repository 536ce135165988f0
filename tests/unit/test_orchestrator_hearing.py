"""Whose silence it is: a node's own, or the orchestrator's."""

from __future__ import annotations

from shoal.orchestrator.hearing import Hearing

BEAT_MS = 1_000


def beats(hearing: Hearing, nodes: tuple[str, ...], from_ms: int, to_ms: int) -> None:
    """Each node beats once a second, one after the other."""
    step_ms = BEAT_MS // len(nodes)
    for number, now_ms in enumerate(range(from_ms, to_ms, step_ms)):
        hearing.heard(nodes[number % len(nodes)], now_ms)


def test_nobody_is_excused_while_anybody_is_heard() -> None:
    hearing = Hearing(BEAT_MS)
    beats(hearing, ("one", "two", "three"), 0, 10_000)
    beats(hearing, ("three",), 10_000, 60_000)
    assert hearing.take_deaf_ms(60_000) == 0
    assert not hearing.is_deaf(60_000)


def test_time_in_which_all_are_silent_counts_for_no_one() -> None:
    hearing = Hearing(BEAT_MS)
    beats(hearing, ("one", "two"), 0, 10_001)
    assert hearing.take_deaf_ms(11_500) == 0
    assert hearing.is_deaf(12_000)
    # Asked in steps, it adds up to all the time after one and a half beats of silence.
    assert sum(hearing.take_deaf_ms(now_ms) for now_ms in (12_000, 12_001, 20_000)) == 8_500


def test_a_single_nodes_silence_is_its_own() -> None:
    hearing = Hearing(BEAT_MS)
    beats(hearing, ("one",), 0, 10_000)
    assert not hearing.is_deaf(60_000)
    assert hearing.take_deaf_ms(60_000) == 0


def test_the_last_of_several_that_left_one_by_one_is_not_excused() -> None:
    hearing = Hearing(BEAT_MS)
    beats(hearing, ("one", "two"), 0, 10_000)
    beats(hearing, ("two",), 10_000, 20_000)
    assert not hearing.is_deaf(60_000)


def test_after_a_long_silence_all_get_time_to_return() -> None:
    hearing = Hearing(BEAT_MS)
    beats(hearing, ("one", "two"), 0, 10_001)
    hearing.take_deaf_ms(21_500)
    hearing.heard("one", 21_500)
    assert hearing.take_deaf_ms(25_000) == 3_500
    beats(hearing, ("one",), 25_000, 60_000)
    # Silent for ten seconds, so ten seconds to return, and not one more.
    assert hearing.take_deaf_ms(60_000) == 6_500
    assert not hearing.is_deaf(60_000)


def test_a_short_gap_gives_no_time_to_return() -> None:
    hearing = Hearing(BEAT_MS)
    beats(hearing, ("one", "two"), 0, 10_001)
    hearing.heard("one", 12_500)
    assert hearing.take_deaf_ms(12_500) == 1_000
    assert hearing.take_deaf_ms(13_900) == 0


def test_the_time_to_return_is_bounded() -> None:
    hearing = Hearing(BEAT_MS)
    beats(hearing, ("one", "two"), 0, 10_001)
    hearing.heard("one", 500_000)
    hearing.take_deaf_ms(500_000)
    beats(hearing, ("one",), 500_500, 540_000)
    assert hearing.take_deaf_ms(540_000) == 15_000
