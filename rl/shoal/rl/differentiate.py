"""The gradient of a loss sum over rows, in micro-batches that fit into memory.

Axes: ``b`` row (completion), ``t`` position in the completion, ``v`` vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from shoal.models.base import is_out_of_memory
from shoal.models.engine import OnProgress
from shoal.models.forward import row_mask
from shoal.models.policy import Policy
from shoal.protocol.errors import InvalidRequest, Unavailable
from shoal.protocol.learning import LossSpec
from shoal.rl.batch import Floats, GradientSlice, GradientStats
from shoal.rl.loss import TokenLogprobs, every_row_teaches, loss_sums

MAX_ROWS = 256
MAX_MICRO_BATCH_BYTES = 2 << 30
"""What a micro-batch may keep for its backward pass, by the estimate of `_row_bytes`."""

_FLOATS_PER_LOGIT = 4
"""Logits, their log-softmax, and the gradients of both."""


@dataclass(frozen=True, kw_only=True)
class SliceGradient:
    """The gradient of the loss sum over some rows, before it is encoded.

    Gradients of disjoint rows add up to that of all of them.
    """

    gradients: Mapping[str, Floats]
    stats: GradientStats

    def __add__(self, other: SliceGradient) -> SliceGradient:
        """The gradient over both sets of rows."""
        return SliceGradient(
            gradients={n: array + other.gradients[n] for n, array in self.gradients.items()},
            stats=self.stats + other.stats,
        )


@dataclass(kw_only=True)
class _Limit:
    """The most rows a micro-batch had without running out of memory."""

    rows: int = MAX_ROWS


@dataclass(kw_only=True)
class _Sums:
    """What the micro-batches have come to so far."""

    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    stats: GradientStats = field(default_factory=GradientStats)

    def add(self, names: Sequence[str], parts: Sequence[torch.Tensor | None]) -> None:
        for name, part in zip(names, parts, strict=True):
            if part is None:
                continue
            held = self.gradients.get(name)
            if held is None:
                self.gradients[name] = part
            else:
                held.add_(part)


def rows_that_teach(
    loss: LossSpec, advantages_b: Floats, truncated_b: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Which rows have a gradient: without KL those with an advantage, and none that is masked."""
    teaching_b = np.ones(len(advantages_b), dtype=np.bool_)
    if not every_row_teaches(loss):
        teaching_b = advantages_b != 0
    return teaching_b & ~truncated_b if loss.mask_truncated else teaching_b


def differentiate(
    policy: Policy,
    loss: LossSpec,
    temperature: float,
    rows: GradientSlice,
    on_progress: OnProgress | None = None,
    *,
    numbers: Sequence[int] | None = None,
    proximal: Mapping[int, torch.Tensor] | None = None,
) -> SliceGradient:
    """The gradient of the loss sum over ``rows``, or over those in ``numbers``.

    Rows without gradient are skipped.  ``proximal`` holds the log-probabilities of each row at
    the start of the update; absent, the update starts here.

    Raises:
        InvalidRequest: the gradient is not finite (code ``not_finite``).
        Unavailable: not even one row fits into memory (code ``out_of_memory``).
    """
    parameters = policy.trainable()
    sums, done = _Sums(), 0

    def accumulate(batch: Sequence[int]) -> None:
        nonlocal done
        value, stats = _loss(policy, loss, temperature, rows, batch, proximal)
        parts = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        # Added only when whole: a micro-batch that runs out of memory leaves nothing behind.
        sums.add(list(parameters), parts)
        sums.stats += stats
        done += sum(len(rows.token_ids[n]) for n in batch)
        if on_progress:
            on_progress(done)

    teaching = _teaching(loss, rows, numbers)
    _in_micro_batches(policy, rows, teaching, accumulate)
    gradients = {}
    for name, parameter in parameters.items():
        total = sums.gradients.get(name)
        total = torch.zeros_like(parameter) if total is None else total
        gradients[name] = total.detach().cpu().numpy().astype(np.float32, copy=True)
    _require_finite(gradients, sums.stats)
    return SliceGradient(gradients=gradients, stats=sums.stats)


def row_logprobs(
    policy: Policy, temperature: float, rows: GradientSlice, numbers: Sequence[int]
) -> dict[int, torch.Tensor]:
    """The log-probability of each token of these rows under the policy as it is, by row.

    Raises:
        Unavailable: not even one row fits into memory (code ``out_of_memory``).
    """
    found: dict[int, torch.Tensor] = {}

    def record(batch: Sequence[int]) -> None:
        with torch.no_grad():
            logprobs_bt, _ = _token_logprobs(policy, temperature, rows, batch)
        for place, number in enumerate(batch):
            found[number] = logprobs_bt[place, : len(rows.token_ids[number])].cpu()

    _in_micro_batches(policy, rows, numbers, record)
    return found


def _teaching(loss: LossSpec, rows: GradientSlice, numbers: Sequence[int] | None) -> list[int]:
    teaching_b = rows_that_teach(loss, rows.advantages, rows.truncated)
    chosen = range(rows.num_rows) if numbers is None else numbers
    return [number for number in chosen if teaching_b[number]]


