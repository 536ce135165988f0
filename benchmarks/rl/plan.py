"""``python -m benchmarks.rl.plan [--steps 30]``: the planner against runs on this machine.

A few updates of a job give the speeds and lengths a provider would measure; the plan made
from them is compared with a longer job of another seed, evaluations included.  A model of
63 M parameters, made at random, is sampled from and differentiated in fresh processes, and
what they took beyond an idle one is compared with the planned memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shoal.client.jobfile import load_job_file
from shoal.models.policy import Policy
from shoal.models.sampling import SeededUniforms
from shoal.models.tiny import build_tokenizer
from shoal.protocol.job import JobSpec, SamplingSpec, TaskSizes
from shoal.protocol.learning import LoraSpec, LossSpec
from shoal.rl.base_models import fetch_base
from shoal.rl.batch import GradientSlice
from shoal.rl.capacity.architecture import shape_from_config
from shoal.rl.capacity.footprint import Role, Setup, footprint_of
from shoal.rl.capacity.known_models import find_shape
from shoal.rl.capacity.plan import plan_capacity
from shoal.rl.capacity.pool import LearnerMachine, Pool, ProviderClass
from shoal.rl.capacity.prompt_length import prompt_length
from shoal.rl.capacity.provisioning import Bound
from shoal.rl.capacity.volume import Expectation
from shoal.rl.differentiate import differentiate
from shoal.rl.local import LocalStep, train_locally

EXAMPLE = Path(__file__).parents[2] / "examples/addition.toml"
_WARM_UP = 2
"""First updates of a process are slower, and are left out of what is measured beforehand."""
_MMAP_THRESHOLD = str(128 << 10)
"""Larger blocks go back to the system when they are freed, so that resident memory is what is
in use; glibc otherwise raises the limit as it goes and keeps them."""
PROMPT, COMPLETION, GROUP, GROUPS = 32, 64, 4, 4
MODEL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "dtype": "float32",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    figure: str
    unit: str
    planned: float
    measured: float

    @property
    def off(self) -> float:
        """Difference relative to what was measured."""
        return self.planned / self.measured - 1


# --- time, tokens and bytes ---------------------------------------------------------------


def compare_job(folder: Path, steps: int) -> list[Row]:
    """A job of ``steps`` updates as planned from a short one, and as it came out."""
    spec = load_job_file(EXAMPLE, [f"max_steps={steps}", f"eval.interval={max(1, steps // 3)}"])
    short = spec.model_copy(update={"name": "short", "max_steps": _WARM_UP + max(3, steps // 6)})
    # Before and after, so that a machine that slows down meanwhile does not count.
    before = train_locally(short.model_copy(update={"seed": 1}), folder)
    run = train_locally(spec, folder)
    after = train_locally(short.model_copy(update={"seed": 2}), folder)
    sample = [*before.steps[_WARM_UP:], *after.steps[_WARM_UP:]]
    setup = Setup(
        shape=find_shape(spec.model), spec=spec, prompt_tokens=prompt_length(spec).longest
    )
    plan = plan_capacity(setup, _expectation(spec, sample), _this_machine(sample))
    assert plan.pool is not None
    assert plan.pool.timing is not None
    update_s = plan.pool.timing.bounds_s[Bound.WORK] + _mean(sample, "update_cpu_s")
    volume = plan.volume
    return [
        Row(
            figure="update", unit="CPU ms", planned=1e3 * update_s, measured=1e3 * run.cpu_s / steps
        ),
        Row(
            figure="rollout tokens of an update",
            unit="",
            planned=volume.rollout.tokens,
            measured=_mean(run.steps, "rollout_tokens"),
        ),
        Row(
            figure="gradient tokens of an update",
            unit="",
            planned=volume.gradient.tokens,
            measured=_mean(run.steps, "gradient_tokens"),
        ),
        Row(
            figure="policy version",
            unit="kB",
            planned=volume.version_bytes / 1e3,
            measured=len(run.adapter) / 1e3,
        ),
        Row(
            figure="gradient upload",
            unit="kB",
            planned=volume.gradient.up_bytes / 1e3,
            measured=_mean(run.steps, "upload_bytes") / 1e3,
        ),
    ]


def _mean(steps: Sequence[LocalStep], name: str) -> float:
    return float(sum(getattr(step.cost, name) for step in steps) / len(steps))


def _expectation(spec: JobSpec, sample: Sequence[LocalStep]) -> Expectation:
    return Expectation(
        prompt_tokens=prompt_length(spec).mean,
        completion_tokens=_mean(sample, "rollout_tokens") / spec.batch_size,
        teaching_share=_mean(sample, "gradient_tokens") / _mean(sample, "rollout_tokens"),
    )


def _this_machine(sample: Sequence[LocalStep]) -> Pool:
    """One machine with the measured speeds, whose lines cost nothing."""
    machine = ProviderClass(
        name="this machine",
        count=1,
        memory_gib=16.0,
        up_mbps=1e6,
        down_mbps=1e6,
        price_per_hour_micros=0,
        rollout_tokens_per_s=_mean(sample, "rollout_tokens") / _mean(sample, "rollout_cpu_s"),
        gradient_tokens_per_s=_mean(sample, "gradient_tokens") / _mean(sample, "gradient_cpu_s"),
    )
    return Pool(learner=LearnerMachine(update_s=0.0), providers=(machine,))


# --- memory -------------------------------------------------------------------------------


def compare_memory(root: Path) -> list[Row]:
    """What a worker's process takes beyond an idle one, for each kind of task."""
    folder = root / "random"
    _build(folder)
    spec = load_job_file(EXAMPLE).model_copy(
        update={
            "batch_size": GROUP * GROUPS,
            "rollouts_per_example": GROUP,
            "tasks": TaskSizes(rollout=GROUPS, gradient=GROUPS),
            "sampling": SamplingSpec(max_tokens=COMPLETION),
            "lora": LoraSpec(r=16),
        }
    )
    setup = Setup(shape=shape_from_config(MODEL, "random"), spec=spec, prompt_tokens=PROMPT)
    rows = []
    for role in (Role.ROLLOUT, Role.GRADIENT):
        footprint = footprint_of(role, setup)
        planned = footprint.total_bytes - footprint.parts["program"]
        idle, peak = _peak(folder, role)
        rows.append(
            Row(
                figure=f"memory of a {role} worker",
                unit="MB",
                planned=planned / 1e6,
                measured=(peak - idle) / 1e6,
            )
        )
    rows.append(
        Row(
            figure="the program itself",
            unit="MB",
            planned=footprint_of(Role.ROLLOUT, setup).parts["program"] / 1e6,
            measured=idle / 1e6,
        )
    )
    return rows


