"""The orchestrator's configuration: defaults, TOML file, environment, command line."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from shoal.orchestrator.reference import Benchmark
from shoal.protocol.errors import InvalidRequest
from shoal.protocol.record import first_fault

ENVIRONMENT_PREFIX = "SHOAL_ORCHESTRATOR_"
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{40}")
_MAX_WEIGHT = 1_000_000

Mirror = Annotated[str, Field(pattern=r"^https?://[^\s@?#\\]+$", max_length=300)]
"""An HTTP(S) base below which ``blobs/<sha256>`` lies."""

ListenAddress = Annotated[str, Field(pattern=r"^/[!-+\x2d-~]+$", max_length=300)]
"""A multiaddr without a peer id, such as ``/ip4/0.0.0.0/tcp/4001``."""

NodeAddress = Annotated[
    str, Field(pattern=r"^/[!-~]+/p2p/12D3KooW[1-9A-HJ-NP-Za-km-z]{44}$", max_length=300)
]
"""Where another node may be dialled, and who it is."""


class OrchestratorConfig(BaseModel):
    """Everything one orchestrator process is told at its start.

    An absent ``database_url`` means SQLite (WAL) inside ``data_dir``; Postgres is
    ``postgresql+psycopg://…``.  Bases are kept in ``models_dir``, or inside ``data_dir``.
    Ports of 0 take a free one.  ``allow_local_models`` lets a
    job name a path on this machine: safe only where requester and operator are the same.

    ``job_weights`` names requesters whose jobs get more (or less) of the workers than others,
    whose weight is 1.  A lease may last ``first_lease_ms`` while nobody knows how long its
    units take.  The parcel of one that has fallen behind is given to a second worker too, if
    that is expected to finish ``straggler_slack_ms`` sooner.

    A market epoch, for which the book of bids is sealed, lasts at least ``market_epoch_ms``.

    Workers that nobody gave an address find this process through ``bootstrap`` nodes, other
    orchestrators for example, and with ``mdns`` in the local network.

    ``mirrors`` are HTTP(S) bases that also hold this orchestrator's blobs.  All uploads of blobs
    together take at most ``upload_mbit`` (0: no limit).  With ``policy_deltas`` workers that hold
    a policy version fetch only what differs in the next, where that is less.

    It listens for workers at each address of ``p2p_listen``, TCP or WebSocket (``/ws``), and gives
    out ``p2p_announce`` instead where it stands behind a proxy or a router.

    With ``relay`` workers behind NATs are connected to each other through this process, which
    carries at most ``relay_mbit`` for all of them together.

    ``reference`` holds the operator's benchmarks of data-centre GPUs: what a unit may cost is
    then nine tenths of what it costs there, where that is below the requester's maximum.

    What the chain shows counts from ``chain_depth`` blocks on: deposits are not spent before,
    and a chain that drops a block deeper than that stops the process.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data_dir: Path
    rpc_url: str
    deployment_file: Path
    key_file: Path
    database_url: str = ""
    p2p_listen: tuple[ListenAddress, ...] = Field(
        default=("/ip4/127.0.0.1/tcp/0",), min_length=1, max_length=8
    )
    p2p_announce: tuple[ListenAddress, ...] = Field(default=(), max_length=16)
    bootstrap: tuple[NodeAddress, ...] = Field(default=(), max_length=16)
    mdns: bool = False
    relay: bool = True
    relay_mbit: float = Field(default=32.0, gt=0, le=100_000)
    max_connections: int = Field(default=1024, ge=1, le=65535)
    api_host: str = "127.0.0.1"
    api_port: int = Field(default=8700, ge=0, le=65535)
    blob_host: str = "127.0.0.1"
    blob_port: int = Field(default=0, ge=0, le=65535)
    public_host: str = "127.0.0.1"
    models_dir: Path | None = None
    mirrors: tuple[Mirror, ...] = Field(default=(), max_length=8)
    upload_mbit: float = Field(default=0.0, ge=0, le=1_000_000)
    policy_deltas: bool = True
    blob_cache_bytes: int = Field(default=20 << 30, ge=1 << 20)
    allow_local_models: bool = False
    min_stake_micros: int = Field(default=1_000_000, ge=0)
    heartbeat_ms: int = Field(default=1_000, ge=10)
    epoch_ms: int = Field(default=5_000, ge=100)
    market_epoch_ms: int = Field(default=1_000, ge=10, le=60_000)
    start_timeout_ms: int = Field(default=10_000, ge=100)
    first_lease_ms: int = Field(default=600_000, ge=100)
    lease_floor_ms: int = Field(default=30_000, ge=100)
    lease_ceiling_ms: int = Field(default=3_600_000, ge=100)
    straggler_slack_ms: int = Field(default=250, ge=0)
    max_attempts: int = Field(default=8, ge=1)
    chain_depth: int = Field(default=12, ge=0, le=10_000)
    job_weights: dict[str, float] = Field(default_factory=dict)
    reference: tuple[Benchmark, ...] = Field(default=(), max_length=1_000)

    @field_validator("bootstrap", "mirrors", "p2p_listen", "p2p_announce", mode="before")
    @classmethod
    def _one_text_is_a_list(cls, value: object) -> object:
        """The environment holds no lists: there, commas stand between the parts."""
        if not isinstance(value, str):
            return value
        return tuple(part.strip() for part in value.split(",") if part.strip())

    @field_validator("job_weights")
    @classmethod
    def _weights_are_usable(cls, weights: dict[str, float]) -> dict[str, float]:
        for address, weight in weights.items():
            if not _ADDRESS.fullmatch(address):
                raise ValueError(f"{address!r} is not an account address of 0x and 40 hex digits")
            if not 0 < weight <= _MAX_WEIGHT:
                raise ValueError(f"the weight of {address} must be above 0, at most {_MAX_WEIGHT}")
        return {address.lower(): weight for address, weight in weights.items()}

    def weight_of(self, requester: str) -> float:
        """The share of the workers that ``requester``'s jobs have together; usually 1."""
        return self.job_weights.get(requester.lower(), 1.0)

    def resolved_models_dir(self) -> Path:
        """Where bases are kept, with the default written out."""
        return self.models_dir or self.data_dir / "models"

    def resolved_database_url(self) -> str:
        """The database's URL, with the default written out."""
        return self.database_url or f"sqlite:///{self.data_dir / 'orchestrator.db'}"


