"""A whole small job in one process that can be killed at any step and started again.

The orchestrator, its database, blobs and checkpoints are real, and so is the learning; only
chain and network are in memory.  `play` runs in a process of its own, which a real SIGKILL
ends: nothing is flushed, closed or awaited.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any
from unittest.mock import patch

from eth_account import Account as EthAccount
from orchestrator_lab import Lab, Peer, open_lab

from shoal.models.libraries import load_libraries
from shoal.models.policy import ADAPTER_FILE
from shoal.network.blob_store import BlobStore
from shoal.network.identity import NodeIdentity
from shoal.orchestrator.jobs import Jobs
from shoal.orchestrator.store.database import Database
from shoal.orchestrator.store.tables import JobRow, LeaseRow
from shoal.protocol.canonical import sha256_hex
from shoal.protocol.errors import ShoalError
from shoal.protocol.job import CheckpointSpec, EnvSpec, EvalSpec, JobState, SamplingSpec, TaskSizes
from shoal.protocol.learning import LoraSpec, OptimizerSpec
from shoal.protocol.market import TaskKind
from shoal.protocol.node import LeaseOffer, ResultMessage
from shoal.protocol.task import GradientTask
from shoal.provenance.bundle import read_bundle
from shoal.provenance.verifier import verify_bundle
from shoal.rl.aggregation import AdapterOptimizer
from shoal.rl.checkpoint import load_checkpoint
from shoal.worker.config import Device
from shoal.worker.engine import PolicyEngine
from shoal.worker.ports import TaskInput

# Once, for all the processes that are forked from the one that imports this.
load_libraries(1)
STEPS = 6
STALENESS = 2
PATIENCE_S = 120
MEMORY_ACCOUNT = "0x" + "5" * 64
SPEC: dict[str, Any] = {
    "max_steps": STEPS,
    "max_staleness": STALENESS,
    "batch_size": 16,
    "rollouts_per_example": 4,
    "optimizer": OptimizerSpec(learning_rate=3e-3, warmup_steps=1),
    "lora": LoraSpec(r=2, alpha=4),
    "sampling": SamplingSpec(max_tokens=4),
    "environments": (EnvSpec(id="addition", args={"digits": 1}),),
    "evaluation": EvalSpec(interval=2, num_examples=6),
    "checkpoint": CheckpointSpec(interval=4, keep_last=1),
    "tasks": TaskSizes(rollout=2, gradient=2, evaluate=4),
    "dynamic_sampling_rounds": 1,
}


@dataclass(frozen=True, kw_only=True)
class Play:
    """How one process of the job goes.

    ``kill_at`` counts the steps that change something outside memory; absent, the process
    lives.  ``num_workers`` compute; ``num_refusing`` others bid less and refuse every lease.
    ``spec`` changes fields of the job.
    """

    folder: Path
    base: Path
    kill_at: int | None = None
    num_workers: int = 1
    num_refusing: int = 0
    forget_moments: bool = False
    spec: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Ending:
    """What a job that ran to its end came to."""

    reason: str
    version: int
    released_version: int
    released_sha256: str
    adapter_sha256: str
    optimizer_sha256: str
    evaluations: dict[int, float]
    rewards: list[float]
    staleness: list[float]
    redrawn: float
    paid_rollouts: int
    steps_counted: int


_children = threading.Lock()
"""Starting one process also asks after all the others, whose exit codes can be read but once."""


def played(play: Play) -> Ending | None:
    """How the job ended, or None if the process was killed as ``play`` says.

    May be called in several threads at once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_play_process, args=(play,))
    # The server that forks does not learn of pytest's path in any other way.
    with _children, patch.dict(os.environ, PYTHONPATH=str(Path(__file__).parent)):
        process.start()
    has_ended = wait([process.sentinel], PATIENCE_S)
    with _children:
        if not has_ended:
            process.kill()
        process.join()
        code = process.exitcode
        process.close()
    assert has_ended, f"{play} hangs"
    if play.kill_at is not None and code == -signal.SIGKILL:
        return None
    assert code == 0, f"{play} ended with {code}"
    return Ending(**json.loads((play.folder / "ending.json").read_text(), object_hook=_int_keys))


def _int_keys(data: dict[str, Any]) -> dict[Any, Any]:
    return {int(key) if key.isdigit() else key: value for key, value in data.items()}


class _Countdown:
    """Counts steps, and kills this process at one of them."""

    def __init__(self, kill_at: int | None) -> None:
        self.count = 0
        self.settling = False
        self._kill_at = kill_at

    def tick(self) -> None:
        # What follows the last update is settlement, whose chain here lives in this process.
        if not self.settling:
            self.count += 1
            if self.count == self._kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def around(self, owner: type, name: str) -> None:
        """Counts before and after each call of a method that leaves something behind."""
        method: Callable[..., Any] = getattr(owner, name)

        def counted(*args: Any, **options: Any) -> Any:
            self.tick()
            result = method(*args, **options)
            self.tick()
            return result

        setattr(owner, name, counted)


