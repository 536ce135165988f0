"""Gradient tasks: which rows of a batch teach, how they are sliced, and what a slice gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from shoal.models.engine import OnProgress
from shoal.models.policy import Policy
from shoal.protocol.errors import InvalidRequest
from shoal.protocol.learning import LossSpec
from shoal.protocol.task import GradientTask
from shoal.rl import codec
from shoal.rl.advantage import group_advantages
from shoal.rl.batch import Floats, GradientPayload, GradientSlice, Ints, RolloutPayload
from shoal.rl.differentiate import SliceGradient, differentiate, rows_that_teach
from shoal.rl.local_steps import take_local_steps
from shoal.rl.loss import counted_tokens, loss_divisor
from shoal.rl.packing import pack_evenly
from shoal.rl.rollout import require_version


@dataclass(frozen=True, kw_only=True)
class Group:
    """The verified completions of one prompt, with their advantages.

    ``truncated`` marks rows cut off at the length limit, ``teaching`` those with a gradient.
    """

    prompt: Ints
    token_ids: tuple[Ints, ...]
    logprobs: tuple[Floats, ...]
    advantages: Floats
    truncated: NDArray[np.bool_]
    teaching: NDArray[np.bool_]

    @property
    def num_tokens(self) -> int:
        """Completion tokens of the group."""
        return sum(map(len, self.token_ids))

    @property
    def num_teaching_tokens(self) -> int:
        """Completion tokens of the rows with a gradient: what differentiating them costs."""
        return sum(map(len, compress(self.token_ids, self.teaching.tolist())))

    @property
    def teaches(self) -> bool:
        """Whether any row has a gradient."""
        return any(self.teaching.tolist())


@dataclass(frozen=True, kw_only=True)
class GradientOutput:
    """An encoded `GradientPayload`, and the residual it leaves with error feedback."""

    payload: bytes
    residual: bytes | None


def make_groups(
    payload: RolloutPayload,
    prompts: Sequence[Sequence[int]],
    rewards: Floats,
    group_size: int,
    loss: LossSpec,
) -> list[Group]:
    """The groups of a verified payload; ``rewards`` are the verifier's, not the claimed."""
    advantages = group_advantages(rewards, group_size, loss.advantage_scale)
    truncated = ~payload.finished
    teaching = rows_that_teach(loss, advantages, truncated)
    groups = []
    for number, prompt in enumerate(prompts):
        rows = slice(number * group_size, (number + 1) * group_size)
        groups.append(
            Group(
                prompt=np.asarray(prompt, dtype=np.int32),
                token_ids=payload.token_ids[rows],
                logprobs=payload.logprobs[rows],
                advantages=advantages[rows],
                truncated=truncated[rows],
                teaching=teaching[rows],
            )
        )
    return groups


def slice_groups(groups: Sequence[Group], num_slices: int) -> list[list[Group]]:
    """The groups that teach, in at most ``num_slices`` slices of like token counts.

    Groups without gradient are left out: nobody is paid to compute it.  The same groups give
    the same slices everywhere.
    """
    teaching = [group for group in groups if group.teaches]
    # What a group costs: its rows with a gradient, and its prompt once.
    costs = [group.num_teaching_tokens + len(group.prompt) for group in teaching]
    return [[teaching[n] for n in members] for members in pack_evenly(costs, num_slices)]


def batch_divisor(groups: Sequence[Group], loss: LossSpec, max_tokens: int) -> float:
    """What the summed gradient of a batch is divided by; ``groups`` are all of its groups."""
    return loss_divisor(
        loss,
        num_tokens=sum(
            counted_tokens(loss, [len(row) for row in g.token_ids], g.truncated.tolist())
            for g in groups
        ),
        num_rows=sum(len(group.token_ids) for group in groups),
        max_tokens=max_tokens,
    )


def encode_slice(groups: Sequence[Group]) -> GradientSlice:
    """``groups`` as the rows of a gradient task."""
    sizes = [len(group.token_ids) for group in groups]
    return GradientSlice(
        prompts=tuple(group.prompt for group in groups),
        prompt_of_row=np.repeat(np.arange(len(groups), dtype=np.int32), sizes),
        token_ids=tuple(row for group in groups for row in group.token_ids),
        logprobs=tuple(row for group in groups for row in group.logprobs),
        advantages=np.concatenate([group.advantages for group in groups]),
        truncated=np.concatenate([group.truncated for group in groups]),
    )


def decode_slice(policy: Policy, task: GradientTask, slice_bytes: bytes) -> GradientSlice:
    """The rows of ``task``.

    Raises:
        PeerFault: the slice's bytes do not fit the task.
    """
    return GradientSlice.decode(
        slice_bytes,
        num_rows=task.num_rows,
        num_prompts=task.num_groups,
        vocab_size=policy.vocab_size,
    )


def run_gradient(
    policy: Policy,
    task: GradientTask,
    slice_bytes: bytes,
    on_progress: OnProgress | None = None,
    *,
    residual: bytes | None = None,
) -> GradientOutput:
    """The answer to ``task``: the gradient of the loss sum, or how far local steps moved.

    ``residual`` is what an earlier encoding of the same job left out, for error feedback;
    absent, there is nothing to feed back.

    Raises:
        InvalidRequest: ``policy`` does not hold the task's adapter, the loss is not the one
            whose digest the task carries, or the gradient is not finite (``not_finite``).
        PeerFault: the slice's bytes or the residual do not fit the task.
        Unavailable: not even one row fits into memory (code ``out_of_memory``).
    """
    require_version(policy, task.policy)
    _require_pinned_loss(task)
    rows = decode_slice(policy, task, slice_bytes)
    residual_n = None
    if residual is not None and task.gradient.codec.error_feedback:
        residual_n = codec.decode_residual(residual, codec.num_values(policy.shapes()))
    return pack_gradient(slice_gradient(policy, task, rows, on_progress), task, residual_n)


def slice_gradient(
    policy: Policy,
    task: GradientTask,
    rows: GradientSlice,
    on_progress: OnProgress | None = None,
) -> SliceGradient:
    """What ``task`` asks of ``rows``, not yet encoded.

    With one local step the gradients of disjoint rows add up to that of all of them, so a
    site may share out the rows and encode the sum.

    Raises:
        InvalidRequest: the gradient is not finite (code ``not_finite``).
        Unavailable: not even one row fits into memory (code ``out_of_memory``).
    """
    if task.gradient.local_steps > 1:
        return take_local_steps(policy, task, rows, on_progress)
    return differentiate(policy, task.loss, task.temperature, rows, on_progress)


def pack_gradient(
    found: SliceGradient, task: GradientTask, residual_n: codec.Vector | None = None
) -> GradientOutput:
    """``found`` in the task's codec, with an earlier residual in it.

    Raises:
        InvalidRequest: the gradient is not finite (code ``not_finite``).
    """
    payload, after = GradientPayload.pack(
        found.gradients, found.stats, task.gradient.codec, residual_n
    )
    return GradientOutput(payload=payload.encode(), residual=after)


def _require_pinned_loss(task: GradientTask) -> None:
    if task.loss.digest() != task.loss_sha256:
        raise InvalidRequest(
            f"The loss of task {task.task_id} is not the one its digest pins; refuse the task.",
            code="wrong_loss",
        )
