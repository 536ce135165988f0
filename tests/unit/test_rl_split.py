"""Tasks in parts: any cut gives what the whole task gives."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.numpy
from learning_fixtures import Lab, write_base
from site_story import (
    assert_same_gradient,
    assert_same_rows,
    evaluate_task,
    gradient_task,
    relative,
    rollout_task,
)

from shoal.protocol.canonical import sha256_hex
from shoal.protocol.errors import PeerFault
from shoal.protocol.learning import CodecKind, CodecSpec, GradientSpec
from shoal.protocol.task import EvaluateTask, GradientTask, RolloutTask
from shoal.rl import codec
from shoal.rl.batch import GradientSlice
from shoal.rl.evaluation import run_evaluate
from shoal.rl.gradient import run_gradient
from shoal.rl.rollout import run_rollout
from shoal.rl.split import Part, add_gradients, join_rows, split_task

TOPK = CodecSpec(kind=CodecKind.TOPK, error_feedback=0.95)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab.open(write_base(tmp_path_factory.mktemp("base")))


def run_part(lab: Lab, part: Part) -> bytes:
    match part.task:
        case RolloutTask():
            return run_rollout(lab.policy, part.task, lab.environments)
        case EvaluateTask():
            return run_evaluate(lab.policy, part.task, lab.environments)
        case GradientTask():
            assert part.batch_slice is not None
            assert part.task.slice.sha256 == sha256_hex(part.batch_slice)
            return run_gradient(lab.policy, part.task, part.batch_slice).payload


@pytest.mark.parametrize("num_parts", [1, 2, 3, 99])
def test_rollouts_do_not_depend_on_the_cut(lab: Lab, num_parts: int) -> None:
    task = rollout_task(lab)
    parts = split_task(task, None, num_parts)
    assert len(parts) == min(num_parts, len(task.prompts))
    sizes = [len(part.task.prompts) for part in parts if isinstance(part.task, RolloutTask)]
    assert max(sizes) - min(sizes) <= 1
    joined = join_rows([run_part(lab, part) for part in parts])
    assert_same_rows(joined, run_rollout(lab.policy, task, lab.environments))


def test_parts_drawn_as_if_each_began_the_batch_would_differ(lab: Lab) -> None:
    # The negative control: were draws not keyed by the prompt's slot, the cut would show.
    task = rollout_task(lab)
    whole = safetensors.numpy.load(run_rollout(lab.policy, task, lab.environments))
    parts = [
        Part(task=part.task.model_copy(update={"slots": tuple(range(n))}), batch_slice=None)
        for part in split_task(task, None, 2)
        if isinstance(part.task, RolloutTask) and (n := len(part.task.prompts))
    ]
    joined = safetensors.numpy.load(join_rows([run_part(lab, part) for part in parts]))
    assert not np.array_equal(joined["token_ids"], whole["token_ids"])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_evaluations_do_not_depend_on_the_cut(lab: Lab, temperature: float) -> None:
    task = evaluate_task(lab, temperature)
    joined = join_rows([run_part(lab, part) for part in split_task(task, None, 3)])
    assert_same_rows(joined, run_evaluate(lab.policy, task, lab.environments))


@pytest.mark.parametrize("num_parts", [2, 3, 99])
def test_gradients_add_up(lab: Lab, num_parts: int) -> None:
    task, data = gradient_task(lab, GradientSpec())
    parts = split_task(task, data, num_parts)
    assert len(parts) == min(num_parts, task.num_groups)
    payload, residual = add_gradients(task, [run_part(lab, part) for part in parts], None)
    assert residual is None
    assert_same_gradient(payload, run_gradient(lab.policy, task, data).payload)


def test_a_missing_part_is_no_whole_gradient(lab: Lab) -> None:
    task, data = gradient_task(lab, GradientSpec())
    payloads = [run_part(lab, part) for part in split_task(task, data, 2)]
    payload, _ = add_gradients(task, payloads[:1], None)
    with pytest.raises(AssertionError):
        assert_same_gradient(payload, run_gradient(lab.policy, task, data).payload)


def test_only_the_sum_is_coded(lab: Lab) -> None:
    task, data = gradient_task(lab, GradientSpec(codec=TOPK))
    whole = run_gradient(lab.policy, task, data)
    assert whole.residual is not None
    parts = split_task(task, data, 2)
    for earlier in (None, whole.residual):
        payload, residual = add_gradients(task, [run_part(lab, part) for part in parts], earlier)
        expected = run_gradient(lab.policy, task, data, residual=earlier)
        assert expected.residual is not None
        assert residual is not None
        found, ours = safetensors.numpy.load(payload), safetensors.numpy.load(expected.payload)
        assert found.keys() == ours.keys()
        assert np.array_equal(found["gradient.places"], ours["gradient.places"])
        size = len(residual) // 4
        kept = codec.decode_residual(residual, size), codec.decode_residual(expected.residual, size)
        assert relative(*kept) <= 1e-5


def test_rows_keep_their_prompt_and_tokens_are_shared_out(lab: Lab) -> None:
    task, data = gradient_task(lab, GradientSpec())
    whole = decoded(task, data)
    seen, loads = [], []
    for part in split_task(task, data, 2):
        assert isinstance(part.task, GradientTask)
        assert part.batch_slice is not None
        few = decoded(part.task, part.batch_slice)
        loads.append(few.num_tokens + sum(len(prompt) for prompt in few.prompts))
        seen += rows_of(few)
    assert sorted(seen) == sorted(rows_of(whole))
    assert max(loads) <= 4 / 3 * sum(loads) / 2


def test_local_steps_stay_together(lab: Lab) -> None:
    task, data = gradient_task(lab, GradientSpec(local_steps=2))
    (part,) = split_task(task, data, 4)
    assert part == Part(task=task, batch_slice=data)


def test_a_gradient_without_its_slice_is_a_fault(lab: Lab) -> None:
    task, _ = gradient_task(lab, GradientSpec())
    with pytest.raises(PeerFault, match="without its slice"):
        split_task(task, None, 2)
    with pytest.raises(PeerFault, match="gradient slice"):
        split_task(task, b"nonsense", 2)


def decoded(task: GradientTask, data: bytes) -> GradientSlice:
    return GradientSlice.decode(
        data, num_rows=task.num_rows, num_prompts=task.num_groups, vocab_size=1 << 20
    )


def rows_of(rows: GradientSlice) -> list[tuple[object, ...]]:
    return [
        (
            rows.prompts[prompt].tolist(),
            rows.token_ids[row].tolist(),
            rows.logprobs[row].tolist(),
            float(rows.advantages[row]),
            bool(rows.truncated[row]),
        )
        for row, prompt in enumerate(rows.prompt_of_row.tolist())
    ]