def _from_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Settings named ``SHOAL_ORCHESTRATOR_…``, for example ``SHOAL_ORCHESTRATOR_RPC_URL``."""
    return {
        name.removeprefix(ENVIRONMENT_PREFIX).lower(): value
        for name, value in environment.items()
        if name.startswith(ENVIRONMENT_PREFIX)
    }


def load_config(file: Path | None, overrides: Mapping[str, object]) -> OrchestratorConfig:
    """The configuration in ``file``, with the environment and then ``overrides`` on top.

    Raises:
        InvalidRequest: naming the file, the key and, for an unknown key, the nearest one.
    """
    values: dict[str, object] = {}
    where = "the command line"
    if file is not None:
        where = str(file)
        try:
            values = tomllib.loads(file.read_text())
        except OSError as error:
            raise InvalidRequest(f"The configuration {file} cannot be read: {error}.") from None
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"The configuration {file} is not TOML: {error}.") from None
    values |= _from_environment(os.environ)
    values |= {key: value for key, value in overrides.items() if value is not None}
    for key in values.keys() - OrchestratorConfig.model_fields.keys():
        near = difflib.get_close_matches(key, OrchestratorConfig.model_fields, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "remove it."
        raise InvalidRequest(f"{where} has an unknown key {key!r}; {hint}", code="unknown_key")
    try:
        return OrchestratorConfig.model_validate(values)
    except ValidationError as error:
        raise InvalidRequest(f"{where} is not valid: {first_fault(error)}.") from None
