"""What a job's metrics say is wrong, in plain words, and what to do about it.

A diagnosis begins once its rule holds for the means of `WINDOW` updates and ends once it has
not held for as many, so that noise neither raises nor lowers a flag.  Rules look at metrics
whatever their source and import nothing heavy.  The loss is no sign of health: with one update
per batch it is near zero by construction.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from shoal.rl.confidence import Estimate

WINDOW = 5
"""Updates a rule must hold for."""
NO_SPREAD_HARD = 0.85
"""Share of groups without spread, at a reward below a half, from which six in seven of those
paid for teach nothing; the examples still learn with up to 0.8 there."""
NO_SPREAD_EASY = 0.95
"""The same above a half, where it is the price of success: the example job ends at 0.91."""
ENTROPY_LEFT = 0.05
"""Share of its first entropy below which a policy explores no more; the example keeps 0.25."""
ENTROPY_REWARD = 0.8
"""A policy that is right this often may well be sure of itself."""
MISMATCH_STALE = 0.3
"""KL per token between the policy that sampled and the one that learns, in nats, where samples
may be old: the ratios then differ by a factor of two on the average token, the usual cap.
Examples four versions stale stay below 0.15."""
MISMATCH_FRESH = 1e-3
"""The same where samples are of the current version; equal weights in fp32 give below 1e-8."""
MASKED = 0.25
"""Share of tokens left out of the loss as too far off-policy."""
CRASHED = 0.5
"""Share of its best reward below which a job has lost what it learned."""
CRASH_DROP = 0.15
"""The least fall that counts: smaller ones are within the noise of small batches."""
TRUNCATED = 0.5
"""Share of completions cut off at the length limit."""
EXPLODED = 20.0
"""Times the usual gradient norm; the example's norms stay within a factor of three."""
USUAL_NORMS = 10
"""Updates from which the usual gradient norm is taken."""
WRONG_WEIGHTS = 0.2
"""Share of results refused because they were computed under other weights."""


class HealthCode(StrEnum):
    """What can be wrong with a job; stable names for programs."""

    NO_SPREAD = "no_spread"
    ENTROPY_COLLAPSE = "entropy_collapse"
    MISMATCH_HIGH = "mismatch_high"
    WEIGHTS_NOT_REACHING_SAMPLER = "weights_not_reaching_sampler"
    REWARD_CRASHED = "reward_crashed"
    HELD_OUT_FALLING = "held_out_falling"
    COMPLETIONS_TRUNCATED = "completions_truncated"
    GRADIENT_EXPLODED = "gradient_exploded"
    GRADIENT_NOT_FINITE = "gradient_not_finite"
    GRADER_ERRORS = "grader_errors"


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """One thing that is wrong: the figures that show it, and what to do."""

    code: HealthCode
    finding: str
    remedy: str

    @property
    def sentence(self) -> str:
        """Both, for people."""
        return f"{self.finding}: {self.remedy}"


@dataclass(frozen=True, kw_only=True)
class HealthChange:
    """A diagnosis that begins (``active``) or ends."""

    diagnosis: Diagnosis
    active: bool


@dataclass
class _History:
    """What the rules look at; bounded however long the job runs."""

    max_staleness: int
    updates: deque[Mapping[str, float]]
    num_updates: int = 0
    first_entropies: list[float] = field(default_factory=list)
    usual_norms: list[float] = field(default_factory=list)
    best_reward: float = 0.0
    best_held_out: Estimate | None = None
    last_held_out: Estimate | None = None
    last_version: int = -1
    reward_at_best: float = math.inf

    def add(self, metrics: Mapping[str, float]) -> None:
        self.updates.append(metrics)
        self.num_updates += 1
        if "entropy" in metrics and len(self.first_entropies) < WINDOW:
            self.first_entropies.append(metrics["entropy"])
        norm = metrics.get("grad_norm", 0.0)
        if len(self.usual_norms) < USUAL_NORMS and 0 < norm < math.inf:
            self.usual_norms.append(norm)
        self.best_reward = max(self.best_reward, self.recent("reward") or 0.0)

    def window(self, name: str) -> list[float]:
        """The last `WINDOW` values; empty unless each of the last updates has one."""
        values = [metrics[name] for metrics in list(self.updates)[-WINDOW:] if name in metrics]
        return values if len(values) == WINDOW else []

    def recent(self, name: str) -> float | None:
        """The mean of the last `WINDOW` values, if there are as many."""
        values = self.window(name)
        return statistics.fmean(values) if values else None

    def total(self, name: str) -> float:
        """The sum over the last `WINDOW` updates, absent values counting nothing."""
        return sum(metrics.get(name, 0.0) for metrics in list(self.updates)[-WINDOW:])


