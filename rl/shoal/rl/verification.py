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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch

from shoal.models.forward import padded, row_mask
from shoal.models.policy import Policy
from shoal.protocol.canonical import sha256_hex
from shoal.protocol.errors import PeerFault
from shoal.protocol.result import Check, CheckName, Result
from shoal.protocol.task import EvaluateTask, GradientTask, PromptRef, RolloutTask
from shoal.rl.batch import (
    STATS_FIELDS,
    EvaluatePayload,
    Floats,
    GradientPayload,
    GradientSlice,
    RolloutPayload,
    RowLimits,
    prompt_sha256,
)
from shoal.rl.environments import Environment, Split
from shoal.rl.gradient import differentiate
from shoal.rl.reward import score_completions
from shoal.rl.rollout import Prompts, decode_completions, encode_prompts, require_version

JUDGED_DTYPE = "float32"
"""Log-probabilities of other types differ from the recomputed ones by more than any tolerance
that still tells one policy version from the next."""

GRADIENT_TOLERANCE = 1e-4
"""Relative error allowed on audit: honest recomputation on other hardware reaches 1.2e-6."""

MAX_NORM_PER_TOKEN = 100.0
"""A summed gradient longer than this times its tokens is refused unread; honest ones stay
below 10 and longer ones could hide everybody else's in the sum."""

_AUDIT_LOGITS = 1 << 24
_Payload = TypeVar("_Payload", RolloutPayload, EvaluatePayload, GradientPayload)


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
    """The verdict's checks and, if all passed, the verifier's own rewards."""

    checks: tuple[Check, ...]
    payload: EvaluatePayload | None = None
    rewards: Floats | None = None

    @property
    def accepted(self) -> bool:
        """Whether every check passed."""
        return self.payload is not None


@dataclass(frozen=True, kw_only=True)
class GradientVerification:
    """The verdict's checks and, if all passed, the gradient to add."""

    checks: tuple[Check, ...]
    payload: GradientPayload | None = None

    @property
    def accepted(self) -> bool:
        """Whether every check passed."""
        return self.payload is not None


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
        InvalidRequest: an audit was asked of a policy that holds another adapter.
    """
    checks = _Checklist()
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
        if audit:
            require_version(policy, task.policy)
            _audit_logprobs(checks, policy, task, payload, prompts, tolerance)
    except _FailedError:
        return RolloutVerification(checks=tuple(checks.done))
    return RolloutVerification(
        checks=tuple(checks.done), payload=payload, prompts=prompts, rewards=rewards
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

    On audit ``policy`` must hold the task's adapter; each token's recomputed log-probability
    must then be within ``tolerance`` of the most likely token's.

    Raises:
        InvalidRequest: an audit was asked of a policy that holds another adapter.
    """
    checks = _Checklist()
    limits = _limits(policy, task.prompts, 1, task.max_tokens)
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
        if audit:
            require_version(policy, task.policy)
            _audit_greedy(checks, policy, payload, prompts, tolerance)
    except _FailedError:
        return EvaluateVerification(checks=tuple(checks.done))
    return EvaluateVerification(checks=tuple(checks.done), payload=payload, rewards=rewards)


def verify_gradient(
    policy: Policy,
    task: GradientTask,
    result: Result,
    data: bytes,
    slice_bytes: bytes,
    *,
    audit: bool,
    tolerance: float = GRADIENT_TOLERANCE,
) -> GradientVerification:
    """Whether ``data`` is an honest answer to ``task`` over ``slice_bytes``.

    Without audit this catches what is malformed, empty or absurdly large, and no more; on
    audit ``policy`` must hold the task's adapter, and the gradient is recomputed.

    Raises:
        InvalidRequest: an audit was asked of a policy that holds another adapter.
    """
    checks = _Checklist()
    rows = GradientSlice.decode(
        slice_bytes,
        num_rows=task.num_rows,
        num_prompts=task.num_groups,
        vocab_size=policy.vocab_size,
    )
    try:
        payload = checks.common(
            task,
            result,
            data,
            task.num_groups,
            lambda: GradientPayload.decode(data, policy.shapes()),
        )
        checks.num_tokens(result, rows.num_tokens)
        checks.gradient_is_sane(payload, rows)
        if audit:
            require_version(policy, task.policy)
            honest = differentiate(policy, task.loss, task.temperature, rows)
            checks.gradient_is_equal(payload, honest, tolerance)
    except _FailedError:
        return GradientVerification(checks=tuple(checks.done))
    return GradientVerification(checks=tuple(checks.done), payload=payload)


