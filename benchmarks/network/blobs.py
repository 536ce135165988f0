"""Blobs over HTTP: against a bare download, from more holders, against hivemind's averaging.

``python -m benchmarks.network.blobs [--quick]``
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
import venv
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import aiohttp

from benchmarks.network import averaging
from benchmarks.network.parties import bare_http, http_seeder, party, say, until_dismissed
from benchmarks.network.table import Finding, main_of, median
from shoal.network.blob_client import BlobClient
from shoal.network.blob_store import BlobStore
from shoal.protocol.blob import BlobRef

# The lab of network namespaces that the tests use.
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from netlab import NetLab, why_not

STORE_BYTES = 8 << 30
LIMIT_SHARE = 0.5
LIMIT_SPEEDUP = 3.0
LIMIT_HIVEMIND = 3.0
SHAPED_MBIT = 100
HIVEMIND = "hivemind==1.1.12"
HIVEMIND_HOME = Path("runs/hivemind")
_READ_BYTES = 1 << 18


def made_blob(directory: Path, size_bytes: int) -> BlobRef:
    """A store in `directory` holds random bytes; their reference."""
    store = BlobStore(directory, STORE_BYTES)
    with store.draft() as draft:
        for _ in range(size_bytes >> 20):
            draft.write(os.urandom(1 << 20))
        return draft.keep()


async def bare_s(url: str, path: Path) -> float:
    """The seconds in which aiohttp alone brings the file to disk, unchecked."""
    async with aiohttp.ClientSession() as session:
        begun_s = time.perf_counter()
        async with session.get(url) as answer:
            with path.open("wb") as file:
                async for part in answer.content.iter_chunked(_READ_BYTES):
                    file.write(part)
        return time.perf_counter() - begun_s


async def fetch_s(ref: BlobRef, sources: Sequence[str]) -> float:
    """The seconds in which the blob is fetched, checked and stored."""
    with TemporaryDirectory(prefix="shoal-bench-") as name:
        async with BlobClient(BlobStore(Path(name), STORE_BYTES)) as client:
            begun_s = time.perf_counter()
            await client.fetch(ref, sources, timeout_s=600)
            return time.perf_counter() - begun_s


async def in_turn(size_bytes: int, count: int) -> tuple[list[float], list[float]]:
    """The seconds of the bare download and of the blob, `count` times in turn."""
    bare, ours = [], []
    with TemporaryDirectory(prefix="shoal-bench-") as name:
        root = Path(name)
        ref = made_blob(root / "held", size_bytes)
        async with (
            party(bare_http, root / "held" / ref.sha256) as plain,
            party(http_seeder, root / "held") as seeder,
        ):
            for _ in range(count):
                bare.append(await bare_s(plain.ready, root / "bare"))
                ours.append(await fetch_s(ref, [seeder.ready]))
    return bare, ours


async def timed_fetch(directory: str, reference: str, sources: Sequence[str]) -> None:
    """Fetches once, in whichever namespace this party runs; says how long it took."""
    say(await fetch_s(BlobRef.model_validate_json(reference), sources))
    await until_dismissed()


async def from_shaped(size_bytes: int, numbers: Sequence[int]) -> list[float]:
    """The seconds in which one fetcher has the blob from each number of shaped holders."""
    with TemporaryDirectory(prefix="shoal-bench-") as name, NetLab() as lab:
        ref = made_blob(Path(name), size_bytes)
        fetcher = lab.host("fetcher")
        holders = [lab.host(f"holder{number}") for number in range(max(numbers))]
        for holder in holders:
            holder.shape(up_mbit=SHAPED_MBIT, down_mbit=SHAPED_MBIT)
        async with AsyncExitStack() as stack:
            seeders = [
                await stack.enter_async_context(
                    party(http_seeder, name, holder.ip, prefix=holder.argv([]))
                )
                for holder in holders
            ]
            taken = []
            for number in numbers:
                sources = [seeder.ready for seeder in seeders[:number]]
                arguments = (name, ref.model_dump_json(), sources)
                async with party(timed_fetch, *arguments, prefix=fetcher.argv([])) as one:
                    taken.append(float(one.ready))
            return taken


def hivemind_python() -> Path:
    """An interpreter that has hivemind and this torch; made once, apart from Shoal's own."""
    python = HIVEMIND_HOME / "bin" / "python"
    if not python.exists():
        venv.create(HIVEMIND_HOME, with_pip=True, clear=True)
        torch = version("torch").partition("+")[0]
        wanted = [HIVEMIND, f"torch=={torch}"]
        install = [str(python), "-m", "pip", "install", "--quiet", *wanted]
        subprocess.run(install, check=True, stderr=subprocess.DEVNULL)
    return python


