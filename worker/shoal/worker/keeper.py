"""Keeps a session open: dials, greets, joins and beats, and begins again when it breaks.

A broken link ends nothing but the link: leases are computed on meanwhile, and the heartbeat
that follows a join at once tells the orchestrator which of them are still held.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final, Protocol

from shoal.protocol.clock import TimeSource
from shoal.protocol.errors import (
    Expired,
    InvalidRequest,
    InvariantBroken,
    ShoalError,
    Unavailable,
)
from shoal.protocol.ids import Account
from shoal.protocol.node import HelloReply, JoinReply
from shoal.worker.events import log_event, log_failure
from shoal.worker.session import (
    Backoff,
    Credentials,
    Link,
    Session,
    SessionState,
    greet,
    join,
)
from shoal.worker.ways import Ways

_MISSED_HEARTBEATS: Final = 2
_FIRST_JOIN_PAUSE_S: Final = 0.5


class Duties(Protocol):
    """What a worker does in a session; the keeper calls each when it is time."""

    async def prepare(self, greeting: HelloReply) -> None:
        """The worker may join: its chain is open, its stake and binding are in place."""
        ...

    def joined(self, greeting: HelloReply, reply: JoinReply) -> None:
        """The orchestrator has the worker on its list; nothing of the last session counts."""
        ...

    async def beat(self, greeting: HelloReply) -> None:
        """One heartbeat was answered, and the answer heeded."""
        ...


class SessionKeeper:
    """A session is open, or being opened again.

    Args:
        link: The connection.
        ways: Where to dial.
        duties: What to do in a session.
        credentials: Who joins.
        name: What the orchestrator is to call this worker.
        device: What it computes on.
        time: The wall clock.
        monotonic_s: The machine's monotonic clock.
    """

    def __init__(
        self,
        link: Link,
        ways: Ways,
        duties: Duties,
        credentials: Credentials,
        name: str,
        device: str,
        time: TimeSource,
        monotonic_s: Callable[[], float],
    ) -> None:
        self._link = link
        self._ways = ways
        self._duties = duties
        self._credentials = credentials
        self._name = name
        self._device = device
        self._time = time
        self._monotonic_s = monotonic_s
        self._pause = Backoff()
        self.greeting: HelloReply | None = None
        """As the orchestrator last greeted this worker; None before it has."""
        self.session = Session(state=SessionState.STOPPED, since_ms=time.now_ms())
        """How things stand."""
        self.on_change: Callable[[], None] = lambda: None
        """Called whenever `session` is another."""

    async def run(self, connect_timeout_s: float) -> None:
        """Works until cancelled, or until something cannot be mended.

        Raises:
            ShoalError: this worker cannot work for this orchestrator; or there was no first
                session within ``connect_timeout_s``.
        """
        give_up_s = self._monotonic_s() + connect_timeout_s
        while True:
            try:
                await self._serve(await self._open())
            except ShoalError as error:
                if self._cannot_mend(error, give_up_s):
                    raise
                log_failure("orchestrator_unreachable", error)
                self._note_error(error)
            await self._link.close()
            pause_s = self._pause.next_s()
            # Before the first joining somebody is watching and waits.
            if self.greeting is None:
                pause_s = min(pause_s, _FIRST_JOIN_PAUSE_S)
            retry_at_ms = self._time.now_ms() + round(1000 * pause_s)
            self._enter(SessionState.WAITING, address=None, peer=None, retry_at_ms=retry_at_ms)
            await asyncio.sleep(pause_s)

    def stop(self) -> None:
        """No session is open any more."""
        self._enter(SessionState.STOPPED, address=None, peer=None, retry_at_ms=None)

    def _cannot_mend(self, error: ShoalError, give_up_s: float) -> bool:
        if isinstance(error, InvalidRequest | InvariantBroken):
            return True
        # A worker that has been greeted once waits for its orchestrator as long as it takes; one
        # that never has was probably given a wrong address.
        if self.greeting is not None:
            return False
        is_passing = isinstance(error, Unavailable | Expired)
        return not is_passing or self._monotonic_s() > give_up_s

    async def _open(self) -> JoinReply:
        greeting = await self._reach()
        await self._duties.prepare(greeting)
        self.greeting = greeting
        bound = self._credentials.bind(greeting.domain, self._time.now_ms())
        reply = await join(self._link, bound, self._name, self._device)
        self._duties.joined(greeting, reply)
        self._link.mark_joined()
        self._enter(
            SessionState.JOINED,
            num_joins=self.session.num_joins + 1,
            last_error=None,
            last_error_ms=None,
            missed_heartbeats=0,
        )
        log_event(
            "joined",
            node=self._credentials.node,
            account=self._credentials.address,
            jobs=len(reply.open_jobs),
        )
        return reply

    async def _reach(self) -> HelloReply:
        """The greeting of the orchestrator, over the first way that leads to it."""
        failures: list[ShoalError] = []
        async for address, timeout_s in self._ways.addresses():
            try:
                return await self._greeted(address, timeout_s)
            except ShoalError as error:
                log_failure("way_failed", error, address=address)
                self._ways.note_failed(address)
                self._note_error(error)
                failures.append(error)
                await self._link.close()
        if not failures:
            raise Unavailable(
                "No orchestrator was found; name one, or where to look for one.",
                code="no_orchestrator",
            )
        # One way to somebody else proves nothing while another is only out of reach.
        failures.sort(key=lambda error: not isinstance(error, Unavailable | Expired))
        raise failures[0]

    async def _greeted(self, address: str, timeout_s: float) -> HelloReply:
        self._enter(SessionState.DIALLING, address=address, peer=None, retry_at_ms=None)
        peer = await self._link.dial(address, timeout_s=timeout_s)
        self._enter(SessionState.JOINING, peer=peer)
        greeting = await greet(self._link)
        self._ways.require_trusted(greeting, peer, address)
        self._require_same(greeting)
        self._ways.note_reached(peer, address, greeting.p2p_addresses)
        self._note(orchestrator=Account(greeting.orchestrator))
        return greeting

    def _require_same(self, greeting: HelloReply) -> None:
        before = self.greeting
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

    async def _serve(self, joined: JoinReply) -> None:
        """Heartbeats until the connection is lost or the orchestrator forgot this worker."""
        greeting = self.greeting
        while greeting is not None:
            begun_s = self._monotonic_s()
            try:
                await self._duties.beat(greeting)
            except (Unavailable, Expired) as error:
                missed = self.session.missed_heartbeats + 1
                log_failure("heartbeat_missed", error, missed=missed)
                self._note(missed_heartbeats=missed)
                self._note_error(error)
                if missed == _MISSED_HEARTBEATS:
                    break
            except ShoalError as error:
                # Whatever it is, joining anew mends it, or says why not.
                log_failure("rejoining", error)
                self._note_error(error)
                return
            else:
                round_trip_ms = round(1000 * (self._monotonic_s() - begun_s))
                self._note(missed_heartbeats=0, round_trip_ms=round_trip_ms)
                self._pause.reset()
            # A long line must not stretch the beat, by which the orchestrator's clocks go.
            spent_s = self._monotonic_s() - begun_s
            if await self._link.wait_lost(max(0.0, greeting.heartbeat_ms / 1000 - spent_s)):
                break
        cause = self._link.lost_because
        if cause is not None:
            words = f"The connection to the orchestrator was lost: {cause}."
            self._note(last_error=words, last_error_ms=self._time.now_ms())
        log_event("orchestrator_lost", logging.WARNING, reason=cause)

    def _enter(self, state: SessionState, **changes: Any) -> None:
        self._note(state=state, since_ms=self._time.now_ms(), **changes)

    def _note_error(self, error: ShoalError) -> None:
        self._note(last_error=error.message, last_error_ms=self._time.now_ms())

    def _note(self, **changes: Any) -> None:
        self.session = replace(self.session, **changes)
        self.on_change()
