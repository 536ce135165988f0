"""The arrays of each payload, encoded as safetensors and decoded as from a stranger.

Rows of different lengths are stored flat: one array of all tokens, and the length of each
row.  Every decoder caps the size before it parses, and refuses what does not fit the task
exactly, naming the array.

Axes: ``n`` token (all rows, flat), ``b`` row (completion), ``p`` prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from shoal.protocol.canonical import sha256_hex
from shoal.protocol.errors import PeerFault
from shoal.protocol.ids import Digest
from shoal.protocol.learning import CodecSpec
from shoal.rl import codec

HEADER_ALLOWANCE_BYTES = 1 << 16
PROMPT_DIGEST_BYTES = 32

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]
_T = TypeVar("_T", bound=np.generic)


@dataclass(frozen=True, kw_only=True)
class RowLimits:
    """What the task lets a payload hold: rows, prompts, tokens per row, and token ids."""

    num_prompts: int
    num_rows: int
    max_tokens: int
    vocab_size: int


@dataclass(frozen=True, kw_only=True)
class RolloutPayload:
    """The completions of a rollout task.

    Writer: the worker.  Reader: the verifier.  Row ``p · group_size + g`` is completion
    ``g`` of prompt ``p``.

    Arrays: ``prompts_sha256`` uint8 (p, 32), digest of each prompt's tokens; ``token_ids``
    int32 (n); ``logprobs`` float32 (n), behaviour log-probabilities; ``lengths`` int32 (b);
    ``finished`` uint8 (b), 1 where the row ended itself; ``rewards`` float32 (b), claimed.
    """

    prompts_sha256: tuple[bytes, ...]
    token_ids: tuple[Ints, ...]
    logprobs: tuple[Floats, ...]
    finished: NDArray[np.bool_]
    rewards: Floats

    @property
    def num_tokens(self) -> int:
        """Completion tokens of all rows."""
        return sum(len(row) for row in self.token_ids)

    def encode(self) -> bytes:
        """The payload's bytes; equal payloads give equal bytes."""
        arrays = _encode_rows(self.prompts_sha256, self.token_ids, self.finished, self.rewards)
        arrays["logprobs"] = np.concatenate(self.logprobs).astype(np.float32)
        return safetensors.numpy.save(arrays)

    @classmethod
    def decode(cls, data: bytes, limits: RowLimits) -> RolloutPayload:
        """The payload in ``data``.

        Raises:
            PeerFault: naming the array that is missing, misshapen or out of range.
        """
        reader = _Reader("rollout payload", data, _max_rows_bytes(limits))
        prompts, token_ids, finished, rewards = _decode_rows(reader, limits)
        lengths = [len(row) for row in token_ids]
        logprobs = reader.floats("logprobs", sum(lengths))
        if (logprobs > 0).any():
            raise reader.fault("logprobs", "holds a logarithm of a probability above one")
        reader.require_all_read()
        return cls(
            prompts_sha256=prompts,
            token_ids=token_ids,
            logprobs=_split(logprobs, lengths),
            finished=finished,
            rewards=rewards,
        )


@dataclass(frozen=True, kw_only=True)
class EvaluatePayload:
    """The completions of an evaluation task; rows and arrays as for rollouts.

    Writer: the worker.  Reader: the verifier.
    """

    prompts_sha256: tuple[bytes, ...]
    token_ids: tuple[Ints, ...]
    finished: NDArray[np.bool_]
    rewards: Floats

    @property
    def num_tokens(self) -> int:
        """Completion tokens of all rows."""
        return sum(len(row) for row in self.token_ids)

    def encode(self) -> bytes:
        """The payload's bytes; equal payloads give equal bytes."""
        return safetensors.numpy.save(
            _encode_rows(self.prompts_sha256, self.token_ids, self.finished, self.rewards)
        )

    @classmethod
    def decode(cls, data: bytes, limits: RowLimits) -> EvaluatePayload:
        """The payload in ``data``.

        Raises:
            PeerFault: naming the array that is missing, misshapen or out of range.
        """
        reader = _Reader("evaluation payload", data, _max_rows_bytes(limits))
        prompts, token_ids, finished, rewards = _decode_rows(reader, limits)
        reader.require_all_read()
        return cls(prompts_sha256=prompts, token_ids=token_ids, finished=finished, rewards=rewards)


