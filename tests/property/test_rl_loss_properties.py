"""However a batch is cut into slices, losses, gradients and figures add up to the whole."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol.learning import (
    CorrectionSpec,
    LossKind,
    LossSpec,
    OldPolicy,
    RatioBound,
    SequenceStatistic,
)
from shoal.rl.batch import NO_MINIMUM, STATS_FIELDS, GradientStats
from shoal.rl.loss import LossSums, TokenLogprobs, loss_sums

torch.set_num_threads(1)
ROWS, WIDTH = 6, 5


@st.composite
def corrections(draw: st.DrawFn) -> CorrectionSpec:
    old = draw(st.sampled_from(OldPolicy))
    bounds = [RatioBound.NONE, RatioBound.MASK]
    if old is OldPolicy.PROXIMAL:
        bounds.append(RatioBound.TRUNCATE)
    token = draw(st.sampled_from(bounds))
    if token is not RatioBound.NONE:
        bounds = [RatioBound.NONE, RatioBound.MASK]
    return CorrectionSpec(
        old_policy=old,
        token_bound=token,
        sequence_bound=draw(st.sampled_from(bounds)),
        sequence_statistic=draw(st.sampled_from(SequenceStatistic)),
    )


specs = st.builds(
    LossSpec,
    kind=st.sampled_from(LossKind),
    kl_beta=st.sampled_from([0.0, 0.1]),
    kl_bias_correction=st.booleans(),
    mask_truncated=st.booleans(),
    correction=corrections(),
)
lengths = st.lists(st.integers(1, WIDTH), min_size=ROWS, max_size=ROWS)


class Batch:
    """Random log-probabilities, garbage past each row's end."""

    def __init__(self, seed: int, row_lengths: list[int], garbage: float) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.mask = torch.arange(WIDTH) < torch.tensor(row_lengths).unsqueeze(1)
        tables = -torch.rand(4, ROWS, WIDTH, generator=draw, dtype=torch.float64) * 3
        tables[:, ~self.mask] = garbage
        self.tables = list(tables)
        self.current = self.tables[0].requires_grad_()
        self.advantages = torch.randn(ROWS, generator=draw, dtype=torch.float64)
        self.truncated = torch.rand(ROWS, generator=draw) < 0.3

    def sums(self, spec: LossSpec, rows: list[int]) -> LossSums:
        _, proximal, behaviour, reference = self.tables
        return loss_sums(
            spec,
            TokenLogprobs(
                current=self.current[rows],
                proximal=proximal[rows],
                behaviour=behaviour[rows],
                reference=reference[rows] if spec.kl_beta else None,
            ),
            self.advantages[rows],
            self.mask[rows],
            self.truncated[rows],
        )


@settings(max_examples=60)
@given(
    spec=specs,
    seed=st.integers(0, 1 << 16),
    row_lengths=lengths,
    dealt=st.lists(st.integers(0, 2), min_size=ROWS, max_size=ROWS),
    garbage=st.sampled_from([0.0, math.nan, math.inf, -math.inf, 1e30]),
)
def test_any_split_of_the_rows_sums_to_the_whole(
    spec: LossSpec, seed: int, row_lengths: list[int], dealt: list[int], garbage: float
) -> None:
    batch = Batch(seed, row_lengths, garbage)
    whole = batch.sums(spec, list(range(ROWS)))
    slices = [[row for row in range(ROWS) if dealt[row] == part] for part in range(3)]
    parts = [batch.sums(spec, rows) for rows in slices if rows]
    added = torch.stack([part.loss for part in parts]).sum()
    (gradient,) = torch.autograd.grad(whole.loss, batch.current)
    (added_gradient,) = torch.autograd.grad(added, batch.current)
    assert added.item() == pytest.approx(whole.loss.item(), rel=1e-12, abs=1e-12)
    assert torch.allclose(added_gradient, gradient, rtol=1e-12, atol=1e-12)
    assert torch.isfinite(gradient).all()
    merged = sum((part.stats for part in parts), GradientStats())
    for name in STATS_FIELDS:
        expected = getattr(whole.stats, name)
        assert getattr(merged, name) == pytest.approx(expected, rel=1e-12, abs=1e-12), name


@given(st.lists(st.tuples(*[st.floats(0, 1e6)] * len(STATS_FIELDS)), min_size=1, max_size=5))
def test_figures_merge_in_any_order_with_nothing_as_neutral(rows: list[tuple[float, ...]]) -> None:
    stats = [GradientStats(**dict(zip(STATS_FIELDS, row, strict=True))) for row in rows]
    forward = sum(stats, GradientStats())
    backward = sum(reversed(stats), GradientStats())
    for name in STATS_FIELDS:
        values = [getattr(one, name) for one in stats]
        if name.endswith("_min"):
            assert getattr(forward, name) == min(values)
        elif name.endswith("_max"):
            assert getattr(forward, name) == max(values)
        assert getattr(forward, name) == pytest.approx(getattr(backward, name), rel=1e-12)
    assert forward + GradientStats() == forward
    assert all(math.isfinite(value) for value in vars(GradientStats()).values())
    assert GradientStats().raw_ratio_min == NO_MINIMUM
