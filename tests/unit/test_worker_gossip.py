"""A whole worker and its orchestrator's announcements: they save time, and nothing else."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from market_records import lot
from worker_double import ADAPTER, JOB_ID, POLICY, blob
from worker_world import Drive, World, driver

from shoal.protocol.announcement import (
    LOTS_TOPIC,
    POLICIES_TOPIC,
    LotAnnouncement,
    PolicyAnnouncement,
    topic_of,
)
from shoal.protocol.clock import ManualTime
from shoal.protocol.market import TaskKind
from shoal.protocol.signing import SignableRecord, sign

OTHER_JOB = "0x" + "c" * 64
NEW_ADAPTER = b"adapter one"
NOW_MS = ManualTime().now_ms()
LONG_MS = 3_600_000


@pytest.fixture
def drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Drive:
    return driver(tmp_path, monkeypatch, timeout_s=20)


async def say(world: World, topic: str, record: SignableRecord) -> None:
    double = world.double
    whose = topic_of(topic, double.greeting.domain, double.account.address)
    signed = sign(record, double.greeting.domain, double.account)
    await double.network.publish(whose, signed.encode())


def lots(job_id: str) -> LotAnnouncement:
    return LotAnnouncement(lots=(lot(job_id=job_id),), announced_at_ms=NOW_MS)


def test_a_new_versions_adapter_is_fetched_before_a_task_names_it(drive: Drive) -> None:
    async def script(world: World) -> None:
        world.blobs.held[blob(NEW_ADAPTER).sha256] = NEW_ADAPTER
        await world.join()
        # It bids once the base is here, and only then serves the job.
        await world.next(world.double.inbox.bids)
        newer = POLICY.model_copy(update={"version": 1, "adapter": blob(NEW_ADAPTER)})
        await say(
            world, POLICIES_TOPIC, PolicyAnnouncement(policies=(newer,), announced_at_ms=NOW_MS)
        )
        while blob(NEW_ADAPTER).sha256 not in world.blobs.fetched:
            await world.next(world.double.inbox.beats)

    drive(script)


def test_a_lot_of_an_unknown_job_brings_a_heartbeat_at_once(drive: Drive) -> None:
    async def script(world: World) -> None:
        greeting = world.double.greeting
        world.double.greeting = greeting.model_copy(update={"heartbeat_ms": LONG_MS})
        await world.join()
        beats = world.double.inbox.beats
        await say(world, LOTS_TOPIC, lots(JOB_ID))
        await asyncio.sleep(0)
        assert beats.empty()
        await say(world, LOTS_TOPIC, lots(OTHER_JOB))
        await world.next(beats)

    drive(script)


def test_a_worker_that_hears_no_announcement_works_all_the_same(drive: Drive) -> None:
    async def script(world: World) -> None:
        world.worker._announcements.follow = lambda greeting: None  # type: ignore[method-assign]
        await world.join()
        offer = world.offer(TaskKind.ROLLOUT)
        assert (
            await world.double.send(offer, world.worker._parts.credentials.node)
        ).refusal is None
        message = await world.next(world.double.inbox.results)
        assert message.result.lease_id == offer.lease.record.lease_id
        assert blob(ADAPTER).sha256 in world.blobs.fetched

    drive(script)
