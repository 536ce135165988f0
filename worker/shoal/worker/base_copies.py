"""Bases on a site's nodes other than the worker's own, whole or not there."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from pathlib import Path
from typing import Final

from shoal.protocol.errors import PeerFault
from shoal.protocol.policy import BaseModelRef

_MAX_KEPT: Final = 4
_INCOMING: Final = "incoming-"
_DEBRIS_AGE_S: Final = 86_400.0
"""After which what an actor that died was receiving is removed."""


class BaseCopies:
    """A node's copies of bases, each under its digest, shared by the node's actors.

    Args:
        cache: The folder they are kept in; ``~`` is filled in.
    """

    def __init__(self, cache: Path) -> None:
        self._cache = cache.expanduser()
        self._checked: set[str] = set()

    def folder_of(self, base: BaseModelRef) -> Path:
        """Where the base's copy is, or would be."""
        return self._cache / base.content_digest()

    def has_base(self, base: BaseModelRef) -> bool:
        """Whether this node's copy of the base is whole; a damaged one is removed."""
        digest, folder = base.content_digest(), self.folder_of(base)
        if digest not in self._checked and folder.is_dir():
            if _is_whole(base, folder):
                self._checked.add(digest)
            else:
                shutil.rmtree(folder)
        if digest not in self._checked or not folder.is_dir():
            return False
        os.utime(folder)
        return True

    def take_chunk(self, base: BaseModelRef, path: str, data: bytes) -> None:
        """``data`` follows what has come of the base's file ``path``."""
        folder = self._incoming(base)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (folder / path).open("ab") as file:
            file.write(data)

    def drop_incoming(self, base: BaseModelRef) -> None:
        """Nothing is left of a copy that was never finished."""
        shutil.rmtree(self._incoming(base), ignore_errors=True)

    def finish_base(self, base: BaseModelRef) -> None:
        """The base that came in chunks is this node's copy.

        Raises:
            PeerFault: its files are not those the base names.
        """
        incoming, folder = self._incoming(base), self.folder_of(base)
        if not _is_whole(base, incoming):
            self.drop_incoming(base)
            raise PeerFault(
                f"The base {base.name} arrived damaged on a node of the site; it is sent again "
                "for the next task.",
                code="wrong_base",
            )
        self._make_room()
        shutil.rmtree(folder, ignore_errors=True)
        incoming.replace(folder)
        self._checked.add(folder.name)

    def _incoming(self, base: BaseModelRef) -> Path:
        return self._cache / f"{_INCOMING}{base.content_digest()}-{os.getpid()}"

    def _make_room(self) -> None:
        """No more copies are left than fit beside one more: those used last, and no old debris."""
        ages = {path: time.time() - path.stat().st_mtime for path in self._cache.iterdir()}
        copies = [path for path in ages if not path.name.startswith(_INCOMING)]
        debris = [path for path in ages if path not in copies and ages[path] > _DEBRIS_AGE_S]
        for folder in sorted(copies, key=ages.__getitem__)[_MAX_KEPT - 1 :] + debris:
            shutil.rmtree(folder, ignore_errors=True)
            self._checked.discard(folder.name)


def _is_whole(base: BaseModelRef, folder: Path) -> bool:
    """Whether ``folder`` holds the files the base names."""
    for file in base.files:
        try:
            with (folder / file.path).open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
        except FileNotFoundError:
            return False
        if digest != file.blob.sha256:
            return False
    return True
