"""The sealed book: commitments in, a root at each epoch's end, bids opened after it.

The book holds what may win lots.  It reads no clock and signs nothing: times come as
arguments, and the caller signs the receipts and seals it is given.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.market.frozen import FrozenBook, OpenedBid
from shoal.market.seal import SealedEpoch
from shoal.protocol.errors import InvalidRequest, NotFound, PeerFault, Unauthorised, Unavailable
from shoal.protocol.market import Bid, TaskKind
from shoal.protocol.merkle import unhex
from shoal.protocol.sealing import (
    MAX_COMMITMENTS_PER_NODE,
    BidCancel,
    BidCommitment,
    BidReceipt,
    BidReveal,
    CommitProof,
    StandingCommitment,
    commitment_of,
)
from shoal.protocol.signing import Domain, Signed, signing_digest

MAX_NODES = 100_000
MAX_OFFERS_PER_NODE = 256
"""Jobs and kinds whose last nonce is remembered for one node."""

_Offer = tuple[str, TaskKind]


@dataclass(frozen=True, kw_only=True, slots=True)
class Backing:
    """What stands behind a bidder when its bid is opened.

    ``bound_units`` is how many units in flight its free stake backs.
    """

    staked: bool
    bound_units: int


class SealedBook:
    """Every commitment that stands, and the bids behind those already opened.

    Commitments keep their leaf in every root their receipt covers, also after they were
    withdrawn or their bid was replaced: what left the roots early could pass for dropped.

    Args:
        domain: The chain and escrow that bids must be signed for.
        next_epoch: The first market epoch not yet sealed.
        next_seq: The number of the next receipt.
        max_nodes: Distinct nodes whose commitments may stand.
    """

    def __init__(
        self,
        domain: Domain,
        *,
        next_epoch: int = 0,
        next_seq: int = 0,
        max_nodes: int = MAX_NODES,
    ) -> None:
        self._domain = domain
        self._next_epoch = next_epoch
        self._next_seq = next_seq
        self._max_nodes = max_nodes
        self._standing: dict[str, StandingCommitment] = {}
        self._opened: dict[str, OpenedBid] = {}
        self._of_node: dict[str, set[str]] = {}
        self._nonces: dict[str, dict[_Offer, tuple[int, str]]] = {}
        self._sealed: SealedEpoch | None = None
        self._frozen: FrozenBook | None = None
        self._changed = True

    def __len__(self) -> int:
        return len(self._standing)

    @property
    def next_epoch(self) -> int:
        """The first market epoch whose book is still open."""
        return self._next_epoch

    def commit(self, sealed: BidCommitment, *, node: str, account: str, now_ms: int) -> BidReceipt:
        """The commitment stands from the next seal on; the receipt is for the caller to sign.

        The same commitment again from the same node gives the same receipt, so a retry is
        harmless.

        Raises:
            InvalidRequest: its epochs are over, another node made it, or the node has too
                many; ``code`` names the rule.
            Unavailable: the book holds as many nodes as it may.
        """
        known = self._standing.get(sealed.commitment)
        if known is not None:
            if known.node != node:
                raise InvalidRequest(
                    f"Commitment {sealed.commitment} was already made by another node; draw a "
                    "fresh salt and commit anew.",
                    code="duplicate_commitment",
                )
            return known.receipt
        self._require_room(sealed, node)
        receipt = BidReceipt(
            commitment=sealed.commitment,
            epoch_from=max(sealed.epoch_from, self._next_epoch),
            epoch_to=sealed.epoch_to,
            received_at_ms=now_ms,
            seq=self._next_seq,
        )
        self._next_seq += 1
        self._keep(
            StandingCommitment(
                node=node, account=account, receipt=receipt, bid_from=sealed.epoch_from
            )
        )
        return receipt

    def entry(self, commitment: str) -> StandingCommitment:
        """All that is known of a standing commitment, for the store.

        Raises:
            NotFound: no such commitment stands.
        """
        known = self._standing.get(commitment)
        if known is None:
            raise NotFound(
                f"No commitment {commitment} stands; its epochs may be over.",
                code="no_such_commitment",
            )
        return known

    def restore(self, entry: StandingCommitment) -> None:
        """A commitment from the store stands as it did, its bid opened if it was."""
        name = entry.receipt.commitment
        self._keep(entry)
        self._next_seq = max(self._next_seq, entry.receipt.seq + 1)
        if entry.opened is None:
            return
        bid = entry.opened.signed.record
        offers = self._nonces.setdefault(entry.node, {})
        last = offers.get((bid.job_id, bid.kind))
        if last is None or bid.nonce > last[0]:
            offers[bid.job_id, bid.kind] = (bid.nonce, name)
        self._opened[name] = _opened(entry.opened, signing_digest(bid, self._domain), name)

    def cancel(self, signed: Signed[BidCancel], *, node: str) -> BidCancel:
        """From the named epoch on, the commitment's bid is not shown and wins nothing.

        Raises:
            NotFound: no such commitment of this node stands.
            InvalidRequest: the book of that epoch is sealed already.
            Unauthorised: another account than the node's has signed.
            PeerFault: the signature is malformed.
        """
        cancel = signed.record
        known = self._standing.get(cancel.commitment)
        if known is None or known.node != node:
            raise NotFound(
                f"No commitment {cancel.commitment} of node {node} stands; check which of its "
                "receipts are still in their epochs.",
                code="no_such_commitment",
            )
        if cancel.from_epoch < self._next_epoch:
            raise InvalidRequest(
                f"The book of market epoch {cancel.from_epoch} is sealed; a bid can be "
                f"withdrawn from epoch {self._next_epoch} on.",
                code="already_sealed",
            )
        signed.require_signer(self._domain, known.account)
        earlier = known.cancelled_from
        first = cancel.from_epoch if earlier is None else min(earlier, cancel.from_epoch)
        update = {"cancelled_from": first}
        self._standing[cancel.commitment] = known.model_copy(update=update)
        return cancel

    def seal(self, epoch: int, *, now_ms: int) -> SealedEpoch:
        """The book of ``epoch`` is closed; what comes now stands from the next epoch on.

        Raises:
            InvalidRequest: that epoch, or a later one, is sealed already.
        """
        if epoch < self._next_epoch:
            raise InvalidRequest(
                f"Market epoch {epoch} is sealed already; the next is {self._next_epoch}.",
                code="already_sealed",
            )
        self._forget_before(epoch)
        covering = [
            unhex(name) for name, item in self._standing.items() if item.receipt.covers(epoch)
        ]
        before = self._sealed
        if before is not None and not self._changed and len(covering) == len(before.commitments):
            # Commitments only leave when their range ends and only come by `commit`: with
            # none of either, and equally many, they are the same.
            sealed = before.again(epoch, sealed_at_ms=now_ms)
        else:
            sealed = SealedEpoch.of(epoch, covering, sealed_at_ms=now_ms)
        self._sealed = sealed
        self._changed = any(item.receipt.epoch_from > epoch for item in self._standing.values())
        self._next_epoch = epoch + 1
        return sealed

    def of_node(self, node: str) -> tuple[tuple[CommitProof, ...], tuple[str, ...]]:
        """The proofs of the node's sealed commitments, and those whose bid is still wanted."""
        sealed = self._require_sealed()
        epoch = sealed.seal.epoch
        names = [
            name
            for name in sorted(self._of_node.get(node, ()))
            if self._standing[name].receipt.covers(epoch)
        ]
        wanted = [
            name
            for name in names
            if name not in self._opened and self._competes(self._standing[name], epoch)
        ]
        return tuple(sealed.inclusion(name) for name in names), tuple(wanted)

    def reveal(self, reveal: BidReveal, *, node: str, backing: Backing, now_ms: int) -> OpenedBid:
        """The bid behind a sealed commitment competes from the present epoch on.

        Raises:
            InvalidRequest: the commitment is not sealed, the bid has lapsed, is withdrawn, an
                older nonce than one already shown, or more than the stake backs; ``code``
                names the rule.
            PeerFault: the bid does not open a commitment of this node, or the signature is
                malformed.
            Unauthorised: another account than the node's has signed, for another chain, or
                without stake.
        """
        bid = reveal.signed.record
        digest = signing_digest(bid, self._domain)
        name = commitment_of(digest, unhex(reveal.salt))
        known = self._standing.get(name)
        if known is None or known.node != node:
            raise PeerFault(
                f"The bid shown opens no commitment of node {node}; it is another bid, another "
                f"salt, or signed for another chain than {self._domain.chain_id}.",
                code="commitment_mismatch",
            )
        if name in self._opened:
            return self._opened[name]
        self._require_valid(reveal.signed, known, backing, now_ms)
        self._require_fresh(bid, name)
        self._nonces.setdefault(node, {})[bid.job_id, bid.kind] = (bid.nonce, name)
        self._standing[name] = known.model_copy(update={"opened": reveal})
        self._opened[name] = _opened(reveal, digest, name)
        return self._opened[name]

    def freeze(self) -> FrozenBook:
        """The bids that compete in the sealed epoch: opened, not withdrawn, not replaced."""
        epoch = self._require_sealed().seal.epoch
        newest = {name for offers in self._nonces.values() for _, name in offers.values()}
        competing = [
            opened
            for name, opened in self._opened.items()
            if name in newest and self._competes(self._standing[name], epoch)
        ]
        before = self._frozen
        # Making the columns anew costs as much as many clearings, and books seldom change.
        if before is not None and before.holds(competing):
            self._frozen = before.at(epoch)
        else:
            self._frozen = FrozenBook(epoch, competing)
        return self._frozen

    def forget_job(self, job_id: str) -> None:
        """The nonces of bids for this job alone are not remembered any more."""
        for offers in self._nonces.values():
            for offer in [offer for offer in offers if offer[0] == job_id]:
                del offers[offer]

    def _keep(self, entry: StandingCommitment) -> None:
        self._standing[entry.receipt.commitment] = entry
        self._of_node.setdefault(entry.node, set()).add(entry.receipt.commitment)
        self._changed = True

    @staticmethod
    def _competes(entry: StandingCommitment, epoch: int) -> bool:
        withdrawn = entry.cancelled_from is not None and entry.cancelled_from <= epoch
        return entry.receipt.covers(epoch) and not withdrawn

    def _require_fresh(self, bid: Bid, name: str) -> None:
        offers = self._nonces.get(bid.node, {})
        last = offers.get((bid.job_id, bid.kind))
        if last is not None and bid.nonce <= last[0] and name != last[1]:
            raise InvalidRequest(
                f"The bid's nonce {bid.nonce} is not above {last[0]}, the last one of this "
                "node, job and kind; sign the new bid with a higher nonce.",
                code="stale_nonce",
            )
        if last is None and len(offers) >= MAX_OFFERS_PER_NODE:
            raise InvalidRequest(
                f"Node {bid.node} has shown bids for {MAX_OFFERS_PER_NODE} jobs; bid for any job "
                "(job_id of 64 zeros) instead of one by one.",
                code="too_many_bids",
            )

    def _require_room(self, sealed: BidCommitment, node: str) -> None:
        if sealed.epoch_to < self._next_epoch:
            raise InvalidRequest(
                f"The commitment ends with market epoch {sealed.epoch_to} and the next to be "
                f"sealed is {self._next_epoch}; bid for epochs to come.",
                code="epoch_over",
            )
        held = self._of_node.get(node)
        if held is None and len(self._of_node) >= self._max_nodes:
            raise Unavailable(
                f"The book already holds commitments of {self._max_nodes} nodes; try again later.",
                code="book_full",
                retry_after_s=60,
            )
        if held is not None and len(held) >= MAX_COMMITMENTS_PER_NODE:
            raise InvalidRequest(
                f"Node {node} already has {MAX_COMMITMENTS_PER_NODE} commitments standing; wait "
                "until one has ended, and bid for any job instead of one by one.",
                code="too_many_bids",
            )

    def _require_valid(
        self, signed: Signed[Bid], known: StandingCommitment, backing: Backing, now_ms: int
    ) -> None:
        bid, receipt = signed.record, known.receipt
        if (bid.epoch_from, bid.epoch_to) != (known.bid_from, receipt.epoch_to):
            raise PeerFault(
                f"The bid is for market epochs {bid.epoch_from} to {bid.epoch_to} and was "
                f"committed for {known.bid_from} to {receipt.epoch_to}.",
                code="commitment_mismatch",
            )
        if receipt.epoch_from >= self._next_epoch:
            raise InvalidRequest(
                f"The bid is sealed with market epoch {receipt.epoch_from}, which is still open; "
                "show it when the seal has come, or everyone will know the price.",
                code="not_sealed",
            )
        if known.cancelled_from is not None and known.cancelled_from < self._next_epoch:
            raise InvalidRequest(
                f"The bid was withdrawn from market epoch {known.cancelled_from} on; commit to a "
                "new one.",
                code="bid_cancelled",
            )
        if bid.valid_until_ms <= now_ms:
            raise InvalidRequest(
                f"The bid lapsed at {bid.valid_until_ms} and it is {now_ms} (ms since 1970); "
                "sign one with a later valid_until_ms.",
                code="bid_expired",
            )
        if bid.node != known.node or bid.account.lower() != known.account.lower():
            raise Unauthorised(
                f"The bid names node {bid.node} of account {bid.account} but comes from node "
                f"{known.node} of account {known.account}; sign it with the node's account.",
                code="wrong_signer",
            )
        signed.require_signer(self._domain, bid.account)
        _require_backing(bid, backing)

    def _require_sealed(self) -> SealedEpoch:
        if self._sealed is None:
            raise InvalidRequest("No market epoch is sealed yet; seal one.", code="not_sealed")
        return self._sealed

    def _forget_before(self, epoch: int) -> None:
        for name in [n for n, item in self._standing.items() if item.receipt.epoch_to < epoch]:
            item = self._standing.pop(name)
            self._opened.pop(name, None)
            self._changed = True
            names = self._of_node[item.node]
            names.discard(name)
            if not names:
                del self._of_node[item.node]


def _opened(reveal: BidReveal, digest: bytes, commitment: str) -> OpenedBid:
    return OpenedBid(
        signed=reveal.signed,
        digest=digest,
        commitment=unhex(commitment),
        salt=unhex(reveal.salt),
    )


def _require_backing(bid: Bid, backing: Backing) -> None:
    if not backing.staked:
        raise Unauthorised(
            f"Account {bid.account} has no stake; stake at least the orchestrator's minimum "
            "before bidding.",
            code="unstaked",
        )
    if backing.bound_units < 1:
        raise InvalidRequest(
            f"The free stake of account {bid.account} backs no unit of {bid.kind.value} at all; "
            "stake more, or wait until held work is done.",
            code="over_capacity",
        )
