"""One worker: it joins, bids, serves leases, sends heartbeats, and comes back when cut off."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from time import monotonic
from typing import Final

from shoal.network.port import Network
from shoal.protocol.clock import SystemTime, TimeSource
from shoal.protocol.errors import ShoalError, Unauthorised, Unavailable
from shoal.protocol.ids import PeerId
from shoal.protocol.node import (
    EVIDENCE_PROTOCOL,
    HEARTBEAT_PROTOCOL,
    LEASE_PROTOCOL,
    REVEAL_PROTOCOL,
    EvidenceReply,
    EvidenceRequest,
    FailureCause,
    Heartbeat,
    HeartbeatReply,
    HelloReply,
    IdleDetail,
    IdleReason,
    JoinReply,
    LeaseOffer,
    LeaseProgress,
    LeaseReply,
    OpenJob,
)
from shoal.protocol.result import Verdict
from shoal.protocol.sealing import SealNotice
from shoal.protocol.signing import Signed
from shoal.worker.announcements import Announcements, Interests
from shoal.worker.bases import BaseKeeper
from shoal.worker.bidder import Bidder
from shoal.worker.capacity import CapacityNow
from shoal.worker.config import WorkerConfig
from shoal.worker.earnings import Collector
from shoal.worker.events import log_event, log_failure
from shoal.worker.evidence import EvidenceBook
from shoal.worker.executor import Assignment, Executor
from shoal.worker.finding import Find, finder_of
from shoal.worker.keeper import SessionKeeper
from shoal.worker.materials import Materials
from shoal.worker.offers import MAX_HELD_LEASES, Parties, refusal_of, require_genuine
from shoal.worker.ports import BlobPlane, Engine, ProviderChain, TaskOutput
from shoal.worker.reporter import Reporter
from shoal.worker.residuals import FeedbackEngine, ResidualBook
from shoal.worker.session import Credentials, Link, Session
from shoal.worker.stake import ensure_bound, ensure_stake
from shoal.worker.status import BaseFetch
from shoal.worker.submit import Drop, Submitter
from shoal.worker.ways import Ways

_MAX_ACKNOWLEDGED: Final = 1024
_DELIVERY_GRACE_S: Final = 1.5
_PREFETCH_TIMEOUT_S: Final = 120.0
_CLAIM_GRACE_S: Final = 2.0
_LEAVE_GRACE_S: Final = 0.5
_IN_STEP_TIMEOUT_S: Final = 5.0
"""Half of the time in which an offer is to be answered."""

ConnectChain = Callable[[HelloReply], Awaitable[ProviderChain]]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a worker is made of, beside its configuration.

    Attributes:
        network: The node, not yet started; it needs no listen address.
        credentials: Account and node key.
        connect_chain: Opens the chain the greeting names.
        blobs: The blob plane.
        engine: What computes.
        device: What the engine computes on, for the join request.
        time: Wall clock.
        monotonic_s: Monotonic clock.
        link: The way to the orchestrator, where another part also asks over it; absent, the
            worker makes its own.
        find: Looks for orchestrators where the configuration names none; absent looks where
            the configuration says.
    """

    network: Network
    credentials: Credentials
    connect_chain: ConnectChain
    blobs: BlobPlane
    engine: Engine
    device: str
    time: TimeSource = field(default_factory=SystemTime)
    monotonic_s: Callable[[], float] = monotonic
    link: Link | None = None
    find: Find | None = None


