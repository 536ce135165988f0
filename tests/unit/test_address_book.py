"""Peers remembered on disk: order, pauses, bounds, damage."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from shoal.network.address_book import (
    FIRST_PAUSE_MS,
    LONGEST_PAUSE_MS,
    MAX_ADDRESSES_PER_PEER,
    MAX_AGE_MS,
    MAX_FILE_BYTES,
    MAX_PEERS_PER_ROLE,
    AddressBook,
    Role,
)
from shoal.network.identity import NodeIdentity
from shoal.protocol.clock import ManualTime
from shoal.protocol.ids import PeerId


def peer_of(number: int) -> PeerId:
    return NodeIdentity(number.to_bytes(32, "big")).peer_id


PEER = peer_of(1)


def at(host: int, peer: PeerId = PEER) -> str:
    return f"/ip4/192.0.2.{host}/tcp/4001/p2p/{peer}"


def book_of(time: ManualTime, path: Path | None = None, draw: float = 1.0) -> AddressBook:
    return AddressBook(path, time, draw=lambda: draw)


def test_the_address_reached_last_is_tried_first_also_after_a_restart(tmp_path: Path) -> None:
    time, path = ManualTime(), tmp_path / "peers.json"
    book = book_of(time, path)
    book.remember(PEER, [at(1), at(2), at(3)], Role.ORCHESTRATOR)
    book.note_reached(PEER, at(2))
    time.advance(1)
    book.note_reached(PEER, at(3))
    expected = [(PEER, at(3)), (PEER, at(2)), (PEER, at(1))]
    assert book.candidates(Role.ORCHESTRATOR) == expected
    assert book_of(time, path).candidates(Role.ORCHESTRATOR) == expected
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["peers.json"]


def test_a_failed_address_waits_twice_as_long_each_time_and_never_too_long() -> None:
    time = ManualTime()
    book = book_of(time)
    book.remember(PEER, [at(1)], Role.ORCHESTRATOR)
    waits = []
    for _ in range(14):
        book.note_failed(PEER, at(1))
        assert book.candidates(Role.ORCHESTRATOR) == []
        wait_s = book.wait_s(Role.ORCHESTRATOR)
        assert wait_s is not None
        waits.append(round(wait_s * 1000))
        time.advance(waits[-1])
        assert book.candidates(Role.ORCHESTRATOR) == [(PEER, at(1))]
    assert waits[:4] == [FIRST_PAUSE_MS << power for power in range(4)]
    assert waits[-1] == LONGEST_PAUSE_MS


def test_reaching_an_address_ends_its_pauses() -> None:
    time = ManualTime()
    book = book_of(time)
    book.remember(PEER, [at(1)], Role.ORCHESTRATOR)
    for _ in range(5):
        book.note_failed(PEER, at(1))
    book.note_reached(PEER, at(1))
    assert book.wait_s(Role.ORCHESTRATOR) == 0.0
    book.note_failed(PEER, at(1))
    assert book.wait_s(Role.ORCHESTRATOR) == FIRST_PAUSE_MS / 1000


def test_pauses_are_drawn_from_their_upper_half() -> None:
    time = ManualTime()
    shortest, longest = book_of(time, draw=0.0), book_of(time, draw=1.0)
    for book in (shortest, longest):
        book.remember(PEER, [at(1)], Role.ORCHESTRATOR)
        book.note_failed(PEER, at(1))
    assert shortest.wait_s(Role.ORCHESTRATOR) == FIRST_PAUSE_MS / 2000
    assert longest.wait_s(Role.ORCHESTRATOR) == FIRST_PAUSE_MS / 1000


def test_a_clock_set_back_leaves_no_address_waiting() -> None:
    time = ManualTime()
    book = book_of(time)
    book.remember(PEER, [at(1)], Role.ORCHESTRATOR)
    book.note_failed(PEER, at(1))
    assert book.candidates(Role.ORCHESTRATOR) == []
    time.advance(-3_600_000)
    assert book.candidates(Role.ORCHESTRATOR) == [(PEER, at(1))]


def test_a_failed_address_comes_after_one_that_has_not_failed() -> None:
    time = ManualTime()
    book = book_of(time)
    book.remember(PEER, [at(1), at(2)], Role.ORCHESTRATOR)
    book.note_reached(PEER, at(1))
    book.note_failed(PEER, at(1))
    time.advance(FIRST_PAUSE_MS)
    assert book.candidates(Role.ORCHESTRATOR) == [(PEER, at(2)), (PEER, at(1))]
    assert book.known(Role.ORCHESTRATOR) == [(PEER, at(2)), (PEER, at(1))]


def test_roles_are_kept_apart_and_nobody_known_is_told_as_none() -> None:
    book = book_of(ManualTime())
    assert book.wait_s(Role.HOLDER) is None
    book.remember(PEER, [at(1)], Role.ORCHESTRATOR)
    assert book.candidates(Role.HOLDER) == []
    book.remember(PEER, [at(2)], Role.HOLDER)
    assert book.candidates(Role.HOLDER) == [(PEER, at(2))]
    book.forget(PEER)
    assert book.wait_s(Role.HOLDER) is None
    assert book.wait_s(Role.ORCHESTRATOR) is None


@pytest.mark.parametrize(
    "address",
    [
        "",
        "192.0.2.1:4001",
        "/ip4/192.0.2.1/tcp/4001",
        f"/ip4/192.0.2.1/tcp/4001/p2p/{peer_of(2)}",
        f"/ip4/192.0.2.1\n/tcp/4001/p2p/{PEER}",
        f"/ip4/{'1' * 600}/tcp/4001/p2p/{PEER}",
    ],
)
def test_an_unusable_address_is_left_out(address: str) -> None:
    book = book_of(ManualTime())
    book.remember(PEER, [address], Role.HOLDER)
    assert book.known(Role.HOLDER) == []
    book.remember(PEER, [address, at(1)], Role.HOLDER)
    assert book.known(Role.HOLDER) == [(PEER, at(1))]


def test_a_peer_id_that_is_none_is_left_out() -> None:
    book = book_of(ManualTime())
    book.remember(PeerId("nobody"), ["/ip4/192.0.2.1/tcp/1/p2p/nobody"], Role.HOLDER)
    assert book.known(Role.HOLDER) == []


def test_both_peers_and_addresses_are_bounded_and_the_oldest_make_room() -> None:
    time = ManualTime()
    book = book_of(time)
    for number in range(MAX_PEERS_PER_ROLE + 3):
        time.advance(1)
        peer = peer_of(number + 10)
        book.remember(peer, [at(1, peer)], Role.HOLDER)
    known = {peer for peer, _ in book.known(Role.HOLDER)}
    assert len(known) == MAX_PEERS_PER_ROLE
    assert peer_of(10) not in known
    assert peer_of(MAX_PEERS_PER_ROLE + 12) in known

    book.remember(PEER, [at(host) for host in range(20)], Role.ORCHESTRATOR)
    assert len(book.known(Role.ORCHESTRATOR)) == MAX_ADDRESSES_PER_PEER
    book.remember(PEER, [at(99)], Role.ORCHESTRATOR)
    addresses = [address for _, address in book.known(Role.ORCHESTRATOR)]
    assert at(99) in addresses
    assert len(addresses) == MAX_ADDRESSES_PER_PEER


def test_a_peer_unheard_of_for_long_is_forgotten_at_the_next_start(tmp_path: Path) -> None:
    time, path = ManualTime(), tmp_path / "peers.json"
    book_of(time, path).remember(PEER, [at(1)], Role.ORCHESTRATOR)
    time.advance(MAX_AGE_MS)
    assert book_of(time, path).known(Role.ORCHESTRATOR) == [(PEER, at(1))]
    time.advance(1)
    assert book_of(time, path).known(Role.ORCHESTRATOR) == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b'{"format":2,"peers":[]}',
        b'{"format":1,"peers":[{"peer":"x","role":"king","seen_ms":1,"addresses":[]}]}',
        b'{"format":1,"peers":' + b"[" * 100_000,
        b" " * (MAX_FILE_BYTES + 1),
    ],
)
def test_a_damaged_file_is_one_warning_and_a_fresh_start(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "peers.json"
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        book = book_of(ManualTime(), path)
    assert [record.message for record in caplog.records] == ["address_book_damaged"]
    assert book.known(Role.ORCHESTRATOR) == []
    book.remember(PEER, [at(1)], Role.ORCHESTRATOR)
    assert book_of(ManualTime(), path).known(Role.ORCHESTRATOR) == [(PEER, at(1))]


def test_a_disk_that_takes_nothing_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    book = book_of(ManualTime(), tmp_path / "file" / "peers.json")
    with caplog.at_level(logging.WARNING):
        book.remember(PEER, [at(1)], Role.ORCHESTRATOR)
    assert [record.message for record in caplog.records] == ["address_book_not_written"]
    assert book.known(Role.ORCHESTRATOR) == [(PEER, at(1))]
