"""Runs tasks on a loaded policy; torch is imported here, in the compute thread, at first use."""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from shoal.protocol.canonical import digest_of, sha256_hex
from shoal.protocol.errors import InvariantBroken, PeerFault, Unavailable
from shoal.protocol.ids import Digest
from shoal.protocol.job import EnvSpec
from shoal.protocol.task import EvaluateTask, GradientTask, RolloutTask
from shoal.worker.config import Device, SamplingChoice
from shoal.worker.ports import AnyTask, TaskInput, TaskOutput

if TYPE_CHECKING:
    from shoal.models.engine import SamplingEngine
    from shoal.models.policy import Policy
    from shoal.models.vllm_engine import VllmEngine
    from shoal.rl.environments import Environment

_MAX_BASES: Final = 2
"""A second base stays loaded so that two jobs can alternate; more would cost their memory."""
_MAX_POLICIES: Final = 8
"""Adapters of as many shapes stay loaded over those bases; each costs its own size only."""
_MAX_ENVIRONMENTS: Final = 16


class PolicyEngine:
    """Computes rollouts, gradients and evaluations with `shoal.rl`.

    A base is in memory once, however many jobs train adapters over it.  A job that trains
    every weight has a copy of its own.

    Args:
        device: Where the model runs.
        num_threads: CPU threads it may use.
        sampling: What draws completions.
    """

    def __init__(
        self, device: Device, num_threads: int, sampling: SamplingChoice = SamplingChoice.AUTO
    ) -> None:
        self._wanted = device
        self._sampler = VllmSampler() if sampling is SamplingChoice.VLLM else None
        self._num_threads = num_threads
        self._device: str | None = None
        self._bases: OrderedDict[str, Any] = OrderedDict()
        self._policies: OrderedDict[tuple[str, str], tuple[Policy, str]] = OrderedDict()
        self._environments: OrderedDict[str, Environment] = OrderedDict()

    def prepare(self) -> None:
        """torch, transformers and PEFT are imported; a model is not loaded yet.

        Raises:
            InvalidRequest: vLLM is to sample, and is not there.
        """
        import shoal.rl.evaluation
        import shoal.rl.gradient  # noqa: F401  # named only to be loaded
        from shoal.models.libraries import load_libraries

        load_libraries(self._num_threads)
        if self._sampler is not None:
            from shoal.models.vllm_engine import require_vllm

            require_vllm()

    def run(self, task: AnyTask, inputs: TaskInput, on_progress: Callable[[], None]) -> TaskOutput:
        """The task's output, under the policy version the task names.

        Raises:
            PeerFault: the adapter or the slice does not fit the task.
            InvalidRequest: the base does not load, or there is no such environment.
            ShoalError: whatever ``on_progress`` raises.
        """
        started_s = time.monotonic()
        policy, policy_sha256 = self._load(task, inputs)
        on_progress()
        with self._engine_of(policy, task, inputs) as engine:
            payload, num_tokens, residual = self._compute(
                policy, task, inputs, lambda *_: on_progress()
            )
        return TaskOutput(
            payload=payload,
            residual=residual,
            policy_sha256=policy_sha256,
            num_tokens=num_tokens,
            compute_ms=int((time.monotonic() - started_s) * 1000),
            engine=engine.name,
            dtype=engine.dtype,
        )

    @contextlib.contextmanager
    def _engine_of(
        self, policy: Policy, task: AnyTask, inputs: TaskInput
    ) -> Iterator[SamplingEngine]:
        """What computes the task; while it lasts ``policy`` samples with it."""
        own = policy.engine
        if self._sampler is not None and not isinstance(task, GradientTask):
            policy.engine = self._sampler.engine_for(policy, inputs)
        try:
            yield policy.engine
        finally:
            policy.engine = own

    def _load(self, task: AnyTask, inputs: TaskInput) -> tuple[Policy, Digest]:
        """The policy with the task's adapter in it, and the digest of what was loaded."""
        adapter_sha256 = sha256_hex(inputs.adapter)
        loaded = digest_of([inputs.base_sha256, adapter_sha256])
        if loaded != task.policy.policy_sha256():
            raise PeerFault(
                f"The weights at hand hash to {loaded[:12]}… and policy version "
                f"{task.policy.version} is another; the task is not run.",
                evidence=loaded,
                code="wrong_policy",
            )
        key = (inputs.base_sha256, digest_of(task.lora and task.lora.to_json()))
        policy, held = self._policies.get(key) or (self._open(task, inputs), "")
        if held != adapter_sha256:
            # Forgotten first: a load that fails half-way must not leave a wrong name behind.
            self._policies.pop(key, None)
            _load_adapter(policy, inputs.adapter)
        self._policies[key] = (policy, adapter_sha256)
        self._policies.move_to_end(key)
        return policy, loaded

    def _open(self, task: AnyTask, inputs: TaskInput) -> Policy:
        from shoal.models.policy import Policy

        while len(self._policies) >= _MAX_POLICIES:
            self._policies.popitem(last=False)
        base = None if task.lora is None else self._base(inputs)
        # The seed is moot: the task's own adapter replaces the fresh one at once.
        return Policy.load(
            inputs.base_folder, task.lora, seed=0, device=self._resolved_device(), base=base
        )

    def _base(self, inputs: TaskInput) -> Any:
        """The base's weights, which every adapter over it shares."""
        from shoal.models.base import load_model

        if inputs.base_sha256 not in self._bases:
            while len(self._bases) >= _MAX_BASES:
                dropped, _ = self._bases.popitem(last=False)
                for key in [key for key in self._policies if key[0] == dropped]:
                    del self._policies[key]
            base = load_model(inputs.base_folder)
            self._bases[inputs.base_sha256] = base.to(self._resolved_device())
        self._bases.move_to_end(inputs.base_sha256)
        return self._bases[inputs.base_sha256]

    def _compute(
        self, policy: Policy, task: AnyTask, inputs: TaskInput, on_progress: Callable[[int], None]
    ) -> tuple[bytes, int, bytes | None]:
        """The payload, how many completion tokens are in the work, and the residual it left."""
        match task:
            case RolloutTask():
                from shoal.rl.rollout import run_rollout

                environments = self._environments_of(task.environments)
                payload = run_rollout(policy, task, environments, on_progress)
                return payload, _count_tokens(payload), None
            case EvaluateTask():
                from shoal.rl.evaluation import run_evaluate

                environments = self._environments_of(task.environments)
                payload = run_evaluate(policy, task, environments, on_progress)
                return payload, _count_tokens(payload), None
            case GradientTask():
                from shoal.rl.gradient import run_gradient

                if inputs.batch_slice is None:
                    raise PeerFault("A gradient task came without its slice.", code="no_slice")
                answer = run_gradient(
                    policy, task, inputs.batch_slice, on_progress, residual=inputs.residual
                )
                return answer.payload, _count_tokens(inputs.batch_slice), answer.residual

    def _environments_of(self, specs: Sequence[EnvSpec]) -> list[Environment]:
        from shoal.rl.environments import load_environment

        found = []
        for spec in specs:
            key = digest_of([spec.id, spec.args])
            environment = self._environments.pop(key, None) or load_environment(spec)
            self._environments[key] = environment
            found.append(environment)
        while len(self._environments) > _MAX_ENVIRONMENTS:
            self._environments.popitem(last=False)
        return found

    def _resolved_device(self) -> str:
        if self._device is None:
            self._device = _best_device() if self._wanted is Device.AUTO else self._wanted.value
        return self._device


