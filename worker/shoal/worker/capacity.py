"""How much the worker takes at once: what the provider set, less what did not fit."""

from __future__ import annotations

from shoal.protocol.market import TaskKind
from shoal.worker.config import Capacity
from shoal.worker.events import log_event


class CapacityNow:
    """Units of each kind the worker takes just now; halved when memory ran out, never below one.

    Args:
        configured: What the provider set.
    """

    def __init__(self, configured: Capacity) -> None:
        self._units = {kind: configured.units(kind) for kind in TaskKind}

    def units(self, kind: TaskKind) -> int:
        """The most units of ``kind`` in flight."""
        return self._units[kind]

    def halve_below(self, kind: TaskKind, num_units: int) -> None:
        """A task of ``num_units`` did not fit into memory: at most half is taken from now on.

        It stays so until the worker is started again.
        """
        fewer = max(1, num_units // 2)
        if fewer < self._units[kind]:
            log_event("capacity_halved", kind=kind.value, before=self._units[kind], capacity=fewer)
            self._units[kind] = fewer
