"""Providers a plan counts on, and how fast each kind of device is, measured or estimated.

Speeds a provider measured are taken as they are.  Otherwise a roofline bounds them: a
decoding step reads every weight once, so it is bound by memory until the batch is large; a
gradient is bound by arithmetic.
Source: Williams et al., *Roofline*, CACM 52(4), 2009.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field, model_validator

from shoal.protocol.ids import Name
from shoal.protocol.money import MicrosField
from shoal.protocol.record import Record
from shoal.rl.capacity.footprint import FP32_BYTES, GIB, USABLE_SHARE, BaseFormat, Setup, base_bytes
from shoal.rl.capacity.volume import Expectation

BANDWIDTH_EFFICIENCY = 0.75
"""Of the nominal memory bandwidth.  Source: 75 tokens/s of Llama-3.1-8B in bf16 on an A100
with 1,555 GB/s are 0.73 of reading 15 GB for each token."""
SAMPLING_EFFICIENCY = 0.4
GRADIENT_EFFICIENCY = 0.4
"""Of the nominal arithmetic.  Source: model FLOPs utilisation of tuned training runs lies
between 0.35 and 0.5 (PaLM, arXiv 2204.02311 §4.1: 0.46)."""
_LAYER_OVERHEAD_S = 1e-4
"""A layer's kernel launches, which bound a step of a small model: some twenty of 5 µs."""


class ProviderClass(Record):
    """Machines that are alike.  Writer: the requester's pool file.

    ``rollout_tokens_per_s`` and ``gradient_tokens_per_s`` are completion tokens per second
    of one machine on the job's model, as measured; absent, they are estimated from
    arithmetic (dense, without sparsity) and memory bandwidth.
    """

    name: Name
    count: int = Field(ge=1, le=1_000_000)
    memory_gib: float = Field(gt=0, le=1e6)
    up_mbps: float = Field(gt=0, le=1e7)
    down_mbps: float = Field(gt=0, le=1e7)
    price_per_hour_micros: MicrosField
    rollout_tokens_per_s: float | None = Field(default=None, gt=0, le=1e12)
    gradient_tokens_per_s: float | None = Field(default=None, gt=0, le=1e12)
    fp32_tflops: float | None = Field(default=None, gt=0, le=1e9)
    bf16_tflops: float | None = Field(default=None, gt=0, le=1e9)
    bandwidth_gb_s: float | None = Field(default=None, gt=0, le=1e9)

    @model_validator(mode="after")
    def _speed_is_known(self) -> ProviderClass:
        measured = (self.rollout_tokens_per_s, self.gradient_tokens_per_s)
        nominal = (self.fp32_tflops, self.bandwidth_gb_s)
        if None in measured and None in nominal:
            raise ValueError(
                f"the speed of {self.name!r} is not known; give rollout_tokens_per_s and "
                "gradient_tokens_per_s, or fp32_tflops and bandwidth_gb_s"
            )
        return self

    @property
    def usable_bytes(self) -> int:
        """Memory a worker can count on."""
        return int(self.memory_gib * GIB * USABLE_SHARE)


class LearnerMachine(Record):
    """The orchestrator's own machine and line.

    ``update_s`` is what it takes for a batch beside the transfers: auctions, verification,
    the optimiser's step, publishing.
    """

    memory_gib: float = Field(default=64.0, gt=0, le=1e6)
    up_mbps: float = Field(default=1000.0, gt=0, le=1e7)
    down_mbps: float = Field(default=1000.0, gt=0, le=1e7)
    update_s: float = Field(default=0.5, ge=0, le=1e6)

    @property
    def usable_bytes(self) -> int:
        """Memory the orchestrator can count on."""
        return int(self.memory_gib * GIB * USABLE_SHARE)


class Pool(Record):
    """Who may work on a job.  Writer: the requester's pool file.  Reader: the planner."""

    learner: LearnerMachine = LearnerMachine()
    providers: tuple[ProviderClass, ...] = Field(min_length=1, max_length=1000)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Completion tokens per second of one machine; ``estimated`` where a roofline gave them."""

    rollout: float
    gradient: float
    estimated: bool


def speed_of(provider: ProviderClass, setup: Setup, expected: Expectation) -> Speed:
    """How fast one machine of the class does the job's tasks."""
    rollout, gradient = provider.rollout_tokens_per_s, provider.gradient_tokens_per_s
    estimated = rollout is None or gradient is None
    if rollout is None:
        rollout = _sampling_speed(provider, setup, expected)
    if gradient is None:
        gradient = _gradient_speed(provider, setup, expected)
    return Speed(rollout=rollout, gradient=gradient, estimated=estimated)


def _flops(provider: ProviderClass, base: BaseFormat) -> float:
    if base is BaseFormat.FP32 or provider.bf16_tflops is None:
        return (provider.fp32_tflops or 0.0) * 1e12
    return provider.bf16_tflops * 1e12


def _attention_flops(setup: Setup, context: float) -> float:
    """Scores and weighted values of one token: 2 · 2 · width · context in each layer."""
    return 4.0 * setup.shape.num_layers * setup.shape.attention_width * context


def _sampling_speed(provider: ProviderClass, setup: Setup, expected: Expectation) -> float:
    shape, rows = setup.shape, setup.sampled_rows
    context = expected.prompt_tokens + expected.completion_tokens / 2
    embedding = shape.vocab_size * shape.hidden_size
    weights = base_bytes(shape, setup.base)
    # The embedding is looked up, not read; of many experts only those drawn are read.
    read = weights * (1 - (0 if shape.tied_embeddings else embedding / shape.num_parameters))
    read = min(read, rows * shape.active_parameters * weights / shape.num_parameters)
    cache = rows * context * shape.cache_values_per_token * FP32_BYTES
    bandwidth = (provider.bandwidth_gb_s or 0.0) * 1e9 * BANDWIDTH_EFFICIENCY
    flops = _flops(provider, setup.base) * SAMPLING_EFFICIENCY
    token_flops = 2.0 * shape.active_parameters + _attention_flops(setup, context)
    step_s = max(
        (read + cache) / bandwidth, rows * token_flops / flops, shape.num_layers * _LAYER_OVERHEAD_S
    )
    prompts = rows / setup.spec.rollouts_per_example
    prefill_s = prompts * expected.prompt_tokens * 2.0 * shape.active_parameters / flops
    return rows * expected.completion_tokens / (step_s * expected.completion_tokens + prefill_s)


def _gradient_speed(provider: ProviderClass, setup: Setup, expected: Expectation) -> float:
    """Forward 2N, backward through frozen weights 2N, and 2N where they are trained.

    Source: Kaplan et al., arXiv 2001.08361 §2.1 (2N forward, 4N backward).
    """
    spec = setup.spec
    context = expected.prompt_tokens + expected.completion_tokens / 2
    passes = 2.0 if spec.lora is not None else 3.0
    passes += 1.0 if spec.loss.kl_beta > 0 else 0.0
    token_flops = passes * (2.0 * setup.shape.active_parameters + _attention_flops(setup, context))
    # A group's prompt is run once for all its completions.
    shared = expected.prompt_tokens / spec.rollouts_per_example
    token_flops *= (expected.completion_tokens + shared) / expected.completion_tokens
    return _flops(provider, setup.base) * GRADIENT_EFFICIENCY / token_flops