class HealthWatch:
    """Follows one job's metrics and tells what begins and ends to be wrong.

    Args:
        max_staleness: The job's bound; until it is used up old samples are expected.
    """

    def __init__(self, max_staleness: int) -> None:
        self._history = _History(max_staleness, deque(maxlen=WINDOW + max_staleness + 1))
        self._active: dict[HealthCode, Diagnosis] = {}
        self._quiet: dict[HealthCode, int] = {}

    @property
    def active(self) -> tuple[Diagnosis, ...]:
        """What is wrong now."""
        return tuple(self._active.values())

    def see_update(self, metrics: Mapping[str, float]) -> list[HealthChange]:
        """Takes in one update's metrics; what began or ended to be wrong with it."""
        self._history.add(metrics)
        found = [diagnosis for rule in _RULES if (diagnosis := rule(self._history))]
        return self._began(found) + self._ended({diagnosis.code for diagnosis in found})

    def see_evaluation(self, version: int, held_out: Estimate) -> None:
        """Takes in one evaluation of all held-out prompts; rules look at it with the next update.

        One that comes after a later version's is left out: accuracy that rises from version to
        version would seem to fall, and the reward of its time is no longer known.
        """
        history = self._history
        if version <= history.last_version:
            return
        history.last_version = version
        history.last_held_out = held_out
        best = history.best_held_out
        if best is None or held_out.value > best.value:
            history.best_held_out = held_out
            reward = history.recent("reward")
            history.reward_at_best = math.inf if reward is None else reward

    def _began(self, found: Sequence[Diagnosis]) -> list[HealthChange]:
        new = [diagnosis for diagnosis in found if diagnosis.code not in self._active]
        for diagnosis in found:
            self._active.setdefault(diagnosis.code, diagnosis)
            self._quiet[diagnosis.code] = 0
        return [HealthChange(diagnosis=diagnosis, active=True) for diagnosis in new]

    def _ended(self, holding: set[HealthCode]) -> list[HealthChange]:
        for code in self._active.keys() - holding:
            self._quiet[code] += 1
        over = [code for code in self._active if self._quiet[code] >= WINDOW]
        return [HealthChange(diagnosis=self._active.pop(code), active=False) for code in over]


def _no_spread(history: _History) -> Diagnosis | None:
    share, reward = history.recent("frac_reward_zero_std"), history.recent("reward")
    if share is None or reward is None:
        return None
    hard = reward < 0.5
    if share < (NO_SPREAD_HARD if hard else NO_SPREAD_EASY):
        return None
    return Diagnosis(
        code=HealthCode.NO_SPREAD,
        finding=f"{share:.0%} of groups have zero reward spread and teach nothing",
        remedy="make tasks easier or raise the group size (rollouts_per_example)"
        if hard
        else "the tasks are nearly solved; make them harder, raise the group size "
        "(rollouts_per_example) or end the job",
    )


def _entropy_collapse(history: _History) -> Diagnosis | None:
    entropy, reward = history.recent("entropy"), history.recent("reward")
    if entropy is None or reward is None or reward >= ENTROPY_REWARD:
        return None
    first = statistics.fmean(history.first_entropies)
    if entropy >= ENTROPY_LEFT * first:
        return None
    return Diagnosis(
        code=HealthCode.ENTROPY_COLLAPSE,
        finding=f"the policy's entropy fell from {first:.3g} to {entropy:.3g} nats per token "
        f"while the reward is {reward:.2f}, so it tries nothing new",
        remedy="lower the learning rate, raise clip_high or the sampling temperature, or add "
        "kl_beta",
    )


def _mismatch_high(history: _History) -> Diagnosis | None:
    mismatch, masked = history.recent("mismatch_kl/mean"), history.recent("is_masked")
    if mismatch is None:
        return None
    stale = max(history.window("sample/staleness_max"), default=1.0) > 0
    limit = MISMATCH_STALE if stale else MISMATCH_FRESH
    if mismatch < limit and (masked or 0.0) < MASKED:
        return None
    return Diagnosis(
        code=HealthCode.MISMATCH_HIGH,
        finding=f"samples are far from the policy that learns from them: {mismatch:.3g} nats per "
        f"token, {masked or 0.0:.0%} of tokens left out of the loss",
        remedy="lower max_staleness or the learning rate"
        if stale
        else "the samples are of the current version, so the workers' engines or number types "
        "differ from the learner's",
    )


