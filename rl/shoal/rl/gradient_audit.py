"""Whether a gradient is one its task can have, and on audit whether it is the right one.

A gradient with error feedback is ``encode(β·e + g)`` for a residual ``e`` that only its
worker holds.  So its payload names the digests of the residuals before and after; ``before``
must be the ``after`` of an earlier accepted gradient of the same node, used once, or absent;
and on audit both are asked for.  What is out of reach: a worker that lies about ``after``
where it is not audited may inject that much, once, into an audited gradient, so the length
of a residual is bounded too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from shoal.models.policy import Policy
from shoal.protocol.errors import PeerFault
from shoal.protocol.ids import Digest
from shoal.protocol.learning import CodecKind, CodecSpec
from shoal.protocol.task import GradientTask
from shoal.rl import codec
from shoal.rl.batch import (
    NO_MINIMUM,
    STATS_FIELDS,
    GradientPayload,
    GradientSlice,
    GradientStats,
)
from shoal.rl.differentiate import SliceGradient, rows_that_teach
from shoal.rl.gradient import slice_gradient

EXACT_TOLERANCE = 1e-4
"""Relative error allowed on audit of fp32: honest recomputation elsewhere reaches 1.2e-6."""

CODED_TOLERANCE = 1e-3
"""`shoal.rl.codec.deviation` allowed of codecs that decide: a value beside a threshold counts
by its distance from it, so honest recomputation deviates no more than fp32 does."""

LOCAL_STEPS_TOLERANCE = 5e-3
"""Relative error allowed after local steps: AdamW divides each value by its own size, which
makes one that is rounding only as large as any other."""

MAX_NORM_PER_TOKEN = 100.0
"""A summed gradient longer than this times its tokens is refused unread; honest ones stay
below 10 and longer ones could hide everybody else's in the sum."""

_COUNTS = frozenset(
    {
        "num_rows",
        "live_tokens",
        "kl_tokens",
        "num_clippable",
        "clipped_low",
        "clipped_high",
        "masked_tokens",
    }
)
"""Figures that count tokens or rows, of which there are no more than tokens."""

_ADAMW_SLACK = 4.0
"""Over the bound of one AdamW step, for bias correction (below √2) and weight decay."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The outcome of one look at a gradient."""

    passed: bool
    detail: str


@dataclass(frozen=True, kw_only=True)
class ResidualEvidence:
    """What is known of a node's residuals.

    ``spendable`` are the ones its accepted gradients left and none has continued from yet, None
    for a gradient accepted already, whose place in the chain was checked then; ``before`` and
    ``after`` the bytes it sent when asked, absent if it did not.
    """

    spendable: Collection[Digest] | None = ()
    before: bytes | None = None
    after: bytes | None = None


def check_plausible(payload: GradientPayload, task: GradientTask, rows: GradientSlice) -> Finding:
    """Counts the tokens that teach, and neither empty nor absurdly long."""
    teaching_b = rows_that_teach(task.loss, rows.advantages, rows.truncated)
    due = sum(len(rows.token_ids[n]) for n in np.flatnonzero(teaching_b))
    counted = payload.stats.num_tokens
    if counted != due:
        return Finding(passed=False, detail=f"{counted:g} tokens counted where {due} teach")
    wild = _wild_figure(payload.stats)
    if wild is not None:
        return Finding(passed=False, detail=wild)
    norm, limit = payload.norm(), _max_norm(task, due, _num_values(payload))
    limit *= 1.0 + _residual_ratio(task.gradient.codec)
    if norm == 0 and payload.stats.live_tokens > 0:
        return Finding(passed=False, detail="the gradient is zero though rows teach")
    detail = f"norm {norm:.4g}, at most {limit:.4g} is plausible"
    return Finding(passed=norm <= limit, detail=detail)


def _wild_figure(stats: GradientStats) -> str | None:
    """What no slice can have counted, if there is any; unaudited it would spoil the batch's."""
    for name in STATS_FIELDS:
        value = getattr(stats, name)
        if name in _COUNTS and not (0 <= value <= stats.num_tokens and value.is_integer()):
            return f"{name} is {value:g} of {stats.num_tokens:g} tokens"
        # Twice a figure below it, and the sum of those of many slices, are finite.
        if abs(value) > NO_MINIMUM:
            return f"{name} is {value:.4g}, which no slice can reach"
    return None


def check_link(payload: GradientPayload, evidence: ResidualEvidence) -> Finding:
    """Continues from no residual, or from one that an accepted gradient of the node left."""
    before = None if payload.residual is None else payload.residual.before
    if before is None or evidence.spendable is None:
        return Finding(passed=True, detail="continues from no residual, or was accepted already")
    known = before in evidence.spendable
    what = "which an accepted gradient left" if known else "which no accepted gradient left"
    return Finding(passed=known, detail=f"continues from residual {before[:12]}, {what}")


