"""What a worker hears by gossip, and what little it does on hearing it.

Every message is checked before it is heeded or passed on: signed by the orchestrator this
worker joined, recent, and not heard before.  All of it only saves time: a worker that hears
nothing learns the same with its next heartbeat or lease.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from shoal.network.port import Network, TopicVerdict
from shoal.protocol.announcement import (
    CERTIFICATES_TOPIC,
    LOTS_TOPIC,
    MAX_AGE_MS,
    MAX_ANNOUNCEMENT_BYTES,
    MAX_SKEW_MS,
    POLICIES_TOPIC,
    SignedCertificates,
    SignedLots,
    SignedPolicies,
    topic_of,
)
from shoal.protocol.blob import BlobRef
from shoal.protocol.clock import TimeSource
from shoal.protocol.errors import ShoalError
from shoal.protocol.ids import PeerId
from shoal.protocol.node import HelloReply
from shoal.protocol.policy import MAX_ADAPTER_BYTES
from shoal.protocol.signing import Domain, Signed
from shoal.worker.events import log_failure
from shoal.worker.evidence import EvidenceBook

_MAX_REMEMBERED: Final = 4_096
"""Above what three topics of a few messages a second bring within the age that is accepted."""

_MAX_WAITING: Final = 8

_RECORDS: Final[Mapping[str, type[Signed[Any]]]] = {
    LOTS_TOPIC: SignedLots,
    POLICIES_TOPIC: SignedPolicies,
    CERTIFICATES_TOPIC: SignedCertificates,
}


@dataclass(frozen=True, kw_only=True)
class Interests:
    """What a worker wants to hear of; each is asked or called in the asyncio loop.

    Attributes:
        known: The jobs that this worker has heard of from the orchestrator itself.
        served: Those of them that it can work for: it has their base.
        new_job: A job is on the market that the worker does not know yet.
        prefetch: Fetches an adapter, from sources, before a task names it.
    """

    known: Callable[[], frozenset[str]]
    served: Callable[[], frozenset[str]]
    new_job: Callable[[], None]
    prefetch: Callable[[BlobRef, Sequence[str]], Awaitable[object]]


class Announcements:
    """Follows one orchestrator's announcements.

    Args:
        network: This worker's node.
        time: The wall clock.
        book: Keeps certificates of the jobs worked for.
        interests: What to do on hearing something.
    """

    def __init__(
        self, network: Network, time: TimeSource, book: EvidenceBook, interests: Interests
    ) -> None:
        self._network = network
        self._time = time
        self._book = book
        self._interests = interests
        self._followed: set[str] = set()
        self._heard = _Memory()
        # Apart, so that old messages said again crowd no newer one out.
        self._stale = _Memory()
        self._waiting: dict[str, tuple[BlobRef, Sequence[str]]] = {}
        self._fetching: asyncio.Task[None] | None = None

    def follow(self, greeting: HelloReply) -> None:
        """The announcements of the orchestrator that greeted are heard from now on."""
        for topic, handler in (
            (LOTS_TOPIC, self._on_lots),
            (POLICIES_TOPIC, self._on_policies),
            (CERTIFICATES_TOPIC, partial(self._on_certificates, greeting)),
        ):
            whose = topic_of(topic, greeting.domain, greeting.orchestrator)
            if whose in self._followed:
                continue
            self._followed.add(whose)
            check = partial(self.check, topic, greeting.domain, greeting.orchestrator)
            self._network.subscribe(whose, handler, check=check)

    async def close(self) -> None:
        """Nothing is fetched ahead any more."""
        self._waiting.clear()
        if self._fetching is not None:
            self._fetching.cancel()
            await asyncio.gather(self._fetching, return_exceptions=True)

    def check(self, topic: str, domain: Domain, account: str, payload: bytes) -> TopicVerdict:
        """What to do with a message on ``topic``; may be asked in any thread.

        The topic's name says who signs its messages, so one that is malformed or signed by
        another is its bearer's fault.  One that is late, early or heard before may come by an
        honest bearer whose clock or memory is another.
        """
        if len(payload) > MAX_ANNOUNCEMENT_BYTES:
            return TopicVerdict.REJECT
        # First what costs little: the same bytes again need no second look at a signature.
        digest = hashlib.sha256(payload).digest()
        if self._heard.has(digest) or self._stale.has(digest):
            return TopicVerdict.IGNORE
        try:
            signed = _RECORDS[topic].decode(payload, max_bytes=MAX_ANNOUNCEMENT_BYTES)
            signed.require_signer(domain, account)
        except ShoalError:
            return TopicVerdict.REJECT
        if signed.encode() != payload:
            # One record in other words would pass for another that was not heard yet.
            return TopicVerdict.REJECT
        age_ms = self._time.now_ms() - signed.record.announced_at_ms
        if not -MAX_SKEW_MS <= age_ms <= MAX_AGE_MS:
            self._stale.add(digest)
            return TopicVerdict.IGNORE
        return TopicVerdict.ACCEPT if self._heard.add(digest) else TopicVerdict.IGNORE

    async def _on_lots(self, _: PeerId, payload: bytes) -> None:
        announced = SignedLots.decode(payload).record
        jobs = {*announced.jobs, *(lot.job_id for lot in announced.lots)}
        if jobs - self._interests.known():
            self._interests.new_job()

    async def _on_policies(self, _: PeerId, payload: bytes) -> None:
        announced, served = SignedPolicies.decode(payload).record, self._interests.served()
        for policy in announced.policies:
            if policy.job_id in served and policy.adapter.size_bytes <= MAX_ADAPTER_BYTES:
                # Of a job only the newest: an older one that waits still is superseded.
                self._waiting.pop(policy.job_id, None)
                self._waiting[policy.job_id] = (policy.adapter, announced.sources)
        while len(self._waiting) > _MAX_WAITING:
            del self._waiting[next(iter(self._waiting))]
        if self._waiting and (self._fetching is None or self._fetching.done()):
            self._fetching = asyncio.create_task(self._fetch(), name="fetching ahead")

    async def _fetch(self) -> None:
        while self._waiting:
            job_id = next(iter(self._waiting))
            adapter, sources = self._waiting.pop(job_id)
            try:
                await self._interests.prefetch(adapter, sources)
            except (ShoalError, OSError) as error:
                log_failure("not_fetched_ahead", error, job_id=job_id)

    async def _on_certificates(self, greeting: HelloReply, _: PeerId, payload: bytes) -> None:
        known = self._interests.known()
        for certificate in SignedCertificates.decode(payload).record.certificates:
            if certificate.record.lot.job_id not in known:
                continue
            try:
                # Each proves by itself what was told, so each must be signed by itself.
                certificate.require_signer(greeting.domain, greeting.orchestrator)
            except ShoalError as error:
                lot_id = certificate.record.lot.lot_id
                log_failure("certificate_not_signed", error, lot_id=lot_id)
            else:
                self._book.keep_certificate(certificate)


class _Memory:
    """The newest so many digests; may be asked in any thread."""

    def __init__(self) -> None:
        self._digests: OrderedDict[bytes, None] = OrderedDict()
        self._lock = threading.Lock()

    def has(self, digest: bytes) -> bool:
        """Whether it was added, not too many others ago."""
        with self._lock:
            return digest in self._digests

    def add(self, digest: bytes) -> bool:
        """It is remembered; False when it already was."""
        with self._lock:
            if digest in self._digests:
                return False
            self._digests[digest] = None
            if len(self._digests) > _MAX_REMEMBERED:
                self._digests.popitem(last=False)
            return True
