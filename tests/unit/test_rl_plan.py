"""The plan: which version samples what, what may be issued, how the same work is known again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from learning_fixtures import JOB_ID, make_spec

from shoal.protocol.blob import BlobRef
from shoal.protocol.policy import BaseModelRef, ModelFile, PolicyVersion
from shoal.protocol.task import Task
from shoal.rl.plan import Plan, admitted_batches, sampling_version, task_stem

BLOB = BlobRef(sha256="1" * 64, size_bytes=8)
BASE = BaseModelRef(
    name="test", files=(ModelFile(path="config.json", blob=BLOB),), num_parameters=1
)
VERSION = PolicyVersion(job_id=JOB_ID, version=0, base_sha256="0" * 64, adapter=BLOB)


def make_plan(**changes: object) -> Plan:
    return Plan(
        job_id=JOB_ID,
        spec=make_spec(**changes),
        base=BASE,
        train_sizes=[1 << 40],
        eval_sizes=[1000],
    )


@given(staleness=st.integers(0, 8), steps=st.integers(1, 40))
def test_batches_are_issued_as_soon_as_and_never_before_they_are_fresh_enough(
    staleness: int, steps: int
) -> None:
    spec = make_spec(max_staleness=staleness, max_steps=steps)
    issued = 0
    for version in range(steps):
        admitted = admitted_batches(version, spec)
        # What this version lets out is sampled under a version that exists, in time.
        for batch in range(issued, admitted):
            sampled = sampling_version(batch, staleness)
            assert sampled <= version
            assert batch - sampled <= staleness
            assert version == 0 or sampled == version
        # The batch that this version waits for is out; so the learner is never starved.
        assert admitted > version
        assert admitted - version <= staleness + 1
        issued = admitted
    assert issued == steps


def test_the_same_work_planned_again_has_the_same_stem_and_an_id_of_its_own() -> None:
    plan, again = make_plan(), make_plan()
    first = plan.rollout(3, VERSION, plan.prompts(3), (0, 1))
    second = again.rollout(3, VERSION, again.prompts(3), (0, 1))
    assert task_stem(first.task_id) == task_stem(second.task_id)
    assert first.task_id != second.task_id
    renamed = second.model_copy(update={"task_id": first.task_id})
    assert renamed.digest() == first.digest()


def test_other_work_has_another_stem() -> None:
    plan = make_plan()
    prompts = plan.prompts(3)
    held_out = plan.held_out()
    later = VERSION.model_copy(update={"version": 1})
    tasks: list[Task] = [
        plan.rollout(3, VERSION, prompts, (0, 1)),
        plan.rollout(3, VERSION, prompts, (1, 0)),
        plan.rollout(4, VERSION, plan.prompts(4), (0, 1)),
        plan.rollout(3, later, prompts, (0, 1)),
        plan.gradient(3, VERSION, BLOB, num_rows=4, num_groups=1),
        plan.gradient(3, VERSION, BLOB, num_rows=8, num_groups=1),
        plan.evaluation(VERSION, held_out, (0, 1)),
        plan.evaluation(VERSION, held_out, (0, 2)),
    ]
    stems = {task_stem(task.task_id) for task in tasks}
    assert len(stems) == len(tasks)


def test_a_slot_is_drawn_again_with_a_fresh_prompt_as_often_as_the_job_says() -> None:
    plan = make_plan(dynamic_sampling_rounds=2)
    groups = plan.spec.groups_per_batch
    prompts = plan.prompts(0)
    assert len(prompts) == len(set(prompts)) == 3 * groups
    chain = [1]
    while (following := plan.redrawn(chain[-1])) is not None:
        chain.append(following)
    assert chain == [1, 1 + groups, 1 + 2 * groups]
    # The first draw is the same as that of a job without dynamic sampling.
    plain = make_plan()
    assert plain.prompts(0) == prompts[:groups]
    assert plain.redrawn(0) is None


@pytest.mark.parametrize("slots", [(0,), (3, 7)])
def test_a_task_names_the_slots_its_uniforms_are_drawn_for(slots: tuple[int, ...]) -> None:
    plan = make_plan(dynamic_sampling_rounds=1)
    prompts = plan.prompts(0)
    task = plan.rollout(0, VERSION, prompts, slots)
    assert task.slots == slots
    assert task.prompts == tuple(prompts[slot] for slot in slots)
