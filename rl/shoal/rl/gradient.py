"""Gradient tasks: which rows of a batch teach, how they are sliced, and the LoRA gradient.

Axes: ``b`` row (completion), ``t`` position in the completion, ``v`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shoal.models.engine import OnProgress
from shoal.models.forward import padded, row_mask
from shoal.models.policy import Policy
from shoal.protocol.errors import InvalidRequest
from shoal.protocol.learning import LossSpec
from shoal.protocol.task import GradientTask
from shoal.rl.advantage import group_advantages
from shoal.rl.batch import (
    Floats,
    GradientPayload,
    GradientSlice,
    GradientStats,
    Ints,
    RolloutPayload,
)
from shoal.rl.loss import loss_sums
from shoal.rl.rollout import require_version

MAX_ROWS = 256
MAX_LOGITS = 1 << 22
"""Logits differentiated at once: 16 MiB in fp32, a few times that with what autograd keeps."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """The verified completions of one prompt, with their advantages."""

    prompt: Ints
    token_ids: tuple[Ints, ...]
    logprobs: tuple[Floats, ...]
    advantages: Floats

    @property
    def num_tokens(self) -> int:
        """Completion tokens of the group."""
        return sum(len(row) for row in self.token_ids)

    @property
    def teaches(self) -> bool:
        """Whether any advantage differs from 0."""
        return bool(self.advantages.any())


def make_groups(
    payload: RolloutPayload,
    prompts: Sequence[Sequence[int]],
    rewards: Floats,
    group_size: int,
    loss: LossSpec,
) -> list[Group]:
    """The groups of a verified payload; ``rewards`` are the verifier's, not the claimed."""
    advantages = group_advantages(rewards, group_size, loss.advantage_scale)
    groups = []
    for number, prompt in enumerate(prompts):
        rows = slice(number * group_size, (number + 1) * group_size)
        groups.append(
            Group(
                prompt=np.asarray(prompt, dtype=np.int32),
                token_ids=payload.token_ids[rows],
                logprobs=payload.logprobs[rows],
                advantages=advantages[rows],
            )
        )
    return groups


def slice_groups(groups: Sequence[Group], num_slices: int) -> list[list[Group]]:
    """The groups that teach, dealt into at most ``num_slices`` slices of like token counts.

    Groups without spread have zero gradient and are left out: nobody is paid to compute it.
    """
    teaching = sorted((g for g in groups if g.teaches), key=lambda g: -g.num_tokens)
    slices: list[list[Group]] = [[] for _ in range(min(num_slices, len(teaching)))]
    for number, group in enumerate(teaching):
        lap, place = divmod(number, len(slices))
        slices[place if lap % 2 == 0 else -1 - place].append(group)
    return slices


def encode_slice(groups: Sequence[Group]) -> GradientSlice:
    """``groups`` as the rows of a gradient task."""
    sizes = [len(group.token_ids) for group in groups]
    return GradientSlice(
        prompts=tuple(group.prompt for group in groups),
        prompt_of_row=np.repeat(np.arange(len(groups), dtype=np.int32), sizes),
        token_ids=tuple(row for group in groups for row in group.token_ids),
        logprobs=tuple(row for group in groups for row in group.logprobs),
        advantages=np.concatenate([group.advantages for group in groups]),
    )


def run_gradient(
    policy: Policy,
    task: GradientTask,
    slice_bytes: bytes,
    on_progress: OnProgress | None = None,
) -> bytes:
    """The encoded `GradientPayload` of ``task``: the gradient of the loss sum.

    Raises:
        InvalidRequest: ``policy`` does not hold the task's adapter, or the loss is not the
            one whose digest the task carries.
        PeerFault: the slice's bytes do not fit the task.
    """
    require_version(policy, task.policy)
    if task.loss.digest() != task.loss_sha256:
        raise InvalidRequest(
            f"The loss of task {task.task_id} is not the one its digest pins; refuse the task.",
            code="wrong_loss",
        )
    rows = GradientSlice.decode(
        slice_bytes,
        num_rows=task.num_rows,
        num_prompts=task.num_groups,
        vocab_size=policy.vocab_size,
    )
    return differentiate(policy, task.loss, task.temperature, rows, on_progress).encode()


