"""A task in parts, and the parts' payloads as the one payload of the whole task.

Every draw is keyed by a prompt's slot and every loss is a sum over tokens, so neither tokens
nor gradients depend on how a task was cut.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import safetensors.numpy

from shoal.protocol.blob import BlobRef
from shoal.protocol.canonical import sha256_hex
from shoal.protocol.errors import PeerFault
from shoal.protocol.learning import CodecKind, CodecSpec
from shoal.protocol.task import EvaluateTask, GradientTask, RolloutTask
from shoal.rl import codec
from shoal.rl.batch import STATS_FIELDS, GradientPayload, GradientSlice, GradientStats
from shoal.rl.packing import pack_evenly

AnyTask = RolloutTask | GradientTask | EvaluateTask

_ANY_TOKEN = np.iinfo(np.int32).max
"""No vocabulary is larger; who computes the part knows its own and checks against it."""
_VALUES = "gradient.values"
"""What a payload of codec fp32 calls its one array."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one actor computes: a task like the whole one, over some of its units."""

    task: AnyTask
    batch_slice: bytes | None


def split_task(task: AnyTask, batch_slice: bytes | None, num_parts: int) -> list[Part]:
    """``task`` in at most ``num_parts`` parts, in the order in which payloads are joined.

    A gradient of several local steps is one part: each step needs the one before it.

    Raises:
        PeerFault: a gradient task's slice is missing or does not fit it.
    """
    if isinstance(task, GradientTask):
        if batch_slice is None:
            raise PeerFault("A gradient task came without its slice.", code="no_slice")
        if num_parts == 1 or task.num_groups == 1 or task.gradient.local_steps > 1:
            return [Part(task=task, batch_slice=batch_slice)]
        return _split_gradient(task, batch_slice, num_parts)
    count = min(num_parts, len(task.prompts))
    ends = [len(task.prompts) * number // count for number in range(count + 1)]
    return [
        Part(
            task=task.model_copy(
                update={"prompts": task.prompts[start:end], "slots": task.slots[start:end]}
            ),
            batch_slice=None,
        )
        for start, end in itertools.pairwise(ends)
    ]


def join_rows(payloads: Sequence[bytes]) -> bytes:
    """The payload of a whole rollout or evaluation, from those of its parts in order.

    Each of their arrays goes by row, prompt or token, so the whole's are theirs end to end.
    """
    parts = [safetensors.numpy.load(payload) for payload in payloads]
    return safetensors.numpy.save(
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    )


def add_gradients(
    task: GradientTask, payloads: Sequence[bytes], residual: bytes | None
) -> tuple[bytes, bytes | None]:
    """The payload of a whole gradient task, and the residual it leaves.

    The parts' gradients are added in double precision, in order, and only their sum is
    encoded as the task asks, so that a lossy codec loses no more than without parts.

    Raises:
        InvalidRequest: the sum is not finite.
        PeerFault: ``residual`` is none of this gradient.
    """
    parts = [safetensors.numpy.load(payload) for payload in payloads]
    total_n = np.zeros(parts[0][_VALUES].shape, dtype=np.float64)
    stats = GradientStats()
    for part in parts:
        total_n += part[_VALUES]
        stats += GradientStats(**dict(zip(STATS_FIELDS, part["stats"].tolist(), strict=True)))
    residual_n = None
    if residual is not None and task.gradient.codec.error_feedback:
        residual_n = codec.decode_residual(residual, len(total_n))
    with np.errstate(over="ignore"):  # an overflow is found, and named, by the codec
        vector_n = total_n.astype(np.float32)
    payload, after = GradientPayload.pack(
        {"": vector_n}, stats, task.gradient.codec, residual_n=residual_n
    )
    return payload.encode(), after


def _split_gradient(task: GradientTask, batch_slice: bytes, num_parts: int) -> list[Part]:
    rows = GradientSlice.decode(
        batch_slice, num_rows=task.num_rows, num_prompts=task.num_groups, vocab_size=_ANY_TOKEN
    )
    exact = task.gradient.model_copy(update={"codec": CodecSpec(kind=CodecKind.FP32)})
    sizes_p = np.array([len(prompt) for prompt in rows.prompts])
    np.add.at(sizes_p, rows.prompt_of_row, [len(row) for row in rows.token_ids])
    parts = []
    for groups in pack_evenly(sizes_p.tolist(), num_parts):
        few = _take_groups(rows, groups)
        data = few.encode()
        update = {
            "gradient": exact,
            "slice": BlobRef(sha256=sha256_hex(data), size_bytes=len(data)),
            "num_rows": few.num_rows,
            "num_groups": len(groups),
        }
        parts.append(Part(task=task.model_copy(update=update), batch_slice=data))
    return parts


def _take_groups(rows: GradientSlice, groups: Sequence[int]) -> GradientSlice:
    """The rows of these groups alone, in their order."""
    place_of = {group: place for place, group in enumerate(groups)}
    taken = [row for row, group in enumerate(rows.prompt_of_row.tolist()) if group in place_of]
    places = [place_of[group] for group in rows.prompt_of_row[taken].tolist()]
    return GradientSlice(
        prompts=tuple(rows.prompts[group] for group in groups),
        prompt_of_row=np.array(places, dtype=np.int32),
        token_ids=tuple(rows.token_ids[row] for row in taken),
        logprobs=tuple(rows.logprobs[row] for row in taken),
        advantages=rows.advantages[taken],
        truncated=rows.truncated[taken],
    )
