"""Gradient codecs: one vector of values, written down in fewer bits and read back.

All arrays of a gradient lie flat in one vector, in order of name, and are coded in chunks
that share a scale; the last chunk is filled up with zeros.  The codec and the number of
values fix the type and shape of every array on the wire, so a stranger chooses contents
only, and `decode` refuses contents that no encoder writes.

Error feedback: what an encoding leaves out is added to the next vector, ``u = β·e + g`` is
sent and ``e' = u − sent`` kept.  Source: SparseLoCo, arXiv 2508.15706, algorithm 1.

Axes: ``n`` value, ``m`` chunk, ``c`` place in a chunk, ``k`` kept place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.protocol.canonical import sha256_hex
from shoal.protocol.errors import InvalidRequest, PeerFault
from shoal.protocol.ids import Digest
from shoal.protocol.learning import CodecKind, CodecSpec

Vector = NDArray[np.float32]
Arrays = Mapping[str, NDArray[Any]]
Layout = dict[str, tuple[type[np.generic], tuple[int, ...]]]

_INT8_MAX = 127
_FP16_HALF_STEP = 2.0**-11
"""Half the spacing of fp16 relative to the value.  Source: IEEE 754-2019, binary16."""
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_FLOAT32_TINY = float(np.finfo(np.float32).tiny)


class CodecError(ValueError):
    """The arrays hold something no encoder writes; says which array and what."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{name} {why}")
        self.name = name
        self.why = why


def flatten(gradients: Mapping[str, NDArray[np.float32]]) -> Vector:
    """All arrays in one vector, in order of name."""
    return np.concatenate([gradients[name].reshape(-1) for name in sorted(gradients)]).astype(
        np.float32, copy=False
    )


def unflatten(
    vector_n: Vector, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, NDArray[np.float32]]:
    """The arrays `flatten` joined."""
    arrays, start = {}, 0
    for name in sorted(shapes):
        size = math.prod(shapes[name])
        arrays[name] = vector_n[start : start + size].reshape(shapes[name])
        start += size
    return arrays


