"""Rewards become advantages inside each group of completions of one prompt."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shoal.protocol.learning import AdvantageScale

STD_EPSILON = 1e-4


def group_advantages(
    rewards_b: NDArray[np.float32], group_size: int, scale: AdvantageScale
) -> NDArray[np.float32]:
    """Each reward less its group's mean, over the spread ``scale`` names.

    ``rewards_b`` holds whole groups, one after the other; with ``BATCH_STD`` it must hold all
    groups of the batch, whose one spread divides every advantage.  A group whose rewards are
    all equal has nothing to teach: its advantages are exactly 0.

    Source: GRPO, arXiv 2402.03300 §4.1.2; ``BATCH_STD`` is Lite PPO's, arXiv 2508.08221;
    ``NONE`` Dr. GRPO's, arXiv 2503.20783.  Standard deviation with Bessel's correction and
    ``1e-4`` added, as TRL 1.16 computes it.
    """
    groups_pg = rewards_b.astype(np.float64).reshape(-1, group_size)
    centred_pg = groups_pg - groups_pg.mean(axis=1, keepdims=True)
    match scale:
        case AdvantageScale.GROUP_STD:
            centred_pg /= groups_pg.std(axis=1, ddof=1, keepdims=True) + STD_EPSILON
        case AdvantageScale.BATCH_STD:
            centred_pg /= groups_pg.std(ddof=1) + STD_EPSILON
        case AdvantageScale.NONE:
            pass
    flat_p1 = np.ptp(groups_pg, axis=1, keepdims=True) == 0
    return np.where(flat_p1, 0.0, centred_pg).reshape(-1).astype(np.float32)
