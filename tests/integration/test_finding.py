"""A worker without an address finds an orchestrator: through a bootstrap node, and on a LAN."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any, cast

import pytest
from netlab import NetLab, require

from shoal.network.identity import NodeIdentity
from shoal.network.libp2p_node import Libp2pNode
from shoal.orchestrator.context import Context
from shoal.orchestrator.presence import Presence
from shoal.protocol.clock import SystemTime
from shoal.protocol.errors import Unavailable
from shoal.worker.config import load_config
from shoal.worker.finding import finder_of

WAIT_S = 30.0


def surroundings(network: Libp2pNode, *bootstrap: str) -> Context:
    config = SimpleNamespace(bootstrap=bootstrap, mdns=False)
    return cast(Context, SimpleNamespace(network=network, time=SystemTime(), config=config))


def test_a_worker_finds_an_orchestrator_that_joined_the_same_bootstrap_node() -> None:
    async def check() -> None:
        nodes = [Libp2pNode(NodeIdentity.generate(), "/ip4/127.0.0.1/tcp/0") for _ in range(2)]
        worker = Libp2pNode(NodeIdentity.generate())
        for node in (*nodes, worker):
            await node.start()
        first, second = nodes
        presences = [
            Presence(surroundings(first)),
            Presence(surroundings(second, first.addresses[0])),
        ]
        try:
            for presence in presences:
                await presence.start()
            config = load_config(None, {}, {"bootstrap": first.addresses[0]})
            found: tuple[str, ...] = ()
            # Presence starts in the background, as an orchestrator does.
            async with asyncio.timeout(WAIT_S):
                while second.addresses[0] not in found:
                    try:
                        found = await finder_of(config, worker, SystemTime())()
                    except Unavailable:
                        await asyncio.sleep(0.05)
            assert await worker.connect(found[0], timeout_s=WAIT_S) in {
                first.peer_id,
                second.peer_id,
            }
        finally:
            for presence in presences:
                await presence.stop()
            for node in (*nodes, worker):
                await node.stop()

    asyncio.run(check())


ANNOUNCE = """
import asyncio, sys
from shoal.network.identity import NodeIdentity
from shoal.network.lan import LanAnnouncer
async def main():
    peer = NodeIdentity(bytes(32)).peer_id
    announcer = LanAnnouncer(peer, [f"/ip4/0.0.0.0/tcp/4001/p2p/{peer}"])
    await announcer.start()
    print("up", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await announcer.stop()
asyncio.run(main())
"""

SEEK = """
import asyncio, json
from shoal.network.lan import nearby
found = asyncio.run(nearby(20.0))
print(json.dumps([contact.to_json() for contact in found]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are Linux's")
def test_machines_of_one_network_find_each_other_and_those_of_another_do_not() -> None:
    require()
    with NetLab() as lab:
        office, elsewhere = lab.lan("office"), lab.lan("elsewhere")
        home, near, far = office.host("home"), office.host("near"), elsewhere.host("far")
        announcer = home.popen(
            [sys.executable, "-c", ANNOUNCE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert announcer.stdout is not None
        assert announcer.stdout.readline() == "up\n"
        seekers: list[Any] = [
            host.popen(
                [sys.executable, "-c", script],
                stdout=subprocess.PIPE,
                text=True,
            )
            for host, script in ((near, SEEK), (far, SEEK.replace("20.0", "4.0")))
        ]
        found, nothing = (json.loads(seeker.communicate(timeout=60)[0]) for seeker in seekers)
        peer = NodeIdentity(bytes(32)).peer_id
        assert found == [{"peer": peer, "addresses": [f"/ip4/{home.ip}/tcp/4001/p2p/{peer}"]}]
        assert nothing == []
