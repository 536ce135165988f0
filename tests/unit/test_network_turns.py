"""A crowd that comes at once is let in a few at a time, and nobody can close the door for long."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import pytest
import trio
from trio.testing import MockClock

from shoal.network import libp2p_turns
from shoal.network.libp2p_turns import Turns

TIMEOUT_S = 10.0
WORK_S = 0.05


def run(main: Callable[[], Awaitable[None]]) -> None:
    trio.run(main, clock=MockClock(autojump_threshold=0))


async def handshake(turns: Turns, cpu: trio.Lock, address: str, done: list[float]) -> None:
    """Five steps of work on the one processor, under the clock that a handshake has."""
    async with turns.taken(address):
        with trio.move_on_after(TIMEOUT_S):
            for _ in range(5):
                async with cpu:
                    await trio.sleep(WORK_S / 5)
            done.append(trio.current_time())


async def crowd(num_callers: int, addresses: int) -> list[float]:
    """When each of a crowd was in."""
    turns, cpu = Turns(), trio.StrictFIFOLock()
    done: list[float] = []
    async with trio.open_nursery() as nursery:
        for number in range(num_callers):
            nursery.start_soon(handshake, turns, cpu, f"192.0.2.{number % addresses}", done)
    return done


@pytest.mark.parametrize("addresses", [1, 200])
def test_a_crowd_that_needs_longer_than_a_handshake_may_last_gets_in(addresses: int) -> None:
    async def main() -> None:
        done = await crowd(500, addresses)
        assert len(done) == 500

    run(main)


def test_without_turns_the_crowd_runs_out_of_time_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(libp2p_turns, "_AT_ONCE", 500)
    monkeypatch.setattr(libp2p_turns, "_AT_ONCE_PER_ADDRESS", 500)

    async def main() -> None:
        assert len(await crowd(500, 1)) < 100

    run(main)


def test_one_address_that_is_stuck_holds_nobody_else_up() -> None:
    async def main() -> None:
        turns = Turns()

        async def stuck() -> None:
            async with turns.taken("192.0.2.1"):
                await trio.sleep(TIMEOUT_S)

        async with trio.open_nursery() as nursery:
            for _ in range(300):
                nursery.start_soon(stuck)
            await trio.sleep(5)
            async with turns.taken("192.0.2.2") as waited_s:
                assert waited_s <= 0.2
            nursery.cancel_scope.cancel()

    run(main)


def test_what_is_kept_of_an_address_goes_with_its_last_caller() -> None:
    async def main() -> None:
        turns = Turns()
        async with trio.open_nursery() as nursery:
            for number in range(50):
                nursery.start_soon(partial(_pass, turns, f"192.0.2.{number}"))
        assert not turns._lines

    run(main)


async def _pass(turns: Turns, address: str) -> None:
    async with turns.taken(address):
        await trio.lowlevel.checkpoint()
