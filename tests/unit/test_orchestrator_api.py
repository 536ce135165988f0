"""The HTTP API: every error a sentence with its status, no internals, nothing oversized read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from learning_fixtures import write_base
from orchestrator_chain import ADDRESSES
from orchestrator_lab import DOMAIN, Lab, open_lab, run, until

from shoal.orchestrator import api as api_module
from shoal.protocol.errors import (
    ChainRejected,
    Clock,
    Expired,
    InvalidRequest,
    InvariantBroken,
    NotFound,
    OverBudget,
    PeerFault,
    ShoalError,
    Unauthorised,
    Unavailable,
)
from shoal.protocol.job import JobCommand, JobCommandKind, JobState
from shoal.protocol.record import MAX_RECORD_BYTES
from shoal.protocol.signing import sign

JOBS = "/v1/market/jobs"
NOBODY = "0x" + "0" * 64


@asynccontextmanager
async def calling(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
        yield client


@asynccontextmanager
async def serving(folder: Path, **settings: Any) -> AsyncIterator[tuple[Lab, httpx.AsyncClient]]:
    async with (
        open_lab(folder, **settings) as lab,
        calling(lab.orchestrator.api.app()) as client,
    ):
        yield lab, client


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidRequest("Mend it."), 400),
        (OverBudget("Too dear."), 402),
        (Unauthorised("Not yours."), 403),
        (NotFound("Not here."), 404),
        (Expired("Too late.", clock=Clock.DEADLINE), 409),
        (PeerFault("A lie."), 422),
        (InvariantBroken("Our fault."), 500),
        (ChainRejected("No.", reason="WrongEpoch"), 502),
        (Unavailable("Wait."), 503),
    ],
)
def test_every_error_has_its_status_and_its_sentence(
    tmp_path: Path, error: ShoalError, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as (lab, client):

            async def fail(job_id: str) -> Any:
                raise error

            monkeypatch.setattr(lab.orchestrator.intake, "require", fail)
            answer = await client.get(f"{JOBS}/{NOBODY}/metrics")
            assert (answer.status_code, answer.json()) == (status, error.to_wire())

    run(scenario)


def test_a_defect_hides_its_internals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as (lab, client):

            async def fail(job_id: str) -> Any:
                raise KeyError("the secret name of a table")

            monkeypatch.setattr(lab.orchestrator.intake, "require", fail)
            answer = await client.get(f"{JOBS}/{NOBODY}/events")
            assert answer.status_code == 500
            assert answer.json()["error"] == "InvariantBroken"
            assert "secret" not in answer.text
            assert "Traceback" not in answer.text

    run(scenario)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/no/such/route", 404),
        ("DELETE", "/health", 405),
        ("GET", f"{JOBS}/{NOBODY}/events?after=many", 400),
        ("GET", f"{JOBS}/{NOBODY}", 404),
        ("GET", f"{JOBS}/nonsense", 404),
        ("GET", f"/v1/models/{NOBODY}", 404),
        ("GET", f"/v1/provenance/{NOBODY}/bundle", 404),
        ("GET", f"{JOBS}/{NOBODY}/payouts", 404),
        ("GET", f"{JOBS}/{NOBODY}/payouts/{ADDRESSES['a']}", 404),
    ],
)
def test_what_is_not_there_is_said_in_our_own_form(
    tmp_path: Path, method: str, path: str, status: int
) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as (_, client):
            answer = await client.request(method, path)
            assert answer.status_code == status
            assert set(answer.json()) == {"error", "code", "message", "context"}

    run(scenario)


@pytest.mark.parametrize(
    "body", [b"", b"\xff", b"[]", b"{}", b"[" * 100_000, b'{"record": {"spec": 1}}']
)
def test_a_malformed_job_is_the_callers_to_mend(tmp_path: Path, body: bytes) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as (_, client):
            answer = await client.post(JOBS, content=body)
            assert answer.status_code == 400
            assert answer.json()["code"] == "malformed_job"

    run(scenario)


def test_an_oversize_body_is_not_read_to_its_end(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as (_, client):
            sent = 0

            async def endless() -> AsyncIterator[bytes]:
                nonlocal sent
                for _ in range(1_000):
                    sent += 1 << 16
                    yield b" " * (1 << 16)

            answer = await client.post(JOBS, content=endless())
            assert (answer.status_code, answer.json()["code"]) == (400, "oversize")
            assert sent < MAX_RECORD_BYTES + (1 << 18)

    run(scenario)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_base(tmp_path_factory.mktemp("base")))


def test_a_job_is_submitted_shown_and_cancelled(tmp_path: Path, base: str) -> None:

    async def scenario() -> None:
        async with serving(tmp_path, allow_local_models=True) as (lab, client):
            job = lab.make_job(model=base)
            answer = await client.post(JOBS, content=job.encode())
            assert answer.status_code == 201
            job_id = answer.json()["job_id"]
            assert answer.json()["coordinator"] == lab.context.account.address
            shown = (await client.get(f"{JOBS}/{job_id}")).json()
            assert (shown["state"], shown["escrow"]) == ("funding", None)
            assert [row["job_id"] for row in (await client.get(JOBS)).json()] == [job_id]
            unready = await client.get(f"/v1/provenance/{job_id}/bundle")
            assert (unready.status_code, unready.json()["code"]) == (503, "not_final")

            command = JobCommand(job_id=job_id, kind=JobCommandKind.CANCEL)
            forged = sign(command, DOMAIN, lab.context.account)
            path = f"{JOBS}/{job_id}/cancel"
            assert (await client.post(path, content=forged.encode())).status_code == 403
            signed = sign(command, DOMAIN, lab.requester)
            assert (await client.post(path, content=signed.encode())).status_code == 200
            assert (await client.get(f"{JOBS}/{job_id}")).json()["state"] == "cancelled"

    run(scenario)


def test_workers_are_shown_with_prices_and_load(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as (lab, client):
            job = await lab.add_job()
            peer = await lab.peer()
            await peer.bid(price_micros=123)
            await lab.lease(peer, await lab.open_sale(job))
            (shown,) = (await client.get("/v1/market/workers")).json()
            assert shown["account"] == peer.account.address
            assert (shown["connected"], shown["price_micros"]) == (True, {"rollout": 123})
            assert shown["units_in_flight"]["rollout"] == 2

    run(scenario)


def test_a_stream_tells_everything_up_to_the_end_and_then_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_module, "_HEARTBEAT_S", 0.01)

    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            journal = lab.orchestrator.journal
            await journal.event(job, "first", {})
            heard: list[str] = []
            idle = asyncio.Event()

            async def listen() -> None:
                async for part in lab.orchestrator.api._stream(job, 0):
                    heard.append(part)
                    if part.startswith(":"):
                        idle.set()

            listener = asyncio.create_task(listen())
            await idle.wait()
            await journal.finish(job, JobState.FAILED, "why")
            await listener
            told = [part for part in heard if not part.startswith(":")]
            assert [part.split("\n")[1] for part in told] == ["event: first", "event: job_failed"]
            # Whoever comes back later is told only what it missed.
            again = [part async for part in lab.orchestrator.api._stream(job, 1)]
            assert again == told[1:]

    run(scenario)


def test_info_tells_a_worker_and_a_client_where_everything_is(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as (lab, client):
            info = (await client.get("/v1/market/info")).json()
            assert info["p2p_addresses"] == list(lab.context.network.addresses)
            assert info["orchestrator"] == lab.context.account.address
            assert info["domain"] == lab.context.domain.to_json()
            assert (await client.get("/health")).json()["status"] == "ok"

    run(scenario)


async def waiting(lab: Lab, job: str) -> None:
    """Somebody waits for the end of the job."""
    await until(lambda: job in lab.orchestrator.journal._ended)


def test_who_waits_for_a_jobs_end_hears_of_it_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as (lab, client):
            job = await lab.add_job()
            path = f"{JOBS}/{job}/state?wait_s=1e9"
            answers = [asyncio.create_task(client.get(path)) for _ in range(2)]
            await waiting(lab, job)
            await lab.orchestrator.journal.event(job, "no end", {})
            assert not any(answer.done() for answer in answers)
            await lab.orchestrator.journal.finish(job, JobState.FAILED, "why")
            for answer in answers:
                said = (await answer).json()
                assert (said["state"], said["reason"]) == ("failed", "why")
            # Of one that has ended nobody waits, and nothing is remembered.
            assert (await client.get(path)).json()["state"] == "failed"
            assert job not in lab.orchestrator.journal._ended

    run(scenario)


def test_an_end_that_comes_while_it_is_asked_for_is_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as (lab, client):
            job = await lab.add_job()
            require = lab.orchestrator.intake.require

            async def overtaken(job_id: str) -> Any:
                row = await require(job_id)
                if row.state == JobState.RUNNING.value:
                    await lab.orchestrator.journal.finish(job_id, JobState.COMPLETE, "")
                return row

            monkeypatch.setattr(lab.orchestrator.intake, "require", overtaken)
            async with asyncio.timeout(api_module._HEARTBEAT_S / 2):
                answer = await client.get(f"{JOBS}/{job}/state?wait_s=1e9")
            assert answer.json()["state"] == "complete"

    run(scenario)


@pytest.mark.parametrize("ends", ["by itself", "with the process", "never was"])
def test_nobody_is_kept_waiting_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    if ends == "by itself":
        monkeypatch.setattr(api_module, "_HEARTBEAT_S", 0.01)

    async def scenario() -> None:
        async with serving(tmp_path) as (lab, client):
            job = await lab.add_job()
            wait_s = "nan" if ends == "never was" else "inf"
            answer = asyncio.create_task(client.get(f"{JOBS}/{job}/state?wait_s={wait_s}"))
            if ends == "with the process":
                await waiting(lab, job)
                lab.orchestrator.journal.dismiss()
            assert (await answer).json()["state"] == "running"

    run(scenario)


def test_waiting_for_a_job_nobody_knows_remembers_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as (lab, client):
            answer = await client.get(f"{JOBS}/{NOBODY}/state?wait_s=10")
            assert (answer.status_code, answer.json()["code"]) == (404, "no_job")
            assert not lab.orchestrator.journal._ended

    run(scenario)
