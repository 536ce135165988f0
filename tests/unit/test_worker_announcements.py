"""What a worker hears: whose word it takes, how old, how often, and what it does with it."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from eth_account.signers.local import LocalAccount
from market_records import DOMAIN, JOB_ID, NOW_MS, account, lot
from sealed_market import Stage

from shoal.network.bans import Fault
from shoal.network.identity import NodeIdentity
from shoal.network.memory import MemoryHub, MemoryNetwork
from shoal.network.port import TopicVerdict
from shoal.protocol.announcement import (
    CERTIFICATES_TOPIC,
    LOTS_TOPIC,
    MAX_AGE_MS,
    MAX_ANNOUNCEMENT_BYTES,
    MAX_SKEW_MS,
    POLICIES_TOPIC,
    CertificateAnnouncement,
    LotAnnouncement,
    PolicyAnnouncement,
    topic_of,
)
from shoal.protocol.blob import BlobRef
from shoal.protocol.certificate import ClearingCertificate
from shoal.protocol.clock import ManualTime
from shoal.protocol.errors import Unavailable
from shoal.protocol.node import ContractAddresses, HelloReply
from shoal.protocol.policy import MAX_ADAPTER_BYTES, PolicyVersion
from shoal.protocol.signing import Domain, Signed, sign
from shoal.worker.announcements import _MAX_REMEMBERED, Announcements, Interests
from shoal.worker.evidence import EvidenceBook

WAIT_S = 20.0
HOME = account(90)
STRANGER = account(91)
OTHER_JOB = "0x" + "cd" * 32


def lots(job_id: str = JOB_ID, *, at_ms: int = NOW_MS, signer: LocalAccount = HOME) -> bytes:
    record = LotAnnouncement(lots=(lot(job_id=job_id),), announced_at_ms=at_ms)
    return sign(record, DOMAIN, signer).encode()


def policy(version: int, job_id: str = JOB_ID, size_bytes: int = 8) -> PolicyVersion:
    adapter = BlobRef(sha256=f"{version:064x}", size_bytes=size_bytes)
    return PolicyVersion(job_id=job_id, version=version, base_sha256="1" * 64, adapter=adapter)


def policies(*versions: PolicyVersion, sources: tuple[str, ...] = (), at_ms: int = NOW_MS) -> bytes:
    record = PolicyAnnouncement(policies=versions, sources=sources, announced_at_ms=at_ms)
    return sign(record, DOMAIN, HOME).encode()


def certificates(
    *given: Signed[ClearingCertificate], at_ms: int = NOW_MS, signer: LocalAccount = HOME
) -> bytes:
    record = CertificateAnnouncement(certificates=given, announced_at_ms=at_ms)
    return sign(record, DOMAIN, signer).encode()


def greeting() -> HelloReply:
    return HelloReply(
        protocol_version=1,
        software_version="0",
        domain=DOMAIN,
        contracts=ContractAddresses(
            token="0x" + "1" * 40,
            stake_vault="0x" + "1" * 40,
            job_escrow=DOMAIN.escrow,
            provenance_log="0x" + "1" * 40,
            fault_court="0x" + "1" * 40,
            model_shares="0x" + "1" * 40,
        ),
        orchestrator=HOME.address,
        min_stake_micros=0,
        rpc_urls=(),
        api_url="http://a.invalid",
        blob_urls=(),
        heartbeat_ms=1_000,
    )


class Ear:
    """A worker's announcements over a network in memory, beside a node that announces."""

    def __init__(self, folder: Path) -> None:
        hub = MemoryHub()
        self.time = ManualTime(NOW_MS)
        self.network = MemoryNetwork(hub, NodeIdentity(bytes(31) + b"\1"))
        self.speaker = MemoryNetwork(hub, NodeIdentity(bytes(31) + b"\2"))
        self.folder = folder
        self.new_jobs = 0
        self.fetched: asyncio.Queue[tuple[BlobRef, Sequence[str]]] = asyncio.Queue()
        self.gate = asyncio.Event()
        self.gate.set()
        self.failure: Exception | None = None
        self.announcements = Announcements(
            self.network,
            self.time,
            EvidenceBook(folder),
            Interests(
                known=lambda: frozenset({JOB_ID}),
                served=lambda: frozenset({JOB_ID}),
                new_job=self._note_new,
                prefetch=self._prefetch,
            ),
        )

    def _note_new(self) -> None:
        self.new_jobs += 1

    async def _prefetch(self, ref: BlobRef, sources: Sequence[str]) -> None:
        await self.gate.wait()
        self.fetched.put_nowait((ref, sources))
        if self.failure is not None:
            raise self.failure

    def verdict(self, payload: bytes, topic: str = LOTS_TOPIC) -> TopicVerdict:
        return self.announcements.check(topic, DOMAIN, HOME.address, payload)

    async def say(self, topic: str, payload: bytes) -> None:
        await self.speaker.publish(topic_of(topic, DOMAIN, HOME.address), payload)
        # Handlers are tasks of this loop: the last of them has begun once the queue turned.
        for _ in range(5):
            await asyncio.sleep(0)

    def certificates(self) -> list[str]:
        path = self.folder / "certificates.jsonl"
        return path.read_text().splitlines() if path.exists() else []


