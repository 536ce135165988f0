"""Held leases: order, revocation, deadlines, and tasks that fail."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from worker_double import (
    ADAPTER,
    BASE,
    MemoryBlobs,
    OrchestratorDouble,
    ScriptedEngine,
    blob,
    make_task,
)

from shoal.network.identity import NodeIdentity
from shoal.network.memory import MemoryHub, MemoryNetwork
from shoal.protocol.market import TaskKind
from shoal.protocol.node import LeaseOffer
from shoal.worker.executor import Assignment, Executor
from shoal.worker.materials import Materials
from shoal.worker.ports import TaskOutput

NODE = NodeIdentity(b"w" * 32).peer_id
ACCOUNT = "0x" + "5" * 40


class World:
    """An executor with a hand on its clock, its bytes and its engine."""

    def __init__(self, directory: Path) -> None:
        identity = NodeIdentity(b"o" * 32)
        self.double = OrchestratorDouble(MemoryNetwork(MemoryHub(), identity), identity)
        self.blobs = MemoryBlobs(directory / "blobs")
        self.engine = ScriptedEngine()
        self.now_s = 100.0
        self.delivered: asyncio.Queue[tuple[Assignment, TaskOutput]] = asyncio.Queue()
        self.materials = Materials(directory / "bases", self.blobs)
        self.executor = Executor(self.materials, self.engine, self._deliver, lambda: self.now_s)

    def offer(self, kind: TaskKind, number: int, lease_epoch: int = 1) -> LeaseOffer:
        task = make_task(kind, number)
        return self.double.offer(task, ACCOUNT, NODE, number=number, lease_epoch=lease_epoch)

    async def _deliver(self, assignment: Assignment, output: TaskOutput) -> None:
        self.delivered.put_nowait((assignment, output))


def drive(directory: Path, script: Callable[[World], Awaitable[None]]) -> World:
    async def main() -> World:
        world = World(directory)
        running = asyncio.create_task(world.executor.run())
        try:
            async with asyncio.timeout(10):
                await script(world)
        finally:
            world.engine.free.set()
            await world.executor.close(0.5)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        return world

    return asyncio.run(main())


async def all_ready(assignments: list[Assignment]) -> None:
    """Returns once every task's bytes are at hand (its progress says so)."""
    # Nothing but other tasks of this loop is waited for, so yielding to them is enough.
    while any(assignment.progress == 0 for assignment in assignments):  # noqa: ASYNC110
        await asyncio.sleep(0)


def test_gradients_go_first_then_evaluations_then_rollouts_in_order(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        world.engine.free.clear()
        world.executor.accept(world.offer(TaskKind.ROLLOUT, 0))
        await asyncio.to_thread(world.engine.started.wait, 5)
        kinds = [TaskKind.ROLLOUT, TaskKind.ROLLOUT, TaskKind.EVALUATE, TaskKind.GRADIENT]
        waiting = [
            world.executor.accept(world.offer(kind, number))
            for number, kind in enumerate(kinds, start=1)
        ]
        await all_ready(waiting)
        world.engine.free.set()
        order = [(await world.delivered.get())[0].offer.task.task_id[-1] for _ in range(5)]
        assert order == ["0", "4", "3", "1", "2"]

    world = drive(tmp_path, script)
    assert len(world.executor) == 0


def test_a_base_is_fetched_once_and_verified_on_disk(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        for number in range(3):
            world.executor.accept(world.offer(TaskKind.ROLLOUT, number))
        for _ in range(3):
            await world.delivered.get()
        config = BASE.files[0].blob.sha256
        assert world.blobs.fetched.count(config) == 1

    drive(tmp_path, script)

    async def tampered(world: World) -> None:
        (tmp_path / "bases" / BASE.content_digest() / "model.safetensors").write_bytes(b"evil")
        assignment = world.executor.accept(world.offer(TaskKind.ROLLOUT, 9))
        await assignment.over.wait()
        assert world.engine.ran == []
        world.executor.accept(world.offer(TaskKind.ROLLOUT, 10))
        await world.delivered.get()

    drive(tmp_path, tampered)


def test_a_revoked_lease_stops_while_it_is_computed(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        world.engine.free.clear()
        first = world.executor.accept(world.offer(TaskKind.ROLLOUT, 0))
        await asyncio.to_thread(world.engine.started.wait, 5)
        queued = world.executor.accept(world.offer(TaskKind.ROLLOUT, 1))
        world.executor.revoke([first.lease.lease_id, queued.lease.lease_id, "lease_unknown0"])
        assert len(world.executor) == 0
        world.engine.free.set()
        last = world.executor.accept(world.offer(TaskKind.ROLLOUT, 2))
        assert (await world.delivered.get())[0] is last
        assert world.delivered.empty()
        assert "task_00000001" not in world.engine.ran

    drive(tmp_path, script)


def test_work_stops_at_four_fifths_of_the_lease(tmp_path: Path) -> None:
    async def script(world: World, span_s: float) -> None:
        world.engine.free.clear()
        late = world.executor.accept(world.offer(TaskKind.ROLLOUT, 0))
        await asyncio.to_thread(world.engine.started.wait, 5)
        world.now_s += span_s
        world.engine.free.set()
        await late.over.wait()

    # The lease spans 60 s: at 47 s the work is handed in, at 49 s it is dropped.
    kept = drive(tmp_path, lambda world: script(world, 47.0))
    assert kept.delivered.qsize() == 1
    dropped = drive(tmp_path, lambda world: script(world, 49.0))
    assert dropped.delivered.qsize() == 0


def test_a_task_that_fails_costs_its_lease_and_nothing_else(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        world.engine.failure = RuntimeError("out of memory")
        bad = world.executor.accept(world.offer(TaskKind.ROLLOUT, 0))
        await bad.over.wait()
        world.engine.failure = None
        del world.blobs.held[blob(ADAPTER).sha256]
        world.executor.accept(world.offer(TaskKind.ROLLOUT, 1))
        assert (await world.delivered.get())[0].lease.lease_id == "lease_00000001"

    drive(tmp_path, script)


def test_bytes_that_cannot_be_fetched_cost_their_lease_and_nothing_else(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        adapter = world.blobs.held.pop(blob(ADAPTER).sha256)
        bad = world.executor.accept(world.offer(TaskKind.ROLLOUT, 0))
        await bad.over.wait()
        world.blobs.held[blob(ADAPTER).sha256] = adapter
        world.executor.accept(world.offer(TaskKind.ROLLOUT, 1))
        assert (await world.delivered.get())[0].lease.lease_id == "lease_00000001"

    drive(tmp_path, script)


def test_a_newer_epoch_of_a_lease_replaces_the_older(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        world.blobs.gate.clear()
        old = world.executor.accept(world.offer(TaskKind.ROLLOUT, 0, lease_epoch=1))
        new = world.executor.accept(world.offer(TaskKind.ROLLOUT, 0, lease_epoch=2))
        assert old.stop.is_set()
        assert [p.lease_epoch for p in world.executor.progress()] == [2]
        assert world.executor.units_held(TaskKind.ROLLOUT) == 2
        world.blobs.gate.set()
        assert (await world.delivered.get())[0] is new
        assert world.delivered.empty()

    drive(tmp_path, script)