def _loss(
    policy: Policy,
    loss: LossSpec,
    temperature: float,
    rows: GradientSlice,
    numbers: Sequence[int],
    proximal: Mapping[int, torch.Tensor] | None,
) -> tuple[torch.Tensor, GradientStats]:
    """The loss sum of one micro-batch, differentiable, and its figures."""
    completions = [rows.token_ids[n] for n in numbers]
    mask_bt = row_mask(completions, max(len(row) for row in completions)).to(policy.device)
    current_bt, entropy_bt = _token_logprobs(policy, temperature, rows, numbers)
    reference_bt = None
    if loss.kl_beta > 0:
        with torch.no_grad(), policy.reference():
            reference_bt, _ = _token_logprobs(policy, temperature, rows, numbers)
    proximal_bt = current_bt.detach()
    if proximal is not None:
        proximal_bt = _fill([proximal[n] for n in numbers], mask_bt)
    sums = loss_sums(
        loss,
        TokenLogprobs(
            current=current_bt,
            proximal=proximal_bt,
            behaviour=_fill([torch.from_numpy(rows.logprobs[n]) for n in numbers], mask_bt),
            reference=reference_bt,
        ),
        torch.from_numpy(rows.advantages[list(numbers)]).to(policy.device),
        mask_bt,
        torch.from_numpy(rows.truncated[list(numbers)]).to(policy.device),
    )
    entropy = float((entropy_bt * sums.mask_bt).sum())
    return sums.loss, replace(sums.stats, entropy_sum=entropy)


def _token_logprobs(
    policy: Policy, temperature: float, rows: GradientSlice, numbers: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's log-probability, differentiable, and the entropy at its position."""
    completions = [rows.token_ids[n] for n in numbers]
    prompts = [rows.prompts[rows.prompt_of_row[n]].tolist() for n in numbers]
    return policy.logprobs_bt(prompts, completions, temperature)


def _fill(values: Sequence[torch.Tensor], mask_bt: torch.Tensor) -> torch.Tensor:
    """Rows of values where the mask is true, zeros elsewhere."""
    filled_bt = torch.zeros(mask_bt.shape, device=mask_bt.device)
    filled_bt[mask_bt] = torch.cat(list(values)).to(mask_bt.device)
    return filled_bt


def _require_finite(gradients: Mapping[str, Floats], stats: GradientStats) -> None:
    bad = next((name for name, a in gradients.items() if not np.isfinite(a).all()), None)
    if bad is None and not np.isfinite(stats.loss_sum):
        bad = "the loss"
    if bad is not None:
        raise InvalidRequest(
            f"The gradient is not finite (first in {bad[:100]}); lower the learning rate, or "
            "inspect the batch's rewards and log-probabilities.",
            code="not_finite",
        )


# --- micro-batches ------------------------------------------------------------------------


def _in_micro_batches(
    policy: Policy,
    rows: GradientSlice,
    numbers: Sequence[int],
    work: Callable[[Sequence[int]], None],
) -> None:
    """Calls ``work`` on all rows, in fewer at once each time memory runs out.

    Raises:
        Unavailable: one row alone does not fit (code ``out_of_memory``).
    """
    limit = _Limit(rows=MAX_ROWS)
    pending = deque(_micro_batches(policy, rows, numbers))
    while pending:
        batch = pending.popleft()
        if len(batch) > limit.rows:
            pending.extendleft([batch[limit.rows :], batch[: limit.rows]])
        elif not _fits(batch, work):
            if len(batch) == 1:
                raise Unavailable(
                    f"One completion of {len(rows.token_ids[batch[0]])} tokens does not fit into "
                    "this machine's memory for a gradient; take no gradient tasks of this job.",
                    code="out_of_memory",
                )
            limit.rows = len(batch) // 2
            pending.appendleft(batch)


def _fits(batch: Sequence[int], work: Callable[[Sequence[int]], None]) -> bool:
    """False if ``work`` ran out of memory; what it held is free again on return."""
    try:
        work(batch)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    else:
        return True
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False


def _micro_batches(
    policy: Policy, rows: GradientSlice, numbers: Sequence[int]
) -> Iterator[list[int]]:
    """Row numbers in batches under the memory cap; rows of one prompt stay together.

    Rows of like length come together, so that little is computed on padding.
    """
    prompt_width = [len(prompt) for prompt in rows.prompts]
    lengths = np.array([len(row) for row in rows.token_ids])
    widest = np.zeros(len(rows.prompts), dtype=np.int64)
    np.maximum.at(widest, rows.prompt_of_row, lengths)
    prompt_of = rows.prompt_of_row.tolist()
    order = sorted(
        numbers, key=lambda n: (widest[prompt_of[n]], prompt_width[prompt_of[n]], prompt_of[n])
    )
    batch: list[int] = []
    width = prefix = 0
    for number in order:
        wider = max(width, int(lengths[number]))
        longer = max(prefix, prompt_width[prompt_of[number]])
        needed = (len(batch) + 1) * _row_bytes(policy, longer, wider)
        if batch and (needed > MAX_MICRO_BATCH_BYTES or len(batch) == MAX_ROWS):
            yield batch
            batch, wider, longer = [], int(lengths[number]), prompt_width[prompt_of[number]]
        batch.append(number)
        width, prefix = wider, longer
    if batch:
        yield batch


def _row_bytes(policy: Policy, prompt_width: int, width: int) -> int:
    """What one row keeps for the backward pass, in fp32: activations, logits, attention.

    A layer keeps, per token, about eight vectors of the hidden width (norms, queries, keys,
    values, both block outputs) and four of the feed-forward width.  The prompt counts as if
    no other row shared it, so the estimate is on the safe side.
    """
    config = policy.model.config
    hidden = int(getattr(config, "hidden_size", 1024))
    inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    layers = int(getattr(config, "num_hidden_layers", 1))
    heads = int(getattr(config, "num_attention_heads", 1))
    tokens = prompt_width + width
    per_layer = tokens * (8 * hidden + 4 * inner) + heads * tokens * width
    return 4 * (layers * per_layer + _FLOATS_PER_LOGIT * width * policy.vocab_size)
