"""A rendered job file loads back equal, and no text crashes the reader."""

from __future__ import annotations

import contextlib

from hypothesis import given
from hypothesis import strategies as st

from shoal.client.jobfile import parse_job, render_job_file
from shoal.client.jobfile_keys import KEYS
from shoal.protocol.errors import InvalidRequest
from shoal.protocol.job import (
    BudgetSpec,
    CheckpointSpec,
    EnvSpec,
    EvalSpec,
    JobSpec,
    Release,
    TaskSizes,
)
from shoal.protocol.learning import (
    AdvantageScale,
    CodecKind,
    CodecSpec,
    CorrectionSpec,
    GradientSpec,
    LoraSpec,
    LossKind,
    LossSpec,
    OldPolicy,
    OptimizerSpec,
    RatioBound,
    SequenceStatistic,
)
from shoal.protocol.money import MAX_MICROS
from shoal.protocol.record import MAX_INT

names = st.text("abcXYZ019_ .:/@+=-", min_size=1, max_size=40)
micros = st.integers(1, MAX_MICROS)
small = st.floats(1e-12, 0.99)
scalars = (
    st.text(max_size=20)
    | st.integers(-MAX_INT, MAX_INT)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.booleans()
)
environments = st.builds(
    EnvSpec,
    id=names,
    weight=st.floats(1e-6, 1e6),
    args=st.dictionaries(st.text(max_size=20), scalars, max_size=4),
)
counts = st.integers(1, 65_536)
masks = st.sampled_from([RatioBound.NONE, RatioBound.MASK])
corrections = st.one_of(
    st.builds(
        CorrectionSpec,
        old_policy=st.just(OldPolicy.PROXIMAL),
        token_bound=st.sampled_from(RatioBound),
        token_max=st.floats(1, 1e6),
        sequence_bound=masks,
        sequence_statistic=st.sampled_from(SequenceStatistic),
    ),
    st.builds(CorrectionSpec, token_bound=masks, sequence_bound=masks),
    st.builds(
        CorrectionSpec,
        old_policy=st.just(OldPolicy.PROXIMAL),
        sequence_bound=st.just(RatioBound.TRUNCATE),
    ),
)
losses = st.builds(
    LossSpec,
    kind=st.sampled_from([LossKind.GRPO, LossKind.DAPO, LossKind.DR_GRPO, LossKind.GSPO]),
    clip_low=small,
    clip_high=small,
    clip_delta=st.none() | st.floats(2.1, 100),
    kl_beta=st.floats(0, 1),
    kl_bias_correction=st.booleans(),
    advantage_scale=st.sampled_from(AdvantageScale),
    mask_truncated=st.booleans(),
    correction=corrections,
) | st.builds(LossSpec, kind=st.sampled_from([LossKind.CISPO, LossKind.SAPO, LossKind.LUSPO]))
codecs = st.builds(
    CodecSpec,
    kind=st.sampled_from([kind for kind in CodecKind if kind is not CodecKind.FP32]),
    keep=st.integers(1, 4096),
    bits=st.integers(2, 4),
    error_feedback=st.floats(0, 1),
)
specs = st.builds(
    JobSpec,
    name=names,
    model=names,
    model_sha256=st.none() | st.text("0123456789abcdef", min_size=64, max_size=64),
    seed=st.integers(0, MAX_INT),
    max_steps=st.integers(1, 1_000_000),
    batch_size=st.integers(1, 1000).map(lambda groups: groups * 8),
    dynamic_sampling_rounds=st.integers(0, 16),
    loss=losses,
    optimizer=st.builds(OptimizerSpec, learning_rate=small, beta2=small),
    lora=st.none() | st.builds(LoraSpec, r=st.integers(1, 512)),
    gradient=st.builds(
        GradientSpec, codec=codecs, local_steps=st.integers(1, 64), outer_momentum=small
    ),
    tasks=st.builds(TaskSizes, rollout=counts, gradient=counts, evaluate=counts),
    evaluation=st.builds(
        EvalSpec,
        samples_per_example=st.integers(1, 1024),
        temperature=st.floats(1e-3, 10),
        patience=st.none() | st.integers(1, 100),
        target=st.none() | st.floats(0, 1),
    ),
    checkpoint=st.builds(CheckpointSpec, release=st.sampled_from(Release)),
    environments=st.lists(environments, min_size=1, max_size=3).map(tuple),
    budget=st.builds(
        BudgetSpec,
        max_total_micros=micros,
        max_rollout_micros=micros,
        max_gradient_micros=micros,
        max_evaluate_micros=micros,
        delay_micros_per_s=st.integers(0, MAX_MICROS),
        stale_pay_permille=st.integers(0, 1_000),
    ),
)


@given(specs)
def test_rendered_file_loads_back_equal(spec: JobSpec) -> None:
    assert parse_job(render_job_file(spec), "rendered") == spec


@given(st.text(max_size=200))
def test_any_text_is_a_job_or_one_sentence(text: str) -> None:
    with contextlib.suppress(InvalidRequest):
        parse_job(text, "fuzz")


_KEYS = st.sampled_from([*KEYS, "tuning", "env", "budget", *KEYS[""]])
_VALUES = st.sampled_from(
    ["1", "true", '"x"', "[]", "[1]", "{}", "{ r = 1 }", "[{}]", "1979-05-27", "inf", "[[{}]]"]
)


@given(st.dictionaries(_KEYS, _VALUES))
def test_any_shape_of_document_is_a_job_or_one_sentence(document: dict[str, str]) -> None:
    text = "\n".join(f"{key} = {value}" for key, value in document.items() if key)
    with contextlib.suppress(InvalidRequest):
        parse_job(text, "fuzz")


@given(st.text(max_size=40))
def test_any_override_is_applied_or_refused_in_one_sentence(override: str) -> None:
    with contextlib.suppress(InvalidRequest):
        parse_job('[[env]]\nid = "addition"', "fuzz", [override])
