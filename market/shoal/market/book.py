"""The book of standing bids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shoal.protocol.errors import InvalidRequest, Unavailable
from shoal.protocol.ids import Digest
from shoal.protocol.market import Bid, TaskKind
from shoal.protocol.record import MAX_INT
from shoal.protocol.signing import Domain, Signed

MAX_BIDS_PER_NODE = 64
MAX_NODES = 100_000

_Offer = tuple[str, TaskKind]


@dataclass(frozen=True, kw_only=True)
class StandingBid:
    """A bid as the market holds it.

    ``signed`` is kept whole because it is the evidence for what the provider is paid;
    ``sha256`` is the digest of ``signed.record``, the bid's name everywhere else.
    """

    signed: Signed[Bid]
    sha256: Digest

    @classmethod
    def of(cls, signed: Signed[Bid]) -> StandingBid:
        """The standing form of ``signed``, whose signature the caller has checked."""
        return cls(signed=signed, sha256=signed.record.digest())

    @property
    def bid(self) -> Bid:
        """The bid itself."""
        return self.signed.record


@dataclass(slots=True)
class _Shelf:
    """One node's bids, and the last nonce of each offer, which outlives the bid itself."""

    standing: dict[_Offer, StandingBid]
    last: dict[_Offer, tuple[int, Digest]]


class BidBook:
    """Every bid that may win a lot, one for each node, job and kind.

    The book admits signed bids only.  That the node belongs to the account (its binding)
    and that the account has stake is for the caller to know.

    Args:
        domain: The chain and escrow the bids must be signed for.
        max_bids_per_node: Distinct (job, kind) offers one node may hold.
        max_nodes: Distinct nodes the book remembers.
    """

    def __init__(
        self,
        domain: Domain,
        *,
        max_bids_per_node: int = MAX_BIDS_PER_NODE,
        max_nodes: int = MAX_NODES,
    ) -> None:
        self._domain = domain
        self._max_bids_per_node = max_bids_per_node
        self._max_nodes = max_nodes
        self._shelves: dict[str, _Shelf] = {}
        self._none_lapses_before_ms = 0

    def __len__(self) -> int:
        return sum(len(shelf.standing) for shelf in self._shelves.values())

    def __iter__(self) -> Iterator[StandingBid]:
        for shelf in self._shelves.values():
            yield from shelf.standing.values()

    def add(self, signed: Signed[Bid], *, now_ms: int) -> StandingBid:
        """The bid stands, in place of the node's older one of the same job and kind.

        Adding the very same bid again changes nothing, so a retry is harmless.

        Raises:
            InvalidRequest: the bid has lapsed, its nonce is not above the last one of this
                node, job and kind, or the node holds too many bids; ``code`` names the rule.
            Unauthorised: another account than the one named has signed.
            PeerFault: the signature is malformed.
            Unavailable: the book holds as many nodes as it may.
        """
        bid = signed.record
        if bid.valid_until_ms <= now_ms:
            raise InvalidRequest(
                f"The bid lapsed at {bid.valid_until_ms} and it is {now_ms} (ms since 1970); "
                "sign one with a later valid_until_ms.",
                code="bid_expired",
            )
        signed.require_signer(self._domain, bid.account)
        entry = StandingBid.of(signed)
        shelf = self._shelf(bid.node)
        offer = (bid.job_id, bid.kind)
        self._require_fresh(shelf, offer, entry)
        shelf.standing[offer] = entry
        shelf.last[offer] = (bid.nonce, entry.sha256)
        self._none_lapses_before_ms = min(self._none_lapses_before_ms, bid.valid_until_ms)
        self._shelves[bid.node] = shelf
        return entry

    def remove_node(self, node: str) -> int:
        """None of the node's bids stands any more; the number removed.

        Its nonces stay known, so that an old bid cannot be brought back in its name.
        """
        shelf = self._shelves.get(node)
        if shelf is None:
            return 0
        removed = len(shelf.standing)
        shelf.standing.clear()
        return removed

    def remove_job(self, job_id: str) -> int:
        """No bid for this job alone stands any more, nor is remembered; the number removed."""
        removed = 0
        for shelf in self._shelves.values():
            for offer in [offer for offer in shelf.last if offer[0] == job_id]:
                del shelf.last[offer]
                removed += shelf.standing.pop(offer, None) is not None
        return removed

    def remove_expired(self, now_ms: int) -> int:
        """No lapsed bid stands any more; the number removed."""
        if now_ms < self._none_lapses_before_ms:
            return 0
        removed = 0
        for shelf in self._shelves.values():
            for offer, entry in list(shelf.standing.items()):
                if entry.bid.valid_until_ms <= now_ms:
                    del shelf.standing[offer]
                    removed += 1
        left = (entry.bid.valid_until_ms for entry in self)
        self._none_lapses_before_ms = min(left, default=MAX_INT)
        return removed

    def of_node(self, node: str) -> Sequence[StandingBid]:
        """The node's standing bids."""
        shelf = self._shelves.get(node)
        return tuple(shelf.standing.values()) if shelf else ()

    def standing(
        self, job_id: str, epoch: int, kind: TaskKind, *, now_ms: int
    ) -> tuple[StandingBid, ...]:
        """The unexpired bids of this kind that cover this job and epoch, in digest order."""
        found = [
            entry
            for entry in self
            if entry.bid.kind is kind
            and entry.bid.valid_until_ms > now_ms
            and entry.bid.covers(job_id, epoch)
        ]
        return tuple(sorted(found, key=lambda entry: entry.sha256))

    def _shelf(self, node: str) -> _Shelf:
        shelf = self._shelves.get(node)
        if shelf is not None:
            return shelf
        if len(self._shelves) >= self._max_nodes:
            raise Unavailable(
                f"The book already remembers bids of {self._max_nodes} nodes; try again later.",
                code="book_full",
                retry_after_s=60,
            )
        return _Shelf(standing={}, last={})

    def _require_fresh(self, shelf: _Shelf, offer: _Offer, entry: StandingBid) -> None:
        last = shelf.last.get(offer)
        if last is None:
            if len(shelf.last) >= self._max_bids_per_node:
                raise InvalidRequest(
                    f"The node {entry.bid.node} already has {self._max_bids_per_node} bids; bid "
                    f"for any job (job_id of 64 zeros) instead of one by one.",
                    code="too_many_bids",
                )
            return
        nonce, sha256 = last
        if entry.bid.nonce <= nonce and entry.sha256 != sha256:
            raise InvalidRequest(
                f"The bid's nonce {entry.bid.nonce} is not above {nonce}, the last one of this "
                "node, job and kind; sign the new bid with a higher nonce.",
                code="stale_nonce",
            )
