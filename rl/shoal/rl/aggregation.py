"""Aggregation: accepted gradients become the next policy version.

All values of an adapter lie flat in one vector while it is updated: one operation on it costs
less than one on each of its arrays, and leaves every value the same bits.

Axes: ``n`` value, in the order of the policy's parameters.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import safetensors
import safetensors.numpy
import torch

from shoal.models.policy import Policy
from shoal.protocol.errors import InvalidRequest, InvariantBroken
from shoal.protocol.learning import GradientSpec, OptimizerSpec
from shoal.rl.batch import Floats, GradientPayload, GradientStats
from shoal.rl.schedule import scheduled_rate

_STEP = "step"
_ADAMW_STATE = ("exp_avg", "exp_avg_sq")
_SGD_STATE = ("momentum_buffer",)
_SUMMED_VALUES = 1 << 14
"""Values that are added at once in double precision: few enough for the processor's cache."""


@dataclass(frozen=True, kw_only=True)
class UpdateStats:
    """What one update did.

    ``grad_norm`` is that of the mean gradient before clipping, or with local steps of the mean
    movement.  ``metrics`` are means over the tokens that were differentiated, by TRL's names.
    """

    step: int
    learning_rate: float
    grad_norm: float
    loss: float
    metrics: Mapping[str, float]


