"""Workers fetch from one another, tell what they hold, and are wary of what they are told."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from swarm_lab import Origin, Sharer, SwarmLab, in_lab, version

from shoal.network.blob_chunks import decode_span
from shoal.network.blob_service import BLOB_PROTOCOL
from shoal.network.identity import NodeIdentity
from shoal.network.memory import MemoryHub, MemoryNetwork
from shoal.protocol.blob import CHUNK_BYTES, BlobRef
from shoal.protocol.canonical import sha256_hex
from shoal.protocol.errors import NotFound, ShoalError, Unauthorised, Unavailable
from shoal.protocol.holders import (
    FINE_CHUNK_BYTES,
    HAVE_PROTOCOL,
    HOLDERS_PROTOCOL,
    SWARM_BYTES,
    DeltaStep,
    HaveNotice,
    HoldersReply,
    HoldersRequest,
    Holding,
)
from shoal.protocol.ids import PeerId
from shoal.worker.config import WorkerConfig
from shoal.worker.plane import stall_of
from shoal.worker.sharing import Stall
from shoal.worker.swarm import is_nearby, may_dial, shortest_chain

SIZE = SWARM_BYTES + 1000


def noise(size_bytes: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size_bytes)


class Gated:
    """The origin's blobs, of which no more than so many bytes are given until it is opened."""

    def __init__(self, origin: Origin, after_bytes: int) -> None:
        self.source = origin.source
        self.open = asyncio.Event()
        self.exhausted = asyncio.Event()
        self._left_bytes = after_bytes
        self._store = origin.store
        self._first: PeerId | None = None
        origin.network.serve(BLOB_PROTOCOL, self._answer)

    async def _answer(self, peer: PeerId, payload: bytes) -> bytes:
        span = decode_span(payload)
        # Only the first to ask is held up.
        self._first = self._first or peer
        if peer == self._first:
            self._left_bytes -= span.size_bytes
            if self._left_bytes < 0:
                self.exhausted.set()
                await self.open.wait()
        with self._store.open_range(span.digest, span.start, span.size_bytes) as opened:
            return opened.read()


async def holders_of(lab: SwarmLab, asker: PeerId, sha256: str) -> HoldersReply:
    """What the desk answers ``asker``, without its asking."""
    request = HoldersRequest(sha256=sha256)
    return HoldersReply.decode(await lab.origin.desk._holders(asker, request.encode()))


async def until_held(lab: SwarmLab, sha256: str, num: int) -> None:
    """The desk knows of ``num`` holders of the blob."""
    async with asyncio.timeout(20):
        while (  # noqa: ASYNC110  # the desk tells nobody of news
            len((await holders_of(lab, PeerId("nobody"), sha256)).holders) < num
        ):
            await asyncio.sleep(0.02)


@in_lab
async def test_the_second_fetches_from_the_first_when_the_origin_has_gone(lab: SwarmLab) -> None:
    data = noise(2 * CHUNK_BYTES + 5)
    ref = lab.origin.store.put_bytes(data)
    first, second = await lab.join(), await lab.join()
    await first.fetch(ref, lab.origin.source)
    await until_held(lab, ref.sha256, 1)
    lab.origin.store.delete(ref.sha256)
    path = await second.fetch(ref, lab.origin.source)
    assert path.read_bytes() == data
    assert first.given_bytes() >= ref.size_bytes


@in_lab
async def test_a_small_blob_costs_no_question(lab: SwarmLab) -> None:
    small = lab.origin.store.put_bytes(noise(SWARM_BYTES))
    large = lab.origin.store.put_bytes(noise(SWARM_BYTES + 1))
    worker = await lab.join()
    meters = lab.origin.network.meters
    await worker.fetch(small, lab.origin.source)
    assert meters.value("holders_asked", found="no") == 0
    with pytest.MonkeyPatch.context() as patched:
        # What is asked again later depends on how long the fetch takes.
        patched.setattr("shoal.network.blob_transfer.poll_pause_s", lambda *_: 3600.0)
        await worker.fetch(large, lab.origin.source)
    assert meters.value("holders_asked", found="no") == 1


