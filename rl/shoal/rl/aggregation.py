"""Aggregation: accepted gradients become the next policy version."""

from __future__ import annotations

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
        self._is_outer = gradient.local_steps > 1
        self._optimizer: torch.optim.Optimizer
        if self._is_outer:
            self._state_names: tuple[str, ...] = _SGD_STATE if gradient.outer_momentum else ()
            self._optimizer = torch.optim.SGD(
                list(self._parameters.values()),
                lr=gradient.outer_learning_rate,
                momentum=gradient.outer_momentum,
                nesterov=gradient.outer_momentum > 0,
                foreach=False,
            )
        else:
            self._state_names = _ADAMW_STATE
            self._optimizer = torch.optim.AdamW(
                list(self._parameters.values()),
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
        norm = self._set_gradients(_mean(gradients, self._parameters, divisor, self._is_outer))
        if not self._is_outer:
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
        self._optimizer.step()
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
        for name, parameter in self._parameters.items():
            state = self._optimizer.state.get(parameter, {})
            for moment in self._state_names:
                value = state.get(moment)
                value = torch.zeros_like(parameter) if value is None else value
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
            for name, parameter in self._parameters.items():
                state = {
                    moment: torch.from_numpy(arrays[f"{moment}.{name}"].copy())
                    for moment in self._state_names
                }
                state = {moment: value.to(parameter.device) for moment, value in state.items()}
                if not self._is_outer:
                    state["step"] = torch.tensor(float(step))
                self._optimizer.state[parameter] = state

    def _set_gradients(self, means: Mapping[str, Floats]) -> float:
        """The parameters' gradients are the means, clipped; returns the norm before."""
        for name, parameter in self._parameters.items():
            parameter.grad = torch.from_numpy(means[name]).to(parameter.device)
        # Movements are not clipped: each of the steps they are made of was.
        limit = float("inf") if self._is_outer else self._spec.max_grad_norm
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters.values(), limit))
        if not np.isfinite(norm):
            self._optimizer.zero_grad(set_to_none=True)
            raise InvariantBroken("The mean gradient's norm is not finite; nothing moved.")
        return norm


def _mean(
    gradients: Sequence[GradientPayload],
    parameters: Mapping[str, torch.nn.Parameter],
    divisor: float,
    is_outer: bool,
) -> dict[str, Floats]:
    """The sum of gradients over the divisor; of movements, the mean weighted by tokens."""
    weights = [payload.stats.num_tokens if is_outer else 1.0 for payload in gradients]
    divisor = max(sum(weights), 1.0) if is_outer else divisor
    means = {}
    for name, parameter in parameters.items():
        # Double precision, so that how the batch was sliced does not show in the sum.
        total = np.zeros(parameter.shape, dtype=np.float64)
        for payload, weight in zip(gradients, weights, strict=True):
            array = payload.gradients.get(name)
            if array is None or array.shape != total.shape:
                raise InvariantBroken(f"An accepted gradient has no array {name} that fits.")
            total += weight * array.astype(np.float64)
        if not np.isfinite(total).all():
            raise InvariantBroken(f"An accepted gradient is not finite in {name}; nothing moved.")
        means[name] = (total / divisor).astype(np.float32)
    return means


def _foreign_state() -> InvalidRequest:
    return InvalidRequest(
        "The optimiser state is not that of this job's adapter; resume from another checkpoint.",
        code="bad_checkpoint",
    )
