"""What a batch of rollouts looks like, under TRL's metric names; no torch.

Every spread is the sample standard deviation (divided by n − 1), as TRL has it.  Two of them
are easily confused: ``reward_std`` is over the whole batch, ``group_reward_std`` is the mean of
those inside the groups, which is what teaches.

Axes: ``p`` prompt (group), ``g`` completion of the prompt, ``b`` completion of any prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class SampledBatch:
    """What metrics need of a batch: groups of equal size, at least one.

    ``environments_p`` are the prompts' environments, by number in the job; ``truncated_b`` marks
    completions cut off at the length limit; ``staleness_p`` is how many versions older the
    policy that sampled a group is than the one it is applied to.
    """

    environments_p: Ints
    rewards_pg: Numbers
    lengths_b: Ints
    truncated_b: NDArray[np.bool_]
    staleness_p: Ints


def sample_metrics(batch: SampledBatch, names: Sequence[str]) -> dict[str, float]:
    """The figures of ``batch``; ``names`` are the environments'."""
    return {
        **_reward_metrics(batch.rewards_pg, batch.environments_p, names),
        **_length_metrics(batch.lengths_b, batch.truncated_b),
        "sample/staleness_mean": float(batch.staleness_p.mean()),
        "sample/staleness_max": float(batch.staleness_p.max()),
    }


def _reward_metrics(
    rewards_pg: Numbers, environments_p: Ints, names: Sequence[str]
) -> dict[str, float]:
    flat = (rewards_pg == rewards_pg[:, :1]).all(axis=1)
    figures = {
        "reward": float(rewards_pg.mean()),
        "reward_std": _spread(rewards_pg),
        "group_reward_std": float(_group_spreads_p(rewards_pg, flat).mean()),
        "frac_reward_zero_std": float(flat.mean()),
    }
    for number, name in enumerate(names):
        own_pg = rewards_pg[environments_p == number]
        if own_pg.size:
            figures[f"rewards/{name}/mean"] = float(own_pg.mean())
            figures[f"rewards/{name}/std"] = _spread(own_pg)
    return figures


def _length_metrics(lengths_b: Ints, truncated_b: NDArray[np.bool_]) -> dict[str, float]:
    # Zeros where none ended, as TRL has it.
    ended = lengths_b[~truncated_b] if not truncated_b.all() else np.zeros(1)
    return {
        "num_tokens": float(lengths_b.sum()),
        "completions/mean_length": float(lengths_b.mean()),
        "completions/min_length": float(lengths_b.min()),
        "completions/max_length": float(lengths_b.max()),
        "completions/clipped_ratio": float(truncated_b.mean()),
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