@in_lab
async def test_what_is_read_gets_into_the_store_only_where_others_may_ask_for_it(
    lab: SwarmLab,
) -> None:
    worker = await lab.join()
    for size, is_kept in ((SWARM_BYTES, False), (SWARM_BYTES + 1, True)):
        data = noise(size)
        ref = lab.origin.store.put_bytes(data)
        assert await worker.swarm.fetch_bytes(ref, [lab.origin.source], timeout_s=20) == data
        assert worker.store.has(ref.sha256) is is_kept


@in_lab
async def test_what_comes_after_a_quiet_while_is_told_at_once(lab: SwarmLab) -> None:
    ref = lab.origin.store.put_bytes(noise(SIZE))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("shoal.worker.sharing._BATCH_S", 3600.0)
        worker = await lab.join()
        await worker.fetch(ref, lab.origin.source)
        await until_held(lab, ref.sha256, 1)


@in_lab
async def test_who_does_not_share_serves_and_tells_nothing(lab: SwarmLab) -> None:
    ref = lab.origin.store.put_bytes(noise(SIZE))
    sharing, silent = await lab.join(), await lab.join(share=False)
    await silent.fetch(ref, lab.origin.source)
    await sharing.fetch(ref, lab.origin.source)
    await until_held(lab, ref.sha256, 1)
    (holder,) = (await holders_of(lab, PeerId("nobody"), ref.sha256)).holders
    assert holder.peer == sharing.network.peer_id
    asker = lab.origin.network
    with pytest.raises(NotFound, match="does not serve") as caught:
        await asker.request(silent.network.peer_id, BLOB_PROTOCOL, bytes(44), timeout_s=5)
    assert caught.value.code == "unknown_protocol"


@in_lab
async def test_a_liar_among_the_holders_is_reported_and_does_no_harm(lab: SwarmLab) -> None:
    # Chunks enough for everybody to be asked for some.
    data = noise(CHUNK_BYTES)
    ref = lab.origin.store.put_bytes(data)
    liar, honest, asker, other = [await lab.join() for _ in range(4)]
    await honest.fetch(ref, lab.origin.source)
    await until_held(lab, ref.sha256, 1)
    lab.origin.store.delete(ref.sha256)

    async def lie(peer: PeerId, payload: bytes) -> bytes:
        return bytes(decode_span(payload).size_bytes)

    liar.network.serve(BLOB_PROTOCOL, lie, for_guests=True)
    notice = HaveNotice(sources=(), holdings=(Holding(sha256=ref.sha256),))
    await liar.link.request(HAVE_PROTOCOL, notice.encode())
    assert (await asker.fetch(ref, lab.origin.source)).read_bytes() == data
    await until_held(lab, ref.sha256, 3)

    async def leaders(worker: Sharer) -> set[str]:
        answers = [await holders_of(lab, worker.network.peer_id, ref.sha256) for _ in range(6)]
        return {answer.holders[0].peer for answer in answers}

    assert liar.network.peer_id not in await leaders(asker)
    # A report is one worker's word: whoever has seen nothing is still pointed there.
    assert liar.network.peer_id in await leaders(other)
    assert (await other.fetch(ref, lab.origin.source)).read_bytes() == data


@in_lab
async def test_a_wrong_fine_list_costs_a_try_and_no_more(lab: SwarmLab) -> None:
    data = noise(2 * CHUNK_BYTES)
    ref = lab.origin.store.put_bytes(data)
    other = lab.origin.store.put_bytes(noise(2 * CHUNK_BYTES, 1))
    fine = lab.origin.desk._fine
    right, wrong = await fine.of(ref.sha256), await fine.of(other.sha256)
    assert right is not None
    assert right != wrong
    fine._lists[ref.sha256] = fine._lists[other.sha256]
    worker = await lab.join()
    # Chunk by chunk nothing fits that list, so the connection of last resort brings the blob.
    assert (await worker.fetch(ref, lab.origin.source)).read_bytes() == data


