"""What codecs cost on the wire, and what of a stranger's bytes they refuse."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from shoal.protocol.errors import InvalidRequest, PeerFault
from shoal.protocol.learning import CodecKind, CodecSpec
from shoal.rl import codec
from shoal.rl.batch import GradientPayload, GradientStats

SIZE = 122_880
"""The weights of a rank-16 adapter of the built-in base."""


@pytest.fixture(scope="module")
def gradients() -> dict[str, NDArray[np.float32]]:
    generator = np.random.default_rng(0)
    return {
        name: generator.standard_t(3, size=(16, SIZE // 32)).astype(np.float32) for name in "ab"
    }


@pytest.mark.parametrize(
    ("spec", "smaller"),
    [
        (CodecSpec(), 1.0),
        (CodecSpec(kind=CodecKind.FP16), 2.0),
        (CodecSpec(kind=CodecKind.INT8, error_feedback=1.0), 4.0),
        (CodecSpec(kind=CodecKind.TOPK, chunk=1024, keep=256, error_feedback=0.95), 20.0),
        # 64 of 4096: 12 bits of place and 2 of value each, and two levels.
        (CodecSpec(kind=CodecKind.TOPK, error_feedback=0.95), 16384 / (64 * 14 / 8 + 8)),
    ],
    ids=["fp32", "fp16", "int8", "bitmap", "indices"],
)
def test_payloads_are_as_small_as_said(
    gradients: dict[str, NDArray[np.float32]], spec: CodecSpec, smaller: float
) -> None:
    payload, _ = GradientPayload.pack(gradients, GradientStats(), spec)
    arrays_bytes = codec.wire_bytes(spec, SIZE)
    assert 4 * SIZE / arrays_bytes == pytest.approx(smaller, rel=0.03)
    assert arrays_bytes < len(payload.encode()) < arrays_bytes + 1024
    shapes = {name: array.shape for name, array in gradients.items()}
    back = GradientPayload.decode(payload.encode(), shapes, spec)
    assert back.encode() == payload.encode()
    assert all((back.gradients[n] == payload.gradients[n]).all() for n in gradients)


def test_the_shorter_of_indices_and_bitmap_is_taken() -> None:
    few = CodecSpec(kind=CodecKind.TOPK, chunk=1024, keep=100)
    many = CodecSpec(kind=CodecKind.TOPK, chunk=1024, keep=200)
    assert codec.layout(few, 1024)["places"][1] == (125,)
    assert codec.layout(many, 1024)["places"][1] == (128,)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", list(CodecKind))
def test_what_is_not_finite_is_not_encoded(kind: CodecKind, value: float) -> None:
    vector_n = np.ones(100, dtype=np.float32)
    vector_n[7] = value
    with pytest.raises(InvalidRequest) as refused:
        codec.encode(vector_n, CodecSpec(kind=kind))
    assert refused.value.code == "not_finite"


def test_an_overflow_by_feedback_is_not_encoded() -> None:
    spec = CodecSpec(kind=CodecKind.INT8, error_feedback=1.0)
    big_n = np.full(10, 3e38, dtype=np.float32)
    with pytest.raises(InvalidRequest, match="not finite"):
        codec.encode_with_feedback(big_n, big_n, spec)


def test_a_residual_is_of_its_size_and_finite() -> None:
    residual_n = np.arange(5, dtype=np.float32)
    data = codec.encode_residual(residual_n)
    assert (codec.decode_residual(data, 5) == residual_n).all()
    for bad in (
        data[:-1],
        data + b"\0",
        b"",
        codec.encode_residual(residual_n * np.float32("nan")),
    ):
        with pytest.raises(PeerFault, match="residual") as refused:
            codec.decode_residual(bad, 5)
        assert refused.value.code == "bad_residual"


def test_forgetting_changes_what_is_sent() -> None:
    spec = CodecSpec(kind=CodecKind.TOPK, chunk=16, keep=1, bits=4, error_feedback=0.5)
    first_n = np.array([4.0, 3.0] + [0.0] * 14, dtype=np.float32)
    arrays, residual_n = codec.encode_with_feedback(first_n, None, spec)
    assert codec.decode(arrays, spec, 16).tolist()[:2] == [4.0, 0.0]
    assert residual_n.tolist()[:2] == [0.0, 3.0]
    second_n = np.array([1.0] + [0.0] * 15, dtype=np.float32)
    arrays, _ = codec.encode_with_feedback(second_n, residual_n, spec)
    assert codec.decode(arrays, spec, 16).tolist()[:2] == [0.0, 1.5]
    forgetful = spec.model_copy(update={"error_feedback": 0.0})
    arrays, _ = codec.encode_with_feedback(second_n, residual_n, forgetful)
    assert codec.decode(arrays, forgetful, 16).tolist()[:2] == [1.0, 0.0]


def test_specs_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValidationError, match="keep 65 is more than"):
        CodecSpec(kind=CodecKind.TOPK, chunk=64, keep=65)
    with pytest.raises(ValidationError, match="nothing to feed back"):
        CodecSpec(error_feedback=0.5)