def _weights_not_reaching_sampler(history: _History) -> Diagnosis | None:
    refused = history.total("market/rejected_wrong_weights")
    judged = history.total("market/results_judged")
    if judged and refused >= WINDOW and refused >= WRONG_WEIGHTS * judged:
        finding = f"{refused:.0f} of the last {judged:.0f} results were made under other weights"
    elif not _sampled_version_stands(history):
        return None
    else:
        finding = (
            f"the policy version that samples has not changed for {WINDOW} updates more than "
            f"max_staleness {history.max_staleness} allows, so new weights never reach the sampler"
        )
    return Diagnosis(
        code=HealthCode.WEIGHTS_NOT_REACHING_SAMPLER,
        finding=finding,
        remedy="check that workers can fetch blobs from the orchestrator (blob_urls) and restart "
        "those that cannot",
    )


def _sampled_version_stands(history: _History) -> bool:
    updates = history.updates
    if len(updates) < (updates.maxlen or 0):
        return False
    if any("sample/staleness_mean" not in metrics or "step" not in metrics for metrics in updates):
        return False
    sampled = [metrics["step"] - metrics["sample/staleness_mean"] for metrics in updates]
    return max(sampled) <= sampled[0] and updates[-1]["step"] > updates[0]["step"]


def _reward_crashed(history: _History) -> Diagnosis | None:
    reward, best = history.recent("reward"), history.best_reward
    if reward is None or reward > CRASHED * best or best - reward < CRASH_DROP:
        return None
    return Diagnosis(
        code=HealthCode.REWARD_CRASHED,
        finding=f"the reward fell from {best:.2f} to {reward:.2f}",
        remedy="the learning rate is probably too high; lower it, and take the best version "
        "(checkpoint.release = best)",
    )


def _held_out_falling(history: _History) -> Diagnosis | None:
    best, last = history.best_held_out, history.last_held_out
    reward = history.recent("reward")
    if best is None or last is None or reward is None:
        return None
    if not best.interval.is_above(last.interval) or reward < history.reward_at_best:
        return None
    return Diagnosis(
        code=HealthCode.HELD_OUT_FALLING,
        finding=f"held-out accuracy fell from {best.value:.2f} to {last.value:.2f} while the "
        f"reward in training rose from {history.reward_at_best:.2f} to {reward:.2f}",
        remedy="take the best version (checkpoint.release = best), stop earlier (eval.patience) "
        "or lower the learning rate",
    )


def _completions_truncated(history: _History) -> Diagnosis | None:
    share = history.recent("completions/clipped_ratio")
    if share is None or share < TRUNCATED:
        return None
    return Diagnosis(
        code=HealthCode.COMPLETIONS_TRUNCATED,
        finding=f"{share:.0%} of completions are cut off at the length limit",
        remedy="raise sampling.max_tokens, or reward shorter answers",
    )


def _gradient_exploded(history: _History) -> Diagnosis | None:
    norms, usual = history.window("grad_norm"), history.usual_norms
    if not norms or len(usual) < USUAL_NORMS:
        return None
    norm, before = statistics.median(norms), statistics.median(usual)
    if math.isfinite(norm) and norm < EXPLODED * before:
        return None
    return Diagnosis(
        code=HealthCode.GRADIENT_EXPLODED,
        finding=f"the gradient norm is {norm:.3g} where {before:.3g} was usual",
        remedy="lower the learning rate or max_grad_norm",
    )


def _gradient_not_finite(history: _History) -> Diagnosis | None:
    count = history.total("market/failed/not_finite")
    if not count:
        return None
    return Diagnosis(
        code=HealthCode.GRADIENT_NOT_FINITE,
        finding=f"{count:.0f} gradients of the last {WINDOW} updates were infinite or no numbers",
        remedy="lower the learning rate; if it happens on one kind of device only, leave it out",
    )


def _grader_errors(history: _History) -> Diagnosis | None:
    count = history.total("market/failed/environment")
    if not count:
        return None
    return Diagnosis(
        code=HealthCode.GRADER_ERRORS,
        finding=f"the environment failed on {count:.0f} tasks of the last {WINDOW} updates; "
        "nothing of them counts as reward 0",
        remedy="read the failures in the job's log and mend or replace the environment",
    )


_RULES: tuple[Callable[[_History], Diagnosis | None], ...] = (
    _no_spread,
    _entropy_collapse,
    _mismatch_high,
    _weights_not_reaching_sampler,
    _reward_crashed,
    _held_out_falling,
    _completions_truncated,
    _gradient_exploded,
    _gradient_not_finite,
    _grader_errors,
)