def averaging_s(size_bytes: int, count: int) -> list[float]:
    """The seconds of each round in which two hivemind peers average as many bytes."""
    command = [str(hivemind_python()), averaging.__file__, str(size_bytes), str(count)]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=True,
        timeout=60 + 60 * count,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return [float(taken) for taken in json.loads(done.stdout)]


def against_hivemind(size_bytes: int, ours_s: list[float], count: int) -> Finding:
    """Hivemind's averaging of the same bytes, or why it was not measured.

    The blob was fetched before (`ours_s`) and is fetched again after it.
    """
    what = f"hivemind averaging {size_bytes >> 20} MiB of fp32 between two peers"
    try:
        taken = averaging_s(size_bytes, count)
    except (subprocess.SubprocessError, OSError) as error:
        return Finding(what=what, measured=f"not measured: {error}")
    _, again = asyncio.run(in_turn(size_bytes, len(ours_s)))
    ratio = median(taken) / median(ours_s + again)
    rate = size_bytes / median(taken) / 1e6
    return Finding(
        what=what,
        measured=f"{rate:.0f} MB/s; a blob is {ratio:.1f} times as fast",
        wanted=f"≥ {LIMIT_HIVEMIND:g} times",
        reached=ratio >= LIMIT_HIVEMIND,
    )


def shaped(size_bytes: int) -> Iterator[Finding]:
    """One, two and four holders behind links of `SHAPED_MBIT` each."""
    reason = why_not()
    if reason:
        yield Finding(what="several shaped holders", measured=f"not measured: {reason}")
        return
    one, two, four = asyncio.run(from_shaped(size_bytes, [1, 2, 4]))
    mbit = size_bytes * 8 / 1e6
    yield Finding(
        what=f"{size_bytes >> 20} MiB from 1, 2, 4 holders of {SHAPED_MBIT} Mbit/s each",
        measured=f"{mbit / one:.0f}, {mbit / two:.0f}, {mbit / four:.0f} Mbit/s: "
        f"4 are {one / four:.2f} times one",
        wanted=f"≥ {LIMIT_SPEEDUP:g} times",
        reached=one / four >= LIMIT_SPEEDUP,
    )


def findings(*, quick: bool) -> Iterator[Finding]:
    """A blob against a bare download, against itself from more holders, against hivemind."""
    size_bytes, count = (64 << 20, 3) if quick else (256 << 20, 7)
    bare, ours = asyncio.run(in_turn(size_bytes, count))
    mib = size_bytes >> 20
    yield Finding(
        what=f"{mib} MiB by aiohttp alone, on disk, unchecked",
        measured=f"{size_bytes / median(bare) / 1e6:.0f} MB/s",
    )
    share = median([one / other for one, other in zip(bare, ours, strict=True)])
    yield Finding(
        what=f"{mib} MiB as a blob over HTTP, checked and on disk",
        measured=f"{size_bytes / median(ours) / 1e6:.0f} MB/s, {share:.0%} of the bare download",
        wanted=f"≥ {LIMIT_SHARE:.0%}",
        reached=share >= LIMIT_SHARE,
    )
    yield from shaped(32 << 20 if quick else 64 << 20)
    yield against_hivemind(size_bytes, ours, 2 if quick else 5)


if __name__ == "__main__":
    main_of(__doc__, findings)
