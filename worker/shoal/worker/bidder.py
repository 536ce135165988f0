"""What the worker offers: its floor price, for every open job and kind that pays as much."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from shoal.protocol.clock import TimeSource
from shoal.protocol.errors import PeerFault, ShoalError
from shoal.protocol.market import MAX_UNITS, Bid, BidReceipt, TaskKind
from shoal.protocol.node import BID_PROTOCOL, OpenJob
from shoal.protocol.signing import Signed, sign
from shoal.worker.capacity import CapacityNow
from shoal.worker.config import WorkerConfig
from shoal.worker.events import log_event, log_failure
from shoal.worker.evidence import EvidenceBook
from shoal.worker.offers import Parties
from shoal.worker.session import Credentials, Link

BID_VALIDITY_MS: Final = 600_000
_RENEW_BEFORE_MS: Final = BID_VALIDITY_MS // 2


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
        self._book = book
        self._time = time
        self._valid_until_ms: dict[tuple[str, TaskKind], int] = {}
        self._declined: dict[tuple[str, TaskKind], str] = {}
        self._last_nonce = 0

    @property
    def is_priced_out(self) -> bool:
        """Whether there are open jobs and none pays this worker's floor."""
        return bool(self._declined) and not self._valid_until_ms

    def renew(self, kind: TaskKind) -> None:
        """The bids of ``kind`` are sent anew: what the worker takes has changed."""
        self._valid_until_ms = {k: v for k, v in self._valid_until_ms.items() if k[1] is not kind}

    def forget(self) -> None:
        """Every bid will be sent anew; a restarted orchestrator may hold none."""
        self._valid_until_ms.clear()

    async def refresh(self, jobs: Sequence[OpenJob], parties: Parties) -> None:
        """Every open job worth working for has a bid that stands; closed ones are forgotten.

        A bid that fails to be sent is logged and tried again at the next call.
        """
        decisions = decide(jobs, self._config, self._capacity)
        wanted = {(d.job_id, d.kind) for d in decisions if d.decline is None}
        self._valid_until_ms = {k: v for k, v in self._valid_until_ms.items() if k in wanted}
        self._note_declined(decisions)
        renew_at_ms = self._time.now_ms() + _RENEW_BEFORE_MS
        for decision in decisions:
            key = (decision.job_id, decision.kind)
            if key not in wanted or self._valid_until_ms.get(key, 0) > renew_at_ms:
                continue
            try:
                self._valid_until_ms[key] = await self._send(decision, parties)
            except ShoalError as error:
                log_failure("bid_failed", error, job_id=decision.job_id, kind=decision.kind.value)

    async def _send(self, decision: Decision, parties: Parties) -> int:
        now_ms = self._time.now_ms()
        self._last_nonce = max(self._last_nonce + 1, now_ms)
        bid = Bid(
            job_id=decision.job_id,
            kind=decision.kind,
            epoch_from=0,
            epoch_to=MAX_UNITS,
            price_micros=decision.price_micros,
            capacity=self._capacity.units(decision.kind),
            account=self._credentials.address,
            node=self._credentials.node,
            valid_until_ms=now_ms + BID_VALIDITY_MS,
            nonce=self._last_nonce,
        )
        signed = sign(bid, parties.domain, self._credentials.account)
        reply = await self._link.request(BID_PROTOCOL, signed.encode())
        receipt = Signed[BidReceipt].decode(reply)
        receipt.require_signer(parties.domain, parties.orchestrator)
        if receipt.record.bid_sha256 != bid.digest():
            raise PeerFault(
                "The orchestrator's receipt is for another bid than the one sent.",
                evidence=receipt.record.digest(),
                code="wrong_receipt",
            )
        self._book.keep_bid(signed, receipt)
        log_event(
            "bid_standing",
            job_id=bid.job_id,
            kind=bid.kind.value,
            price_micros=bid.price_micros,
            capacity=bid.capacity,
        )
        return bid.valid_until_ms

    def _note_declined(self, decisions: Iterable[Decision]) -> None:
        declined = {(d.job_id, d.kind): d.decline for d in decisions if d.decline is not None}
        for (job_id, kind), reason in declined.items():
            if self._declined.get((job_id, kind)) != reason:
                log_event("no_bid", job_id=job_id, kind=kind.value, reason=reason)
        self._declined = declined