class WorkerNode:
    """A worker from start to stop.

    Args:
        config: The provider's settings.
        parts: Keys, network, chain, blobs and engine.
    """

    def __init__(self, config: WorkerConfig, parts: Parts) -> None:
        self._config = config
        self._parts = parts
        self._book = EvidenceBook(config.folder / "evidence")
        self._link = parts.link or Link(parts.network)
        self._submitter = Submitter(
            parts.credentials, self._link, parts.blobs, self._book, parts.monotonic_s
        )
        self._residuals = ResidualBook(config.folder / "residuals")
        materials = Materials(config.folder / "bases", parts.blobs)
        self._bases = BaseKeeper(materials, config.max_base_bytes, self._on_base)
        self._executor = Executor(
            materials,
            FeedbackEngine(parts.engine, self._residuals),
            self._deliver,
            self._give_back,
            parts.monotonic_s,
        )
        self._capacity = CapacityNow(config.capacity)
        self._bidder = Bidder(
            config, self._capacity, parts.credentials, self._link, self._book, parts.time
        )
        self._jobs: tuple[OpenJob, ...] = ()
        self._market_epoch = 0
        self._collector: Collector | None = None
        self._acknowledged: dict[str, None] = {}
        self._idle: IdleReason | None = None
        self._idle_detail: IdleDetail | None = None
        self._bidding: asyncio.Task[None] | None = None
        self._early_beat: asyncio.Task[None] | None = None
        self._served: frozenset[str] = frozenset()
        self._announcements = self._make_announcements(materials)
        self._stopping = False
        self._in_step = asyncio.Event()
        self._keeper = self._make_keeper()
        self.reporter = Reporter(
            config,
            self,
            parts.credentials,
            parts.network,
            self._book,
            parts.time,
            parts.monotonic_s,
        )
        """Keeps the status file."""
        self._keeper.on_change = self._changed
        self.on_change: Callable[[], None] = lambda: None
        """Called whenever `session` or `idle_reason` is another; it must not block."""

    def _make_announcements(self, materials: Materials) -> Announcements:
        interests = Interests(
            known=lambda: frozenset(job.job_id for job in self._jobs),
            served=lambda: self._served,
            new_job=self._on_new_job,
            prefetch=lambda adapter, sources: materials.prefetch(
                adapter, sources or self._executor.sources, timeout_s=_PREFETCH_TIMEOUT_S
            ),
        )
        return Announcements(self._parts.network, self._parts.time, self._book, interests)

    def _make_keeper(self) -> SessionKeeper:
        config, parts = self._config, self._parts
        ways = Ways(
            config.orchestrator,
            config.folder,
            parts.time,
            find=parts.find or finder_of(config, parts.network, parts.time),
            trust=config.trust,
        )
        return SessionKeeper(
            self._link,
            ways,
            self,
            parts.credentials,
            config.name,
            parts.device,
            parts.time,
            parts.monotonic_s,
        )

    @property
    def session(self) -> Session:
        """How things stand with the orchestrator."""
        return self._keeper.session

    @property
    def greeting(self) -> HelloReply | None:
        """As the orchestrator last greeted this worker; None before it has."""
        return self._keeper.greeting

    @property
    def idle_reason(self) -> IdleReason | None:
        """Why the worker earns nothing just now, as last heard; None before any heartbeat."""
        return self._idle

    @property
    def idle_detail(self) -> IdleDetail | None:
        """The figures behind `idle_reason`, where the orchestrator gave any."""
        return self._idle_detail

    @property
    def open_jobs(self) -> tuple[OpenJob, ...]:
        """The jobs that accept bids, as last heard."""
        return self._jobs

    @property
    def collector(self) -> Collector | None:
        """Who claims pay; None before the chain is open."""
        return self._collector

    def fetching(self) -> tuple[BaseFetch, ...]:
        """The bases on their way."""
        return self._bases.fetching()

    def assignments(self) -> tuple[Assignment, ...]:
        """The leases held now."""
        return self._executor.assignments()

    def progress(self) -> tuple[LeaseProgress, ...]:
        """How far each of them has come."""
        return self._executor.progress()

    async def run(self, stop: asyncio.Event) -> None:
        """Works until ``stop`` is set, then leaves; the network is stopped on return.

        Raises:
            InvalidRequest: this worker cannot work for this orchestrator; says why.
            Unavailable: no first connection within ``connect_timeout_s``.
        """
        network = self._parts.network
        network.serve(LEASE_PROTOCOL, self._on_lease)
        network.serve(EVIDENCE_PROTOCOL, self._on_evidence)
        network.serve(REVEAL_PROTOCOL, self._on_seal)
        await network.start()
        try:
            sessions = self._keeper.run(self._config.connect_timeout_s)
            work = self._executor.run(), self._keep_claiming(), self.reporter.run()
            await _until(stop, sessions, *work)
        except Exception as error:
            self.reporter.close(str(error))
            raise
        finally:
            await self._leave()
            self.reporter.close("it was told to stop")

    async def prepare(self, greeting: HelloReply) -> None:
        """The chain is open, stake and binding are in place; results and bytes have a place."""
        if self._collector is None:
            self._collector = await self._prepare_chain(greeting)
        self._submitter.drop = Drop(domain=greeting.domain, blob_urls=greeting.blob_urls[:1])
        self._executor.sources = self._bases.sources = greeting.blob_urls
        # Before the join: an offer may overtake its reply.
        self._in_step.clear()

    def joined(self, greeting: HelloReply, reply: JoinReply) -> None:
        """Every bid will be sent again, and no residual counts that this session did not see."""
        self._stop_bidding()
        self._bidder.forget()
        self._residuals.forget()
        self._announcements.follow(greeting)
        self._note_jobs(reply.open_jobs, reply.market_epoch)

    async def beat(self, greeting: HelloReply) -> None:
        """The orchestrator knows what is held, and what it answered is heeded."""
        sent = tuple(self._acknowledged)[:_MAX_ACKNOWLEDGED]
        beat = Heartbeat(leases=self._executor.progress(), acknowledged=sent)
        timeout_s = max(2.0, 3 * greeting.heartbeat_ms / 1000)
        raw = await self._link.request(HEARTBEAT_PROTOCOL, beat.encode(), timeout_s=timeout_s)
        reply = HeartbeatReply.decode(raw)
        for lease_id in sent:
            self._acknowledged.pop(lease_id, None)
        self._executor.revoke(reply.revoked)
        self._in_step.set()
        for verdict in reply.verdicts:
            self._keep_verdict(verdict, greeting)
        self._note_jobs(reply.open_jobs, reply.market_epoch)
        self._note_idle(reply.idle_reason, reply.idle_detail)

    async def _prepare_chain(self, greeting: HelloReply) -> Collector:
        chain = await self._parts.connect_chain(greeting)
        credentials = self._parts.credentials
        await ensure_stake(
            chain, credentials.address, greeting.min_stake_micros, self._config.stake_micros
        )
        await ensure_bound(chain, credentials)
        return Collector(
            chain,
            self._book,
            credentials.address,
            greeting.domain,
            api_url=greeting.api_url,
            claim_min_micros=self._config.claim_min_micros,
        )

    def _keep_verdict(self, verdict: Signed[Verdict], greeting: HelloReply) -> None:
        record = verdict.record
        try:
            verdict.require_signer(greeting.domain, greeting.orchestrator)
        except ShoalError as error:
            log_failure("verdict_not_signed", error, lease_id=record.lease_id)
            return
        self._residuals.judged(record.lease_id, accepted=record.accepted)
        try:
            is_new = self._book.keep_verdict(verdict)
        except OSError as error:
            # Not acknowledged, so it comes again.
            log_failure("verdict_not_kept", error, lease_id=record.lease_id)
            return
        self._acknowledged[record.lease_id] = None
        if is_new:
            self.reporter.note_verdict(record)
            log_event(
                "accepted" if record.accepted else "rejected",
                logging.INFO if record.accepted else logging.WARNING,
                job_id=record.job_id,
                lease_id=record.lease_id,
                pay_micros=record.pay_micros,
                reason=record.reason(),
            )

    def _note_jobs(self, jobs: tuple[OpenJob, ...], market_epoch: int) -> None:
        self._jobs, self._market_epoch = jobs, market_epoch
        self._residuals.retain(job.job_id for job in jobs)
        if self._collector is not None:
            self._collector.note_open(job.job_id for job in jobs)
        # Beside the heartbeats, not between them: a slow bid must not cost running leases.
        if self._bidding is None or self._bidding.done():
            ready = self._bases.with_base(jobs)
            self._served = frozenset(job.job_id for job in ready)
            self._bidding = asyncio.create_task(
                self._bidder.refresh(ready, self._market_epoch, self._parties())
            )

    def _on_base(self) -> None:
        """Another base is here: its jobs are bid for at once."""
        if self._link.peer is not None and not self._stopping:
            self._note_jobs(self._jobs, self._market_epoch)

    def _on_new_job(self) -> None:
        """A job unknown here is on the market: its terms come with a heartbeat, sent at once."""
        waits = self._early_beat is not None and not self._early_beat.done()
        if self._link.peer is not None and not self._stopping and not waits:
            self._early_beat = asyncio.create_task(self._beat_early())

    async def _beat_early(self) -> None:
        # The next regular one brings the same, and deals with what is wrong.
        with contextlib.suppress(ShoalError):
            await self.beat(self._current_greeting())

    async def _deliver(self, assignment: Assignment, output: TaskOutput) -> None:
        lease = assignment.lease
        # Before the result is sent: the orchestrator may ask for its residuals at once.
        self._residuals.name_lease(lease.lease_id, lease.task_sha256)
        try:
            await self._submitter.deliver(assignment, output)
        except BaseException:
            self._residuals.give_back(lease.task_sha256)
            raise

    async def _on_evidence(self, peer: PeerId, payload: bytes) -> bytes:
        request = EvidenceRequest.decode(payload)
        self._require_orchestrator(peer)
        data = await asyncio.to_thread(self._residuals.find, request.lease_id, request.blob_sha256)
        if data is not None:
            await self._submitter.upload_evidence(data, request.upload_token)
        log_event("evidence_asked", lease_id=request.lease_id, uploaded=data is not None)
        return EvidenceReply(lease_id=request.lease_id, uploaded=data is not None).encode()

    async def _on_seal(self, peer: PeerId, payload: bytes) -> bytes:
        notice = SealNotice.decode(payload)
        self._require_orchestrator(peer)
        return self._bidder.open(notice, self._parties()).encode()

    async def _give_back(self, assignment: Assignment, cause: FailureCause, detail: str) -> None:
        lease = assignment.lease
        if cause is FailureCause.OUT_OF_MEMORY:
            self._capacity.halve_below(lease.kind, lease.num_units)
        await self._submitter.give_back(assignment, cause, detail)
        log_event(
            "lease_given_back", job_id=lease.job_id, lease_id=lease.lease_id, cause=cause.value
        )

    def _stop_bidding(self) -> None:
        if self._bidding is not None:
            self._bidding.cancel()
            self._bidding = None

    def _note_idle(self, reason: IdleReason, detail: IdleDetail | None) -> None:
        if reason is not IdleReason.WORKING and self._bidder.is_priced_out:
            reason, detail = IdleReason.ABOVE_RESERVE, None
        elif reason is IdleReason.STARTING and self._bases.is_fetching:
            reason = IdleReason.FETCHING_BASE
        self._idle_detail = detail
        if reason is not self._idle:
            self._idle = reason
            log_event("idle_reason", reason=reason.value)
            self._changed()

    def _changed(self) -> None:
        self.on_change()

    async def _on_lease(self, peer: PeerId, payload: bytes) -> bytes:
        offer = LeaseOffer.decode(payload)
        lease = offer.lease.record
        self._require_orchestrator(peer)
        require_genuine(offer, self._parties())
        await self._wait_in_step()
        self._executor.revoke(offer.revoked)
        refusal = self._take(offer)
        if refusal is not None:
            log_event("lease_refused", lease_id=lease.lease_id, reason=refusal)
        return LeaseReply(lease_id=lease.lease_id, refusal=refusal).encode()

    async def _wait_in_step(self) -> None:
        """The orchestrator and this worker agree on what is held.

        After a drop a lease may have been taken back unheard; until the first heartbeat says
        so, it would seem to leave no room for another.
        """
        try:
            async with asyncio.timeout(_IN_STEP_TIMEOUT_S):
                await self._in_step.wait()
        except TimeoutError:
            raise Unavailable(
                "This worker has joined and still waits for the answer to its first heartbeat; "
                "offer the lease again.",
                code="not_in_step",
            ) from None

    def _require_orchestrator(self, peer: PeerId) -> None:
        if peer != self._link.peer:
            raise Unauthorised(
                "Leases are taken from the orchestrator this worker joined, and from nobody else.",
                code="not_the_orchestrator",
            )

    def _take(self, offer: LeaseOffer) -> str | None:
        """None when the offer is held now; else why it is not."""
        lease = offer.lease.record
        held = self._executor.held(lease.lease_id)
        if held is not None and held.lease.lease_epoch >= lease.lease_epoch:
            # A repeated offer whose first answer was lost is answered alike.
            return None if held.lease == lease else "an equal or newer epoch of it is held"
        if self._stopping:
            return "the worker is stopping"
        if len(self._executor) >= MAX_HELD_LEASES:
            return f"{MAX_HELD_LEASES} leases are held already"
        refusal = refusal_of(
            offer,
            self._config,
            capacity=self._capacity.units(lease.kind),
            units_held=self._executor.units_held(lease.kind),
        )
        if refusal is None:
            self._executor.accept(offer)
            log_event(
                "lease_accepted",
                job_id=lease.job_id,
                lease_id=lease.lease_id,
                kind=lease.kind.value,
                num_units=lease.num_units,
                policy_version=offer.task.policy.version,
            )
        return refusal

    async def _keep_claiming(self) -> None:
        await self._link.wait_joined()
        if self._collector is not None:
            await self._collector.run(self._config.claim_interval_s)

    async def _leave(self) -> None:
        """Finished work is handed in, pay claimed, the connection closed: within five seconds."""
        self._stopping = True
        self._keeper.stop()
        self._stop_bidding()
        if self._early_beat is not None:
            self._early_beat.cancel()
        await self._announcements.close()
        await self._bases.close()
        await self._executor.close(_DELIVERY_GRACE_S)
        if self._collector is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CLAIM_GRACE_S):
                    await self._collector.collect_all(even_small=True)
        with contextlib.suppress(TimeoutError, ShoalError):
            async with asyncio.timeout(_LEAVE_GRACE_S):
                await self._link.close()
        await self._parts.network.stop()
        log_event("left")

    def _parties(self) -> Parties:
        return self._parts.credentials.parties(self._current_greeting())

    def _current_greeting(self) -> HelloReply:
        if self._keeper.greeting is None:
            raise Unavailable("The orchestrator has not greeted this worker yet.")
        return self._keeper.greeting


async def _until(stop: asyncio.Event, *parts: Coroutine[object, object, None]) -> None:
    """Runs ``parts`` until ``stop`` is set or one of them fails; raises that failure."""
    tasks = [asyncio.create_task(part) for part in parts]
    waiting = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([waiting, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done() and (error := task.exception()) is not None:
                raise error
    finally:
        for pending in (waiting, *tasks):
            pending.cancel()
        await asyncio.gather(waiting, *tasks, return_exceptions=True)
