"""The main job end to end on one machine: market up, job run, money settled, model checked."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.client.api import ShoalClient
from shoal.client.children import Child
from shoal.client.devnet import Devnet, DevnetOptions, module_command
from shoal.client.devnet_files import DevnetFolder
from shoal.client.download import download_model
from shoal.client.escrow import refund_rest
from shoal.client.follow import PriceMemory, follow_job
from shoal.client.jobfile import load_job_file
from shoal.client.output import Output
from shoal.client.provenance_check import check_bundle
from shoal.client.submission import open_gateway, submit_job
from shoal.client.summary import (
    ChainSummary,
    DemoSummary,
    ModelSummary,
    ProvenanceSummary,
    summarise_escrow,
    summarise_workers,
)
from shoal.client.views import ConnectedWorker, JobView, WorkerView
from shoal.protocol.canonical import sha256_hex
from shoal.protocol.errors import Clock, Expired, InvalidRequest, ShoalError, Unavailable
from shoal.protocol.job import JobSpec, JobState
from shoal.protocol.keystore import load_account
from shoal.protocol.market import TaskKind

if TYPE_CHECKING:
    from shoal.contracts.gateway import ChainGateway

SETTLE_TIMEOUT_S = 90.0
"""From the job's end to the last claim: an epoch, a claim interval, and slack."""
_POLL_S = 0.25
_LAST_WORDS_S = 3.0
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_KEPT = ("adapter", "summary.json", "metrics.jsonl", "bundle.json")


