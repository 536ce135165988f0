"""The upload gate: a rate shared in turns, caps for one and for all."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from instant_loop import run_instantly

from shoal.network.blob_gate import SLICE_BYTES, UploadGate
from shoal.protocol.errors import Unavailable


async def shares(keys: dict[str, list[str]], slices: int) -> dict[str, int]:
    """What each downloader got of the first `slices`, by the name it is known to the gate as."""
    gate = UploadGate(400.0, max_serves=64)
    sent = dict.fromkeys(keys, 0)
    enough = asyncio.Event()

    async def download(name: str, key: str) -> None:
        with gate.serving(key):
            while not enough.is_set():
                await gate.turn(key, SLICE_BYTES)
                sent[name] += SLICE_BYTES
                if sum(sent.values()) >= slices * SLICE_BYTES:
                    enough.set()

    await asyncio.gather(*(download(name, key) for name, names in keys.items() for key in names))
    return sent


def test_greedy_downloader_does_not_starve_another() -> None:
    sent = run_instantly(shares({"greedy": ["g"] * 8, "modest": ["m"]}, 300))
    assert sent["modest"] > 0.4 * sum(sent.values())


def test_without_turns_by_requester_the_greedy_one_gets_most() -> None:
    # Control: nine requests that the gate cannot tell apart share by request.
    sent = run_instantly(shares({"greedy": ["same"] * 8, "modest": ["same"]}, 300))
    assert sent["modest"] < 0.2 * sum(sent.values())


def test_rate_holds_over_time() -> None:
    async def main() -> None:
        gate = UploadGate(80.0)  # 10 MB/s
        loop = asyncio.get_running_loop()
        with gate.serving("a"):
            begun_s = loop.time()
            for _ in range(64):
                await gate.turn("a", SLICE_BYTES)
            took_s = loop.time() - begun_s
        # All before the last, less what may go at once, at the rate and not above.
        assert took_s == pytest.approx((63 * SLICE_BYTES - 10e6 * 0.05) / 10e6, rel=1e-6)

    run_instantly(main())


def test_unlimited_gate_lets_through_at_once() -> None:
    async def main() -> None:
        gate = UploadGate()
        assert not gate.is_limited
        with gate.serving("a"):
            await gate.turn("a", 1 << 40)

    run_instantly(main())


def test_caps_are_said_with_a_time_to_come_back() -> None:
    gate = UploadGate(max_serves=3, max_serves_per_requester=2)
    with contextlib.ExitStack() as held:
        held.enter_context(gate.serving("a"))
        held.enter_context(gate.serving("a"))
        for requester in ("a",):
            with (
                pytest.raises(Unavailable, match="2 of them yours") as caught,
                gate.serving(requester),
            ):
                pass
        assert (caught.value.code, caught.value.retry_after_s) == ("overloaded", 1)
        held.enter_context(gate.serving("b"))
        with pytest.raises(Unavailable), gate.serving("c"):
            pass
    assert gate.meters.value("blob_serves_refused") == 2
    # Control: room comes back with the end of each.
    with gate.serving("a"), gate.serving("a"), gate.serving("c"):
        pass


def test_request_that_is_gone_holds_up_nobody() -> None:
    async def main() -> None:
        gate = UploadGate(8.0)  # 1 MB/s: one slice takes 66 ms
        with gate.serving("gone"), gate.serving("here"):
            for _ in range(4):
                await gate.turn("gone", SLICE_BYTES)
            gone = asyncio.ensure_future(gate.turn("gone", SLICE_BYTES))
            await asyncio.sleep(0)
            gone.cancel()
            await asyncio.wait_for(gate.turn("here", SLICE_BYTES), 10)

    run_instantly(main())
