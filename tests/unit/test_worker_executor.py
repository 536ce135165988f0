"""Held leases: order, revocation, deadlines, and tasks that fail."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
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
from shoal.protocol.errors import Clock, Expired, InvalidRequest, PeerFault, Unavailable
from shoal.protocol.market import TaskKind
from shoal.protocol.node import FailureCause, LeaseOffer
from shoal.worker.executor import Assignment, Executor
from shoal.worker.failures import cause_of, is_out_of_memory
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
        self.given_back: asyncio.Queue[tuple[str, FailureCause, str]] = asyncio.Queue()
        self.executor = Executor(
            self.materials, self.engine, self._deliver, self._give_back, lambda: self.now_s
        )

    def offer(
        self, kind: TaskKind, number: int, lease_epoch: int = 1, job: str = "a"
    ) -> LeaseOffer:
        task = make_task(kind, number).model_copy(update={"job_id": "0x" + job * 64})
        return self.double.offer(task, ACCOUNT, NODE, number=number, lease_epoch=lease_epoch)

    async def _give_back(self, assignment: Assignment, cause: FailureCause, detail: str) -> None:
        self.given_back.put_nowait((assignment.lease.lease_id, cause, detail))

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
    """Returns once every task's bytes are at hand."""
    for assignment in assignments:
        await assignment.fetched.wait()


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
        assert (await world.given_back.get())[1] is FailureCause.WRONG_BASE
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
        # What was taken back needs no giving back.
        assert world.given_back.empty()

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
    assert dropped.given_back.get_nowait()[1] is FailureCause.TOO_SLOW