@dataclass(frozen=True, kw_only=True)
class GradientSlice:
    """Verified rows to differentiate.

    Writer: the orchestrator.  Reader: the worker, and the verifier on audit.

    Arrays: ``prompt_ids`` int32 (all prompts, flat) and ``prompt_lengths`` int32 (p);
    ``prompt_of_row`` int32 (b); ``token_ids`` int32 (n), ``logprobs`` float32 (n) and
    ``lengths`` int32 (b) as in the rollout; ``advantages`` float32 (b); ``truncated`` uint8
    (b), 1 where the row was cut off at the length limit.
    """

    prompts: tuple[Ints, ...]
    prompt_of_row: Ints
    token_ids: tuple[Ints, ...]
    logprobs: tuple[Floats, ...]
    advantages: Floats
    truncated: NDArray[np.bool_]

    @property
    def num_rows(self) -> int:
        """Completions in the slice."""
        return len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        """Completion tokens of all rows."""
        return sum(len(row) for row in self.token_ids)

    def encode(self) -> bytes:
        """The slice's bytes; equal slices give equal bytes."""
        return safetensors.numpy.save(
            {
                "prompt_ids": np.concatenate(self.prompts).astype(np.int32),
                "prompt_lengths": np.array([len(p) for p in self.prompts], dtype=np.int32),
                "prompt_of_row": self.prompt_of_row.astype(np.int32),
                "token_ids": np.concatenate(self.token_ids).astype(np.int32),
                "logprobs": np.concatenate(self.logprobs).astype(np.float32),
                "lengths": np.array([len(row) for row in self.token_ids], dtype=np.int32),
                "advantages": self.advantages.astype(np.float32),
                "truncated": self.truncated.astype(np.uint8),
            }
        )

    @classmethod
    def decode(
        cls, data: bytes, *, num_rows: int, num_prompts: int, vocab_size: int
    ) -> GradientSlice:
        """The slice in ``data``, whose digest the signed task fixed.

        Raises:
            PeerFault: naming the array that is missing, misshapen or out of range.
        """
        reader = _Reader("gradient slice", data, len(data))
        prompt_lengths = reader.ints("prompt_lengths", num_prompts, 1, len(data))
        lengths = reader.ints("lengths", num_rows, 1, len(data))
        prompt_ids = reader.ints(
            "prompt_ids", int(prompt_lengths.sum(dtype=np.int64)), 0, vocab_size
        )
        token_ids = reader.ints("token_ids", int(lengths.sum(dtype=np.int64)), 0, vocab_size)
        logprobs = reader.floats("logprobs", len(token_ids))
        prompt_of_row = reader.ints("prompt_of_row", num_rows, 0, num_prompts)
        advantages = reader.floats("advantages", num_rows)
        truncated = reader.flags("truncated", num_rows)
        reader.require_all_read()
        return cls(
            prompts=_split(prompt_ids, prompt_lengths.tolist()),
            prompt_of_row=prompt_of_row,
            token_ids=_split(token_ids, lengths.tolist()),
            logprobs=_split(logprobs, lengths.tolist()),
            advantages=advantages,
            truncated=truncated,
        )


NO_MINIMUM = float(2.0**127)
"""What a minimum over nothing is: above every ratio, and finite, as all figures on the wire."""


