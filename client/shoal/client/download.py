"""Fetches a published model, trusting no carrier: every file is checked by its digest.

::

    DIR/            the adapter, a stock PEFT folder
    DIR/base/       its base, when that is on no model hub: a stock transformers folder
    DIR/bundle.json the job's provenance, once the job has ended
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from shoal.client.api import ShoalClient
from shoal.models.base import is_hub_id, require_allowed_files
from shoal.protocol.blob import BlobRef
from shoal.protocol.errors import InvalidRequest, PeerFault, ShoalError, Unavailable

BASE_FOLDER = "base"
BUNDLE_FILE = "bundle.json"
MAX_MODEL_BYTES = 256 << 30
_CHUNK_BYTES = 1 << 20
# A large file takes long and is welcome to; a silent peer is not.
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=30)


@dataclass(frozen=True, kw_only=True)
class DownloadedModel:
    """A model on disk.

    Attributes:
        folder: The adapter.
        files: The adapter's files.
        base: What ``AutoModelForCausalLM.from_pretrained`` takes: a hub id, or the folder the
            base was fetched to.
        bundle: The provenance bundle; None while the job goes on.
    """

    folder: Path
    files: tuple[Path, ...]
    base: str
    bundle: Path | None

    def python(self) -> tuple[str, ...]:
        """The lines of Python that open the model with stock transformers and peft."""
        return (
            "from peft import PeftModel; from transformers import AutoModelForCausalLM",
            f"base = AutoModelForCausalLM.from_pretrained({self.base!r})",
            f"model = PeftModel.from_pretrained(base, {str(self.folder)!r})",
        )


async def download_model(client: ShoalClient, job_id: str, folder: Path) -> DownloadedModel:
    """The job's model is in ``folder``, every file equal to its published digest.

    Raises:
        NotFound: the job has no model yet.
        PeerFault: what was served differs from its digest, is absurdly large, or is of a kind
            no model needs.
        Unavailable: no holder of the bytes answers.
    """
    model = await client.model(job_id)
    wanted = [(folder / file.path, file.blob()) for file in model.files]
    base = model.base.name
    if not is_hub_id(base):
        require_allowed_files(model.base)
        base = str(folder / BASE_FOLDER)
        wanted += [(folder / BASE_FOLDER / file.path, file.blob) for file in model.base.files]
    _require_modest(job_id, wanted)
    blob_urls = (await client.info()).blob_urls
    try:
        for path, blob in wanted:
            await _fetch(client, blob_urls, blob, path)
        bundle = await _fetch_bundle(client, job_id, folder / BUNDLE_FILE)
    except OSError as error:
        raise InvalidRequest(
            f"The model cannot be written to {folder}: {error.strerror or error}; name a "
            "folder that can with --out."
        ) from None
    return DownloadedModel(
        folder=folder,
        files=tuple(path for path, _ in wanted[: len(model.files)]),
        base=base,
        bundle=bundle,
    )


def _require_modest(job_id: str, wanted: list[tuple[Path, BlobRef]]) -> None:
    total_bytes = sum(blob.size_bytes for _, blob in wanted)
    if total_bytes > MAX_MODEL_BYTES:
        raise PeerFault(
            f"The model of {job_id} claims {total_bytes} bytes, more than the "
            f"{MAX_MODEL_BYTES} allowed; it was not fetched.",
            code="oversize",
        )


async def _fetch_bundle(client: ShoalClient, job_id: str, path: Path) -> Path | None:
    try:
        data = await client.bundle(job_id)
    except ShoalError as error:
        if error.code != "not_final":
            raise
        return None
    _publish(path, data)
    return path


def _publish(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.replace(path)


async def _fetch(
    client: ShoalClient, blob_urls: tuple[str, ...], blob: BlobRef, path: Path
) -> None:
    if _holds(path, blob):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    trouble = "the orchestrator names no holder"
    for blob_url in blob_urls:
        url = f"{blob_url.rstrip('/')}/blobs/{blob.sha256}"
        try:
            await _stream(client.session, url, blob, part)
        except (aiohttp.ClientError, TimeoutError) as error:
            trouble = f"{url}: {error or type(error).__name__}"
            continue
        # Only a complete, verified file ever has the final name.
        os.replace(part, path)
        return
    raise Unavailable(f"{path.name} cannot be fetched ({trouble}); try again later.")


def _holds(path: Path, blob: BlobRef) -> bool:
    """Whether ``path`` has the bytes already, from an earlier download."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size != blob.size_bytes:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == blob.sha256


async def _stream(session: aiohttp.ClientSession, url: str, blob: BlobRef, part: Path) -> None:
    digest = hashlib.sha256()
    size_bytes = 0
    async with session.get(url, timeout=_TIMEOUT) as response:
        response.raise_for_status()
        with part.open("wb") as out:
            async for data in response.content.iter_chunked(_CHUNK_BYTES):
                size_bytes += len(data)
                if size_bytes > blob.size_bytes:
                    break
                digest.update(data)
                out.write(data)
    if size_bytes != blob.size_bytes or digest.hexdigest() != blob.sha256:
        os.unlink(part)
        raise PeerFault(
            f"What {url} serves as {part.stem} differs from its digest; it was deleted.",
            code="digest_mismatch",
            evidence=digest.hexdigest(),
        )
