"""The directory of holders: who is named, in what order, and what a stranger can do to it."""

from __future__ import annotations

import pytest

from shoal.network.holders import DirectoryLimits, HolderDirectory
from shoal.network.identity import NodeIdentity
from shoal.protocol.blob import BlobRef
from shoal.protocol.errors import PeerFault, Unavailable
from shoal.protocol.holders import (
    FINE_CHUNK_BYTES,
    MAX_HOLDERS,
    MAX_HOLDINGS,
    DeltaStep,
    HaveNotice,
    HoldersReply,
    Holding,
)
from shoal.protocol.ids import PeerId

BLOB = "a" * 64
OTHER = "b" * 64
PEERS = [NodeIdentity.generate().peer_id for _ in range(MAX_HOLDERS + 4)]
ASKER = NodeIdentity.generate().peer_id


def told(directory: HolderDirectory, peer: PeerId, *digests: str, now_ms: int = 0) -> None:
    holdings = [Holding(sha256=sha256) for sha256 in digests or (BLOB,)]
    directory.announce(peer, [f"/p2p/{peer}"], holdings, now_ms=now_ms)


def named(
    directory: HolderDirectory,
    *,
    asker: PeerId = ASKER,
    reporter: str = "somebody",
    now_ms: int = 1,
) -> list[str]:
    found = directory.holders(BLOB, asker=asker, reporter=reporter, now_ms=now_ms)
    return [holder.peer for holder in found]


def test_holders_are_named_with_what_they_hold_and_where_they_are_asked() -> None:
    directory = HolderDirectory()
    directory.announce(PEERS[0], ["http://h:1"], [Holding(sha256=BLOB, chunks="80")], now_ms=0)
    (holder,) = directory.holders(BLOB, asker=ASKER, reporter="x", now_ms=1)
    assert (holder.peer, holder.sources, holder.chunks) == (PEERS[0], ("http://h:1",), "80")
    assert directory.holders(OTHER, asker=ASKER, reporter="x", now_ms=1) == ()


def test_a_later_word_replaces_the_earlier_one() -> None:
    directory = HolderDirectory()
    directory.announce(PEERS[0], ["http://h:1"], [Holding(sha256=BLOB, chunks="80")], now_ms=0)
    told(directory, PEERS[0], now_ms=5)
    (holder,) = directory.holders(BLOB, asker=ASKER, reporter="x", now_ms=6)
    assert holder.chunks is None
    assert len(directory) == 1


def test_progress_counts_only_for_what_was_announced() -> None:
    directory = HolderDirectory()
    more = Holding(sha256=BLOB, chunks="c0", chunk_bytes=FINE_CHUNK_BYTES)
    directory.progressed(PEERS[0], more, now_ms=0)
    assert len(directory) == 0
    told(directory, PEERS[0], OTHER)
    directory.progressed(PEERS[0], more, now_ms=0)
    assert named(directory) == []
    told(directory, PEERS[0])
    directory.progressed(PEERS[0], more, now_ms=0)
    (holder,) = directory.holders(BLOB, asker=ASKER, reporter="x", now_ms=1)
    assert (holder.chunks, holder.chunk_bytes) == ("c0", FINE_CHUNK_BYTES)


def test_nobody_is_pointed_to_itself() -> None:
    directory = HolderDirectory()
    told(directory, PEERS[0])
    told(directory, PEERS[1])
    assert named(directory, asker=PEERS[0]) == [PEERS[1]]


def test_a_holding_lapses_unless_it_is_said_again() -> None:
    directory = HolderDirectory(DirectoryLimits(ttl_ms=1_000))
    told(directory, PEERS[0], now_ms=0)
    told(directory, PEERS[1], now_ms=900)
    assert set(named(directory, now_ms=999)) == {PEERS[0], PEERS[1]}
    assert named(directory, now_ms=1_000) == [PEERS[1]]
    assert named(directory, now_ms=9_000) == []
    assert len(directory) == 0


def test_who_takes_a_blob_back_or_leaves_is_not_named() -> None:
    directory = HolderDirectory()
    for peer in PEERS[:3]:
        told(directory, peer)
    directory.gone(PEERS[0], [BLOB, OTHER])
    directory.withdraw(PEERS[1])
    directory.withdraw(PEERS[9])
    assert named(directory) == [PEERS[2]]
    assert len(directory) == 1


def test_each_holder_leads_in_its_turn() -> None:
    directory = HolderDirectory()
    for peer in PEERS[:3]:
        told(directory, peer)
    assert [named(directory)[0] for _ in range(6)] == PEERS[:3] * 2


def test_those_left_out_come_first_the_next_time() -> None:
    directory = HolderDirectory()
    for peer in PEERS:
        told(directory, peer)
    first, second = named(directory), named(directory)
    assert len(first) == MAX_HOLDERS
    # Whoever was left out of the first answer leads the second.
    assert set(second[:4]) == set(PEERS) - set(first)


