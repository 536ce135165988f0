"""A rendered job file loads back equal, and no text crashes the reader."""

from __future__ import annotations

import contextlib

from hypothesis import given
from hypothesis import strategies as st

from shoal.client.jobfile import parse_job, render_job_file
from shoal.protocol.errors import InvalidRequest
from shoal.protocol.job import BudgetSpec, EnvSpec, JobSpec
from shoal.protocol.learning import AdvantageScale, LoraSpec, LossSpec, OptimizerSpec
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
specs = st.builds(
    JobSpec,
    name=names,
    model=names,
    model_sha256=st.none() | st.text("0123456789abcdef", min_size=64, max_size=64),
    seed=st.integers(0, MAX_INT),
    max_steps=st.integers(1, 1_000_000),
    batch_size=st.integers(1, 1000).map(lambda groups: groups * 8),
    loss=st.builds(
        LossSpec, clip_low=small, clip_high=small, advantage_scale=st.sampled_from(AdvantageScale)
    ),
    optimizer=st.builds(OptimizerSpec, learning_rate=small, beta2=small),
    lora=st.builds(LoraSpec, r=st.integers(1, 512)),
    environments=st.lists(environments, min_size=1, max_size=3).map(tuple),
    budget=st.builds(
        BudgetSpec,
        max_total_micros=micros,
        max_rollout_micros=micros,
        max_gradient_micros=micros,
        max_evaluate_micros=micros,
    ),
)


@given(specs)
def test_rendered_file_loads_back_equal(spec: JobSpec) -> None:
    assert parse_job(render_job_file(spec), "rendered") == spec


@given(st.text(max_size=200))
def test_any_text_is_a_job_or_one_sentence(text: str) -> None:
    with contextlib.suppress(InvalidRequest):
        parse_job(text, "fuzz")


_KEYS = st.sampled_from(
    ["name", "env", "budget", "lora", "algorithm", "seed", "model", "max_steps", "batch_size"]
)
_VALUES = st.sampled_from(
    ["1", "true", '"x"', "[]", "[1]", "{}", "{ r = 1 }", "[{}]", "1979-05-27", "inf", "[[{}]]"]
)


@given(st.dictionaries(_KEYS, _VALUES))
def test_any_shape_of_document_is_a_job_or_one_sentence(document: dict[str, str]) -> None:
    text = "\n".join(f"{key} = {value}" for key, value in document.items())
    with contextlib.suppress(InvalidRequest):
        parse_job(text, "fuzz")


@given(st.text(max_size=40))
def test_any_override_is_applied_or_refused_in_one_sentence(override: str) -> None:
    with contextlib.suppress(InvalidRequest):
        parse_job('[[env]]\nid = "addition"', "fuzz", [override])
