"""The bases of open jobs, on this disk before the worker bids for the job.

So no lease's clock runs while gigabytes arrive over a slow line.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from shoal.protocol.errors import ShoalError
from shoal.protocol.node import OpenJob
from shoal.worker.events import log_event, log_failure
from shoal.worker.materials import Materials
from shoal.worker.session import Backoff
from shoal.worker.status import BaseFetch

_TIMEOUT_S: Final = 86_400.0
_STEPS: Final = 10
"""Progress is told each time another tenth has come."""


class BaseKeeper:
    """Fetches the base of each open job once, and says for which jobs it is here.

    Args:
        materials: Where bases are kept.
        max_bytes: Largest base the provider accepts.
        on_ready: Called when another base has come.
    """

    def __init__(self, materials: Materials, max_bytes: int, on_ready: Callable[[], None]) -> None:
        self._materials = materials
        self._max_bytes = max_bytes
        self._on_ready = on_ready
        self._ready: set[str] = set()
        self._fetching: dict[str, asyncio.Task[None]] = {}
        self._progress: dict[str, _Progress] = {}
        self._one_at_a_time = asyncio.Lock()
        self.sources: Sequence[str] = ()
        """Where blobs are fetched from; set from the orchestrator's greeting."""

    @property
    def is_fetching(self) -> bool:
        """Whether a base is on its way."""
        return any(not task.done() for task in self._fetching.values())

    def fetching(self) -> tuple[BaseFetch, ...]:
        """The bases on their way, and how far they have come."""
        return tuple(
            progress.fetch
            for sha256, progress in self._progress.items()
            if sha256 in self._fetching and not self._fetching[sha256].done()
        )

    def with_base(self, jobs: Iterable[OpenJob]) -> tuple[OpenJob, ...]:
        """The jobs whose base is here; the others' bases are being fetched."""
        jobs = tuple(jobs)
        wanted = {job.base.sha256 for job in jobs}
        for sha256 in self._fetching.keys() - wanted:
            self._fetching.pop(sha256).cancel()
            self._progress.pop(sha256, None)
        for job in jobs:
            if job.base.sha256 not in self._ready | self._fetching.keys():
                self._progress[job.base.sha256] = _Progress(job)
                self._fetching[job.base.sha256] = asyncio.create_task(self._fetch(job))
        return tuple(job for job in jobs if job.base.sha256 in self._ready)

    async def close(self) -> None:
        """No base is being fetched; what came is kept for the next start."""
        tasks = tuple(self._fetching.values())
        self._fetching.clear()
        self._progress.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _fetch(self, job: OpenJob) -> None:
        pause = Backoff()
        while True:
            try:
                # One after the other: the first job can begin while the second's base comes.
                async with self._one_at_a_time:
                    is_here = await self._try(job)
            except ShoalError as error:
                log_failure("base_delayed", error, job_id=job.job_id, model=job.model)
                await asyncio.sleep(pause.next_s())
            else:
                break
        if is_here:
            self._ready.add(job.base.sha256)
            self._on_ready()

    async def _try(self, job: OpenJob) -> bool:
        base = await self._materials.describe_base(job.base, self.sources, timeout_s=_TIMEOUT_S)
        total_bytes = sum(file.blob.size_bytes for file in base.files)
        if total_bytes > self._max_bytes:
            log_event(
                "base_too_large",
                job_id=job.job_id,
                model=job.model,
                size_bytes=total_bytes,
                max_base_bytes=self._max_bytes,
            )
            return False
        progress = self._progress[job.base.sha256]
        progress.begin(total_bytes)
        await self._materials.prepare_base(
            base,
            self.sources,
            timeout_s=_TIMEOUT_S,
            on_bytes=progress.add,
        )
        log_event("base_ready", job_id=job.job_id, model=job.model, size_bytes=total_bytes)
        return True


class _Progress:
    """How far a base has come; tells the log of each further tenth of it."""

    def __init__(self, job: OpenJob) -> None:
        self._job = job
        self._total_bytes: int | None = None
        self._bytes = 0
        self._told = 0

    @property
    def fetch(self) -> BaseFetch:
        """The same for people."""
        return BaseFetch(
            model=self._job.model, fetched_bytes=self._bytes, size_bytes=self._total_bytes
        )

    def begin(self, total_bytes: int) -> None:
        """So much is to come, from the beginning."""
        self._total_bytes = max(1, total_bytes)
        self._bytes = self._told = 0

    def add(self, num_bytes: int) -> None:
        total_bytes = self._total_bytes or 1
        self._bytes = min(self._bytes + num_bytes, total_bytes)
        tenths = _STEPS * self._bytes // total_bytes
        if tenths > self._told:
            self._told = tenths
            log_event(
                "base_fetching",
                job_id=self._job.job_id,
                model=self._job.model,
                fetched_bytes=self._bytes,
                size_bytes=total_bytes,
            )
