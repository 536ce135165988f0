"""The whole visit: what needs only this machine beside what needs the orchestrator."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Final

from shoal.network.identity import NodeIdentity
from shoal.network.port import Network
from shoal.protocol.clock import SystemTime, TimeSource
from shoal.protocol.node import HelloReply
from shoal.worker.config import WorkerConfig
from shoal.worker.doctor import chain, compute, keys, line, machine, reach
from shoal.worker.doctor.examination import Check, Findings, look, look_at_all
from shoal.worker.doctor.report import Finding, Report, fail, gathered, ok, warn
from shoal.worker.session import Link

_START_S: Final = 2.0
_REACH_S: Final = 16.5
"""Names and knocks 4 s each at most, greetings 8 s; seldom more than one second together."""
_PULSE_S: Final = 3.0
_AFTER_S: Final = 6.5
_STOP_S: Final = 2.0
"""These five follow each other, and everything takes less than half a minute."""
_LOCAL_S: Final = 24.0


async def visit(config: WorkerConfig, network: Network, time: TimeSource | None = None) -> Report:
    """What a worker of ``config`` would meet; nothing is made, moved or joined.

    Args:
        config: The worker's settings.
        network: A node with a key of its own, so that a running worker is not disturbed.
        time: The machine's wall clock.
    """
    return await _Visit(config, network, time or SystemTime()).report()


async def visit_really(config: WorkerConfig) -> Report:
    """`visit` over the real network."""
    from shoal.network.libp2p_node import Libp2pNode

    return await visit(config, Libp2pNode(NodeIdentity.generate()))


class _Visit:
    def __init__(self, config: WorkerConfig, network: Network, time: TimeSource) -> None:
        self._config = config
        self._network = network
        self._time = time

    async def report(self) -> Report:
        outside = asyncio.create_task(self._outside())
        inside = await look_at_all(self._inside())
        return gathered([*inside, await outside])

    def _inside(self) -> list[Check]:
        """What needs only this machine; each in a thread, since disks and keys may be slow."""
        config = self._config
        looks: dict[tuple[str, str], Callable[[], list[Finding]]] = {
            ("versions", "packages"): machine.look_at_versions,
            ("disk", "disk"): lambda: machine.look_at_disk(config),
            ("memory", "memory"): machine.look_at_memory,
            ("cpu", "processors"): lambda: machine.look_at_processors(config),
            ("files", "open files"): machine.look_at_files,
            ("keys", "keys"): lambda: keys.look_at_keys(config),
        }
        checks = [
            Check(name=name, what=what, look=_in_thread(function), deadline_s=_LOCAL_S)
            for (name, what), function in looks.items()
        ]
        checks.append(
            Check(
                name="device",
                what="device",
                look=lambda: compute.look_at_compute(config),
                deadline_s=_LOCAL_S,
            )
        )
        return checks

    async def _outside(self) -> list[Finding]:
        """What needs the orchestrator: first the way there, then all that it opens."""
        if not self._config.orchestrator:
            mend = "shoal worker doctor ADDRESS looks at the way to it too"
            return [warn("orchestrator", "orchestrator", "none named", mend)]
        network = self._network
        way = reach.Way(link=Link(network))
        starting = await look(
            Check(name="network", what="network", look=self._start, deadline_s=_START_S)
        )
        if starting:
            return list(starting)
        try:
            reaching = await look(
                Check(
                    name="reach",
                    what="reach",
                    look=lambda: self._reach(way),
                    deadline_s=_REACH_S,
                )
            )
            findings = [*way.findings, *reaching]
            if way.greeting is None:
                return [*findings, _unreached(findings)]
            pulse = line.Pulse()
            clock = Check(
                name="clock",
                what="clock",
                look=lambda: self._clock(pulse, way.link),
                deadline_s=_PULSE_S,
            )
            findings.append(judge_orchestrator(way.greeting, self._config.trust))
            findings += await look(clock)
            after = await look_at_all(self._after(way.link, way.greeting, pulse))
            return [*findings, *(finding for found in after for finding in found)]
        finally:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_STOP_S):
                    await network.stop()

    async def _start(self) -> Findings:
        await self._network.start()
        return []

    async def _reach(self, way: reach.Way) -> Findings:
        await reach.look_for_orchestrator(way, self._network, self._config.orchestrator)
        return []

    def _after(self, link: Link, greeting: HelloReply, pulse: line.Pulse) -> list[Check]:
        config, account = self._config, keys.account_of(self._config)
        now_s = self._time.now_ms() / 1_000
        looks: dict[tuple[str, str], Callable[[], Awaitable[Findings]]] = {
            ("blobs", "blobs"): lambda: reach.look_at_blobs(greeting),
            ("chain", "chain node"): lambda: chain.look_at_chain(config, greeting, account, now_s),
        }
        if pulse.felt:
            ports = listening_ports(config)
            looks["bandwidth", "bandwidth"] = lambda: line.look_at_speed(link, pulse.round_trip_ms)
            looks["nat", "dialling in"] = lambda: line.look_at_nat(link, pulse.observed, ports)
        return [
            Check(name=name, what=what, look=function, deadline_s=_AFTER_S)
            for (name, what), function in looks.items()
        ]

    async def _clock(self, pulse: line.Pulse, link: Link) -> Findings:
        await pulse.feel(link, self._time.now_ms)
        return [line.judge_clock(pulse)]


def judge_orchestrator(greeting: HelloReply, trust: str | None) -> Finding:
    """Who greeted, and whether that is whom the provider trusts."""
    what, account = "orchestrator", greeting.orchestrator
    measured = (
        f"account {account} on chain {greeting.domain.chain_id}, Shoal {greeting.software_version}"
    )
    if trust is not None and trust.lower() != account.lower():
        return fail(what, what, measured, f"it is not {trust}, which trust names: join neither")
    return ok(what, what, measured)


def listening_ports(config: WorkerConfig) -> dict[str, int]:
    """The ports at which others are to reach this worker, by the setting that says so."""
    ports = {}
    if config.blob_listen is not None:
        ports["blob_listen"] = int(config.blob_listen.rpartition(":")[2])
    return {setting: port for setting, port in ports.items() if port}


def _in_thread(function: Callable[[], list[Finding]]) -> Callable[[], Awaitable[Findings]]:
    return lambda: asyncio.to_thread(function)


def _unreached(findings: list[Finding]) -> Finding:
    tried = sum(finding.check == "reach" for finding in findings)
    return fail(
        "orchestrator",
        "orchestrator",
        f"not reached, {tried} address{'' if tried == 1 else 'es'} tried; clock, speed, blobs, "
        "chain and stake could not be looked at",
        "mend the lines above",
    )
