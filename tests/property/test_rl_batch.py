"""Payloads survive the journey, and no bytes a stranger sends raise anything but `PeerFault`."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol.errors import PeerFault
from shoal.protocol.learning import CodecKind, CodecSpec
from shoal.rl.batch import (
    HEADER_ALLOWANCE_BYTES,
    EvaluatePayload,
    GradientPayload,
    GradientSlice,
    GradientStats,
    RolloutPayload,
    RowLimits,
    prompt_sha256,
)

LIMITS = RowLimits(num_prompts=2, num_rows=4, max_tokens=6, vocab_size=50)
SHAPES = {"a": (2, 3), "b": (4,)}

rows = st.lists(st.lists(st.integers(0, 49), min_size=1, max_size=6), min_size=4, max_size=4)


def rollout_of(tokens: list[list[int]]) -> RolloutPayload:
    return RolloutPayload(
        prompts_sha256=(prompt_sha256([1]), prompt_sha256([2])),
        token_ids=tuple(np.array(row, dtype=np.int32) for row in tokens),
        logprobs=tuple(-np.arange(len(row), dtype=np.float32) for row in tokens),
        finished=np.array([True, False, True, False]),
        rewards=np.array([0, 1, 0.5, 0], dtype=np.float32),
    )


def slice_of(tokens: list[list[int]]) -> GradientSlice:
    rollout = rollout_of(tokens)
    return GradientSlice(
        prompts=(np.array([3, 4], dtype=np.int32), np.array([5], dtype=np.int32)),
        prompt_of_row=np.array([0, 0, 1, 1], dtype=np.int32),
        token_ids=rollout.token_ids,
        logprobs=rollout.logprobs,
        advantages=np.array([1, -1, 0.5, -0.5], dtype=np.float32),
        truncated=~rollout.finished,
    )


def decode_slice(data: bytes) -> GradientSlice:
    return GradientSlice.decode(data, num_rows=4, num_prompts=2, vocab_size=50)


CODECS = {
    "gradient": CodecSpec(),
    "gradient-fp16": CodecSpec(kind=CodecKind.FP16, chunk=16),
    "gradient-int8": CodecSpec(kind=CodecKind.INT8, chunk=16, error_feedback=0.5),
    "gradient-topk": CodecSpec(kind=CodecKind.TOPK, chunk=16, keep=2, error_feedback=0.5),
    "gradient-bitmap": CodecSpec(kind=CodecKind.TOPK, chunk=16, keep=8, bits=3),
}


def gradient_of(spec: CodecSpec) -> GradientPayload:
    arrays = {
        name: np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)
        for name, shape in SHAPES.items()
    }
    return GradientPayload.pack(arrays, GradientStats(loss_sum=1.5, num_tokens=3), spec)[0]


FIXED = [[1, 2, 3], [4], [5, 6], [7]]
DECODERS: dict[str, tuple[bytes, Any]] = {
    "rollout": (rollout_of(FIXED).encode(), lambda d: RolloutPayload.decode(d, LIMITS)),
    "evaluate": (
        EvaluatePayload(
            prompts_sha256=tuple(prompt_sha256([n]) for n in range(4)),
            token_ids=rollout_of(FIXED).token_ids,
            finished=np.ones(4, dtype=np.bool_),
            rewards=np.zeros(4, dtype=np.float32),
        ).encode(),
        lambda d: EvaluatePayload.decode(
            d, RowLimits(num_prompts=4, num_rows=4, max_tokens=6, vocab_size=50)
        ),
    ),
    "slice": (slice_of(FIXED).encode(), decode_slice),
} | {
    kind: (
        gradient_of(spec).encode(),
        lambda d, spec=spec: GradientPayload.decode(d, SHAPES, spec),
    )
    for kind, spec in CODECS.items()
}


@given(rows)
def test_payloads_come_back_equal(tokens: list[list[int]]) -> None:
    data = rollout_of(tokens).encode()
    back = RolloutPayload.decode(data, LIMITS)
    assert [row.tolist() for row in back.token_ids] == tokens
    assert back.encode() == data
    data = slice_of(tokens).encode()
    assert decode_slice(data).encode() == data


@pytest.mark.parametrize("kind", DECODERS)
def test_the_undamaged_payload_decodes(kind: str) -> None:
    data, decode = DECODERS[kind]
    assert decode(data).encode() == data


@pytest.mark.parametrize("kind", DECODERS)
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_a_changed_byte_decodes_or_is_the_peers_fault(kind: str, place: float, value: int) -> None:
    data, decode = DECODERS[kind]
    damaged = bytearray(data)
    damaged[int(place * len(data))] = value
    with contextlib.suppress(PeerFault):
        decode(bytes(damaged))


@pytest.mark.parametrize("kind", DECODERS)
@given(noise=st.binary(max_size=200))
def test_noise_is_the_peers_fault(kind: str, noise: bytes) -> None:
    _, decode = DECODERS[kind]
    with pytest.raises(PeerFault):
        decode(noise)


@pytest.mark.parametrize("kind", ["rollout", "evaluate", "gradient"])
def test_oversize_is_refused_before_parsing(kind: str) -> None:
    data, decode = DECODERS[kind]
    with pytest.raises(PeerFault, match="at most"):
        decode(data + b"\0" * (2 * HEADER_ALLOWANCE_BYTES))


BAD_ARRAYS: list[tuple[str, str, Any]] = [
    ("rollout", "token_ids", lambda a: a + 50),
    ("rollout", "token_ids", lambda a: a - 50),
    ("rollout", "token_ids", lambda a: a.astype(np.int64)),
    ("rollout", "token_ids", lambda a: a[:-1].copy()),
    ("rollout", "lengths", lambda a: a * 0),
    ("rollout", "lengths", lambda a: np.array([7, 0, 0, 0], dtype=np.int32)),
    ("rollout", "lengths", lambda a: np.full(4, 2**31 - 1, dtype=np.int32)),
    ("rollout", "logprobs", lambda a: a * np.float32("nan")),
    ("rollout", "logprobs", lambda a: a + 1),
    ("rollout", "logprobs", lambda a: None),
    ("rollout", "finished", lambda a: a + 2),
    ("rollout", "rewards", lambda a: a * np.float32("inf")),
    ("rollout", "prompts_sha256", lambda a: a[:1].copy()),
    ("slice", "prompt_of_row", lambda a: a + 2),
    ("slice", "prompt_lengths", lambda a: a * 2),
    ("slice", "truncated", lambda a: a + 2),
    ("gradient", "gradient.values", lambda a: a[:-1].copy()),
    ("gradient", "gradient.values", lambda a: a * np.float32("nan")),
    ("gradient-fp16", "gradient.values", lambda a: a * 2),
    ("gradient-fp16", "gradient.scales", lambda a: -a),
    ("gradient-int8", "gradient.values", lambda a: np.full_like(a, -128)),
    ("gradient-int8", "gradient.scales", lambda a: a * np.float32("inf")),
    ("gradient-int8", "residual", lambda a: None),
    ("gradient-topk", "gradient.places", lambda a: np.full_like(a, 0xFF)),
    ("gradient-topk", "gradient.levels", lambda a: a * np.array([2, 1], dtype=np.float32)),
    ("gradient-topk", "gradient.codes", lambda a: np.full_like(a, 0xFF)),
    ("gradient-bitmap", "gradient.places", lambda a: np.full_like(a, 0xFF)),
    ("gradient", "stats", lambda a: a[:2].copy()),
]


@pytest.mark.parametrize(("kind", "name", "damage"), BAD_ARRAYS)
def test_the_fault_names_the_array(kind: str, name: str, damage: Any) -> None:
    data, decode = DECODERS[kind]
    with np.errstate(invalid="ignore"):
        arrays = safetensors.numpy.load(data)
        damaged = damage(arrays.pop(name))
    if damaged is not None:
        arrays[name] = damaged
    with pytest.raises(PeerFault) as refused:
        decode(safetensors.numpy.save(arrays))
    assert refused.value.evidence
    # A wrong length shows in the first array it does not fit.
    named = {"lengths": "token_ids", "prompt_lengths": "prompt_ids"}.get(name, name)
    assert name in refused.value.message or named in refused.value.message


@pytest.mark.parametrize("kind", DECODERS)
def test_an_array_nobody_asked_for_is_refused(kind: str) -> None:
    data, decode = DECODERS[kind]
    arrays = safetensors.numpy.load(data)
    arrays["stowaway"] = np.zeros(1, dtype=np.float32)
    with pytest.raises(PeerFault, match="stowaway"):
        decode(safetensors.numpy.save(arrays))
