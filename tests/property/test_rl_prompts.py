"""Prompts are drawn by hash: reproducible, spread by weight, never twice in an evaluation."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol.errors import InvalidRequest
from shoal.protocol.job import EnvSpec
from shoal.protocol.record import MAX_INT
from shoal.rl.prompts import batch_seed, draw_prompts, eval_prompts

JOB = "0x" + "ab" * 32
OTHER_JOB = "0x" + "cd" * 32

env_lists = st.lists(
    st.tuples(st.floats(1e-3, 1e3), st.integers(1, 60)), min_size=1, max_size=5
).map(
    lambda pairs: (
        [EnvSpec(id="addition", weight=weight) for weight, _ in pairs],
        [size for _, size in pairs],
    )
)


@given(env_lists, st.integers(0, 2**40), st.integers(1, 64))
def test_drawn_prompts_exist_and_repeat(
    envs: tuple[list[EnvSpec], list[int]], batch: int, num_groups: int
) -> None:
    specs, sizes = envs
    prompts = draw_prompts(JOB, batch, num_groups, specs, sizes)
    assert len(prompts) == num_groups
    assert all(prompt.index < sizes[prompt.environment] for prompt in prompts)
    assert prompts == draw_prompts(JOB, batch, num_groups, specs, sizes)
    assert draw_prompts(JOB, batch, num_groups + 1, specs, sizes)[:num_groups] == prompts


@given(env_lists, st.data())
def test_eval_prompts_are_different_and_complete(
    envs: tuple[list[EnvSpec], list[int]], data: st.DataObject
) -> None:
    specs, sizes = envs
    wanted = data.draw(st.integers(1, sum(sizes)))
    prompts = eval_prompts(JOB, specs, sizes, wanted)
    assert len(set(prompts)) == len(prompts) == wanted
    assert all(prompt.index < sizes[prompt.environment] for prompt in prompts)
    with pytest.raises(InvalidRequest, match=r"eval\.num_examples"):
        eval_prompts(JOB, specs, sizes, sum(sizes) + 1)


def test_weights_share_out_the_prompts() -> None:
    specs = [EnvSpec(id="addition", weight=3.0), EnvSpec(id="addition", weight=1.0)]
    drawn = Counter(p.environment for p in draw_prompts(JOB, 0, 4000, specs, [1 << 20] * 2))
    assert 2850 < drawn[0] < 3150
    held_out = Counter(p.environment for p in eval_prompts(JOB, specs, [1 << 20] * 2, 100))
    assert held_out == {0: 75, 1: 25}
    # The first environment has too few; the second makes up for it.
    held_out = Counter(p.environment for p in eval_prompts(JOB, specs, [10, 1 << 20], 100))
    assert held_out == {0: 10, 1: 90}


def test_other_job_batch_or_slot_gives_other_draws() -> None:
    specs, sizes = [EnvSpec(id="addition")], [1 << 20]
    base = draw_prompts(JOB, 0, 8, specs, sizes)
    assert base != draw_prompts(JOB, 1, 8, specs, sizes)
    assert base != draw_prompts(OTHER_JOB, 0, 8, specs, sizes)
    assert eval_prompts(JOB, specs, sizes, 8) != eval_prompts(OTHER_JOB, specs, sizes, 8)
    seeds = {batch_seed(job, b) for job in (JOB, OTHER_JOB) for b in range(16)}
    assert len(seeds) == 32
    assert all(0 <= seed <= MAX_INT for seed in seeds)