@in_lab
async def test_what_is_half_here_is_passed_on(lab: SwarmLab) -> None:
    data = noise(2 * CHUNK_BYTES)
    ref = lab.origin.store.put_bytes(data)
    first, second = await lab.join(), await lab.join()
    half = Gated(lab.origin, after_bytes=CHUNK_BYTES)
    fetching = asyncio.create_task(first.fetch(ref, half.source))
    await until_held(lab, ref.sha256, 1)
    await half.exhausted.wait()
    (holder,) = (await holders_of(lab, PeerId("nobody"), ref.sha256)).holders
    assert holder.chunks is not None
    assert holder.chunk_bytes == FINE_CHUNK_BYTES
    also = asyncio.create_task(second.fetch(ref, lab.origin.source))
    assert (await also).read_bytes() == data
    half.open.set()
    assert (await fetching).read_bytes() == data
    assert first.given_bytes() > 0


@in_lab
async def test_a_worker_that_has_not_joined_may_neither_tell_nor_ask(lab: SwarmLab) -> None:
    worker = await lab.join()
    lab.origin.members.strange.add(worker.network.peer_id)
    notice = HaveNotice(sources=(), holdings=(Holding(sha256="a" * 64),))
    with pytest.raises(Unauthorised, match="not joined"):
        await worker.link.request(HAVE_PROTOCOL, notice.encode())
    request = HoldersRequest(sha256="a" * 64)
    with pytest.raises(Unauthorised, match="not joined"):
        await worker.link.request(HOLDERS_PROTOCOL, request.encode())


@in_lab
async def test_nobody_names_another_as_itself(lab: SwarmLab) -> None:
    worker, victim = await lab.join(), await lab.join()
    holdings = (Holding(sha256="a" * 64),)
    for peer, is_own in ((victim.network.peer_id, False), (worker.network.peer_id, True)):
        source = f"/ip4/192.0.2.1/tcp/1/p2p/{peer}"
        notice = HaveNotice(sources=(source,), holdings=holdings).encode()
        if is_own:
            await worker.link.request(HAVE_PROTOCOL, notice)
        else:
            with pytest.raises(ShoalError, match="not of node"):
                await worker.link.request(HAVE_PROTOCOL, notice)
    (holder,) = (await holders_of(lab, victim.network.peer_id, "a" * 64)).holders
    assert holder.sources == (source, f"/p2p/{worker.network.peer_id}")


@in_lab
async def test_a_port_is_asked_at_the_address_the_worker_is_seen_at(lab: SwarmLab) -> None:
    worker = await lab.join(share=False)
    peer = worker.network.peer_id
    notice = HaveNotice(sources=(), http_port=8701, holdings=(Holding(sha256="a" * 64),))
    for seen, source in (("192.0.2.7", "http://192.0.2.7:8701"), ("2001:db8::7", None)):
        lab.hub.observed[peer] = (seen, 40_000)
        await worker.link.request(HAVE_PROTOCOL, notice.encode())
        (holder,) = (await holders_of(lab, PeerId("nobody"), "a" * 64)).holders
        assert holder.sources == (source or "http://[2001:db8::7]:8701", f"/p2p/{peer}")


@pytest.mark.parametrize(
    ("settings", "port", "sources", "http_port"),
    [
        ({}, None, (), None),
        ({"blob_listen": "0.0.0.0:0"}, 8701, (), 8701),
        ({"blob_listen": "[::]:8701"}, 8701, (), 8701),
        ({"blob_listen": "192.0.2.7:0"}, 8701, ("http://192.0.2.7:8701",), None),
        (
            {"blob_listen": "0.0.0.0:8701", "blob_url": "https://me.example/"},
            8701,
            ("https://me.example",),
            None,
        ),
    ],
)
def test_where_a_worker_says_it_is_asked(
    settings: dict[str, str], port: int | None, sources: tuple[str, ...], http_port: int | None
) -> None:
    config = WorkerConfig.model_validate({"orchestrator": "http://o", **settings})
    network = MemoryNetwork(MemoryHub(), NodeIdentity.generate())
    assert stall_of(config, network, port) == Stall(sources=sources, http_port=http_port)


