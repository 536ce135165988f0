"""How many tokens and bytes a job makes: for each update, each task and the whole job."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.protocol.market import TaskKind
from shoal.rl import codec
from shoal.rl.capacity.footprint import FP32_BYTES, Setup

ARRAY_HEADER_BYTES = 125
"""A safetensors header's entry for one adapter array: name, type, shape, place."""
_TOKEN_BYTES = 8
"""A sampled token on its way: its number and its log-probability."""
_ROW_BYTES = 9
_PROMPT_BYTES = 32
_SLICE_ROW_BYTES = 13
_PAYLOAD_BYTES = 512
"""Headers of a payload, and the figures that go with a gradient."""


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What nobody knows before the job runs: means over it.

    Args:
        prompt_tokens: Of a prompt.
        completion_tokens: Of a completion, the end token included.
        teaching_share: Groups whose rewards differ, and which are differentiated.
    """

    prompt_tokens: float
    completion_tokens: float
    teaching_share: float = 1.0


@dataclass(frozen=True, kw_only=True)
class KindVolume:
    """One kind of task: how many, and what each carries.

    Args:
        units: Groups, or held-out prompts, of one round (a batch, or an evaluation).
        tasks: Tasks of one round.
        rounds: Rounds of the whole job.
        tokens: Completion tokens of one round.
        context_tokens: Prompt tokens of one round; a group's prompt is run once.
        up_bytes: What the worker sends for one task.
        down_bytes: What it fetches for one task beside the policy version.
    """

    kind: TaskKind
    units: int
    tasks: int
    rounds: int
    tokens: float
    context_tokens: float
    up_bytes: int
    down_bytes: int

    @property
    def job_tokens(self) -> int:
        """Completion tokens of the whole job."""
        return round(self.tokens * self.rounds)


@dataclass(frozen=True, kw_only=True)
class Volume:
    """Tokens and bytes of a job."""

    version_bytes: int
    rollout: KindVolume
    gradient: KindVolume
    evaluate: KindVolume

    @property
    def kinds(self) -> tuple[KindVolume, ...]:
        """The three kinds of task."""
        return (self.rollout, self.gradient, self.evaluate)


def volume_of(setup: Setup, expected: Expectation) -> Volume:
    """What the job makes if things go as ``expected``."""
    return Volume(
        version_bytes=setup.trained_values * FP32_BYTES + setup.trained_arrays * ARRAY_HEADER_BYTES,
        rollout=_rollout(setup, expected),
        gradient=_gradient(setup, expected),
        evaluate=_evaluate(setup, expected),
    )


def num_evaluations(max_steps: int, interval: int) -> int:
    """How often held-out prompts are scored: version 0, each interval, the last version."""
    return len({0, max_steps, *range(interval, max_steps, interval)})


def _rollout(setup: Setup, expected: Expectation) -> KindVolume:
    spec = setup.spec
    tasks = -(-spec.groups_per_batch // spec.tasks.rollout)
    groups = spec.groups_per_batch / tasks
    row = expected.completion_tokens * _TOKEN_BYTES + _ROW_BYTES
    return KindVolume(
        kind=TaskKind.ROLLOUT,
        units=spec.groups_per_batch,
        tasks=tasks,
        rounds=spec.max_steps,
        tokens=spec.batch_size * expected.completion_tokens,
        context_tokens=spec.groups_per_batch * expected.prompt_tokens,
        up_bytes=round(groups * (spec.rollouts_per_example * row + _PROMPT_BYTES)) + _PAYLOAD_BYTES,
        down_bytes=_PAYLOAD_BYTES,
    )


def _gradient(setup: Setup, expected: Expectation) -> KindVolume:
    spec = setup.spec
    teaching = spec.groups_per_batch * expected.teaching_share
    tasks = max(1, -(-round(teaching) // spec.tasks.gradient))
    group = (
        expected.prompt_tokens * 4
        + 4
        + spec.rollouts_per_example * (expected.completion_tokens * _TOKEN_BYTES + _SLICE_ROW_BYTES)
    )
    return KindVolume(
        kind=TaskKind.GRADIENT,
        units=round(teaching),
        tasks=tasks,
        rounds=spec.max_steps,
        tokens=teaching * spec.rollouts_per_example * expected.completion_tokens,
        context_tokens=teaching * expected.prompt_tokens,
        up_bytes=codec.wire_bytes(spec.gradient.codec, setup.trained_values) + _PAYLOAD_BYTES,
        down_bytes=round(teaching / tasks * group) + _PAYLOAD_BYTES,
    )


def _evaluate(setup: Setup, expected: Expectation) -> KindVolume:
    spec = setup.spec.evaluation
    tasks = -(-spec.num_examples // setup.spec.tasks.evaluate)
    rows = spec.num_examples * spec.samples_per_example
    row = expected.completion_tokens * 4 + _ROW_BYTES
    return KindVolume(
        kind=TaskKind.EVALUATE,
        units=spec.num_examples,
        tasks=tasks,
        rounds=num_evaluations(setup.spec.max_steps, spec.interval),
        tokens=rows * expected.completion_tokens,
        context_tokens=spec.num_examples * expected.prompt_tokens,
        up_bytes=round((rows * row + spec.num_examples * _PROMPT_BYTES) / tasks) + _PAYLOAD_BYTES,
        down_bytes=_PAYLOAD_BYTES,
    )
