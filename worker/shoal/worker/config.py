"""How a worker is set up: defaults, then the TOML file, the environment, the command line."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from shoal.protocol.errors import InvalidRequest
from shoal.protocol.ids import Address, Name
from shoal.protocol.market import TaskKind
from shoal.protocol.money import Micros, parse_dollars
from shoal.protocol.record import first_fault

ENVIRONMENT_PREFIX: Final = "SHOAL_WORKER_"
MAX_CAPACITY: Final = 1 << 20
_MAX_PORT: Final = 65_535
LOCAL_RAY: Final = "local"
"""The Ray address that asks for a cluster of our own on this machine."""


class Device(StrEnum):
    """Where the model runs; ``auto`` takes a GPU when there is one."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
    MPS = "mps"


class SamplingChoice(StrEnum):
    """What draws completions; ``auto`` is ``loop``, which runs on every device."""

    AUTO = "auto"
    LOOP = "loop"
    VLLM = "vllm"


def _dollars(text: str) -> str:
    parse_dollars(text, "the amount")
    return text


def _price(text: str) -> str:
    if parse_dollars(text, "the price") <= 0:
        raise ValueError('a price is above zero; write for example "0.0002"')
    return text


def _addresses(value: object) -> object:
    """A list as it is; one text is split at its commas."""
    if not isinstance(value, str):
        return value
    return tuple(part.strip() for part in value.split(",") if part.strip())


def _listen(text: str) -> str:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > _MAX_PORT:
        raise ValueError('write it as HOST:PORT, for example "0.0.0.0:8701"')
    return text


