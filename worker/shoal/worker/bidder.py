"""What the worker offers: its floor price, for every open job and kind that pays as much."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from shoal.protocol.clock import TimeSource
from shoal.protocol.errors import ShoalError
from shoal.protocol.market import MAX_UNITS, Bid, TaskKind
from shoal.protocol.node import COMMIT_PROTOCOL, OpenJob
from shoal.protocol.sealing import BidReceipt, Reveals, SealNotice
from shoal.protocol.signing import Signed, sign
from shoal.worker.capacity import CapacityNow
from shoal.worker.config import WorkerConfig
from shoal.worker.events import log_event, log_failure
from shoal.worker.evidence import EvidenceBook
from shoal.worker.offers import Parties
from shoal.worker.sealed import SealedBid, SealedBids, seal_bid
from shoal.worker.session import Credentials, Link

BID_VALIDITY_MS: Final = 600_000
BID_EPOCHS: Final = 600
"""Market epochs a bid stands for: ten minutes of the shortest."""
_RENEW_BEFORE_MS: Final = BID_VALIDITY_MS // 2
_RENEW_BEFORE_EPOCHS: Final = BID_EPOCHS // 2

_Offer = tuple[str, TaskKind]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What to do about one kind of one job: bid at ``price_micros``, or not and why."""

    job_id: str
    kind: TaskKind
    price_micros: int
    decline: str | None


def decide(
    jobs: Iterable[OpenJob], config: WorkerConfig, capacity: CapacityNow
) -> tuple[Decision, ...]:
    """For every open job and every kind in it, whether a bid is worth making."""
    return tuple(
        Decision(
            job_id=job.job_id,
            kind=kind,
            price_micros=config.price.micros(kind),
            decline=_decline(reserve, kind, config, capacity),
        )
        for job in jobs
        for kind, reserve in job.reserve_micros.items()
    )


def _decline(
    reserve_micros: int, kind: TaskKind, config: WorkerConfig, capacity: CapacityNow
) -> str | None:
    if capacity.units(kind) == 0:
        return "no_capacity"
    return "above_reserve" if reserve_micros < config.price.micros(kind) else None


class Bidder:
    """Keeps the worker's standing bids with the orchestrator.

    Args:
        config: Floor prices.
        capacity: How much the worker takes just now.
        credentials: The account that signs.
        link: The way to the orchestrator.
        book: Where bids and their receipts are kept.
        time: Wall clock, for the bids' validity.
    """

    def __init__(
        self,
        config: WorkerConfig,
        capacity: CapacityNow,
        credentials: Credentials,
        link: Link,
        book: EvidenceBook,
        time: TimeSource,
    ) -> None:
        self._config = config
        self._capacity = capacity
        self._credentials = credentials
        self._link = link
        self._sealed = SealedBids(book)
        self._time = time
        self._offers: dict[_Offer, SealedBid] = {}
        self._standing: set[_Offer] = set()
        self._declined: dict[_Offer, str] = {}
        self._last_nonce = 0

    @property
    def is_priced_out(self) -> bool:
        """Whether there are open jobs and none pays this worker's floor."""
        return bool(self._declined) and not self._offers

    def forget(self) -> None:
        """Every commitment will be sent again; a restarted orchestrator may hold none.

        They are the same commitments: to an orchestrator that does hold them nothing changes.
        """
        self._standing.clear()

    def open(self, notice: SealNotice, parties: Parties) -> Reveals:
        """The bids that the orchestrator asks for after its seal; see `SealedBids.open`."""
        return self._sealed.open(notice, parties)

    async def refresh(self, jobs: Sequence[OpenJob], market_epoch: int, parties: Parties) -> None:
        """Every open job worth working for has a bid that stands; closed ones are forgotten.

        A bid that fails to be sent is logged and tried again at the next call.

        Args:
            jobs: The jobs that accept bids and whose base is here.
            market_epoch: The first epoch that bids can still be made for.
            parties: Between whom the bids are.
        """
        decisions = decide(jobs, self._config, self._capacity)
        wanted = {(d.job_id, d.kind) for d in decisions if d.decline is None}
        self._offers = {k: v for k, v in self._offers.items() if k in wanted}
        self._standing &= wanted
        self._note_declined(decisions)
        unsent: dict[str, list[_Offer]] = {}
        for decision in decisions:
            offer = (decision.job_id, decision.kind)
            if offer not in wanted:
                continue
            if not self._is_fresh(self._offers.get(offer), decision, market_epoch):
                self._offers[offer] = self._make(decision, market_epoch, parties)
                self._standing.discard(offer)
            if offer not in self._standing:
                unsent.setdefault(decision.job_id, []).append(offer)
        for offers in unsent.values():
            # Together, or over a long line all but the first would miss the seal.
            await asyncio.gather(*(self._send(offer, parties) for offer in offers))

    def _is_fresh(self, sealed: SealedBid | None, decision: Decision, market_epoch: int) -> bool:
        """Whether the bid says what it should, and for long enough."""
        if sealed is None:
            return False
        bid = sealed.reveal.signed.record
        says_so = (bid.price_micros, bid.capacity) == (
            decision.price_micros,
            self._capacity.units(decision.kind),
        )
        return (
            says_so
            and bid.valid_until_ms > self._time.now_ms() + _RENEW_BEFORE_MS
            and bid.epoch_to > market_epoch + _RENEW_BEFORE_EPOCHS
        )

    def _make(self, decision: Decision, market_epoch: int, parties: Parties) -> SealedBid:
        now_ms = self._time.now_ms()
        self._last_nonce = max(self._last_nonce + 1, now_ms)
        bid = Bid(
            job_id=decision.job_id,
            kind=decision.kind,
            epoch_from=market_epoch,
            epoch_to=min(market_epoch + BID_EPOCHS, MAX_UNITS),
            price_micros=decision.price_micros,
            capacity=self._capacity.units(decision.kind),
            account=self._credentials.address,
            node=self._credentials.node,
            valid_until_ms=now_ms + BID_VALIDITY_MS,
            nonce=self._last_nonce,
        )
        return seal_bid(sign(bid, parties.domain, self._credentials.account), parties)

    async def _send(self, offer: _Offer, parties: Parties) -> None:
        job_id, kind = offer
        try:
            await self._commit(self._offers[offer], parties)
        except ShoalError as error:
            log_failure("bid_failed", error, job_id=job_id, kind=kind.value)
        else:
            self._standing.add(offer)

    async def _commit(self, sealed: SealedBid, parties: Parties) -> None:
        reply = await self._link.request(COMMIT_PROTOCOL, sealed.commitment.encode())
        self._sealed.keep(sealed, Signed[BidReceipt].decode(reply), parties)
        bid = sealed.reveal.signed.record
        log_event(
            "bid_standing",
            job_id=bid.job_id,
            kind=bid.kind.value,
            price_micros=bid.price_micros,
            capacity=bid.capacity,
        )

    def _note_declined(self, decisions: Iterable[Decision]) -> None:
        declined = {(d.job_id, d.kind): d.decline for d in decisions if d.decline is not None}
        for (job_id, kind), reason in declined.items():
            if self._declined.get((job_id, kind)) != reason:
                log_event("no_bid", job_id=job_id, kind=kind.value, reason=reason)
        self._declined = declined
