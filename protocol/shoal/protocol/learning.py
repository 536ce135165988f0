"""How a job learns: the loss, its off-policy correction, the optimiser, what travels.

Each record stands in the job, with every default written out, and in the tasks that need it;
a default that changes later never changes a job that runs.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import Field, model_validator

from shoal.protocol.record import Record

MAX_STEPS = 1_000_000


class AdvantageScale(StrEnum):
    """How rewards become advantages: what a group's centred rewards are divided by."""

    GROUP_STD = "group_std"
    BATCH_STD = "batch_std"
    NONE = "none"


class LossKind(StrEnum):
    """The policy losses; `shoal.rl.loss` has the formula and the source of each."""

    GRPO = "grpo"
    DAPO = "dapo"
    DR_GRPO = "dr_grpo"
    BNPO = "bnpo"
    GSPO = "gspo"
    CISPO = "cispo"
    SAPO = "sapo"
    LUSPO = "luspo"


class OldPolicy(StrEnum):
    """Against which policy the clipped ratio is taken.

    ``BEHAVIOUR`` is the policy that drew the tokens; ``PROXIMAL`` is the policy at the start
    of the update (decoupled PPO), and the weights of the correction bridge the two.
    """

    BEHAVIOUR = "behaviour"
    PROXIMAL = "proximal"


class RatioBound(StrEnum):
    """What happens to an importance ratio outside its bounds; with ``NONE`` it is not used."""

    NONE = "none"
    TRUNCATE = "truncate"
    MASK = "mask"


class SequenceStatistic(StrEnum):
    """How token log-ratios become one of a sequence: geometric mean, or product."""

    MEAN = "mean"
    SUM = "sum"


