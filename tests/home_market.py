"""A whole market in a lab of network namespaces: every party on a machine of its own.

The chain and the orchestrator share one public machine; each worker is wherever the test puts
it.  The test itself is the requester, who reaches the public machine like anybody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from netlab import Host, NetLab

from shoal.client.api import ShoalClient
from shoal.client.demo import final_bundle
from shoal.client.devnet import default_models_dir, module_command
from shoal.client.devnet_files import write_toml
from shoal.client.download import download_model
from shoal.client.escrow import refund_rest
from shoal.client.provenance_check import check_bundle
from shoal.client.submission import open_gateway, submit_job
from shoal.client.views import JobView, MarketInfo
from shoal.contracts.anvil import CHAIN_ID, DEV_MNEMONIC, dev_account, find_anvil
from shoal.contracts.deployment import deploy, load_deployment, store_deployment
from shoal.contracts.gateway import ChainGateway
from shoal.contracts.records import Deployment, EscrowState, Payment
from shoal.protocol.errors import Unavailable
from shoal.protocol.job import JobSpec
from shoal.protocol.keystore import load_or_create_account

CHAIN_PORT, API_PORT, P2P_PORT = 8545, 8700, 4001
_GAS_WEI = 10**19
_DOLLAR = 1_000_000
_POLL_S = 0.1
_START_TIMEOUT_S = 120.0


@dataclass
class Worker:
    """A worker's machine and process."""

    name: str
    host: Host
    config: Path
    log: Path
    account: str
    process: subprocess.Popen[Any] | None = None
    num_joins_before: int = 0

    def start(self) -> None:
        """The worker runs, as its provider starts it."""
        self.num_joins_before = len(self.events("joined"))
        with self.log.open("ab") as log:
            self.process = self.host.popen(
                module_command("shoal.worker", self.config), env=_quiet(), stdout=log, stderr=log
            )

    def has_joined(self) -> bool:
        """Whether the process that runs now has joined, and knows of no loss since."""
        joins, losses = self.events("joined"), self.events("orchestrator_lost")
        is_lost = bool(losses) and losses[-1]["time"] > joins[-1]["time"] if joins else True
        return len(joins) > self.num_joins_before and not is_lost

    def require_running(self) -> None:
        """The worker has not ended by itself."""
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()[-2_000:]

    def signal(self, number: int) -> None:
        """The worker's process gets the signal."""
        assert self.process is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """kill -9, and nothing of it is left."""
        self.signal(signal.SIGKILL)
        assert self.process is not None
        self.process.wait()

    def events(self, name: str) -> list[dict[str, Any]]:
        """What the worker's log says under ``name``."""
        text = self.log.read_text() if self.log.exists() else ""
        # The last line may be in the middle of being written.
        lines = (line for line in text.splitlines() if line[:1] + line[-1:] == "{}")
        return [event for event in map(json.loads, lines) if event.get("event") == name]

    def verdicts(self) -> list[dict[str, Any]]:
        """The verdicts on this worker's results that its own book holds."""
        path = self.config.parent / "data" / "evidence" / "verdicts.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line)["verdict"]["record"] for line in lines]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a finished and settled job came to, as chain, orchestrator and workers have it."""

    view: JobView
    escrow: EscrowState
    payments: list[Payment]
    is_proven: bool
    proof: str

    def paid(self) -> Counter[str]:
        """What the chain paid each account."""
        paid: Counter[str] = Counter()
        for payment in self.payments:
            paid[payment.account.lower()] += payment.amount_micros
        return paid


