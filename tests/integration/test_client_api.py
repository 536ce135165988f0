"""The SDK against an HTTP server on loopback that answers well, badly, or not at all."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from client_records import INFO, job

from shoal.client import api
from shoal.client.api import ShoalClient
from shoal.client.download import download_model
from shoal.client.follow import follow_job
from shoal.client.output import Output
from shoal.protocol.errors import InvalidRequest, NotFound, PeerFault, Unavailable

JOB_ID = "0x" + "12" * 32
WEIGHTS = b"weights" * 1000
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def with_server(
    routes: dict[str, Handler], use: Callable[[ShoalClient, str], Awaitable[None]]
) -> None:
    """Runs ``use`` with a client of a server that answers GETs on ``routes``."""

    async def go() -> None:
        app = web.Application()
        for path, handler in routes.items():
            app.router.add_get(path, handler)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            async with ShoalClient(url) as client:
                await use(client, url)
        finally:
            await runner.cleanup()

    asyncio.run(go())


def answers(value: object, status: int = 200) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.json_response(value, status=status)

    return handler


def sends(data: bytes, status: int = 200) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(body=data, status=status)

    return handler


def test_errors_cross_the_wire_as_themselves() -> None:
    error = NotFound("There is no job 0x12.", code="no_job", job_id="0x12")

    async def use(client: ShoalClient, url: str) -> None:
        with pytest.raises(NotFound, match=r"There is no job 0x12\.") as caught:
            await client.job(JOB_ID)
        assert caught.value.code == "no_job"

    with_server({f"/v1/market/jobs/{JOB_ID}": answers(error.to_wire(), status=404)}, use)


@pytest.mark.parametrize("body", [b"<html>", b"[" * 100_000, b'{"jobs": 3}', b"\xff"])
def test_what_is_not_an_orchestrator_is_told_so(body: bytes) -> None:
    async def use(client: ShoalClient, url: str) -> None:
        with pytest.raises(PeerFault):
            await client.jobs()

    with_server({"/v1/market/jobs": sends(body)}, use)


def test_an_answer_without_end_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "MAX_ANSWER_BYTES", 10_000)

    async def use(client: ShoalClient, url: str) -> None:
        with pytest.raises(PeerFault, match="exceeds"):
            await client.bundle(JOB_ID)

    with_server({f"/v1/provenance/{JOB_ID}/bundle": sends(b"x" * 10_001)}, use)


def test_an_answer_at_the_limit_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "MAX_ANSWER_BYTES", 10_000)

    async def use(client: ShoalClient, url: str) -> None:
        assert len(await client.bundle(JOB_ID)) == 10_000

    with_server({f"/v1/provenance/{JOB_ID}/bundle": sends(b"x" * 10_000)}, use)


def test_nobody_there() -> None:
    async def go() -> None:
        async with ShoalClient("http://127.0.0.1:9") as client:
            assert not await client.healthy()
            with pytest.raises(Unavailable, match="shoal up"):
                await client.info()

    asyncio.run(go())


def test_jobs_are_newest_first() -> None:
    listed = [job(job_id="0x" + f"{n:02d}" * 32, created_ms=n) for n in (1, 3, 2)]

    async def use(client: ShoalClient, url: str) -> None:
        assert [view.created_ms for view in await client.jobs()] == [3, 2, 1]

    with_server({"/v1/market/jobs": answers({"jobs": listed})}, use)


def test_events_are_followed_to_the_end_of_the_job() -> None:
    pages = {0: [1, 4], 4: [9], 9: []}

    async def events(request: web.Request) -> web.StreamResponse:
        page = pages[int(request.query["after"])]
        return web.json_response(
            {"events": [{"seq": seq, "at_ms": 1, "type": "x", "data": {}} for seq in page]}
        )

    async def use(client: ShoalClient, url: str) -> None:
        assert [event.seq async for event in client.follow_events(JOB_ID)] == [1, 4, 9]

    with_server(
        {
            f"/v1/market/jobs/{JOB_ID}": answers(job(state="complete")),
            f"/v1/market/jobs/{JOB_ID}/events": events,
        },
        use,
    )


def test_following_survives_an_orchestrator_s_restart(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.client.follow.POLL_S", 0.01)
    replies = [
        answers(job(policy_version=1)),
        answers(Unavailable("The orchestrator is starting.").to_wire(), status=503),
        answers(job(policy_version=80)),
        answers(job(policy_version=150, state="complete")),
    ]
    seen: list[int] = []

    async def current(request: web.Request) -> web.StreamResponse:
        return await replies.pop(0)(request)

    async def note(view: Any) -> None:
        seen.append(view.policy_version)

    async def use(client: ShoalClient, url: str) -> None:
        view = await follow_job(client, JOB_ID, Output(json_mode=True), on_view=note)
        assert view.policy_version == 150

    with_server({f"/v1/market/jobs/{JOB_ID}": current}, use)
    assert seen == [1, 80, 150]
    captured = capsys.readouterr()
    versions = [json.loads(line)["job"]["policy_version"] for line in captured.out.splitlines()]
    assert versions == [1, 80, 150]
    assert "Still trying" in captured.err


CONFIG = b'{"model_type": "llama"}'


def named(path: str, content: bytes) -> dict[str, Any]:
    return {
        "path": path,
        "sha256": hashlib.sha256(content).hexdigest(),
        "size_bytes": len(content),
    }


def model_routes(
    content: bytes, *, claims: dict[str, object], base: str = "some/hub-model", base_file: str = ""
) -> dict[str, Handler]:
    """A published adapter that is served as ``content``, and its base of one file."""
    file, config = named("adapter_model.safetensors", WEIGHTS), named("config.json", CONFIG)
    blob = {key: config[key] for key in ("sha256", "size_bytes")}
    files = [{"path": base_file or "config.json", "blob": blob}]
    running = Unavailable("The job is running.", code="not_final")

    async def info(request: web.Request) -> web.StreamResponse:
        return web.json_response(INFO | {"blob_urls": [str(request.url.origin())]})

    return {
        "/v1/market/info": info,
        f"/v1/models/{JOB_ID}": answers(
            {"files": [file | claims], "base": {"name": base, "files": files, "num_parameters": 1}}
        ),
        f"/v1/provenance/{JOB_ID}/bundle": answers(running.to_wire(), status=503),
        f"/blobs/{file['sha256']}": sends(content),
        f"/blobs/{config['sha256']}": sends(CONFIG),
    }


def test_a_model_is_downloaded_and_checked(tmp_path: Path) -> None:
    async def use(client: ShoalClient, url: str) -> None:
        model = await download_model(client, JOB_ID, tmp_path / "model")
        (path,) = model.files
        assert path.read_bytes() == WEIGHTS
        # A hub's base is not fetched, and a running job has no bundle.
        assert list((tmp_path / "model").iterdir()) == [path]
        assert (model.base, model.bundle) == ("some/hub-model", None)

    with_server(model_routes(WEIGHTS, claims={}), use)


def test_a_base_that_is_on_no_hub_comes_with_the_bundle(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    routes = model_routes(WEIGHTS, claims={}, base="builtin:tiny")
    routes[f"/v1/provenance/{JOB_ID}/bundle"] = sends(b"the bundle")

    async def use(client: ShoalClient, url: str) -> None:
        model = await download_model(client, JOB_ID, folder)
        assert model.base == str(folder / "base")
        assert (folder / "base/config.json").read_bytes() == CONFIG
        assert (folder / "bundle.json").read_bytes() == b"the bundle"
        assert [path.name for path in model.files] == ["adapter_model.safetensors"]
        assert str(folder / "base") in "".join(model.python())

    with_server(routes, use)
    # What is there already is not fetched again; what was changed is.
    (folder / "base/config.json").write_bytes(b"x" * len(CONFIG))
    routes[f"/blobs/{hashlib.sha256(WEIGHTS).hexdigest()}"] = sends(b"", status=404)
    with_server(routes, use)


@pytest.mark.parametrize("path", ["modeling.py", "weights.bin", "../config.json"])
def test_a_base_of_other_files_than_a_model_s_is_refused(tmp_path: Path, path: str) -> None:
    async def use(client: ShoalClient, url: str) -> None:
        with pytest.raises(PeerFault):
            await download_model(client, JOB_ID, tmp_path)
        assert os.listdir(tmp_path) == []

    with_server(model_routes(WEIGHTS, claims={}, base="/models/own", base_file=path), use)


def test_a_paused_job_is_not_followed_for_ever() -> None:
    async def use(client: ShoalClient, url: str) -> None:
        assert (await client.wait(JOB_ID, timeout_s=5)).ended
        view = await follow_job(client, JOB_ID, Output(json_mode=True))
        assert view.state.value == "paused"

    standing = {"job_id": JOB_ID, "state": "paused", "reason": "the budget is used up"}
    routes = {
        f"/v1/market/jobs/{JOB_ID}": answers(job(state="paused")),
        f"/v1/market/jobs/{JOB_ID}/state": answers(standing),
    }
    with_server(routes, use)


def test_the_end_of_a_job_is_waited_for_at_the_orchestrator_and_asked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(api, "POLL_INTERVAL_S", 0.01)
    waits_s: list[float] = []

    async def state(request: web.Request) -> web.StreamResponse:
        waits_s.append(float(request.query["wait_s"]))
        name = "complete" if len(waits_s) == 3 else "running"
        return web.json_response({"job_id": JOB_ID, "state": name, "reason": ""})

    async def use(client: ShoalClient, url: str) -> None:
        assert (await client.wait(JOB_ID, timeout_s=20)).state.value == "complete"
        # Longer than the pause between two questions, and not so long that a request gives up.
        assert len(waits_s) == 3
        assert {1 < wait_s < api.REQUEST_TIMEOUT_S for wait_s in waits_s} == {True}

    routes = {
        f"/v1/market/jobs/{JOB_ID}": answers(job(state="complete")),
        f"/v1/market/jobs/{JOB_ID}/state": state,
    }
    with_server(routes, use)


@pytest.mark.parametrize("content", [b"other" + WEIGHTS[5:], WEIGHTS[:-1], WEIGHTS + b"x"])
def test_a_model_with_other_bytes_is_deleted(tmp_path: Path, content: bytes) -> None:
    async def use(client: ShoalClient, url: str) -> None:
        with pytest.raises(PeerFault, match="differs from its digest"):
            await download_model(client, JOB_ID, tmp_path)
        assert os.listdir(tmp_path) == []

    with_server(model_routes(content, claims={}), use)


@pytest.mark.parametrize(
    "claims", [{"path": "../../evil"}, {"path": "/etc/passwd"}, {"size_bytes": 1 << 50}]
)
def test_a_hostile_listing_is_refused(tmp_path: Path, claims: dict[str, object]) -> None:
    async def use(client: ShoalClient, url: str) -> None:
        with pytest.raises(PeerFault):
            await download_model(client, JOB_ID, tmp_path)
        assert os.listdir(tmp_path) == []

    with_server(model_routes(WEIGHTS, claims=claims), use)


def test_a_model_no_holder_serves(tmp_path: Path) -> None:
    routes = model_routes(WEIGHTS, claims={})
    routes |= {path: sends(b"", status=404) for path in routes if path.startswith("/blobs")}

    async def use(client: ShoalClient, url: str) -> None:
        with pytest.raises(Unavailable, match="cannot be fetched"):
            await download_model(client, JOB_ID, tmp_path)

    with_server(routes, use)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    async def use(client: ShoalClient, url: str) -> None:
        with pytest.raises(InvalidRequest, match="--out"):
            await download_model(client, JOB_ID, tmp_path / "file" / "model")

    with_server(model_routes(WEIGHTS, claims={}), use)


@pytest.mark.parametrize("body", [b"Internal Server Error", b""])
def test_an_orchestrator_that_broke_down_is_unavailable(body: bytes) -> None:
    async def use(client: ShoalClient, url: str) -> None:
        with pytest.raises(Unavailable, match="HTTP status 502"):
            await client.jobs()

    with_server({"/v1/market/jobs": sends(body, status=502)}, use)
