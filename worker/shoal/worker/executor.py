"""Accepted leases: fetched ahead, run one at a time, given back when they cannot be done.

Turns come in the order in which leases came, and belong to jobs: in its turn a job's most
urgent task runs, so one job's gradients overtake its own rollouts and nobody else's.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from shoal.protocol.errors import Clock, Expired
from shoal.protocol.market import Lease, TaskKind
from shoal.protocol.node import FailureCause, LeaseOffer, LeaseProgress
from shoal.worker.events import log_event, log_failure
from shoal.worker.failures import cause_of
from shoal.worker.materials import Materials
from shoal.worker.offers import PRIORITY
from shoal.worker.ports import Engine, TaskInput, TaskOutput

_COMPUTE_SHARE: Final = 0.8
"""Compute ends at this share of a lease's time, so that handing in fits into the rest."""
_MAX_FETCHES: Final = 4

URGENT_WAIT_S = 0.25


@dataclass(eq=False, kw_only=True)
class Assignment:
    """A lease this worker holds.

    Attributes:
        offer: The lease and its task.
        received_s: Monotonic time at which it came.
        arrival: How many leases came before it.
        turn: When it is its job's turn to run something; at first its ``arrival``.
        first_step: Steps this worker had done when it came.
        inputs: Its bytes, once they are here.
        running: Whether it is being computed, or was.
        computed: Whether the result is ready, and perhaps on its way.
        stop: Set when the work is to end, whatever the reason.
        preparing: Fetches its bytes.
        fetched: Set when its bytes are here, or never will be.
        over: Set when the lease is no longer held.
    """

    offer: LeaseOffer
    received_s: float
    arrival: int
    turn: int
    first_step: int
    inputs: TaskInput | None = None
    running: bool = False
    computed: bool = False
    stop: threading.Event = field(default_factory=threading.Event)
    preparing: asyncio.Task[None] | None = None
    fetched: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def lease(self) -> Lease:
        """The lease itself."""
        return self.offer.lease.record

    @property
    def deadline_s(self) -> float:
        """Monotonic time at which the lease is over.

        Measured from receipt over the lease's own span, so that the two machines' clocks
        need not agree.
        """
        return self.received_s + (self.lease.deadline_ms - self.lease.issued_at_ms) / 1000

    @property
    def cutoff_s(self) -> float:
        """Monotonic time at which computing on it stops."""
        return self.received_s + _COMPUTE_SHARE * (self.deadline_s - self.received_s)


Deliver = Callable[[Assignment, TaskOutput], Awaitable[None]]
GiveBack = Callable[[Assignment, FailureCause, str], Awaitable[None]]