@dataclass(frozen=True, kw_only=True)
class GradientStats:
    """What was counted over the tokens of a slice that the loss saw.

    Sums, counts and extremes alone, so that the figures of slices merge into those of the
    batch; `metrics` divides once, after all slices are added.  ``live_tokens`` have a policy
    gradient: neither clipped nor masked.  A clip is decided ``num_clippable`` times: for each
    token, or for each row where the loss has one ratio a row.  ``raw_ratio_*`` are of π_prox/μ
    as it is, ``weight_*`` of what the loss was multiplied by, and ``masked_tokens`` those that
    a mask of the correction dropped.  ``kl_*`` stay 0 without a KL term.
    """

    loss_sum: float = 0.0
    num_tokens: float = 0.0
    num_rows: float = 0.0
    live_tokens: float = 0.0
    entropy_sum: float = 0.0
    kl_sum: float = 0.0
    kl_tokens: float = 0.0
    num_clippable: float = 0.0
    clipped_low: float = 0.0
    clipped_high: float = 0.0
    clipped_low_min: float = NO_MINIMUM
    clipped_high_max: float = 0.0
    mismatch_kl_sum: float = 0.0
    mismatch_kl_max: float = 0.0
    raw_ratio_sum: float = 0.0
    raw_ratio_min: float = NO_MINIMUM
    raw_ratio_max: float = 0.0
    weight_sum: float = 0.0
    weight_min: float = NO_MINIMUM
    weight_max: float = 0.0
    masked_tokens: float = 0.0

    def __add__(self, other: GradientStats) -> GradientStats:
        """The figures over both slices."""
        merged = {}
        for name in STATS_FIELDS:
            mine, theirs = getattr(self, name), getattr(other, name)
            if name.endswith("_min"):
                merged[name] = min(mine, theirs)
            elif name.endswith("_max"):
                merged[name] = max(mine, theirs)
            else:
                merged[name] = mine + theirs
        return GradientStats(**merged)

    def metrics(self) -> dict[str, float]:
        """Means over the counted tokens, by the names TRL gives them; empty without tokens.

        TRL logs the ratios it applied; those as they were stand beside them under ``_raw``.
        """
        if self.num_tokens < 1:
            return {}
        tokens, decided = self.num_tokens, max(self.num_clippable, 1.0)
        ratio = "sampling/importance_sampling_ratio"
        kl = {"kl": self.kl_sum / self.kl_tokens} if self.kl_tokens else {}
        return kl | {
            "entropy": self.entropy_sum / tokens,
            "clip_ratio/low_mean": self.clipped_low / decided,
            "clip_ratio/high_mean": self.clipped_high / decided,
            "clip_ratio/region_mean": (self.clipped_low + self.clipped_high) / decided,
            "clip_ratio/low_min": self.clipped_low_min,
            "clip_ratio/high_max": self.clipped_high_max,
            "mismatch_kl/mean": self.mismatch_kl_sum / tokens,
            "mismatch_kl/max": self.mismatch_kl_max,
            f"{ratio}/min": self.weight_min,
            f"{ratio}/mean": self.weight_sum / tokens,
            f"{ratio}/max": self.weight_max,
            f"{ratio}_raw/min": self.raw_ratio_min,
            f"{ratio}_raw/mean": self.raw_ratio_sum / tokens,
            f"{ratio}_raw/max": self.raw_ratio_max,
            "is_masked": self.masked_tokens / tokens,
        }


STATS_FIELDS = tuple(GradientStats.__dataclass_fields__)


@dataclass(frozen=True, kw_only=True)
class ResidualLink:
    """The residuals between which a gradient with error feedback stands, by digest.

    ``before`` was added to the gradient and is absent where none was; ``after`` is what the
    encoding left out.
    """

    before: Digest | None
    after: Digest


