"""Verification: what a result must satisfy before it is paid for and learned from.

Checks run cheap first and the first failure stops the rest; evidence that is missing is a
failure, never a pass.  Nothing the worker claims is used where it can be recomputed: prompts
and rewards are always re-derived, log-probabilities, greedy tokens and gradients on audit,
under the policy version the *task* committed to.

Claimed rewards are a hint.  A claim that differs is reported in the REWARDS check and earns
nothing, since pay is per accepted unit and learning uses the verifier's rewards; it is no
ground for refusing tokens and log-probabilities that are sound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias, TypeVar

import numpy as np
import torch

from shoal.models.engine import OnProgress
from shoal.models.forward import padded, row_mask
from shoal.models.policy import Policy
from shoal.models.sampling import completion_numbers, draw_uniforms_bt
from shoal.protocol.errors import InvalidRequest
from shoal.protocol.result import Check, CheckName, Result
from shoal.protocol.task import EvaluateTask, GradientTask, PromptRef, RolloutTask
from shoal.rl.batch import (
    EvaluatePayload,
    Floats,
    GradientPayload,
    GradientSlice,
    RolloutPayload,
    RowLimits,
)
from shoal.rl.checklist import CheckFailedError, Checklist
from shoal.rl.differentiate import SliceGradient
from shoal.rl.environments import Environment, Split
from shoal.rl.evaluation import sampling_temperature
from shoal.rl.gradient import decode_slice, slice_gradient
from shoal.rl.gradient_audit import (
    ResidualEvidence,
    check_link,
    check_plausible,
    recomputed_checks,
)
from shoal.rl.reward import score_completions
from shoal.rl.rollout import Prompts, decode_completions, encode_prompts, require_version

_AUDIT_LOGITS = 1 << 24


@dataclass(frozen=True, kw_only=True)
class RolloutVerification:
    """The verdict's checks and, if all passed, what may be learned from.

    ``prompts`` are the verifier's tokens and ``rewards`` its own, not the worker's claims.
    """

    checks: tuple[Check, ...]
    payload: RolloutPayload | None = None
    prompts: Prompts = field(default_factory=list)
    rewards: Floats | None = None

    @property
    def accepted(self) -> bool:
        """Whether every check passed."""
        return self.payload is not None


@dataclass(frozen=True, kw_only=True)
class EvaluateVerification:
    """The verdict's checks and, if all passed, the verifier's own tokens and rewards."""

    checks: tuple[Check, ...]
    payload: EvaluatePayload | None = None
    prompts: Prompts = field(default_factory=list)
    rewards: Floats | None = None

    @property
    def accepted(self) -> bool:
        """Whether every check passed."""
        return self.payload is not None


@dataclass(frozen=True, kw_only=True)
class GradientVerification:
    """The verdict's checks and, if all passed, the gradient to add and the rows it is of."""

    checks: tuple[Check, ...]
    payload: GradientPayload | None = None
    rows: GradientSlice | None = None

    @property
    def accepted(self) -> bool:
        """Whether every check passed."""
        return self.payload is not None


Verification: TypeAlias = RolloutVerification | EvaluateVerification | GradientVerification
_Verified = TypeVar("_Verified", RolloutVerification, EvaluateVerification, GradientVerification)


