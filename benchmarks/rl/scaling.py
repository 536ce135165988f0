"""``python -m benchmarks.rl.scaling [throughput|overhead]``: more workers, same orchestrator.

The orchestrator is real: market, leases, signatures, database, blobs, verification, audits of
one result in twenty.  Its network and chain are in memory.  The workers are stubs in the same
process: they wait as long as computing would take and answer from recordings of real
rollouts, so their number costs no compute.

*throughput* runs on the wall clock: accepted rollouts a second with 1, 2, 4 and 8 workers.
*overhead* runs on a simulated clock, so that 1,000 workers need no 1,000 cores: CPU seconds
of the whole process less what the stubs took, for each accepted rollout, with 10 to 1,000
workers that each do the same share of work and beat once a second.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import itertools
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from shoal.network.port import Limits
from shoal.orchestrator.verifier import NEWCOMER_AUDITS
from shoal.protocol.clock import SystemTime
from shoal.protocol.ids import PeerId, new_id
from shoal.protocol.node import (
    HEARTBEAT_PROTOCOL,
    LEASE_PROTOCOL,
    RESULT_PROTOCOL,
    Heartbeat,
    HeartbeatReply,
    LeaseOffer,
    LeaseProgress,
    LeaseReply,
)
from shoal.protocol.task import RolloutTask
from shoal.rl.batch import RolloutPayload, RowLimits
from shoal.rl.rollout import run_rollout

# The surroundings of the orchestrator that the tests use: chain and network in memory.
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
import learning_fixtures
import orchestrator_lab

if TYPE_CHECKING:
    from collections.abc import Iterator

GROUPS_PER_TASK = 8
COMPUTE_MS = 10_000
"""How long a simulated worker takes for a task; it beats once a second meanwhile."""
HEARTBEAT_MS = 1_000
TICK_MS = 250
_TIMED_EVERY = 16
FUNDS_MICROS = 1 << 50


class Recordings:
    """Real rollouts of one batch, sampled once: what every stub answers with."""

    def __init__(self, folder: Path) -> None:
        self.school = learning_fixtures.Lab.open(learning_fixtures.write_base(folder))
        self.version = self.school.version()
        self.prompts = self.school.plan.prompts(0)
        self._payloads: dict[tuple[int, ...], tuple[bytes, int]] = {}

    def task(self, job_id: str, units: Sequence[int]) -> RolloutTask:
        """The task of some units; as many slots as the batch has come round again."""
        slots = [unit % len(self.prompts) for unit in units]
        task = self.school.plan.rollout(0, self.version, self.prompts, slots)
        return task.model_copy(update={"job_id": job_id, "task_id": new_id("task")})

    def payload(self, task: RolloutTask) -> tuple[bytes, int]:
        """The recorded rollouts of the task's slots, and how many tokens they have."""
        if task.slots not in self._payloads:
            policy = self.school.policy
            data = run_rollout(policy, task, self.school.environments)
            limits = RowLimits(
                num_prompts=len(task.prompts),
                num_rows=len(task.prompts) * task.group_size,
                max_tokens=task.sampling.max_tokens,
                vocab_size=policy.vocab_size,
            )
            self._payloads[task.slots] = data, RolloutPayload.decode(data, limits).num_tokens
        return self._payloads[task.slots]


