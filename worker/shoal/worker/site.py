"""The worker's engine on a Ray cluster: every task in parts, one part to each actor."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from shoal.protocol.errors import InvalidRequest
from shoal.protocol.policy import BaseModelRef
from shoal.protocol.task import GradientTask
from shoal.worker.base_copies import BaseCopies
from shoal.worker.config import LOCAL_RAY, Device, SamplingChoice, WorkerConfig
from shoal.worker.engine import PolicyEngine
from shoal.worker.events import log_event
from shoal.worker.ports import AnyTask, TaskInput, TaskOutput

if TYPE_CHECKING:
    from shoal.rl.ray_site import Member, RaySite

_CHUNK_BYTES: Final = 16 << 20


class SiteRunner(BaseCopies):
    """Computes parts inside one actor, and keeps the bases that reach its node.

    Args:
        device: Where the model runs.
        num_threads: CPU threads it may use.
        sampling: What draws completions.
        cache: Where bases are kept on nodes other than the worker's own.
    """

    def __init__(
        self, device: Device, num_threads: int, sampling: SamplingChoice, cache: Path
    ) -> None:
        super().__init__(cache)
        self._engine = PolicyEngine(device, num_threads, sampling)
        self._engine.prepare()

    def run(
        self,
        on_progress: Callable[[], None],
        base_folder: Path | None,
        task: AnyTask,
        adapter: bytes,
        batch_slice: bytes | None,
        residual: bytes | None,
    ) -> TaskOutput:
        """The part's output; without ``base_folder`` the base is the node's own copy."""
        digest = task.base.content_digest()
        inputs = TaskInput(
            base_folder=base_folder or self.folder_of(task.base),
            base_sha256=digest,
            adapter=adapter,
            batch_slice=batch_slice,
            residual=residual,
        )
        return self._engine.run(task, inputs, on_progress)


class SiteEngine:
    """Runs one task at a time over all actors of a site.

    Args:
        site: A connected site, whose actors are not started yet.
        config: The worker's settings.
    """

    def __init__(self, site: RaySite, config: WorkerConfig) -> None:
        self._site = site
        self._factory = functools.partial(
            SiteRunner, config.device, config.num_threads, config.engine, config.ray.cache_dir
        )

    @property
    def num_actors(self) -> int:
        """How many parts a task is cut into."""
        return self._site.num_actors

    def prepare(self) -> None:
        """A first actor has started, and the others are about to."""
        self._site.start(self._factory, lambda why: log_event("actor_lost", reason=why))
        self._site.wait_ready()

    def run(self, task: AnyTask, inputs: TaskInput, on_progress: Callable[[], None]) -> TaskOutput:
        """The task's output, equal to what one process computes.

        Raises:
            Unavailable: the site has lost its actors.
            PeerFault: the adapter or the slice does not fit the task.
            InvalidRequest: the base does not load, or there is no such environment.
            ShoalError: whatever ``on_progress`` raises.
        """
        from shoal.rl.split import split_task

        started_s = time.monotonic()
        parts = split_task(task, inputs.batch_slice, self.num_actors)
        adapter = self._site.put(inputs.adapter)
        # What an earlier encoding left out goes to whoever encodes: the one part, or the sum.
        residual = inputs.residual if len(parts) == 1 else None
        outputs: list[TaskOutput] = self._site.run(
            [(part.task, adapter, part.batch_slice, residual) for part in parts],
            functools.partial(self._give_base, task.base, inputs.base_folder, on_progress),
            on_progress,
        )
        return dataclasses.replace(
            _join(task, outputs, inputs.residual),
            compute_ms=int((time.monotonic() - started_s) * 1000),
        )

    def close(self) -> None:
        """The actors have ended, and a cluster of the worker's own with them."""
        self._site.close()

    def _give_base(
        self, base: BaseModelRef, folder: Path, on_progress: Callable[[], None], member: Member
    ) -> tuple[Path | None]:
        """Where the actor finds the base; None is its node's own copy, which is then there."""
        if member.node_id == self._site.node_id:
            return (folder,)
        if not self._site.call(member, "has_base", base):
            self._site.call(member, "drop_incoming", base)
            for file in base.files:
                # Even of an empty file something is sent.
                self._site.call(member, "take_chunk", base, file.path, b"")
                with (folder / file.path).open("rb") as content:
                    while chunk := content.read(_CHUNK_BYTES):
                        self._site.call(member, "take_chunk", base, file.path, chunk)
                        on_progress()
            self._site.call(member, "finish_base", base)
        return (None,)


def open_engine(config: WorkerConfig) -> SiteEngine:
    """The engine of the cluster the settings name, connected; its actors start in `prepare`.

    Blocks for seconds.

    Raises:
        InvalidRequest: Ray is not installed, or the cluster is exposed or has no room.
        Unauthorised: the cluster's token is missing or another.
        Unavailable: the cluster is not there.
    """
    try:
        from shoal.rl.ray_site import open_site
        from shoal.rl.site import SiteShape
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise InvalidRequest(
            'Ray is not installed; install it with `pip install "shoal[site]"`.', code="no_ray"
        ) from None
    settings = config.ray
    address = None if settings.address == LOCAL_RAY else settings.address
    shape = SiteShape(
        num_actors=settings.actors,
        cpus_per_actor=settings.cpus_per_actor,
        gpus_per_actor=settings.gpus_per_actor,
        object_store_bytes=settings.object_store_bytes,
    )
    return SiteEngine(open_site(address, shape, config.folder), config)


def _join(task: AnyTask, outputs: Sequence[TaskOutput], residual: bytes | None) -> TaskOutput:
    """The whole task's output."""
    from shoal.rl.split import add_gradients, join_rows

    first = outputs[0]
    if len(outputs) == 1:
        return first
    payloads = [output.payload for output in outputs]
    after = None
    if isinstance(task, GradientTask):
        payload, after = add_gradients(task, payloads, residual)
    else:
        payload = join_rows(payloads)
    num_tokens = sum(output.num_tokens for output in outputs)
    return dataclasses.replace(first, payload=payload, residual=after, num_tokens=num_tokens)
