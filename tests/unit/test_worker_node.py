"""A whole worker against an orchestrator in the same process."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account as EthAccount
from worker_double import (
    DOMAIN,
    JOB_ID,
    POLICY,
    make_task,
)
from worker_world import ACCOUNT, IDENTITY, ORCHESTRATOR, Drive, World, driver

from shoal.network.identity import NodeIdentity, public_key_of
from shoal.network.memory import MemoryNetwork
from shoal.protocol.canonical import sha256_hex
from shoal.protocol.errors import (
    Clock,
    Expired,
    InvalidRequest,
    NotFound,
    PeerFault,
    ShoalError,
    Unauthorised,
    Unavailable,
)
from shoal.protocol.ids import PeerId
from shoal.protocol.learning import CodecKind, CodecSpec, GradientSpec
from shoal.protocol.market import Lease, TaskKind
from shoal.protocol.node import (
    EVIDENCE_PROTOCOL,
    HELLO_PROTOCOL,
    LEASE_PROTOCOL,
    PROTOCOL_VERSION,
    EvidenceReply,
    EvidenceRequest,
    IdleReason,
)
from shoal.protocol.result import Verdict
from shoal.protocol.signing import Signed, sign
from shoal.provenance import dsse
from shoal.provenance.statement import require_same_work
from shoal.worker.events import JsonFormatter
from shoal.worker.evidence import EvidenceBook
from shoal.worker.ports import TaskInput, TaskOutput
from shoal.worker.session import Backoff
from shoal.worker.ways import find_addresses


@pytest.fixture
def drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Drive:
    return driver(tmp_path, monkeypatch)


def events(caplog: pytest.LogCaptureFixture, name: str) -> list[dict[str, Any]]:
    formatter = JsonFormatter("w")
    lines = [json.loads(formatter.format(r)) for r in caplog.records if r.message == name]
    return [line for line in lines if line["event"] == name]


@pytest.mark.parametrize("kind", list(TaskKind))
def test_a_leased_task_is_computed_handed_in_and_its_verdict_kept(
    drive: Drive, kind: TaskKind, tmp_path: Path
) -> None:
    async def script(world: World) -> None:
        await world.join()
        offer = world.offer(kind)
        assert (await world.double.send(offer, IDENTITY.peer_id)).refusal is None
        message = await world.next(world.double.inbox.results)
        lease, result = offer.lease.record, message.result
        assert result.policy_sha256 == POLICY.policy_sha256()
        assert (result.lease_id, result.task_sha256) == (lease.lease_id, offer.task.digest())
        assert world.blobs.tokens[result.payload.sha256] == offer.upload_token
        assert message.receipt.record.result_sha256 == result.digest()
        envelope = dsse.Envelope.from_text(message.statement)
        stated = dsse.verify(envelope, public_key_of(IDENTITY.peer_id))
        require_same_work(stated, lease, offer.task, result)
        verdict = world.double.verdict(message)
        world.double.beat = world.double.beat.model_copy(update={"verdicts": (verdict,)})
        while lease.lease_id not in (await world.next(world.double.inbox.beats)).acknowledged:
            pass
        kept = (tmp_path / "evidence" / "verdicts.jsonl").read_text().splitlines()
        assert len(kept) == 1
        assert json.loads(kept[0])["receipt"] == message.receipt.to_json()

    drive(script)


def test_a_full_disk_costs_no_result_and_acknowledges_no_verdict(
    drive: Drive, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_verdict, has_room = EvidenceBook.keep_verdict, False

    def refused(*_: object) -> bool:
        raise OSError(errno.ENOSPC, "No space left on device")

    def kept(book: EvidenceBook, verdict: Signed[Verdict]) -> bool:
        return keep_verdict(book, verdict) if has_room else refused()

    async def script(world: World) -> None:
        nonlocal has_room
        monkeypatch.setattr(EvidenceBook, "keep_receipt", refused)
        monkeypatch.setattr(EvidenceBook, "keep_verdict", kept)
        await world.join()
        await world.double.send(world.offer(), IDENTITY.peer_id)
        message = await world.next(world.double.inbox.results)
        verdict = world.double.verdict(message)
        world.double.beat = world.double.beat.model_copy(update={"verdicts": (verdict,)})
        for _ in range(3):
            assert (await world.next(world.double.inbox.beats)).acknowledged == ()
        has_room = True
        while not (await world.next(world.double.inbox.beats)).acknowledged:
            pass

    drive(script)


def test_heartbeats_report_progress_that_rises(drive: Drive) -> None:
    async def script(world: World) -> None:
        await world.join()
        world.engine.free.clear()
        await world.double.send(world.offer(), IDENTITY.peer_id)
        seen: list[int] = []
        while not seen or seen[-1] < 1:
            beat = await world.next(world.double.inbox.beats)
            seen += [lease.progress for lease in beat.leases]
        assert seen == sorted(seen)

    drive(script)


def test_every_kind_that_pays_gets_a_bid_at_the_floor_with_its_receipt_kept(
    drive: Drive, tmp_path: Path
) -> None:
    async def script(world: World) -> None:
        await world.join()
        bids = [(await world.next(world.double.inbox.bids)).record for _ in range(2)]
        assert {(bid.kind, bid.price_micros) for bid in bids} == {
            (TaskKind.ROLLOUT, 400),
            (TaskKind.EVALUATE, 10),
        }
        assert all(bid.job_id == JOB_ID and bid.node == IDENTITY.peer_id for bid in bids)
        assert bids[0].nonce != bids[1].nonce
        for _ in range(3):
            await world.next(world.double.inbox.beats)
        assert world.double.inbox.bids.empty()

    drive(script, **{"price.rollout": "0.0004", "price.gradient": "0.0011"})
    assert len((tmp_path / "evidence" / "bids.jsonl").read_text().splitlines()) == 2


def test_a_worker_priced_out_says_so(drive: Drive, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "shoal.worker")

    async def script(world: World) -> None:
        world.double.jobs = (world.double.open_job(reserve_micros=5),)
        world.double.beat = world.double.beat.model_copy(
            update={"open_jobs": world.double.jobs, "idle_reason": IdleReason.OUTBID}
        )
        await world.join()
        for _ in range(3):
            await world.next(world.double.inbox.beats)
        assert world.double.inbox.bids.empty()

    drive(script)
    assert {line["reason"] for line in events(caplog, "no_bid")} == {"above_reserve"}
    assert events(caplog, "idle_reason")[-1]["reason"] == "above_reserve"


def test_a_bid_receipt_signed_by_another_is_not_kept(
    drive: Drive, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    async def script(world: World) -> None:
        world.double.account = EthAccount.create()
        await world.join()
        # A fourth commitment is the first one sent anew: no receipt for it was kept.
        names = [
            (await world.next(world.double.inbox.commitments)).commitment
            for _ in range(len(TaskKind) + 1)
        ]
        assert names[0] in names[1:]
        assert world.double.inbox.bids.empty()

    drive(script)
    assert events(caplog, "bid_failed")
    assert not (tmp_path / "evidence" / "bids.jsonl").exists()


def test_a_verdict_signed_by_another_is_neither_kept_nor_acknowledged(
    drive: Drive, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    async def script(world: World) -> None:
        await world.join()
        await world.double.send(world.offer(), IDENTITY.peer_id)
        message = await world.next(world.double.inbox.results)
        forged = world.double.verdict(message, EthAccount.create())
        world.double.beat = world.double.beat.model_copy(update={"verdicts": (forged,)})
        beats = world.double.inbox.beats
        while not beats.empty():
            beats.get_nowait()
        # The second of these is sent once the answer to the first has been read.
        for _ in range(2):
            assert (await world.next(beats)).acknowledged == ()

    drive(script)
    assert events(caplog, "verdict_not_signed")
    assert not (tmp_path / "evidence" / "verdicts.jsonl").exists()


def test_a_revoked_lease_is_dropped(drive: Drive, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "shoal.worker")

    async def script(world: World) -> None:
        await world.join()
        world.engine.free.clear()
        offer = world.offer()
        await world.double.send(offer, IDENTITY.peer_id)
        while not (await world.next(world.double.inbox.beats)).leases:
            pass
        world.double.beat = world.double.beat.model_copy(
            update={"revoked": (offer.lease.record.lease_id,)}
        )
        while (await world.next(world.double.inbox.beats)).leases:
            pass
        world.engine.free.set()
        await world.double.send(world.offer(number=1), IDENTITY.peer_id)
        message = await world.next(world.double.inbox.results)
        assert message.result.lease_id == "lease_00000001"

    drive(script)
    assert events(caplog, "lease_dropped")[0]["reason"] == "revoked"


def test_an_offer_names_what_was_taken_back_to_make_room_for_it(
    drive: Drive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.worker.node.MAX_HELD_LEASES", 1)

    async def script(world: World) -> None:
        await world.join()
        world.engine.free.clear()
        first, second = world.offer(), world.offer(number=1)
        assert (await world.double.send(first, IDENTITY.peer_id)).refusal is None
        full = await world.double.send(second, IDENTITY.peer_id)
        assert "are held already" in str(full.refusal)
        instead = second.model_copy(update={"revoked": (first.lease.record.lease_id,)})
        assert (await world.double.send(instead, IDENTITY.peer_id)).refusal is None
        world.engine.free.set()
        message = await world.next(world.double.inbox.results)
        assert message.result.lease_id == second.lease.record.lease_id

    drive(script)


def test_a_repeated_offer_is_accepted_once_and_an_older_epoch_refused(drive: Drive) -> None:
    async def script(world: World) -> None:
        await world.join()
        world.engine.free.clear()
        newer = world.offer(lease_epoch=2)
        for _ in range(2):
            assert (await world.double.send(newer, IDENTITY.peer_id)).refusal is None
        older = await world.double.send(world.offer(lease_epoch=1), IDENTITY.peer_id)
        assert "newer epoch" in str(older.refusal)
        world.engine.free.set()
        await world.next(world.double.inbox.results)
        assert len(world.engine.ran) == 1

    drive(script)


def test_hostile_offers_leave_the_worker_working(drive: Drive) -> None:
    async def script(world: World) -> None:
        await world.join()
        request = world.double.network.request
        for payload in (b"", b"{", b"\xff" * 100, b"[" * 5_000, b'{"lease": 1}'):
            with pytest.raises(PeerFault):
                await request(IDENTITY.peer_id, LEASE_PROTOCOL, payload, timeout_s=5)
        for changes in ({"node": ORCHESTRATOR.peer_id}, {"task_sha256": "0" * 64}):
            lease = world.offer().lease.record.model_copy(update=changes)
            offer = world.double.offer(
                make_task(TaskKind.ROLLOUT), **{k: getattr(lease, k) for k in Lease.model_fields}
            )
            with pytest.raises(PeerFault):
                await world.double.send(offer, IDENTITY.peer_id)
        stranger = MemoryNetwork(world.hub, NodeIdentity(b"s" * 32))
        await stranger.start()
        with pytest.raises((Unauthorised, Unavailable)):
            await stranger.request(
                IDENTITY.peer_id, LEASE_PROTOCOL, world.offer().encode(), timeout_s=5
            )
        await stranger.stop()
        await world.double.send(world.offer(number=1), IDENTITY.peer_id)
        await world.next(world.double.inbox.results)

    drive(script)


@pytest.mark.parametrize(
    ("refusal", "arrives"),
    [
        (Unavailable("busy"), True),
        (Expired("too slow", clock=Clock.REPLY), True),
        (Expired("the lease is over", clock=Clock.DEADLINE), False),
        (PeerFault("that is not right"), False),
    ],
)
def test_a_result_is_sent_again_while_that_can_help(
    drive: Drive, refusal: ShoalError, arrives: bool
) -> None:
    async def script(world: World) -> None:
        await world.join()
        world.double.refuse_result = refusal
        await world.double.send(world.offer(), IDENTITY.peer_id)
        while world.double.refuse_result is not None:
            await world.next(world.double.inbox.beats)
        await world.double.send(world.offer(number=1), IDENTITY.peer_id)
        wanted = {"lease_00000000", "lease_00000001"} if arrives else {"lease_00000001"}
        got = {(await world.next(world.double.inbox.results)).result.lease_id for _ in wanted}
        assert got == wanted

    drive(script)


def test_a_worker_cut_off_comes_back_and_hands_in_what_it_computed(drive: Drive) -> None:
    async def script(world: World) -> None:
        await world.join()
        for _ in TaskKind:
            await world.next(world.double.inbox.bids)
        world.engine.free.clear()
        await world.double.send(world.offer(), IDENTITY.peer_id)
        await asyncio.to_thread(world.engine.started.wait, 5)
        await world.double.network.stop()
        world.engine.free.set()
        before = world.double
        world.double = world.new_orchestrator()
        world.double.account, world.double.greeting = before.account, before.greeting
        await world.double.network.start()
        await world.next(world.double.inbox.joins)
        message = await world.next(world.double.inbox.results)
        assert message.result.lease_id == "lease_00000000"
        # The new orchestrator may hold none of the old bids: the same are all sent again.
        again = {(await world.next(world.double.inbox.commitments)).commitment for _ in TaskKind}
        assert again == set(before.committed)

    drive(script)


def test_a_worker_the_orchestrator_forgot_joins_again(drive: Drive) -> None:
    async def script(world: World) -> None:
        await world.join()
        for refusal in (Unauthorised("who are you?"), NotFound("no such node")):
            world.double.refuse_beat = refusal
            await world.next(world.double.inbox.joins)

    drive(script)


def test_an_orchestrator_that_comes_back_on_another_chain_is_left(drive: Drive) -> None:
    async def script(world: World) -> None:
        await world.join()
        domain = world.double.greeting.domain.model_copy(update={"chain_id": 1})
        world.double.greeting = world.double.greeting.model_copy(update={"domain": domain})
        world.double.refuse_beat = Unauthorised("who are you?")
        assert world.running is not None
        with pytest.raises(InvalidRequest, match="another chain"):
            await world.running

    drive(script)


@pytest.mark.parametrize(
    ("version", "words"),
    [(PROTOCOL_VERSION + 1, "update this worker"), (0, "update the orchestrator")],
)
def test_a_stale_version_is_said_in_one_sentence(drive: Drive, version: int, words: str) -> None:
    async def script(world: World) -> None:
        async def other_version(peer: str, payload: bytes) -> bytes:
            return json.dumps({"protocol_version": version, "new_field": 1}).encode()

        world.double.network.serve(HELLO_PROTOCOL, other_version)
        with pytest.raises(InvalidRequest, match=words) as caught:
            await world.join()
        assert caught.value.code == "stale_version"

    drive(script)


@pytest.mark.parametrize(
    "failure",
    [
        InvalidRequest("The node follows chain 1, not 31337.", code="wrong_chain"),
        Unavailable("Nothing answers at http://rpc.invalid."),
    ],
)
def test_a_wrong_or_absent_chain_ends_the_start(drive: Drive, failure: ShoalError) -> None:
    async def script(world: World) -> None:
        world.chain_failure = failure
        with pytest.raises(type(failure)) as caught:
            await world.join()
        assert caught.value is failure
        assert world.double.inbox.joins.empty()

    drive(script)


def test_a_worker_without_stake_does_not_join(drive: Drive) -> None:
    async def script(world: World) -> None:
        world.chain.staked = 0
        with pytest.raises(Unauthorised, match="--stake"):
            await world.join()
        assert world.double.inbox.joins.empty()

    drive(script)


def test_a_greeting_with_two_escrows_is_refused(drive: Drive) -> None:
    async def script(world: World) -> None:
        domain = world.double.greeting.domain.model_copy(update={"escrow": "0x" + "9" * 40})
        world.double.greeting = world.double.greeting.model_copy(update={"domain": domain})
        with pytest.raises(PeerFault, match="one escrow"):
            await world.join()

    drive(script)


def test_nobody_at_the_address_is_said_after_the_connect_timeout(drive: Drive) -> None:
    async def script(world: World) -> None:
        with pytest.raises(Unavailable, match="Nobody answers"):
            await world.worker.run(world.stop)

    drive(script)


def test_a_stopping_worker_hands_in_what_is_done_and_drops_the_rest(drive: Drive) -> None:
    async def script(world: World) -> None:
        await world.join()
        world.engine.free.clear()
        await world.double.send(world.offer(), IDENTITY.peer_id)
        await asyncio.to_thread(world.engine.started.wait, 5)
        world.stop.set()
        assert world.running is not None
        async with asyncio.timeout(30):
            await world.running
        assert world.double.inbox.results.empty()

    drive(script)


def test_backoff_doubles_to_a_limit_and_starts_over() -> None:
    pause = Backoff()
    pauses = [pause.next_s() for _ in range(12)]
    assert 0.05 <= pauses[0] <= 0.1
    assert all(0.05 * 2**n <= p <= 0.1 * 2**n for n, p in enumerate(pauses[:6]))
    assert 5 <= pauses[-1] <= 10
    pause.reset()
    assert pause.next_s() <= 0.1


@pytest.mark.parametrize("text", ["example.org", "ftp://example.org", "12D3KooW"])
def test_an_orchestrator_that_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="neither an address"):
        asyncio.run(find_addresses(text))


def test_residuals_are_shown_to_the_orchestrator_alone_and_fed_back_once(drive: Drive) -> None:
    feedback = GradientSpec(codec=CodecSpec(kind=CodecKind.INT8, error_feedback=1.0))
    given: list[bytes | None] = []

    async def script(world: World) -> None:
        compute = world.engine.run

        def leave(task: Any, inputs: TaskInput, on_progress: Callable[[], None]) -> TaskOutput:
            given.append(inputs.residual)
            output = compute(task, inputs, on_progress)
            return replace(output, residual=f"residual {len(given)}".encode())

        world.engine.run = leave  # type: ignore[method-assign]
        await world.join()

        def asking(number: int, data: bytes) -> EvidenceRequest:
            return EvidenceRequest(
                lease_id=f"lease_{number:08d}", blob_sha256=sha256_hex(data), upload_token="7" * 32
            )

        async def ask(number: int, data: bytes) -> bool:
            reply = await world.double.network.request(
                IDENTITY.peer_id, EVIDENCE_PROTOCOL, asking(number, data).encode(), timeout_s=5
            )
            return EvidenceReply.decode(reply).uploaded

        async def work(number: int, accepted: bool) -> None:
            task = make_task(TaskKind.GRADIENT, number).model_copy(update={"gradient": feedback})
            offer = world.double.offer(task, ACCOUNT.address, IDENTITY.peer_id, number=number)
            assert (await world.double.send(offer, IDENTITY.peer_id)).refusal is None
            message = await world.next(world.double.inbox.results)
            assert not await ask(number, b"never kept")
            assert await ask(number, f"residual {number}".encode())
            record = world.double.verdict(message).record.model_copy(update={"accepted": accepted})
            verdict = sign(record, DOMAIN, world.double.account)
            world.double.beat = world.double.beat.model_copy(update={"verdicts": (verdict,)})
            while record.lease_id not in (await world.next(world.double.inbox.beats)).acknowledged:
                pass

        for number, accepted in ((1, True), (2, False), (3, True)):
            await work(number, accepted)
        assert given == [None, b"residual 1", b"residual 1"]
        assert world.blobs.tokens[sha256_hex(b"residual 1")] == "7" * 32
        # What has its verdict is not shown any more, and nothing ever to anybody else.
        assert not await ask(3, b"residual 3")
        with pytest.raises(Unauthorised):
            await world.worker._on_evidence(PeerId("stranger"), asking(3, b"any").encode())

    drive(script)
