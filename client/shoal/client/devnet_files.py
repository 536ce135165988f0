"""What a devnet keeps in its folder: keys, configurations, and where it runs just now.

::

    devnet.json         which version of this layout the folder holds
    running.json        addresses, while the devnet runs
    lock                held while the devnet runs
    deployment.json     the contracts' addresses
    chain/              the chain's saved state
    keys/               account keys of the orchestrator and the requester
    orchestrator.toml   its configuration; data in orchestrator/, log in orchestrator.log
    worker-1.toml …     likewise; keys and data in worker-1/ …
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from shoal.protocol.errors import InvalidRequest, Unavailable

LAYOUT_VERSION = 1
DEFAULT_FOLDER = Path(".shoal/devnet")
_LOCK = "lock"


class RunningDevnet(BaseModel):
    """Where a running devnet is found.  Writer: the devnet.  Reader: the other commands."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    pid: int
    api_url: str
    rpc_url: str
    p2p_addresses: tuple[str, ...]
    requester_key: Path


@dataclass(frozen=True, kw_only=True)
class WorkerProfile:
    """How one of the devnet's workers differs: prices in dollars, niceness.

    ``tables`` are further tables of its configuration, by name (``ray``, ``capacity``).
    """

    name: str
    rollout_price: str
    gradient_price: str
    evaluate_price: str
    niceness: int
    tables: Mapping[str, Mapping[str, object]] = field(default_factory=dict)


# Each asks more than the one before it, and yields the processor sooner:
# different prices and different speeds.
_PROFILES = (
    ("0.0002", "0.0001", "0.00001", 0),
    ("0.00025", "0.00012", "0.000012", 3),
    ("0.00028", "0.00014", "0.000014", 6),
)


def worker_profile(index: int) -> WorkerProfile:
    """The profile of worker ``index``, counted from 0; they repeat after three."""
    rollout, gradient, evaluate, niceness = _PROFILES[index % len(_PROFILES)]
    return WorkerProfile(
        name=f"worker-{index + 1}",
        rollout_price=rollout,
        gradient_price=gradient,
        evaluate_price=evaluate,
        niceness=niceness,
    )


class DevnetFolder:
    """The paths of one devnet.

    Args:
        root: The folder; made when missing.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.chain = self.root / "chain"
        self.deployment = self.root / "deployment.json"
        self.orchestrator_key = self.root / "keys/orchestrator.json"
        self.requester_key = self.root / "keys/requester.json"
        self.orchestrator_config = self.root / "orchestrator.toml"
        self.orchestrator_log = self.root / "orchestrator.log"
        self._marker = self.root / "devnet.json"
        self._running = self.root / "running.json"

    def worker_config(self, name: str) -> Path:
        """The configuration of the worker called ``name``."""
        return self.root / f"{name}.toml"

    def worker_data(self, name: str) -> Path:
        """Where that worker keeps its keys and caches."""
        return self.root / name

    def worker_key(self, name: str) -> Path:
        """The keystore of that worker's account."""
        return self.worker_data(name) / "account.json"

    def worker_log(self, name: str) -> Path:
        """What that worker said."""
        return self.root / f"{name}.log"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else runs this devnet meanwhile, and its layout is ours.

        Raises:
            Unavailable: another process runs it.
            InvalidRequest: another version of Shoal made it, or it cannot be written.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = (self.root / _LOCK).open("w")
        except OSError as error:
            raise InvalidRequest(
                f"The devnet's folder {self.root} cannot be written ({error.strerror}); name "
                "another with --data."
            ) from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise Unavailable(
                    f"A devnet already runs in {self.root}; stop it with Ctrl-C, or name "
                    "another folder with --data.",
                    code="devnet_running",
                ) from None
            self._require_layout()
            try:
                yield
            finally:
                self._running.unlink(missing_ok=True)

    def _require_layout(self) -> None:
        if not self._marker.exists():
            if any(path.name != _LOCK for path in self.root.iterdir()):
                raise InvalidRequest(
                    f"{self.root} holds files that are not a devnet's; name an empty or a new "
                    "folder."
                )
            self._marker.write_text(json.dumps({"layout": LAYOUT_VERSION}) + "\n")
            return
        try:
            found = json.loads(self._marker.read_text()).get("layout")
        except (ValueError, AttributeError):
            found = None
        if found != LAYOUT_VERSION:
            raise InvalidRequest(
                f"The devnet in {self.root} was made by another version of Shoal (layout "
                f"{found}, this one writes {LAYOUT_VERSION}); delete the folder, or name another "
                "with --data.",
                code="stale_devnet",
            )

    def announce(self, running: RunningDevnet) -> None:
        """The other commands find the devnet."""
        part = self._running.with_suffix(".part")
        part.write_text(running.model_dump_json(indent=1) + "\n")
        os.replace(part, self._running)

    def running(self) -> RunningDevnet | None:
        """The devnet that runs here, or None."""
        try:
            found = RunningDevnet.model_validate_json(self._running.read_bytes())
            os.kill(found.pid, 0)
        except (OSError, ValidationError):
            # A devnet that was killed leaves its file behind.
            return None
        return found


def find_running(start: Path | None = None) -> RunningDevnet | None:
    """The devnet running under ``start`` (the working directory) or a folder above it."""
    here = (start or Path.cwd()).absolute()
    for folder in (here, *here.parents):
        running = DevnetFolder(folder / DEFAULT_FOLDER).running()
        if running is not None:
            return running
    return None


def write_toml(path: Path, values: Mapping[str, object]) -> None:
    """``path`` holds ``values``: text, whole numbers, booleans, and one level of tables."""
    lines = [f"{key} = {_literal(value)}" for key, value in values.items() if not _is_table(value)]
    for name, table in values.items():
        if isinstance(table, Mapping):
            lines += ["", f"[{name}]", *(f"{key} = {_literal(v)}" for key, v in table.items())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _is_table(value: object) -> bool:
    return isinstance(value, Mapping)


def _literal(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    # TOML's basic strings take JSON's escapes, and want one more character escaped.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