def test_a_report_puts_a_holder_last_for_its_reporter_alone() -> None:
    directory = HolderDirectory()
    for peer in PEERS[:3]:
        told(directory, peer)
    directory.report("ann", PEERS[0], BLOB, now_ms=1)
    for _ in range(3):
        assert named(directory, reporter="ann")[-1] == PEERS[0]
    # Had it counted for everybody, it would never lead here.
    assert PEERS[0] in {named(directory, reporter="bob")[0] for _ in range(3)}


def test_two_reporters_convince_everybody_and_nobody_is_removed() -> None:
    directory = HolderDirectory()
    for peer in PEERS[:3]:
        told(directory, peer)
    directory.report("ann", PEERS[0], BLOB, now_ms=1)
    directory.report("ann", PEERS[0], BLOB, now_ms=2)
    directory.report("bob", PEERS[0], BLOB, now_ms=2)
    for _ in range(3):
        answer = named(directory, reporter="eve")
        assert answer[-1] == PEERS[0]
        assert len(answer) == 3


def test_reports_lapse_are_few_and_count_only_against_holders_of_the_blob() -> None:
    limits = DirectoryLimits(report_ms=100, reports_per_reporter=2, ttl_ms=10_000)
    directory = HolderDirectory(limits)
    for peer in PEERS[:3]:
        told(directory, peer)
    told(directory, PEERS[3], OTHER)
    directory.report("ann", PEERS[3], BLOB, now_ms=1)
    for peer in PEERS[:3]:
        directory.report("ann", peer, BLOB, now_ms=1)
    # The oldest of three made room: the two others never lead, until their reports lapse.
    assert [named(directory, reporter="ann")[0] for _ in range(2)] == [PEERS[0]] * 2
    assert named(directory, reporter="ann", now_ms=101)[0] == PEERS[1]


def test_one_peer_has_room_for_so_many_blobs_and_its_oldest_go() -> None:
    directory = HolderDirectory(DirectoryLimits(holdings_per_peer=2))
    told(directory, PEERS[0], BLOB, OTHER, "c" * 64)
    assert len(directory) == 2
    assert named(directory) == []


def test_chunk_maps_of_one_peer_have_a_bound_together() -> None:
    directory = HolderDirectory()
    for name in "abcdef":
        big = Holding(sha256=name * 64, chunks="ff" * 30_000)
        directory.announce(PEERS[0], ["http://h:1"], [big], now_ms=0)
    assert len(directory) == 2


def test_a_full_directory_says_so() -> None:
    directory = HolderDirectory(DirectoryLimits(holdings=2))
    told(directory, PEERS[0])
    told(directory, PEERS[1])
    with pytest.raises(Unavailable, match="full"):
        told(directory, PEERS[2])
    # Who is known may still say it again.
    told(directory, PEERS[1], now_ms=1)
    assert set(named(directory)) == {PEERS[0], PEERS[1]}


@pytest.mark.parametrize(
    "source",
    [
        "ftp://h/",
        "http://user@h/",
        "http://h/?a=b",
        "http://h/#x",
        "http://h y",
        "/ip4/1.2.3.4/tcp/1",
        "http://" + "h" * 300,
        "",
    ],
)
def test_a_source_is_an_http_base_or_an_address_of_a_peer(source: str) -> None:
    notice = HaveNotice(sources=("http://h:1/x", f"/p2p/{ASKER}"), holdings=())
    data = notice.encode()
    assert HaveNotice.decode(data) == notice
    with pytest.raises(PeerFault):
        HaveNotice.decode(data.replace(b"http://h:1/x", source.encode()))


def test_notices_are_capped() -> None:
    too_many = {"holdings": [{"sha256": BLOB}] * (MAX_HOLDINGS + 1), "sources": []}
    with pytest.raises(ValueError, match="at most 64"):
        HaveNotice.model_validate(too_many, strict=False)
    maps = [{"sha256": BLOB, "chunks": "ff" * 20_000}] * 2
    with pytest.raises(ValueError, match="digits together"):
        HaveNotice.model_validate({"holdings": maps, "sources": []}, strict=False)


def test_deltas_that_do_not_lead_to_one_another_are_refused() -> None:
    def step(base: str, target: str) -> DeltaStep:
        ref = BlobRef(sha256="9" * 64, size_bytes=1)
        return DeltaStep(base_sha256=base * 64, target_sha256=target * 64, blob=ref)

    chain = HoldersReply(holders=(), deltas=(step("b", "c"), step("a", "b")))
    assert HoldersReply.decode(chain.encode()) == chain
    with pytest.raises(ValueError, match="base of the one before"):
        HoldersReply(holders=(), deltas=(step("b", "c"), step("b", "c")))