class Stub:
    """A worker without a model: what it holds, and its answers."""

    def __init__(self, fleet: Fleet, peer: orchestrator_lab.Peer) -> None:
        self.fleet, self.peer = fleet, peer
        self.held: asyncio.Queue[LeaseOffer] = asyncio.Queue()
        self._offers: dict[str, LeaseOffer] = {}
        self._progress = 0
        peer.network.serve(LEASE_PROTOCOL, self._on_lease)

    async def _on_lease(self, peer: PeerId, data: bytes) -> bytes:
        with self.fleet.not_ours("offer"):
            offer = LeaseOffer.decode(data)
            reply = LeaseReply(lease_id=offer.lease.record.lease_id).encode()
        self._offers[offer.lease.record.lease_id] = offer
        self.held.put_nowait(offer)
        return reply

    async def beat(self) -> None:
        """One heartbeat, with progress for all it holds."""
        with self.fleet.not_ours("beat"):
            self._progress += 1
            leases = [
                LeaseProgress(
                    lease_id=offer.lease.record.lease_id,
                    lease_epoch=offer.lease.record.lease_epoch,
                    progress=self._progress,
                )
                for offer in self._offers.values()
            ]
            seen = tuple(self.fleet.verdicts.pop(self.peer.node, ()))
            data = Heartbeat(leases=tuple(leases), acknowledged=seen).encode()
        raw = await self.peer.ask(HEARTBEAT_PROTOCOL, data)
        with self.fleet.not_ours("reply"):
            reply = HeartbeatReply.decode(raw)
            self.fleet.verdicts[self.peer.node] = [v.record.lease_id for v in reply.verdicts]

    async def hand_in(self, offer: LeaseOffer) -> None:
        """The recorded result of the offer's task is uploaded and sent."""
        with self.fleet.not_ours("result"):
            data, num_tokens = self.fleet.recordings.payload(cast(RolloutTask, offer.task))
            message = self.peer.message(offer, data, num_tokens=num_tokens, compute_ms=COMPUTE_MS)
            encoded = message.encode()
        lab, payload = self.fleet.lab, message.result.payload
        dispatcher = lab.orchestrator.dispatcher
        await dispatcher.authorise_upload(offer.upload_token, payload.sha256, payload.size_bytes)
        lab.context.blobs.put_bytes(data)
        await self.peer.ask(RESULT_PROTOCOL, encoded)
        del self._offers[offer.lease.record.lease_id]


class Fleet:
    """An orchestrator at work for one job, and its stubs."""

    def __init__(self, lab: orchestrator_lab.Lab, recordings: Recordings) -> None:
        self.lab, self.recordings = lab, recordings
        self.stubs: list[Stub] = []
        self.verdicts: dict[str, list[str]] = {}
        self.accepted = 0
        self.stub_cpu_s = 0.0
        self._seen: Counter[str] = Counter()
        self._judged: dict[str, asyncio.Event] = {}
        self._job = ""

    @contextmanager
    def not_ours(self, kind: str) -> Iterator[None]:
        """What runs inside is a worker's own work, in a process of its own elsewhere.

        One in sixteen of a kind is timed and stands for all: reading the clock is not free.
        """
        self._seen[kind] += 1
        if self._seen[kind] % _TIMED_EVERY != 1:
            yield
            return
        started_s = time.thread_time()
        try:
            yield
        finally:
            self.stub_cpu_s += _TIMED_EVERY * (time.thread_time() - started_s)

    async def open(self, num_workers: int, tasks_held: int) -> None:
        """The job runs, and the workers are joined, known and have bid."""
        lab, school = self.lab, self.recordings.school
        self._job = await lab.add_job(funded_micros=FUNDS_MICROS)
        lab.context.blobs.put_bytes(school.policy.adapter_bytes(), pin=True)
        learner = SimpleNamespace(
            policy=school.policy,
            auditor=school.auditor,
            spec=school.plan.spec,
            environments=school.environments,
        )
        running = SimpleNamespace(learner=learner, selling=False, policy=None)
        lab.orchestrator.jobs._running[self._job] = cast(Any, running)
        for _ in range(num_workers):
            stub = Stub(self, await lab.peer())
            await stub.peer.bid(capacity=tasks_held * GROUPS_PER_TASK, turn=False)
            member = lab.orchestrator.roster.member(stub.peer.node)
            # Past its first results, which are all recomputed whoever it is.
            member.audited, member.consecutive_valid = NEWCOMER_AUDITS, 1 << 20
            self.stubs.append(stub)
        sealer = lab.orchestrator.sealer
        # Who had no time to open its bid in one market epoch does so in the next.
        while sealer.market is None or len(sealer.market.book) < num_workers:
            await sealer.turn()
        dispatcher = lab.orchestrator.dispatcher
        charge = dispatcher.on_served

        def served(live: Any, spent_ms: int) -> None:
            charge(live, spent_ms)
            self.accepted += len(live.units) * school.plan.spec.rollouts_per_example
            self._judged.pop(live.lease.lease_id, asyncio.Event()).set()

        dispatcher.on_served = served

    async def sell(self, num_tasks: int) -> None:
        """Another lot is on the market."""
        sale = orchestrator_lab.Sale(self._job, num_tasks * GROUPS_PER_TASK, 1_000, GROUPS_PER_TASK)
        sale.make = lambda units: self.recordings.task(self._job, units)
        await self.lab.orchestrator.auctioneer.open(sale.workload)

    def verdict_on(self, offer: LeaseOffer) -> asyncio.Event:
        """Set once the offer's result is accepted."""
        return self._judged.setdefault(offer.lease.record.lease_id, asyncio.Event())


