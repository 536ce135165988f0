"""The books of a transfer: whoever lies or dawdles, it ends right and no innocent pays."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.network.blob_board import Board, Chunk, Giver, Reading
from shoal.protocol.blob import CHUNK_BYTES
from shoal.protocol.holders import FINE_CHUNK_BYTES


@dataclass
class Behaviour:
    """How one holder of the simulation behaves."""

    rate: float
    lies: bool = False
    breaks: float = 0.0
    chunks: frozenset[int] | None = None


@dataclass
class World:
    """Drives a board with a clock of its own; bytes are one letter per chunk, or a lie."""

    sizes: list[int]
    behaviours: list[Behaviour]
    seed: int
    caught: set[str] = field(default_factory=set)
    wasted_bytes: int = 0
    now_s: float = 0.0

    def right(self, chunk: Chunk) -> bool:
        letter = 1 + chunk.index % 200
        return bytes(chunk.room) == bytes([letter]) * len(chunk.room)

    def run(self) -> Board:
        draw = random.Random(self.seed)
        board = Board(self.sizes, range(len(self.sizes)), random.Random(self.seed))
        for number, behaviour in enumerate(self.behaviours):
            board.givers[str(number)] = Giver(str(number), behaviour.chunks)
        underway: dict[Reading, float] = {}
        for _ in range(1_000):
            if board.is_done or not (board.usable() or underway):
                return board
            for giver in board.givers.values():
                while (reading := board.take(giver, self.now_s)) is not None:
                    behaviour = self.behaviours[int(giver.name)]
                    underway[reading] = self.now_s + reading.left / behaviour.rate
            if not underway:
                return board
            reading = min(underway, key=lambda one: underway[one])
            self.now_s = max(self.now_s, underway.pop(reading))
            self.settle(board, reading, underway, draw)
        raise AssertionError("the transfer does not end")

    def settle(
        self, board: Board, reading: Reading, underway: dict[Reading, float], draw: random.Random
    ) -> None:
        giver, behaviour = reading.giver, self.behaviours[int(reading.giver.name)]
        share = draw.random() if draw.random() < behaviour.breaks else 1.0
        self.fill(reading, int(share * reading.left), behaviour)
        if share < 1.0:
            giver.failures += 1
            board.broke_off(reading)
            return
        for other in underway:  # what they have by now
            done = 1 - (underway[other] - self.now_s) / max(underway[other] - other.begun_s, 1e-9)
            self.fill(
                other,
                int(max(0.0, done) * (other.end - other.start)) - other.got,
                self.behaviours[int(other.giver.name)],
            )
        chunk, needless = board.brought(reading, self.now_s)
        for other in needless:
            del underway[other]
            self.wasted_bytes += other.got if other.is_copy else other.end - reading.start
        if chunk is None:
            return
        if self.right(chunk):
            self.caught |= {liar.name for liar in board.accept(chunk)}
        else:
            only = board.reject(chunk)
            if only is not None:
                self.caught.add(only.name)
        for name in self.caught:
            board.givers[name].give_up("it lied", lied=True)

    def fill(self, reading: Reading, num_bytes: int, behaviour: Behaviour) -> None:
        if num_bytes <= 0:
            return
        letter = 255 if behaviour.lies else 1 + reading.chunk.index % 200
        reading.room[reading.got : reading.got + num_bytes] = bytes([letter]) * num_bytes
        reading.got += num_bytes


RATES = st.sampled_from([5e4, 1e6, 1e7, 1e9])


@st.composite
def worlds(draw: st.DrawFn) -> World:
    num_chunks = draw(st.integers(1, 6))
    sizes = [CHUNK_BYTES] * (num_chunks - 1) + [draw(st.integers(1, CHUNK_BYTES))]
    behaviours = [Behaviour(draw(RATES))]  # one honest holder of everything
    for _ in range(draw(st.integers(0, 3))):
        some = draw(st.frozensets(st.integers(0, num_chunks - 1)))
        behaviours.append(
            Behaviour(
                draw(RATES),
                lies=draw(st.booleans()),
                breaks=draw(st.sampled_from([0.0, 0.5])),
                chunks=draw(st.sampled_from([None, some])),
            )
        )
    return World(sizes, behaviours, draw(st.integers(0, 1 << 30)))


@settings(max_examples=40, deadline=None)
@given(world=worlds())
def test_transfer_ends_right_and_no_innocent_is_caught(world: World) -> None:
    board = world.run()
    assert board.is_done
    assert {int(name) for name in world.caught} <= {
        number for number, behaviour in enumerate(world.behaviours) if behaviour.lies
    }
    assert world.wasted_bytes <= sum(world.sizes) // 10
    assert all(giver.num_readings == 0 for giver in board.givers.values())


def test_givers_of_a_chunk_that_was_wrong_are_told_apart() -> None:
    giver_of = {name: Giver(name, max_readings=1) for name in ("honest", "liar")}
    board = Board([CHUNK_BYTES], [0], None)
    board.givers.update(giver_of)

    def bring(reading: Reading, letter: int) -> Chunk | None:
        reading.room[:] = bytes([letter]) * len(reading.room)
        reading.got = len(reading.room)
        return board.brought(reading, 1.0)[0]

    chunk: Chunk | None = None
    while chunk is None:
        for name, letter in (("honest", 7), ("liar", 8)):
            reading = board.take(giver_of[name], 0.0)
            if reading is not None:
                chunk = bring(reading, letter) or chunk
    assert {part.giver.name for part in chunk.given} == {"honest", "liar"}
    # Which of the two lied cannot be known yet, so neither is dropped.
    assert board.reject(chunk) is None
    again = board.take(giver_of["honest"], 2.0)
    assert again is not None
    assert (again.start, again.end) == (0, CHUNK_BYTES)
    assert board.take(giver_of["liar"], 2.0) is None
    chunk = bring(again, 7)
    assert chunk is not None
    assert {liar.name for liar in board.accept(chunk)} == {"liar"}
    assert board.is_done


def test_liar_stays_found_out_when_more_of_it_arrives() -> None:
    liar = Giver("liar")
    board = Board([CHUNK_BYTES] * 2, [0, 1], None)
    board.givers["liar"] = liar
    underway = board.take(liar, 0.0)
    assert underway is not None
    liar.give_up("it lied", lied=True)
    board.brought(underway, 1.0)
    assert not liar.is_usable
    assert board.take(liar, 2.0) is None


def test_rarest_chunk_is_asked_first_and_ties_are_drawn() -> None:
    everyone, some = Giver("all"), Giver("some", chunks=frozenset({0, 1, 2, 4, 5}))
    first = set()
    for seed in range(8):
        board = Board([CHUNK_BYTES] * 6, range(6), random.Random(seed))
        board.givers.update({"all": everyone, "some": some})
        reading = board.take(everyone, 0.0)
        assert reading is not None
        assert reading.chunk.index == 3
        reading = Board([CHUNK_BYTES] * 6, range(6), random.Random(seed)).take(Giver("one"), 0.0)
        assert reading is not None
        first.add(reading.chunk.index)
        everyone.num_readings = 0
    assert len(first) > 2


def test_slow_holders_last_piece_is_copied_within_a_tenth() -> None:
    slow, fast = Giver("slow", max_readings=1), Giver("fast", max_readings=1)
    sizes = [CHUNK_BYTES] * 3
    board = Board(sizes, range(3), None)
    board.givers.update({"slow": slow, "fast": fast})
    stuck = board.take(slow, 0.0)
    assert stuck is not None
    now_s, extra = 0.0, 0
    while (reading := board.take(fast, now_s)) is not None:
        if reading.is_copy:
            extra += reading.end - reading.start
            assert reading.end == stuck.end
        now_s += 0.1
        reading.got = reading.end - reading.start
        chunk, needless = board.brought(reading, now_s)
        assert (stuck in needless) is reading.is_copy
        if chunk is not None:
            board.accept(chunk)
    assert board.is_done
    assert 0 < extra <= sum(sizes) // 10


def test_holder_is_asked_for_no_longer_a_piece_than_it_takes() -> None:
    peer, fast_http = Giver("peer", max_piece_bytes=1 << 20, rate=1e9), Giver("http", rate=1e9)
    for giver, longest in ((peer, 1 << 20), (fast_http, CHUNK_BYTES)):
        reading = Board([CHUNK_BYTES] * 4, range(4), None).take(giver, 0.0)
        assert reading is not None
        assert reading.end - reading.start == longest


def test_small_chunks_are_shared_only_where_few_are_left() -> None:
    givers = {name: Giver(name, max_readings=1, rate=300_000.0) for name in "abcd"}
    board = Board([FINE_CHUNK_BYTES] * 5, range(5), None)
    board.givers.update(givers)

    def asked(name: str) -> Reading:
        reading = board.take(givers[name], 0.0)
        assert reading is not None
        return reading

    first = asked("a")
    assert (first.start, first.end) == (0, FINE_CHUNK_BYTES)
    board = Board([FINE_CHUNK_BYTES], range(1), None)
    board.givers.update({name: Giver(name, max_readings=1, rate=300_000.0) for name in "abcd"})
    givers = board.givers
    shares = [asked(name) for name in "abcd"]
    assert {reading.chunk for reading in shares} == {shares[0].chunk}
    assert sorted((reading.start, reading.end) for reading in shares) == [
        (at, at + FINE_CHUNK_BYTES // 4) for at in range(0, FINE_CHUNK_BYTES, FINE_CHUNK_BYTES // 4)
    ]


@pytest.mark.parametrize(("rate", "asked_bytes"), [(9e5, 256 << 10), (1e5, 64 << 10)])
def test_of_the_last_bytes_who_is_slow_is_asked_for_fewer(rate: float, asked_bytes: int) -> None:
    giver, fast = Giver("giver", max_readings=1, rate=rate), Giver("fast", rate=9e5, max_readings=1)
    board = Board([FINE_CHUNK_BYTES] * 4, range(4), None)
    board.givers.update({"giver": giver, "fast": fast})
    reading = board.take(giver, 0.0)
    assert reading is not None
    assert reading.end - reading.start == asked_bytes
    # Where much is left, both are asked for whole chunks.
    board = Board([FINE_CHUNK_BYTES] * 40, range(40), None)
    board.givers.update({"giver": giver, "fast": fast})
    giver.num_readings = 0
    reading = board.take(giver, 0.0)
    assert reading is not None
    assert reading.end - reading.start == FINE_CHUNK_BYTES
