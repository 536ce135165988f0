"""Tells everybody at once, by gossip, what the market and the learner have just made.

Whatever arrives in a burst is told together, so that no topic carries more than one message a
second: beyond that, py-libp2p's gossip costs every listener more than it saves.  A lot is news
only to who has not heard of its job, so after one of a job was told the next are passed over.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Final

from shoal.orchestrator.context import Context
from shoal.protocol.announcement import (
    CERTIFICATES_TOPIC,
    LOTS_TOPIC,
    MAX_ANNOUNCEMENT_BYTES,
    MAX_CERTIFICATES,
    MAX_LOTS,
    MAX_POLICIES,
    MAX_SOURCES,
    POLICIES_TOPIC,
    CertificateAnnouncement,
    LotAnnouncement,
    PolicyAnnouncement,
    topic_of,
)
from shoal.protocol.certificate import ClearingCertificate
from shoal.protocol.errors import ShoalError
from shoal.protocol.market import Lot
from shoal.protocol.policy import PolicyVersion
from shoal.protocol.record import Record
from shoal.protocol.signing import Signed, sign

_log = logging.getLogger(__name__)

PAUSE_S: Final = 1.0
"""Between two messages on a topic.  A message costs about 10 ms of CPU, shared by orchestrator and
two workers (`benchmarks/overhead`), and each is news only to whoever waits for it."""

TOLD_AGAIN_MS: Final = 30_000
"""A job's lots are passed over for so long after one was told: who heard of the job by then wants
no more, and who did not learns of it with a heartbeat."""

_MAX_TOLD: Final = 1_024

_WRAPPING_BYTES: Final = 256
"""What a message of certificates has beside them: names, time, signature."""

_MAX_WAITING: Final = 4 * MAX_LOTS
"""Of each kind; the oldest are passed over, which costs their readers a heartbeat's delay."""


class Announcer:
    """Signs and publishes what it is told of, soon; nothing waits for it or depends on it.

    Args:
        context: Network, account and clock.
        sources: Where the orchestrator's blobs are, for those that fetch ahead.
    """

    def __init__(self, context: Context, sources: Callable[[], tuple[str, ...]]) -> None:
        self._context = context
        self._sources = sources
        self._lots: deque[Lot] = deque(maxlen=_MAX_WAITING)
        self._told_ms: OrderedDict[str, int] = OrderedDict()
        self._jobs: deque[str] = deque(maxlen=_MAX_WAITING)
        self._policies: dict[str, PolicyVersion] = {}
        self._certificates: deque[Signed[ClearingCertificate]] = deque(maxlen=_MAX_WAITING)
        self._told = asyncio.Event()

    def job(self, job_id: str) -> None:
        """The job will be announced as one that is about to open its first lots."""
        self._jobs.append(job_id)
        self._told.set()

    def lot(self, lot: Lot) -> None:
        """The lot will be announced, unless one of its job just was."""
        told_ms = self._told_ms.get(lot.job_id)
        # A clock that was set back must not silence a job.
        if told_ms is None or not 0 <= self._context.time.now_ms() - told_ms < TOLD_AGAIN_MS:
            self._lots.append(lot)
            self._told.set()

    def policy(self, policy: PolicyVersion) -> None:
        """The version will be announced, unless the job has a newer one by then."""
        self._policies.pop(policy.job_id, None)
        self._policies[policy.job_id] = policy
        while len(self._policies) > MAX_POLICIES:
            del self._policies[next(iter(self._policies))]
        self._told.set()

    def certificate(self, certificate: Signed[ClearingCertificate]) -> None:
        """The certificate will be announced, as it was signed."""
        self._certificates.append(certificate)
        self._told.set()

    async def run(self) -> None:
        """Runs for ever: announces what waits, with a pause after each round."""
        while True:
            await self._told.wait()
            await self.flush()
            await asyncio.sleep(PAUSE_S)

    async def flush(self) -> None:
        """One message of each kind that waits was handed to gossip."""
        self._told.clear()
        now_ms = self._context.time.now_ms()
        if self._lots or self._jobs:
            lots = tuple(self._lots.popleft() for _ in range(min(MAX_LOTS, len(self._lots))))
            jobs = tuple(self._jobs.popleft() for _ in range(min(MAX_LOTS, len(self._jobs))))
            lot_record = LotAnnouncement(lots=lots, jobs=jobs, announced_at_ms=now_ms)
            if await self._publish(LOTS_TOPIC, self._signed(lot_record)):
                self._note_told(lots, now_ms)
        if self._policies:
            policies, self._policies = tuple(self._policies.values()), {}
            policy_record = PolicyAnnouncement(
                policies=policies, sources=self._sources()[:MAX_SOURCES], announced_at_ms=now_ms
            )
            await self._publish(POLICIES_TOPIC, self._signed(policy_record))
        if self._certificates:
            certificate_record = CertificateAnnouncement(
                certificates=self._next_certificates(), announced_at_ms=now_ms
            )
            await self._publish(CERTIFICATES_TOPIC, self._signed(certificate_record))
        if self._lots or self._jobs or self._certificates:
            self._told.set()

    def _next_certificates(self) -> tuple[Signed[ClearingCertificate], ...]:
        """Of those that wait the oldest, as many as fit into a message, and at least one."""
        taken: list[Signed[ClearingCertificate]] = []
        num_bytes = _WRAPPING_BYTES
        while self._certificates and len(taken) < MAX_CERTIFICATES:
            num_bytes += len(self._certificates[0].encode()) + len(",")
            if taken and num_bytes > MAX_ANNOUNCEMENT_BYTES:
                break
            taken.append(self._certificates.popleft())
        return tuple(taken)

    def _signed(
        self, record: LotAnnouncement | PolicyAnnouncement | CertificateAnnouncement
    ) -> Record:
        return sign(record, self._context.domain, self._context.account)

    def _note_told(self, lots: Sequence[Lot], now_ms: int) -> None:
        for lot in lots:
            self._told_ms[lot.job_id] = now_ms
            self._told_ms.move_to_end(lot.job_id)
        while len(self._told_ms) > _MAX_TOLD:
            self._told_ms.popitem(last=False)

    async def _publish(self, topic: str, record: Record) -> bool:
        """Whether gossip took it."""
        payload = record.encode()
        if len(payload) > MAX_ANNOUNCEMENT_BYTES:
            # A certificate of very many parcels: its readers ask for it over HTTP anyway.
            _log.info("too_large_to_announce", extra={"topic": topic, "size_bytes": len(payload)})
            return False
        whose = topic_of(topic, self._context.domain, self._context.account.address)
        try:
            await self._context.network.publish(whose, payload)
        except ShoalError as error:
            _log.warning("not_announced", extra={"topic": topic, "reason": error.message})
            return False
        return True