def verify_rollout(
    policy: Policy,
    task: RolloutTask,
    result: Result,
    data: bytes,
    environments: Sequence[Environment],
    *,
    audit: bool,
    tolerance: float,
) -> RolloutVerification:
    """Whether ``data`` is an honest answer to ``task``.

    On audit ``policy`` must hold the task's adapter; ``tolerance`` then bounds the difference
    between each claimed log-probability and the recomputed one.

    Raises:
        InvalidRequest: an audit was asked of a policy that holds another adapter, or gives no
            numbers.
    """
    checks = Checklist()
    limits = _limits(policy, task.prompts, task.group_size, task.sampling.max_tokens)
    try:
        payload = checks.common(
            task, result, data, len(task.prompts), lambda: RolloutPayload.decode(data, limits)
        )
        checks.num_tokens(result, payload.num_tokens)
        prompts = encode_prompts(policy, environments, task.prompts, Split.TRAIN)
        checks.prompts(payload, prompts)
        checks.termination(payload, policy.eos_ids, task.sampling.max_tokens)
        rewards = _rewards(policy, payload, environments, task.prompts, Split.TRAIN)
        checks.rewards(payload, rewards)
    except CheckFailedError:
        return RolloutVerification(checks=tuple(checks.done))
    found = RolloutVerification(
        checks=tuple(checks.done), payload=payload, prompts=prompts, rewards=rewards
    )
    return audit_rollout(policy, task, found, tolerance=tolerance) if audit else found


def audit_rollout(
    policy: Policy, task: RolloutTask, found: RolloutVerification, *, tolerance: float
) -> RolloutVerification:
    """``found``, which passed without audit, and whether it passes the audit too.

    Only the model is used, so another thread may make the checks that need none.

    Raises:
        InvalidRequest: ``policy`` does not hold the task's adapter, or gives no numbers.
    """
    require_version(policy, task.policy)
    payload = found.payload
    if payload is None:
        return found
    return _checked_further(
        found,
        lambda checks: _audit_logprobs(checks, policy, task, payload, found.prompts, tolerance),
    )


def verify_evaluate(
    policy: Policy,
    task: EvaluateTask,
    result: Result,
    data: bytes,
    environments: Sequence[Environment],
    *,
    audit: bool,
    tolerance: float,
) -> EvaluateVerification:
    """Whether ``data`` is an honest answer to ``task``.

    On audit ``policy`` must hold the task's adapter.  At temperature 0 each token's recomputed
    log-probability must then be within ``tolerance`` of the most likely token's; above 0 each
    token's share of the cumulative distribution must be the one its uniform falls in, or lie
    within ``tolerance`` of it.

    Raises:
        InvalidRequest: an audit was asked of a policy that holds another adapter, or gives no
            numbers.
    """
    checks = Checklist()
    limits = _limits(policy, task.prompts, task.samples_per_prompt, task.max_tokens)
    try:
        payload = checks.common(
            task, result, data, len(task.prompts), lambda: EvaluatePayload.decode(data, limits)
        )
        checks.num_tokens(result, payload.num_tokens)
        prompts = encode_prompts(policy, environments, task.prompts, Split.EVAL)
        checks.prompts(payload, prompts)
        checks.termination(payload, policy.eos_ids, task.max_tokens)
        rewards = _rewards(policy, payload, environments, task.prompts, Split.EVAL)
        checks.rewards(payload, rewards)
    except CheckFailedError:
        return EvaluateVerification(checks=tuple(checks.done))
    found = EvaluateVerification(
        checks=tuple(checks.done), payload=payload, prompts=prompts, rewards=rewards
    )
    return audit_evaluation(policy, task, found, tolerance=tolerance) if audit else found


def audit_evaluation(
    policy: Policy, task: EvaluateTask, found: EvaluateVerification, *, tolerance: float
) -> EvaluateVerification:
    """`audit_rollout` for an evaluation."""
    require_version(policy, task.policy)
    payload = found.payload
    if payload is None:
        return found
    return _checked_further(
        found,
        lambda checks: _audit_evaluation(checks, policy, task, payload, found.prompts, tolerance),
    )