class VllmSampler:
    """The one vLLM engine of this process, of the base that came first."""

    def __init__(self) -> None:
        self._base_sha256 = ""
        self._engine: VllmEngine | None = None
        self._policy: Policy | None = None

    def engine_for(self, policy: Policy, inputs: TaskInput) -> VllmEngine:
        """The engine, which samples with what ``policy`` holds at each call.

        Raises:
            Unavailable: the engine is of another base or for smaller adapters, the job trains
                every weight, or vLLM does not start.  None of it is the job's fault.
        """
        if policy.lora is None:
            raise Unavailable(
                "vLLM samples with an adapter and this job trains every weight; a worker with "
                "engine = auto can do it.",
                code="vllm_needs_adapter",
            )
        if self._engine is None:
            self._engine = self._open(policy, policy.lora.r, inputs)
            self._base_sha256 = inputs.base_sha256
        elif inputs.base_sha256 != self._base_sha256 or policy.lora.r > self._engine.max_rank:
            raise Unavailable(
                f"vLLM holds base {self._base_sha256[:12]} and adapters up to rank "
                f"{self._engine.max_rank} until the worker is started again; the task is for "
                f"base {inputs.base_sha256[:12]} and rank {policy.lora.r}.",
                code="vllm_taken",
            )
        self._policy = policy
        return self._engine

    def _open(self, policy: Policy, rank: int, inputs: TaskInput) -> VllmEngine:
        from shoal.models.vllm_engine import VllmEngine

        return VllmEngine(
            inputs.base_folder,
            rank=rank,
            eos_ids=policy.eos_ids,
            adapter_sha256=lambda: self._current().adapter_sha256(),
            write_adapter=lambda folder: self._current().save_adapter(
                folder, str(inputs.base_folder), inputs.base_sha256
            ),
        )

    def _current(self) -> Policy:
        if self._policy is None:
            raise InvariantBroken("vLLM was asked to sample before it was given a policy.")
        return self._policy


def _load_adapter(policy: Policy, adapter: bytes) -> None:
    try:
        policy.load_adapter(adapter)
    except PeerFault as error:
        raise PeerFault(
            f"The task's adapter is for another base or of another shape: {error.message}",
            evidence=error.evidence,
            code="wrong_adapter",
        ) from error


def _best_device() -> str:
    import torch

    if torch.cuda.is_available():
        return Device.CUDA.value
    return Device.MPS.value if torch.backends.mps.is_available() else Device.CPU.value


def _count_tokens(data: bytes) -> int:
    """Completion tokens in a payload or slice of ours (array ``token_ids``)."""
    import safetensors.numpy

    return int(safetensors.numpy.load(data)["token_ids"].size)