@dataclass(frozen=True, kw_only=True)
class GradientPayload:
    """The gradient of the loss *sum* over a slice, and the figures that go with it.

    After several local steps it is how far the weights moved, start less end.

    Writer: the worker.  Reader: the verifier, then aggregation.

    Arrays: those of `shoal.rl.codec.layout`, named ``gradient.…``; ``stats`` float64 in the
    order of `GradientStats`; with error feedback ``residual`` uint8 (2, 32), the digests of
    the `ResidualLink`, the first of zeros where it is absent.

    ``gradients`` are the arrays as decoded, ``coded`` as they travel.
    """

    gradients: Mapping[str, Floats]
    stats: GradientStats
    coded: codec.Arrays
    residual: ResidualLink | None = None

    @classmethod
    def pack(
        cls,
        gradients: Mapping[str, Floats],
        stats: GradientStats,
        spec: CodecSpec,
        residual_n: codec.Vector | None = None,
    ) -> tuple[GradientPayload, bytes | None]:
        """The payload of ``gradients``, and the residual it leaves if there is error feedback.

        Raises:
            InvalidRequest: a value is not finite (code ``not_finite``).
        """
        shapes = {name: array.shape for name, array in gradients.items()}
        coded, left_n = codec.encode_with_feedback(codec.flatten(gradients), residual_n, spec)
        link, after = None, None
        if spec.error_feedback:
            after = codec.encode_residual(left_n)
            before = None if residual_n is None else codec.encode_residual(residual_n)
            link = ResidualLink(
                before=None if before is None else sha256_hex(before), after=sha256_hex(after)
            )
        decoded_n = codec.decode(coded, spec, len(left_n))
        payload = cls(
            gradients=codec.unflatten(decoded_n, shapes), stats=stats, coded=coded, residual=link
        )
        return payload, after

    def encode(self) -> bytes:
        """The payload's bytes; equal payloads give equal bytes."""
        arrays: dict[str, NDArray[np.generic]] = {
            f"gradient.{name}": array for name, array in self.coded.items()
        }
        arrays["stats"] = np.array(
            [getattr(self.stats, name) for name in STATS_FIELDS], dtype=np.float64
        )
        if self.residual is not None:
            digests = bytes.fromhex((self.residual.before or _NO_DIGEST) + self.residual.after)
            arrays["residual"] = np.frombuffer(digests, dtype=np.uint8).reshape(2, -1)
        return safetensors.numpy.save(arrays)

    @classmethod
    def decode(
        cls, data: bytes, shapes: Mapping[str, tuple[int, ...]], spec: CodecSpec
    ) -> GradientPayload:
        """The payload in ``data``: arrays of ``shapes``, as ``spec`` writes them.

        Raises:
            PeerFault: naming the array that is missing, misshapen, not finite, or none that
                the codec writes.
        """
        size = codec.num_values(shapes)
        reader = _Reader("gradient payload", data, codec.wire_bytes(spec, size))
        coded = {
            name: reader.shaped(f"gradient.{name}", dtype, shape)
            for name, (dtype, shape) in codec.layout(spec, size).items()
        }
        stats = reader.shaped("stats", np.float64, (len(STATS_FIELDS),))
        link = _read_link(reader) if spec.error_feedback else None
        reader.require_all_read()
        try:
            vector_n = codec.decode(coded, spec, size)
        except codec.CodecError as error:
            raise reader.fault(f"gradient.{error.name}", error.why) from None
        return cls(
            gradients=codec.unflatten(vector_n, shapes),
            stats=GradientStats(**dict(zip(STATS_FIELDS, stats.tolist(), strict=True))),
            coded=coded,
            residual=link,
        )

    def norm(self) -> float:
        """Euclidean norm over all arrays."""
        squares = (float(np.vdot(a, a)) for a in map(np.float64, self.gradients.values()))
        return float(sum(squares) ** 0.5)


_NO_DIGEST = "0" * 64


def _read_link(reader: _Reader) -> ResidualLink:
    before, after = (row.tobytes().hex() for row in reader.shaped("residual", np.uint8, (2, 32)))
    return ResidualLink(before=None if before == _NO_DIGEST else before, after=after)


def prompt_sha256(tokens: Sequence[int]) -> bytes:
    """Digest of a prompt's tokens (little-endian int32)."""
    return hashlib.sha256(np.asarray(tokens, dtype="<i4").tobytes()).digest()