def num_values(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Values in all arrays together."""
    return sum(math.prod(shape) for shape in shapes.values())


def layout(spec: CodecSpec, size: int) -> Layout:
    """The arrays that carry ``size`` values: type and shape by name."""
    chunks = -(-size // spec.chunk)
    match spec.kind:
        case CodecKind.FP32:
            return {"values": (np.float32, (size,))}
        case CodecKind.FP16:
            return {"values": (np.float16, (size,)), "scales": (np.float32, (chunks,))}
        case CodecKind.INT8:
            return {"values": (np.int8, (size,)), "scales": (np.float32, (chunks,))}
        case CodecKind.TOPK:
            kept = chunks * spec.keep
            places_bits = chunks * spec.chunk if _as_bitmap(spec) else kept * _index_bits(spec)
            return {
                "places": (np.uint8, (-(-places_bits // 8),)),
                "codes": (np.uint8, (-(-kept * spec.bits // 8),)),
                "levels": (np.float32, (chunks, 2)),
            }


def wire_bytes(spec: CodecSpec, size: int) -> int:
    """Bytes of the arrays that carry ``size`` values, without the safetensors header."""
    return sum(
        int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        for dtype, shape in layout(spec, size).values()
    )


def encode(vector_n: Vector, spec: CodecSpec) -> dict[str, NDArray[Any]]:
    """``vector_n`` in the arrays `layout` names; equal vectors give equal arrays.

    Raises:
        InvalidRequest: a value is not finite (code ``not_finite``).
    """
    if not np.isfinite(vector_n).all():
        raise InvalidRequest(
            "A gradient holds values that are not finite; lower the learning rate or inspect "
            "the slice's rewards and log-probabilities.",
            code="not_finite",
        )
    match spec.kind:
        case CodecKind.FP32:
            return {"values": vector_n.astype(np.float32)}
        case CodecKind.FP16 | CodecKind.INT8:
            return _encode_scaled(vector_n, spec)
        case CodecKind.TOPK:
            return _encode_topk(vector_n, spec)


def decode(arrays: Arrays, spec: CodecSpec, size: int) -> Vector:
    """The vector that ``arrays``, of the types and shapes of `layout`, stand for.

    Raises:
        CodecError: the contents are none that `encode` writes.
    """
    match spec.kind:
        case CodecKind.FP32:
            return np.asarray(arrays["values"], dtype=np.float32)
        case CodecKind.FP16 | CodecKind.INT8:
            _require_scaled(arrays, spec)
            scales_n = np.repeat(arrays["scales"].astype(np.float64), spec.chunk)[:size]
            return _to_float32(arrays["values"] * scales_n)
        case CodecKind.TOPK:
            places_mk, negative_mk, bins_mk = _read_topk(arrays, spec, size)
            return _place(
                places_mk, negative_mk, _magnitudes(arrays["levels"], bins_mk, spec), spec, size
            )


def encode_with_feedback(
    vector_n: Vector, residual_n: Vector | None, spec: CodecSpec
) -> tuple[dict[str, NDArray[Any]], Vector]:
    """The encoding of ``vector_n`` with the earlier residual in it, and the new residual.

    Raises:
        InvalidRequest: a value is not finite (code ``not_finite``).
    """
    target_n = with_feedback(vector_n, residual_n, spec)
    arrays = encode(target_n, spec)
    return arrays, target_n - decode(arrays, spec, len(target_n))


def with_feedback(vector_n: Vector, residual_n: Vector | None, spec: CodecSpec) -> Vector:
    """What is to be encoded: ``β·e + g``."""
    if residual_n is None or spec.error_feedback == 0:
        return vector_n
    with np.errstate(over="ignore"):  # an overflow is found, and named, by `encode`
        return (np.float32(spec.error_feedback) * residual_n + vector_n).astype(np.float32)


def deviation(arrays: Arrays, spec: CodecSpec, target_n: Vector) -> float:
    """How far ``arrays`` are from an encoding of ``target_n``, relative to its length; 0 if none.

    Recomputing on another machine moves a target by rounding, and a value beside a
    threshold then falls on the other side of it.  So the *decisions* in ``arrays`` (which
    places are kept, which bin each fell into, to which multiple it was rounded) count by
    the distance of the target's value from the threshold they are on the wrong side of, and
    what follows from the decisions is compared with its value under them.

    Raises:
        CodecError: the contents are none that `encode` writes.
    """
    wanted_n = np.asarray(target_n, dtype=np.float64)
    decoded_n = np.asarray(decode(arrays, spec, len(target_n)), dtype=np.float64)
    match spec.kind:
        case CodecKind.FP32:
            excess = float(np.square(decoded_n - wanted_n).sum())
        case CodecKind.FP16 | CodecKind.INT8:
            excess = _scaled_excess(arrays, spec, wanted_n, decoded_n)
        case CodecKind.TOPK:
            excess = _topk_excess(arrays, spec, wanted_n, decoded_n)
    if excess == 0:
        return 0.0
    squares = float(np.square(wanted_n).sum())
    return float("inf") if squares == 0 else float((excess / squares) ** 0.5)


def residual_sha256(residual: bytes) -> Digest:
    """Digest of a residual's bytes, as payloads name it."""
    return sha256_hex(residual)


def decode_residual(data: bytes, size: int) -> Vector:
    """The residual in ``data``: ``size`` finite little-endian fp32 values, and nothing else.

    Raises:
        PeerFault: the bytes are anything else.
    """
    if len(data) != 4 * size:
        raise PeerFault(
            f"The residual has {len(data)} bytes where {4 * size} are due.",
            code="bad_residual",
            evidence=residual_sha256(data),
        )
    vector_n = np.frombuffer(data, dtype="<f4").astype(np.float32)
    if not np.isfinite(vector_n).all():
        raise PeerFault(
            "The residual holds values that are not finite.",
            code="bad_residual",
            evidence=residual_sha256(data),
        )
    return vector_n


def encode_residual(residual_n: Vector) -> bytes:
    """The residual's bytes."""
    return residual_n.astype("<f4").tobytes()


def _chunked(vector_n: NDArray[Any], spec: CodecSpec) -> NDArray[Any]:
    chunks = -(-len(vector_n) // spec.chunk)
    padded = np.zeros(chunks * spec.chunk, dtype=vector_n.dtype)
    padded[: len(vector_n)] = vector_n
    return padded.reshape(chunks, spec.chunk)


def _to_float32(values: NDArray[np.float64]) -> Vector:
    # Rounding may lift the largest float over the edge.
    return np.clip(values, -_FLOAT32_MAX, _FLOAT32_MAX).astype(np.float32)


# --- one scale per chunk ------------------------------------------------------------------


def _scales(vector_n: NDArray[Any], spec: CodecSpec) -> NDArray[np.float32]:
    largest_m = np.abs(_chunked(vector_n, spec)).max(axis=1).astype(np.float64)
    if spec.kind is CodecKind.INT8:
        largest_m /= _INT8_MAX
    # Scales too small to be exact are none: such a chunk is zeros.
    return np.where(largest_m < _FLOAT32_TINY, 0, largest_m).astype(np.float32)


def _encode_scaled(vector_n: Vector, spec: CodecSpec) -> dict[str, NDArray[Any]]:
    scales_m = _scales(vector_n, spec)
    scales_n = np.repeat(scales_m.astype(np.float64), spec.chunk)[: len(vector_n)]
    scaled_n = np.divide(
        vector_n, scales_n, out=np.zeros(len(vector_n)), where=scales_n > 0, dtype=np.float64
    )
    if spec.kind is CodecKind.INT8:
        values = np.clip(np.rint(scaled_n), -_INT8_MAX, _INT8_MAX).astype(np.int8)
        return {"values": values, "scales": scales_m}
    return {"values": np.clip(scaled_n, -1, 1).astype(np.float16), "scales": scales_m}


def _require_scaled(arrays: Arrays, spec: CodecSpec) -> None:
    values, scales = arrays["values"], arrays["scales"]
    if not np.isfinite(scales).all() or (scales < 0).any():
        raise CodecError("scales", "holds a value that is negative or not finite")
    if spec.kind is CodecKind.INT8:
        if (values == -_INT8_MAX - 1).any():
            raise CodecError("values", f"holds {-_INT8_MAX - 1}, which no encoder writes")
    elif not (np.abs(values) <= 1).all():
        raise CodecError("values", "holds a value outside -1 … 1")


def _scaled_excess(
    arrays: Arrays,
    spec: CodecSpec,
    target_n: NDArray[np.float64],
    decoded_n: NDArray[np.float64],
) -> float:
    error_n = np.abs(decoded_n - target_n)
    if spec.kind is CodecKind.FP16:
        floor_n = np.repeat(arrays["scales"].astype(np.float64), spec.chunk)[: len(target_n)]
        half_n = _FP16_HALF_STEP * np.abs(target_n) + 2.0**-25 * floor_n + _FLOAT32_TINY
        return float(np.square(np.maximum(error_n - half_n, 0)).sum())
    # A finer scale than the chunk's own would let every value lean within half a step.
    scales_m = _scales(target_n, spec).astype(np.float64)
    lean_m = _INT8_MAX * np.abs(arrays["scales"] - scales_m)
    half_n = 0.5 * np.repeat(scales_m, spec.chunk)[: len(target_n)] * (1 + 1e-6)
    half_n += _INT8_MAX * _FLOAT32_TINY
    return float(np.square(np.maximum(error_n - half_n, 0)).sum() + np.square(lean_m).sum())


# --- the largest of each chunk ------------------------------------------------------------


def _index_bits(spec: CodecSpec) -> int:
    return (spec.chunk - 1).bit_length()


def _as_bitmap(spec: CodecSpec) -> bool:
    """Whether one bit per place is shorter than one index per kept place."""
    return spec.keep * _index_bits(spec) >= spec.chunk


def _largest(magnitudes_mc: NDArray[Any], keep: int) -> NDArray[np.bool_]:
    """Marks the ``keep`` largest of each chunk; among equals the first."""
    edge_m1 = np.partition(magnitudes_mc, -keep, axis=1)[:, -keep, None]
    above_mc = magnitudes_mc > edge_m1
    equal_mc = magnitudes_mc == edge_m1
    missing_m1 = keep - above_mc.sum(axis=1, keepdims=True)
    return np.asarray(above_mc | (equal_mc & (equal_mc.cumsum(axis=1) <= missing_m1)))


def _encode_topk(vector_n: Vector, spec: CodecSpec) -> dict[str, NDArray[Any]]:
    values_mc = _chunked(vector_n, spec)
    mask_mc = _largest(np.abs(values_mc), spec.keep)
    kept_mk = values_mc[mask_mc].reshape(-1, spec.keep).astype(np.float64)
    bins_mk = _bins(np.abs(kept_mk), spec)
    codes_mk = bins_mk << 1 | (kept_mk < 0)
    if _as_bitmap(spec):
        places = np.packbits(mask_mc)
    else:
        places_mk = np.nonzero(mask_mc)[1].reshape(-1, spec.keep)
        places = _pack(places_mk.reshape(-1), _index_bits(spec))
    levels_m2 = _levels(np.abs(kept_mk), bins_mk, spec)
    return {
        "places": places,
        "codes": _pack(codes_mk.reshape(-1), spec.bits),
        "levels": _to_float32(levels_m2),
    }


def _bin_count(spec: CodecSpec) -> int:
    # One of the bits is the sign.
    return 1 << (spec.bits - 1)


def _bin_edges(
    magnitudes_mk: NDArray[np.float64], spec: CodecSpec
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Each chunk's smallest kept magnitude, and the width of its bins."""
    low_m1 = magnitudes_mk.min(axis=1, keepdims=True)
    width_m1 = (magnitudes_mk.max(axis=1, keepdims=True) - low_m1) / _bin_count(spec)
    return low_m1, width_m1


def _bins(magnitudes_mk: NDArray[np.float64], spec: CodecSpec) -> NDArray[np.int64]:
    """The uniform bin, between its chunk's smallest and largest, each magnitude is in."""
    low_m1, width_m1 = _bin_edges(magnitudes_mk, spec)
    steps_mk = np.divide(
        magnitudes_mk - low_m1, width_m1, out=np.zeros_like(magnitudes_mk), where=width_m1 > 0
    )
    return np.minimum(steps_mk.astype(np.int64), _bin_count(spec) - 1)


def _levels(
    magnitudes_mk: NDArray[np.float64], bins_mk: NDArray[np.int64], spec: CodecSpec
) -> NDArray[np.float64]:
    """The means of each chunk's first and last bin; the bins between lie on their line.

    The first is no more than twice the smallest magnitude: a chunk with fewer values than are
    kept also keeps zeros, and these must stay zeros.
    """
    ends = []
    for number in (0, _bin_count(spec) - 1):
        mask_mk = bins_mk == number
        count_m = mask_mk.sum(axis=1)
        total_m = (magnitudes_mk * mask_mk).sum(axis=1)
        ends.append(np.divide(total_m, count_m, out=np.zeros(len(count_m)), where=count_m > 0))
    low_m = np.minimum(ends[0], 2 * magnitudes_mk.min(axis=1))
    high_m = ends[1]
    # A chunk of equal magnitudes has one bin only.
    return np.stack([low_m, np.maximum(low_m, high_m)], axis=1)


def _magnitudes(
    levels_m2: NDArray[Any], bins_mk: NDArray[np.int64], spec: CodecSpec
) -> NDArray[np.float64]:
    low_m1, high_m1 = np.split(levels_m2.astype(np.float64), 2, axis=1)
    return np.asarray(low_m1 + bins_mk * ((high_m1 - low_m1) / (_bin_count(spec) - 1)))


def _read_topk(
    arrays: Arrays, spec: CodecSpec, size: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]:
    """Kept places, their signs and their bins."""
    levels_m2 = arrays["levels"]
    if not np.isfinite(levels_m2).all() or (levels_m2 < 0).any():
        raise CodecError("levels", "holds a value that is negative or not finite")
    if (levels_m2[:, 1] < levels_m2[:, 0]).any():
        raise CodecError("levels", "holds a chunk whose last bin is below its first")
    chunks = -(-size // spec.chunk)
    if _as_bitmap(spec):
        mask_mc = _unpack(arrays["places"], 1, chunks * spec.chunk, "places")
        mask_mc = mask_mc.reshape(chunks, spec.chunk)
        if (mask_mc.sum(axis=1) != spec.keep).any():
            raise CodecError("places", f"marks other than {spec.keep} places of a chunk")
        places_mk = np.nonzero(mask_mc)[1].reshape(chunks, spec.keep)
    else:
        places_mk = _unpack(arrays["places"], _index_bits(spec), chunks * spec.keep, "places")
        places_mk = places_mk.reshape(chunks, spec.keep)
        if (places_mk >= spec.chunk).any() or (np.diff(places_mk, axis=1) <= 0).any():
            raise CodecError("places", f"are not rising indices below {spec.chunk}")
    codes_mk = _unpack(arrays["codes"], spec.bits, chunks * spec.keep, "codes")
    codes_mk = codes_mk.reshape(chunks, spec.keep)
    return places_mk, (codes_mk & 1).astype(np.bool_), codes_mk >> 1


def _place(
    places_mk: NDArray[np.int64],
    negative_mk: NDArray[np.bool_],
    magnitudes_mk: NDArray[np.float64],
    spec: CodecSpec,
    size: int,
) -> Vector:
    values_mc = np.zeros((len(places_mk), spec.chunk), dtype=np.float32)
    signed_mk = np.where(negative_mk, -magnitudes_mk, magnitudes_mk)
    np.put_along_axis(values_mc, places_mk, _to_float32(signed_mk), axis=1)
    return values_mc.reshape(-1)[:size]


def _topk_excess(
    arrays: Arrays,
    spec: CodecSpec,
    target_n: NDArray[np.float64],
    decoded_n: NDArray[np.float64],
) -> float:
    places_mk, negative_mk, bins_mk = _read_topk(arrays, spec, len(target_n))
    target_mc = _chunked(target_n, spec)
    magnitudes_mc = np.abs(target_mc)
    kept_mk = np.take_along_axis(magnitudes_mc, places_mk, axis=1)
    # The wrong place: each counts by how far its value is from the smallest kept.
    edge_m1 = np.partition(magnitudes_mc, -spec.keep, axis=1)[:, -spec.keep, None]
    above_mc = np.maximum(magnitudes_mc - edge_m1, 0)
    np.put_along_axis(above_mc, places_mk, np.maximum(edge_m1 - kept_mk, 0), axis=1)
    # The wrong sign.
    wrong_mk = (np.take_along_axis(target_mc, places_mk, axis=1) < 0) != negative_mk
    # The wrong bin.
    low_m1, width_m1 = _bin_edges(kept_mk, spec)
    below_mk = low_m1 + bins_mk * width_m1 - kept_mk
    over_mk = kept_mk - (low_m1 + (bins_mk + 1) * width_m1)
    outside_mk = np.maximum(np.maximum(below_mk, over_mk), 0)
    # The wrong levels, given the bins.
    ours_mk = _magnitudes(_levels(kept_mk, bins_mk, spec), bins_mk, spec)
    expected_n = _place(places_mk, negative_mk, ours_mk, spec, len(target_n)).astype(np.float64)
    parts = (above_mc, 2 * wrong_mk * kept_mk, outside_mk, decoded_n - expected_n)
    # What fp32 rounds off the levels is no deviation.
    floor = 1e-14 * float(np.square(target_n).sum())
    excess = sum(float(np.square(part).sum()) for part in parts)
    return excess if excess > floor else 0.0


def _pack(numbers: NDArray[np.int64], width: int) -> NDArray[np.uint8]:
    """``numbers`` in ``width`` bits each, the highest bit first, without gaps."""
    shifts = np.arange(width - 1, -1, -1)
    return np.packbits(((numbers[:, None] >> shifts) & 1).astype(np.uint8))


def _unpack(packed: NDArray[Any], width: int, count: int, name: str) -> NDArray[np.int64]:
    bits = np.unpackbits(packed)
    if bits[width * count :].any():
        raise CodecError(name, "has bits set past its end")
    weights = 1 << np.arange(width - 1, -1, -1, dtype=np.int64)
    return np.asarray(bits[: width * count].reshape(count, width) @ weights, dtype=np.int64)
