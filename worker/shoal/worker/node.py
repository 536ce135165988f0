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
from shoal.protocol.errors import (
    Expired,
    InvalidRequest,
    InvariantBroken,
    ShoalError,
    Unauthorised,
    Unavailable,
)
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
    IdleReason,
    JoinReply,
    LeaseOffer,
    LeaseReply,
    OpenJob,
)
from shoal.protocol.result import Verdict
from shoal.protocol.sealing import SealNotice
from shoal.protocol.signing import Signed
from shoal.worker.bases import BaseKeeper
from shoal.worker.bidder import Bidder
from shoal.worker.capacity import CapacityNow
from shoal.worker.config import WorkerConfig
from shoal.worker.earnings import Collector
from shoal.worker.events import log_event, log_failure
from shoal.worker.evidence import EvidenceBook
from shoal.worker.executor import Assignment, Executor
from shoal.worker.materials import Materials
from shoal.worker.offers import MAX_HELD_LEASES, Parties, refusal_of, require_genuine
from shoal.worker.ports import BlobPlane, Engine, ProviderChain, TaskOutput
from shoal.worker.residuals import FeedbackEngine, ResidualBook
from shoal.worker.session import Backoff, Credentials, Link, find_addresses, greet, join
from shoal.worker.stake import ensure_bound, ensure_stake
from shoal.worker.submit import Drop, Submitter

