"""A task's bytes: the base on disk once, adapters and slices by digest."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Final, TypeVar
from weakref import WeakValueDictionary

from shoal.models.base import require_allowed_files
from shoal.protocol.blob import BlobRef
from shoal.protocol.canonical import digest_of
from shoal.protocol.errors import Clock, Expired, PeerFault
from shoal.protocol.ids import Digest
from shoal.protocol.policy import BaseModelRef, ModelFile
from shoal.protocol.task import GradientTask
from shoal.worker.ports import AnyTask, BlobPlane, TaskInput

_T = TypeVar("_T")
_MAX_CACHED_ADAPTER_BYTES: Final = 64 << 20
_FILES_AT_ONCE: Final = 4
"""A base has a dozen small files beside its weights."""


class Materials:
    """Fetches what tasks need, each thing once.

    Args:
        directory: Where base folders are kept, one for each content digest.
        blobs: The blob plane.
    """

    def __init__(self, directory: Path, blobs: BlobPlane) -> None:
        self._directory = directory
        self._blobs = blobs
        self._checked: dict[str, Path] = {}
        self._base_locks: dict[str, asyncio.Lock] = {}
        self._adapters: OrderedDict[str, bytes] = OrderedDict()
        self._adapter_locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def gather(self, task: AnyTask, sources: Sequence[str], *, timeout_s: float) -> TaskInput:
        """Everything ``task`` needs, fetched and verified.

        Raises:
            Unavailable: no source has it just now.
            PeerFault: what arrived is not what the task names.
            Expired: it took longer than ``timeout_s``.
        """
        folder = await self._base(task.base, sources, timeout_s)
        wanted = [self._adapter(task.policy.adapter, sources, timeout_s)]
        if isinstance(task, GradientTask):
            wanted.append(self._blobs.fetch_bytes(task.slice, sources, timeout_s=timeout_s))
        adapter, *batch_slice = await _together(wanted)
        return TaskInput(
            base_folder=folder,
            base_sha256=task.base.content_digest(),
            adapter=adapter,
            batch_slice=batch_slice[0] if batch_slice else None,
        )

    async def describe_base(
        self, ref: BlobRef, sources: Sequence[str], *, timeout_s: float
    ) -> BaseModelRef:
        """The base that the blob ``ref`` describes: its files, none of them fetched yet.

        Raises:
            Unavailable, Expired: no source has it just now.
            PeerFault: it is no base, or lists files that are no model's.
        """
        base = BaseModelRef.decode(await self._blobs.fetch_bytes(ref, sources, timeout_s=timeout_s))
        require_allowed_files(base)
        return base

    async def prepare_base(
        self,
        base: BaseModelRef,
        sources: Sequence[str],
        *,
        timeout_s: float,
        on_bytes: Callable[[int], None],
    ) -> None:
        """The base lies on this disk, verified.

        Raises:
            Unavailable: no source has it just now.
            PeerFault: what arrived is not what ``base`` names.
            Expired: it took longer than ``timeout_s``.
        """
        await self._base(base, sources, timeout_s, on_bytes)

    async def prefetch(self, ref: BlobRef, sources: Sequence[str], *, timeout_s: float) -> None:
        """The adapter is at hand when a task names it.

        Raises:
            Unavailable, Expired: no source has it just now.
            PeerFault: what arrived is not what ``ref`` names.
        """
        await self._adapter(ref, sources, timeout_s)

    async def _adapter(self, ref: BlobRef, sources: Sequence[str], timeout_s: float) -> bytes:
        try:
            # The wait for whoever fetches it already counts, whose own clock may be longer.
            async with asyncio.timeout(timeout_s) as clock:
                return await self._adapter_once(ref, sources, timeout_s)
        except TimeoutError:
            if not clock.expired():
                raise
            raise Expired(
                f"The adapter {ref.sha256} was not fetched within {timeout_s:g} s.",
                clock=Clock.TRANSFER,
            ) from None

    async def _adapter_once(self, ref: BlobRef, sources: Sequence[str], timeout_s: float) -> bytes:
        # A task and the news of its policy version may want the same adapter; it is asked for once.
        async with self._adapter_locks.setdefault(ref.sha256, asyncio.Lock()):
            cached = self._adapters.get(ref.sha256)
            if cached is not None:
                self._adapters.move_to_end(ref.sha256)
                return cached
            data = await self._blobs.fetch_bytes(ref, sources, timeout_s=timeout_s)
            self._adapters[ref.sha256] = data
        total = sum(len(adapter) for adapter in self._adapters.values())
        while total > _MAX_CACHED_ADAPTER_BYTES and len(self._adapters) > 1:
            total -= len(self._adapters.popitem(last=False)[1])
        return data

    async def _base(
        self,
        base: BaseModelRef,
        sources: Sequence[str],
        timeout_s: float,
        on_bytes: Callable[[int], None] = lambda num_bytes: None,
    ) -> Path:
        digest = base.content_digest()
        async with self._base_locks.setdefault(digest, asyncio.Lock()):
            known = self._checked.get(digest)
            if known is not None:
                return known
            folder = self._directory / digest
            if not folder.is_dir():
                await self._fetch_base(base, folder, sources, timeout_s, on_bytes)
            found = await asyncio.to_thread(_digest_of_folder, base, folder)
            if found != digest:
                await asyncio.to_thread(shutil.rmtree, folder)
                raise PeerFault(
                    f"The base {base.name} on this disk hashes to {found[:12]}… and not to "
                    f"{digest[:12]}…; it was removed and is fetched again for the next task.",
                    evidence=found,
                    code="wrong_base",
                )
            self._checked[digest] = folder
            return folder

    async def _fetch_base(
        self,
        base: BaseModelRef,
        folder: Path,
        sources: Sequence[str],
        timeout_s: float,
        on_bytes: Callable[[int], None],
    ) -> None:
        draft = folder.with_name(f"{folder.name}.{os.getpid()}.new")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        at_once = asyncio.Semaphore(_FILES_AT_ONCE)

        async def fetch(file: ModelFile) -> None:
            async with at_once:
                path = await self._blobs.fetch(
                    file.blob, sources, timeout_s=timeout_s, on_bytes=on_bytes
                )
                await asyncio.to_thread(_place, path, draft / file.path)

        await _together(fetch(file) for file in base.files)
        draft.rename(folder)


async def _together(fetches: Iterable[Coroutine[None, None, _T]]) -> list[_T]:
    """What all of them bring; over a long line each by itself costs several round trips.

    When one fails, the others end with it.
    """
    tasks = [asyncio.ensure_future(fetch) for fetch in fetches]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _place(source: Path, target: Path) -> None:
    # A hard link costs no disk and outlives the cache dropping its own name.
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _digest_of_folder(base: BaseModelRef, folder: Path) -> Digest:
    """`BaseModelRef.content_digest` of the bytes that lie in ``folder`` now."""
    return digest_of([[file.path, _sha256_of(folder / file.path)] for file in base.files])


def _sha256_of(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
