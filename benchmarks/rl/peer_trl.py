"""TRL's side of the peer benchmark: a job on standard input, figures on output."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from benchmarks.rl.peer import SideFigures, StepFigures
from shoal.models.base import describe_base
from shoal.models.policy import Policy
from shoal.protocol.job import JobSpec
from shoal.rl.environments import Environment, Split, load_environment
from shoal.rl.local import blob_of_file
from shoal.rl.plan import Plan
from shoal.rl.rollout import decode_completions
from shoal.rl.schedule import scheduled_rate


class TimedTrainer(GRPOTrainer):
    """``GRPOTrainer`` with the job's schedule, and clocks around its parts."""

    def __init__(self, spec: JobSpec, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.spec = spec
        self.rollout_cpu_s: list[float] = []
        self.rollout_tokens: list[int] = []
        self.pass_cpu_s: list[float] = []

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The job's own learning rates."""
        rate, steps = self.spec.optimizer.learning_rate, self.spec.max_steps

        def factor(step: int) -> float:
            return scheduled_rate(self.spec.optimizer, step, steps) / rate

        stepped: Any = optimizer or self.optimizer
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(stepped, factor)
        return self.lr_scheduler

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        started_s = time.process_time()
        output = super()._generate_and_score_completions(inputs)
        self.rollout_cpu_s.append(time.process_time() - started_s)
        self.rollout_tokens.append(int(output["completion_mask"].sum()))
        return output

    def training_step(self, *arguments: Any, **named: Any) -> Any:
        """One forward and backward pass, with the generation before it."""
        started_s = time.process_time()
        output = super().training_step(*arguments, **named)
        self.pass_cpu_s.append(time.process_time() - started_s)
        return output


class StepClock(TrainerCallback):
    """Clocks each update, and keeps the adapter at every evaluation."""

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self.cpu_s: list[float] = []
        self.wall_s: list[float] = []
        self.adapters: dict[int, bytes] = {}
        self._started_s = (0.0, 0.0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        """The update starts."""
        self._started_s = (time.process_time(), time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        """The update is done; evaluation comes after the run."""
        self.cpu_s.append(time.process_time() - self._started_s[0])
        self.wall_s.append(time.perf_counter() - self._started_s[1])
        if state.global_step % self.interval == 0 or state.global_step == state.max_steps:
            self.adapters[state.global_step] = adapter_bytes(named["model"])


def adapter_bytes(model: Any) -> bytes:
    """The trainable parameters, by the names of `Policy`."""
    return safetensors.numpy.save(
        {
            name.replace(".default", "", 1): parameter.detach().numpy().copy()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
    )


def make_trainer(
    spec: JobSpec, folder: Path, plan: Plan, environment: Environment, output_dir: str
) -> TimedTrainer:
    """A trainer with the job's prompts, in the job's order, and the job's settings."""
    indices = [ref.index for batch in range(spec.max_steps) for ref in plan.prompts(batch)]
    rows = {
        "prompt": [environment.prompt(Split.TRAIN, index) for index in indices],
        "index": indices,
    }

    def reward(completions: Sequence[str], index: Sequence[int], **named: Any) -> list[float]:
        pairs = zip(index, completions, strict=True)
        return [environment.score(Split.TRAIN, i, text) for i, text in pairs]

    assert spec.lora is not None
    return TimedTrainer(
        spec,
        model=AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
        processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
        reward_funcs=reward,
        train_dataset=Dataset.from_dict(rows),
        peft_config=LoraConfig(
            r=spec.lora.r,
            lora_alpha=spec.lora.alpha,
            target_modules=spec.lora.target_modules,
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        ),
        args=GRPOConfig(
            output_dir=output_dir,
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            gradient_checkpointing=False,
            shuffle_dataset=False,
            seed=spec.seed,
            max_steps=spec.max_steps,
            per_device_train_batch_size=spec.batch_size,
            gradient_accumulation_steps=1,
            num_generations=spec.rollouts_per_example,
            max_completion_length=spec.sampling.max_tokens,
            temperature=spec.sampling.temperature,
            loss_type=spec.loss.kind.value,
            epsilon=spec.loss.clip_low,
            epsilon_high=spec.loss.clip_high,
            beta=spec.loss.kl_beta,
            scale_rewards="group",
            learning_rate=spec.optimizer.learning_rate,
            optim="adamw_torch",
            adam_beta1=spec.optimizer.beta1,
            adam_beta2=spec.optimizer.beta2,
            weight_decay=spec.optimizer.weight_decay,
            max_grad_norm=spec.optimizer.max_grad_norm,
        ),
    )


def start_like(model: Any, policy: Policy) -> None:
    """``model`` holds the adapter that ``policy`` starts from."""
    arrays = policy.arrays()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.from_numpy(arrays[name.replace(".default", "", 1)]))


def accuracy_of(policy: Policy, environment: Environment, plan: Plan, max_tokens: int) -> float:
    """Share of the held-out prompts that greedy completions solve."""
    indices = [ref.index for ref in plan.held_out()]
    prompts = policy.encode_prompts([environment.prompt(Split.EVAL, i) for i in indices])
    drawn = policy.engine.generate(
        prompts, max_tokens=max_tokens, temperature=1.0, uniforms_bt=None
    )
    texts = decode_completions(policy, drawn.token_ids)
    scores = [environment.score(Split.EVAL, i, t) for i, t in zip(indices, texts, strict=True)]
    return float(np.mean(scores))


def step_figures(trainer: TimedTrainer, clock: StepClock) -> tuple[StepFigures, ...]:
    """Each update's figures; the pass contains the generation."""
    parts = zip(
        trainer.rollout_cpu_s,
        trainer.pass_cpu_s,
        clock.cpu_s,
        clock.wall_s,
        trainer.rollout_tokens,
        strict=True,
    )
    return tuple(
        StepFigures(
            rollout_cpu_s=rollout_cpu_s,
            gradient_cpu_s=pass_cpu_s - rollout_cpu_s,
            update_cpu_s=step_cpu_s - pass_cpu_s,
            wall_s=wall_s,
            rollout_tokens=tokens,
            gradient_tokens=tokens,
        )
        for rollout_cpu_s, pass_cpu_s, step_cpu_s, wall_s, tokens in parts
    )


def accuracies(policy: Policy, adapters: Mapping[int, bytes], measure: Any) -> dict[int, float]:
    """Accuracy by number of updates."""
    found = {}
    for version, data in adapters.items():
        policy.load_adapter(data)
        found[version] = measure(policy)
    return found


def main() -> None:
    """Trains the job from the base in the folder that ``argv`` names."""
    torch.set_num_threads(1)
    spec, folder = JobSpec.decode(sys.stdin.buffer.read()), Path(sys.argv[1])
    environment = load_environment(spec.environments[0])
    plan = Plan(
        job_id="0x" + spec.digest(),
        spec=spec,
        base=describe_base(spec.model, folder, blob_of_file),
        train_sizes=[environment.num_tasks(Split.TRAIN)],
        eval_sizes=[environment.num_tasks(Split.EVAL)],
    )
    policy = Policy.load(folder, spec.lora, seed=spec.seed)
    clock = StepClock(spec.evaluation.interval)
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = make_trainer(spec, folder, plan, environment, output_dir)
        start_like(trainer.model, policy)
        clock.adapters[0] = policy.adapter_bytes()
        trainer.add_callback(clock)
        trainer.train()
    accuracy = accuracies(
        policy,
        clock.adapters,
        lambda held: accuracy_of(held, environment, plan, spec.sampling.max_tokens),
    )
    print(SideFigures(steps=step_figures(trainer, clock), accuracy=accuracy).to_json())


if __name__ == "__main__":
    main()
