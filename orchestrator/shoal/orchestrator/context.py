"""What every part of the orchestrator is given: clocks, keys, sockets, disk, chain.

Nothing below `main` opens any of these for itself, so a test can run the same parts over
an in-memory network and a clock it moves by hand.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from eth_account.signers.local import LocalAccount

from shoal.contracts.deployment import Deployment
from shoal.contracts.gateway import ChainGateway
from shoal.network.blob_store import BlobStore
from shoal.network.identity import NodeIdentity
from shoal.network.port import Network
from shoal.orchestrator.config import OrchestratorConfig
from shoal.orchestrator.store.database import Database
from shoal.protocol.clock import TimeSource
from shoal.protocol.signing import Domain

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Context:
    """The orchestrator's surroundings."""

    config: OrchestratorConfig
    database: Database
    network: Network
    blobs: BlobStore
    chain: ChainGateway
    deployment: Deployment
    account: LocalAccount
    identity: NodeIdentity
    domain: Domain
    time: TimeSource
    compute: ThreadPoolExecutor
    """One thread for the learners: torch is slower with more, and updates stay ordered."""
    checking: ThreadPoolExecutor
    """One thread for what every result is checked for: the environments and tokenizers are its.
    Rollouts are checked in it while the update before them is made."""
    auditing: ThreadPoolExecutor
    """One thread for recomputing what workers did, which holds up no check and no update."""

    async def computed(self, work: Callable[[], _T]) -> _T:
        """``work()`` in the compute thread, without blocking the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.compute, work)

    async def checked(self, work: Callable[[], _T]) -> _T:
        """``work()`` in the checking thread, without blocking the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.checking, work)

    async def audited(self, work: Callable[[], _T]) -> _T:
        """``work()`` in the audit thread, without blocking the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.auditing, work)