def differentiate(
    policy: Policy,
    loss: LossSpec,
    temperature: float,
    rows: GradientSlice,
    on_progress: OnProgress | None = None,
) -> GradientPayload:
    """The gradient of the loss sum over ``rows``, in micro-batches of like length.

    Rows whose advantage is 0 have zero gradient and are skipped.
    """
    parameters = policy.trainable()
    for parameter in parameters.values():
        parameter.grad = None
    stats = GradientStats()
    done = 0
    for numbers in _micro_batches(rows, policy.vocab_size):
        stats += _accumulate(policy, loss, temperature, rows, numbers)
        done += sum(len(rows.token_ids[n]) for n in numbers)
        if on_progress:
            on_progress(done)
    gradients = {}
    for name, parameter in parameters.items():
        grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        gradients[name] = grad.cpu().numpy().astype(np.float32, copy=True)
        parameter.grad = None
    return GradientPayload(gradients=gradients, stats=stats)


def _micro_batches(rows: GradientSlice, vocab_size: int) -> Iterator[list[int]]:
    """Row numbers in batches whose logits fit `MAX_LOGITS`; rows of one prompt stay together."""
    prompt_width = [len(prompt) for prompt in rows.prompts]
    completion_width = np.zeros(len(rows.prompts), dtype=np.int64)
    lengths = np.array([len(row) for row in rows.token_ids])
    np.maximum.at(completion_width, rows.prompt_of_row, lengths)
    order = sorted(
        np.flatnonzero(rows.advantages).tolist(),
        key=lambda n: (
            completion_width[rows.prompt_of_row[n]],
            prompt_width[rows.prompt_of_row[n]],
            rows.prompt_of_row[n],
        ),
    )
    batch: list[int] = []
    width = 0
    for number in order:
        wider = max(width, int(lengths[number]))
        too_many = (len(batch) + 1) * wider * vocab_size > MAX_LOGITS or len(batch) == MAX_ROWS
        if batch and too_many:
            yield batch
            batch, wider = [], int(lengths[number])
        batch.append(number)
        width = wider
    if batch:
        yield batch


def _accumulate(
    policy: Policy,
    loss: LossSpec,
    temperature: float,
    rows: GradientSlice,
    numbers: Sequence[int],
) -> GradientStats:
    """Adds one micro-batch's gradient to the parameters' ``grad``; returns its sums."""
    completions = [rows.token_ids[n] for n in numbers]
    prompts = [rows.prompts[rows.prompt_of_row[n]].tolist() for n in numbers]
    width = max(len(row) for row in completions)
    mask_bt = row_mask(completions, width)
    old_bt = torch.zeros(len(numbers), width)
    old_bt[mask_bt] = torch.from_numpy(np.concatenate([rows.logprobs[n] for n in numbers]))
    mask_bt = mask_bt.to(policy.device)
    advantages_b = torch.from_numpy(rows.advantages[list(numbers)]).to(policy.device)
    all_logprobs_btv = torch.log_softmax(
        policy.logits_btv(prompts, completions) / temperature, dim=-1
    )
    ids_bt = padded(completions, width).to(policy.device)
    logprobs_bt = all_logprobs_btv.gather(2, ids_bt.unsqueeze(2)).squeeze(2)
    sums = loss_sums(loss, logprobs_bt, old_bt.to(policy.device), advantages_b, mask_bt)
    # Only the adapter accumulates; the base is frozen.
    sums.loss.backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        entropy_bt = -(all_logprobs_btv.exp() * all_logprobs_btv).sum(dim=-1)
    return GradientStats(
        loss_sum=float(sums.loss.detach()),
        num_tokens=float(sums.num_tokens),
        clipped_low=float(sums.clipped_low),
        clipped_high=float(sums.clipped_high),
        entropy_sum=float((entropy_bt * mask_bt).sum()),
        log_ratio_sum=float(sums.log_ratio.detach()),
    )
