"""Codecs lose what they say and no more, and an encoding is told from one of another vector."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shoal.protocol.learning import CodecKind, CodecSpec
from shoal.rl import codec

FP32 = CodecSpec()
FP16 = CodecSpec(kind=CodecKind.FP16, chunk=16)
INT8 = CodecSpec(kind=CodecKind.INT8, chunk=16, error_feedback=1.0)
INDICES = CodecSpec(kind=CodecKind.TOPK, chunk=64, keep=3, bits=2, error_feedback=1.0)
BITMAP = CodecSpec(kind=CodecKind.TOPK, chunk=32, keep=12, bits=4, error_feedback=1.0)
SPECS = {"fp32": FP32, "fp16": FP16, "int8": INT8, "indices": INDICES, "bitmap": BITMAP}

vectors = hnp.arrays(
    np.float32, st.integers(1, 150), elements=st.floats(-(2.0**100), 2.0**100, width=32)
)
tame = hnp.arrays(np.float32, 130, elements=st.floats(-100, 100, width=16))


def round_trip(vector_n: codec.Vector, spec: CodecSpec) -> codec.Vector:
    return codec.decode(codec.encode(vector_n, spec), spec, len(vector_n))


@pytest.mark.parametrize("kind", SPECS)
@settings(max_examples=40)
@given(vector_n=vectors)
def test_the_arrays_are_those_of_the_layout(kind: str, vector_n: codec.Vector) -> None:
    spec = SPECS[kind]
    arrays = codec.encode(vector_n, spec)
    found = {name: (array.dtype.type, array.shape) for name, array in arrays.items()}
    assert found == codec.layout(spec, len(vector_n))
    assert sum(array.nbytes for array in arrays.values()) == codec.wire_bytes(spec, len(vector_n))
    decoded_n = codec.decode(arrays, spec, len(vector_n))
    assert decoded_n.dtype == np.float32
    assert np.isfinite(decoded_n).all()
    assert codec.deviation(arrays, spec, vector_n) == 0


@settings(max_examples=40)
@given(vector_n=vectors)
def test_fp32_loses_nothing_and_the_scaled_codecs_half_a_step(vector_n: codec.Vector) -> None:
    assert (round_trip(vector_n, FP32) == vector_n).all()
    wide_n = vector_n.astype(np.float64)
    largest_n = np.repeat(
        [np.abs(wide_n[i : i + 16]).max() for i in range(0, len(wide_n), 16)], 16
    )[: len(wide_n)]
    # The smallest normal number stands for what underflows.
    floor = float(np.finfo(np.float32).tiny)
    error_n = np.abs(round_trip(vector_n, FP16) - wide_n)
    assert (error_n <= 2.0**-11 * np.abs(wide_n) + 2.0**-24 * largest_n + floor).all()
    error_n = np.abs(round_trip(vector_n, INT8) - wide_n)
    assert (error_n <= largest_n / 254 * (1 + 1e-6) + 127 * floor).all()


@pytest.mark.parametrize("spec", [INDICES, BITMAP], ids=["indices", "bitmap"])
@settings(max_examples=40)
@given(vector_n=vectors)
def test_top_k_keeps_the_largest_of_each_chunk(spec: CodecSpec, vector_n: codec.Vector) -> None:
    decoded_n = round_trip(vector_n, spec)
    for start in range(0, len(vector_n), spec.chunk):
        part = np.abs(vector_n[start : start + spec.chunk])
        kept = decoded_n[start : start + spec.chunk] != 0
        assert kept.sum() <= spec.keep
        if not kept.all() and kept.any():
            assert part[~kept].max() <= part[kept].min()
        signs = np.sign(vector_n[start : start + spec.chunk])[kept]
        assert (signs == np.sign(decoded_n[start : start + spec.chunk])[kept]).all()


@pytest.mark.parametrize("kind", ["int8", "indices", "bitmap"])
@settings(max_examples=40)
@given(vectors_tn=st.lists(tame, min_size=1, max_size=6))
def test_what_was_sent_and_the_last_residual_are_the_sum(
    kind: str, vectors_tn: list[codec.Vector]
) -> None:
    """Nothing is lost, only late, with error feedback 1."""
    spec, residual_n = SPECS[kind], None
    sent_n = np.zeros(130)
    for vector_n in vectors_tn:
        arrays, residual_n = codec.encode_with_feedback(vector_n, residual_n, spec)
        sent_n += codec.decode(arrays, spec, 130)
    assert residual_n is not None
    total_n = np.sum(vectors_tn, axis=0, dtype=np.float64)
    assert np.allclose(sent_n + residual_n, total_n, atol=1e-2)
    back_n = codec.decode_residual(codec.encode_residual(residual_n), 130)
    assert (back_n == residual_n).all()


@pytest.mark.parametrize("kind", SPECS)
@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1))
def test_rounding_noise_is_no_deviation_and_lies_are(kind: str, seed: int) -> None:
    """What another machine's arithmetic does passes; what a cheat does is far outside."""
    spec, generator = SPECS[kind], np.random.default_rng(seed)
    true_n = generator.standard_t(3, size=640).astype(np.float32)
    noisy_n = (true_n * (1 + 2e-6 * generator.standard_normal(640))).astype(np.float32)
    assert codec.deviation(codec.encode(noisy_n, spec), spec, true_n) < 1e-4
    other_n = generator.standard_t(3, size=640).astype(np.float32)
    for lie_n in (-true_n, 0 * true_n, other_n, 1.01 * true_n, true_n[::-1]):
        lie = codec.encode(lie_n.astype(np.float32), spec)
        assert codec.deviation(lie, spec, true_n) > 2e-3


def test_values_beside_a_threshold_may_fall_on_either_side() -> None:
    """The reason for `deviation`: compared as vectors these two honest encodings differ."""
    ours = np.array([1.0, 0.5, 0.5 - 1e-7, 0.1] * 8, dtype=np.float32)
    theirs = np.array([1.0, 0.5 - 1e-7, 0.5, 0.1] * 8, dtype=np.float32)
    spec = CodecSpec(kind=CodecKind.TOPK, chunk=16, keep=6, bits=2)
    assert np.linalg.norm(round_trip(ours, spec) - round_trip(theirs, spec)) > 0.1
    assert codec.deviation(codec.encode(theirs, spec), spec, ours) < 1e-6