Dollars = Annotated[str, AfterValidator(_dollars)]
Price = Annotated[str, AfterValidator(_price)]
Listen = Annotated[str, AfterValidator(_listen), Field(max_length=300)]
Addresses = Annotated[
    tuple[Annotated[str, Field(min_length=1, max_length=500)], ...],
    BeforeValidator(_addresses),
    Field(max_length=16),
]
"""Several ways to one place, as a list or as one text with commas."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FloorPrices(_Section):
    """The least the provider works for: dollars for each accepted unit, by kind of task.

    A unit is a group of completions for ``rollout`` and ``gradient``, and one held-out prompt
    for ``evaluate``.
    """

    rollout: Price = "0.0001"
    gradient: Price = "0.0001"
    evaluate: Price = "0.00001"

    def micros(self, kind: TaskKind) -> Micros:
        """The floor price of one unit of ``kind``."""
        return parse_dollars(str(getattr(self, kind.value)), f"price.{kind.value}")


class Capacity(_Section):
    """How many units of each kind the worker holds at once; 0 declines the kind.

    The defaults hold two usual rollout tasks, so that the next one's bytes arrive while one is
    computed, and one gradient, so that a batch's gradients spread over the workers.
    """

    rollout: int = Field(default=128, ge=0, le=MAX_CAPACITY)
    gradient: int = Field(default=96, ge=0, le=MAX_CAPACITY)
    evaluate: int = Field(default=512, ge=0, le=MAX_CAPACITY)

    def units(self, kind: TaskKind) -> int:
        """The most units of ``kind`` in flight."""
        return int(getattr(self, kind.value))


class RaySettings(_Section):
    """A Ray cluster of the provider's own that computes in place of this process.

    Attributes:
        address: ``HOST:PORT`` of the cluster's head, or ``local`` to start one on this machine;
            absent uses no Ray.
        actors: Processes that share each task; absent takes as many as fit.
        cpus_per_actor: CPUs each declares.
        gpus_per_actor: GPUs each declares; absent is one where the cluster has any.
        object_store_bytes: Shared memory of a cluster started here.
        cache_dir: Where the cluster's other nodes keep bases.
    """

    address: str | None = Field(default=None, min_length=1, max_length=500)
    actors: int | None = Field(default=None, ge=1, le=4096)
    cpus_per_actor: float = Field(default=1.0, ge=0.01, le=1024)
    gpus_per_actor: float | None = Field(default=None, ge=0, le=64)
    object_store_bytes: int = Field(default=256 << 20, ge=80 << 20)
    cache_dir: Path = Path("~/.cache/shoal/bases")


_SECTIONS: Final[dict[str, type[_Section]]] = {
    "price": FloorPrices,
    "capacity": Capacity,
    "ray": RaySettings,
}


class WorkerConfig(_Section):
    """Everything a provider can set.

    Attributes:
        orchestrator: Libp2p addresses that end in ``/p2p/<peer id>``, or URLs of the
            orchestrator's API, which is asked for such addresses; all of one orchestrator.
            None: one is looked for.
        trust: The account of the orchestrator to work for, which it must prove; needed where
            it is looked for.
        bootstrap: Libp2p addresses of nodes that are asked for orchestrators.
        mdns: Whether the local network is asked for orchestrators.
        data_dir: Where keys, models, receipts and verdicts are kept.
        name: What the orchestrator calls this worker.
        price: Floor prices.
        capacity: Units in flight.
        stake: Dollars the account is to have at stake in all, put up where it has less; absent
            never moves money.
        rpc_url: A chain node of the provider's own; absent uses the orchestrator's proposals.
        device: Where the model runs.
        engine: What draws completions: Shoal's own loop, or vLLM.
        ray: A cluster of the provider's own to compute on.
        niceness: How far below other programs the process runs (0 to 19).
        claim_interval_s: Pause between two looks at what is owed.
        claim_min: Dollars below which an unfinished job's pay is left to grow.
        max_base_bytes: Largest base model accepted.
        cache_bytes: Disk kept for adapters and batches.
        share: Whether other workers may fetch from this one what it holds; over its connection
            to the orchestrator, and over HTTP with ``blob_listen``.
        blob_listen: ``HOST:PORT`` to serve blobs on over HTTP; absent, none.
        blob_url: Base URL under which others reach ``blob_listen``, where that is another.
        upload_mbit: Most that others may fetch, in megabits per second; 0 is no limit.
        num_threads: CPU threads the model may use.
        connect_timeout_s: How long the first connection may take, tries included.
        log_file: Where events are written; absent writes to standard error.

    Example:
        >>> config = load_config(None, {}, {"orchestrator": "http://127.0.0.1:8000",
        ...                                 "price.rollout": "0.0002"})
        >>> config.price.micros(TaskKind.ROLLOUT)
        200
    """

    orchestrator: Addresses = ()
    trust: Address | None = None
    bootstrap: Addresses = ()
    mdns: bool = False
    data_dir: Path = Path("~/.shoal/worker")
    name: Name = "worker"
    price: FloorPrices = FloorPrices()
    capacity: Capacity = Capacity()
    stake: Dollars | None = None
    rpc_url: str | None = Field(default=None, max_length=500)
    device: Device = Device.AUTO
    engine: SamplingChoice = SamplingChoice.AUTO
    ray: RaySettings = RaySettings()
    niceness: int = Field(default=5, ge=0, le=19)
    claim_interval_s: float = Field(default=30.0, ge=0.1, le=86_400)
    claim_min: Dollars = "0.01"
    max_base_bytes: int = Field(default=20 << 30, ge=1)
    cache_bytes: int = Field(default=2 << 30, ge=16 << 20)
    share: bool = True
    blob_listen: Listen | None = None
    blob_url: str | None = Field(default=None, pattern=r"^https?://[^\s@?#\\]+$", max_length=300)
    upload_mbit: float = Field(default=0.0, ge=0, le=1_000_000)
    num_threads: int = Field(default=1, ge=1, le=1024)
    connect_timeout_s: float = Field(default=30.0, gt=0, le=86_400)
    log_file: Path | None = None

    @property
    def is_finding(self) -> bool:
        """Whether an orchestrator that is not named is looked for, here or among the remembered."""
        return self.trust is not None or self.mdns or bool(self.bootstrap)

    @property
    def folder(self) -> Path:
        """``data_dir`` with ``~`` filled in."""
        return self.data_dir.expanduser()

    def with_actors(self, num_actors: int) -> WorkerConfig:
        """The same with ``num_actors`` times the default capacity, where none was set."""
        default = Capacity()
        scaled = {
            kind: min(num_actors * getattr(default, kind), MAX_CAPACITY)
            for kind in Capacity.model_fields
            if kind not in self.capacity.model_fields_set
        }
        return self.model_copy(update={"capacity": self.capacity.model_copy(update=scaled)})

    @property
    def account_path(self) -> Path:
        """The keystore of the account that is paid."""
        return self.folder / "account.json"

    @property
    def node_key_path(self) -> Path:
        """The node's Ed25519 key."""
        return self.folder / "node.pem"

    @property
    def stake_micros(self) -> Micros | None:
        """What is to be at stake in all; None leaves the stake as it is."""
        return None if self.stake is None else parse_dollars(self.stake, "stake")

    @property
    def claim_min_micros(self) -> Micros:
        """The least worth a transaction while a job still runs."""
        return parse_dollars(self.claim_min, "claim_min")


