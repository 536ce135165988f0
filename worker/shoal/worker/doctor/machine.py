"""The machine under the worker: disk, memory, processors, file descriptors, versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from shoal.protocol.version import SOFTWARE_VERSION
from shoal.worker.config import WorkerConfig
from shoal.worker.doctor.report import Finding, fail, ok, size, warn

LEAST_DISK_BYTES: Final = 2 << 30
"""Below it not even a small base with its adapters fits."""
LEAST_MEMORY_BYTES: Final = 1 << 30
"""torch, transformers and web3 take about 0.7 GiB in one process before any model is loaded."""
GOOD_MEMORY_BYTES: Final = 4 << 30
"""Room for a base of half a billion parameters in fp32 beside that."""
LEAST_FILES: Final = 256
"""A worker at work holds about a hundred: connections, blobs, the model's files."""
GOOD_FILES: Final = 1_024

_DISTRIBUTIONS: Final = ("libp2p", "torch", "transformers", "peft", "web3")
_PIN = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s;,]+)$")


def look_at_disk(config: WorkerConfig) -> list[Finding]:
    """Whether the disk holds what the worker may put on it."""
    folder = nearest_folder(config.folder)
    free_bytes = shutil.disk_usage(folder).free
    held_bytes = sum(bytes_below(config.folder / name) for name in ("blobs", "bases"))
    findings = [
        judge_disk(
            free_bytes, held_bytes, config.cache_bytes + config.max_base_bytes, str(config.folder)
        )
    ]
    if not os.access(folder, os.W_OK):
        findings.append(
            fail(
                "disk",
                "data folder",
                f"{folder} cannot be written to",
                f"give its owner's rights to this user, or set data_dir (now {config.folder})",
            )
        )
    return findings


def judge_disk(free_bytes: int, held_bytes: int, wanted_bytes: int, folder: str) -> Finding:
    """What ``free_bytes`` beside ``held_bytes`` of our own mean when ``wanted_bytes`` may come."""
    measured = f"{size(free_bytes)} free for {folder}, {size(wanted_bytes)} allowed to it"
    if free_bytes + held_bytes >= wanted_bytes:
        return ok("disk", "disk", measured)
    if free_bytes + held_bytes < LEAST_DISK_BYTES:
        return fail("disk", "disk", measured, f"free {size(LEAST_DISK_BYTES)} or move data_dir")
    return warn(
        "disk",
        "disk",
        measured,
        "free some, or lower max_base_bytes and cache_bytes: a base that does not fit fails late",
    )


def nearest_folder(path: Path) -> Path:
    """``path``, or the folder above it that exists."""
    while not path.is_dir():
        path = path.parent
    return path


def bytes_below(folder: Path) -> int:
    """What the files below ``folder`` take on the disk, those of two names counted once."""
    seen: dict[tuple[int, int], int] = {}
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.lstat(os.path.join(place, name))
            except OSError:
                continue  # it went in the meantime
            seen[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(seen.values())


def look_at_memory() -> list[Finding]:
    """Whether a model fits into the memory."""
    return [judge_memory(*memory_bytes())]


def memory_bytes() -> tuple[int, int]:
    """Available and total memory."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return total, total
    fields = {name: rest.split()[0] for name, _, rest in (line.partition(":") for line in lines)}
    return int(fields.get("MemAvailable", total >> 10)) << 10, total


def judge_memory(available_bytes: int, total_bytes: int) -> Finding:
    """What so much memory is good for."""
    measured = f"{size(available_bytes)} of {size(total_bytes)} available"
    if available_bytes < LEAST_MEMORY_BYTES:
        return fail(
            "memory",
            "memory",
            measured,
            f"stop other programs: {size(LEAST_MEMORY_BYTES)} is least",
        )
    if available_bytes < GOOD_MEMORY_BYTES:
        return warn(
            "memory",
            "memory",
            measured,
            "only small models fit; stop other programs, or lower capacity.*",
        )
    return ok("memory", "memory", measured)


def look_at_processors(config: WorkerConfig) -> list[Finding]:
    """Whether there are processors for the threads that the model may use."""
    return [judge_processors(usable_processors(), config.num_threads)]


def usable_processors() -> int:
    """Processors this process may run on."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def judge_processors(num_usable: int, num_threads: int) -> Finding:
    """What ``num_threads`` mean on so many processors."""
    machine = platform.machine()
    measured = f"{num_usable} usable ({machine}), num_threads {num_threads}"
    if num_threads > num_usable:
        return warn(
            "cpu",
            "processors",
            measured,
            f"set num_threads to {num_usable} at most: more threads wait for each other",
        )
    return ok("cpu", "processors", measured)


def look_at_files() -> list[Finding]:
    """Whether the process may open as many files as it needs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return [judge_files(soft, hard)]


def judge_files(soft: int, hard: int) -> Finding:
    """What the limits on open files mean; a negative one is none."""
    if soft < 0 or soft >= GOOD_FILES:
        return ok("files", "open files", f"limit {'none' if soft < 0 else soft}")
    within = hard < 0 or hard >= GOOD_FILES
    mend = f"ulimit -n {GOOD_FILES}" if within else f"raise the hard limit to {GOOD_FILES} as root"
    if soft < LEAST_FILES:
        return fail("files", "open files", f"limit {soft}", mend)
    return warn("files", "open files", f"limit {soft}", mend)


def look_at_versions() -> list[Finding]:
    """Whether the packages that Shoal rests on are the ones it was made for."""
    return [judge_versions(_installed(_DISTRIBUTIONS), _required())]


def judge_versions(installed: Mapping[str, str | None], required: Iterable[str]) -> Finding:
    """What is installed, against what is pinned exactly."""
    what = "packages"
    missing = sorted(name for name, version in installed.items() if version is None)
    if missing:
        return fail("versions", what, f"not installed: {', '.join(missing)}", "pip install shoal")
    for requirement in required:
        pin = _PIN.match(requirement)
        found = None if pin is None else installed.get(pin["name"])
        if pin is not None and found is not None and found != pin["version"]:
            return fail(
                "versions",
                what,
                f"{pin['name']} {found}, and Shoal works with {pin['version']} only",
                f"pip install {pin['name']}=={pin['version']}",
            )
    listed = ", ".join(f"{name} {version}" for name, version in installed.items())
    python = platform.python_version()
    return ok("versions", what, f"Shoal {SOFTWARE_VERSION}, Python {python}, {listed}")


def _installed(names: Iterable[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _required() -> list[str]:
    try:
        return importlib.metadata.requires("shoal") or []
    except importlib.metadata.PackageNotFoundError:
        return []
