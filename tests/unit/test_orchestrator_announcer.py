"""What the orchestrator announces: signed, together where it comes in bursts, and bounded."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from market_records import lot
from orchestrator_lab import Lab, arrival, open_lab, run
from sealed_market import Stage

from shoal.orchestrator import announcer as announcer_module
from shoal.orchestrator.announcer import TOLD_AGAIN_MS
from shoal.protocol.announcement import (
    CERTIFICATES_TOPIC,
    LOTS_TOPIC,
    MAX_ANNOUNCEMENT_BYTES,
    MAX_CERTIFICATES,
    MAX_LOTS,
    POLICIES_TOPIC,
    SignedCertificates,
    SignedLots,
    SignedPolicies,
    topic_of,
)
from shoal.protocol.blob import BlobRef
from shoal.protocol.market import MAX_LAGS
from shoal.protocol.policy import PolicyVersion


def policy(job: int, version: int) -> PolicyVersion:
    return PolicyVersion(
        job_id=f"0x{job:064x}",
        version=version,
        base_sha256="1" * 64,
        adapter=BlobRef(sha256="2" * 64, size_bytes=8),
    )


async def listen(lab: Lab, topic: str) -> asyncio.Queue[bytes]:
    """What a worker hears on the orchestrator's topic."""
    heard: asyncio.Queue[bytes] = asyncio.Queue()
    peer = await lab.peer()

    async def hear(_: object, data: bytes) -> None:
        heard.put_nowait(data)

    account = lab.context.account.address
    peer.network.subscribe(topic_of(topic, lab.context.domain, account), hear)
    return heard