@asynccontextmanager
async def ear(folder: Path) -> AsyncIterator[Ear]:
    made = Ear(folder)
    await made.network.start()
    await made.speaker.start()
    await made.speaker.connect(made.network.addresses[0], timeout_s=WAIT_S)
    made.announcements.follow(greeting())
    try:
        yield made
    finally:
        await made.announcements.close()
        await made.network.stop()
        await made.speaker.stop()


def run(folder: Path, check: Callable[[Ear], Awaitable[None]]) -> None:
    async def inside() -> None:
        async with ear(folder) as made:
            await check(made)

    asyncio.run(inside())


def test_only_what_the_orchestrator_signed_for_this_chain_is_taken(tmp_path: Path) -> None:
    made = Ear(tmp_path)
    assert made.verdict(lots()) is TopicVerdict.ACCEPT
    assert made.verdict(lots(signer=STRANGER)) is TopicVerdict.REJECT
    record = LotAnnouncement(lots=(lot(),), announced_at_ms=NOW_MS)
    elsewhere = Domain(chain_id=1, escrow=DOMAIN.escrow)
    assert made.verdict(sign(record, elsewhere, HOME).encode()) is TopicVerdict.REJECT


def test_a_changed_byte_is_no_longer_signed(tmp_path: Path) -> None:
    made = Ear(tmp_path)
    payload = lots().replace(b'"reserve_micros":200', b'"reserve_micros":201')
    assert payload != lots()
    assert made.verdict(payload) is TopicVerdict.REJECT


def test_the_kind_of_a_record_is_part_of_what_is_signed(tmp_path: Path) -> None:
    made = Ear(tmp_path)
    # Both are empty but for their time, so only the kind tells them apart.
    empty = PolicyAnnouncement(policies=(), announced_at_ms=NOW_MS)
    signature = sign(empty, DOMAIN, HOME).signature
    forged = LotAnnouncement(lots=(), announced_at_ms=NOW_MS)
    payload = sign(forged, DOMAIN, HOME).model_copy(update={"signature": signature}).encode()
    assert made.verdict(payload) is TopicVerdict.REJECT
    assert made.verdict(sign(forged, DOMAIN, HOME).encode()) is TopicVerdict.ACCEPT


@pytest.mark.parametrize(
    ("ahead_ms", "verdict"),
    [
        (MAX_SKEW_MS, TopicVerdict.ACCEPT),
        (MAX_SKEW_MS + 1, TopicVerdict.IGNORE),
        (-MAX_AGE_MS, TopicVerdict.ACCEPT),
        (-MAX_AGE_MS - 1, TopicVerdict.IGNORE),
    ],
)
def test_a_message_too_old_or_too_far_ahead_is_nobodys_fault_and_not_taken(
    tmp_path: Path, ahead_ms: int, verdict: TopicVerdict
) -> None:
    assert Ear(tmp_path).verdict(lots(at_ms=NOW_MS + ahead_ms)) is verdict


def test_a_message_heard_before_is_not_taken_again(tmp_path: Path) -> None:
    made = Ear(tmp_path)
    assert made.verdict(lots()) is TopicVerdict.ACCEPT
    assert made.verdict(lots()) is TopicVerdict.IGNORE
    assert made.verdict(lots(at_ms=NOW_MS + 1)) is TopicVerdict.ACCEPT


def test_the_memory_of_what_was_heard_is_bounded(tmp_path: Path) -> None:
    heard = Ear(tmp_path).announcements._heard
    for number in range(_MAX_REMEMBERED + 5):
        assert heard.add(number.to_bytes(32, "big"))
    assert not heard.has(bytes(32))
    assert heard.has(_MAX_REMEMBERED.to_bytes(32, "big"))
    assert not heard.add(_MAX_REMEMBERED.to_bytes(32, "big"))


