"""A worker that samples with vLLM: one engine, each task's own adapter, honest results."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import vllm_double
from learning_fixtures import TOLERANCE, Lab, stir, write_base
from site_story import assert_same_rows, evaluate_task, gradient_task, inputs_of, rollout_task

from shoal.models.policy import Policy
from shoal.protocol.errors import InvalidRequest, InvariantBroken, Unavailable
from shoal.protocol.learning import GradientSpec, LoraSpec
from shoal.protocol.task import EvaluateTask, RolloutTask
from shoal.rl.verification import RolloutVerification, verify_rollout
from shoal.worker.config import Device, SamplingChoice, load_config
from shoal.worker.engine import PolicyEngine
from shoal.worker.main import serve
from shoal.worker.ports import TaskInput

Task = TypeVar("Task", RolloutTask, EvaluateTask)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab.open(write_base(tmp_path_factory.mktemp("base")))


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> type[vllm_double.LLM]:
    return vllm_double.install(monkeypatch)


def engine_of(sampling: SamplingChoice) -> PolicyEngine:
    return PolicyEngine(Device.CPU, 1, sampling)


def ignore() -> None:
    pass


def small(task: Task) -> Task:
    """The first prompt of the task."""
    return task.model_copy(update={"prompts": task.prompts[:1], "slots": task.slots[:1]})


def test_both_engines_draw_the_same_and_say_which_they_were(
    lab: Lab, llm: type[vllm_double.LLM]
) -> None:
    ours, theirs = engine_of(SamplingChoice.VLLM), engine_of(SamplingChoice.LOOP)
    tasks = (small(rollout_task(lab)), small(evaluate_task(lab, 0.8)))
    for task in (*tasks, small(evaluate_task(lab, 0.0))):
        drawn, expected = (e.run(task, inputs_of(lab), ignore) for e in (ours, theirs))
        assert_same_rows(drawn.payload, expected.payload)
        assert (drawn.engine, drawn.dtype) == ("vllm", "float32")
        assert expected.engine == "shoal-llama"
    gradient, data = gradient_task(lab, GradientSpec())
    assert ours.run(gradient, inputs_of(lab, data), ignore).engine == "shoal-llama"
    (built,) = llm.built
    assert built.loaded == [1]


def test_the_result_names_the_dtype_of_its_engine_and_only_float32_is_judged(
    lab: Lab, llm: type[vllm_double.LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = small(rollout_task(lab))
    engine = engine_of(SamplingChoice.VLLM)
    engine.run(task, inputs_of(lab), ignore)
    assert engine._sampler is not None
    monkeypatch.setattr(engine._sampler._engine, "dtype", "bfloat16")
    output = engine.run(task, inputs_of(lab), ignore)
    assert output.dtype == "bfloat16"
    honest = lab.result(task, output.payload, output.num_tokens)

    def judged(dtype: str) -> RolloutVerification:
        return verify_rollout(
            lab.policy,
            task,
            honest.model_copy(update={"dtype": dtype}),
            output.payload,
            lab.environments,
            audit=True,
            tolerance=TOLERANCE,
        )

    assert judged("float32").accepted
    refused = judged(output.dtype)
    assert not refused.accepted
    assert refused.checks[-1].detail == "dtype bfloat16 cannot be judged; compute in float32"


def with_adapter(lab: Lab, lora: LoraSpec, seed: int) -> tuple[RolloutTask, TaskInput]:
    """A task under an adapter of its own."""
    policy = Policy.load(lab.folder, lora, seed=0)
    stir(policy, seed=seed)
    other = Lab(lab.folder, policy, lab.environments, lab.plan)
    task = small(rollout_task(other)).model_copy(update={"lora": lora})
    return task, inputs_of(other)


def test_a_new_adapter_is_what_the_next_task_is_sampled_with(
    lab: Lab, llm: type[vllm_double.LLM]
) -> None:
    assert lab.plan.spec.lora is not None
    first, second = (with_adapter(lab, lab.plan.spec.lora, seed) for seed in (1, 2))
    # Another shape, as another job over the same base may have.
    third = with_adapter(lab, LoraSpec(r=2, target_modules="q_proj|v_proj"), 3)
    ours, theirs = engine_of(SamplingChoice.VLLM), engine_of(SamplingChoice.LOOP)
    payloads = set()
    for task, inputs in (first, second, third, first):
        drawn, expected = (e.run(task, inputs, ignore).payload for e in (ours, theirs))
        assert_same_rows(drawn, expected)
        payloads.add(drawn)
    assert len(payloads) == 3
    (built,) = llm.built
    assert built.loaded == [1, 2, 3, 4]
    assert built.settings["max_lora_rank"] == 64


def test_what_the_engine_was_not_built_for_is_given_back_as_the_nodes_fault(
    lab: Lab, llm: type[vllm_double.LLM], tmp_path: Path
) -> None:
    engine = engine_of(SamplingChoice.VLLM)
    task = small(rollout_task(lab))
    engine.run(task, inputs_of(lab), ignore)
    with pytest.raises(Unavailable, match="rank 64 until the worker is started again") as caught:
        engine.run(*with_adapter(lab, LoraSpec(r=65), 1), ignore)
    assert caught.value.code == "vllm_taken"
    whole = Policy.load(lab.folder, None, seed=0)
    other = Lab(lab.folder, whole, lab.environments, lab.plan)
    every = small(rollout_task(other)).model_copy(update={"lora": None})
    with pytest.raises(Unavailable, match="engine = auto") as caught:
        engine.run(every, inputs_of(other), ignore)
    assert caught.value.code == "vllm_needs_adapter"
    assert engine.run(task, inputs_of(lab), ignore).engine == "vllm"


def test_progress_is_told_at_each_step_and_ends_a_task_that_is_dropped(
    lab: Lab, llm: type[vllm_double.LLM]
) -> None:
    engine, task = engine_of(SamplingChoice.VLLM), small(rollout_task(lab))
    steps: list[None] = []

    def dropped_at(last: int) -> Callable[[], None]:
        steps.clear()

        def step() -> None:
            steps.append(None)
            if len(steps) == last:
                raise Unavailable("The lease is gone.", code="lease_dropped")

        return step

    whole = engine.run(task, inputs_of(lab), dropped_at(-1))
    (built,) = llm.built
    drawn = built.steps
    assert drawn == whole.num_tokens
    assert len(steps) >= drawn
    # One step comes before sampling.
    with pytest.raises(Unavailable, match="The lease is gone"):
        engine.run(task, inputs_of(lab), dropped_at(3))
    rows = len(task.prompts) * task.group_size
    assert built.steps - drawn <= rows + 2
    assert_same_rows(engine.run(task, inputs_of(lab), ignore).payload, whole.payload)


def test_a_vllm_that_draws_by_itself_is_found_out(
    lab: Lab, llm: type[vllm_double.LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm, "obeys", False)
    with pytest.raises(InvariantBroken, match="did not draw row"):
        engine_of(SamplingChoice.VLLM).run(small(rollout_task(lab)), inputs_of(lab), ignore)


def test_a_vllm_that_does_not_start_is_one_sentence(
    lab: Lab, llm: type[vllm_double.LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object) -> None:
        raise ValueError("no kernel for this device")

    monkeypatch.setattr(llm, "_base", fail)
    with pytest.raises(Unavailable, match="no kernel for this device") as caught:
        engine_of(SamplingChoice.VLLM).run(small(rollout_task(lab)), inputs_of(lab), ignore)
    assert caught.value.code == "vllm_failed"


def test_without_vllm_the_worker_stops_before_it_has_so_much_as_a_key(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    options = {"orchestrator": "http://127.0.0.1:1", "data_dir": tmp_path / "worker"}
    config = load_config(None, {}, {**options, "engine": "vllm"})
    with pytest.raises(InvalidRequest, match=r"shoal\[vllm\]") as caught:
        asyncio.run(serve(config, asyncio.Event()))
    assert caught.value.code == "no_vllm"
    assert not (tmp_path / "worker").exists()
    with pytest.raises(InvalidRequest, match=r"shoal\[vllm\]"):
        engine_of(SamplingChoice.VLLM).prepare()
