"""Gossip between real nodes: what passes a check is handed on, and who brings lies is banned."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from market_records import DOMAIN, NOW_MS, account, lot

from shoal.network.bans import Fault
from shoal.network.identity import NodeIdentity
from shoal.network.libp2p_node import Libp2pNode
from shoal.network.port import TopicCheck
from shoal.protocol.announcement import LOTS_TOPIC, LotAnnouncement, topic_of
from shoal.protocol.clock import ManualTime
from shoal.protocol.ids import PeerId
from shoal.protocol.signing import sign
from shoal.worker.announcements import Announcements, Interests
from shoal.worker.evidence import EvidenceBook

WAIT_S = 30.0
HOME, STRANGER = account(80), account(81)
TOPIC = topic_of(LOTS_TOPIC, DOMAIN, HOME.address)


def announcement(number: int, *, lie: bool = False) -> bytes:
    record = LotAnnouncement(lots=(lot(epoch=number),), announced_at_ms=NOW_MS)
    return sign(record, DOMAIN, STRANGER if lie else HOME).encode()


def number_of(payload: bytes) -> int:
    return int(LotAnnouncement.model_validate_json(_record(payload)).lots[0].epoch)


def _record(payload: bytes) -> bytes:
    # Canonical form: the record comes before the signature.
    return payload[len(b'{"record":') : payload.rindex(b',"signature"')]


class Listener:
    """A node that follows the topic and keeps what it heard."""

    def __init__(self, folder: Path | None) -> None:
        self.network = Libp2pNode(NodeIdentity.generate(), "/ip4/127.0.0.1/tcp/0")
        self.heard: asyncio.Queue[int] = asyncio.Queue()
        self.numbers: set[int] = set()
        self.lost = asyncio.Event()
        check = None if folder is None else workers_check(self.network, folder)
        self.network.subscribe(TOPIC, self._hear, check=check)
        self.network.on_peer_lost(lambda _peer, _cause: self.lost.set())

    async def _hear(self, _: PeerId, payload: bytes) -> None:
        self.numbers.add(number_of(payload))
        self.heard.put_nowait(number_of(payload))


def workers_check(network: Libp2pNode, folder: Path) -> TopicCheck:
    interests = Interests(
        known=frozenset, served=frozenset, new_job=lambda: None, prefetch=lambda *_: _nothing()
    )
    heard = Announcements(network, ManualTime(NOW_MS), EvidenceBook(folder), interests)
    return partial(heard.check, LOTS_TOPIC, DOMAIN, HOME.address)


async def _nothing() -> None:
    return None


@asynccontextmanager
async def chain(folder: Path | None) -> AsyncIterator[tuple[Listener, Listener, Libp2pNode]]:
    """A speaker that knows the first listener, which knows the second; None checks nothing."""
    first, second = Listener(folder), Listener(folder)
    speaker = Libp2pNode(NodeIdentity.generate(), None)
    nodes = [first.network, second.network, speaker]
    for node in nodes:
        await node.start()
    await second.network.connect(first.network.addresses[0], timeout_s=WAIT_S)
    await speaker.connect(first.network.addresses[0], timeout_s=WAIT_S)
    try:
        yield first, second, speaker
    finally:
        for node in nodes:
            await node.stop()


async def until_heard(speaker: Libp2pNode, listener: Listener, begin: int) -> int:
    """Announces until the listener hears; the mesh takes a moment to form."""
    async with asyncio.timeout(WAIT_S):
        while True:
            begin += 1
            await speaker.publish(TOPIC, announcement(begin))
            try:
                async with asyncio.timeout(0.5):
                    await listener.heard.get()
            except TimeoutError:
                continue
            return begin


def run(check: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(120):
            await check()

    asyncio.run(limited())


def test_an_announcement_is_handed_on_to_who_does_not_know_its_maker(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain(tmp_path) as (_, second, speaker):
            await until_heard(speaker, second, 0)
            assert speaker.peer_id not in second.network.peers()

    run(check)


def test_a_lie_is_not_handed_on_and_its_bearer_is_banned(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain(tmp_path) as (first, second, speaker):
            number = truths = await until_heard(speaker, second, 0)
            async with asyncio.timeout(WAIT_S):
                while not first.lost.is_set():
                    number += 1
                    if speaker.peers():
                        await speaker.publish(TOPIC, announcement(number, lie=True))
                    await asyncio.sleep(0.02)
            meters = first.network.meters
            assert meters.value("gossip_dropped", cause="reject") >= 10
            assert meters.value("bans", reason=Fault.BAD_GOSSIP.value) == 1
            # Not one lie came through to the second, which would have held it against the first.
            assert max(second.numbers) <= truths
            assert second.network.meters.value("gossip_dropped", cause="reject") == 0
            assert first.network.peer_id in second.network.peers()

    run(check)


def test_without_the_check_the_lie_spreads() -> None:
    """The negative control: it is the check that holds lies back."""

    async def check() -> None:
        async with chain(None) as (first, second, speaker):
            number = await until_heard(speaker, second, 0)
            lie = number + 1
            await speaker.publish(TOPIC, announcement(lie, lie=True))
            async with asyncio.timeout(WAIT_S):
                while lie not in second.numbers:
                    await second.heard.get()
            assert not first.lost.is_set()

    run(check)
