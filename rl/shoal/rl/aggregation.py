"""Aggregation: accepted gradients become the next policy version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import safetensors
import safetensors.numpy
import torch

from shoal.models.policy import Policy
from shoal.protocol.errors import InvalidRequest, InvariantBroken
from shoal.protocol.learning import OptimizerSpec
from shoal.rl.batch import GradientPayload, GradientStats
from shoal.rl.schedule import scheduled_rate

_STEP = "step"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class UpdateStats:
    """What one update did; means are over the batch's completion tokens."""

    step: int
    learning_rate: float
    grad_norm: float
    loss: float
    entropy: float
    clip_fraction_low: float
    clip_fraction_high: float
    approx_kl: float


class AdapterOptimizer:
    """AdamW over a policy's adapter, with linear warm-up, linear decay and norm clipping.

    Source: AdamW, arXiv 1711.05101, through ``torch.optim.AdamW``.
    """

    def __init__(self, policy: Policy, spec: OptimizerSpec, max_steps: int) -> None:
        self.step = 0
        self._spec = spec
        self._max_steps = max_steps
        self._parameters = policy.trainable()
        self._adamw = torch.optim.AdamW(
            list(self._parameters.values()),
            lr=spec.learning_rate,
            betas=(spec.beta1, spec.beta2),
            weight_decay=spec.weight_decay,
            foreach=False,
        )

    def apply(self, gradients: Sequence[GradientPayload], total_tokens: int) -> UpdateStats:
        """Adds the slices, divides once by the batch's tokens, and takes one step.

        ``total_tokens`` counts all completion tokens of the batch, those of groups that
        teach nothing included.  A batch in which no group teaches has no slices; the
        momentum of earlier ones still moves the weights.

        Raises:
            InvariantBroken: no tokens, or a payload that is not of this adapter.
        """
        if total_tokens < 1:
            raise InvariantBroken("An update was asked for over a batch without tokens.")
        self._set_gradients(gradients, total_tokens)
        norm = torch.nn.utils.clip_grad_norm_(
            self._parameters.values(), self._spec.max_grad_norm, error_if_nonfinite=True
        )
        learning_rate = scheduled_rate(self._spec, self.step, self._max_steps)
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        self.step += 1
        sums = sum((payload.stats for payload in gradients), GradientStats())
        # Rows without advantage are not differentiated, so these are means over those that are.
        seen = max(sums.num_tokens, 1.0)
        return UpdateStats(
            step=self.step,
            learning_rate=learning_rate,
            grad_norm=float(norm),
            loss=sums.loss_sum / total_tokens,
            entropy=sums.entropy_sum / seen,
            clip_fraction_low=sums.clipped_low / seen,
            clip_fraction_high=sums.clipped_high / seen,
            approx_kl=-sums.log_ratio_sum / seen,
        )

    def state_bytes(self) -> bytes:
        """The optimiser's moments and step count; with the adapter, enough to resume exactly."""
        arrays = {_STEP: np.array([self.step], dtype=np.int64)}
        for name, parameter in self._parameters.items():
            state = self._adamw.state.get(parameter, {})
            for moment in _MOMENTS:
                value = state.get(moment, torch.zeros_like(parameter))
                arrays[f"{moment}.{name}"] = value.detach().cpu().numpy()
        return safetensors.numpy.save(arrays)

    def load_state(self, data: bytes) -> None:
        """Continues from what `state_bytes` gave.

        Raises:
            InvalidRequest: the bytes are not the state of this adapter's optimiser.
        """
        try:
            arrays = safetensors.numpy.load(data)
            step = int(arrays[_STEP][0])
            moments = {
                (name, moment): torch.from_numpy(arrays[f"{moment}.{name}"].copy())
                for name in self._parameters
                for moment in _MOMENTS
            }
        except (safetensors.SafetensorError, KeyError, ValueError, IndexError):
            raise _foreign_state() from None
        if any(
            moments[name, moment].shape != parameter.shape
            for name, parameter in self._parameters.items()
            for moment in _MOMENTS
        ):
            raise _foreign_state()
        self.step = step
        self._adamw.state.clear()
        if step:
            for name, parameter in self._parameters.items():
                self._adamw.state[parameter] = {
                    "step": torch.tensor(float(step)),
                    **{m: moments[name, m].to(parameter.device) for m in _MOMENTS},
                }

    def _set_gradients(self, gradients: Sequence[GradientPayload], total_tokens: int) -> None:
        for name, parameter in self._parameters.items():
            # Double precision, so that how the batch was sliced does not show in the sum.
            total = np.zeros(parameter.shape, dtype=np.float64)
            for payload in gradients:
                array = payload.gradients.get(name)
                if array is None or array.shape != total.shape:
                    raise InvariantBroken(f"An accepted gradient has no array {name} that fits.")
                total += array
            mean = (total / total_tokens).astype(np.float32)
            parameter.grad = torch.from_numpy(mean).to(parameter.device)


def _foreign_state() -> InvalidRequest:
    return InvalidRequest(
        "The optimiser state is not that of this job's adapter; resume from another checkpoint.",
        code="bad_checkpoint",
    )