def _play_process(play: Play) -> None:
    countdown = _Countdown(play.kill_at)
    countdown.around(Database, "run_now")
    countdown.around(BlobStore, "put_bytes")
    for name in ("write_bytes", "rename", "replace", "hardlink_to", "unlink", "mkdir"):
        countdown.around(Path, name)
    drain = Jobs._drain

    async def last_of_all(*args: Any) -> Any:
        countdown.settling = True
        return await drain(*args)

    patch.object(Jobs, "_drain", last_of_all).start()
    if play.forget_moments:
        load_state = AdapterOptimizer.load_state

        def forget(optimizer: AdapterOptimizer, data: bytes) -> None:
            load_state(optimizer, data)
            optimizer._optimizer.state.clear()

        patch.object(AdapterOptimizer, "load_state", forget).start()
    asyncio.run(_play(play, countdown))


async def _play(play: Play, countdown: _Countdown) -> None:
    play.folder.mkdir(exist_ok=True)
    identity = NodeIdentity.load_or_create(play.folder / "node.key")
    async with (
        asyncio.timeout(PATIENCE_S),
        open_lab(
            play.folder,
            identity=identity,
            account=EthAccount.from_key(MEMORY_ACCOUNT),
            allow_local_models=True,
        ) as lab,
    ):
        lab.requester = EthAccount.from_key(MEMORY_ACCOUNT)
        job_id = await _job(lab, play)
        lab.chain.open(job_id, lab.context.account.address)
        await lab.orchestrator.record.restore()
        await lab.orchestrator.sealer.restore()
        lab.start(lab.orchestrator.auctioneer.run())
        lab.start(lab.orchestrator.verifier.run())
        for _ in range(play.num_refusing):
            lab.start(_refuse(await lab.peer()))
        for _ in range(play.num_workers):
            lab.start(_work(lab, await lab.peer(), play.base))
        await lab.orchestrator.jobs.resume()
        await asyncio.gather(*lab.orchestrator.jobs._tasks)
        ending = await _ending(lab, job_id, countdown)
        (play.folder / "ending.json").write_text(json.dumps(vars(ending)))


async def _job(lab: Lab, play: Play) -> str:
    """The job in the folder, submitted and funded if this is its first process."""
    job_id: str | None = None
    for row in await lab.rows(JobRow):
        job_id = row.job_id
    if job_id is None:
        signed = lab.make_job(model=str(play.base), **(SPEC | play.spec))
        job_id = (await lab.orchestrator.intake.submit(signed)).job_id

    def fund(session: Any) -> None:
        stored = session.get_one(JobRow, job_id)
        if stored.state == JobState.FUNDING.value:
            stored.state, stored.funded_micros = JobState.RUNNING.value, 1_000_000

    await lab.context.database.run(fund)
    return job_id


async def _work(lab: Lab, peer: Peer, base: Path) -> None:
    """A worker that really computes, one lease after the other."""
    engine = PolicyEngine(Device.CPU, 1)
    for kind in TaskKind:
        await peer.bid(kind=kind, price_micros=10, capacity=4)
    while True:
        offer = await peer.offers.get()
        message = await asyncio.to_thread(_compute, lab, peer, engine, base, offer)
        try:
            await peer.submit(message)
        except ShoalError:
            # The job is over, or the lease went to somebody else.
            continue


def _compute(
    lab: Lab, peer: Peer, engine: PolicyEngine, base: Path, offer: LeaseOffer
) -> ResultMessage:
    task, blobs = offer.task, lab.context.blobs
    inputs = TaskInput(
        base_folder=base,
        base_sha256=task.base.content_digest(),
        adapter=blobs.read(task.policy.adapter.sha256),
        batch_slice=blobs.read(task.slice.sha256) if isinstance(task, GradientTask) else None,
    )
    output = engine.run(task, inputs, lambda: None)
    blobs.put_bytes(output.payload)
    return peer.message(offer, output.payload, num_tokens=output.num_tokens)


async def _refuse(peer: Peer) -> None:
    peer.refusal = "I never do any work"
    for kind in TaskKind:
        await peer.bid(kind=kind, price_micros=1, capacity=8)
    while True:
        await peer.offers.get()


async def _ending(lab: Lab, job_id: str, countdown: _Countdown) -> Ending:
    (row,) = await lab.rows(JobRow)
    assert row.state == JobState.COMPLETE.value, row.reason
    run_dir = lab.orchestrator.jobs.run_dir(job_id)
    last = load_checkpoint(run_dir / "checkpoints" / f"step-{row.policy_version:07d}")
    report = verify_bundle(
        read_bundle(await lab.orchestrator.publisher.bundle(job_id)), run_dir / "adapter"
    )
    assert report.passed, report.text()
    events = await lab.orchestrator.journal.events(job_id, 0)
    updates = [event.data for event in events if event.type == "update"]
    leases = [lease for lease in await lab.rows(LeaseRow) if lease.state == "accepted"]
    (published,) = [event.data for event in events if event.type == "model_published"]
    return Ending(
        reason=row.reason,
        version=row.policy_version,
        released_version=published["policy_version"],
        released_sha256=sha256_hex((run_dir / "adapter" / ADAPTER_FILE).read_bytes()),
        adapter_sha256=last.manifest.current.adapter_sha256,
        optimizer_sha256=last.manifest.optimizer_sha256,
        evaluations={
            event.data["policy_version"]: event.data["accuracy"]
            for event in events
            if event.type == "evaluation"
        },
        rewards=[update["reward"] for update in updates],
        staleness=[update["sample/staleness_max"] for update in updates],
        redrawn=sum(update["sample/redrawn_groups"] for update in updates),
        paid_rollouts=sum(lease.num_units for lease in leases if lease.kind == "rollout"),
        steps_counted=countdown.count,
    )
