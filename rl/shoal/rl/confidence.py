"""What held-out rewards say of a policy, and how sure that is: avg@k, pass@k, intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Z_95 = 1.959964
"""Two-sided 95 % of the standard normal distribution."""
SOLVED = 1.0 - 1e-6
"""The reward from which a completion counts as correct; rewards travel in single precision."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A 95 % confidence interval of a rate between 0 and 1.

    Example: 80 of 100 greedy completions correct: 0.8, between 0.711 and 0.867.
    """

    low: float
    high: float

    def is_above(self, other: Interval) -> bool:
        """Whether this interval lies wholly above ``other``: a significant improvement."""
        return self.low > other.high


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A rate and its 95 % confidence interval."""

    value: float
    interval: Interval


@dataclass(frozen=True, kw_only=True)
class HeldOutScore:
    """What the rewards of ``num_prompts`` prompts, ``num_samples`` each, come to.

    ``passes`` maps k to pass@k: the chance that at least one of k samples is correct.
    """

    num_prompts: int
    num_samples: int
    average: Estimate
    passes: dict[int, Estimate]

    def metrics(self, prefix: str) -> dict[str, float]:
        """The figures by name: ``<prefix>/avg@k``, ``<prefix>/pass@k``, ``/low``, ``/high``."""
        named = {f"avg@{self.num_samples}": self.average}
        named |= {f"pass@{k}": estimate for k, estimate in self.passes.items()}
        figures: dict[str, float] = {}
        for name, estimate in named.items():
            figures[f"{prefix}/{name}"] = estimate.value
            figures[f"{prefix}/{name}/low"] = estimate.interval.low
            figures[f"{prefix}/{name}/high"] = estimate.interval.high
        return figures


def score_held_out(rewards_by_prompt: Sequence[Sequence[float]]) -> HeldOutScore:
    """avg@k and pass@k of at least one prompt with the same number of samples each.

    The prompt is the unit of the intervals: samples of one prompt are not independent.
    """
    num_samples = len(rewards_by_prompt[0])
    solved = [sum(reward >= SOLVED for reward in rewards) for rewards in rewards_by_prompt]
    return HeldOutScore(
        num_prompts=len(rewards_by_prompt),
        num_samples=num_samples,
        average=estimate_mean([statistics.fmean(r) for r in rewards_by_prompt], num_samples),
        passes={
            k: estimate_mean([pass_at_k(num_samples, correct, k) for correct in solved], 1)
            for k in _powers_of_two(num_samples)
        },
    )


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The unbiased estimate of the chance that one of ``k`` samples is correct.

    Source: Chen et al. 2021, arXiv 2107.03374, equation 1: 1 − C(n − c, k) / C(n, k).
    """
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def estimate_mean(values: Sequence[float], samples_per_value: int) -> Estimate:
    """The mean of ``values``, each in [0, 1] and itself a mean of ``samples_per_value``.

    With 0s and 1s this is Wilson's interval.  Values in between vary less, and count as the
    number of 0s and 1s whose mean would vary as much.  Unlike a normal interval it stays
    between 0 and 1 and keeps its width where all values are equal.

    Source: Wilson 1927; the effective number of trials, Korn and Graubard 1998.
    """
    count = len(values)
    mean = min(1.0, max(0.0, statistics.fmean(values)))
    variance = statistics.pvariance(values)
    trials = float(count)
    if variance > 0:
        most = float(count * samples_per_value)
        trials = min(max(trials, mean * (1 - mean) * count / variance), most)
    return Estimate(value=mean, interval=wilson(mean, trials))


def wilson(rate: float, trials: float) -> Interval:
    """Wilson's score interval of ``rate`` observed in ``trials``.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    shrink = 1 + Z_95**2 / trials
    centre = (rate + Z_95**2 / (2 * trials)) / shrink
    half = Z_95 * math.sqrt(rate * (1 - rate) / trials + (Z_95 / (2 * trials)) ** 2) / shrink
    return Interval(low=max(0.0, centre - half), high=min(1.0, centre + half))


def _powers_of_two(most: int) -> list[int]:
    """1, 2, 4, … below ``most``, and ``most``."""
    return [*(1 << i for i in range(most.bit_length()) if 1 << i < most), most]