def verify_gradient(
    policy: Policy,
    task: GradientTask,
    result: Result,
    data: bytes,
    slice_bytes: bytes,
    *,
    audit: bool,
    evidence: ResidualEvidence = ResidualEvidence(),  # noqa: B008  # frozen
) -> GradientVerification:
    """Whether ``data`` is an honest answer to ``task`` over ``slice_bytes``.

    Without audit this catches what is malformed, empty, absurdly large, or continues from a
    residual its node does not have, and no more; on audit ``policy`` must hold the task's
    adapter, and the gradient is recomputed and encoded with the residual in ``evidence``.

    Raises:
        InvalidRequest: an audit was asked of a policy that holds another adapter, or gives no
            numbers.
    """
    checks = Checklist()
    rows = decode_slice(policy, task, slice_bytes)
    try:
        payload = checks.common(
            task,
            result,
            data,
            task.num_groups,
            lambda: GradientPayload.decode(data, policy.shapes(), task.gradient.codec),
        )
        checks.num_tokens(result, rows.num_tokens)
        checks.gradient(check_plausible(payload, task, rows))
        checks.gradient(check_link(payload, evidence))
    except CheckFailedError:
        return GradientVerification(checks=tuple(checks.done))
    found = GradientVerification(checks=tuple(checks.done), payload=payload, rows=rows)
    return audit_gradient(policy, task, found, evidence) if audit else found


def audit_gradient(
    policy: Policy,
    task: GradientTask,
    found: GradientVerification,
    evidence: ResidualEvidence,
    honest: SliceGradient | None = None,
) -> GradientVerification:
    """`audit_rollout` for a gradient.

    ``honest`` is what `due_gradient` gave for the task; then ``policy`` may hold any adapter.
    """
    if honest is None:
        require_version(policy, task.policy)
    payload, rows = found.payload, found.rows
    if payload is None or rows is None:
        return found

    def look(checks: Checklist) -> None:
        for finding in recomputed_checks(policy, task, rows, payload, evidence, honest):
            checks.gradient(finding)

    return _checked_further(found, look)


def due_gradient(
    policy: Policy, task: GradientTask, slice_bytes: bytes, on_progress: OnProgress
) -> SliceGradient:
    """What an audit of any answer to ``task`` recomputes, before there is one.

    ``on_progress`` may raise, to give it up.

    Raises:
        InvalidRequest: ``policy`` does not hold the task's adapter, or the gradient is not
            finite.
        Unavailable: recomputing needs more memory than there is.
    """
    require_version(policy, task.policy)
    return slice_gradient(policy, task, decode_slice(policy, task, slice_bytes), on_progress)


def _checked_further(found: _Verified, look: Callable[[Checklist], None]) -> _Verified:
    """``found`` with the checks that ``look`` adds; nothing of it may be used if one fails."""
    checks = Checklist(found.checks)
    try:
        look(checks)
    except CheckFailedError:
        return type(found)(checks=tuple(checks.done))
    return replace(found, checks=tuple(checks.done))


def _limits(
    policy: Policy, prompts: Sequence[PromptRef], group_size: int, max_tokens: int
) -> RowLimits:
    return RowLimits(
        num_prompts=len(prompts),
        num_rows=len(prompts) * group_size,
        max_tokens=max_tokens,
        vocab_size=policy.vocab_size,
    )


def _rewards(
    policy: Policy,
    payload: RolloutPayload | EvaluatePayload,
    environments: Sequence[Environment],
    prompts: Sequence[PromptRef],
    split: Split,
) -> Floats:
    texts = decode_completions(policy, payload.token_ids)
    group_size = len(texts) // len(prompts)
    rewards = score_completions(environments, prompts, group_size, texts, split)
    return np.array(rewards, dtype=np.float32)


def _audit_logprobs(
    checks: Checklist,
    policy: Policy,
    task: RolloutTask,
    payload: RolloutPayload,
    prompts: Prompts,
    tolerance: float,
) -> None:
    rows = [prompt for prompt in prompts for _ in range(task.group_size)]
    worst = 0.0
    for part in _parts(policy, payload):
        completions = payload.token_ids[part]
        with torch.inference_mode():
            ours_bt, _ = policy.logprobs_bt(rows[part], completions, task.sampling.temperature)
        ours_n = ours_bt.cpu()[row_mask(completions, ours_bt.shape[1])]
        claimed_n = torch.from_numpy(np.concatenate(payload.logprobs[part]))
        worst = _worse(worst, (ours_n - claimed_n).abs())
    detail = f"recomputed: largest difference {worst:.3g}, {tolerance:g} allowed"
    checks.record(CheckName.LOGPROBS, worst <= tolerance, detail)


