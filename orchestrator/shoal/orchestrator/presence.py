"""How the orchestrator lets itself be found by workers that nobody gave its address."""

from __future__ import annotations

import asyncio
import logging

from shoal.network.discovery import Discovery
from shoal.network.lan import LanAnnouncer
from shoal.orchestrator.context import Context
from shoal.protocol.discovery import ORCHESTRATORS_KEY
from shoal.protocol.errors import ShoalError

_log = logging.getLogger(__name__)


class Presence:
    """The orchestrator keeps its share of the table of providers, and is told of in it.

    With ``mdns`` the local network hears of it too.

    Args:
        context: Network, clock and configuration.

    Raises:
        InvalidRequest: a bootstrap address does not end in ``/p2p/<peer id>``.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self.discovery = Discovery(
            context.network, time=context.time, bootstrap=context.config.bootstrap
        )
        self._lan: LanAnnouncer | None = None
        self._announcing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """The orchestrator can be found soon; nothing waits for that."""
        self.discovery.will_provide(ORCHESTRATORS_KEY)
        await self.discovery.start()
        if self._context.config.mdns:
            network = self._context.network
            self._lan = LanAnnouncer(network.peer_id, network.addresses)
            self._announcing = asyncio.create_task(self._announce(self._lan), name="mdns")

    async def stop(self) -> None:
        """The orchestrator is announced no more."""
        await self.discovery.stop()
        if self._announcing is not None:
            self._announcing.cancel()
            await asyncio.gather(self._announcing, return_exceptions=True)
        if self._lan is not None:
            await self._lan.stop()

    async def _announce(self, lan: LanAnnouncer) -> None:
        try:
            await lan.start()
        except ShoalError as error:
            _log.warning("not_announced_in_the_local_network", extra={"reason": error.message})