def recomputed_checks(
    policy: Policy,
    task: GradientTask,
    rows: GradientSlice,
    payload: GradientPayload,
    evidence: ResidualEvidence,
    honest: SliceGradient | None = None,
) -> Iterator[Finding]:
    """Recomputes the gradient and compares, one look after the other.

    The caller stops at the first that fails; later ones assume the earlier.  ``honest`` is what
    was recomputed before; absent, ``policy`` must hold the task's adapter.

    Raises:
        InvalidRequest: the recomputed gradient is not finite.
        Unavailable: recomputing needs more memory than there is.
    """
    size, residual_n = codec.num_values(policy.shapes()), None
    if payload.residual is not None and payload.residual.before is not None:
        finding, residual_n = _disclosed("before", evidence.before, payload.residual.before, size)
        yield finding
        if residual_n is not None:
            yield _residual_is_plausible(residual_n, task, payload.stats)
    if honest is None:
        honest = slice_gradient(policy, task, rows)
    spec, tolerance = task.gradient.codec, _tolerance(task)
    target_n = codec.with_feedback(codec.flatten(honest.gradients), residual_n, spec)
    found = codec.deviation(payload.coded, spec, target_n)
    detail = f"recomputed: off by {found:.3g} of its length, {tolerance:g} allowed"
    yield Finding(passed=found <= tolerance, detail=detail)
    yield _stats_agree(payload.stats, honest.stats, tolerance)
    if payload.residual is not None:
        finding, after_n = _disclosed("after", evidence.after, payload.residual.after, size)
        yield finding
        if after_n is not None:
            yield _leaves(after_n, target_n, payload, tolerance)


def _disclosed(
    which: str, data: bytes | None, digest: Digest, size: int
) -> tuple[Finding, codec.Vector | None]:
    """The residual the node was asked for, if it is the one it had named."""
    what = f"the residual {which} it ({digest[:12]})"
    if data is None:
        return Finding(passed=False, detail=f"{what} was not produced when asked for"), None
    if codec.residual_sha256(data) != digest:
        return Finding(passed=False, detail=f"{what} was asked for and other bytes came"), None
    try:
        vector_n = codec.decode_residual(data, size)
    except PeerFault as fault:
        return Finding(passed=False, detail=f"{what} is none: {fault.message}"), None
    return Finding(passed=True, detail=f"{what} was produced"), vector_n


def _residual_is_plausible(
    residual_n: codec.Vector, task: GradientTask, stats: GradientStats
) -> Finding:
    norm = float(np.linalg.norm(residual_n.astype(np.float64)))
    limit = _max_norm(task, int(stats.num_tokens), len(residual_n))
    limit *= _residual_ratio(task.gradient.codec)
    detail = f"residual of norm {norm:.4g}, at most {limit:.4g} is plausible"
    return Finding(passed=norm <= limit, detail=detail)


def _leaves(
    after_n: codec.Vector, target_n: codec.Vector, payload: GradientPayload, tolerance: float
) -> Finding:
    """The residual after is what the encoding left out."""
    left_n = target_n.astype(np.float64) - codec.flatten(payload.gradients)
    difference = float(np.linalg.norm(after_n - left_n))
    limit = tolerance * float(np.linalg.norm(target_n.astype(np.float64)))
    detail = f"the residual after it is off by {difference:.3g}, {limit:.3g} allowed"
    return Finding(passed=difference <= limit, detail=detail)


def _stats_agree(claimed: GradientStats, ours: GradientStats, tolerance: float) -> Finding:
    # Tokens on the edge of a clip may fall on either side.
    share = max(tolerance, CODED_TOLERANCE)
    for name in STATS_FIELDS:
        theirs, mine = getattr(claimed, name), getattr(ours, name)
        if abs(theirs - mine) > 1.0 + share * abs(mine):
            detail = f"{name} is {theirs:.4g} where {mine:.4g} was recomputed"
            return Finding(passed=False, detail=detail)
    return Finding(passed=True, detail="the figures agree with the recomputed")


def _tolerance(task: GradientTask) -> float:
    if task.gradient.local_steps > 1:
        return LOCAL_STEPS_TOLERANCE
    is_exact = task.gradient.codec.kind is CodecKind.FP32
    return EXACT_TOLERANCE if is_exact else CODED_TOLERANCE


def _max_norm(task: GradientTask, num_tokens: int, size: int) -> float:
    """The longest gradient, or movement, an honest worker could have.

    An AdamW step moves a weight by at most the learning rate, or that times
    (1 - β₁) / √(1 - β₂) where this is more.  Source: Kingma & Ba, arXiv 1412.6980 §2.1.
    """
    steps, spec = task.gradient.local_steps, task.optimizer
    if steps > 1:
        stretch = max(1.0, (1.0 - spec.beta1) / (1.0 - spec.beta2) ** 0.5)
        return float(_ADAMW_SLACK * stretch * steps * task.learning_rate * size**0.5)
    return MAX_NORM_PER_TOKEN * max(num_tokens, 1)


def _residual_ratio(spec: CodecSpec) -> float:
    """How long residuals get, relative to the longest gradient.

    An encoding leaves at most the share ρ of what it is given, so ``|e| ≤ ρ·(β·|e| + |g|)``.
    Keeping ``k`` of ``c`` values leaves at most ``√(1 − k/c)``; rounding them leaves more, which
    the floor under ρ allows for.  Source: Stich et al., arXiv 1809.07599, lemma A.1.
    """
    if spec.error_feedback == 0:
        return 0.0
    share = 0.7
    if spec.kind is CodecKind.TOPK:
        share = max(share, (1.0 - spec.keep / spec.chunk) ** 0.5)
    return share / (1.0 - spec.error_feedback * share)


def _num_values(payload: GradientPayload) -> int:
    return sum(array.size for array in payload.gradients.values())