@dataclass
class HomeMarket:
    """A running market.

    Attributes:
        lab: The internet it is on.
        office: The public machine of chain and orchestrator.
        folder: Where everybody's files are, each party's in a folder of its own.
    """

    lab: NetLab
    office: Host
    folder: Path
    workers: dict[str, Worker] = field(default_factory=dict)
    orchestrator: subprocess.Popen[Any] | None = None

    @property
    def rpc_url(self) -> str:
        return f"http://{self.office.ip}:{CHAIN_PORT}"

    @property
    def api_url(self) -> str:
        return f"http://{self.office.ip}:{API_PORT}"

    async def open(self) -> None:
        """The chain and the orchestrator answer."""
        self.lab.here()
        self._start_chain()
        deployment = await _deployed(self.rpc_url)
        store_deployment(self.folder / "deployment.json", deployment)
        for key, micros in (("orchestrator", 0), ("requester", 1_000 * _DOLLAR)):
            await self._fund(key, micros)
        self._start_orchestrator()
        await _until(self._info, "the orchestrator")

    async def add(self, host: Host, **settings: Any) -> Worker:
        """A worker on ``host``, funded and started; it dials the API's URL."""
        name = host.name
        account = await self._fund(name, 100 * _DOLLAR)
        config = self.folder / name / "worker.toml"
        values = {
            "orchestrator": self.api_url,
            "data_dir": config.parent / "data",
            "name": name,
            "stake": "20.00",
            "device": "cpu",
            "claim_interval_s": 2,
            **settings,
        }
        write_toml(config, values)
        worker = Worker(name, host, config, config.with_name("log"), account)
        self.workers[name] = worker
        worker.start()
        return worker

    async def wait_connected(self) -> None:
        """Every worker's process has joined."""

        async def all_here() -> bool:
            self._require_running()
            for worker in self.workers.values():
                worker.require_running()
            return all(worker.has_joined() for worker in self.workers.values())

        await _until(all_here, "the workers")

    async def wait_unpaused(self) -> None:
        """No worker is left out for what it did before."""

        async def none_paused() -> bool:
            last = [worker.events("idle_reason")[-1:] for worker in self.workers.values()]
            return not any(event["reason"] == "paused" for events in last for event in events)

        await _until(none_paused, "the end of the pauses")

    async def submit(self, spec: JobSpec) -> str:
        """The job is accepted and paid for; its id."""
        account = load_or_create_account(self._key("requester"))
        info = await self._info()
        assert info
        async with ShoalClient(self.api_url) as client, await open_gateway(info, account) as chain:
            return (await submit_job(client, chain, spec, account)).job_id

    async def wait_for(self, job_id: str, reached: Callable[[JobView], bool]) -> JobView:
        """The job as soon as it is ``reached``; it must not end otherwise."""
        while True:
            self._require_running()
            with contextlib.suppress(Unavailable):
                async with ShoalClient(self.api_url) as client:
                    view = await client.job(job_id)
                if reached(view):
                    return view
                assert not view.ended, f"the job ended as {view.state}: {view.reason}"
            await asyncio.sleep(_POLL_S)

    async def settle(self, job_id: str) -> Outcome:
        """The job is closed, everybody has claimed, the rest is refunded, all is looked at."""
        account = load_or_create_account(self._key("requester"))
        info = await self._info()
        assert info
        async with ShoalClient(self.api_url) as client, await open_gateway(info, account) as chain:

            async def all_claimed() -> bool:
                escrow = await chain.escrow.job(job_id)
                return escrow.closed and escrow.claimed_micros == escrow.committed_micros

            await _until(all_claimed, "the claims")
            await refund_rest(chain, job_id)
            out = self.folder / "requester"
            (out / "bundle.json").write_bytes(await final_bundle(client, job_id))
            await download_model(client, job_id, out / "adapter")
            head, _ = await chain.provenance.head(chain.escrow.address, job_id)
            report = check_bundle(out / "bundle.json", out / "adapter", head)
            failure = report.failure()
            return Outcome(
                view=await client.job(job_id),
                escrow=await chain.escrow.job(job_id),
                payments=await chain.escrow.payments(job_id),
                is_proven=report.passed,
                proof="" if failure is None else f"{failure.name}: {failure.detail}",
            )

    def _key(self, name: str) -> Path:
        # Where each worker looks for its own; the others' lie beside it alike.
        folder = self.folder / name / "data"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / "account.json"

    def _start_chain(self) -> None:
        with (self.folder / "chain.log").open("ab") as log:
            self.office.popen(
                [
                    *(str(find_anvil()), "--host", self.office.ip, "--port", str(CHAIN_PORT)),
                    *("--chain-id", str(CHAIN_ID), "--mnemonic", DEV_MNEMONIC),
                    *("--hardfork", "cancun", "--order", "fifo", "--quiet"),
                ],
                stdout=log,
                stderr=log,
            )

    def _start_orchestrator(self) -> None:
        ip, config = self.office.ip, self.folder / "orchestrator.toml"
        values = {
            "data_dir": self.folder / "orchestrator" / "state",
            "rpc_url": self.rpc_url,
            "deployment_file": self.folder / "deployment.json",
            "key_file": self._key("orchestrator"),
            "p2p_listen": f"/ip4/{ip}/tcp/{P2P_PORT}",
            "api_host": ip,
            "api_port": API_PORT,
            "blob_host": ip,
            "public_host": ip,
            "models_dir": default_models_dir(),
            "chain_depth": 0,
            "allow_local_models": True,
        }
        write_toml(config, values)
        with (self.folder / "orchestrator.log").open("ab") as log:
            self.orchestrator = self.office.popen(
                module_command("shoal.orchestrator", config), env=_quiet(), stdout=log, stderr=log
            )

    async def _fund(self, name: str, micros: int) -> str:
        account = load_or_create_account(self._key(name)).address
        deployment = load_deployment(self.folder / "deployment.json")
        async with await ChainGateway.connect(self.rpc_url, deployment, dev_account(0)) as chain:
            await chain.token.fund(account, _GAS_WEI, micros)
        return str(account)

    async def _info(self) -> MarketInfo | None:
        self._require_running()
        with contextlib.suppress(Unavailable):
            async with ShoalClient(self.api_url) as client:
                return await client.info()
        return None

    def _require_running(self) -> None:
        assert self.orchestrator is not None
        log = self.folder / "orchestrator.log"
        assert self.orchestrator.poll() is None, log.read_text()[-2_000:]


async def _deployed(rpc_url: str) -> Deployment:
    """The contracts, on a chain that has just been started."""
    async with asyncio.timeout(_START_TIMEOUT_S):
        while True:
            with contextlib.suppress(Unavailable):
                return await deploy(rpc_url, dev_account(0))
            await asyncio.sleep(_POLL_S)


async def _until(reached: Callable[[], Awaitable[object]], what: str) -> None:
    """Returns when ``reached`` says something true."""
    try:
        async with asyncio.timeout(_START_TIMEOUT_S):
            while True:
                if await reached():
                    return
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        raise AssertionError(f"{what} did not come in {_START_TIMEOUT_S:g} s") from None


def _quiet() -> dict[str, str]:
    """The children's environment: one thread each, since they share two processors."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
