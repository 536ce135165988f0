"""Each trap is warned about by name, and a usual job is not."""

from __future__ import annotations

import re
from typing import Any

import pytest
from learning_fixtures import make_spec

from shoal.protocol.job import SamplingSpec
from shoal.protocol.learning import CorrectionSpec, LossSpec
from shoal.rl.loss_traps import job_warnings, loss_warnings

NOTHING = {"old_policy": "proximal", "token_bound": "none", "sequence_bound": "none"}
SUMMED = {"sequence_statistic": "sum"}


def loss(**fields: Any) -> LossSpec:
    correction = CorrectionSpec.model_validate(fields.pop("correction", {}), strict=False)
    return LossSpec.model_validate({"correction": correction, **fields}, strict=False)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"kl_beta": 0.01}, r"kl_beta is 0\.01: the KL term"),
        ({"kind": "gspo", "clip_low": 0.2}, r"gspo.* a clip of 0\.2 will never bind"),
        ({"kind": "luspo", "clip_high": 0.3}, r"luspo.* a clip of 0\.3 will never bind"),
        ({"kind": "dr_grpo", "advantage_scale": "group_std"}, "half of Dr. GRPO"),
        ({"kind": "grpo"}, "divides each completion by its own length"),
        ({"correction": SUMMED}, "beyond about 134 tokens will be dropped"),
        (
            {"correction": {**SUMMED, "old_policy": "proximal", "sequence_bound": "truncate"}},
            "beyond about 134 tokens will be cut down",
        ),
    ],
)
def test_a_trap_is_named(fields: dict[str, Any], expected: str) -> None:
    (sentence,) = loss_warnings(loss(**fields), 256)
    assert re.search(expected, sentence)
    assert sentence.endswith(".")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"kind": "dapo"},
        {"kind": "cispo"},
        {"kind": "gspo"},
        {"kind": "dr_grpo"},
        {"kind": "luspo"},
        {"correction": {"old_policy": "behaviour"}},
        {"correction": {"old_policy": "proximal"}},
        {"correction": {"sequence_bound": "none", **SUMMED}},
    ],
)
def test_a_usual_loss_is_not_warned_about(fields: dict[str, Any]) -> None:
    assert loss_warnings(loss(**fields), 256) == []


def test_short_completions_may_have_summed_ratios() -> None:
    assert loss_warnings(loss(correction=SUMMED), 100) == []


@pytest.mark.parametrize(("staleness", "warned"), [(0, False), (1, True)])
def test_stale_samples_without_correction_are_warned_about(staleness: int, warned: bool) -> None:
    spec = make_spec(loss=loss(correction=NOTHING), max_staleness=staleness)
    assert bool(job_warnings(spec)) == warned
    if warned:
        assert "corrects nothing" in job_warnings(spec)[0]


def test_a_usual_job_is_not_warned_about() -> None:
    assert job_warnings(make_spec(max_staleness=4, sampling=SamplingSpec(max_tokens=2048))) == []