class AdapterOptimizer:
    """Turns the gradients of a batch into one update of a policy's adapter.

    With one local step it is AdamW over the mean gradient, with linear warm-up, linear decay
    and norm clipping.  With more, the contributors took AdamW steps of their own: their
    movements, weighted by tokens, are averaged, and SGD with Nesterov momentum follows them.
    Contributors may come and go: nothing is kept here of who sent what.

    Source: AdamW, arXiv 1711.05101, through ``torch.optim.AdamW``; outer optimiser, DiLoCo,
    arXiv 2311.08105 §3, through ``torch.optim.SGD``.
    """

    def __init__(
        self,
        policy: Policy,
        spec: OptimizerSpec,
        max_steps: int,
        gradient: GradientSpec,
    ) -> None:
        self.step = 0
        self._spec = spec
        self._max_steps = max_steps
        self._parameters = policy.trainable()
        self._sizes = [parameter.numel() for parameter in self._parameters.values()]
        self._flat_n = torch.nn.Parameter(
            torch.cat([p.detach().reshape(-1) for p in self._parameters.values()])
        )
        parts = torch.split(self._flat_n.detach(), self._sizes)
        self._parts = [
            (parameter, part_n.view_as(parameter))
            for parameter, part_n in zip(self._parameters.values(), parts, strict=True)
        ]
        self._is_outer = gradient.local_steps > 1
        self._optimizer: torch.optim.Optimizer
        if self._is_outer:
            self._state_names: tuple[str, ...] = _SGD_STATE if gradient.outer_momentum else ()
            self._optimizer = torch.optim.SGD(
                [self._flat_n],
                lr=gradient.outer_learning_rate,
                momentum=gradient.outer_momentum,
                nesterov=gradient.outer_momentum > 0,
                foreach=False,
            )
        else:
            self._state_names = _ADAMW_STATE
            self._optimizer = torch.optim.AdamW(
                [self._flat_n],
                lr=spec.learning_rate,
                betas=(spec.beta1, spec.beta2),
                weight_decay=spec.weight_decay,
                foreach=False,
            )

    def apply(self, gradients: Sequence[GradientPayload], divisor: float) -> UpdateStats:
        """Adds the slices, divides once by ``divisor``, and takes one step.

        ``divisor`` is the whole batch's (`shoal.rl.gradient.batch_divisor`), groups that teach
        nothing included.  A batch in which no group teaches has no slices; the momentum of
        earlier ones still moves the weights.

        Raises:
            InvariantBroken: a divisor that is not positive, a payload that is not of this
                adapter, or a value that is not finite; the weights are as before.
        """
        if not divisor > 0:
            raise InvariantBroken("An update was asked for over a batch without tokens.")
        learning_rate = scheduled_rate(self._spec, self.step, self._max_steps)
        norm = self._set_gradient(self._mean_n(gradients, divisor))
        if not self._is_outer:
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
        with torch.no_grad():
            # The policy may hold other weights than the last update left.
            for parameter, part in self._parts:
                part.copy_(parameter)
            self._optimizer.step()
            for parameter, part in self._parts:
                parameter.copy_(part)
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        sums = sum((payload.stats for payload in gradients), GradientStats())
        return UpdateStats(
            step=self.step,
            learning_rate=learning_rate,
            grad_norm=norm,
            loss=sums.loss_sum / divisor,
            metrics=sums.metrics(),
        )

    def state_bytes(self) -> bytes:
        """The optimiser's moments and step count; with the adapter, enough to resume exactly."""
        arrays = {_STEP: np.array([self.step], dtype=np.int64)}
        state = self._optimizer.state.get(self._flat_n, {})
        for moment in self._state_names:
            value_n = state.get(moment)
            value_n = torch.zeros_like(self._flat_n) if value_n is None else value_n
            parts = np.split(value_n.detach().cpu().numpy(), np.cumsum(self._sizes)[:-1])
            for (name, parameter), part in zip(self._parameters.items(), parts, strict=True):
                arrays[f"{moment}.{name}"] = part.reshape(parameter.shape)
        return safetensors.numpy.save(arrays)

    def load_state(self, data: bytes) -> None:
        """Continues from what `state_bytes` gave.

        Raises:
            InvalidRequest: the bytes are not the state of this adapter's optimiser.
        """
        try:
            arrays = safetensors.numpy.load(data)
            step = int(arrays[_STEP][0])
        except (safetensors.SafetensorError, KeyError, ValueError, IndexError):
            raise _foreign_state() from None
        shapes = {
            f"{moment}.{name}": parameter.shape
            for name, parameter in self._parameters.items()
            for moment in self._state_names
        }
        if arrays.keys() != {_STEP, *shapes} or any(
            arrays[name].dtype != np.float32 or arrays[name].shape != shape
            for name, shape in shapes.items()
        ):
            raise _foreign_state()
        self.step = step
        self._optimizer.state.clear()
        if step:
            state = {
                moment: torch.from_numpy(
                    np.concatenate([arrays[f"{moment}.{n}"].reshape(-1) for n in self._parameters])
                ).to(self._flat_n.device)
                for moment in self._state_names
            }
            if not self._is_outer:
                state["step"] = torch.tensor(float(step))
            self._optimizer.state[self._flat_n] = state

    def _set_gradient(self, mean_n: Floats) -> float:
        """The gradient is the mean, clipped; returns the norm before."""
        self._flat_n.grad = torch.from_numpy(mean_n).to(self._flat_n.device)
        total_norm = torch.nn.utils.get_total_norm(torch.split(self._flat_n.grad, self._sizes))
        norm = float(total_norm)
        if not np.isfinite(norm):
            self._optimizer.zero_grad(set_to_none=True)
            raise InvariantBroken("The mean gradient's norm is not finite; nothing moved.")
        # Movements are not clipped: each of the steps they are made of was.
        if not self._is_outer:
            limit = self._spec.max_grad_norm
            torch.nn.utils.clip_grads_with_norm_([self._flat_n], limit, total_norm)
        return norm

    def _mean_n(self, gradients: Sequence[GradientPayload], divisor: float) -> Floats:
        """The sum of gradients over the divisor; of movements, the mean weighted by tokens."""
        weights = [payload.stats.num_tokens if self._is_outer else 1.0 for payload in gradients]
        divisor = max(sum(weights), 1.0) if self._is_outer else divisor
        mean_n = np.empty(sum(self._sizes), dtype=np.float32)
        ends = itertools.accumulate(self._sizes)
        for (name, parameter), size, end in zip(
            self._parameters.items(), self._sizes, ends, strict=True
        ):
            arrays = [_array_n(payload, name, parameter.shape) for payload in gradients]
            for first in range(0, size, _SUMMED_VALUES):
                part = slice(first, min(first + _SUMMED_VALUES, size))
                # Double precision, so that how the batch was sliced does not show in the sum.
                total_n = np.zeros(part.stop - part.start, dtype=np.float64)
                for array_n, weight in zip(arrays, weights, strict=True):
                    total_n += np.multiply(array_n[part], weight, dtype=np.float64)
                out_n = mean_n[end - size + part.start : end - size + part.stop]
                np.divide(total_n, divisor, out=out_n, casting="same_kind")
        # A value that is not finite leaves none in its sum.
        if not np.isfinite(mean_n).all():
            raise InvariantBroken(
                f"An accepted gradient is not finite in {_not_finite(gradients)}; nothing moved."
            )
        return mean_n


def _array_n(payload: GradientPayload, name: str, shape: torch.Size) -> Floats:
    """One array of an accepted gradient, flat."""
    array = payload.gradients.get(name)
    if array is None or array.shape != shape:
        raise InvariantBroken(f"An accepted gradient has no array {name} that fits.")
    return array.reshape(-1)


def _not_finite(gradients: Sequence[GradientPayload]) -> str:
    """The name of an array that is not finite, or of whose sum that is true."""
    return next(
        (
            name
            for payload in gradients
            for name, array in payload.gradients.items()
            if not np.isfinite(array).all()
        ),
        "their sum",
    )


def _foreign_state() -> InvalidRequest:
    return InvalidRequest(
        "The optimiser state is not that of this job's adapter; resume from another checkpoint.",
        code="bad_checkpoint",
    )