def test_old_messages_said_again_crowd_out_no_newer_one_and_cost_one_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.worker.announcements._MAX_REMEMBERED", 2)
    made = Ear(tmp_path)
    assert made.verdict(lots()) is TopicVerdict.ACCEPT
    for age in range(1, 6):
        old = lots(at_ms=NOW_MS - MAX_AGE_MS - age)
        assert made.verdict(old) is TopicVerdict.IGNORE
    monkeypatch.setattr(Signed, "require_signer", lambda *_: pytest.fail("looked at again"))
    assert made.verdict(old) is TopicVerdict.IGNORE
    assert made.verdict(lots()) is TopicVerdict.IGNORE


def test_one_record_in_other_words_is_refused(tmp_path: Path) -> None:
    made = Ear(tmp_path)
    for payload in (b" " + lots(), lots() + b"\n", lots().replace(b":", b": ", 1)):
        assert made.verdict(payload) is TopicVerdict.REJECT
    assert made.verdict(lots()) is TopicVerdict.ACCEPT


@pytest.mark.parametrize("topic", [LOTS_TOPIC, POLICIES_TOPIC, CERTIFICATES_TOPIC])
@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{}",
        b"null",
        b"\xff\xfe",
        b"[" * 40_000,
        b'{"record":{},"signature":"0x00"}',
        b" " * (MAX_ANNOUNCEMENT_BYTES + 1),
    ],
)
def test_what_is_no_announcement_is_its_bearers_fault(
    tmp_path: Path, topic: str, payload: bytes
) -> None:
    assert Ear(tmp_path).verdict(payload, topic) is TopicVerdict.REJECT


def test_a_signature_in_a_second_form_is_refused(tmp_path: Path) -> None:
    made = Ear(tmp_path)
    signed = sign(LotAnnouncement(lots=(), announced_at_ms=NOW_MS), DOMAIN, HOME)
    raw = bytearray.fromhex(signed.signature[2:])
    order = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
    raw[32:64] = (order - int.from_bytes(raw[32:64], "big")).to_bytes(32, "big")
    raw[64] ^= 27 ^ 28
    twin = signed.model_copy(update={"signature": "0x" + raw.hex()})
    assert made.verdict(twin.encode()) is TopicVerdict.REJECT


def test_a_lot_of_an_unknown_job_asks_for_its_terms_and_one_of_a_known_job_does_not(
    tmp_path: Path,
) -> None:
    async def check(made: Ear) -> None:
        await made.say(LOTS_TOPIC, lots())
        assert made.new_jobs == 0
        await made.say(LOTS_TOPIC, lots(OTHER_JOB))
        assert made.new_jobs == 1

    run(tmp_path, check)


def test_a_job_that_is_about_to_open_its_first_lot_is_asked_for_already(tmp_path: Path) -> None:
    def jobs(*job_ids: str) -> bytes:
        record = LotAnnouncement(lots=(), jobs=job_ids, announced_at_ms=NOW_MS)
        return sign(record, DOMAIN, HOME).encode()

    async def check(made: Ear) -> None:
        await made.say(LOTS_TOPIC, jobs(JOB_ID))
        assert made.new_jobs == 0
        await made.say(LOTS_TOPIC, jobs(JOB_ID, OTHER_JOB))
        assert made.new_jobs == 1

    run(tmp_path, check)


def test_a_policy_version_of_a_served_job_is_fetched_ahead(tmp_path: Path) -> None:
    async def check(made: Ear) -> None:
        source = "http://blobs.invalid"
        await made.say(POLICIES_TOPIC, policies(policy(3), policy(9, OTHER_JOB), sources=(source,)))
        async with asyncio.timeout(WAIT_S):
            assert await made.fetched.get() == (policy(3).adapter, (source,))
        assert made.fetched.empty()

    run(tmp_path, check)


def test_of_versions_that_wait_only_the_newest_is_fetched_and_one_at_a_time(
    tmp_path: Path,
) -> None:
    async def check(made: Ear) -> None:
        made.gate.clear()
        for version in range(5):
            await made.say(POLICIES_TOPIC, policies(policy(version)))
        made.gate.set()
        async with asyncio.timeout(WAIT_S):
            got = [(await made.fetched.get())[0] for _ in range(2)]
        assert got == [policy(0).adapter, policy(4).adapter]
        assert made.fetched.empty()

    run(tmp_path, check)


