"""Which prompts a batch and an evaluation hold, and the seed of each task's draws.

Everything is derived by hashing public values, so a provider can neither choose easy
prompts nor be given hard ones, and anyone can re-derive what had to be asked.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
import struct
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

from shoal.protocol.errors import InvalidRequest
from shoal.protocol.job import EnvSpec
from shoal.protocol.task import PromptRef

_WORD = 1 << 64


def draw_prompts(
    job_id: str,
    batch: int,
    num_slots: int,
    environments: Sequence[EnvSpec],
    sizes: Sequence[int],
) -> tuple[PromptRef, ...]:
    """The prompts of training batch ``batch``, one for each slot.

    Args:
        job_id: The job's 32 bytes, as ``0x`` and 64 hex digits.
        batch: Which batch of the job, from 0.
        num_slots: How many prompts to draw.
        environments: The job's environments, whose weights share out the prompts.
        sizes: The number of training prompts of each environment.
    """
    bounds = _bounds(environments)
    return tuple(_draw_prompt(job_id, batch, slot, bounds, sizes) for slot in range(num_slots))


def eval_prompts(
    job_id: str,
    environments: Sequence[EnvSpec],
    sizes: Sequence[int],
    num_examples: int,
) -> tuple[PromptRef, ...]:
    """The job's held-out prompts: the same at every evaluation, none twice.

    The examples are shared out over the environments by weight; an environment with fewer
    held-out prompts than its share gives all it has and the others make up for it.

    Args:
        job_id: The job's 32 bytes, as ``0x`` and 64 hex digits.
        environments: The job's environments.
        sizes: The number of held-out prompts of each environment.
        num_examples: How many prompts are wanted.

    Raises:
        InvalidRequest: the environments have fewer held-out prompts than that.
    """
    if num_examples > sum(sizes):
        raise InvalidRequest(
            f"The evaluation wants {num_examples} held-out prompts and the environments have "
            f"{sum(sizes)}; lower eval.num_examples.",
            code="too_few_prompts",
        )
    counts = _share_out(num_examples, [Fraction(env.weight) for env in environments], sizes)
    return tuple(
        PromptRef(environment=number, index=index)
        for number, (count, size) in enumerate(zip(counts, sizes, strict=True))
        for index in _choose(job_id, number, count, size)
    )


def batch_seed(job_id: str, batch: int) -> int:
    """The seed of every random draw of ``batch``; below 2⁵³."""
    return _hash("seed", job_id, batch, 0)[0] >> 11


def eval_seed(job_id: str) -> int:
    """The seed of every random draw of the job's evaluations; below 2⁵³."""
    return _hash("eval seed", job_id, 0, 0)[0] >> 11


def _bounds(environments: Sequence[EnvSpec]) -> list[int]:
    """Where the share of each environment ends, of the numbers below 2⁶⁴.

    Weights are added as exact fractions, so every machine agrees.
    """
    weights = [Fraction(env.weight) for env in environments]
    total = sum(weights)
    return [math.ceil(_WORD * part / total) for part in itertools.accumulate(weights)]


def _draw_prompt(
    job_id: str, batch: int, slot: int, bounds: Sequence[int], sizes: Sequence[int]
) -> PromptRef:
    which, low, high, _ = _hash("prompt", job_id, batch, slot)
    number = bisect.bisect_right(bounds, which)
    # 128 bits against at most 2^53 indices: the bias of the remainder is below 2^-74.
    return PromptRef(environment=number, index=(high * _WORD + low) % sizes[number])


def _share_out(total: int, weights: Sequence[Fraction], sizes: Sequence[int]) -> list[int]:
    """Shares of ``total`` by weight (largest remainder), none above its size."""
    counts = [0] * len(sizes)
    while (left := total - sum(counts)) > 0:
        open_ = [i for i, size in enumerate(sizes) if counts[i] < size]
        weight = sum(weights[i] for i in open_)
        exact = {i: left * weights[i] / weight for i in open_}
        extra = {i: int(share) for i, share in exact.items()}
        by_remainder = sorted(open_, key=lambda i: (extra[i] - exact[i], i))
        for i in by_remainder[: left - sum(extra.values())]:
            extra[i] += 1
        for i in open_:
            counts[i] = min(sizes[i], counts[i] + extra[i])
    return counts


def _choose(job_id: str, environment: int, count: int, size: int) -> list[int]:
    """``count`` different indices below ``size``.

    Source: Fisher–Yates shuffle, cut off after ``count`` steps and holding only the places
    that moved, so that a large split costs no memory.
    """
    moved: dict[int, int] = {}
    chosen: list[int] = []
    for step in range(count):
        low, high, _, _ = _hash("eval", job_id, environment, step)
        place = step + (high * _WORD + low) % (size - step)
        chosen.append(moved.get(place, place))
        moved[place] = moved.get(step, step)
    return chosen


def _hash(purpose: str, job_id: str, first: int, second: int) -> tuple[int, int, int, int]:
    """Four 64-bit words of SHA-256 over a domain name, the job and two numbers."""
    data = _domain(purpose, job_id) + struct.pack(">2Q", first, second)
    words: tuple[int, int, int, int] = struct.unpack(">4Q", hashlib.sha256(data).digest())
    return words


@lru_cache(maxsize=64)
def _domain(purpose: str, job_id: str) -> bytes:
    """What is hashed before the numbers."""
    return f"shoal/{purpose}/1\0".encode() + bytes.fromhex(job_id.removeprefix("0x"))
