"""`/metrics` and `/health`: every figure under its name, nothing that names a stranger."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from orchestrator_lab import Lab, open_lab, run
from prometheus_client.parser import text_string_to_metric_families

from shoal.network.meters import Meters
from shoal.orchestrator import metrics as metrics_module
from shoal.orchestrator.metrics import metered, rendered
from shoal.protocol.errors import Unavailable


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[tuple[Lab, httpx.AsyncClient]]:
    async with open_lab(folder) as lab:
        transport = httpx.ASGITransport(lab.orchestrator.api.app(), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
            yield lab, client


def values_of(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_what_happens_is_in_the_metrics(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as (lab, client):
            job = await lab.add_job()
            peer = await lab.peer()
            sale = await lab.open_sale(job)
            await lab.lease(peer, sale)
            answer = await client.get("/metrics")
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("text/plain")
            found = values_of(answer.text)
            assert found["shoal_workers", (("state", "connected"),)] == 1
            assert found["shoal_leases", (("state", "running"),)] == 1
            assert found["shoal_jobs", (("state", "running"),)] == 1
            assert found["shoal_chain_outbox", (("stage", "sent"),)] == 0
            assert found["process_resident_memory_bytes", ()] > 1 << 20
            served = ("outcome", "ok"), ("protocol", "/shoal/join/1")
            assert found["shoal_requests_served_total", served] == 1
            assert peer.node not in answer.text
            assert peer.account.address not in answer.text

    run(scenario)


def test_ended_leases_are_counted(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as (lab, client):
            job = await lab.add_job()
            peer = await lab.peer()
            await lab.lease(peer, await lab.open_sale(job))
            await lab.orchestrator.dispatcher.revoke_job(job, "the job has ended")
            found = values_of((await client.get("/metrics")).text)
            assert found["shoal_leases_ended_total", (("state", "revoked"),)] == 1

    run(scenario)


def test_samples_of_one_name_are_one_family() -> None:
    meters = Meters()
    meters.count("drops", cause="flood")
    meters.count("drops", 2, cause="size", plane="control")
    meters.gauge("open", 3)
    text = rendered(metered(meters.snapshot())).decode()
    assert text.count("# TYPE shoal_drops_total counter") == 1
    found = values_of(text)
    assert found["shoal_drops_total", (("cause", "flood"), ("plane", ""))] == 1
    assert found["shoal_drops_total", (("cause", "size"), ("plane", "control"))] == 2
    assert found["shoal_open", ()] == 3


def test_health_names_the_part_that_does_not_answer_and_no_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as (lab, client):
            well = await client.get("/health")
            assert (well.status_code, well.json()["status"]) == (200, "ok")
            assert well.json()["parts"] == {"database": "ok", "chain": "ok", "network": "ok"}

            async def down() -> int:
                raise Unavailable("Nothing answers at http://node/?key=hunter2.", code="rpc_down")

            monkeypatch.setattr(lab.chain, "now_s", down)
            monkeypatch.setattr(metrics_module, "_HEALTH_AGE_S", 0.0)
            ill = await client.get("/health")
            assert (ill.status_code, ill.json()["status"]) == (503, "failing")
            assert ill.json()["parts"]["chain"] == "does not answer (rpc_down)"
            assert ill.json()["parts"]["database"] == "ok"
            assert "hunter2" not in ill.text

    run(scenario)


def test_a_chain_that_hangs_does_not_hold_up_health(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as (lab, client):

            async def hang() -> int:
                await asyncio.Event().wait()
                return 0

            monkeypatch.setattr(lab.chain, "now_s", hang)
            monkeypatch.setattr(metrics_module, "_PART_S", 0.05)
            ill = await client.get("/health")
            assert ill.status_code == 503
            assert ill.json()["parts"]["chain"].startswith("no answer within")

    run(scenario)


def test_many_who_ask_cost_one_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as (lab, client):
            looks: list[Any] = []
            look = lab.chain.now_s

            async def counted() -> int:
                looks.append(None)
                return await look()

            monkeypatch.setattr(lab.chain, "now_s", counted)
            vitals = lab.orchestrator.api._views.vitals
            clock = [0.0]
            monkeypatch.setattr(vitals, "_monotonic_s", lambda: clock[0])
            await asyncio.gather(*(client.get("/health") for _ in range(5)))
            assert len(looks) == 1
            clock[0] = 10.0
            await client.get("/health")
            assert len(looks) == 2

    run(scenario)
