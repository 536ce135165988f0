"""Fetches a published adapter, trusting no carrier: every file is checked by its digest."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import aiohttp

from shoal.client.api import ShoalClient
from shoal.client.views import ModelFileView
from shoal.protocol.errors import InvalidRequest, PeerFault, Unavailable

MAX_MODEL_BYTES = 64 << 30
_CHUNK_BYTES = 1 << 20
# A large file takes long and is welcome to; a silent peer is not.
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=30)


async def download_model(client: ShoalClient, job_id: str, folder: Path) -> list[Path]:
    """The job's adapter is in ``folder``, every file equal to its published digest.

    Raises:
        NotFound: the job has no model yet.
        PeerFault: what was served differs from its digest, or is absurdly large.
        Unavailable: no holder of the bytes answers.
    """
    model = await client.model(job_id)
    total_bytes = sum(file.size_bytes for file in model.files)
    if total_bytes > MAX_MODEL_BYTES:
        raise PeerFault(
            f"The model of {job_id} claims {total_bytes} bytes, more than the "
            f"{MAX_MODEL_BYTES} allowed; it was not fetched.",
            code="oversize",
        )
    blob_urls = (await client.info()).blob_urls
    try:
        _make_folder(folder)
        return [await _fetch(client, blob_urls, file, folder / file.path) for file in model.files]
    except OSError as error:
        raise InvalidRequest(
            f"The model cannot be written to {folder}: {error.strerror or error}; name a "
            "folder that can with --out."
        ) from None


def _make_folder(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)


async def _fetch(
    client: ShoalClient, blob_urls: tuple[str, ...], file: ModelFileView, path: Path
) -> Path:
    part = path.with_name(path.name + ".part")
    trouble = "the orchestrator names no holder"
    for blob_url in blob_urls:
        url = f"{blob_url.rstrip('/')}/blobs/{file.sha256}"
        try:
            await _stream(client.session, url, file, part)
        except (aiohttp.ClientError, TimeoutError) as error:
            trouble = f"{url}: {error or type(error).__name__}"
            continue
        # Only a complete, verified file ever has the final name.
        os.replace(part, path)
        return path
    raise Unavailable(f"{file.path} cannot be fetched ({trouble}); try again later.")


async def _stream(
    session: aiohttp.ClientSession, url: str, file: ModelFileView, part: Path
) -> None:
    digest = hashlib.sha256()
    size_bytes = 0
    async with session.get(url, timeout=_TIMEOUT) as response:
        response.raise_for_status()
        with part.open("wb") as out:
            async for data in response.content.iter_chunked(_CHUNK_BYTES):
                size_bytes += len(data)
                if size_bytes > file.size_bytes:
                    break
                digest.update(data)
                out.write(data)
    if size_bytes != file.size_bytes or digest.hexdigest() != file.sha256:
        os.unlink(part)
        raise PeerFault(
            f"What {url} serves as {file.path} differs from its digest; it was deleted.",
            code="digest_mismatch",
            evidence=digest.hexdigest(),
        )
