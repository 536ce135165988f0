"""The sealed book: commit, seal, show; what it refuses and what it proves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from market_records import DOMAIN, NOW_MS, account
from sealed_market import bid_of, node, salt_of

from shoal.market.seal import SealedEpoch
from shoal.market.sealing import Backing, SealedBook
from shoal.protocol.certificate import BidderTerms
from shoal.protocol.errors import (
    InvalidRequest,
    NotFound,
    PeerFault,
    ShoalError,
    Unauthorised,
    Unavailable,
)
from shoal.protocol.market import Bid, TaskKind
from shoal.protocol.merkle import hex32, unhex
from shoal.protocol.sealing import (
    BidCancel,
    BidCommitment,
    BidReveal,
    StandingCommitment,
    commitment_of,
)
from shoal.protocol.signing import Domain, Signed, sign, signing_digest

BACKED = Backing(staked=True, bound_units=100)


def a_bid(number: int = 1, **changes: Any) -> Bid:
    return bid_of(number, **changes)


def reveal_of(number: int, record: Bid, *, salt: str | None = None) -> BidReveal:
    return BidReveal(
        signed=sign(record, DOMAIN, account(number)), salt=salt or salt_of(record.nonce)
    )


def name_of(record: Bid, domain: Domain = DOMAIN) -> str:
    return commitment_of(signing_digest(record, domain), unhex(salt_of(record.nonce)))


def commit(book: SealedBook, number: int, record: Bid) -> str:
    name = name_of(record)
    sealed = BidCommitment(commitment=name, epoch_from=record.epoch_from, epoch_to=record.epoch_to)
    book.commit(sealed, node=node(number), account=account(number).address, now_ms=NOW_MS)
    return name


def show(book: SealedBook, number: int, reveal: BidReveal, **changes: Any) -> None:
    options: dict[str, Any] = {"node": node(number), "backing": BACKED, "now_ms": NOW_MS}
    book.reveal(reveal, **(options | changes))


def test_bids_are_sealed_then_shown_and_compete_in_every_epoch_they_cover() -> None:
    book = SealedBook(DOMAIN, next_epoch=3)
    records = {number: a_bid(number) for number in (1, 2, 3)}
    names = {number: commit(book, number, record) for number, record in records.items()}
    sealed = book.seal(3, now_ms=NOW_MS)
    assert sealed.seal.num_commitments == 3
    proofs, wanted = book.of_node(node(2))
    assert wanted == (names[2],)
    assert [proof.commitment for proof in proofs] == [names[2]]
    assert proofs[0].holds(sealed.seal)
    for number in (1, 2):
        show(book, number, reveal_of(number, records[number]))
    assert {entry.bid.node for entry in book.freeze().opened} == {node(1), node(2)}
    later = book.seal(4, now_ms=NOW_MS)
    assert later.seal.commit_root == sealed.seal.commit_root
    assert book.of_node(node(2))[1] == ()
    assert len(book.freeze()) == 2
    assert book.freeze().epoch == 4


def test_a_proof_of_another_seal_or_place_does_not_hold() -> None:
    book = SealedBook(DOMAIN)
    for number in (1, 2, 3):
        commit(book, number, a_bid(number))
    first = book.seal(0, now_ms=NOW_MS)
    commit(book, 4, a_bid(4))
    second = book.seal(1, now_ms=NOW_MS)
    proof = first.proof(1)
    assert proof.holds(first.seal)
    assert not proof.holds(second.seal)
    assert not proof.model_copy(update={"index": 2}).holds(first.seal)
    assert not proof.model_copy(update={"index": 9}).holds(first.seal)


def test_a_receipt_is_given_once_and_starts_with_the_first_open_epoch() -> None:
    book = SealedBook(DOMAIN, next_epoch=5)
    record = a_bid()
    sealed = BidCommitment(commitment=name_of(record), epoch_from=0, epoch_to=100)
    options = {"node": node(1), "account": account(1).address, "now_ms": NOW_MS}
    receipt = book.commit(sealed, **options)  # type: ignore[arg-type]
    assert (receipt.epoch_from, receipt.epoch_to, receipt.seq) == (5, 100, 0)
    assert book.commit(sealed, **options) == receipt  # type: ignore[arg-type]
    assert len(book) == 1


def test_a_commitment_withdrawn_before_the_seal_is_not_wanted_but_keeps_its_leaf() -> None:
    book = SealedBook(DOMAIN)
    record = a_bid()
    name = commit(book, 1, record)
    cancel = sign(BidCancel(commitment=name, from_epoch=1), DOMAIN, account(1))
    book.cancel(cancel, node=node(1))
    book.seal(0, now_ms=NOW_MS)
    show(book, 1, reveal_of(1, record))
    assert len(book.freeze()) == 1
    sealed = book.seal(1, now_ms=NOW_MS)
    assert sealed.inclusion(name).holds(sealed.seal)
    assert book.of_node(node(1))[1] == ()
    assert len(book.freeze()) == 0


def test_after_the_seal_it_is_too_late_to_withdraw() -> None:
    book = SealedBook(DOMAIN)
    name = commit(book, 1, a_bid())
    book.seal(0, now_ms=NOW_MS)
    late = sign(BidCancel(commitment=name, from_epoch=0), DOMAIN, account(1))
    with pytest.raises(InvalidRequest) as caught:
        book.cancel(late, node=node(1))
    assert caught.value.code == "already_sealed"
    stranger = sign(BidCancel(commitment=name, from_epoch=1), DOMAIN, account(2))
    with pytest.raises(Unauthorised):
        book.cancel(stranger, node=node(1))
    with pytest.raises(NotFound):
        book.cancel(late, node=node(2))


def _other_chain(record: Bid) -> BidReveal:
    domain = Domain(chain_id=DOMAIN.chain_id + 1, escrow=DOMAIN.escrow)
    return BidReveal(signed=sign(record, domain, account(1)), salt=salt_of(record.nonce))


def _other_escrow(record: Bid) -> BidReveal:
    domain = Domain(chain_id=DOMAIN.chain_id, escrow="0x" + "6" * 40)
    return BidReveal(signed=sign(record, domain, account(1)), salt=salt_of(record.nonce))


def _high_s(record: Bid) -> BidReveal:
    raw = bytes.fromhex(sign(record, DOMAIN, account(1)).signature[2:])
    order = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
    flipped = (order - int.from_bytes(raw[32:64], "big")).to_bytes(32, "big")
    forged = "0x" + (raw[:32] + flipped + bytes([55 - raw[64]])).hex()
    return BidReveal(
        signed=Signed[Bid](record=record, signature=forged), salt=salt_of(record.nonce)
    )


@pytest.mark.parametrize(
    ("made", "error", "code"),
    [
        (_other_chain, Unauthorised, "wrong_signer"),
        (_other_escrow, Unauthorised, "wrong_signer"),
        (_high_s, PeerFault, "bad_signature"),
        (lambda record: reveal_of(2, record), Unauthorised, "wrong_signer"),
        (lambda record: reveal_of(1, record, salt=salt_of(77)), PeerFault, "commitment_mismatch"),
        (
            lambda record: reveal_of(1, record.model_copy(update={"price_micros": 1})),
            PeerFault,
            "commitment_mismatch",
        ),
    ],
)
def test_a_bid_that_is_not_the_one_committed_is_refused_by_name(
    made: Callable[[Bid], BidReveal], error: type[ShoalError], code: str
) -> None:
    book = SealedBook(DOMAIN)
    record = a_bid()
    commit(book, 1, record)
    book.seal(0, now_ms=NOW_MS)
    with pytest.raises(error) as caught:
        show(book, 1, made(record))
    assert caught.value.code == code
    assert len(book.freeze()) == 0
    show(book, 1, reveal_of(1, record))
    assert len(book.freeze()) == 1


def test_bids_that_lapsed_or_lack_stake_are_refused_by_name() -> None:
    book = SealedBook(DOMAIN)
    record = a_bid()
    commit(book, 1, record)
    book.seal(0, now_ms=NOW_MS)
    reveal = reveal_of(1, record)
    refusals: list[tuple[dict[str, Any], type[ShoalError], str]] = [
        ({"now_ms": record.valid_until_ms}, InvalidRequest, "bid_expired"),
        ({"backing": Backing(staked=False, bound_units=9)}, Unauthorised, "unstaked"),
        ({"backing": Backing(staked=True, bound_units=0)}, InvalidRequest, "over_capacity"),
        ({"node": node(2)}, PeerFault, "commitment_mismatch"),
    ]
    for changes, error, code in refusals:
        with pytest.raises(error) as caught:
            show(book, 1, reveal, **changes)
        assert caught.value.code == code
    show(book, 1, reveal)


def test_a_replayed_bid_does_not_come_back() -> None:
    book = SealedBook(DOMAIN)
    old, new = a_bid(nonce=1, price_micros=90), a_bid(nonce=2, price_micros=110)
    commit(book, 1, old)
    book.seal(0, now_ms=NOW_MS)
    show(book, 1, reveal_of(1, old))
    commit(book, 1, new)
    book.seal(1, now_ms=NOW_MS)
    show(book, 1, reveal_of(1, new))
    assert [entry.bid.price_micros for entry in book.freeze().opened] == [110]
    # The same old bid under a fresh salt: the nonce tells.
    again = commitment_of(signing_digest(old, DOMAIN), unhex(salt_of(55)))
    sealed = BidCommitment(commitment=again, epoch_from=0, epoch_to=100)
    book.commit(sealed, node=node(1), account=account(1).address, now_ms=NOW_MS)
    book.seal(2, now_ms=NOW_MS)
    with pytest.raises(InvalidRequest) as caught:
        show(book, 1, reveal_of(1, old, salt=salt_of(55)))
    assert caught.value.code == "stale_nonce"
    # Negative control: with the nonces forgotten it would compete again.
    book.forget_job(old.job_id)
    show(book, 1, reveal_of(1, old, salt=salt_of(55)))
    assert [entry.bid.price_micros for entry in book.freeze().opened] == [90]


def test_a_bid_shown_before_its_seal_or_for_other_epochs_is_refused() -> None:
    book = SealedBook(DOMAIN)
    record = a_bid()
    commit(book, 1, record)
    with pytest.raises(InvalidRequest) as early:
        show(book, 1, reveal_of(1, record))
    assert early.value.code == "not_sealed"
    sealed = BidCommitment(commitment=name_of(a_bid(2)), epoch_from=0, epoch_to=5)
    book.commit(sealed, node=node(2), account=account(2).address, now_ms=NOW_MS)
    book.seal(0, now_ms=NOW_MS)
    with pytest.raises(PeerFault) as other:
        show(book, 2, reveal_of(2, a_bid(2)))
    assert other.value.code == "commitment_mismatch"


def test_the_book_is_bounded() -> None:
    book = SealedBook(DOMAIN, next_epoch=9, max_nodes=1)
    past = BidCommitment(commitment="0x" + "1" * 64, epoch_from=0, epoch_to=8)
    options = {"account": account(1).address, "now_ms": NOW_MS}
    with pytest.raises(InvalidRequest) as over:
        book.commit(past, node=node(1), **options)  # type: ignore[arg-type]
    assert over.value.code == "epoch_over"
    for number in range(64):
        sealed = BidCommitment(commitment=f"0x{number:064x}", epoch_from=0, epoch_to=9)
        book.commit(sealed, node=node(1), **options)  # type: ignore[arg-type]
    extra = BidCommitment(commitment="0x" + "e" * 64, epoch_from=0, epoch_to=9)
    with pytest.raises(InvalidRequest) as many:
        book.commit(extra, node=node(1), **options)  # type: ignore[arg-type]
    assert many.value.code == "too_many_bids"
    with pytest.raises(Unavailable):
        book.commit(extra, node=node(2), **options)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest) as copied:
        book.commit(sealed, node=node(2), **options)  # type: ignore[arg-type]
    assert copied.value.code == "duplicate_commitment"
    book.seal(10, now_ms=NOW_MS)
    assert len(book) == 0
    with pytest.raises(InvalidRequest):
        book.seal(10, now_ms=NOW_MS)


def test_a_book_restored_from_the_store_seals_the_same_root() -> None:
    book = SealedBook(DOMAIN)
    names = [commit(book, number, a_bid(number)) for number in (1, 2)]
    book.seal(0, now_ms=NOW_MS)
    show(book, 1, reveal_of(1, a_bid(1)))
    kept = [StandingCommitment.decode(book.entry(name).encode()) for name in names]
    again = SealedBook(DOMAIN, next_epoch=1)
    for entry in kept:
        again.restore(entry)
    root = book.seal(1, now_ms=NOW_MS).seal.commit_root
    assert again.seal(1, now_ms=NOW_MS).seal.commit_root == root
    assert again.of_node(node(2))[1] == (names[1],)
    assert [entry.digest for entry in again.freeze().opened] == [
        entry.digest for entry in book.freeze().opened
    ]
    with pytest.raises(NotFound):
        again.entry("0x" + "7" * 64)


def test_what_is_not_in_the_book_lies_in_a_gap() -> None:
    commitments = [bytes([value]) * 32 for value in (10, 20, 30)]
    sealed = SealedEpoch.of(4, commitments, sealed_at_ms=NOW_MS)
    for value, indices in ((5, [0]), (15, [0, 1]), (35, [2])):
        proofs = sealed.gap(hex32(bytes([value]) * 32))
        assert [proof.index for proof in proofs] == indices
        assert all(proof.holds(sealed.seal) for proof in proofs)
    with pytest.raises(InvalidRequest) as caught:
        sealed.gap(hex32(commitments[1]))
    assert caught.value.code == "not_dropped"
    with pytest.raises(NotFound):
        sealed.inclusion("0x" + "7" * 64)
    assert SealedEpoch.of(4, [], sealed_at_ms=NOW_MS).gap("0x" + "7" * 64) == ()


@pytest.mark.parametrize(
    "change",
    [
        {"price_micros": -1},
        {"price_micros": 0},
        {"price_micros": 2**53},
        {"capacity": 0},
        {"capacity": 2**32},
        {"nonce": -1},
        {"epoch_to": 2**32},
        {"account": "0x" + "1" * 39},
        {"price_micros": 1.5},
        {"kind": "other"},
    ],
)
def test_a_bid_with_a_field_out_of_range_never_becomes_a_record(change: dict[str, Any]) -> None:
    fields = a_bid().to_json() | change
    with pytest.raises(PeerFault) as caught:
        Bid.decode(_json(fields))
    assert caught.value.code == "malformed"


def test_a_truncated_bid_is_malformed_and_an_oversized_one_is_not_parsed() -> None:
    whole = reveal_of(1, a_bid()).encode()
    with pytest.raises(PeerFault) as cut:
        BidReveal.decode(whole[:-20])
    assert cut.value.code == "malformed"
    with pytest.raises(PeerFault) as large:
        BidReveal.decode(whole, max_bytes=100)
    assert large.value.code == "oversize"
    short = reveal_of(1, a_bid()).to_json()
    short["signed"]["signature"] = short["signed"]["signature"][:-2]
    with pytest.raises(PeerFault):
        BidReveal.decode(_json(short))


def test_terms_of_one_bidder_pack_apart_from_any_others() -> None:
    base: dict[str, Any] = {
        "account": account(1).address,
        "node": node(1),
        "handicap_micros": 3,
        "bound_units": 4,
        "num_receipts": 5,
        "staked": True,
    }
    variants: list[dict[str, Any]] = [
        {},
        {"handicap_micros": 4},
        {"bound_units": 3},
        {"staked": False},
    ]
    packed = {BidderTerms.model_validate(base | change).packed() for change in variants}
    assert len(packed) == len(variants)


def test_kinds_and_jobs_are_separate_offers() -> None:
    book = SealedBook(DOMAIN)
    records = [a_bid(nonce=1), a_bid(nonce=2, kind=TaskKind.GRADIENT)]
    for record in records:
        commit(book, 1, record)
    book.seal(0, now_ms=NOW_MS)
    for record in records:
        show(book, 1, reveal_of(1, record))
    assert len(book.freeze()) == 2


def _json(fields: dict[str, Any]) -> bytes:
    import json

    return json.dumps(fields).encode()
