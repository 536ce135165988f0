"""The worker-facing protocols: bytes in, the right part's verb, bytes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shoal.network.port import Network
from shoal.orchestrator.auctioneer import Auctioneer
from shoal.orchestrator.dispatcher import Dispatcher
from shoal.orchestrator.roster import Roster
from shoal.orchestrator.sealer import Sealer
from shoal.protocol.ids import LeaseId, PeerId
from shoal.protocol.node import (
    CANCEL_PROTOCOL,
    COMMIT_PROTOCOL,
    FAILURE_PROTOCOL,
    HEARTBEAT_PROTOCOL,
    HELLO_PROTOCOL,
    JOIN_PROTOCOL,
    RESULT_PROTOCOL,
    Heartbeat,
    HeartbeatReply,
    HelloRequest,
    JoinReply,
    JoinRequest,
    LeaseFailure,
    OpenJob,
    ResultMessage,
)
from shoal.protocol.sealing import BidCancel, BidCommitment
from shoal.protocol.signing import Signed

_MAX_SMALL_BYTES = 16 << 10
_MAX_RESULT_MESSAGE_BYTES = 512 << 10
_MAX_VERDICTS_PER_BEAT = 64


class FrontDesk:
    """Serves hello, join, bid and its cancelling, result, failure and heartbeat."""

    def __init__(
        self,
        roster: Roster,
        auctioneer: Auctioneer,
        sealer: Sealer,
        dispatcher: Dispatcher,
        open_jobs: Callable[[], Sequence[OpenJob]],
    ) -> None:
        self._roster = roster
        self._auctioneer = auctioneer
        self._sealer = sealer
        self._dispatcher = dispatcher
        self._open_jobs = open_jobs

    def serve(self, network: Network) -> None:
        """Registers the handlers."""
        network.serve(HELLO_PROTOCOL, self._hello, max_request_bytes=_MAX_SMALL_BYTES)
        network.serve(JOIN_PROTOCOL, self._join, max_request_bytes=_MAX_SMALL_BYTES)
        network.serve(COMMIT_PROTOCOL, self._commit, max_request_bytes=_MAX_SMALL_BYTES)
        network.serve(CANCEL_PROTOCOL, self._cancel, max_request_bytes=_MAX_SMALL_BYTES)
        network.serve(RESULT_PROTOCOL, self._result, max_request_bytes=_MAX_RESULT_MESSAGE_BYTES)
        network.serve(FAILURE_PROTOCOL, self._failure, max_request_bytes=_MAX_SMALL_BYTES)
        network.serve(HEARTBEAT_PROTOCOL, self._heartbeat)
        network.on_peer_lost(self._lost)

    async def _hello(self, peer: PeerId, data: bytes) -> bytes:
        return self._roster.hello(HelloRequest.decode(data)).encode()

    async def _join(self, peer: PeerId, data: bytes) -> bytes:
        await self._roster.join(peer, JoinRequest.decode(data))
        self._auctioneer.room_at(peer)
        return JoinReply(
            open_jobs=tuple(self._open_jobs()), market_epoch=self._sealer.epoch
        ).encode()

    async def _commit(self, peer: PeerId, data: bytes) -> bytes:
        self._roster.heard(peer)
        return (await self._sealer.commit(peer, BidCommitment.decode(data))).encode()

    async def _cancel(self, peer: PeerId, data: bytes) -> bytes:
        self._roster.heard(peer)
        return (await self._sealer.cancel(peer, Signed[BidCancel].decode(data))).encode()

    async def _result(self, peer: PeerId, data: bytes) -> bytes:
        self._roster.heard(peer)
        return self._dispatcher.submit(peer, ResultMessage.decode(data)).encode()

    async def _failure(self, peer: PeerId, data: bytes) -> bytes:
        self._roster.member(peer)
        return (await self._dispatcher.fail(peer, LeaseFailure.decode(data))).encode()

    async def _heartbeat(self, peer: PeerId, data: bytes) -> bytes:
        beat = Heartbeat.decode(data)
        revoked = self._dispatcher.heartbeat(peer, beat)
        member = self._roster.member(peer)
        for lease_id in beat.acknowledged:
            member.undelivered.pop(LeaseId(lease_id), None)
        jobs = tuple(self._open_jobs())
        idle = self._auctioneer.idle_reason(peer, bool(jobs))
        return HeartbeatReply(
            revoked=revoked,
            verdicts=tuple(list(member.undelivered.values())[:_MAX_VERDICTS_PER_BEAT]),
            open_jobs=jobs,
            market_epoch=self._sealer.epoch,
            idle_reason=idle,
            idle_detail=self._auctioneer.idle_detail(peer, idle),
        ).encode()

    def _lost(self, peer: PeerId, cause: str) -> None:
        self._roster.lost(peer)
