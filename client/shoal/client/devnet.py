"""A whole market on one machine: chain, orchestrator, workers, each its own process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from shoal.client.api import ShoalClient
from shoal.client.children import Child
from shoal.client.devnet_files import (
    DevnetFolder,
    RunningDevnet,
    WorkerProfile,
    worker_profile,
    write_toml,
)
from shoal.client.views import MarketInfo
from shoal.protocol.errors import InvalidRequest, Unavailable
from shoal.protocol.keystore import load_or_create_account
from shoal.protocol.money import MICROS_PER_DOLLAR
from shoal.protocol.process import claim_port

if TYPE_CHECKING:
    from shoal.contracts.anvil import Anvil
    from shoal.contracts.deployment import Deployment
    from shoal.contracts.gateway import ChainGateway

MAX_WORKERS = 32
START_TIMEOUT_S = 90.0
"""Generous: a cold disk and busy processors; a quiet machine needs a tenth of it."""
MIN_STAKE_MICROS = 1 * MICROS_PER_DOLLAR
_REQUESTER_MICROS = 1_000 * MICROS_PER_DOLLAR
_WORKER_MICROS = 100 * MICROS_PER_DOLLAR
_GAS_WEI = 10**19
_POLL_S = 0.1


@dataclass(frozen=True, kw_only=True)
class DevnetOptions:
    """What a devnet is told; ports of 0 take a free one.

    Workers given as ``profiles`` take the place of ``num_workers`` usual ones.
    ``threads`` is how many processor threads each worker computes with.  An absent
    ``models_dir`` is the user's cache, so that a built-in base is built once.
    """

    data_dir: Path
    num_workers: int = 3
    profiles: tuple[WorkerProfile, ...] | None = None
    api_port: int = 0
    chain_port: int = 0
    threads: int = 1
    models_dir: Path | None = None


class Devnet:
    """A running market, as an async context.

    Args:
        options: Where, how large, on which ports.
        say: Told each stage of the start, for people.
    """

    def __init__(
        self, options: DevnetOptions, say: Callable[[str], None] = lambda line: None
    ) -> None:
        given = options.profiles
        num_workers = options.num_workers if given is None else len(given)
        if not 0 <= num_workers <= MAX_WORKERS:
            raise InvalidRequest(
                f"A devnet of {num_workers} workers is not possible; ask for 0 to {MAX_WORKERS}."
            )
        self.options = options
        self.folder = DevnetFolder(options.data_dir)
        self.profiles = (
            tuple(worker_profile(index) for index in range(num_workers)) if given is None else given
        )
        self.workers: dict[str, Child] = {}
        self._say = say
        self._stack = AsyncExitStack()
        self._children: list[Child] = []
        self._anvil: Anvil | None = None
        self._running: RunningDevnet | None = None
        self._info: MarketInfo | None = None

    @property
    def running(self) -> RunningDevnet:
        """The addresses, once up."""
        if self._running is None:
            raise RuntimeError("the devnet is not up")
        return self._running

    @property
    def info(self) -> MarketInfo:
        """The orchestrator's greeting, once up."""
        if self._info is None:
            raise RuntimeError("the devnet is not up")
        return self._info

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # A second Ctrl-C must not leave children behind.
        await asyncio.shield(self._stop())

    @classmethod
    @asynccontextmanager
    async def chain_only(cls, options: DevnetOptions) -> AsyncIterator[tuple[str, Deployment]]:
        """The folder's chain alone, with the contracts: its RPC URL and their addresses."""
        devnet = cls(options)
        try:
            devnet._stack.enter_context(devnet.folder.locked())
            anvil = await devnet._start_chain()
            yield anvil.rpc_url, await devnet._deployed(anvil.rpc_url)
        finally:
            await asyncio.shield(devnet._stop())

    async def wait_for_failure(self) -> None:
        """Returns never: raises once the chain or the orchestrator ends by itself.

        Raises:
            Unavailable: naming what ended and its last words.
        """
        chain = asyncio.ensure_future(_chain_ended(self._anvil))
        orchestrator = asyncio.ensure_future(self._children[0].wait())
        try:
            await asyncio.wait((chain, orchestrator), return_when=asyncio.FIRST_COMPLETED)
        finally:
            chain.cancel()
            orchestrator.cancel()
        self._children[0].require_running()
        raise Unavailable(f"The chain ended by itself; its log is in {self.folder.chain}.")

    def kill_worker(self, name: str) -> int:
        """The worker called ``name`` is killed (SIGKILL); returns its process id."""
        child = self.workers[name]
        child.kill()
        return child.pid

    async def _start(self) -> None:
        self._stack.enter_context(self.folder.locked())
        if self.options.api_port:
            # A port that is used should cost nobody the start of a chain.
            claim_port(self.options.api_port, "the API")
        self._anvil = await self._start_chain()
        deployment = await self._deployed(self._anvil.rpc_url)
        rpc_url = self._anvil.rpc_url
        api_url = f"http://127.0.0.1:{claim_port(self.options.api_port, 'the API')}"
        self._say("funding the accounts")
        await self._fund(deployment, rpc_url)
        self._say("starting the orchestrator and the workers")
        await self._start_orchestrator(rpc_url, api_url)
        for profile in self.profiles:
            await self._start_worker(profile, rpc_url, api_url)
        self._info = await self._ready(api_url)
        self._running = RunningDevnet(
            pid=os.getpid(),
            api_url=api_url,
            rpc_url=rpc_url,
            p2p_addresses=self._info.p2p_addresses,
            requester_key=self.folder.requester_key,
        )
        self.folder.announce(self._running)

    async def _stop(self) -> None:
        # Workers first: they claim their pay and leave while the others still answer.
        await asyncio.gather(*(child.stop() for child in self.workers.values()))
        for child in reversed(self._children):
            await child.stop()
        await self._stack.aclose()

    async def _start_chain(self) -> Anvil:
        from shoal.contracts.anvil import Anvil

        self._say("starting the chain")
        return await self._stack.enter_async_context(
            Anvil(self.folder.chain, port=self.options.chain_port)
        )

    async def _deployed(self, rpc_url: str) -> Deployment:
        """The contracts, deployed once for the life of the folder."""
        from shoal.contracts.anvil import dev_account
        from shoal.contracts.deployment import deploy, load_deployment, store_deployment

        path = self.folder.deployment
        if path.exists():
            return load_deployment(path)
        self._say("deploying the contracts")
        deployment = await deploy(rpc_url, dev_account(0))
        store_deployment(path, deployment)
        return deployment

    async def _fund(self, deployment: Deployment, rpc_url: str) -> None:
        """Every account has gas money and tokens."""
        from shoal.contracts.anvil import dev_account
        from shoal.contracts.gateway import ChainGateway

        try:
            gateway = await ChainGateway.connect(rpc_url, deployment, dev_account(0))
        except InvalidRequest as error:
            raise InvalidRequest(
                f"The chain saved in {self.folder.root} does not hold the contracts it should "
                f"({error.message}) Delete the folder to start afresh.",
                code="stale_devnet",
            ) from None
        try:
            await self._fund_up_to(gateway, self.folder.orchestrator_key, 0)
            await self._fund_up_to(gateway, self.folder.requester_key, _REQUESTER_MICROS)
            for profile in self.profiles:
                await self._fund_up_to(
                    gateway, self.folder.worker_key(profile.name), _WORKER_MICROS
                )
        finally:
            await gateway.close()

    async def _fund_up_to(self, gateway: ChainGateway, key: Path, token_micros: int) -> None:
        account = load_or_create_account(key).address
        missing_wei = max(0, _GAS_WEI - await gateway.eth_balance(account))
        missing_micros = max(0, token_micros - await gateway.token.balance(account))
        # Gas money is topped up only when half is gone: a restart should send nothing.
        wei = missing_wei if missing_wei > _GAS_WEI // 2 else 0
        await gateway.token.fund(account, wei, missing_micros)

    async def _start_orchestrator(self, rpc_url: str, api_url: str) -> None:
        folder = self.folder
        write_toml(
            folder.orchestrator_config,
            {
                "data_dir": folder.root / "orchestrator",
                "rpc_url": rpc_url,
                "deployment_file": folder.deployment,
                "key_file": folder.orchestrator_key,
                "api_port": int(api_url.rpartition(":")[2]),
                "models_dir": self.options.models_dir or default_models_dir(),
                "min_stake_micros": MIN_STAKE_MICROS,
                # Its chain makes blocks only for transactions, and never drops one.
                "chain_depth": 0,
                # Requester and operator are the same person here.
                "allow_local_models": True,
            },
        )
        arguments = module_command("shoal.orchestrator", folder.orchestrator_config)
        self._children.append(
            await Child.start("The orchestrator", arguments, folder.orchestrator_log)
        )

    async def _start_worker(self, profile: WorkerProfile, rpc_url: str, api_url: str) -> None:
        path = self.folder.worker_config(profile.name)
        write_toml(
            path,
            {
                "orchestrator": api_url,
                # Started beside the orchestrator, it must not give up before the devnet does.
                "connect_timeout_s": START_TIMEOUT_S,
                "data_dir": self.folder.worker_data(profile.name),
                "name": profile.name,
                "rpc_url": rpc_url,
                "stake": "20.00",
                "device": "cpu",
                "niceness": profile.niceness,
                "num_threads": self.options.threads,
                "claim_interval_s": 20,
                "price": {
                    "rollout": profile.rollout_price,
                    "gradient": profile.gradient_price,
                    "evaluate": profile.evaluate_price,
                },
                **profile.tables,
            },
        )
        self.workers[profile.name] = await Child.start(
            f"The worker {profile.name}",
            module_command("shoal.worker", path),
            self.folder.worker_log(profile.name),
        )

    async def _ready(self, api_url: str) -> MarketInfo:
        """The greeting, once the API answers and every worker is connected."""
        names = {profile.name for profile in self.profiles}
        connected: set[str] = set()
        try:
            async with asyncio.timeout(START_TIMEOUT_S), ShoalClient(api_url) as client:
                while True:
                    for child in (*self._children, *self.workers.values()):
                        child.require_running()
                    with contextlib.suppress(Unavailable):
                        connected = {w.name for w in await client.workers() if w.connected}
                        if names <= connected:
                            return await client.info()
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            missing = ", ".join(sorted(names - connected)) or "the orchestrator's API"
            raise Unavailable(
                f"After {START_TIMEOUT_S:.0f} s the devnet still waits for {missing}; the logs "
                f"are in {self.folder.root}.",
                code="start_timeout",
            ) from None


def default_models_dir() -> Path:
    """Where this user's base models are cached.

    Source: XDG Base Directory Specification, ``XDG_CACHE_HOME``.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "shoal/models"


def module_command(module: str, config: Path, *extra: str) -> list[str]:
    """The command line that runs one of our processes on a configuration file."""
    return [sys.executable, "-m", module, "--config", str(config), *extra]


async def _chain_ended(anvil: Anvil | None) -> None:
    if anvil is not None:
        await anvil.wait()
