"""Several optimiser steps of a worker's own over one slice, and how far the weights moved.

Source: DiLoCo, arXiv 2311.08105, algorithm 1, lines 3-9.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from shoal.models.engine import OnProgress
from shoal.models.policy import Policy
from shoal.protocol.errors import InvalidRequest
from shoal.protocol.task import GradientTask
from shoal.rl.batch import GradientSlice, GradientStats
from shoal.rl.differentiate import SliceGradient, differentiate, row_logprobs, rows_that_teach
from shoal.rl.loss import counted_tokens, loss_divisor
from shoal.rl.packing import pack_evenly


def take_local_steps(
    policy: Policy,
    task: GradientTask,
    rows: GradientSlice,
    on_progress: OnProgress | None = None,
) -> SliceGradient:
    """Start less end of ``task.gradient.local_steps`` AdamW steps, each over a part of ``rows``.

    The optimiser is a fresh one, the learning rate the task's, and each part's loss is divided
    by its own divisor.  A slice of fewer prompts than steps takes one step for each prompt.
    The policy is as before on return.

    Raises:
        InvalidRequest: a gradient is not finite (code ``not_finite``).
        Unavailable: not even one row fits into memory (code ``out_of_memory``).
    """
    parameters = policy.trainable()
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    spec = task.optimizer
    adamw = torch.optim.AdamW(
        list(parameters.values()),
        lr=task.learning_rate,
        betas=(spec.beta1, spec.beta2),
        weight_decay=spec.weight_decay,
        foreach=False,
    )
    parts = _parts(task, rows)
    # The update starts where the task says; later parts are differentiated elsewhere.
    later = [number for part in parts[1:] for number in part]
    proximal = row_logprobs(policy, task.temperature, rows, _teaching(task, rows, later))
    stats, done = GradientStats(), 0

    def progress(tokens: int) -> None:
        if on_progress:
            on_progress(done + tokens)

    try:
        for place, part in enumerate(parts):
            found = differentiate(
                policy,
                task.loss,
                task.temperature,
                rows,
                progress,
                numbers=part,
                proximal=proximal if place else None,
            )
            _step(parameters, adamw, found, _divisor(task, rows, part), spec.max_grad_norm)
            stats += found.stats
            done += int(found.stats.num_tokens)
        moved = {
            name: (start[name] - parameter.detach()).cpu().numpy()
            for name, parameter in parameters.items()
        }
    finally:
        _restore(parameters, start)
    return SliceGradient(gradients=moved, stats=stats)


def _parts(task: GradientTask, rows: GradientSlice) -> list[list[int]]:
    """Row numbers by local step: whole prompts, of like token counts."""
    teaching_b = rows_that_teach(task.loss, rows.advantages, rows.truncated)
    sizes = [0] * len(rows.prompts)
    for number in np.flatnonzero(teaching_b).tolist():
        sizes[rows.prompt_of_row[number]] += len(rows.token_ids[number])
    teaching = [prompt for prompt, size in enumerate(sizes) if size]
    bins = pack_evenly([sizes[prompt] for prompt in teaching], task.gradient.local_steps)
    members = [{teaching[place] for place in members} for members in bins]
    of_row = rows.prompt_of_row.tolist()
    return [[n for n, prompt in enumerate(of_row) if prompt in part] for part in members]


def _teaching(task: GradientTask, rows: GradientSlice, numbers: Sequence[int]) -> list[int]:
    teaching_b = rows_that_teach(task.loss, rows.advantages, rows.truncated)
    return [number for number in numbers if teaching_b[number]]


def _divisor(task: GradientTask, rows: GradientSlice, numbers: Sequence[int]) -> float:
    lengths = [len(rows.token_ids[n]) for n in numbers]
    truncated = [bool(rows.truncated[n]) for n in numbers]
    return loss_divisor(
        task.loss,
        num_tokens=counted_tokens(task.loss, lengths, truncated),
        num_rows=len(numbers),
        max_tokens=task.max_tokens,
    )


def _step(
    parameters: dict[str, torch.nn.Parameter],
    adamw: torch.optim.AdamW,
    found: SliceGradient,
    divisor: float,
    max_grad_norm: float,
) -> None:
    for name, parameter in parameters.items():
        mean = torch.from_numpy(found.gradients[name] / np.float32(divisor))
        parameter.grad = mean.to(parameter.device)
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), max_grad_norm)
    if not torch.isfinite(norm):
        raise InvalidRequest(
            "The norm of a local step's gradient is not finite; lower the learning rate, or "
            "inspect the batch's rewards and log-probabilities.",
            code="not_finite",
        )
    adamw.step()
    adamw.zero_grad(set_to_none=True)


def _restore(parameters: dict[str, torch.nn.Parameter], start: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(start[name])
            parameter.grad = None