async def measure_throughput(
    recordings: Recordings, num_workers: int, compute_s: float, span_s: float
) -> float:
    """Accepted rollouts a second of wall time."""
    with tempfile.TemporaryDirectory(prefix="shoal-scaling-") as name:
        async with orchestrator_lab.open_lab(Path(name), clock=SystemTime()) as lab:
            fleet = Fleet(lab, recordings)
            await fleet.open(num_workers, tasks_held=2)
            await fleet.sell(int(2 * num_workers * (span_s + 4 * compute_s) / compute_s) + 8)
            lab.start(lab.orchestrator.auctioneer.run())
            lab.start(lab.orchestrator.verifier.run())
            lab.start(lab.orchestrator._tick())
            for stub in fleet.stubs:
                lab.start(_work(stub, compute_s))
                lab.start(_beat_for_ever(stub))
            await asyncio.sleep(2 * compute_s)
            before, started_s = fleet.accepted, time.perf_counter()
            await asyncio.sleep(span_s)
            return (fleet.accepted - before) / (time.perf_counter() - started_s)


async def _work(stub: Stub, compute_s: float) -> None:
    handing_in: set[asyncio.Task[None]] = set()
    while True:
        offer = await stub.held.get()
        await asyncio.sleep(compute_s)
        # Beside the next task, as a worker does.
        task = asyncio.create_task(stub.hand_in(offer))
        handing_in.add(task)
        task.add_done_callback(handing_in.discard)


async def _beat_for_ever(stub: Stub) -> None:
    while True:
        await asyncio.sleep(HEARTBEAT_MS / 1000)
        await stub.beat()


async def measure_overhead(
    recordings: Recordings, num_workers: int, num_tasks: int
) -> tuple[float, float]:
    """CPU milliseconds for each accepted rollout: all of the orchestrator's, and the stubs'."""
    with tempfile.TemporaryDirectory(prefix="shoal-scaling-") as name:
        limits = Limits(max_connections=num_workers + 1)
        async with orchestrator_lab.open_lab(Path(name), limits=limits) as lab:
            fleet = Fleet(lab, recordings)
            await fleet.open(num_workers, tasks_held=1)
            await fleet.sell(num_tasks + 2 * num_workers)
            lab.start(lab.orchestrator.auctioneer.run())
            lab.start(lab.orchestrator.verifier.run())
            clock = Simulation(fleet)
            await clock.start()
            # Each worker has had a lease before anything is measured.
            await clock.run_until(num_workers)
            before = fleet.accepted
            cpu_s, stub_s = time.process_time(), fleet.stub_cpu_s
            await clock.run_until(num_workers + num_tasks)
            rollouts = fleet.accepted - before
            stub_s = fleet.stub_cpu_s - stub_s
            ours_s = time.process_time() - cpu_s - stub_s
            return 1000 * ours_s / rollouts, 1000 * stub_s / rollouts


