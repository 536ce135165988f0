"""Parts that run beside the libp2p host, in its trio thread: discovery, the relay.

The host is made anew at each start of a node; an extension lives as long as the node and is
run once per start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from libp2p.abc import IHost
from libp2p.network.swarm import Swarm
from libp2p.pubsub.pubsub import Pubsub

from shoal.network.bans import Fault
from shoal.network.dispatch import Service
from shoal.network.libp2p_streams import RequestStreams
from shoal.network.meters import Meters
from shoal.network.port import Limits
from shoal.network.trio_thread import TrioThread
from shoal.protocol.ids import PeerId

if TYPE_CHECKING:
    from trio_typing import TaskStatus


@dataclass(frozen=True, kw_only=True)
class Running:
    """What an extension may use between one start of a node and its stop.

    Attributes:
        host: The running host; stream handlers are set on it.
        swarm: The host's connections.
        pubsub: The gossip router's front.
        streams: Shoal's own requests, over streams that are kept.
        limits: What peers may take from this node.
        thread: The door to the asyncio loop (`call_asyncio`, `post_asyncio`).
        meters: The node's counters.
        penalise: Holds a fault against a peer; enough of them ban it. In the trio thread only.
        services: What the node serves now.
    """

    host: IHost
    swarm: Swarm
    pubsub: Pubsub
    streams: RequestStreams
    limits: Limits
    thread: TrioThread
    meters: Meters
    penalise: Callable[[PeerId, Fault], None]
    services: Callable[[], tuple[Service, ...]]


class Extension(Protocol):
    """A part that runs beside the host."""

    async def run(self, running: Running, *, task_status: TaskStatus[None]) -> None:
        """Runs until cancelled, which is how a node stops.

        Calls ``task_status.started()`` once it may be used; the node counts as started only
        then. An exception out of here ends the node, so faults of peers are caught inside.
        """
        ...