_MISSED_HEARTBEATS: Final = 3
_MAX_ACKNOWLEDGED: Final = 1024
_FIRST_JOIN_PAUSE_S: Final = 0.5
_DELIVERY_GRACE_S: Final = 1.5
_CLAIM_GRACE_S: Final = 2.0
_LEAVE_GRACE_S: Final = 0.5

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
    """

    network: Network
    credentials: Credentials
    connect_chain: ConnectChain
    blobs: BlobPlane
    engine: Engine
    device: str
    time: TimeSource = field(default_factory=SystemTime)
    monotonic_s: Callable[[], float] = monotonic


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
        self._link = Link(parts.network)
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
        self._greeting: HelloReply | None = None
        self._acknowledged: dict[str, None] = {}
        self._idle: IdleReason | None = None
        self._bidding: asyncio.Task[None] | None = None
        self._stopping = False

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
            await _until(stop, self._keep_session(), self._executor.run(), self._keep_claiming())
        finally:
            await self._leave()

    async def _keep_session(self) -> None:
        """A session is open, or being opened again, until something cannot be mended."""
        pause = Backoff()
        give_up_s = self._parts.monotonic_s() + self._config.connect_timeout_s
        while True:
            try:
                await self._serve_session(await self._open_session(), pause)
            except ShoalError as error:
                if self._cannot_mend(error, give_up_s):
                    raise
                log_failure("orchestrator_unreachable", error)
            await self._link.close()
            pause_s = pause.next_s()
            # Before the first joining somebody is watching and waits.
            if self._greeting is None:
                pause_s = min(pause_s, _FIRST_JOIN_PAUSE_S)
            await asyncio.sleep(pause_s)

    def _cannot_mend(self, error: ShoalError, give_up_s: float) -> bool:
        if isinstance(error, InvalidRequest | InvariantBroken):
            return True
        # A worker that has joined once waits for its orchestrator as long as it takes; one
        # that never has was probably given a wrong address.
        if self._greeting is not None:
            return False
        is_passing = isinstance(error, Unavailable | Expired)
        return not is_passing or self._parts.monotonic_s() > give_up_s

    async def _open_session(self) -> JoinReply:
        await self._dial()
        greeting = await greet(self._link)
        self._require_same_chain(greeting)
        credentials = self._parts.credentials
        if self._collector is None:
            self._collector = await self._prepare_chain(greeting)
        self._greeting = greeting
        self._submitter.drop = Drop(domain=greeting.domain, blob_urls=greeting.blob_urls)
        self._executor.sources = self._bases.sources = greeting.blob_urls
        bound = credentials.bind(greeting.domain, self._parts.time.now_ms())
        reply = await join(self._link, bound, self._config.name, self._parts.device)
        self._stop_bidding()
        self._bidder.forget()
        self._residuals.forget()
        self._link.mark_joined()
        log_event(
            "joined", node=credentials.node, account=credentials.address, jobs=len(reply.open_jobs)
        )
        return reply

    async def _dial(self) -> None:
        failure: ShoalError | None = None
        for address in await find_addresses(self._config.orchestrator):
            try:
                await self._link.dial(address)
            except (Unavailable, Expired) as error:
                failure = error
            else:
                return
        if failure is not None:
            raise failure

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

    def _require_same_chain(self, greeting: HelloReply) -> None:
        before = self._greeting
        if before is None:
            return
        if (before.domain, before.contracts, before.orchestrator) != (
            greeting.domain,
            greeting.contracts,
            greeting.orchestrator,
        ):
            raise InvalidRequest(
                "The orchestrator came back with another chain, other contracts or another "
                "account; start the worker again if you trust the change.",
                code="orchestrator_changed",
            )

    async def _serve_session(self, joined: JoinReply, pause: Backoff) -> None:
        """Heartbeats until the connection is lost or the orchestrator forgot this worker."""
        greeting = self._current_greeting()
        missed = 0
        self._note_jobs(joined.open_jobs, joined.market_epoch)
        while not await self._link.wait_lost(greeting.heartbeat_ms / 1000):
            try:
                await self._beat(greeting)
            except (Unavailable, Expired) as error:
                missed += 1
                log_failure("heartbeat_missed", error, missed=missed)
                if missed == _MISSED_HEARTBEATS:
                    return
            except ShoalError as error:
                # Whatever it is, joining anew mends it, or says why not.
                log_failure("rejoining", error)
                return
            else:
                missed = 0
                pause.reset()
        log_event("orchestrator_lost", logging.WARNING)

    async def _beat(self, greeting: HelloReply) -> None:
        sent = tuple(self._acknowledged)[:_MAX_ACKNOWLEDGED]
        beat = Heartbeat(leases=self._executor.progress(), acknowledged=sent)
        timeout_s = max(2.0, 3 * greeting.heartbeat_ms / 1000)
        raw = await self._link.request(HEARTBEAT_PROTOCOL, beat.encode(), timeout_s=timeout_s)
        reply = HeartbeatReply.decode(raw)
        for lease_id in sent:
            self._acknowledged.pop(lease_id, None)
        self._executor.revoke(reply.revoked)
        for verdict in reply.verdicts:
            self._keep_verdict(verdict, greeting)
        self._note_jobs(reply.open_jobs, reply.market_epoch)
        self._note_idle(reply.idle_reason)

    def _keep_verdict(self, verdict: Signed[Verdict], greeting: HelloReply) -> None:
        record = verdict.record
        try:
            verdict.require_signer(greeting.domain, greeting.orchestrator)
        except ShoalError as error:
            log_failure("verdict_not_signed", error, lease_id=record.lease_id)
            return
        self._acknowledged[record.lease_id] = None
        self._residuals.judged(record.lease_id, accepted=record.accepted)
        if self._book.keep_verdict(verdict):
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
            self._bidding = asyncio.create_task(
                self._bidder.refresh(ready, self._market_epoch, self._parties())
            )

    def _on_base(self) -> None:
        """Another base is here: its jobs are bid for at once."""
        if self._link.peer is not None and not self._stopping:
            self._note_jobs(self._jobs, self._market_epoch)

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

    def _note_idle(self, reason: IdleReason) -> None:
        if reason is not IdleReason.WORKING and self._bidder.is_priced_out:
            reason = IdleReason.ABOVE_RESERVE
        elif reason is IdleReason.STARTING and self._bases.is_fetching:
            reason = IdleReason.FETCHING_BASE
        if reason is not self._idle:
            self._idle = reason
            log_event("idle_reason", reason=reason.value)

    async def _on_lease(self, peer: PeerId, payload: bytes) -> bytes:
        offer = LeaseOffer.decode(payload)
        lease = offer.lease.record
        self._require_orchestrator(peer)
        require_genuine(offer, self._parties())
        refusal = self._take(offer)
        if refusal is not None:
            log_event("lease_refused", lease_id=lease.lease_id, reason=refusal)
        return LeaseReply(lease_id=lease.lease_id, refusal=refusal).encode()

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
        self._stop_bidding()
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
        if self._greeting is None:
            raise Unavailable("The orchestrator has not greeted this worker yet.")
        return self._greeting


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