def test_a_task_that_fails_costs_its_lease_and_nothing_else(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        world.engine.failure = RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory")
        bad = world.executor.accept(world.offer(TaskKind.ROLLOUT, 0))
        await bad.over.wait()
        lease_id, cause, detail = await world.given_back.get()
        assert (lease_id, cause) == ("lease_00000000", FailureCause.OUT_OF_MEMORY)
        assert "DefaultCPUAllocator" in detail
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
        assert (await world.given_back.get())[1] is FailureCause.NOT_FETCHED
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


def test_a_dropped_lease_leaves_its_place_in_the_line_of_fetches(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        world.blobs.gate.clear()
        stuck = [world.executor.accept(world.offer(TaskKind.ROLLOUT, n)) for n in range(4)]
        await asyncio.sleep(0.05)
        world.executor.revoke([a.lease.lease_id for a in stuck])
        # Nobody holds the line now but this one.
        world.blobs.gate.set()
        await asyncio.sleep(0.05)
        assert world.blobs.fetched == []
        wanted = world.executor.accept(world.offer(TaskKind.ROLLOUT, 9))
        assert (await world.delivered.get())[0] is wanted
        assert world.given_back.empty()

    drive(tmp_path, script)


def test_waiting_for_others_fetches_ends_with_the_lease(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        world.blobs.gate.clear()
        for number in range(4):
            world.executor.accept(world.offer(TaskKind.ROLLOUT, number))
        await asyncio.sleep(0.05)
        last = world.executor.accept(world.offer(TaskKind.ROLLOUT, 9))
        world.now_s = last.cutoff_s - 0.1
        lease_id, cause, detail = await world.given_back.get()
        assert (lease_id, cause) == (last.lease.lease_id, FailureCause.NOT_FETCHED)
        assert "behind those of other leases" in detail

    drive(tmp_path, script)


def order_of(tmp_path: Path, leases: list[tuple[str, TaskKind]]) -> str:
    """In which order the leases' jobs ran, when all came while another task was computed."""

    async def script(world: World) -> None:
        world.engine.free.clear()
        world.executor.accept(world.offer(TaskKind.ROLLOUT, 0))
        await asyncio.to_thread(world.engine.started.wait, 5)
        waiting = [
            world.executor.accept(world.offer(kind, number, job=job))
            for number, (job, kind) in enumerate(leases, start=1)
        ]
        await all_ready(waiting)
        world.engine.free.set()
        await world.delivered.get()
        for _ in leases:
            assignment, _output = await world.delivered.get()
            ran.append(assignment.lease.job_id[2] + assignment.lease.kind.value[0])

    ran: list[str] = []
    drive(tmp_path, script)
    return " ".join(ran)


def test_one_jobs_gradients_do_not_starve_another_jobs_rollouts(tmp_path: Path) -> None:
    rollout, gradient = TaskKind.ROLLOUT, TaskKind.GRADIENT
    # Job a's gradients overtake its own rollouts, in the turns those had, and never job b's.
    leases = [("a", rollout), ("b", rollout), ("a", gradient), ("b", rollout), ("a", gradient)]
    assert order_of(tmp_path, leases) == "ag br ag br ar"


def test_a_job_alone_runs_its_most_urgent_task_first(tmp_path: Path) -> None:
    leases = [("a", TaskKind.ROLLOUT), ("a", TaskKind.ROLLOUT), ("a", TaskKind.GRADIENT)]
    assert order_of(tmp_path, leases) == "ag ar ar"


def test_a_lease_that_waits_its_turn_makes_progress_with_those_before_it(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        world.engine.free.clear()
        world.executor.accept(world.offer(TaskKind.ROLLOUT, 0))
        await asyncio.to_thread(world.engine.started.wait, 5)
        waiting = world.executor.accept(world.offer(TaskKind.ROLLOUT, 1))
        await waiting.fetched.wait()
        before = world.executor.progress()[1].progress
        world.engine.started.clear()
        world.engine.free.set()
        await world.delivered.get()
        assert world.executor._steps - waiting.first_step > before

    drive(tmp_path, script)


def test_a_stopping_worker_gives_its_leases_back(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        world.blobs.gate.clear()
        world.executor.accept(world.offer(TaskKind.ROLLOUT, 0))
        await world.executor.close(5)
        lease_id, cause, _ = world.given_back.get_nowait()
        assert (lease_id, cause) == ("lease_00000000", FailureCause.STOPPING)

    drive(tmp_path, script)


@pytest.mark.parametrize(
    ("error", "fetching", "cause"),
    [
        (MemoryError(), False, FailureCause.OUT_OF_MEMORY),
        (RuntimeError("CUDA out of memory. Tried to allocate"), False, FailureCause.OUT_OF_MEMORY),
        (Unavailable("no room", code="out_of_memory"), False, FailureCause.OUT_OF_MEMORY),
        (InvalidRequest("nan", code="not_finite"), False, FailureCause.NOT_FINITE),
        (InvalidRequest("long", code="context_exceeded"), False, FailureCause.PROMPT_TOO_LONG),
        (InvalidRequest("no", code="grader_failed"), False, FailureCause.ENVIRONMENT),
        (InvalidRequest("no", code="unknown_environment"), False, FailureCause.ENVIRONMENT),
        (InvalidRequest("no text", code="empty_prompt"), False, FailureCause.ENVIRONMENT),
        (InvalidRequest("no end", code="unloadable_model"), False, FailureCause.WRONG_BASE),
        (PeerFault("other weights", code="wrong_policy"), False, FailureCause.WRONG_BASE),
        (PeerFault("other shape", code="wrong_adapter"), False, FailureCause.WRONG_BASE),
        (Expired("late", clock=Clock.TRANSFER), True, FailureCause.NOT_FETCHED),
        (Expired("late", clock=Clock.DEADLINE), False, FailureCause.TOO_SLOW),
        (Unavailable("the site is gone"), False, FailureCause.NODE),
        (OSError("disk"), False, FailureCause.NODE),
        (RuntimeError("shapes do not match"), False, FailureCause.TASK),
        (ValueError("out of memory of the past"), False, FailureCause.TASK),
    ],
)
def test_each_failure_has_its_cause(error: Exception, fetching: bool, cause: FailureCause) -> None:
    assert cause_of(error, fetching=fetching) is cause


def test_torch_says_out_of_memory_by_its_own_class() -> None:
    import torch

    assert is_out_of_memory(torch.OutOfMemoryError("no"))