def load_config(
    file: Path | None, environment: Mapping[str, str], options: Mapping[str, Any]
) -> WorkerConfig:
    """The resolved configuration.

    Args:
        file: A TOML file, or None.
        environment: Usually ``os.environ``; names such as ``SHOAL_WORKER_PRICE_ROLLOUT``.
        options: From the command line, dotted below a table (``price.rollout``); None is
            an option that was not given.

    Raises:
        InvalidRequest: something in one of them is unknown or malformed; the sentence names
            the source and, for an unknown key, the nearest valid one.
    """
    values: dict[str, Any] = {}
    for source, layer in (
        (str(file), _from_file(file)),
        ("the environment", _from_environment(environment)),
        ("the command line", {key: value for key, value in options.items() if value is not None}),
    ):
        for key, value in layer.items():
            _require_known(key, source)
            values[key] = value
    try:
        return WorkerConfig.model_validate(_nested(values))
    except ValidationError as error:
        raise InvalidRequest(
            f"The worker's configuration is not valid: {first_fault(error)}.", code="bad_config"
        ) from None


def describe_config(config: WorkerConfig) -> dict[str, Any]:
    """What ``--dry-run`` prints: every setting as it would be used, and no secret."""
    resolved = config.model_dump(mode="json")
    resolved["data_dir"] = str(config.folder)
    return resolved


def _from_file(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidRequest(
            f"There is no configuration file at {file}; name an existing one.", code="no_config"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"{file} cannot be read as TOML: {error}.", code="bad_config"
        ) from None
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if key in _SECTIONS and isinstance(value, dict):
            flat |= {f"{key}.{inner}": content for inner, content in value.items()}
        else:
            flat[key] = value
    return flat


def _from_environment(environment: Mapping[str, str]) -> dict[str, str]:
    flat = {}
    for name, value in environment.items():
        if name.startswith(ENVIRONMENT_PREFIX):
            key = name.removeprefix(ENVIRONMENT_PREFIX).lower()
            section, _, rest = key.partition("_")
            flat[f"{section}.{rest}" if section in _SECTIONS else key] = value
    return flat


def _known_keys() -> list[str]:
    keys = [key for key in WorkerConfig.model_fields if key not in _SECTIONS]
    for section, model in _SECTIONS.items():
        keys += [f"{section}.{key}" for key in model.model_fields]
    return keys


def _require_known(key: str, source: str) -> None:
    known = _known_keys()
    if key in known:
        return
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
    raise InvalidRequest(
        f"{source} sets {key!r}, which a worker does not know; did you mean {nearest!r}?",
        code="unknown_key",
    )


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, dot, inner = key.partition(".")
        if dot:
            nested.setdefault(section, {})[inner] = value
        else:
            nested[key] = value
    return nested


def config_from_process(file: Path | None, options: Mapping[str, Any]) -> WorkerConfig:
    """`load_config` over this process's own environment."""
    return load_config(file, os.environ, options)