def _peak(folder: Path, role: Role) -> tuple[int, int]:
    """Resident bytes of a fresh process before it loads anything, and at its peak."""
    command = [sys.executable, "-m", "benchmarks.rl.plan", "--worker", role, str(folder)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": _MMAP_THRESHOLD}
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment)
    idle, peak = json.loads(done.stdout)
    return idle, peak


def _build(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = {key: value for key, value in MODEL.items() if key not in ("model_type", "dtype")}
    config: Any = LlamaConfig(**fields, eos_token_id=1, pad_token_id=0, bos_token_id=None)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


def run_worker(role: Role, folder: Path) -> None:
    """Does one task as a worker would, and prints resident bytes before and at the peak."""
    import peft  # noqa: F401  # part of the idle program
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401  # too

    torch.set_num_threads(1)
    idle = _resident("VmRSS")
    policy = Policy.load(folder, LoraSpec(r=16), seed=0)
    task: Callable[[Policy], None] = _sample if role is Role.ROLLOUT else _differentiate
    task(policy)
    print(json.dumps([idle, _resident("VmHWM")]))


def _sample(policy: Policy) -> None:
    prompts = [[3 + number] * PROMPT for number in range(GROUPS) for _ in range(GROUP)]
    uniforms = SeededUniforms(7, range(len(prompts)), COMPLETION)
    policy.engine.generate(prompts, max_tokens=COMPLETION, temperature=1.0, uniforms_bt=uniforms)


def _differentiate(policy: Policy) -> None:
    random = np.random.default_rng(0)
    count = GROUP * GROUPS
    rows = GradientSlice(
        prompts=tuple(np.full(PROMPT, 3 + n, dtype=np.int32) for n in range(GROUPS)),
        prompt_of_row=np.repeat(np.arange(GROUPS, dtype=np.int32), GROUP),
        token_ids=tuple(
            random.integers(3, 8192, size=COMPLETION).astype(np.int32) for _ in range(count)
        ),
        logprobs=tuple(np.full(COMPLETION, -9.0, dtype=np.float32) for _ in range(count)),
        advantages=np.tile(np.array([1.0, -1.0], dtype=np.float32), count // 2),
        truncated=np.zeros(count, dtype=np.bool_),
    )
    differentiate(policy, LossSpec(), 1.0, rows)


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; run this on Linux")


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rl.plan", description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--models", type=Path, help="Where built-in bases are kept.")
    parser.add_argument("--worker", nargs=2, metavar=("ROLE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        run_worker(Role(arguments.worker[0]), Path(arguments.worker[1]))
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="shoal-plan-") as name:
        root = Path(name)
        models = arguments.models or root / "models"
        folder = fetch_base("builtin:tiny-addition", models, allow_local=False)
        rows = compare_job(folder, arguments.steps) + compare_memory(root)
    print("| figure | planned | measured | off |\n| --- | ---: | ---: | ---: |")
    for row in rows:
        unit = f" {row.unit}" if row.unit else ""
        print(
            f"| {row.figure} | {row.planned:,.0f}{unit} | {row.measured:,.0f}{unit} "
            f"| {100 * row.off:+.1f} % |"
        )


if __name__ == "__main__":
    main()