def test_a_burst_of_lots_is_a_few_messages_and_the_oldest_give_way(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            heard, announcer = await listen(lab, LOTS_TOPIC), lab.orchestrator.auctioneer.announcer
            for epoch in range(10 * MAX_LOTS):
                announcer.lot(lot(epoch=epoch))
            told: list[int] = []
            for _ in range(10):
                await announcer.flush()
            while len(told) < 4 * MAX_LOTS:
                message = SignedLots.decode(await arrival(heard))
                assert len(message.record.lots) <= MAX_LOTS
                told += [announced.epoch for announced in message.record.lots]
            assert told == list(range(6 * MAX_LOTS, 10 * MAX_LOTS))
            assert heard.empty()

    run(scenario)


def test_of_a_job_that_was_told_of_no_lot_is_told_for_a_while(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            heard, announcer = await listen(lab, LOTS_TOPIC), lab.orchestrator.auctioneer.announcer
            announcer.lot(lot(epoch=1))
            announcer.lot(lot(epoch=2))
            await announcer.flush()
            assert len(SignedLots.decode(await arrival(heard)).record.lots) == 2
            other = lot(job_id=f"0x{1:064x}")
            lab.time.advance(TOLD_AGAIN_MS - 1)
            announcer.lot(lot(epoch=3))
            announcer.lot(other)
            await announcer.flush()
            assert SignedLots.decode(await arrival(heard)).record.lots == (other,)
            lab.time.advance(1)
            announcer.lot(lot(epoch=4))
            await announcer.flush()
            assert SignedLots.decode(await arrival(heard)).record.lots == (lot(epoch=4),)
            # A clock that was set back must not silence it.
            lab.time.advance(-60_000)
            announcer.lot(lot(epoch=5))
            await announcer.flush()
            assert SignedLots.decode(await arrival(heard)).record.lots == (lot(epoch=5),)

    run(scenario)


def test_jobs_about_to_begin_are_told_even_before_they_have_a_lot(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            heard, announcer = await listen(lab, LOTS_TOPIC), lab.orchestrator.auctioneer.announcer
            lab.start(announcer.run())
            announcer.job(f"0x{1:064x}")
            record = SignedLots.decode(await arrival(heard)).record
            assert (record.lots, record.jobs) == ((), (f"0x{1:064x}",))
            for number in range(2 * MAX_LOTS):
                announcer.job(f"0x{number:064x}")
            await announcer.flush()
            await announcer.flush()
            for _ in range(2):
                assert len(SignedLots.decode(await arrival(heard)).record.jobs) == MAX_LOTS
            assert heard.empty()

    run(scenario)


def test_of_a_jobs_versions_the_newest_is_told_with_where_it_is(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            heard, announcer = (
                await listen(lab, POLICIES_TOPIC),
                lab.orchestrator.auctioneer.announcer,
            )
            for version in range(5):
                announcer.policy(policy(1, version))
            announcer.policy(policy(2, 0))
            await announcer.flush()
            signed = SignedPolicies.decode(await arrival(heard))
            assert signed.record.policies == (policy(1, 4), policy(2, 0))
            assert signed.record.sources == ("http://b.invalid",)
            assert signed.record.announced_at_ms == lab.time.now_ms()
            signed.require_signer(lab.context.domain, lab.context.account.address)
            await announcer.flush()
            assert heard.empty()

    run(scenario)


@pytest.mark.parametrize(("num_bytes", "together"), [(0, 1), (2, 2), (100, MAX_CERTIFICATES)])
def test_as_many_certificates_go_together_as_fit_each_as_it_was_signed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_bytes: int, together: int
) -> None:
    """``num_bytes`` is the room of a message, in certificates and somewhat more."""

    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            heard, announcer = (
                await listen(lab, CERTIFICATES_TOPIC),
                lab.orchestrator.auctioneer.announcer,
            )
            certificate = Stage().published().certificate
            room = int(len(certificate.encode()) * (num_bytes + 0.5)) + 256
            monkeypatch.setattr(announcer_module, "MAX_ANNOUNCEMENT_BYTES", room)
            for _ in range(MAX_CERTIFICATES + 3):
                announcer.certificate(certificate)
            await announcer.flush()
            monkeypatch.undo()
            if num_bytes:
                told = SignedCertificates.decode(await arrival(heard))
                assert told.record.certificates == (certificate,) * together
                told.require_signer(lab.context.domain, lab.context.account.address)
                assert len(told.encode()) <= room
            # One that fits into no message is passed over, and holds up none behind it.
            assert heard.empty()
            await announcer.flush()
            rest = SignedCertificates.decode(await arrival(heard)).record.certificates
            assert rest == (certificate,) * min(len(rest), MAX_CERTIFICATES + 3 - together)
            assert len(rest) > 1

    run(scenario)


def test_what_is_too_large_to_gossip_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            heard, announcer = await listen(lab, LOTS_TOPIC), lab.orchestrator.auctioneer.announcer
            monkeypatch.setattr(announcer_module, "MAX_ANNOUNCEMENT_BYTES", 100)
            announcer.lot(lot())
            await announcer.flush()
            monkeypatch.undo()
            announcer.lot(lot(epoch=8))
            await announcer.flush()
            assert SignedLots.decode(await arrival(heard)).record.lots == (lot(epoch=8),)

    run(scenario)


def test_the_fullest_message_of_lots_fits(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            heard, announcer = await listen(lab, LOTS_TOPIC), lab.orchestrator.auctioneer.announcer
            for epoch in range(MAX_LOTS):
                announcer.lot(
                    lot(
                        num_units=2**32 - 1,
                        epoch=2**32 - 1 - epoch,
                        lot_id="lot_" + "z" * 64,
                        freshness_permille=(1_000,) * MAX_LAGS,
                    )
                )
            await announcer.flush()
            fullest: bytes = await arrival(heard)
            assert len(fullest) <= MAX_ANNOUNCEMENT_BYTES

    run(scenario)


def test_the_announcer_runs_by_itself_and_rests_between_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announcer_module, "PAUSE_S", 0.25)

    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            heard, announcer = await listen(lab, LOTS_TOPIC), lab.orchestrator.auctioneer.announcer
            running = lab.start(announcer.run())
            announcer.lot(lot(job_id=f"0x{1:064x}"))
            assert len(SignedLots.decode(await arrival(heard)).record.lots) == 1
            # Told while it rests: both go together when it wakes.
            announcer.lot(lot(job_id=f"0x{2:064x}"))
            announcer.lot(lot(job_id=f"0x{3:064x}"))
            assert len(SignedLots.decode(await arrival(heard)).record.lots) == 2
            assert not running.done()

    run(scenario)
