"""Batches: complete in any order, the same in every order, scaled as the job says."""

from __future__ import annotations

import asyncio
import itertools

import numpy as np
import pytest
from deliveries import made_up_delivery

from shoal.orchestrator.batches import Batch, GradientSum, Scored
from shoal.protocol.errors import InvariantBroken
from shoal.protocol.learning import AdvantageScale
from shoal.rl.advantage import group_advantages
from shoal.rl.batch import GradientPayload, GradientStats
from shoal.rl.gradient import Group


def scored(rewards: tuple[float, ...], length: int = 2, version: int = 3) -> Scored:
    rows = len(rewards)
    rewards_b = np.array(rewards, dtype=np.float32)
    advantages_b = group_advantages(rewards_b, rows, AdvantageScale.GROUP_STD)
    return Scored(
        group=Group(
            prompt=np.ones(3, dtype=np.int32),
            token_ids=tuple(np.ones(length, dtype=np.int32) for _ in range(rows)),
            logprobs=tuple(np.zeros(length, dtype=np.float32) for _ in range(rows)),
            advantages=advantages_b,
            truncated=np.zeros(rows, dtype=np.bool_),
            teaching=advantages_b != 0,
        ),
        environment=0,
        rewards=rewards,
        policy_version=version,
    )


def test_a_batch_is_complete_when_every_place_is_filled_in_any_order() -> None:
    batch = Batch(number=5, num_groups=3)
    batch.add((2, 0), [scored((1.0, 0.0)), scored((0.0, 0.0))], "b")
    assert not batch.complete.is_set()
    batch.add((1,), [scored((1.0, 0.0), length=4)], "a")
    assert batch.complete.is_set()
    assert batch.statements == ["b", "a"]
    assert batch.num_tokens == 4 + 4 + 8
    # The group without spread teaches nothing; the others come in the order of their places.
    assert [group.num_tokens for group in batch.teaching()] == [8, 4]
    assert [group.num_tokens for group in batch.all_groups()] == [4, 8, 4]
    metrics = batch.metrics(5, ["addition"])
    assert metrics["reward"] == pytest.approx(2 / 6)
    assert metrics["frac_reward_zero_std"] == pytest.approx(1 / 3)
    assert metrics["sample/staleness_max"] == 2
    assert metrics["completions/max_length"] == 4


def test_a_group_drawn_again_takes_the_place_of_the_first_slot() -> None:
    batch = Batch(number=0, num_groups=2)
    batch.add((1,), [scored((1.0, 0.0))], "a")
    assert not batch.complete.is_set()
    batch.num_redrawn += 1
    batch.add((0 + 2 * 2,), [scored((0.0, 1.0), length=5)], "b")
    assert batch.complete.is_set()
    assert [group.num_tokens for group in batch.all_groups()] == [10, 4]
    assert batch.metrics(0, ["addition"])["sample/redrawn_groups"] == 1


def test_with_the_batchs_spread_advantages_are_known_only_once_it_is_complete() -> None:
    rewards = [(1.0, 0.0), (0.5, 0.25), (0.0, 0.0)]
    due = group_advantages(
        np.array(rewards, dtype=np.float32).reshape(-1), 2, AdvantageScale.BATCH_STD
    )
    for order in itertools.permutations(range(3)):
        batch = Batch(number=0, num_groups=3, advantage_scale=AdvantageScale.BATCH_STD)
        for place in order:
            batch.add((place,), [scored(rewards[place])], "a")
        advantages = np.concatenate([group.advantages for group in batch.all_groups()])
        assert advantages.tolist() == due.tolist()
    assert due.tolist() != pytest.approx(
        np.concatenate([scored(r).group.advantages for r in rewards]).tolist()
    )


def gradient(value: float) -> GradientPayload:
    arrays = {"a": np.full(2, value, dtype=np.float32)}
    return GradientPayload(gradients=arrays, stats=GradientStats(), coded={})


def test_slices_are_added_in_the_order_of_the_plan_whoever_was_first() -> None:
    async def scenario() -> None:
        total = GradientSum(num_slices=2)
        await total.take(made_up_delivery((10, 11), gradient(2.0)))
        assert not total.complete.is_set()
        await total.take(made_up_delivery((2, 3, 4), gradient(1.0)))
        assert total.complete.is_set()
        assert [payload.gradients["a"][0] for payload in total.payloads()] == [1.0, 2.0]
        assert total.statements() == (f"{2:064d}", f"{10:064d}")
        assert GradientSum(num_slices=0).complete.is_set()
        odd = GradientSum(num_slices=1)
        await odd.take(made_up_delivery((0,), object()))
        with pytest.raises(InvariantBroken):
            odd.payloads()

    asyncio.run(scenario())
