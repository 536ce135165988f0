"""Answers who holds which blob, from what joined workers say of themselves."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from ipaddress import ip_address
from typing import Final

from shoal.network.blob_store import BlobStore
from shoal.network.holders import HolderDirectory
from shoal.network.port import Network
from shoal.orchestrator.deltas import PolicyDeltas
from shoal.orchestrator.roster import Roster
from shoal.protocol.clock import TimeSource
from shoal.protocol.errors import InvalidRequest, NotFound
from shoal.protocol.holders import (
    FINE_CHUNK_BYTES,
    HAVE_PROTOCOL,
    HOLDERS_PROTOCOL,
    MAX_FINE_BYTES,
    MAX_HAVE_BYTES,
    MAX_HOLDERS_REQUEST_BYTES,
    SWARM_BYTES,
    HaveNotice,
    HaveReply,
    HoldersReply,
    HoldersRequest,
    Holding,
)
from shoal.protocol.ids import PeerId

_MAX_FINE_LISTS: Final = 32


class HolderDesk:
    """Serves the two questions about holders; only joined workers may ask or tell.

    Args:
        network: The orchestrator's node.
        time: Wall clock.
        roster: Who has joined.
        deltas: The shorter ways to policy versions.
    """

    def __init__(
        self, network: Network, time: TimeSource, roster: Roster, deltas: PolicyDeltas
    ) -> None:
        self._network = network
        self._time = time
        self._roster = roster
        self._deltas = deltas
        self._directory = HolderDirectory()
        self._fine = FineLists(deltas.blobs)

    def serve(self) -> None:
        """Registers the handlers."""
        network = self._network
        network.serve(HAVE_PROTOCOL, self._have, max_request_bytes=MAX_HAVE_BYTES)
        network.serve(HOLDERS_PROTOCOL, self._holders, max_request_bytes=MAX_HOLDERS_REQUEST_BYTES)
        network.on_peer_lost(lambda peer, cause: self._directory.withdraw(peer))

    async def _have(self, peer: PeerId, data: bytes) -> bytes:
        self._roster.member(peer)
        notice = HaveNotice.decode(data)
        self._directory.gone(peer, notice.gone)
        self._directory.announce(
            peer,
            self._sources_of(peer, notice),
            notice.holdings,
            now_ms=self._time.now_ms(),
        )
        return HaveReply(ttl_ms=self._directory.ttl_ms).encode()

    async def _holders(self, peer: PeerId, data: bytes) -> bytes:
        reporter = self._roster.member(peer).account
        request = HoldersRequest.decode(data)
        now_ms = self._time.now_ms()
        for holder in request.faults:
            self._directory.report(reporter, PeerId(holder), request.sha256, now_ms=now_ms)
        if request.chunks is not None:
            self._directory.progressed(peer, _holding_in(request), now_ms=now_ms)
        deltas = await self._deltas.leading_to(request.sha256)
        fine = await self._fine.of(request.sha256) if request.fine else None
        holders = self._directory.holders(
            request.sha256, asker=peer, reporter=reporter, now_ms=self._time.now_ms()
        )
        self._network.meters.count("holders_asked", found="yes" if holders else "no")
        return HoldersReply(holders=holders, deltas=deltas, fine_sha256=fine).encode()

    def _sources_of(self, peer: PeerId, notice: HaveNotice) -> tuple[str, ...]:
        """Where to ask ``peer``: what it says, the address it is seen at, its node.

        Raises:
            InvalidRequest: it names another's node as its own.
        """
        for source in notice.sources:
            if source.startswith("/") and not source.endswith(f"/p2p/{peer}"):
                raise InvalidRequest(
                    f"The source {source} is not of node {peer}; name addresses of your own.",
                    code="foreign_source",
                )
        seen = self._network.observed(peer)
        own = [f"http://{_host(seen[0])}:{notice.http_port}"] if seen and notice.http_port else []
        return tuple(dict.fromkeys([*notice.sources, *own, f"/p2p/{peer}"]))


def _holding_in(request: HoldersRequest) -> Holding:
    return Holding(sha256=request.sha256, chunks=request.chunks, chunk_bytes=request.chunk_bytes)


class FineLists:
    """The digests of the fine chunks of blobs held, each worked out once while it is asked for."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs
        self._lists: OrderedDict[str, asyncio.Task[str]] = OrderedDict()
        self._one_at_a_time = asyncio.Lock()

    async def of(self, sha256: str) -> str | None:
        """The list of the blob; None where there is none, or none is needed."""
        known = self._lists.get(sha256)
        if known is None:
            is_here = self._blobs.has(sha256)
            if not is_here or not SWARM_BYTES < self._blobs.size_of(sha256) <= MAX_FINE_BYTES:
                return None
            known = asyncio.create_task(self._work_out(sha256))
            self._lists[sha256] = known
            if len(self._lists) > _MAX_FINE_LISTS:
                self._lists.popitem(last=False)
        try:
            return await asyncio.shield(known)
        except (NotFound, OSError):
            self._lists.pop(sha256, None)
            return None

    async def _work_out(self, sha256: str) -> str:
        # One after the other, so that questions about many blobs cost one core at most.
        async with self._one_at_a_time:
            return await asyncio.to_thread(self._hash, sha256)

    def _hash(self, sha256: str) -> str:
        with self._blobs.open(sha256) as file:
            parts = iter(lambda: file.read(FINE_CHUNK_BYTES), b"")
            return "".join(hashlib.sha256(part).hexdigest() for part in parts)


def _host(address: str) -> str:
    return f"[{address}]" if ip_address(address).version == 6 else address
