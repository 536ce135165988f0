"""Importance weights and masks are what the correction names, and never move the divisor."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from shoal.protocol.learning import (
    CorrectionSpec,
    LossSpec,
    OldPolicy,
    RatioBound,
    SequenceStatistic,
)
from shoal.rl.correction import Correction, correct, masked_weights, truncated_weights, within
from shoal.rl.loss import LossSums, TokenLogprobs, loss_sums

torch.set_num_threads(1)
NONE, TRUNCATE, MASK = RatioBound.NONE, RatioBound.TRUNCATE, RatioBound.MASK
PROXIMAL = CorrectionSpec(old_policy=OldPolicy.PROXIMAL)
UNCORRECTED = PROXIMAL.model_copy(update={"token_bound": NONE, "sequence_bound": NONE})
RATIOS = [[0.5, 1.0, 3.0], [8.0, 8.0, 1.0]]
"""π_prox/μ of two rows; the second has two tokens."""


def bits(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.bool)


TOKENS = bits([[1, 1, 1], [1, 1, 0]])


def corrected(**fields: Any) -> Correction:
    behaviour_bt = torch.full((2, 3), -5.0)
    spec = CorrectionSpec(**{"old_policy": OldPolicy.PROXIMAL, **fields})
    return correct(spec, behaviour_bt + torch.tensor(RATIOS).log(), behaviour_bt, TOKENS)


def weights(correction: Correction) -> list[list[float]]:
    rows = correction.weight_bt.tolist()
    return [[round(w, 4) for w in rows[0]], [round(w, 4) for w in rows[1][:2]]]


def test_token_ratios_are_truncated() -> None:
    got = corrected(token_bound=TRUNCATE, token_max=2.0, sequence_bound=NONE)
    assert weights(got) == [[0.5, 1.0, 2.0], [2.0, 2.0]]
    assert got.kept_bt.all()


def test_token_ratios_outside_their_bounds_are_masked() -> None:
    got = corrected(token_bound=MASK, token_min=0.6, token_max=4.0, sequence_bound=NONE)
    assert weights(got) == [[0.0, 1.0, 3.0], [0.0, 0.0]]
    assert got.kept_bt[TOKENS].tolist() == [False, True, True, False, False]


def test_sequences_are_dropped_by_their_geometric_mean_and_keep_token_weights() -> None:
    got = corrected(token_max=2.0, sequence_min=0.2, sequence_max=5.0)
    assert weights(got) == [[0.5, 1.0, 2.0], [0.0, 0.0]]
    assert got.kept_bt[TOKENS].tolist() == [True] * 3 + [False] * 2


def test_the_mean_is_blind_to_length_where_the_sum_is_not() -> None:
    short = torch.full((1, 2), math.log(1.05))
    long = torch.full((1, 100), math.log(1.05))
    for statistic, kept in ((SequenceStatistic.MEAN, True), (SequenceStatistic.SUM, False)):
        spec = CorrectionSpec(sequence_statistic=statistic, sequence_max=3.0)
        for ratios, expected in ((short, True), (long, kept)):
            mask = torch.ones_like(ratios, dtype=torch.bool)
            got = correct(spec, ratios, torch.zeros_like(ratios), mask)
            assert bool(got.kept_bt.all()) == expected


def test_without_a_token_bound_the_sequence_ratio_is_the_weight() -> None:
    first = 1.5 ** (1 / 3)
    truncated = corrected(token_bound=NONE, sequence_bound=TRUNCATE, sequence_max=5.0)
    assert weights(truncated) == [[round(first, 4)] * 3, [5.0] * 2]
    masked = corrected(token_bound=NONE, sequence_bound=MASK, sequence_max=5.0)
    assert weights(masked) == [[round(first, 4)] * 3, [0.0] * 2]
    product = corrected(
        token_bound=NONE,
        sequence_bound=MASK,
        sequence_statistic=SequenceStatistic.SUM,
        sequence_max=5.0,
    )
    assert weights(product) == [[1.5] * 3, [0.0] * 2]


def test_without_bounds_nothing_is_corrected() -> None:
    got = corrected(token_bound=NONE, sequence_bound=NONE)
    assert weights(got) == [[1.0] * 3, [1.0] * 2]
    assert got.kept_bt.all()


def test_a_behaviour_old_policy_masks_but_never_weights() -> None:
    plain = corrected(old_policy=OldPolicy.BEHAVIOUR, sequence_bound=NONE)
    assert weights(plain) == [[1.0] * 3, [1.0] * 2]
    masked = corrected(old_policy=OldPolicy.BEHAVIOUR, sequence_bound=MASK)
    assert weights(masked) == [[1.0] * 3, [0.0] * 2]


def test_a_ratio_no_float_holds_is_weighed_in_log_space() -> None:
    log_ratios = torch.tensor([[-400.0, 400.0]])
    assert truncated_weights(log_ratios, 0.0, 2.0).tolist() == [[0.0, 2.0]]
    assert masked_weights(log_ratios, 0.1, 2.0).tolist() == [[0.0, 0.0]]
    assert within(log_ratios, 0.0, 2.0).tolist() == [[True, False]]


def loss_with(correction: CorrectionSpec) -> tuple[LossSums, torch.Tensor]:
    current = torch.zeros(2, 3, requires_grad=True)
    logprobs = TokenLogprobs(
        current=current,
        proximal=torch.zeros(2, 3),
        behaviour=-torch.tensor(RATIOS).log(),
        reference=None,
    )
    sums = loss_sums(
        LossSpec(correction=correction),
        logprobs,
        torch.tensor([1.0, 1.0]),
        TOKENS,
        torch.zeros(2, dtype=torch.bool),
    )
    (gradient,) = torch.autograd.grad(sums.loss, current)
    return sums, gradient


def test_weights_multiply_the_gradient_and_masks_zero_it() -> None:
    _, gradient = loss_with(PROXIMAL)
    assert torch.allclose(gradient, torch.tensor([[-0.5, -1.0, -2.0], [0.0, 0.0, 0.0]]))
    _, uncorrected = loss_with(UNCORRECTED)
    assert torch.allclose(uncorrected, torch.tensor([[-1.0, -1.0, -1.0], [-1.0, -1.0, 0.0]]))


def test_weights_come_with_the_proximal_policy_unless_told_otherwise() -> None:
    assert CorrectionSpec().token_bound is NONE
    assert PROXIMAL.token_bound is TRUNCATE
    told = CorrectionSpec(old_policy=OldPolicy.PROXIMAL, token_bound=MASK)
    assert told.token_bound is MASK
    by_sequence = CorrectionSpec(old_policy=OldPolicy.PROXIMAL, sequence_bound=TRUNCATE)
    assert by_sequence.token_bound is NONE
    assert CorrectionSpec.model_validate_json(PROXIMAL.model_dump_json()) == PROXIMAL


def test_a_mask_keeps_its_tokens_in_the_count() -> None:
    masked, _ = loss_with(PROXIMAL)
    unmasked, _ = loss_with(PROXIMAL.model_copy(update={"sequence_bound": NONE}))
    assert masked.stats.num_tokens == unmasked.stats.num_tokens == 5.0
    assert (masked.stats.masked_tokens, unmasked.stats.masked_tokens) == (2.0, 0.0)
    assert (masked.stats.live_tokens, unmasked.stats.live_tokens) == (3.0, 5.0)
    assert masked.stats.metrics()["is_masked"] == pytest.approx(0.4)


def test_ratios_are_reported_as_they_were_and_as_applied() -> None:
    sums, _ = loss_with(PROXIMAL)
    metrics = sums.stats.metrics()
    name = "sampling/importance_sampling_ratio"
    raw = {part: metrics[f"{name}_raw/{part}"] for part in ("min", "mean", "max")}
    applied = {part: metrics[f"{name}/{part}"] for part in ("min", "mean", "max")}
    assert raw == pytest.approx({"min": 0.5, "mean": 20.5 / 5, "max": 8.0})
    assert applied == pytest.approx({"min": 0.0, "mean": 3.5 / 5, "max": 2.0})
    k3 = [r - math.log(r) - 1 for r in (0.5, 1.0, 3.0, 8.0, 8.0)]
    assert metrics["mismatch_kl/mean"] == pytest.approx(sum(k3) / 5, rel=1e-5)
    assert metrics["mismatch_kl/max"] == pytest.approx(max(k3), rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "trap"),
    [
        ({"token_bound": TRUNCATE}, "set old_policy proximal"),
        ({"old_policy": OldPolicy.BEHAVIOUR, "sequence_bound": TRUNCATE}, "second time"),
        (
            {
                "old_policy": OldPolicy.PROXIMAL,
                "token_bound": MASK,
                "sequence_bound": TRUNCATE,
            },
            "twice",
        ),
    ],
)
def test_correcting_twice_is_refused(fields: dict[str, Any], trap: str) -> None:
    with pytest.raises(ValidationError, match=trap):
        CorrectionSpec.model_validate(fields)
