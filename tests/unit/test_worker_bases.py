"""Bases are on the disk before the worker bids, one after the other, and never too large."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from worker_double import BASE, BASE_FILES, POLICY, MemoryBlobs, OrchestratorDouble, blob

from shoal.protocol.errors import Clock, Expired
from shoal.protocol.market import TaskKind
from shoal.protocol.node import OpenJob
from shoal.worker.bases import BaseKeeper
from shoal.worker.capacity import CapacityNow
from shoal.worker.config import Capacity
from shoal.worker.materials import Materials

SIZE_BYTES = sum(len(data) for data in BASE_FILES.values())


class World:
    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.blobs = MemoryBlobs(directory / "blobs")
        self.came = asyncio.Event()
        self.directory = directory / "bases"
        self.keeper = BaseKeeper(Materials(self.directory, self.blobs), max_bytes, self.came.set)
        self.job: OpenJob = OrchestratorDouble.open_job()


def drive(
    tmp_path: Path, script: Callable[[World], Awaitable[None]], max_bytes: int = SIZE_BYTES
) -> None:
    async def main() -> None:
        world = World(tmp_path, max_bytes)
        try:
            async with asyncio.timeout(30):
                await script(world)
        finally:
            await world.keeper.close()

    asyncio.run(main())


def test_a_job_is_bid_for_once_its_base_is_here(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def script(world: World) -> None:
        assert world.keeper.with_base([world.job]) == ()
        assert world.keeper.is_fetching
        await world.came.wait()
        assert world.keeper.with_base([world.job]) == (world.job,)
        assert (world.directory / BASE.content_digest() / "model.safetensors").exists()
        told = [record for record in caplog.records if record.message == "base_fetching"]
        assert told[-1].shoal_event["fetched_bytes"] == SIZE_BYTES  # type: ignore[attr-defined]

    with caplog.at_level("INFO", "shoal.worker"):
        drive(tmp_path, script)


def test_the_files_of_a_base_come_together(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        world.blobs.gate.clear()
        materials = Materials(world.directory, world.blobs)
        coming = asyncio.create_task(
            materials.prepare_base(BASE, [], timeout_s=30, on_bytes=lambda num_bytes: None)
        )
        for _ in range(20):
            await asyncio.sleep(0)
        assert world.blobs.num_asked == len(BASE.files) > 1
        world.blobs.gate.set()
        await coming

    drive(tmp_path, script)


def test_two_who_want_the_same_adapter_ask_once(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        world.blobs.gate.clear()
        materials = Materials(world.directory, world.blobs)
        coming = asyncio.gather(
            materials.prefetch(POLICY.adapter, [], timeout_s=30),
            materials.prefetch(POLICY.adapter, [], timeout_s=30),
        )
        for _ in range(20):
            await asyncio.sleep(0)
        world.blobs.gate.set()
        await coming
        assert world.blobs.fetched == [POLICY.adapter.sha256]

    drive(tmp_path, script)


def test_nobody_waits_longer_for_anothers_fetch_than_for_its_own(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        world.blobs.gate.clear()
        materials = Materials(world.directory, world.blobs)
        patient = asyncio.create_task(materials.prefetch(POLICY.adapter, [], timeout_s=30))
        await asyncio.sleep(0)
        with pytest.raises(Expired, match=r"not fetched within 0\.05 s") as raised:
            await materials.prefetch(POLICY.adapter, [], timeout_s=0.05)
        assert raised.value.clock is Clock.TRANSFER
        world.blobs.gate.set()
        await patient

    drive(tmp_path, script)


def test_the_base_of_a_closed_job_is_fetched_no_further(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        world.blobs.gate.clear()
        world.keeper.with_base([world.job])
        assert world.keeper.with_base([]) == ()
        assert not world.keeper.is_fetching

    drive(tmp_path, script)


def test_a_base_above_the_limit_is_not_fetched(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def script(world: World) -> None:
        world.keeper.with_base([world.job])
        await next(iter(world.keeper._fetching.values()))
        assert world.keeper.with_base([world.job]) == ()
        assert not world.directory.exists()

    with caplog.at_level("INFO", "shoal.worker"):
        drive(tmp_path, script, max_bytes=SIZE_BYTES - 1)
    assert "base_too_large" in caplog.messages


def test_a_base_nobody_has_is_asked_for_again(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        weights = world.blobs.held.pop(blob(BASE_FILES["model.safetensors"]).sha256)
        world.keeper.with_base([world.job])
        while blob(weights).sha256 not in world.blobs.fetched:  # noqa: ASYNC110  # the double tells of no fetch
            await asyncio.sleep(0)
        assert not world.came.is_set()
        world.blobs.held[blob(weights).sha256] = weights
        await world.came.wait()

    drive(tmp_path, script)


def test_a_base_that_lists_a_pickle_is_not_fetched(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        file = BASE.files[0].model_copy(update={"path": "pytorch_model.bin"})
        evil = BASE.model_copy(update={"files": (*BASE.files, file)}).encode()
        world.blobs.held[blob(evil).sha256] = evil
        job = world.job.model_copy(update={"base": blob(evil)})
        world.keeper.with_base([job])
        while blob(evil).sha256 not in world.blobs.fetched:  # noqa: ASYNC110  # the double tells of no fetch
            await asyncio.sleep(0)
        assert BASE.files[0].blob.sha256 not in world.blobs.fetched
        assert world.keeper.with_base([job]) == ()

    drive(tmp_path, script)


def test_capacity_halves_below_what_did_not_fit_and_never_to_nothing() -> None:
    capacity = CapacityNow(Capacity(rollout=64))
    capacity.halve_below(TaskKind.ROLLOUT, 40)
    assert capacity.units(TaskKind.ROLLOUT) == 20
    # A second lease of the same size, granted before, says nothing new.
    capacity.halve_below(TaskKind.ROLLOUT, 40)
    assert capacity.units(TaskKind.ROLLOUT) == 20
    for num_units in (20, 10, 5, 2, 1):
        capacity.halve_below(TaskKind.ROLLOUT, num_units)
    assert capacity.units(TaskKind.ROLLOUT) == 1
    assert capacity.units(TaskKind.GRADIENT) == Capacity().gradient