@pytest.mark.parametrize(
    "failure", [Unavailable("Nobody has it."), OSError(errno.ENOSPC, "No space left on device")]
)
def test_an_adapter_beyond_the_cap_is_not_fetched_and_a_failure_ends_nothing(
    tmp_path: Path, failure: Exception
) -> None:
    async def check(made: Ear) -> None:
        await made.say(POLICIES_TOPIC, policies(policy(1, size_bytes=MAX_ADAPTER_BYTES + 1)))
        made.failure = failure
        made.gate.clear()
        for version in (2, 3):
            await made.say(POLICIES_TOPIC, policies(policy(version)))
        made.gate.set()
        async with asyncio.timeout(WAIT_S):
            got = [(await made.fetched.get())[0] for _ in range(2)]
        assert got == [policy(2).adapter, policy(3).adapter]

    run(tmp_path, check)


def test_a_certificate_of_a_known_job_is_kept_within_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check(made: Ear) -> None:
        certificate = Stage(orchestrator=HOME).published().certificate
        elsewhere = certificate.record.lot.model_copy(update={"job_id": OTHER_JOB})
        unknown = sign(certificate.record.model_copy(update={"lot": elsewhere}), DOMAIN, HOME)
        await made.say(CERTIFICATES_TOPIC, certificates(certificate, unknown, certificate))
        assert [type(certificate).model_validate_json(line) for line in made.certificates()] == [
            certificate,
            certificate,
        ]
        monkeypatch.setattr("shoal.worker.evidence._MAX_CERTIFICATES_BYTES", 10)
        later = sign(
            certificate.record.model_copy(update={"issued_at_ms": NOW_MS + 1}), DOMAIN, HOME
        )
        await made.say(CERTIFICATES_TOPIC, certificates(later))
        assert len(made.certificates()) == 1
        assert (tmp_path / "certificates.old.jsonl").exists()

    run(tmp_path, check)


def test_a_certificate_is_kept_only_if_the_orchestrator_signed_it_by_itself(
    tmp_path: Path,
) -> None:
    async def check(made: Ear) -> None:
        genuine = Stage(orchestrator=HOME).published().certificate
        forged = Stage(orchestrator=STRANGER).published().certificate
        await made.say(CERTIFICATES_TOPIC, certificates(forged, genuine))
        kept = [type(genuine).model_validate_json(line) for line in made.certificates()]
        assert kept == [genuine]

    run(tmp_path, check)


def test_certificates_told_by_another_are_not_taken_whoever_signed_them(tmp_path: Path) -> None:
    made = Ear(tmp_path)
    genuine = Stage(orchestrator=HOME).published().certificate
    again = certificates(genuine, signer=STRANGER)
    assert made.verdict(again, CERTIFICATES_TOPIC) is TopicVerdict.REJECT
    assert made.verdict(certificates(genuine), CERTIFICATES_TOPIC) is TopicVerdict.ACCEPT


def test_a_liar_is_penalised_and_banned_and_an_honest_bearer_of_old_news_is_not(
    tmp_path: Path,
) -> None:
    async def check(made: Ear) -> None:
        liar, bearer = made.speaker.peer_id, made.network
        for number in range(30):
            await made.say(LOTS_TOPIC, lots(at_ms=NOW_MS - MAX_AGE_MS - 1 - number))
        assert liar in bearer.peers()
        assert bearer.meters.value("gossip_dropped", cause="ignore") == 30
        for number in range(30):
            await made.say(LOTS_TOPIC, lots(at_ms=NOW_MS + number, signer=STRANGER))
        assert liar not in bearer.peers()
        assert bearer.meters.value("bans", reason=Fault.BAD_GOSSIP.value) == 1

    run(tmp_path, check)


def test_following_twice_hears_each_message_once(tmp_path: Path) -> None:
    async def check(made: Ear) -> None:
        made.announcements.follow(greeting())
        await made.say(LOTS_TOPIC, lots(OTHER_JOB))
        assert made.new_jobs == 1

    run(tmp_path, check)


def test_another_orchestrators_topic_is_not_heard(tmp_path: Path) -> None:
    async def check(made: Ear) -> None:
        elsewhere = topic_of(LOTS_TOPIC, DOMAIN, STRANGER.address)
        await made.speaker.publish(elsewhere, lots(OTHER_JOB, signer=STRANGER))
        for _ in range(5):
            await asyncio.sleep(0)
        assert made.new_jobs == 0
        assert made.speaker.peer_id in made.network.peers()

    run(tmp_path, check)