class _Reader:
    """Hands out the arrays of a stranger's safetensors bytes, each checked once."""

    def __init__(self, what: str, data: bytes, max_bytes: int) -> None:
        self._what = what
        self._evidence: bytes | None = None
        limit = max_bytes + HEADER_ALLOWANCE_BYTES
        if len(data) > limit:
            raise self.fault("bytes", f"number {len(data)} where at most {limit} fit the task")
        self._evidence = data
        try:
            self._arrays = safetensors.numpy.load(data)
        except (safetensors.SafetensorError, ValueError, KeyError, AttributeError):
            raise self.fault("bytes", "are not a safetensors file") from None

    def fault(self, name: str, why: str) -> PeerFault:
        # Hashed only where something is wrong; what is too large is not even hashed.
        digest = "" if self._evidence is None else sha256_hex(self._evidence)
        return PeerFault(
            f"The {self._what}'s {name[:100]} {why}.", code="malformed", evidence=digest
        )

    def shaped(self, name: str, dtype: type[_T], shape: tuple[int, ...]) -> NDArray[_T]:
        array = self._arrays.pop(name, None)
        if array is None:
            raise self.fault(name, "is missing")
        if array.dtype != dtype or array.shape != shape:
            found, wanted = f"{array.dtype}{list(array.shape)}", f"{dtype.__name__}{list(shape)}"
            raise self.fault(name, f"is {found} where {wanted} is due")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise self.fault(name, "holds a value that is not finite")
        return array.astype(dtype, copy=False)

    def ints(self, name: str, length: int, low: int, high: int) -> Ints:
        array = self.shaped(name, np.int32, (length,))
        if length and (array.min() < low or array.max() >= high):
            raise self.fault(name, f"holds a value outside {low} … {high - 1}")
        return array

    def flags(self, name: str, length: int) -> NDArray[np.bool_]:
        array = self.shaped(name, np.uint8, (length,))
        if (array > 1).any():
            raise self.fault(name, "holds a value other than 0 and 1")
        return array.astype(np.bool_)

    def floats(self, name: str, length: int) -> Floats:
        return self.shaped(name, np.float32, (length,))

    def require_all_read(self) -> None:
        if self._arrays:
            raise self.fault(next(iter(self._arrays)), "is no array of this payload")


def _encode_rows(
    prompts: Sequence[bytes],
    token_ids: Sequence[Ints],
    finished: NDArray[np.bool_],
    rewards: Floats,
) -> dict[str, NDArray[np.generic]]:
    digests = np.frombuffer(b"".join(prompts), dtype=np.uint8)
    return {
        "prompts_sha256": digests.reshape(len(prompts), PROMPT_DIGEST_BYTES),
        "token_ids": np.concatenate(token_ids).astype(np.int32),
        "lengths": np.array([len(row) for row in token_ids], dtype=np.int32),
        "finished": finished.astype(np.uint8),
        "rewards": rewards.astype(np.float32),
    }


def _decode_rows(
    reader: _Reader, limits: RowLimits
) -> tuple[tuple[bytes, ...], tuple[Ints, ...], NDArray[np.bool_], Floats]:
    shape = (limits.num_prompts, PROMPT_DIGEST_BYTES)
    digests = reader.shaped("prompts_sha256", np.uint8, shape)
    lengths = reader.ints("lengths", limits.num_rows, 1, limits.max_tokens + 1)
    tokens = reader.ints("token_ids", int(lengths.sum(dtype=np.int64)), 0, limits.vocab_size)
    finished = reader.flags("finished", limits.num_rows)
    return (
        tuple(row.tobytes() for row in digests),
        _split(tokens, lengths.tolist()),
        finished,
        reader.floats("rewards", limits.num_rows),
    )


def _max_rows_bytes(limits: RowLimits) -> int:
    per_row = 8 * limits.max_tokens + 16
    return PROMPT_DIGEST_BYTES * limits.num_prompts + per_row * limits.num_rows


def _split(flat: NDArray[_T], lengths: Sequence[int]) -> tuple[NDArray[_T], ...]:
    ends = list(accumulate(lengths))
    return tuple(flat[end - n : end] for end, n in zip(ends, lengths, strict=True))
