"""A requester whose work nobody takes hears why, once, and when that is over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from orchestrator_bidders import sell, taken
from orchestrator_lab import Lab, open_lab, run

from shoal.orchestrator.store.tables import EventRow
from shoal.protocol.errors import Unavailable


class Wait:
    """One job's lot, sold to nobody yet, and what its requester is told."""

    def __init__(self, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lab = lab
        self.version: int | None = 3
        # Nothing drives the lab's jobs.
        monkeypatch.setattr(lab.orchestrator.jobs, "running_version", lambda _: self.version)

    async def after_s(self, seconds: int) -> list[dict[str, Any]]:
        """All that was told by then; the clock is looked at now and at the end."""
        await self.lab.orchestrator.standstills.look()
        self.lab.time.advance(1_000 * seconds)
        await self.lab.orchestrator.standstills.look()
        rows = sorted(await self.lab.rows(EventRow), key=lambda row: row.seq)
        return [json.loads(row.data) for row in rows if row.type == "health"]


async def sold(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, *, bid: dict[str, Any] | None, **lot: Any
) -> Wait:
    """A lot that was cleared for at most one bidder."""
    job = await lab.add_job()
    if bid is not None:
        peer = await lab.peer()
        await peer.bid(**bid)
    await lab.open_sale(job, **lot)
    sell(lab)
    await lab.settled()
    return Wait(lab, monkeypatch)


@pytest.mark.parametrize(
    ("bid", "lot", "cause", "words"),
    [
        (
            None,
            {},
            "no_bids",
            ("no worker bids for its rollout tasks", "$0.001 for a unit", "fetch its base"),
        ),
        (
            {"capacity": 128},
            {"num_units": 1_024, "parcel_units": 512},
            "tasks_too_large",
            ("has 512 units", "takes 128 at once", "tasks.rollout of at most 128"),
        ),
        (
            {"price_micros": 700},
            {"reserve_micros": 500},
            "too_dear",
            ("asks $0.0007 for a unit", "pays is $0.0005", "budget.max_unit_price.rollout"),
        ),
        ({}, {"reserve_micros": 50_000}, "stakes_too_small", ("free stake", "tasks.rollout")),
    ],
)
def test_what_nobody_can_take_is_told_with_the_figures_in_the_way(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bid: dict[str, Any] | None,
    lot: dict[str, Any],
    cause: str,
    words: tuple[str, ...],
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            wait = await sold(lab, monkeypatch, bid=bid, **lot)
            assert await wait.after_s(29) == []
            (told,) = await wait.after_s(1)
            assert (told["code"], told["active"]) == ("nobody_takes_work", True)
            assert (told["cause"], told["policy_version"]) == (cause, 3)
            said = f"{told['finding']}: {told['remedy']}"
            assert all(word in said for word in words), said
            assert len(await wait.after_s(3_600)) == 1

    run(scenario)


@pytest.mark.parametrize("version", [3, None])
def test_work_that_is_taken_at_last_is_over_for_a_job_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int | None
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            wait = await sold(lab, monkeypatch, bid={"capacity": 1}, parcel_units=2)
            assert len(await wait.after_s(30)) == 1
            large = await lab.peer()
            await large.bid(capacity=2)
            await taken(lab, large)
            wait.version = version
            over = (await wait.after_s(1))[1:]
            ended = [("nobody_takes_work", False)] if version is not None else []
            assert [(told["code"], told["active"]) for told in over] == ended

    run(scenario)


def test_another_cause_is_news(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            wait = await sold(lab, monkeypatch, bid=None, parcel_units=2)
            await wait.after_s(30)
            small = await lab.peer()
            await small.bid(capacity=1)
            await lab.settled()
            causes = [told["cause"] for told in await wait.after_s(1)]
            assert causes == ["no_bids", "tasks_too_large"]

    run(scenario)


def test_what_could_not_be_written_is_told_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            wait = await sold(lab, monkeypatch, bid=None)

            async def refuse(*_: object) -> None:
                raise Unavailable("no disk", code="database")

            with monkeypatch.context() as patch:
                patch.setattr(lab.orchestrator.journal, "event", refuse)
                assert await wait.after_s(30) == []
            assert len(await wait.after_s(0)) == 1

    run(scenario)