def _audit_evaluation(
    checks: Checklist,
    policy: Policy,
    task: EvaluateTask,
    payload: EvaluatePayload,
    prompts: Prompts,
    tolerance: float,
) -> None:
    rows = [prompt for prompt in prompts for _ in range(task.samples_per_prompt)]
    greedy = task.temperature == 0
    numbers = completion_numbers(task.slots, task.samples_per_prompt)
    worst = 0.0
    for part, logprobs_btv, ids_bt, mask_bt in _recomputed(
        policy, rows, payload, sampling_temperature(task)
    ):
        if greedy:
            ours_bt = logprobs_btv.gather(2, ids_bt.unsqueeze(2)).squeeze(2)
            off_bt = logprobs_btv.amax(dim=2) - ours_bt
        else:
            due_bt = draw_uniforms_bt(task.seed, numbers[part], ids_bt.shape[1])
            off_bt = _off_draw_bt(logprobs_btv, ids_bt, torch.from_numpy(due_bt))
        worst = _worse(worst, off_bt[mask_bt])
    what = "below the likeliest" if greedy else "from the one that had to be drawn"
    detail = f"recomputed: a token was {worst:.3g} {what}, {tolerance:g} allowed"
    checks.record(CheckName.LOGPROBS, worst <= tolerance, detail)


def _worse(worst: float, off_n: torch.Tensor) -> float:
    """The largest of these, and of what was found before.

    Raises:
        InvalidRequest: what was recomputed is no number; nobody's answer can be judged by it.
    """
    found = float(off_n.max())
    if math.isnan(found):
        raise InvalidRequest(
            "The policy gives no numbers for these tokens: its weights have overflowed; lower "
            "the learning rate.",
            code="policy_not_finite",
        )
    return max(worst, found)


def _off_draw_bt(
    logprobs_btv: torch.Tensor, ids_bt: torch.Tensor, uniforms_bt: torch.Tensor
) -> torch.Tensor:
    """How far each uniform lies outside its token's share of the cumulative distribution.

    The rule of the draw is that of `shoal.models.sampling.select_tokens_b`.
    """
    cumulative_btv = logprobs_btv.double().exp_().cumsum(dim=2)
    targets_bt = uniforms_bt * cumulative_btv[:, :, -1]
    upper_bt = cumulative_btv.gather(2, ids_bt.unsqueeze(2)).squeeze(2)
    lower_bt = upper_bt - logprobs_btv.gather(2, ids_bt.unsqueeze(2)).squeeze(2).double().exp()
    return torch.maximum(lower_bt - targets_bt, targets_bt - upper_bt).clamp(min=0.0)


def _parts(policy: Policy, payload: RolloutPayload | EvaluatePayload) -> Iterator[slice]:
    """The payload's rows in parts whose logits take bounded memory."""
    widest = max(len(row) for row in payload.token_ids)
    step = max(1, _AUDIT_LOGITS // (widest * policy.vocab_size))
    for first in range(0, len(payload.token_ids), step):
        yield slice(first, first + step)


def _recomputed(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    payload: RolloutPayload | EvaluatePayload,
    temperature: float,
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For rows in parts of bounded memory: log-probabilities, token ids, mask."""
    for part in _parts(policy, payload):
        completions = payload.token_ids[part]
        width = max(len(row) for row in completions)
        with torch.inference_mode():
            logits_btv = policy.logits_btv(prompts[part], completions).cpu()
            logprobs_btv = torch.log_softmax(logits_btv / temperature, dim=-1)
        yield part, logprobs_btv, padded(completions, width), row_mask(completions, width)
