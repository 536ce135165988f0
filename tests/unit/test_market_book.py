"""The bid book: what stands, what is replaced, what is refused."""

from __future__ import annotations

import pytest
from market_records import DOMAIN, JOB_ID, NOW_MS, account, bid, peer

from shoal.market.book import BidBook
from shoal.protocol.errors import InvalidRequest, PeerFault, Unauthorised, Unavailable
from shoal.protocol.market import Bid, TaskKind
from shoal.protocol.signing import Domain, Signed, sign


def signed(node: int = 1, **changes: object) -> Signed[Bid]:
    return sign(bid(node, **changes), DOMAIN, account(node))


def test_a_newer_bid_replaces_the_older_and_an_equal_one_changes_nothing() -> None:
    book = BidBook(DOMAIN)
    first = signed(nonce=1)
    book.add(first, now_ms=NOW_MS)
    book.add(first, now_ms=NOW_MS)
    assert len(book) == 1
    newer = book.add(signed(nonce=2, price_micros=90), now_ms=NOW_MS)
    assert list(book) == [newer]
    book.add(signed(nonce=1, kind=TaskKind.GRADIENT), now_ms=NOW_MS)
    assert len(book) == 2


@pytest.mark.parametrize("nonce", [1, 2])
def test_an_older_bid_cannot_be_brought_back(nonce: int) -> None:
    book = BidBook(DOMAIN)
    old = signed(nonce=nonce, price_micros=10)
    book.add(signed(nonce=2), now_ms=NOW_MS)
    with pytest.raises(InvalidRequest) as caught:
        book.add(old, now_ms=NOW_MS)
    assert caught.value.code == "stale_nonce"
    assert book.remove_node(peer(1)) == 1
    with pytest.raises(InvalidRequest, match="nonce"):
        book.add(old, now_ms=NOW_MS)


def test_the_last_bid_may_come_back_after_its_node_left() -> None:
    book = BidBook(DOMAIN)
    book.add(signed(), now_ms=NOW_MS)
    book.remove_node(peer(1))
    assert book.of_node(peer(1)) == ()
    book.add(signed(), now_ms=NOW_MS)
    assert len(book.of_node(peer(1))) == 1


def test_only_the_named_account_on_this_chain_may_bid() -> None:
    book = BidBook(DOMAIN)
    with pytest.raises(Unauthorised):
        book.add(sign(bid(1), DOMAIN, account(2)), now_ms=NOW_MS)
    elsewhere = Domain(chain_id=1, escrow=DOMAIN.escrow)
    with pytest.raises(Unauthorised):
        book.add(sign(bid(1), elsewhere, account(1)), now_ms=NOW_MS)
    forged = Signed[Bid](record=bid(1), signature="0x" + "ff" * 65)
    with pytest.raises(PeerFault):
        book.add(forged, now_ms=NOW_MS)
    assert len(book) == 0
    book.add(signed(), now_ms=NOW_MS)


def test_a_lapsed_bid_is_refused_and_a_lapsing_one_is_swept() -> None:
    book = BidBook(DOMAIN)
    with pytest.raises(InvalidRequest) as caught:
        book.add(signed(valid_until_ms=NOW_MS), now_ms=NOW_MS)
    assert caught.value.code == "bid_expired"
    book.add(signed(valid_until_ms=NOW_MS + 1), now_ms=NOW_MS)
    assert book.remove_expired(NOW_MS) == 0
    assert book.remove_expired(NOW_MS + 1) == 1


def test_a_number_without_an_exact_form_is_refused() -> None:
    wire = signed().encode().replace(b'"nonce":1', b'"nonce":%d' % 2**53)
    assert wire != signed().encode()
    with pytest.raises(PeerFault, match="nonce"):
        Signed[Bid].decode(wire)


def test_caps_hold_and_a_finished_job_frees_its_room() -> None:
    book = BidBook(DOMAIN, max_bids_per_node=2, max_nodes=1)
    for job in ("0x" + "1" * 64, "0x" + "2" * 64):
        book.add(signed(job_id=job), now_ms=NOW_MS)
    with pytest.raises(InvalidRequest) as caught:
        book.add(signed(job_id="0x" + "3" * 64), now_ms=NOW_MS)
    assert caught.value.code == "too_many_bids"
    with pytest.raises(Unavailable):
        book.add(signed(2), now_ms=NOW_MS)
    assert book.remove_job("0x" + "1" * 64) == 1
    book.add(signed(job_id="0x" + "3" * 64), now_ms=NOW_MS)


def test_standing_lists_what_covers_the_lot() -> None:
    book = BidBook(DOMAIN)
    match = book.add(signed(1), now_ms=NOW_MS)
    own = book.add(signed(2, job_id=JOB_ID), now_ms=NOW_MS)
    book.add(signed(3, job_id="0x" + "1" * 64), now_ms=NOW_MS)
    book.add(signed(4, epoch_from=8), now_ms=NOW_MS)
    book.add(signed(5, kind=TaskKind.EVALUATE), now_ms=NOW_MS)
    book.add(signed(6, valid_until_ms=NOW_MS + 5), now_ms=NOW_MS)
    found = book.standing(JOB_ID, 7, TaskKind.ROLLOUT, now_ms=NOW_MS + 5)
    assert {entry.sha256 for entry in found} == {match.sha256, own.sha256}