class CorrectionSpec(Record):
    """How samples of an older or inexact policy are corrected.

    With a ``BEHAVIOUR`` old policy the clipped ratio π_θ/μ corrects, and the clip also keeps
    the policy near the one that sampled; bounds mask or are absent.  With a ``PROXIMAL`` one a
    token's loss is weighted by π_prox/μ, cut to its bounds when truncated (TIS), 0 outside them
    when masked (MIS); only without a ``token_bound`` is the sequence's ratio the weight of its
    tokens.  In both, a masked sequence is dropped when its ratio leaves its bounds.  A mask
    never changes the loss's divisor.  An absent ``token_bound`` truncates with a ``PROXIMAL``
    old policy unless its sequences are truncated, and else is not used.

    The defaults are those that lost least in ``benchmarks/rl/staleness.py``: weights alone
    let the policy run away from the samples it still has to learn from.

    Source: PPO, arXiv 1707.06347; decoupled PPO, arXiv 2110.00641 and AReaL, arXiv 2505.24298
    §5.2; truncated importance sampling, Yao et al. 2025; IcePop masks, Ling Team 2025, arXiv
    2510.18855.
    """

    old_policy: OldPolicy = OldPolicy.BEHAVIOUR
    token_bound: RatioBound = RatioBound.NONE
    token_min: float = Field(default=0.0, ge=0, le=1)
    token_max: float = Field(default=2.0, ge=1, le=1e6)
    sequence_bound: RatioBound = RatioBound.MASK
    sequence_statistic: SequenceStatistic = SequenceStatistic.MEAN
    sequence_min: float = Field(default=0.2, ge=0, le=1)
    sequence_max: float = Field(default=5.0, ge=1, le=1e6)

    @model_validator(mode="before")
    @classmethod
    def _proximal_needs_weights(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("old_policy") != OldPolicy.PROXIMAL:
            return data
        if data.get("sequence_bound") == RatioBound.TRUNCATE:
            return data
        return {"token_bound": RatioBound.TRUNCATE} | data

    @model_validator(mode="after")
    def _corrects_once(self) -> CorrectionSpec:
        bounds = {"token_bound": self.token_bound, "sequence_bound": self.sequence_bound}
        if self.old_policy is OldPolicy.BEHAVIOUR and RatioBound.TRUNCATE in bounds.values():
            name = next(name for name, bound in bounds.items() if bound is RatioBound.TRUNCATE)
            raise ValueError(
                f"{name} truncate would correct a second time what the clip corrects already "
                "with old_policy behaviour; set old_policy proximal, or use mask or none"
            )
        if self.sequence_bound is RatioBound.TRUNCATE and self.token_bound is not RatioBound.NONE:
            raise ValueError(
                f"sequence_bound truncate and token_bound {self.token_bound} would weight each "
                "token twice; set one of them to none"
            )
        return self


def _clip(low: float, high: float) -> dict[str, Any]:
    return {"clip_low": low, "clip_high": high}


# Source: the papers named in `shoal.rl.loss`; CISPO's bound is ScaleRL's, arXiv 2510.13786.
_USUAL: dict[LossKind, dict[str, Any]] = {
    LossKind.GRPO: _clip(0.2, 0.2),
    LossKind.DAPO: _clip(0.2, 0.28),
    LossKind.DR_GRPO: _clip(0.2, 0.2) | {"advantage_scale": AdvantageScale.NONE},
    LossKind.BNPO: _clip(0.2, 0.2),
    LossKind.GSPO: _clip(3e-4, 4e-4),
    LossKind.CISPO: _clip(0.2, 5.0),
    LossKind.SAPO: _clip(0.2, 0.2),
    LossKind.LUSPO: _clip(3e-4, 4e-4),
}


class LossSpec(Record):
    """The exact loss; its digest stands in the job and travels in every gradient task.

    ``clip_low`` and ``clip_high`` are the ε of the clip ``[1 − ε_low, 1 + ε_high]``; for
    CISPO ``clip_high`` is the largest ratio itself, and SAPO has no clip.  What is absent takes
    the value usual for the kind.  ``clip_delta`` bounds the unclipped ratio of tokens with a
    negative advantage (two-sided clipping).  ``kl_beta`` adds the k3 estimate of KL to the
    base; with ``kl_bias_correction`` it is weighted by the ratio.  ``mask_truncated`` leaves
    out completions that were cut off at the length limit (overlong mask).
    """

    kind: LossKind = LossKind.DAPO
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    clip_high: float = Field(default=0.28, gt=0, le=1e3)
    clip_delta: float | None = Field(default=None, gt=1, le=1e3)
    kl_beta: float = Field(default=0.0, ge=0, le=10)
    kl_bias_correction: bool = True
    sapo_temperature_positive: float = Field(default=1.0, gt=0, le=100)
    sapo_temperature_negative: float = Field(default=1.05, gt=0, le=100)
    advantage_scale: AdvantageScale = AdvantageScale.GROUP_STD
    mask_truncated: bool = False
    correction: CorrectionSpec = CorrectionSpec()

    @model_validator(mode="before")
    @classmethod
    def _usual_for_the_kind(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        try:
            return _USUAL[LossKind(data.get("kind", LossKind.DAPO))] | data
        except ValueError:
            return data

    @model_validator(mode="after")
    def _known_traps(self) -> LossSpec:
        if self.kind is LossKind.CISPO and self.clip_high <= 1:
            raise ValueError(
                f"clip_high {self.clip_high:g} would cap every CISPO ratio below one; it is the "
                "largest ratio, usually 5"
            )
        if self.clip_delta is not None:
            if self.kind in (LossKind.CISPO, LossKind.SAPO):
                raise ValueError(f"clip_delta bounds a clipped ratio, which {self.kind} has not")
            if self.clip_delta <= 1 + self.clip_high:
                raise ValueError(
                    f"clip_delta {self.clip_delta:g} lies inside the clip and would undo it; "
                    f"set it above 1 + clip_high, {1 + self.clip_high:g}"
                )
        return self


class OptimizerSpec(Record):
    """AdamW, with linear warm-up and linear decay."""

    learning_rate: float = Field(default=1e-5, gt=0, le=1)
    warmup_steps: int = Field(default=5, ge=0, le=MAX_STEPS)
    final_lr_fraction: float = Field(default=0.1, ge=0, le=1)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    max_grad_norm: float = Field(default=1.0, gt=0, le=1e6)


class LoraSpec(Record):
    """The adapter's shape, in PEFT's words."""

    r: int = Field(default=16, ge=1, le=512)
    alpha: int = Field(default=32, ge=1, le=4096)
    target_modules: str = Field(default="all-linear", pattern=r"^[A-Za-z0-9_|.-]{1,200}$")


class CodecKind(StrEnum):
    """How a gradient is written down for its way to the orchestrator."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"
    TOPK = "topk"


class CodecSpec(Record):
    """The gradient codec.

    ``chunk`` values share one scale; ``TOPK`` keeps the ``keep`` largest of each chunk, each
    in ``bits`` bits.  ``error_feedback`` is the share of what was not sent that is added to
    the next gradient; 0 forgets it.

    Source: SparseLoCo, arXiv 2508.15706 (chunked top-k, 2-bit values, error feedback 0.95).
    """

    kind: CodecKind = CodecKind.FP32
    chunk: int = Field(default=4096, ge=16, le=1 << 16)
    keep: int = Field(default=64, ge=1, le=1 << 16)
    bits: int = Field(default=2, ge=2, le=4)
    error_feedback: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _keeps_at_most_all(self) -> CodecSpec:
        if self.kind is CodecKind.TOPK and self.keep > self.chunk:
            raise ValueError(f"keep {self.keep} is more than the {self.chunk} values of a chunk")
        if self.error_feedback and self.kind is CodecKind.FP32:
            raise ValueError("error_feedback has nothing to feed back with codec fp32")
        return self


class GradientSpec(Record):
    """What a gradient task returns.

    With one local step it is the gradient of the loss sum, and the orchestrator's AdamW makes
    the update.  With more, a worker takes ``local_steps`` AdamW steps of its own over as many
    parts of its slice and returns how far the weights moved; the orchestrator averages and
    applies ``outer_learning_rate`` with Nesterov momentum ``outer_momentum``.

    Source: DiLoCo, arXiv 2311.08105.
    """

    codec: CodecSpec = CodecSpec()
    local_steps: int = Field(default=1, ge=1, le=64)
    outer_learning_rate: float = Field(default=1.0, gt=0, le=10)
    outer_momentum: float = Field(default=0.0, ge=0, lt=1)