class _FailedError(Exception):
    """Ends a verification at its first failed check."""


class _Checklist:
    """Runs checks in order, keeping each outcome."""

    def __init__(self) -> None:
        self.done: list[Check] = []

    def record(self, name: CheckName, passed: bool, detail: str) -> None:
        self.done.append(Check(name=name, passed=passed, detail=detail[:500]))
        if not passed:
            raise _FailedError

    def common(
        self,
        task: RolloutTask | EvaluateTask | GradientTask,
        result: Result,
        data: bytes,
        num_units: int,
        decode: Callable[[], _Payload],
    ) -> _Payload:
        """The decoded payload of a result that fits its task and its own digests."""
        if (result.task_id, result.kind) != (task.task_id, task.kind):
            self.record(CheckName.FORM, False, "the result is of another task")
        if result.num_units != num_units:
            detail = f"{result.num_units} units are claimed where the task has {num_units}"
            self.record(CheckName.FORM, False, detail)
        if result.dtype != JUDGED_DTYPE:
            detail = f"dtype {result.dtype} cannot be judged; compute in {JUDGED_DTYPE}"
            self.record(CheckName.FORM, False, detail)
        try:
            payload = decode()
        except PeerFault as fault:
            self.record(CheckName.FORM, False, fault.message)
            raise
        self.record(CheckName.FORM, True, f"{num_units} units in {len(data)} bytes")
        sent = (sha256_hex(data), len(data), result.task_sha256)
        named = (result.payload.sha256, result.payload.size_bytes, task.digest())
        self.record(
            CheckName.DIGEST,
            sent == named,
            f"payload {sent[0][:12]}, named {named[0][:12]}; "
            f"task {named[2][:12]}, named {sent[2][:12]}",
        )
        committed = task.policy.policy_sha256()
        self.record(
            CheckName.POLICY,
            result.policy_sha256 == committed,
            f"computed under {result.policy_sha256[:12]}, due under {committed[:12]} "
            f"(version {task.policy.version})",
        )
        return payload

    def num_tokens(self, result: Result, num_tokens: int) -> None:
        if result.num_tokens != num_tokens:
            detail = f"{result.num_tokens} tokens are claimed where {num_tokens} were sent"
            self.record(CheckName.FORM, False, detail)

    def prompts(self, payload: RolloutPayload | EvaluatePayload, prompts: Prompts) -> None:
        due = [prompt_sha256(prompt) for prompt in prompts]
        pairs = zip(due, payload.prompts_sha256, strict=True)
        wrong = [number for number, (ours, theirs) in enumerate(pairs) if ours != theirs]
        self.record(
            CheckName.PROMPTS,
            not wrong,
            f"prompt {wrong[0]} is not the one asked" if wrong else f"all {len(due)} as asked",
        )

    def termination(
        self, payload: RolloutPayload | EvaluatePayload, eos_ids: frozenset[int], max_tokens: int
    ) -> None:
        for number, row in enumerate(payload.token_ids):
            *before, last = row.tolist()
            ended = last in eos_ids
            fault = None
            if not eos_ids.isdisjoint(before):
                fault = "goes on after an end token"
            elif ended != bool(payload.finished[number]):
                fault = "says the contrary of its last token about having finished"
            elif not ended and len(row) != max_tokens:
                fault = f"stops after {len(row)} of {max_tokens} tokens without an end token"
            if fault:
                self.record(CheckName.TERMINATION, False, f"row {number} {fault}")
        detail = f"all {len(payload.token_ids)} rows end by themselves or at {max_tokens} tokens"
        self.record(CheckName.TERMINATION, True, detail)

    def rewards(self, payload: RolloutPayload | EvaluatePayload, rewards: Floats) -> None:
        differing = int((np.abs(payload.rewards - rewards) > 1e-6).sum())
        detail = f"mean {float(rewards.mean()):.4f} recomputed"
        if differing:
            detail += f"; {differing} of {len(rewards)} claims differ and are ignored"
        self.record(CheckName.REWARDS, True, detail)

    def gradient_is_sane(self, payload: GradientPayload, rows: GradientSlice) -> None:
        teaching = [len(rows.token_ids[n]) for n in np.flatnonzero(rows.advantages)]
        norm, limit = payload.norm(), MAX_NORM_PER_TOKEN * max(sum(teaching), 1)
        if payload.stats.num_tokens != sum(teaching):
            detail = f"{payload.stats.num_tokens:g} tokens counted where {sum(teaching)} teach"
            self.record(CheckName.GRADIENT, False, detail)
        clipped = payload.stats.clipped_low + payload.stats.clipped_high
        if norm == 0 and clipped < sum(teaching):
            self.record(CheckName.GRADIENT, False, "the gradient is zero though rows teach")
        detail = f"norm {norm:.4g}, at most {limit:.4g} is plausible"
        self.record(CheckName.GRADIENT, norm <= limit, detail)

    def gradient_is_equal(
        self, payload: GradientPayload, honest: GradientPayload, tolerance: float
    ) -> None:
        squares = sum(
            float(np.square(payload.gradients[name].astype(np.float64) - array).sum())
            for name, array in honest.gradients.items()
        )
        difference, norm = squares**0.5, honest.norm()
        self.record(
            CheckName.GRADIENT,
            difference <= tolerance * norm,
            f"recomputed: differs by {difference:.3g} of norm {norm:.3g}, {tolerance:g} allowed",
        )
        for name in STATS_FIELDS:
            claimed, ours = getattr(payload.stats, name), getattr(honest.stats, name)
            # One token on the edge of a clip may fall on either side.
            if abs(claimed - ours) > 1.0 + 1e-3 * abs(ours):
                detail = f"{name} is {claimed:.4g} where {ours:.4g} was recomputed"
                self.record(CheckName.GRADIENT, False, detail)


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
    checks: _Checklist,
    policy: Policy,
    task: RolloutTask,
    payload: RolloutPayload,
    prompts: Prompts,
    tolerance: float,
) -> None:
    rows = [prompt for prompt in prompts for _ in range(task.group_size)]
    worst = 0.0
    for part, logprobs_btv, ids_bt, mask_bt in _recomputed(
        policy, rows, payload, task.sampling.temperature
    ):
        ours_bt = logprobs_btv.gather(2, ids_bt.unsqueeze(2)).squeeze(2)
        claimed_bt = torch.zeros_like(ours_bt)
        claimed_bt[mask_bt] = torch.from_numpy(np.concatenate(payload.logprobs[part]))
        worst = max(worst, float(((ours_bt - claimed_bt).abs() * mask_bt).max()))
    detail = f"recomputed: largest difference {worst:.3g}, {tolerance:g} allowed"
    checks.record(CheckName.LOGPROBS, worst <= tolerance, detail)


