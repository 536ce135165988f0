"""What is allowed in a job and yet is seldom meant: each trap as one sentence, without torch."""

from __future__ import annotations

import math

from shoal.protocol.job import JobSpec
from shoal.protocol.learning import (
    AdvantageScale,
    CorrectionSpec,
    LossKind,
    LossSpec,
    OldPolicy,
    RatioBound,
    SequenceStatistic,
)

MISMATCH_PER_TOKEN = 0.012
"""Mean log-ratio of one token between an exact and a reduced-precision engine.

Source: the engine mismatch reported in TRL issue 4772.
"""

_SEQUENCE_KINDS = (LossKind.GSPO, LossKind.LUSPO)
_LARGEST_SEQUENCE_CLIP = 0.05


def job_warnings(spec: JobSpec) -> list[str]:
    """One sentence for each trap the job walks into; none for a job that is as usual."""
    warnings = loss_warnings(spec.loss, spec.sampling.max_tokens)
    if spec.max_staleness > 0 and _is_uncorrected(spec.loss.correction):
        warnings.append(
            f"max_staleness is {spec.max_staleness} and [correction] corrects nothing, so old "
            "samples are taken for new ones and learning may collapse; keep "
            'old_policy = "behaviour", or token_bound = "truncate".'
        )
    return warnings


def loss_warnings(spec: LossSpec, max_tokens: int) -> list[str]:
    """One sentence for each trap of ``spec`` with completions of up to ``max_tokens``."""
    found = (
        _summed_ratios(spec.correction, max_tokens),
        _kl(spec),
        _token_clip_on_sequences(spec),
        _scaled_dr_grpo(spec),
        _length_bias(spec),
    )
    return [sentence for sentence in found if sentence]


def _is_uncorrected(correction: CorrectionSpec) -> bool:
    return (
        correction.old_policy is OldPolicy.PROXIMAL
        and correction.token_bound is RatioBound.NONE
        and correction.sequence_bound is RatioBound.NONE
    )


def _summed_ratios(correction: CorrectionSpec, max_tokens: int) -> str:
    """Source: TRL issue 4772; a summed log-ratio grows with the length of the completion."""
    if (
        correction.sequence_bound is RatioBound.NONE
        or correction.sequence_statistic is SequenceStatistic.MEAN
        or MISMATCH_PER_TOKEN * max_tokens <= math.log(correction.sequence_max)
    ):
        return ""
    longest = int(math.log(correction.sequence_max) / MISMATCH_PER_TOKEN)
    done = "dropped" if correction.sequence_bound is RatioBound.MASK else "cut down"
    return (
        f'correction.sequence_statistic is "sum": completions beyond about {longest} tokens will '
        f"be {done} merely for being long; use "
        '"mean" or raise sequence_max.'
    )


def _kl(spec: LossSpec) -> str:
    """Source: DAPO (arXiv 2503.14476) §2.3 leaves the term out."""
    if spec.kl_beta == 0:
        return ""
    return (
        f"algorithm.kl_beta is {spec.kl_beta:g}: the KL term holds the policy to the base, and "
        "every gradient task runs the base once more; most recipes set it to 0."
    )


def _token_clip_on_sequences(spec: LossSpec) -> str:
    """Source: GSPO (arXiv 2507.18071) §5.1, bounds 3e-4 and 4e-4 of the sequence ratio."""
    widest = max(spec.clip_low, spec.clip_high)
    if spec.kind not in _SEQUENCE_KINDS or widest <= _LARGEST_SEQUENCE_CLIP:
        return ""
    return (
        f'algorithm.type "{spec.kind}" clips the ratio of a whole sequence, which moves by '
        f"thousandths; a clip of {widest:g} will never bind: leave clip_low and clip_high out."
    )


def _scaled_dr_grpo(spec: LossSpec) -> str:
    """Source: Dr. GRPO (arXiv 2503.20783) §3.2 removes both the length and the std term."""
    if spec.kind is not LossKind.DR_GRPO or spec.advantage_scale is AdvantageScale.NONE:
        return ""
    return (
        'algorithm.type "dr_grpo" is half of Dr. GRPO; set advantage_scale = "none" '
        "as well to get the other half."
    )


def _length_bias(spec: LossSpec) -> str:
    """Source: Dr. GRPO (arXiv 2503.20783) §3.1."""
    if spec.kind is not LossKind.GRPO:
        return ""
    return (
        'algorithm.type "grpo" divides each completion by its own length, which favours long '
        'wrong answers; "dapo" does not.'
    )