class Simulation:
    """Moves the clock from event to event: a tick, a heartbeat, a task that is done."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._events: list[tuple[int, int, Stub | None, LeaseOffer | None]] = []
        self._order = itertools.count()
        self._done = 0

    async def start(self) -> None:
        """Every worker has its first lease, begun at a time of its own."""
        stubs = self._fleet.stubs
        self._push(TICK_MS, None, None)
        for number, stub in enumerate(stubs):
            spread = number / len(stubs)
            offer = await stub.held.get()
            self._push(int(HEARTBEAT_MS * spread), stub, None)
            self._push(COMPUTE_MS + int(COMPUTE_MS * spread), stub, offer)

    def _push(self, in_ms: int, stub: Stub | None, offer: LeaseOffer | None) -> None:
        at_ms = self._fleet.lab.time.now_ms() + in_ms
        heapq.heappush(self._events, (at_ms, next(self._order), stub, offer))

    async def run_until(self, num_tasks: int) -> None:
        """``num_tasks`` results have been accepted since the start."""
        orchestrator = self._fleet.lab.orchestrator
        while self._done < num_tasks:
            at_ms, _, stub, offer = heapq.heappop(self._events)
            self._fleet.lab.time.advance(max(0, at_ms - self._fleet.lab.time.now_ms()))
            if stub is None:
                await orchestrator.dispatcher.reap()
                orchestrator.auctioneer.poke()
                self._push(TICK_MS, None, None)
            elif offer is None:
                await stub.beat()
                self._push(HEARTBEAT_MS, stub, None)
            else:
                await self._finish(stub, offer)

    async def _finish(self, stub: Stub, offer: LeaseOffer) -> None:
        judged = self._fleet.verdict_on(offer)
        await stub.hand_in(offer)
        await judged.wait()
        self._done += 1
        self._push(COMPUTE_MS, stub, await stub.held.get())


def print_throughput(recordings: Recordings, compute_s: float, span_s: float) -> None:
    """The table of rollouts a second."""
    print(f"\nA task of {GROUPS_PER_TASK} groups takes a worker {compute_s:g} s.\n")
    print("| workers | rollouts/s | of linear |\n| ---: | ---: | ---: |")
    one = 0.0
    for num_workers in (1, 2, 4, 8):
        rate = asyncio.run(measure_throughput(recordings, num_workers, compute_s, span_s))
        one = one or rate
        print(f"| {num_workers} | {rate:.1f} | {rate / (one * num_workers):.0%} |", flush=True)


def print_overhead(recordings: Recordings, sizes: Sequence[int], num_tasks: int) -> None:
    """The table of CPU for each rollout."""
    group_size = recordings.school.plan.spec.rollouts_per_example
    print(
        f"\n{num_tasks} results of {GROUPS_PER_TASK} groups of {group_size} rollouts, "
        f"{COMPUTE_MS / 1000:g} simulated seconds each.\n"
    )
    print("| workers | orchestrator CPU ms a rollout | ms a lease | stubs' CPU ms a rollout |")
    print("| ---: | ---: | ---: | ---: |")
    for num_workers in sizes:
        ours, stubs = asyncio.run(measure_overhead(recordings, num_workers, num_tasks))
        a_lease = ours * GROUPS_PER_TASK * group_size
        print(f"| {num_workers} | {ours:.3f} | {a_lease:.1f} | {stubs:.3f} |", flush=True)


def main() -> None:
    """Prints one table or both."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rl.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("which", nargs="?", choices=["throughput", "overhead"])
    parser.add_argument("--workers", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--tasks", type=int, default=300)
    parser.add_argument("--compute-s", type=float, default=1.0)
    parser.add_argument("--span-s", type=float, default=10.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shoal-base-") as name:
        recordings = Recordings(Path(name))
        if options.which != "overhead":
            print_throughput(recordings, options.compute_s, options.span_s)
        if options.which != "throughput":
            print_overhead(recordings, options.workers, options.tasks)


if __name__ == "__main__":
    main()