def _audit_greedy(
    checks: _Checklist,
    policy: Policy,
    payload: EvaluatePayload,
    prompts: Prompts,
    tolerance: float,
) -> None:
    worst = 0.0
    for _, logprobs_btv, ids_bt, mask_bt in _recomputed(policy, prompts, payload, 1.0):
        ours_bt = logprobs_btv.gather(2, ids_bt.unsqueeze(2)).squeeze(2)
        worst = max(worst, float(((logprobs_btv.amax(dim=2) - ours_bt) * mask_bt).max()))
    detail = f"recomputed: a token was {worst:.3g} below the likeliest, {tolerance:g} allowed"
    checks.record(CheckName.LOGPROBS, worst <= tolerance, detail)


def _recomputed(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    payload: RolloutPayload | EvaluatePayload,
    temperature: float,
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For rows in parts of bounded memory: log-probabilities, token ids, mask."""
    widest = max(len(row) for row in payload.token_ids)
    step = max(1, _AUDIT_LOGITS // (widest * policy.vocab_size))
    for first in range(0, len(prompts), step):
        part = slice(first, first + step)
        completions = payload.token_ids[part]
        width = max(len(row) for row in completions)
        with torch.inference_mode():
            logits_btv = policy.logits_btv(prompts[part], completions).cpu()
            logprobs_btv = torch.log_softmax(logits_btv / temperature, dim=-1)
        yield part, logprobs_btv, padded(completions, width), row_mask(completions, width)