class Executor:
    """Holds leases and works through them: of a job gradients, then evaluations, then rollouts.

    Args:
        materials: Where task bytes come from.
        engine: What computes.
        deliver: Hands a finished task in; awaited beside further compute.
        give_back: Tells the orchestrator why a lease will not be done.
        monotonic_s: The machine's monotonic clock.
    """

    def __init__(
        self,
        materials: Materials,
        engine: Engine,
        deliver: Deliver,
        give_back: GiveBack,
        monotonic_s: Callable[[], float],
    ) -> None:
        self._materials = materials
        self._engine = engine
        self._deliver = deliver
        self._give_back = give_back
        self._monotonic_s = monotonic_s
        self._held: dict[str, Assignment] = {}
        self._arrivals = itertools.count()
        self._steps = 0
        self._has_ready = asyncio.Event()
        self._fetches = asyncio.Semaphore(_MAX_FETCHES)
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shoal-compute")
        self.sources: Sequence[str] = ()
        """Where blobs are fetched from; set from the orchestrator's greeting."""

    def held(self, lease_id: str) -> Assignment | None:
        """The lease, while it is held."""
        return self._held.get(lease_id)

    def assignments(self) -> tuple[Assignment, ...]:
        """Every lease held now, in the order in which they came."""
        return tuple(self._held.values())

    def __len__(self) -> int:
        return len(self._held)

    def units_held(self, kind: TaskKind) -> int:
        """Units of ``kind`` still to be computed.

        A result on its way no longer counts: the orchestrator may offer the next lease the
        moment it has it, before its answer to the result has reached us.
        """
        return sum(
            a.lease.num_units
            for a in self._held.values()
            if a.lease.kind is kind and not a.computed
        )

    def progress(self) -> tuple[LeaseProgress, ...]:
        """How far every held lease has come.

        A lease that waits for its turn comes nearer with each step of those before it, so it
        counts this worker's steps since it came, whatever they were for.
        """
        return tuple(
            LeaseProgress(
                lease_id=a.lease.lease_id,
                lease_epoch=a.lease.lease_epoch,
                progress=self._steps - a.first_step,
            )
            for a in self._held.values()
        )

    def accept(self, offer: LeaseOffer) -> Assignment:
        """The offer is held, and its bytes are being fetched.

        An older epoch of the same lease is dropped.
        """
        older = self._held.get(offer.lease.record.lease_id)
        if older is not None:
            self._drop(older, "superseded")
        arrival = next(self._arrivals)
        assignment = Assignment(
            offer=offer,
            received_s=self._monotonic_s(),
            arrival=arrival,
            turn=arrival,
            first_step=self._steps,
        )
        self._held[assignment.lease.lease_id] = assignment
        assignment.preparing = self._start(self._prepare(assignment), name="prepare")
        return assignment

    def revoke(self, lease_ids: Iterable[str]) -> None:
        """The named leases are dropped; one being computed stops at its next step."""
        for lease_id in lease_ids:
            assignment = self._held.get(lease_id)
            if assignment is not None:
                self._drop(assignment, "revoked")

    async def run(self) -> None:
        """Works until cancelled; a task that fails is logged and its lease given back."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._engine.prepare)
        log_event("engine_ready")
        while True:
            await self._has_ready.wait()
            first = self._next()
            if first is None:
                self._has_ready.clear()
                continue
            await self._wait_for_urgent(first)
            assignment = self._next()
            if assignment is not None and assignment.inputs is not None:
                self._take_turn(assignment)
                await self._compute(assignment, assignment.inputs)

    def _next(self) -> Assignment | None:
        """The most urgent ready task of the job whose turn is the earliest."""
        waiting = self._waiting()
        ready = [a for a in waiting if a.inputs is not None]
        if not ready:
            return None
        jobs = {a.lease.job_id for a in ready}
        job_id = next(a.lease.job_id for a in waiting if a.lease.job_id in jobs)
        of_job = (a for a in ready if a.lease.job_id == job_id)
        return min(of_job, key=lambda a: (PRIORITY[a.lease.kind], a.arrival))

    def _waiting(self) -> list[Assignment]:
        """Held leases that were not begun, by their turns."""
        return sorted((a for a in self._held.values() if not a.running), key=lambda a: a.turn)

    def _take_turn(self, assignment: Assignment) -> None:
        """Uses the job's earliest turn up; the lease it was won with gets this one's for it."""
        job_id = assignment.lease.job_id
        earliest = next(a for a in self._waiting() if a.lease.job_id == job_id)
        earliest.turn, assignment.turn = assignment.turn, earliest.turn
        assignment.running = True

    async def _wait_for_urgent(self, first: Assignment) -> None:
        """What is ready waits a moment for its job's more urgent work that is just arriving.

        A task is never interrupted for another, so starting a rollout now would hold up the
        gradient that the whole job waits for.
        """
        coming = [
            a.fetched.wait()
            for a in self._waiting()
            if a.lease.job_id == first.lease.job_id
            and PRIORITY[a.lease.kind] < PRIORITY[first.lease.kind]
            and not a.fetched.is_set()
        ]
        if coming:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(URGENT_WAIT_S):
                    await asyncio.gather(*coming)

    async def close(self, grace_s: float) -> None:
        """Finished work was given ``grace_s`` to be handed in; everything else is given back."""
        for assignment in tuple(self._held.values()):
            if not assignment.computed:
                self._drop(assignment, "stopping")
                self._start(
                    self._tell(assignment, FailureCause.STOPPING, "the worker is stopping"),
                    name="deliver",
                )
        delivering = {task for task in self._tasks if task.get_name() == "deliver"}
        if delivering:
            await asyncio.wait(delivering, timeout=grace_s)
        for assignment in tuple(self._held.values()):
            self._drop(assignment, "stopping")
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _prepare(self, assignment: Assignment) -> None:
        try:
            inputs = await self._fetch(assignment)
        except Exception as error:  # one bad task must not end the worker
            self._fail(assignment, "fetch_failed", error, fetching=True)
            return
        self._steps += 1
        assignment.inputs = inputs
        assignment.fetched.set()
        self._has_ready.set()

    async def _fetch(self, assignment: Assignment) -> TaskInput:
        def left_s() -> float:
            return max(assignment.cutoff_s - self._monotonic_s(), 0.0)

        try:
            async with asyncio.timeout(left_s()):
                await self._fetches.acquire()
        except TimeoutError:
            raise Expired(
                f"The bytes of the lease {assignment.lease.lease_id} waited until its end behind "
                "those of other leases; give the worker less capacity or a quicker line.",
                clock=Clock.TRANSFER,
            ) from None
        try:
            return await self._materials.gather(
                assignment.offer.task, self.sources, timeout_s=left_s()
            )
        finally:
            self._fetches.release()

    async def _compute(self, assignment: Assignment, inputs: TaskInput) -> None:
        def step() -> None:
            self._steps += 1
            self._require_live(assignment)

        def work() -> TaskOutput:
            self._require_live(assignment)
            return self._engine.run(assignment.offer.task, inputs, step)

        _log("task_started", assignment)
        try:
            output = await asyncio.get_running_loop().run_in_executor(self._thread, work)
            self._require_live(assignment)
        except Exception as error:  # one bad task must not end the worker
            self._fail(assignment, "task_failed", error)
            return
        self._steps += 1
        assignment.computed = True
        _log("task_computed", assignment, compute_ms=output.compute_ms)
        self._start(self._hand_in(assignment, output), name="deliver")

    async def _hand_in(self, assignment: Assignment, output: TaskOutput) -> None:
        try:
            await self._deliver(assignment, output)
        except Exception as error:  # costs the lease, not the worker
            if not assignment.stop.is_set():
                _log_failure("result_failed", error, assignment)
            self._forget(assignment)
            return
        self._release(assignment)

    def _require_live(self, assignment: Assignment) -> None:
        lease_id = assignment.lease.lease_id
        if assignment.stop.is_set():
            raise Expired(
                f"The lease {lease_id} was withdrawn; its work was dropped.",
                clock=Clock.HEARTBEAT,
                code="lease_dropped",
                lease_id=lease_id,
            )
        if self._monotonic_s() > assignment.cutoff_s:
            raise Expired(
                f"The lease {lease_id} has too little time left to finish and hand in; give the "
                "worker less capacity or more speed.",
                clock=Clock.DEADLINE,
                lease_id=lease_id,
            )

    def _fail(
        self, assignment: Assignment, event: str, error: Exception, *, fetching: bool = False
    ) -> None:
        # A lease that was taken back is nobody's failure, and needs no giving back.
        if not assignment.stop.is_set():
            _log_failure(event, error, assignment)
            cause = cause_of(error, fetching=fetching)
            detail = f"{type(error).__name__}: {error}"
            self._start(self._tell(assignment, cause, detail), name="deliver")
        self._forget(assignment)

    async def _tell(self, assignment: Assignment, cause: FailureCause, detail: str) -> None:
        try:
            await self._give_back(assignment, cause, detail)
        except Exception as error:  # the orchestrator's own clocks end the lease then
            _log_failure("failure_not_told", error, assignment)

    def _drop(self, assignment: Assignment, why: str) -> None:
        assignment.stop.set()
        _log("lease_dropped", assignment, reason=why)
        if assignment.preparing is not None:
            # Others' bytes wait for its place in the line.
            assignment.preparing.cancel()
        self._forget(assignment)

    def _forget(self, assignment: Assignment) -> None:
        assignment.stop.set()
        self._release(assignment)

    def _release(self, assignment: Assignment) -> None:
        assignment.over.set()
        assignment.fetched.set()
        if self._held.get(assignment.lease.lease_id) is assignment:
            del self._held[assignment.lease.lease_id]

    def _start(self, work: Coroutine[object, object, None], *, name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _log_failure(event: str, error: Exception, assignment: Assignment) -> None:
    lease = assignment.lease
    log_failure(event, error, job_id=lease.job_id, lease_id=lease.lease_id)


def _log(event: str, assignment: Assignment, **fields: str | int) -> None:
    lease, task = assignment.lease, assignment.offer.task
    log_event(
        event,
        job_id=lease.job_id,
        lease_id=lease.lease_id,
        kind=lease.kind.value,
        policy_version=task.policy.version,
        **fields,
    )
