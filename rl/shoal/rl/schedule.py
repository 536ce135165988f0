"""The learning-rate schedule."""

from __future__ import annotations

from shoal.protocol.learning import OptimizerSpec


def scheduled_rate(spec: OptimizerSpec, step: int, max_steps: int) -> float:
    """The learning rate of update ``step`` (from 0): warm-up, then linear to the final fraction."""
    if step < spec.warmup_steps:
        return spec.learning_rate * (step + 1) / spec.warmup_steps
    remaining = max(max_steps - 1 - spec.warmup_steps, 1)
    progress = min((step - spec.warmup_steps) / remaining, 1.0)
    return spec.learning_rate * (1.0 - (1.0 - spec.final_lr_fraction) * progress)
