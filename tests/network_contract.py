"""The promises of `shoal.network.port.Network`, checked of any implementation.

Each check takes a `World`, which makes started nodes; the test modules run every check with
`keep`, over the in-memory network (unit) and over libp2p (integration).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from shoal.network.identity import NodeIdentity
from shoal.network.port import MAX_TOPIC_MESSAGE_BYTES, Limits, Network, TopicVerdict
from shoal.protocol.errors import (
    Clock,
    Expired,
    InvalidRequest,
    NotFound,
    OverBudget,
    PeerFault,
    ShoalError,
    Unavailable,
)
from shoal.protocol.ids import PeerId

ECHO = "/test/echo/1"
WAIT_S = 30.0


Make = Callable[[NodeIdentity, bool, Limits | None], Network]
"""A node of that name and those limits, which listens or only dials."""


class World:
    """Makes started nodes that can reach each other."""

    def __init__(self, make: Make) -> None:
        self._make = make
        self._nodes: list[Network] = []

    async def node(
        self,
        *,
        listens: bool = True,
        identity: NodeIdentity | None = None,
        limits: Limits | None = None,
    ) -> Network:
        node = self._make(identity or NodeIdentity.generate(), listens, limits)
        self._nodes.append(node)
        await node.start()
        return node

    async def close(self) -> None:
        for node in self._nodes:
            await node.stop()


def keep(check: Callable[[World], Awaitable[None]], make: Make) -> None:
    """The nodes that `make` makes keep the promise that `check` checks."""

    async def run() -> None:
        world = World(make)
        try:
            await check(world)
        finally:
            await world.close()

    asyncio.run(run())


async def echo(_peer: PeerId, payload: bytes) -> bytes:
    return payload


async def _pair(world: World, limits: Limits | None = None) -> tuple[Network, Network]:
    """A listening server and a dial-only client, connected."""
    server = await world.node(limits=limits)
    client = await world.node(listens=False, limits=limits)
    assert client.addresses == ()
    assert await client.connect(server.addresses[0], timeout_s=WAIT_S) == server.peer_id
    # A dialler knows of its connection a moment before the other end does.
    async with asyncio.timeout(WAIT_S):
        while client.peer_id not in server.peers():  # noqa: ASYNC110  # the port tells of peers lost, not of peers found
            await asyncio.sleep(0.005)
    return server, client


async def request_reaches_the_handler_with_the_callers_name(world: World) -> None:
    server, client = await _pair(world)
    callers = []

    async def handler(peer: PeerId, payload: bytes) -> bytes:
        callers.append(peer)
        return payload[::-1]

    server.serve("/test/reverse/1", handler)
    answer = await client.request(server.peer_id, "/test/reverse/1", b"abc", timeout_s=WAIT_S)
    assert answer == b"cba"
    assert callers == [client.peer_id]


async def server_asks_over_the_connection_the_client_dialled(world: World) -> None:
    server, client = await _pair(world)
    client.serve(ECHO, echo)
    assert await server.request(client.peer_id, ECHO, b"", timeout_s=WAIT_S) == b""
    assert server.peers() == {client.peer_id}
    assert client.peers() == {server.peer_id}


async def requests_run_side_by_side(world: World) -> None:
    server, client = await _pair(world)
    arrived, release = asyncio.Semaphore(0), asyncio.Event()

    async def handler(_peer: PeerId, payload: bytes) -> bytes:
        arrived.release()
        await release.wait()
        return payload

    server.serve(ECHO, handler)
    asking = [
        asyncio.ensure_future(client.request(server.peer_id, ECHO, bytes([n]), timeout_s=WAIT_S))
        for n in range(20)
    ]
    for _ in asking:
        await asyncio.wait_for(arrived.acquire(), WAIT_S)
    release.set()
    assert await asyncio.gather(*asking) == [bytes([n]) for n in range(20)]


async def large_message_within_the_cap_arrives_whole(world: World) -> None:
    server, client = await _pair(world)
    server.serve(ECHO, echo, max_request_bytes=4 << 20)
    payload = bytes(range(256)) * (16 << 10)
    assert await client.request(server.peer_id, ECHO, payload, timeout_s=20) == payload


async def message_over_a_cap_is_refused_and_the_node_lives(world: World) -> None:
    server, client = await _pair(world)
    server.serve(ECHO, echo, max_request_bytes=100)
    too_much = Limits().max_message_bytes + 1
    for size in (101, 1 << 20, too_much):
        with pytest.raises(InvalidRequest) as caught:
            await client.request(server.peer_id, ECHO, bytes(size), timeout_s=WAIT_S)
        assert caught.value.code == "message_too_large"
    assert await client.request(server.peer_id, ECHO, bytes(100), timeout_s=WAIT_S) == bytes(100)


async def reply_over_the_cap_is_refused(world: World) -> None:
    server, client = await _pair(world)

    async def handler(_peer: PeerId, _payload: bytes) -> bytes:
        return bytes(Limits().max_message_bytes + 1)

    server.serve(ECHO, handler)
    with pytest.raises(InvalidRequest) as caught:
        await client.request(server.peer_id, ECHO, b"", timeout_s=WAIT_S)
    assert caught.value.code == "message_too_large"


async def unknown_protocol_is_named(world: World) -> None:
    server, client = await _pair(world)
    with pytest.raises(NotFound, match="/test/none/1") as caught:
        await client.request(server.peer_id, "/test/none/1", b"", timeout_s=WAIT_S)
    assert caught.value.code == "unknown_protocol"
    server.serve("/test/none/1", echo)
    assert await client.request(server.peer_id, "/test/none/1", b"x", timeout_s=WAIT_S) == b"x"


async def handlers_error_reaches_the_caller_typed(world: World) -> None:
    server, client = await _pair(world)

    async def handler(_peer: PeerId, payload: bytes) -> bytes:
        if payload == b"budget":
            raise OverBudget("The job's escrow is empty.", job_id="job_7")
        raise PeerFault("That gradient is not finite.", evidence="ab")

    server.serve(ECHO, handler)
    with pytest.raises(OverBudget, match="escrow is empty") as caught:
        await client.request(server.peer_id, ECHO, b"budget", timeout_s=WAIT_S)
    assert caught.value.context == {"job_id": "job_7"}
    with pytest.raises(PeerFault) as fault:
        await client.request(server.peer_id, ECHO, b"", timeout_s=WAIT_S)
    assert fault.value.evidence == "ab"


async def handlers_accident_shows_nothing_of_its_inside(world: World) -> None:
    server, client = await _pair(world)

    async def handler(_peer: PeerId, payload: bytes) -> bytes:
        if payload:
            return payload
        raise KeyError("secret-value")

    server.serve(ECHO, handler)
    with pytest.raises(Unavailable) as caught:
        await client.request(server.peer_id, ECHO, b"", timeout_s=WAIT_S)
    assert caught.value.code == "handler_failed"
    assert "secret" not in str(caught.value.to_wire())
    assert await client.request(server.peer_id, ECHO, b"alive", timeout_s=WAIT_S) == b"alive"


async def slow_handler_runs_out_the_reply_clock(world: World) -> None:
    server, client = await _pair(world)
    never = asyncio.Event()

    async def handler(_peer: PeerId, payload: bytes) -> bytes:
        if not payload:
            await never.wait()
        return payload

    server.serve(ECHO, handler)
    with pytest.raises(Expired, match="did not answer") as caught:
        await client.request(server.peer_id, ECHO, b"", timeout_s=0.1)
    assert caught.value.clock is Clock.REPLY
    assert await client.request(server.peer_id, ECHO, b"on", timeout_s=WAIT_S) == b"on"


async def handler_past_its_own_deadline_is_stopped(world: World) -> None:
    server, client = await _pair(world, Limits(handler_timeout_s=0.1))
    cancelled = asyncio.Event()

    async def handler(_peer: PeerId, _payload: bytes) -> bytes:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        return b""

    server.serve(ECHO, handler)
    with pytest.raises(Expired) as caught:
        await client.request(server.peer_id, ECHO, b"", timeout_s=WAIT_S)
    assert caught.value.clock is Clock.DEADLINE
    assert cancelled.is_set()


async def node_at_its_limit_says_so(world: World) -> None:
    server, client = await _pair(world, Limits(max_requests_in_flight=1))
    busy, release = asyncio.Event(), asyncio.Event()

    async def handler(_peer: PeerId, payload: bytes) -> bytes:
        busy.set()
        await release.wait()
        return payload

    server.serve(ECHO, handler)
    first = asyncio.ensure_future(client.request(server.peer_id, ECHO, b"1", timeout_s=WAIT_S))
    await asyncio.wait_for(busy.wait(), WAIT_S)
    with pytest.raises(Unavailable) as caught:
        await client.request(server.peer_id, ECHO, b"2", timeout_s=WAIT_S)
    assert caught.value.code == "overloaded"
    release.set()
    assert await first == b"1"


async def stranger_cannot_be_asked(world: World) -> None:
    node = await world.node()
    with pytest.raises(Unavailable) as caught:
        await node.request(NodeIdentity.generate().peer_id, ECHO, b"", timeout_s=WAIT_S)
    assert caught.value.code == "not_connected"
    with pytest.raises(InvalidRequest):
        await node.request(PeerId("nobody"), ECHO, b"", timeout_s=WAIT_S)


async def wrong_address_is_refused_in_one_sentence(world: World) -> None:
    server, client = await _pair(world)
    place, _, _ = server.addresses[0].rpartition("/p2p/")
    for address in ("", "nonsense", place, f"{place}/p2p/xyz", "/p2p/", "x" * 10_000):
        with pytest.raises(InvalidRequest):
            await client.connect(address, timeout_s=WAIT_S)
    with pytest.raises(InvalidRequest, match="own address"):
        await server.connect(server.addresses[0], timeout_s=WAIT_S)
    for _ in range(2):
        stranger = NodeIdentity.generate().peer_id
        with pytest.raises(Unavailable, match="Nobody answers"):
            await client.connect(f"{place}/p2p/{stranger}", timeout_s=WAIT_S)


async def gossip_reaches_subscribers_with_its_signer(world: World) -> None:
    server, client = await _pair(world)
    other = await world.node(listens=False)
    await other.connect(server.addresses[0], timeout_s=WAIT_S)
    heard: dict[str, asyncio.Event] = {"server": asyncio.Event(), "other": asyncio.Event()}
    own: list[bytes] = []

    def listener(name: str) -> Callable[[PeerId, bytes], Awaitable[None]]:
        async def handler(peer: PeerId, payload: bytes) -> None:
            assert (peer, payload) == (client.peer_id, b"lot 7")
            heard[name].set()

        return handler

    async def hear_own(_peer: PeerId, payload: bytes) -> None:
        own.append(payload)

    server.subscribe("lots", listener("server"))
    other.subscribe("lots", listener("other"))
    client.subscribe("lots", hear_own)
    async with asyncio.timeout(10):
        for event in heard.values():
            while not event.is_set():
                await client.publish("lots", b"lot 7")
                await _wait(event, 0.2)
    assert own == []
    with pytest.raises(InvalidRequest) as caught:
        await client.publish("lots", bytes(MAX_TOPIC_MESSAGE_BYTES + 1))
    assert caught.value.code == "message_too_large"


async def gossip_that_fails_its_check_is_not_handled_and_lies_are_held_against_their_bearer(
    world: World,
) -> None:
    server, client = await _pair(world)
    heard: list[bytes] = []
    arrived, lost = asyncio.Event(), asyncio.Event()

    async def handler(_peer: PeerId, payload: bytes) -> None:
        heard.append(payload)
        arrived.set()

    def check(payload: bytes) -> TopicVerdict:
        if payload == b"defect":
            raise ValueError("the check itself is broken")
        words = {b"lie": TopicVerdict.REJECT, b"late": TopicVerdict.IGNORE}
        return words.get(payload, TopicVerdict.ACCEPT)

    server.on_peer_lost(lambda _peer, _cause: lost.set())
    server.subscribe("lots", handler, check=check)
    async with asyncio.timeout(WAIT_S):
        while not arrived.is_set():
            await client.publish("lots", b"true")
            await _wait(arrived, 0.2)
    # A node may send a topic fifty messages a second, over a real network.
    for _ in range(12):
        await client.publish("lots", b"late")
        await client.publish("lots", b"defect")
    arrived.clear()
    await client.publish("lots", b"true again")
    await asyncio.wait_for(arrived.wait(), WAIT_S)
    assert server.meters.value("gossip_dropped", cause="ignore") == 24
    assert not lost.is_set()
    async with asyncio.timeout(WAIT_S):
        while not lost.is_set():
            if client.peers():
                await client.publish("lots", b"lie")
            await _wait(lost, 0.02)
    assert set(heard) == {b"true", b"true again"}
    assert server.meters.value("bans", reason="bad_gossip") == 1


async def stopped_peer_is_reported_once(world: World) -> None:
    server, client = await _pair(world)
    lost: list[tuple[PeerId, str]] = []
    told = asyncio.Event()

    def handler(peer: PeerId, cause: str) -> None:
        lost.append((peer, cause))
        told.set()

    def broken(_peer: PeerId, _cause: str) -> None:
        raise RuntimeError("a handler's accident")

    server.on_peer_lost(broken)
    server.on_peer_lost(handler)
    await client.stop()
    await client.stop()
    await asyncio.wait_for(told.wait(), WAIT_S)
    assert [peer for peer, _ in lost] == [client.peer_id]
    assert lost[0][1]
    assert server.peers() == frozenset()
    with pytest.raises(Unavailable):
        await server.request(client.peer_id, ECHO, b"", timeout_s=WAIT_S)
    with pytest.raises(Unavailable):
        await client.request(server.peer_id, ECHO, b"", timeout_s=WAIT_S)


async def _waiting_caller(world: World) -> tuple[Network, Network, asyncio.Future[bytes]]:
    """A server that never answers, a client, and its request, which has arrived."""
    server, client = await _pair(world)
    arrived = asyncio.Event()

    async def handler(_peer: PeerId, _payload: bytes) -> bytes:
        arrived.set()
        await asyncio.Event().wait()
        return b""

    server.serve(ECHO, handler)
    asking = asyncio.ensure_future(client.request(server.peer_id, ECHO, b"", timeout_s=30))
    await asyncio.wait_for(arrived.wait(), WAIT_S)
    return server, client, asking


async def waiting_caller_hears_that_the_peer_stopped(world: World) -> None:
    server, _, asking = await _waiting_caller(world)
    await server.stop()
    with pytest.raises(Unavailable):
        await asyncio.wait_for(asking, WAIT_S)


async def waiting_caller_hears_that_its_own_node_stopped(world: World) -> None:
    _, client, asking = await _waiting_caller(world)
    await client.stop()
    with pytest.raises(Unavailable):
        await asyncio.wait_for(asking, WAIT_S)


async def own_disconnect_is_no_loss_but_the_other_side_hears_it(world: World) -> None:
    server, client = await _pair(world)
    server_lost, client_lost = asyncio.Event(), asyncio.Event()
    server.on_peer_lost(lambda _peer, _cause: server_lost.set())
    client.on_peer_lost(lambda _peer, _cause: client_lost.set())
    await server.disconnect(client.peer_id)
    await server.disconnect(client.peer_id)
    await asyncio.wait_for(client_lost.wait(), WAIT_S)
    assert server.peers() == frozenset()
    assert not server_lost.is_set()


async def restarted_peer_is_reached_again(world: World) -> None:
    identity = NodeIdentity.generate()
    server = await world.node(identity=identity)
    client = await world.node(listens=False)
    gone = asyncio.Event()
    client.on_peer_lost(lambda _peer, _cause: gone.set())
    await client.connect(server.addresses[0], timeout_s=WAIT_S)
    address = server.addresses[0]
    await server.stop()
    await asyncio.wait_for(gone.wait(), WAIT_S)
    with pytest.raises(Unavailable):
        await client.connect(address, timeout_s=WAIT_S)
    again = await world.node(identity=identity)
    again.serve(ECHO, echo)
    async with asyncio.timeout(WAIT_S):
        await client.connect(again.addresses[0], timeout_s=WAIT_S)
        assert await client.request(again.peer_id, ECHO, b"x", timeout_s=WAIT_S) == b"x"


async def malformed_service_is_refused(world: World) -> None:
    node = await world.node()
    with pytest.raises(InvalidRequest):
        node.serve("no-slash", echo)
    with pytest.raises(InvalidRequest):
        node.serve(ECHO, echo, max_request_bytes=Limits().max_message_bytes + 1)
    with pytest.raises(InvalidRequest, match="already started"):
        await node.start()


async def banned_peer_is_lost_and_kept_out(world: World) -> None:
    server, client = await _pair(world)
    server.serve(ECHO, echo)
    lost: asyncio.Queue[str] = asyncio.Queue()
    client_lost = asyncio.Event()
    server.on_peer_lost(lambda _peer, cause: lost.put_nowait(cause))
    client.on_peer_lost(lambda _peer, _cause: client_lost.set())
    address = server.addresses[0]
    await server.ban(client.peer_id, "fraud", for_s=3600)
    assert "banned" in await asyncio.wait_for(lost.get(), WAIT_S)
    await asyncio.wait_for(client_lost.wait(), WAIT_S)
    # Over a socket the dialler learns of the refusal only when it asks for something.
    with pytest.raises(ShoalError):
        assert await _served(client, address, server.peer_id)
    assert client.peer_id not in server.peers()
    assert server.meters.value("bans", reason="fraud") == 1
    # The control: others are let in as before.
    other = await world.node(listens=False)
    assert await _served(other, address, server.peer_id)


async def _served(client: Network, address: str, peer: PeerId) -> bool:
    await client.connect(address, timeout_s=WAIT_S)
    return await client.request(peer, ECHO, b"x", timeout_s=WAIT_S) == b"x"


async def banned_peer_is_not_dialled(world: World) -> None:
    server, client = await _pair(world)
    await client.ban(server.peer_id, "fraud", for_s=3600)
    with pytest.raises(Unavailable) as caught:
        await client.connect(server.addresses[0], timeout_s=WAIT_S)
    assert caught.value.code == "banned"


async def faults_add_up_to_a_ban_but_honest_ones_do_not(world: World) -> None:
    server, client = await _pair(world)
    lost = asyncio.Event()
    server.on_peer_lost(lambda _peer, _cause: lost.set())

    async def handler(_peer: PeerId, payload: bytes) -> bytes:
        if payload == b"bad":
            raise PeerFault("That record is malformed.", code="malformed")
        raise NotFound("There is no such lease.")

    server.serve(ECHO, handler)
    for _ in range(120):
        with pytest.raises(NotFound):
            await client.request(server.peer_id, ECHO, b"", timeout_s=WAIT_S)
    with pytest.raises(PeerFault):
        await client.request(server.peer_id, ECHO, b"bad", timeout_s=WAIT_S)
    assert not lost.is_set()
    for _ in range(120):
        try:
            await client.request(server.peer_id, ECHO, b"bad", timeout_s=WAIT_S)
        except PeerFault:
            continue
        except Unavailable:
            break
    await asyncio.wait_for(lost.wait(), WAIT_S)
    assert server.meters.value("bans", reason="bad_record") == 1


async def peer_that_asks_too_often_is_told_to_wait(world: World) -> None:
    server, client = await _pair(world, Limits(requests_per_s_per_peer=0.01))
    server.serve(ECHO, echo)
    with pytest.raises(Unavailable) as caught:
        await client.request(server.peer_id, ECHO, b"", timeout_s=WAIT_S)
    assert (caught.value.code, caught.value.retry_after_s) == ("overloaded", 1)


async def what_passes_is_counted(world: World) -> None:
    server, client = await _pair(world)
    server.serve(ECHO, echo)
    for _ in range(3):
        await client.request(server.peer_id, ECHO, b"x", timeout_s=WAIT_S)
    with pytest.raises(NotFound):
        await client.request(server.peer_id, "/test/none/1", b"", timeout_s=WAIT_S)
    assert server.meters.value("requests_served", protocol=ECHO, outcome="ok") == 3
    assert client.meters.value("requests_made", protocol=ECHO, outcome="ok") == 3
    none = client.meters.value("requests_made", protocol="/test/none/1", outcome="not_found")
    assert none == 1
    async with asyncio.timeout(WAIT_S):
        while server.meters.value("connections_open") != 1:  # noqa: ASYNC110  # counters tell nobody
            await asyncio.sleep(0.005)


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    try:
        await asyncio.wait_for(event.wait(), timeout_s)
    except TimeoutError:
        return


CHECKS: tuple[Callable[[World], Awaitable[None]], ...] = (
    request_reaches_the_handler_with_the_callers_name,
    server_asks_over_the_connection_the_client_dialled,
    requests_run_side_by_side,
    large_message_within_the_cap_arrives_whole,
    message_over_a_cap_is_refused_and_the_node_lives,
    reply_over_the_cap_is_refused,
    unknown_protocol_is_named,
    handlers_error_reaches_the_caller_typed,
    handlers_accident_shows_nothing_of_its_inside,
    slow_handler_runs_out_the_reply_clock,
    handler_past_its_own_deadline_is_stopped,
    node_at_its_limit_says_so,
    stranger_cannot_be_asked,
    wrong_address_is_refused_in_one_sentence,
    gossip_reaches_subscribers_with_its_signer,
    gossip_that_fails_its_check_is_not_handled_and_lies_are_held_against_their_bearer,
    stopped_peer_is_reported_once,
    waiting_caller_hears_that_the_peer_stopped,
    waiting_caller_hears_that_its_own_node_stopped,
    own_disconnect_is_no_loss_but_the_other_side_hears_it,
    restarted_peer_is_reached_again,
    malformed_service_is_refused,
    banned_peer_is_lost_and_kept_out,
    banned_peer_is_not_dialled,
    faults_add_up_to_a_ban_but_honest_ones_do_not,
    peer_that_asks_too_often_is_told_to_wait,
    what_passes_is_counted,
)
