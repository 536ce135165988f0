"""Advantages agree with TRL's, and a group without spread has none."""

from __future__ import annotations

import numpy as np
import pytest

from shoal.protocol.learning import AdvantageScale
from shoal.rl.advantage import group_advantages

REWARDS = np.array([1, 0, 0, 0, 1, 1, 0, 0], dtype=np.float32)
CENTRED = np.array([0.75, -0.25, -0.25, -0.25, 0.5, 0.5, -0.5, -0.5])


def test_a_groups_spread_has_bessels_correction() -> None:
    spread = np.repeat([0.5, np.sqrt(1 / 3)], 4)
    got = group_advantages(REWARDS, 4, AdvantageScale.GROUP_STD)
    assert np.allclose(got, CENTRED / (spread + 1e-4))


def test_the_batchs_spread_divides_every_group_alike() -> None:
    spread = np.std(REWARDS, ddof=1)
    got = group_advantages(REWARDS, 4, AdvantageScale.BATCH_STD)
    assert np.allclose(got, CENTRED / (spread + 1e-4))


def test_without_a_scale_advantages_are_centred_only() -> None:
    assert np.allclose(group_advantages(REWARDS, 4, AdvantageScale.NONE), CENTRED)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
@pytest.mark.parametrize("scale", AdvantageScale)
def test_a_group_without_spread_teaches_nothing(value: float, scale: AdvantageScale) -> None:
    flat = np.full(8, value, dtype=np.float32)
    assert not group_advantages(flat, 8, scale).any()
    mixed = group_advantages(np.concatenate([flat, REWARDS[:4], REWARDS[:4]]), 8, scale)
    assert not mixed[:8].any()
    assert mixed[8:].all()
