"""The bids of one sealed epoch, opened: what every lot of that epoch is cleared over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from shoal.protocol.canonical import sha256_hex
from shoal.protocol.certificate import BidderTerms, handicap_leaf, reveal_leaf
from shoal.protocol.ids import Digest
from shoal.protocol.market import ANY_JOB, Bid, Lot, TaskKind
from shoal.protocol.merkle import MerkleTree, hex32, keccak, unhex
from shoal.protocol.signing import Signed

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
Bytes = NDArray[np.uint8]

_KINDS = {kind: number for number, kind in enumerate(TaskKind)}
_BidderKey = tuple[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenedBid:
    """A bid, its commitment and what opened it.

    ``digest`` is what the account signed, computed once when the bid was shown; clearings,
    certificates and the chain name the bid by it.
    """

    signed: Signed[Bid]
    digest: bytes
    commitment: bytes
    salt: bytes

    @property
    def bid(self) -> Bid:
        """The bid itself."""
        return self.signed.record


class FrozenBook:
    """The bids that compete in one market epoch, in the order of their commitments.

    The columns are arrays over the bids, so that a clearing costs little more than sorting.

    Args:
        epoch: The market epoch.
        opened: The bids, in whatever order; one that appears twice counts once.
    """

    def __init__(self, epoch: int, opened: Iterable[OpenedBid]) -> None:
        unique = {entry.commitment: entry for entry in opened}
        self.epoch = epoch
        self.opened = tuple(unique[commitment] for commitment in sorted(unique))
        bids = [entry.bid for entry in self.opened]
        self.digests = [entry.digest for entry in self.opened]
        self.digest_bytes = _byte_rows(self.digests, 32)
        self.account_bytes = _byte_rows([unhex(bid.account) for bid in bids], 20)
        self.price_micros = _column(bid.price_micros for bid in bids)
        self.capacity = _column(bid.capacity for bid in bids)
        self._valid_until_ms = _column(bid.valid_until_ms for bid in bids)
        self._epoch_from = _column(bid.epoch_from for bid in bids)
        self._epoch_to = _column(bid.epoch_to for bid in bids)
        self._kind = _column(_KINDS[bid.kind] for bid in bids)
        jobs = _numbers(bid.job_id for bid in bids)
        self._job_numbers = jobs
        self._job = _column(jobs[bid.job_id] for bid in bids)
        accounts = _numbers(bid.account.lower() for bid in bids)
        self.account = _column(accounts[bid.account.lower()] for bid in bids)
        nodes = _numbers(bid.node for bid in bids)
        self.node = _column(nodes[bid.node] for bid in bids)
        self.bidders = [(bid.account.lower(), bid.node) for bid in bids]

    def __len__(self) -> int:
        return len(self.opened)

    def covers(self, lot: Lot) -> Mask:
        """Which bids stand for the lot's job and kind in this epoch."""
        named = self._job_numbers.get(lot.job_id, -1)
        any_job = self._job_numbers.get(ANY_JOB, -1)
        covered: Mask = (
            (self._kind == _KINDS[lot.lot_class.kind])
            & ((self._job == named) | (self._job == any_job))
            & (self._epoch_from <= self.epoch)
            & (self.epoch <= self._epoch_to)
        )
        return covered

    def lapsed(self, now_ms: int) -> Mask:
        """Which bids are past their own end."""
        return self._valid_until_ms <= now_ms

    def holds(self, opened: Sequence[OpenedBid]) -> bool:
        """Whether these and no others are the book's bids."""
        mine = {entry.commitment for entry in self.opened}
        return mine == {entry.commitment for entry in opened}

    def at(self, epoch: int) -> FrozenBook:
        """The same bids in another epoch, with whatever was worked out of them."""
        other = copy(self)
        other.epoch = epoch
        return other

    @cached_property
    def reveal_root(self) -> str:
        """The root over `reveal_leaf` of every bid shown."""
        count = len(self)
        leaves = [
            reveal_leaf(n, count, entry.digest, entry.salt) for n, entry in enumerate(self.opened)
        ]
        return hex32(MerkleTree(leaves).root)

    @cached_property
    def salts_hash(self) -> bytes:
        """The keccak of all salts shown, in the order of their commitments."""
        return keccak(b"".join(entry.salt for entry in self.opened))


class TermsTable:
    """What receipts and stake say of each bidder of a class, as one clearing sees it.

    A bidder that is not in the table has no stake and no receipts.

    Args:
        rows: One for each (account, node); the last one counts.
    """

    def __init__(self, rows: Iterable[BidderTerms]) -> None:
        by_bidder = {(row.account.lower(), row.node): row for row in rows}
        self.rows = tuple(by_bidder[key] for key in sorted(by_bidder))
        self._places: Mapping[_BidderKey, int] = {key: n for n, key in enumerate(sorted(by_bidder))}
        # One more row than bidders: index -1 is the bidder nobody knows.
        self._handicap = _column([*(row.handicap_micros for row in self.rows), 0])
        self._bound = _column([*(row.bound_units for row in self.rows), 0])
        self._receipts = _column([*(row.num_receipts for row in self.rows), 0])
        self._staked = np.array([*(row.staked for row in self.rows), False], dtype=np.bool_)
        self._aligned: tuple[FrozenBook, Ints] | None = None

    def handicap_micros(self, book: FrozenBook) -> Ints:
        """Each bid's handicap."""
        return self._handicap[self._rows_of(book)]

    def bound_units(self, book: FrozenBook) -> Ints:
        """The most units the stake behind each bid backs."""
        return self._bound[self._rows_of(book)]

    def num_receipts(self, book: FrozenBook) -> Ints:
        """How many receipts each bid's bidder has."""
        return self._receipts[self._rows_of(book)]

    def staked(self, book: FrozenBook) -> Mask:
        """Which bids have stake behind them."""
        return self._staked[self._rows_of(book)]

    @cached_property
    def handicap_root(self) -> str:
        """The root over `handicap_leaf` of every row, in order of account and node."""
        leaves = [handicap_leaf(row.account, row.node, row.handicap_micros) for row in self.rows]
        return hex32(MerkleTree(leaves).root)

    @cached_property
    def sha256(self) -> Digest:
        """The digest of every row, in order of account and node."""
        return sha256_hex(b"".join(row.packed() for row in self.rows))

    def _rows_of(self, book: FrozenBook) -> Ints:
        if self._aligned is None or self._aligned[0] is not book:
            rows = _column(self._places.get(key, -1) for key in book.bidders)
            self._aligned = (book, rows)
        return self._aligned[1]


def _column(values: Iterable[int]) -> Ints:
    return np.fromiter(values, dtype=np.int64)


def _byte_rows(items: Sequence[bytes], size: int) -> Bytes:
    return np.frombuffer(b"".join(items), dtype=np.uint8).reshape(len(items), size)


def _numbers(names: Iterable[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(dict.fromkeys(names))}
