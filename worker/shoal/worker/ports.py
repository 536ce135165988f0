"""What the worker needs from the chain, the blob plane and the compute engine, as it needs it.

The real parts live in `shoal.contracts`, `shoal.network` and `shoal.worker.engine`; stating
the needs here lets the worker be driven without a chain, a socket or a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from shoal.contracts.records import Claim, EscrowState, Mined, StakeInfo
from shoal.protocol.blob import BlobRef
from shoal.protocol.ids import Digest
from shoal.protocol.task import EvaluateTask, GradientTask, RolloutTask

AnyTask = RolloutTask | GradientTask | EvaluateTask


class ProviderToken(Protocol):
    """The settlement token, seen from a provider's account."""

    async def balance(self, account: str) -> int:
        """Tokens of ``account``, in micros."""
        ...


class ProviderVault(Protocol):
    """The stake vault, seen from a provider's account."""

    async def stake_of(self, account: str) -> StakeInfo:
        """The stake of ``account``."""
        ...

    async def stake(self, amount_micros: int) -> Mined:
        """``amount_micros`` of our own tokens are staked."""
        ...

    async def node_owner(self, node_key: bytes) -> str | None:
        """The account a node key is bound to; None when it is not bound."""
        ...

    async def bind_node(self, node_key: bytes) -> Mined:
        """The node key is bound to our account."""
        ...


class ProviderEscrow(Protocol):
    """The job escrow, seen from a provider's account."""

    async def job(self, job_id: str) -> EscrowState:
        """The job's escrow."""
        ...

    async def claimed(self, job_id: str, account: str) -> int:
        """What the job has paid ``account`` so far, in micros."""
        ...

    async def claim(self, job_id: str, claim: Claim) -> Mined:
        """The difference between ``claim`` and what was paid so far is paid."""
        ...


class ProviderChain(Protocol):
    """The chain, seen from a provider's account: its contracts, its clock, the gas money."""

    @property
    def token(self) -> ProviderToken:
        """The settlement token."""
        ...

    @property
    def vault(self) -> ProviderVault:
        """Where stake is."""
        ...

    @property
    def escrow(self) -> ProviderEscrow:
        """Where pay comes from."""
        ...

    async def now_s(self) -> int:
        """The chain's clock, in Unix seconds."""
        ...

    async def eth_balance(self, account: str) -> int:
        """Gas money of ``account``, in wei."""
        ...


class BlobPlane(Protocol):
    """Content-addressed bytes, fetched and handed in."""

    async def fetch(
        self,
        ref: BlobRef,
        sources: Sequence[str],
        *,
        timeout_s: float,
        on_bytes: Callable[[int], None] = ...,
    ) -> Path:
        """The blob lies on disk, verified; ``on_bytes`` was told how many more came, and when."""
        ...

    async def fetch_bytes(self, ref: BlobRef, sources: Sequence[str], *, timeout_s: float) -> bytes:
        """The blob's bytes, verified; whether they are on disk too is not said."""
        ...

    async def put(self, url: str, data: bytes, token: str, *, timeout_s: float) -> BlobRef:
        """``data`` is stored by the holder at ``url``."""
        ...


@dataclass(frozen=True, kw_only=True)
class TaskInput:
    """A task's bytes, all fetched and verified.

    Attributes:
        base_folder: The base model's files.
        base_sha256: Digest computed from those files as they lie on disk.
        adapter: The adapter's safetensors bytes.
        batch_slice: A gradient task's slice; None for the other kinds.
        residual: What earlier encodings of the job's gradients left out, for error feedback.
    """

    base_folder: Path
    base_sha256: Digest
    adapter: bytes
    batch_slice: bytes | None
    residual: bytes | None = None


@dataclass(frozen=True, kw_only=True)
class TaskOutput:
    """What a task came to.

    Attributes:
        payload: The result's safetensors bytes.
        policy_sha256: Digest of the base and adapter that were really loaded.
        num_tokens: Completion tokens sampled or differentiated.
        compute_ms: Time in the compute thread.
        engine: What computed it.
        dtype: In which arithmetic.
        residual: What the encoding of a gradient with error feedback left out.
    """

    payload: bytes
    policy_sha256: Digest
    num_tokens: int
    compute_ms: int
    engine: str
    dtype: str
    residual: bytes | None = None


class Engine(Protocol):
    """Runs one task at a time, in one thread."""

    def prepare(self) -> None:
        """What is slow to load is loaded, so that the first task need not wait for it."""
        ...

    def run(self, task: AnyTask, inputs: TaskInput, on_progress: Callable[[], None]) -> TaskOutput:
        """The task's output; whatever ``on_progress`` raises ends the task early."""
        ...
