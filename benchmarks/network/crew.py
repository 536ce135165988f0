"""Many workers' nodes in one process, and the front desk they report to.

A worker's node has a thread of its own, which it fills only where it is alone on its machine.  A
crew shares one: five hundred threads on one machine wait for each other, not for the desk.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio
from trio import TASK_STATUS_IGNORED

from benchmarks.network.parties import lines, say
from shoal.network.bans import Bans, Fault
from shoal.network.dispatch import Dispatcher
from shoal.network.identity import NodeIdentity
from shoal.network.libp2p_host import parse_peer
from shoal.network.libp2p_node import Libp2pNode
from shoal.network.libp2p_service import Libp2pService, Place
from shoal.network.meters import Meters
from shoal.network.port import DEFAULT_MAX_REQUEST_BYTES, Limits
from shoal.network.trio_thread import TrioThread
from shoal.protocol.errors import ShoalError
from shoal.protocol.ids import PeerId
from shoal.protocol.node import HEARTBEAT_PROTOCOL, LEASE_PROTOCOL
from shoal.worker.session import Backoff

if TYPE_CHECKING:
    from trio_typing import TaskStatus

_DIAL_TIMEOUT_S = 20.0
_BEAT_TIMEOUT_S = 10.0
_JOINING_AT_ONCE = 24
"""A crew's workers share one core; more would wait for each other's handshakes."""


async def front_desk(beat_reply_bytes: int, key_file: str, port: int) -> None:
    """A node that takes heartbeats from as many as come; says its address.

    To any line it says how many peers it has.  With the same key and port another takes its place.
    """

    async def heartbeat(_peer: PeerId, _payload: bytes) -> bytes:
        return bytes(beat_reply_bytes)

    identity = NodeIdentity.load_or_create(Path(key_file))
    limits = Limits(max_connections=1024)
    node = Libp2pNode(identity, f"/ip4/127.0.0.1/tcp/{port}", limits=limits)
    node.serve(HEARTBEAT_PROTOCOL, heartbeat)
    await node.start()
    say(node.addresses[0])
    async for _ in lines():
        say(len(node.peers()))
    await node.stop()


@dataclass
class _Fared:
    """How a crew's workers fared since somebody last asked.

    Attributes:
        joined_s: Each dial's way to its first answered beat.
        beats_s: Each answered beat's round trip.
        failures: Why dials and beats failed.
    """

    joined_s: list[float] = field(default_factory=list)
    beats_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


class _Member:
    """One worker's node: what `Libp2pNode` runs, in a thread it is given."""

    def __init__(self, thread: TrioThread) -> None:
        identity = NodeIdentity.generate()
        self.peer_id = identity.peer_id
        self.lost = asyncio.Event()
        limits = Limits()
        dispatch = Dispatcher(limits, Meters(), self._penalise)
        dispatch.serve(LEASE_PROTOCOL, _lease, DEFAULT_MAX_REQUEST_BYTES, for_guests=False)
        dispatch.on_peer_lost(lambda _peer, _cause: self.lost.set())
        self._thread = thread
        bans = Bans(time.monotonic)
        self._made = partial(Libp2pService, identity, Place(), limits, dispatch, bans, thread)
        self._service: Libp2pService | None = None

    async def run(self, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED) -> None:
        """The node runs, in the network thread, until that is stopping."""
        self._service = self._made()
        await self._service.run(task_status.started)

    async def connect(self, address: str) -> PeerId:
        """A connection to the node at `address` is open."""
        peer = parse_peer(address)
        self.lost.clear()
        await self._call(partial(self._running().connect, peer, timeout_s=_DIAL_TIMEOUT_S))
        return PeerId(peer.peer_id.to_base58())

    async def beat(self, peer: PeerId, beat: bytes) -> None:
        """One heartbeat was answered."""
        request = self._running().request
        await self._call(
            partial(request, peer, HEARTBEAT_PROTOCOL, beat, timeout_s=_BEAT_TIMEOUT_S)
        )

    async def _call(self, function: Callable[[], Awaitable[object]]) -> None:
        await self._thread.call(function)

    def _running(self) -> Libp2pService:
        if self._service is None:
            raise RuntimeError("the crew's thread has not started")
        return self._service

    def _penalise(self, peer: PeerId, fault: Fault) -> None:
        self._thread.post(partial(self._running().penalise, peer, fault))


async def _lease(_peer: PeerId, _payload: bytes) -> bytes:
    return bytes(64)


async def crew(address: str, count: int, beat_s: float, beat_bytes: int) -> None:
    """`count` workers dial `address` and beat every `beat_s`; 0 is quiet.

    Each serves ``/shoal/lease/1`` over the connection it dialled, and dials again when it is lost,
    with the pauses a worker makes.  Says its workers' names once all have joined; then, to any
    line, how they fared since the last.
    """
    members: list[_Member] = []

    async def run(thread: TrioThread, started: Callable[[], None]) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(count):
                members.append(_Member(thread))
                await nursery.start(members[-1].run)
            started()

    thread = TrioThread("shoal-crew", run)
    await thread.start()
    fared = _Fared()
    joined = asyncio.Semaphore(0)
    gate = asyncio.Semaphore(_JOINING_AT_ONCE)
    working = [
        asyncio.create_task(
            _work(member, address, fared, gate, joined, beat_s, bytes(beat_bytes), number / count)
        )
        for number, member in enumerate(members)
    ]
    for _ in members:
        await joined.acquire()
    say(json.dumps({"peers": [member.peer_id for member in members]}))
    async for _ in lines():
        say(_told(fared))
    for task in working:
        task.cancel()
    await asyncio.gather(*working, return_exceptions=True)
    await thread.stop()


def _told(fared: _Fared) -> str:
    told = json.dumps(
        {
            "joined_s": fared.joined_s,
            "beats_s": fared.beats_s,
            "failures": fared.failures[:5],
            "lost": len(fared.failures),
        }
    )
    for kept in (fared.joined_s, fared.beats_s, fared.failures):
        kept.clear()
    return told


async def _work(
    member: _Member,
    address: str,
    fared: _Fared,
    gate: asyncio.Semaphore,
    joined: asyncio.Semaphore,
    beat_s: float,
    beat: bytes,
    phase: float,
) -> None:
    pause = Backoff()
    while True:
        try:
            async with gate:
                begun_s = time.perf_counter()
                peer = await member.connect(address)
                if beat_s:
                    await member.beat(peer, beat)
            fared.joined_s.append(time.perf_counter() - begun_s)
            joined.release()
            pause.reset()
            if beat_s:
                await _beat(member, peer, beat_s, beat, phase * beat_s, fared)
            await member.lost.wait()
        except ShoalError as error:
            fared.failures.append(error.message)
        await asyncio.sleep(pause.next_s())


async def _beat(
    member: _Member, peer: PeerId, beat_s: float, beat: bytes, after_s: float, fared: _Fared
) -> None:
    await asyncio.sleep(after_s)
    due_s = time.perf_counter()
    while not member.lost.is_set():
        begun_s = time.perf_counter()
        try:
            await member.beat(peer, beat)
            fared.beats_s.append(time.perf_counter() - begun_s)
        except ShoalError as error:
            fared.failures.append(error.message)
        due_s = max(due_s + beat_s, time.perf_counter())
        await asyncio.sleep(due_s - time.perf_counter())