class JobFailed(ShoalError):
    """The job ended in another state than complete."""

    default_code = "job_failed"
    exit_code = 6


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What a demo is told; an absent ``job_file`` is the addition example."""

    job_file: Path | None = None
    out: Path = Path("runs/demo")
    num_workers: int = 3
    settings: tuple[str, ...] = ()
    kill: bool = True


class HalfwayKill:
    """Kills one worker, once, when half of the job's policy versions are made.

    Args:
        devnet: Whose worker.
        output: Told what was done.
    """

    def __init__(self, devnet: Devnet, output: Output) -> None:
        # Neither the cheapest nor the dearest where there are three.
        self._name = devnet.profiles[len(devnet.profiles) // 2].name
        self._devnet = devnet
        self._output = output
        self.killed: str | None = None

    async def __call__(self, view: JobView) -> None:
        """Looks at the job, and kills when it is time."""
        if self.killed is None and 2 * view.policy_version >= view.max_steps:
            pid = self._devnet.kill_worker(self._name)
            self.killed = self._name
            self._output.say(
                f"[yellow]half-way: killed {self._name} (process {pid}) on purpose; the job "
                "goes on[/yellow]"
            )


async def run_demo(options: DemoOptions, output: Output) -> DemoSummary:
    """The job has run, everyone is paid, and ``options.out`` holds what came of it.

    Raises:
        InvalidRequest: the job file, or the options.
        JobFailed: the job ended otherwise than complete.
        Unavailable: a process or the chain went away.
        Expired: the money was not settled in time.
    """
    spec = load_job_file(options.job_file or example_job(), options.settings)
    if options.kill and options.num_workers < 2:
        raise InvalidRequest(
            f"With {options.num_workers} workers none can be killed half-way; ask for two or "
            "more, or add --no-kill."
        )
    data_dir = _clear(options.out)
    devnet_options = DevnetOptions(data_dir=data_dir, num_workers=options.num_workers)
    async with Devnet(devnet_options, say=lambda line: output.say(f"[dim]{line}[/dim]")) as devnet:
        logs = options.out / "devnet"
        output.say(f"[bold]market up[/bold] at {devnet.running.api_url}, logs in {logs}")
        run = _DemoRun(devnet, spec, options, output)
        watched = asyncio.ensure_future(devnet.wait_for_failure())
        work = asyncio.ensure_future(run.execute())
        try:
            await asyncio.wait((watched, work), return_when=asyncio.FIRST_COMPLETED)
            if work.done() and isinstance(work.exception(), Unavailable):
                # Perhaps only because a process is just dying; its last words say more.
                await asyncio.wait((watched,), timeout=_LAST_WORDS_S)
            if watched.done():
                watched.result()
            return work.result()
        finally:
            for task in (watched, work):
                task.cancel()
            await asyncio.gather(watched, work, return_exceptions=True)


class _DemoRun:
    """One demo on a market that is up."""

    def __init__(self, devnet: Devnet, spec: JobSpec, options: DemoOptions, output: Output) -> None:
        self._devnet = devnet
        self._spec = spec
        self._options = options
        self._output = output
        self._memory = PriceMemory()

    async def execute(self) -> DemoSummary:
        account = load_account(self._devnet.folder.requester_key)
        async with (
            ShoalClient(self._devnet.running.api_url) as client,
            await open_gateway(self._devnet.info, account) as gateway,
        ):
            self._output.say(f"[dim]submitting {self._spec.name}: {self._spec.model}[/dim]")
            submitted = await submit_job(client, gateway, self._spec, account)
            started_s = time.monotonic()
            kill = HalfwayKill(self._devnet, self._output) if self._options.kill else None
            view = await self._follow(client, submitted.job_id, kill)
            wall_s = time.monotonic() - started_s
            killed = kill.killed if kill is not None else None
            self._output.say("", "[dim]settling: providers claim, the requester is refunded[/dim]")
            await self._settle(gateway, view.job_id, killed)
            return await self._collect(client, gateway, view.job_id, killed, wall_s)

    async def _follow(self, client: ShoalClient, job_id: str, kill: HalfwayKill | None) -> JobView:
        async def on_view(view: JobView) -> None:
            self._memory.fill(view)
            if kill is not None:
                await kill(view)

        view = await follow_job(client, job_id, self._output, on_view=on_view, emit_json=False)
        if view.state is not JobState.COMPLETE:
            raise JobFailed(
                f"The job ended as {view.state.value}: {view.reason or 'no reason was given'}; "
                f"the orchestrator's log is {self._devnet.folder.orchestrator_log}.",
                job_id=job_id,
            )
        return view

    async def _settle(self, gateway: ChainGateway, job_id: str, killed: str | None) -> None:
        """The job is closed, every provider paid, and the rest refunded.

        Live workers claim by themselves; the killed one's provider does so with its key.
        """
        try:
            async with asyncio.timeout(SETTLE_TIMEOUT_S):
                while not (await gateway.escrow.job(job_id)).closed:  # noqa: ASYNC110
                    await asyncio.sleep(_POLL_S)
                if killed is not None:
                    await self._claim_for(killed)
                while True:
                    state = await gateway.escrow.job(job_id)
                    if state.claimed_micros == state.committed_micros:
                        break
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise Expired(
                f"The money of {job_id} was not settled within {SETTLE_TIMEOUT_S:.0f} s of the "
                f"job's end; the logs are in {self._devnet.folder.root}.",
                clock=Clock.DEADLINE,
            ) from None
        await refund_rest(gateway, job_id)

    async def _claim_for(self, name: str) -> None:
        folder = self._devnet.folder
        child = await Child.start(
            f"The claim of {name}",
            module_command("shoal.worker", folder.worker_config(name), "--claim"),
            folder.root / f"{name}-claim.log",
        )
        try:
            if await child.wait() != 0:
                child.require_running()
        finally:
            await child.stop()

    async def _collect(
        self,
        client: ShoalClient,
        gateway: ChainGateway,
        job_id: str,
        killed: str | None,
        wall_s: float,
    ) -> DemoSummary:
        out = self._options.out
        (out / "bundle.json").write_bytes(await final_bundle(client, job_id))
        (out / "metrics.jsonl").write_bytes(await client.metrics(job_id))
        await download_model(client, job_id, out / "adapter")
        view = await client.job(job_id)
        payments = await gateway.escrow.payments(job_id)
        totals = await gateway.totals()
        head, _ = await gateway.provenance.head(gateway.escrow.address, job_id)
        report = check_bundle(out / "bundle.json", out / "adapter", head)
        failure = report.failure()
        if failure is not None:
            self._output.say(f"[red]provenance, step {failure.name}: {failure.detail}[/red]")
        if len(view.evaluations) < 2:
            raise Unavailable(
                "The orchestrator reports fewer than two evaluations of a complete job; its log "
                f"is {self._devnet.folder.orchestrator_log}."
            )
        first, last = view.evaluations[0], view.evaluations[-1]
        killed_account = (
            load_account(self._devnet.folder.worker_key(killed)).address if killed else None
        )
        summary = DemoSummary(
            job_id=job_id,
            reward_before=first.accuracy,
            reward_before_interval=(first.accuracy_low, first.accuracy_high),
            reward_after=last.accuracy,
            reward_after_interval=(last.accuracy_low, last.accuracy_high),
            steps=view.policy_version,
            wall_s=round(wall_s, 2),
            tasks={kind: view.tasks.get(kind.value, 0) for kind in TaskKind},
            workers=summarise_workers(
                _all_workers(view, await client.workers()),
                payments,
                self._memory.prices,
                killed_account,
            ),
            escrow=summarise_escrow(await gateway.escrow.job(job_id), payments),
            chain=ChainSummary(
                chain_id=gateway.deployment.chain_id,
                transactions=totals.transactions,
                gas_used=totals.gas_used,
            ),
            model=ModelSummary(
                path=str(out / "adapter"),
                sha256=sha256_hex((out / "adapter" / _ADAPTER_WEIGHTS).read_bytes()),
            ),
            provenance=ProvenanceSummary(statements=report.num_statements, verified=report.passed),
        )
        (out / "summary.json").write_text(summary.model_dump_json(indent=1) + "\n")
        return summary


def _all_workers(view: JobView, known: Sequence[ConnectedWorker]) -> list[WorkerView]:
    """The job's workers, and those that won nothing of it."""
    nodes = {worker.node for worker in view.workers}
    idle = [worker for worker in known if worker.node not in nodes]
    return [*view.workers, *(WorkerView.model_validate(worker.model_dump()) for worker in idle)]


async def final_bundle(client: ShoalClient, job_id: str) -> bytes:
    """The bundle, which is written just after the job's last epoch is on chain.

    Raises:
        TimeoutError: it was not in `SETTLE_TIMEOUT_S`.
        ShoalError: the orchestrator does not hand it out.
    """
    async with asyncio.timeout(SETTLE_TIMEOUT_S):
        while True:
            try:
                return await client.bundle(job_id)
            except ShoalError as error:
                if not error.retryable and error.code != "not_final":
                    raise
            await asyncio.sleep(_POLL_S)


def example_job(name: str = "addition") -> Path:
    """The example job file: the checkout's, or the copy that ships in the package.

    Raises:
        InvalidRequest: neither is there.
    """
    candidates: Sequence[Path] = (
        Path(__file__).resolve().parents[3] / "examples" / f"{name}.toml",
        Path(str(resources.files("shoal.client"))) / "examples" / f"{name}.toml",
    )
    for path in candidates:
        if path.is_file():
            return path
    raise InvalidRequest(
        f"The example job {name}.toml is not installed; name a job file with --job.",
        code="no_example",
    )


def _clear(out: Path) -> Path:
    """An empty folder for the devnet; what an earlier demo left in ``out`` is gone."""
    folder = DevnetFolder(out / "devnet")
    with folder.locked():
        shutil.rmtree(folder.root)
    for name in _KEPT:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return folder.root
