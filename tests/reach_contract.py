"""The promises of `Network.reach`, checked of any implementation.

Each check takes a `Town`, which makes started nodes; the test modules run every check over the
in-memory network (unit) and over libp2p (integration).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

import pytest

from shoal.network.identity import NodeIdentity
from shoal.network.port import Network, Reach
from shoal.protocol.errors import Expired, NotFound, Unavailable
from shoal.protocol.ids import PeerId

OPEN = "/test/open/1"
OWN = "/test/own/1"
WAIT_S = 30.0


class Town(Protocol):
    """Makes started nodes: relays that listen, and workers that only dial out."""

    async def relay(self) -> Network: ...

    async def worker(self) -> Network: ...


async def echo(_peer: PeerId, payload: bytes) -> bytes:
    return payload


async def joined(town: Town, relay: Network) -> Network:
    """A worker connected to the relay, with one protocol for guests and one for others."""
    worker = await town.worker()
    worker.serve(OPEN, echo, for_guests=True)
    worker.serve(OWN, echo)
    await worker.connect(relay.addresses[0], timeout_s=WAIT_S)
    return worker


async def reached(asker: Network, asked: PeerId, via: PeerId | None = None) -> Reach:
    """How it was reached, once it has its place at the relay."""
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                return await asker.reach(asked, via=via, timeout_s=WAIT_S)
            except Unavailable as error:
                if error.code != "not_reachable":
                    raise
                await asyncio.sleep(0.05)


async def peers_of_one_relay_reach_each_other(town: Town) -> None:
    relay = await town.relay()
    first, second = await joined(town, relay), await joined(town, relay)
    for via in (relay.peer_id, None):
        assert await reached(first, second.peer_id, via) is Reach.RELAYED
    answer = await first.request(second.peer_id, OPEN, b"over", timeout_s=WAIT_S)
    assert answer == b"over"
    answer = await second.request(first.peer_id, OPEN, b"back", timeout_s=WAIT_S)
    assert answer == b"back"


async def peer_that_was_dialled_is_reached_directly(town: Town) -> None:
    relay = await town.relay()
    worker = await joined(town, relay)
    assert await worker.reach(relay.peer_id, timeout_s=WAIT_S) is Reach.DIRECT
    # The relay may hear of the connection a moment later than the worker that dialled.
    assert await reached(relay, worker.peer_id) is Reach.DIRECT


async def guests_are_served_only_what_is_for_guests(town: Town) -> None:
    relay = await town.relay()
    first, second = await joined(town, relay), await joined(town, relay)
    await reached(first, second.peer_id)
    for asker, asked in ((first, second), (second, first)):
        with pytest.raises(NotFound) as caught:
            await asker.request(asked.peer_id, OWN, b"", timeout_s=WAIT_S)
        assert caught.value.code == "unknown_protocol"
    # Whom a worker dialled itself is no guest.
    assert await relay.request(first.peer_id, OWN, b"", timeout_s=WAIT_S) == b""


async def nobody_is_reached_without_a_relay_that_knows_them(town: Town) -> None:
    relay, other = await town.relay(), await town.relay()
    worker = await joined(town, relay)
    stranger = NodeIdentity.generate().peer_id
    elsewhere = (await joined(town, other)).peer_id
    alone = await town.worker()
    for asker, asked, via in (
        (worker, stranger, None),
        (worker, elsewhere, None),
        (worker, elsewhere, other.peer_id),
        (alone, worker.peer_id, None),
    ):
        with pytest.raises(Unavailable) as caught:
            await asker.reach(asked, via=via, timeout_s=WAIT_S)
        assert caught.value.code == "not_reachable"


async def clock_of_an_attempt_runs_out(town: Town) -> None:
    relay = await town.relay()
    worker = await joined(town, relay)
    with pytest.raises(Expired):
        await worker.reach(NodeIdentity.generate().peer_id, timeout_s=0)


async def banned_peer_is_no_guest(town: Town) -> None:
    relay = await town.relay()
    first, second = await joined(town, relay), await joined(town, relay)
    await reached(first, second.peer_id)
    await second.ban(first.peer_id, "it was rude", for_s=60)
    async with asyncio.timeout(WAIT_S):
        while second.peer_id in first.peers():  # noqa: ASYNC110  # the port tells once only
            await asyncio.sleep(0.01)
    with pytest.raises(Unavailable):
        await first.reach(second.peer_id, timeout_s=WAIT_S)
    assert first.peer_id not in second.peers()


CHECKS: tuple[Callable[[Town], Awaitable[None]], ...] = (
    peers_of_one_relay_reach_each_other,
    peer_that_was_dialled_is_reached_directly,
    guests_are_served_only_what_is_for_guests,
    nobody_is_reached_without_a_relay_that_knows_them,
    clock_of_an_attempt_runs_out,
    banned_peer_is_no_guest,
)
