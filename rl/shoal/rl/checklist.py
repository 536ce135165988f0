"""The list of checks that a verdict rests on, kept in order, and what each looks at.

These need no model: what has to be recomputed with one is in `shoal.rl.verification`, which
also decides which checks a result has to pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from shoal.protocol.canonical import sha256_hex
from shoal.protocol.errors import PeerFault
from shoal.protocol.result import Check, CheckName, Result
from shoal.protocol.task import EvaluateTask, GradientTask, RolloutTask
from shoal.rl.batch import (
    EvaluatePayload,
    Floats,
    GradientPayload,
    RolloutPayload,
    prompt_sha256,
)
from shoal.rl.gradient_audit import Finding
from shoal.rl.rollout import Prompts

JUDGED_DTYPE = "float32"
"""Log-probabilities of other types differ from the recomputed ones by more than any tolerance
that still tells one policy version from the next."""

_Payload = TypeVar("_Payload", RolloutPayload, EvaluatePayload, GradientPayload)


class CheckFailedError(Exception):
    """Ends a verification at its first failed check."""


class Checklist:
    """Runs checks in order, keeping each outcome."""

    def __init__(self, done: Sequence[Check] = ()) -> None:
        self.done = list(done)

    def record(self, name: CheckName, passed: bool, detail: str) -> None:
        """Notes an outcome; a failed one ends the verification.

        Raises:
            CheckFailedError: ``passed`` is false.
        """
        self.done.append(Check(name=name, passed=passed, detail=detail[:500]))
        if not passed:
            raise CheckFailedError

    def common(
        self,
        task: RolloutTask | EvaluateTask | GradientTask,
        result: Result,
        data: bytes,
        num_units: int,
        decode: Callable[[], _Payload],
    ) -> _Payload:
        """The decoded payload of a result that fits its task and its own digests."""
        if (result.task_id, result.kind) != (task.task_id, task.kind):
            self.record(CheckName.FORM, False, "the result is of another task")
        if result.num_units != num_units:
            detail = f"{result.num_units} units are claimed where the task has {num_units}"
            self.record(CheckName.FORM, False, detail)
        if result.dtype != JUDGED_DTYPE:
            detail = f"dtype {result.dtype} cannot be judged; compute in {JUDGED_DTYPE}"
            self.record(CheckName.FORM, False, detail)
        try:
            payload = decode()
        except PeerFault as fault:
            self.record(CheckName.FORM, False, fault.message)
            raise
        self.record(CheckName.FORM, True, f"{num_units} units in {len(data)} bytes")
        sent = (sha256_hex(data), len(data), result.task_sha256)
        named = (result.payload.sha256, result.payload.size_bytes, task.digest())
        self.record(
            CheckName.DIGEST,
            sent == named,
            f"payload {sent[0][:12]}, named {named[0][:12]}; "
            f"task {named[2][:12]}, named {sent[2][:12]}",
        )
        committed = task.policy.policy_sha256()
        self.record(
            CheckName.POLICY,
            result.policy_sha256 == committed,
            f"computed under {result.policy_sha256[:12]}, due under {committed[:12]} "
            f"(version {task.policy.version})",
        )
        return payload

    def num_tokens(self, result: Result, num_tokens: int) -> None:
        """As many tokens as claimed were sent."""
        if result.num_tokens != num_tokens:
            detail = f"{result.num_tokens} tokens are claimed where {num_tokens} were sent"
            self.record(CheckName.FORM, False, detail)

    def prompts(self, payload: RolloutPayload | EvaluatePayload, prompts: Prompts) -> None:
        """The payload answers the ``prompts`` that were asked, in their order."""
        due = [prompt_sha256(prompt) for prompt in prompts]
        pairs = zip(due, payload.prompts_sha256, strict=True)
        wrong = [number for number, (ours, theirs) in enumerate(pairs) if ours != theirs]
        self.record(
            CheckName.PROMPTS,
            not wrong,
            f"prompt {wrong[0]} is not the one asked" if wrong else f"all {len(due)} as asked",
        )

    def termination(
        self, payload: RolloutPayload | EvaluatePayload, eos_ids: frozenset[int], max_tokens: int
    ) -> None:
        """Each row ends at its first end token or at ``max_tokens``, and says which."""
        lengths_b = np.array([len(row) for row in payload.token_ids])
        last_b = np.cumsum(lengths_b) - 1
        is_end_n = np.isin(np.concatenate(payload.token_ids), list(eos_ids))
        ended_b = is_end_n[last_b]
        goes_on_b = np.add.reduceat(is_end_n, last_b - lengths_b + 1, dtype=np.int64) > ended_b
        lies_b = ended_b != payload.finished
        stops_b = ~ended_b & (lengths_b != max_tokens)
        for number in np.flatnonzero(goes_on_b | lies_b | stops_b):
            fault = f"stops after {lengths_b[number]} of {max_tokens} tokens without an end token"
            if goes_on_b[number]:
                fault = "goes on after an end token"
            elif lies_b[number]:
                fault = "says the contrary of its last token about having finished"
            self.record(CheckName.TERMINATION, False, f"row {number} {fault}")
        detail = f"all {len(payload.token_ids)} rows end by themselves or at {max_tokens} tokens"
        self.record(CheckName.TERMINATION, True, detail)

    def rewards(self, payload: RolloutPayload | EvaluatePayload, rewards: Floats) -> None:
        """How far the claimed rewards are from ours; passes whatever was claimed."""
        differing = int((np.abs(payload.rewards - rewards) > 1e-6).sum())
        detail = f"mean {float(rewards.mean()):.4f} recomputed"
        if differing:
            detail += f"; {differing} of {len(rewards)} claims differ and are ignored"
        self.record(CheckName.REWARDS, True, detail)

    def gradient(self, finding: Finding) -> None:
        """What was found about a gradient."""
        self.record(CheckName.GRADIENT, finding.passed, finding.detail)
