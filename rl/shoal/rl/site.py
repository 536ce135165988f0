"""A site: many processes of one provider that share each task.  What one of them does.

Nothing here knows Ray, which starts the processes and carries the calls (`shoal.rl.ray_site`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from shoal.protocol.errors import InvariantBroken, Unavailable
from shoal.protocol.version import SOFTWARE_VERSION

_WATCH_S: Final = 5.0

OnProgress = Callable[[], None]


class Runner(Protocol):
    """What computes inside each actor."""

    def run(self, on_progress: OnProgress, *arguments: Any) -> Any:
        """The output of one part; ``on_progress`` is called after each step of work."""
        ...


@dataclass(frozen=True, kw_only=True)
class SiteShape:
    """What each actor is given of the cluster.

    Attributes:
        num_actors: How many there are; None takes as many as fit.
        cpus_per_actor: CPUs declared for each.
        gpus_per_actor: GPUs declared for each; None is one where the cluster has any.
        object_store_bytes: Shared memory of a cluster started here.
        start_timeout_s: How long a first actor may take, once there is none.
    """

    num_actors: int | None = None
    cpus_per_actor: float = 1.0
    gpus_per_actor: float | None = None
    object_store_bytes: int = 256 << 20
    start_timeout_s: float = 120.0


class Actor:
    """One process of a site: a runner, and what the driver asks about its work.

    ``ready``, ``call`` and ``run`` are called in one thread, which computes; ``watch`` and
    ``stop`` in others.

    Args:
        factory: Makes the runner, in the thread that computes.
    """

    def __init__(self, factory: Callable[[], Runner]) -> None:
        self._factory = factory
        self._runner: Runner | None = None
        self._changed = threading.Condition()
        self._steps: dict[int, int] = {}
        self._stopped: set[int] = set()

    def ready(self, locate: Callable[[], str]) -> tuple[str, int, str]:
        """The node (as ``locate`` knows it), process and version of the runner just made."""
        self._runner = self._factory()
        return locate(), os.getpid(), SOFTWARE_VERSION

    def call(self, method: str, *arguments: Any) -> Any:
        """What the runner's ``method`` returns."""
        return getattr(self._runner, method)(*arguments)

    def run(self, number: int, *arguments: Any) -> Any:
        """The runner's output of part ``number``.

        Raises:
            Unavailable: the part was stopped.
            Exception: whatever the runner raises.
        """
        if self._runner is None:
            raise InvariantBroken("An actor was given work before it was ready.")
        with self._changed:
            self._steps = {number: 0}
            self._stopped &= {number}
        return self._runner.run(lambda: self._step(number), *arguments)

    def watch(self, number: int, seen: int) -> int:
        """How many steps part ``number`` has made, once they differ from ``seen``, or later."""
        with self._changed:
            self._changed.wait_for(lambda: self._steps.get(number, 0) != seen, _WATCH_S)
            return self._steps.get(number, 0)

    def stop(self, number: int) -> None:
        """Part ``number`` ends at its next step, or before its first."""
        with self._changed:
            self._stopped.add(number)

    def _step(self, number: int) -> None:
        with self._changed:
            self._steps[number] += 1
            self._changed.notify_all()
            if number in self._stopped:
                raise Unavailable("The driver no longer wants this part.", code="part_stopped")


def count_actors(
    nodes: Sequence[Mapping[str, float]], cpus_per_actor: float, gpus_per_actor: float
) -> int:
    """How many actors fit on nodes with these resources."""
    wanted = {"CPU": cpus_per_actor, "GPU": gpus_per_actor}
    return sum(
        # Ray counts in ten-thousandths; so three actors of 0.1 fit into 0.3.
        min(
            round(1e4 * node.get(name, 0)) // round(1e4 * share)
            for name, share in wanted.items()
            if share
        )
        for node in nodes
    )
