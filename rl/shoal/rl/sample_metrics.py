"""What a batch of rollouts looks like, under TRL's metric names; no torch.

Every spread is the sample standard deviation (divided by n − 1), as TRL has it.  Two of them
are easily confused: ``reward_std`` is over the whole batch, ``group_reward_std`` is the mean of
those inside the groups, which is what teaches.

Axes: ``p`` prompt (group), ``g`` completion of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class SampledGroup:
    """What metrics need of one prompt's completions.

    ``environment`` is its number in the job; ``truncated`` marks completions cut off at the
    length limit; ``staleness`` is how many versions older the policy that sampled them is than
    the one they are applied to.
    """

    environment: int
    rewards: Sequence[float]
    lengths: Sequence[int]
    truncated: Sequence[bool]
    staleness: int


def sample_metrics(groups: Sequence[SampledGroup], names: Sequence[str]) -> dict[str, float]:
    """The figures of groups of equal size, at least one; ``names`` are the environments'."""
    staleness = np.array([group.staleness for group in groups], dtype=np.float64)
    return {
        **_reward_metrics(groups, names),
        **_length_metrics(groups),
        "sample/staleness_mean": float(staleness.mean()),
        "sample/staleness_max": float(staleness.max()),
    }


def _reward_metrics(groups: Sequence[SampledGroup], names: Sequence[str]) -> dict[str, float]:
    rewards_pg = np.array([group.rewards for group in groups], dtype=np.float64)
    flat = (rewards_pg == rewards_pg[:, :1]).all(axis=1)
    figures = {
        "reward": float(rewards_pg.mean()),
        "reward_std": _spread(rewards_pg),
        "group_reward_std": float(_group_spreads_p(rewards_pg, flat).mean()),
        "frac_reward_zero_std": float(flat.mean()),
    }
    environments_p = np.array([group.environment for group in groups])
    for number, name in enumerate(names):
        own_pg = rewards_pg[environments_p == number]
        if own_pg.size:
            figures[f"rewards/{name}/mean"] = float(own_pg.mean())
            figures[f"rewards/{name}/std"] = _spread(own_pg)
    return figures


def _length_metrics(groups: Sequence[SampledGroup]) -> dict[str, float]:
    lengths = np.array([n for group in groups for n in group.lengths], dtype=np.float64)
    truncated = np.array([cut for group in groups for cut in group.truncated], dtype=np.bool_)
    # Zeros where none ended, as TRL has it.
    ended = lengths[~truncated] if not truncated.all() else np.zeros(1)
    return {
        "num_tokens": float(lengths.sum()),
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(truncated.mean()),
        "completions/mean_terminated_length": float(ended.mean()),
        "completions/min_terminated_length": float(ended.min()),
        "completions/max_terminated_length": float(ended.max()),
    }


def _group_spreads_p(rewards_pg: Numbers, flat_p: NDArray[np.bool_]) -> Numbers:
    """`_spread` of each group; ``flat_p`` marks those whose values are equal."""
    if rewards_pg.shape[1] < 2:
        return np.zeros(len(rewards_pg))
    return np.where(flat_p, 0.0, rewards_pg.std(axis=1, ddof=1))


def _spread(values: Numbers) -> float:
    """The sample standard deviation; exactly 0 where all values are equal, or there is one."""
    return float(values.std(ddof=1)) if values.min() != values.max() else 0.0