@in_lab
async def test_blobs_of_medium_size_have_a_fine_list(lab: SwarmLab) -> None:
    store, fine = lab.origin.store, lab.origin.desk._fine
    small, medium = store.put_bytes(noise(SWARM_BYTES)), store.put_bytes(noise(SWARM_BYTES + 1))
    assert await fine.of(small.sha256) is None
    assert await fine.of("a" * 64) is None
    listed = await fine.of(medium.sha256)
    data = store.read(medium.sha256)
    parts = (data[at : at + FINE_CHUNK_BYTES] for at in range(0, len(data), FINE_CHUNK_BYTES))
    assert listed == "".join(sha256_hex(part) for part in parts)


@in_lab
async def test_who_disconnects_is_not_named_any_more(lab: SwarmLab) -> None:
    ref = lab.origin.store.put_bytes(noise(SIZE))
    worker = await lab.join()
    await worker.fetch(ref, lab.origin.source)
    await until_held(lab, ref.sha256, 1)
    await worker.network.stop()
    async with asyncio.timeout(20):
        while (await holders_of(lab, PeerId("x"), ref.sha256)).holders:  # noqa: ASYNC110  # likewise
            await asyncio.sleep(0.02)


@in_lab
async def test_without_the_orchestrators_word_blobs_come_from_where_they_always_did(
    lab: SwarmLab,
) -> None:
    data = noise(SIZE)
    ref = lab.origin.store.put_bytes(data)
    worker, strange = await lab.join(), await lab.join()
    lab.origin.members.strange.add(strange.network.peer_id)
    for asker in (worker, strange):
        assert (await asker.fetch(ref, lab.origin.source)).read_bytes() == data


@in_lab
async def test_when_all_holders_fail_the_orchestrators_own_connection_carries_it(
    lab: SwarmLab,
) -> None:
    data = noise(SIZE)
    ref = lab.origin.store.put_bytes(data)
    worker = await lab.join()
    dead = f"/memory/1/p2p/{worker.network.peer_id}"
    assert (await worker.fetch(ref, dead)).read_bytes() == data
    await worker.link.close()
    lost = BlobRef(sha256="a" * 64, size_bytes=SIZE)
    with pytest.raises(Unavailable, match="No source"):
        await worker.fetch(lost, dead)


def nudged(data: bytes, seed: int, share: float = 0.01) -> bytes:
    """The same with some of its words changed."""
    draw = np.random.default_rng(seed)
    words = np.frombuffer(data, np.uint16).copy()
    changed = draw.random(words.size) < share
    words[changed] += 1
    return words.tobytes()


@in_lab
async def test_who_holds_the_version_before_fetches_only_what_differs(lab: SwarmLab) -> None:
    store, deltas = lab.origin.store, lab.origin.deltas
    datas = [noise(SIZE)]
    for seed in range(3):
        datas.append(nudged(datas[-1], seed))
    refs = [store.put_bytes(data, pin=True) for data in datas]
    near, far, new = await lab.join(), await lab.join(), await lab.join()
    for worker in (near, far):
        await worker.fetch(refs[1], lab.origin.source)
    for number in (2, 3):
        before, after = version(number - 1, refs[number - 1]), version(number, refs[number])
        deltas.follow(before, after)
    await near.fetch(refs[2], lab.origin.source)
    carried = lab.origin.network.meters
    for worker in (near, far, new):
        before_bytes = carried.value("blob_bytes", plane="p2p", direction="out")
        path = await worker.fetch(refs[3], lab.origin.source)
        assert path.read_bytes() == datas[3]
        used = carried.value("blob_bytes", plane="p2p", direction="out") - before_bytes
        # The first needs one step, the second two; the third has nothing to build on, and
        # may find it with the others.
        assert worker is new or used < refs[3].size_bytes / 4
    assert carried.value("policy_deltas", outcome="kept") == 2


@in_lab
async def test_a_wrong_delta_costs_a_try_and_no_more(lab: SwarmLab) -> None:
    store, deltas = lab.origin.store, lab.origin.deltas
    old = noise(SIZE)
    new, other = nudged(old, 1), nudged(old, 2)
    old_ref, new_ref = store.put_bytes(old), store.put_bytes(new)
    worker = await lab.join()
    await worker.fetch(old_ref, lab.origin.source)
    deltas.follow(version(1, old_ref), version(2, store.put_bytes(other)))
    (step,) = await deltas.leading_to(BlobRef.model_validate(store.put_bytes(other)).sha256)
    deltas._by_target[new_ref.sha256] = step.model_copy(update={"target_sha256": new_ref.sha256})
    assert (await worker.fetch(new_ref, lab.origin.source)).read_bytes() == new


@in_lab
async def test_what_differs_in_all_its_bits_gets_no_delta(lab: SwarmLab) -> None:
    store, deltas = lab.origin.store, lab.origin.deltas
    old = noise(SIZE)
    refs = [store.put_bytes(data) for data in (old, noise(SIZE, 1), nudged(old, 1))]
    deltas.follow(version(1, refs[0]), version(2, refs[1]))
    assert await deltas.leading_to(refs[1].sha256) == ()
    deltas.follow(version(10, refs[0]), version(11, refs[2]))
    assert len(await deltas.leading_to(refs[2].sha256)) == 1
    deltas.forget_job(version(0, refs[0]).job_id)
    assert await deltas.leading_to(refs[2].sha256) == ()


def test_a_chain_is_taken_only_where_it_is_shorter() -> None:
    def step(base: str, target: str, size_bytes: int) -> DeltaStep:
        ref = BlobRef(sha256="9" * 64, size_bytes=size_bytes)
        return DeltaStep(base_sha256=base * 64, target_sha256=target * 64, blob=ref)

    ref = BlobRef(sha256="d" * 64, size_bytes=100)
    chain: tuple[DeltaStep, ...]
    chain = (step("c", "d", 40), step("b", "c", 40), step("a", "b", 40))

    def taken(*held: str) -> int:
        return len(shortest_chain(ref, chain, lambda sha256: sha256[0] in held))

    assert taken("c") == taken("c", "b", "a") == 1
    assert taken("b") == 2
    # Three steps together weigh more than the blob.
    assert taken("a") == taken() == 0
    assert shortest_chain(ref, chain[1:], lambda sha256: True) == ()
    # One step of two thirds is taken, two of them are not.
    chain = (step("c", "d", 66), step("b", "c", 66))
    assert taken("c") == 1
    assert taken("b") == 0


@pytest.mark.parametrize(
    ("address", "nearby"),
    [
        ("/ip4/192.168.1.5/tcp/4001", True),
        ("/ip4/127.0.0.1/tcp/4001", True),
        ("/ip4/93.184.216.34/tcp/4001", False),
        ("/ip4/169.254.169.254/tcp/80", False),
        ("/dns4/example.org/tcp/4001", False),
    ],
)
def test_private_addresses_are_asked_only_beside_the_orchestrator(
    address: str, nearby: bool
) -> None:
    peer = "12D3KooWGzxzKZYveHXtpG6AsrUJBcWxHBFS2HsEoGTxrMLvKXtf"
    assert is_nearby(f"{address}/p2p/{peer}") is nearby
    assert not is_nearby(None)


@pytest.mark.parametrize(
    ("address", "from_afar", "from_nearby"),
    [
        ("/ip4/93.184.216.34/tcp/4001", True, True),
        ("/ip4/192.168.1.5/tcp/4001", False, True),
        ("/ip4/127.0.0.1/tcp/4001", False, True),
        ("/ip4/169.254.169.254/tcp/80", False, False),
        ("/dns4/example.org/tcp/4001", False, False),
        ("", True, True),
    ],
)
def test_a_stranger_cannot_have_private_addresses_dialled(
    address: str, from_afar: bool, from_nearby: bool
) -> None:
    source = f"{address}/p2p/12D3KooWGzxzKZYveHXtpG6AsrUJBcWxHBFS2HsEoGTxrMLvKXtf"
    assert may_dial(source, nearby=False) is from_afar
    assert may_dial(source, nearby=True) is from_nearby
